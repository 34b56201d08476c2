"""Looking in: copies of what is sent, and what `quintet doctor` says of a broker."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Self

from quintet.errors import CallError, TransportError
from quintet.message import Channel, Message, new_id
from quintet.transport import Finding
from quintet.transports.amqp.consuming import Held, Subscription
from quintet.transports.amqp.failures import WITHIN
from quintet.transports.amqp.publishing import TAIL_SECONDS, Publisher, matches
from quintet.wire.amqp import Content
from quintet.wire.amqp_message import DELAYS, read, read_death
from quintet.wire.amqp_session import Wire
from quintet.wire.amqp_topology import AGAIN, EXCHANGE

if TYPE_CHECKING:
    from quintet.transports.amqp.carrier import Carrier

TAIL_KEPT = 10_000  # messages that a tail may lag behind; the oldest go first


class Tail(Held):
    """Copies of what is sent to a channel, from the moment this object is made until it is closed."""

    def __init__(self, carrier: Carrier, pattern: str) -> None:
        super().__init__(carrier, f"tail of {pattern}")
        self._pattern = pattern
        self._kept: deque[Message] = deque(maxlen=TAIL_KEPT)
        self._more = asyncio.Event()
        self._closed = False
        self._failed: Exception | None = None
        self._starting = asyncio.get_running_loop().create_task(self._start())

    async def _start(self) -> None:
        try:
            await self.carrier.begin(self)
        except (TransportError, CallError) as error:
            self._failed = error
            self._more.set()
            return
        while True:
            with contextlib.suppress(TransportError, CallError):
                session = await self.carrier.publishing.ready(self.carrier.clock.now() + WITHIN)
                await session.announce(self._pattern)
            await self.carrier.clock.sleep(TAIL_SECONDS)

    async def subscribe(self, wire: Wire) -> None:
        words = self._pattern.split(".")
        binding = ".".join([*words[:-1], "#"]) if self._pattern.endswith("*") else self._pattern
        queue = f"quintet.tail.{new_id()}"
        arguments = {"x-max-length": TAIL_KEPT, "x-queue-type": "classic"}
        await wire.lay_exchange(EXCHANGE)
        line = await wire.line()
        try:
            await asyncio.gather(
                line.call("queue.declare", queue=queue, exclusive=True, auto_delete=True, arguments=arguments),
                line.call("queue.bind", queue=queue, exchange=EXCHANGE, routing_key=binding),
            )
        finally:
            await line.close()
        await self.consume(wire, queue, self._take, 1000)

    def _take(self, subscription: Subscription, content: Content) -> None:
        subscription.done(content.tag)
        name = content.fields["routing_key"]
        if matches(self._pattern, name):
            self._kept.append(read(content, Channel(name), self.carrier.clock))
            self._more.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        while not self._kept:
            if self._closed:
                raise StopAsyncIteration
            if self._failed is not None:
                raise self._failed
            self._more.clear()
            await self._more.wait()
        return self._kept.popleft()

    async def aclose(self) -> None:
        self._closed = True
        self._more.set()
        self._starting.cancel()
        await asyncio.wait([self._starting])
        self.release()
        await self.leave()

    abort = aclose


async def examine(carrier: Carrier) -> Sequence[Finding]:
    session = await carrier.publishing.ready(carrier.clock.now() + WITHIN)
    server = session.server
    found = [
        Finding("version", f"{server.get('product', '?')} {server.get('version', '?')}"),
        Finding("cluster", str(server.get("cluster_name", "not told"))),
        Finding("agreed on", f"frames of {session.frame_max} bytes, a heart-beat each {session.heartbeat / 2:g} s"),
        Finding("takes messages", session.blocked or "yes", well=not session.blocked),
    ]
    for what, able, otherwise in (
        ("publisher confirms", "publisher_confirms", "messages would be lost without a word: take RabbitMQ"),
        ("notice of cancelled consumers", "consumer_cancel_notify", "a deleted queue would be served in vain"),
        ("notice of being blocked", "connection.blocked", "senders would wait without knowing why"),
    ):
        has = bool(server.get("capabilities", {}).get(able))
        found.append(Finding(what, "yes" if has else otherwise, well=has))
    found.append(await _try_out("durable channels", _try_quorum(session)))
    found.append(await _try_out("delayed redelivery", _try_delay(carrier, session)))
    return found


async def _try_out(what: str, trial: Awaitable[str]) -> Finding:
    try:
        async with asyncio.timeout(WITHIN):
            return Finding(what, await trial)
    except TimeoutError:
        return Finding(what, f"no answer within {WITHIN:g} s", well=False)
    except (TransportError, CallError, KeyError) as error:
        return Finding(what, f"not possible: {error}; users need the rights on names like ^quintet", well=False)


async def _try_quorum(session: Publisher) -> str:
    name = f"quintet.doctor.{new_id()}"
    arguments = {"x-queue-type": "quorum", "x-expires": 60_000}
    await session.call("queue.declare", queue=name, durable=True, arguments=arguments)
    await session.call("queue.delete", queue=name)
    return "quorum queues"


async def _try_delay(carrier: Carrier, session: Publisher) -> str:
    wire = await (await carrier.consuming()).ready(None)
    name, arrived = f"quintet.doctor.{new_id()}", asyncio.Queue[Content]()
    line = await wire.line()
    try:
        await session.lay_for_copies(100)
        await line.call("queue.declare", queue=name, exclusive=True, arguments={"x-queue-type": "classic"})
        await line.call("queue.bind", queue=name, exchange=AGAIN, routing_key=name)
        wire.consumers[name.encode()] = arrived.put_nowait
        await line.call("basic.consume", queue=name, consumer_tag=name, no_ack=True)
        begun = carrier.clock.now()
        await session.store(DELAYS, name, Message(channel=Channel(name), id=name), 100)
        content = await arrived.get()
        took = carrier.clock.now() - begun
        skew = carrier.clock.wall() - float(read_death(content)["time"].timestamp())
        clocks = f"; its clock is {skew:+.0f} s off ours" if abs(skew) > 2 else ""
        return f"asked for 100 ms, got {1000 * took:.0f} ms{clocks}"
    finally:
        wire.consumers.pop(name.encode(), None)
        await line.close()
