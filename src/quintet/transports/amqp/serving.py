"""One channel being served: what is taken from its queue, and what becomes of each delivery."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from msgspec import structs

from quintet.errors import InvalidMessage, ProtocolError, TransportError
from quintet.intake import Intake
from quintet.message import Channel, Message, new_id
from quintet.transport import Receive
from quintet.transports.amqp.consuming import Held, Subscription
from quintet.transports.amqp.failures import sentence
from quintet.wire.amqp import Content
from quintet.wire.amqp_message import DELAYS, read
from quintet.wire.amqp_session import Closed, Wire
from quintet.wire.amqp_topology import EXCHANGE, Queue, place_of, wait
from quintet.wire.names import DEAD

if TYPE_CHECKING:
    from quintet.transports.amqp.carrier import Carrier

PREFETCH_KEYED = 4  # times the limit: so many may wait behind others of their key
IDLE = 30.0  # seconds without a delivery after which a consumer of a quorum queue subscribes anew


class Serving(Held):
    """One channel being served."""

    def __init__(self, carrier: Carrier, channel: Channel, receive: Receive, group: str, limit: int) -> None:
        super().__init__(carrier, channel.name)
        self.channel = channel
        self.group = group if channel.fanout else ""
        self.intake: Intake[Content] = Intake(self, receive, group, limit, carrier.clock, keyed=channel.keyed)
        self._queue = ""
        self._prefetch = limit * PREFETCH_KEYED if channel.keyed else limit
        self._parked = False  # what has not begun goes back when the AMQP channel is closed
        self._renewing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<serving {self.channel.name} as {self.group or 'its one receiver'}: {self.intake!r}>"

    async def subscribe(self, wire: Wire) -> None:
        channel = self.channel
        place = place_of(channel, self.group, lasting=wire.lasting, suffix=f".{new_id()}")
        self._queue = place.queue
        try:
            await wire.lay_exchange(EXCHANGE)
            if not channel.temporary:
                await wire.lay_dead()  # and with it what leads back to its queue
            await wire.lay(place, channel)
            await self.consume(wire, place.queue, self._take, self._prefetch, arguments=place.consumer)
        except Closed as error:
            raise TransportError(sentence(self.carrier.address, place.queue, error)) from error
        except InvalidMessage as error:
            raise TransportError(f"{place.queue} at {self.carrier.address} cannot be served: {error}") from None
        if self._renewing is None and place.arguments.get("x-queue-type") == "quorum":
            self._renewing = wire.loop.create_task(self._renew(place.consumer))

    def release(self) -> None:
        super().release()
        if self._renewing is not None:
            self._renewing.cancel()

    async def _renew(self, arguments: dict[str, Any]) -> None:
        """Subscribes anew whenever nothing has come for long. RabbitMQ says nothing to a consumer whose quorum queue is
        deleted and at once declared again: it counts it as one of the new queue's, and never brings it anything."""
        while True:
            subscription, resuming = self.subscription, self._resuming
            settled = subscription.settled if subscription is not None else 0
            await self.carrier.clock.sleep(IDLE)
            if subscription is None or subscription is not self.subscription or subscription.lost:
                continue
            if resuming is not None and not resuming.done():
                continue
            if self.intake.size or subscription.settled != settled:
                continue
            line, tag = subscription.line, subscription.tag
            with contextlib.suppress(TransportError):  # then it is subscribed again in any case
                await line.call("basic.cancel", consumer_tag=tag)
                if (
                    self.intake.size or subscription.settled != settled
                ):  # it lives, and must not lose what has just come
                    await line.call("basic.consume", queue=self._queue, consumer_tag=tag, arguments=arguments)
                elif subscription is self.subscription:
                    self._drop(line.session, subscription)
                    self.resume(line.session)

    def gone(self, subscription: Subscription) -> None:
        self.intake.forget(lambda content: content.origin is subscription)

    async def stop(self) -> None:
        self.release()
        try:
            if self.channel.keyed:  # the next in line must not get a key of which a message is still in work here
                self._parked = True
                await self.intake.stop()
                await self.unsubscribe()
            else:
                await self.unsubscribe()
                await self.intake.stop()
        finally:
            await self.leave()

    async def abort(self) -> None:
        self.release()
        self._parked = True
        await self.intake.abort()
        await self.leave()

    def _take(self, subscription: Subscription, content: Content) -> None:
        content.origin = subscription
        self.intake.put(content, self.read(content).key if self.channel.keyed else "")

    # Source

    def read(self, delivery: Content) -> Message:
        if delivery.copy is not None:
            return _fresh(delivery.copy)
        try:
            return read(delivery, self.channel, self.carrier.clock)
        except ProtocolError:  # no broker lets that through
            return Message(channel=self.channel, body=delivery.body, id=new_id(), headers={})

    def crashed(self, delivery: Content) -> int:
        return delivery.crashes

    def done(self, delivery: Content) -> None:
        delivery.origin.done(delivery.tag)

    def give_back(self, delivery: Content) -> None:
        if not self._parked:
            delivery.origin.back(delivery.tag)

    async def again(self, delivery: Content, copy: Message, after: float) -> None:
        if self.channel.temporary or self._streams:  # its queue goes with us, so it may as well wait here
            delivery.copy = copy
            self.carrier.clock.call_at(self.carrier.clock.now() + after, lambda: self._back(delivery))
            return
        ms = wait(after) if after > 0 else 0
        if await self.carrier.store(DELAYS if ms else "", self._queue, copy, self._wanted(delivery), delay=ms):
            self.done(delivery)

    async def dead(self, delivery: Content, copy: Message) -> None:
        if await self.carrier.store("", DEAD, copy, self._wanted(delivery)):
            self.done(delivery)

    def _wanted(self, delivery: Content) -> Callable[[], bool]:
        """Whether it can still be acknowledged; else the broker brings it again."""
        return lambda: not delivery.origin.lost

    def _back(self, delivery: Content) -> None:
        if not delivery.origin.lost:
            self.intake.put(delivery)

    @property
    def _streams(self) -> bool:
        return any(isinstance(option, Queue) and option.type == "stream" for option in self.channel.native)


def _fresh(message: Message) -> Message:
    return structs.replace(message, headers=dict(message.headers))
