"""What a conformance check works on: transports of one broker, unused names, receivers that remember."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from quintet.clock import SYSTEM, Clock
from quintet.message import Channel, Message, new_id
from quintet.testing.clock import FakeClock
from quintet.transport import DONE, Receive, Serving, Transport, Verdict, open_address

WITHIN = 5.0  # real seconds that something which ought to happen may take
QUIET = 0.15  # real seconds in which something that ought not to happen would have happened

Opener = Callable[[str, Clock], Transport]


class Receiver:
    """A `receive` that remembers what came, and answers with the given verdicts in turn, then with Done.

    `hold`: each delivery waits until `release()`. `raises`: what the first delivery raises instead of a verdict.
    """

    def __init__(self, *verdicts: Verdict, hold: bool = False, raises: BaseException | None = None) -> None:
        self.messages: list[Message] = []
        self.times: list[float] = []
        self.in_work = 0
        self.peak = 0
        self._verdicts = list(verdicts)
        self._raises = raises
        self._held = asyncio.Event()
        if not hold:
            self._held.set()

    def __repr__(self) -> str:
        first = [body[:20] for body in self.bodies[:10]]
        return f"<receiver of {len(self.messages)}, the first {first}, {self.in_work} in work>"

    @property
    def bodies(self) -> list[bytes]:
        return [message.body for message in self.messages]

    def release(self) -> None:
        self._held.set()

    async def __call__(self, message: Message) -> Verdict:
        self.messages.append(message)
        self.times.append(time.monotonic())
        self.in_work += 1
        self.peak = max(self.peak, self.in_work)
        try:
            await self._held.wait()
            if self._raises is not None:
                error, self._raises = self._raises, None
                raise error
            return self._verdicts.pop(0) if self._verdicts else DONE
        finally:
            self.in_work -= 1


class Bench:
    """Transports of one broker at one address; each that `open` returns stands for another process.

    `clock` may be a FakeClock where the transport waits for nothing but its clock. `opener` makes the transports.
    """

    def __init__(self, address: str, clock: Clock = SYSTEM, opener: Opener = open_address) -> None:
        self.address = address
        self.clock = clock
        self._opener = opener
        self._transports: list[Transport] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._names = itertools.count(1)
        self._run = new_id()

    def __repr__(self) -> str:
        return f"<bench at {self.address}>"

    async def open(self, **options: object) -> Transport:
        """A fresh opened transport; `options` are added to the address."""
        extra = "&".join(f"{name}={value}" for name, value in options.items())
        address = f"{self.address}{'&' if '?' in self.address else '?'}{extra}" if extra else self.address
        transport = self._opener(address, self.clock)
        await transport.open()
        self._transports.append(transport)
        return transport

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for transport in self._transports:
            await transport.close()

    def name(self, hint: str = "work") -> str:
        """A name that no other check and no earlier run used."""
        return f"check.{hint}.{next(self._names)}.{self._run}"

    def channel(
        self,
        hint: str = "work",
        *,
        fanout: bool = False,
        durable: bool = False,
        temporary: bool = False,
        keyed: bool = False,
    ) -> Channel:
        name = self.name(hint)
        return Channel(name, fanout=fanout, durable=durable, temporary=temporary, keyed=keyed, route=f"POST /{name}")

    def message(self, channel: Channel, body: bytes = b"", **fields: Any) -> Message:
        """A message fit for every kind of transport: the pseudo headers are what REST sends it by."""
        fields["headers"] = {":method": "POST", ":path": f"/{channel.name}"} | fields.get("headers", {})
        fields.setdefault("id", new_id())
        return Message(channel=channel, body=body, **fields)

    def reply(self, request: Message, body: bytes = b"", **fields: Any) -> Message:
        return Message(channel=request.channel, body=body, correlation_id=request.correlation_id, **fields)

    async def serve(
        self, transport: Transport, channel: Channel, receive: Receive, group: str = "group", limit: int = 100
    ) -> Serving:
        serving = await transport.serve(channel, receive, group, limit)
        await transport.ready()
        return serving

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Runs it beside the check: where a transport has REPLIES, to send is to wait for the receiver."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        return task

    async def send(self, transport: Transport, channel: Channel, *bodies: bytes, **fields: Any) -> None:
        """Sends one message for each of the bodies, one after another."""
        for body in bodies:
            await transport.send(self.message(channel, body, **fields))

    async def until(self, holds: Callable[[], bool], otherwise: Callable[[], str]) -> None:
        """Lets time pass until `holds()`; AssertionError with the sentence of `otherwise()` where it never does."""
        give_up = time.monotonic() + WITHIN
        while not holds():
            if time.monotonic() > give_up:
                raise AssertionError(otherwise())
            if isinstance(self.clock, FakeClock):
                await self.clock.advance(0.05)
                give_up -= 0.02  # a fake second is cheap, but a minute of them is enough
            else:
                await asyncio.sleep(0.002)

    async def got(self, receiver: Receiver, count: int) -> list[Message]:
        """Waits for so many deliveries and returns all that came."""
        await self.until(
            lambda: len(receiver.messages) >= count,
            lambda: f"{count} deliveries were due, {len(receiver.messages)} came: {receiver!r}",
        )
        return receiver.messages

    async def quiet(self) -> None:
        """Lets enough time pass for what must not happen to happen."""
        if isinstance(self.clock, FakeClock):
            await self.clock.advance(5.0)
        else:
            await asyncio.sleep(QUIET)


def sorted_bodies(*receivers: Receiver) -> Sequence[bytes]:
    return sorted(body for receiver in receivers for body in receiver.bodies)
