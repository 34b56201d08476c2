"""The connection to consume, and what subscribes on it, again on each new one."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from quintet.connection import Link
from quintet.errors import CallError, ProtocolError, TransportError
from quintet.transports.amqp.failures import AGAIN_FIRST, AGAIN_LONGEST, NOTICED
from quintet.wire.amqp import Content, settle
from quintet.wire.amqp_session import Line, Wire

if TYPE_CHECKING:
    from quintet.transports.amqp.carrier import Carrier

PREFETCH_MAX = 65_535
CLOSING_SECONDS = 2.0  # for an answer, when something is closed


class Consumer(Wire):
    """The connection to consume."""

    def __init__(self, link: Link, carrier: Carrier, options: dict[str, Any]) -> None:
        super().__init__(link, carrier.clock, **options)
        self.carrier = carrier

    async def greet(self) -> None:
        await super().greet()
        self.carrier.resume(self)


class Subscription:
    """A consumer on an AMQP channel of its own: what it brought, and what of that is settled."""

    def __init__(self, line: Line, tag: str) -> None:
        self.line = line
        self.tag = tag
        self._low = 1  # the lowest delivery tag that is not settled
        self._ahead: set[int] = set()  # settled ones above it
        self._done: list[int] = []  # handled, to be acknowledged in this turn of the loop

    @property
    def lost(self) -> bool:
        return self.line.error is not None

    @property
    def settled(self) -> int:
        """A number that grows with each delivery that is settled."""
        return self._low + len(self._ahead)

    def done(self, tag: int) -> None:
        done = self._done
        if not done:
            self.line.session.loop.call_soon(self.flush)
        done.append(tag)

    def back(self, tag: int) -> None:
        """Another receiver may have it."""
        self._write(settle(self.line.number, tag, "basic.reject", 1))
        self._ahead.add(tag)

    def flush(self) -> None:
        """Acknowledges what is done: all that is complete from below in one, the others each."""
        done, self._done = self._done, []
        if not done:
            return
        done.sort()
        low, ahead, count = self._low, self._ahead, 0
        for tag in done:
            while low in ahead:
                ahead.discard(low)
                low += 1
            if tag != low:
                break
            low += 1
            count += 1
        self._low = low
        number = self.line.number
        acks = [settle(number, done[count - 1], "basic.ack", count > 1)] if count else []
        for tag in done[count:]:
            ahead.add(tag)
            acks.append(settle(number, tag))
        self._write(b"".join(acks))

    def _write(self, data: bytes) -> None:
        if self.line.error is None:
            self.line.session.link.write(data)


class Held(ABC):
    """Something that consumes a queue, for as long as it is held: it subscribes on each new connection."""

    def __init__(self, carrier: Carrier, name: str) -> None:
        self.carrier = carrier
        self.name = name
        self.begun = False
        self.subscription: Subscription | None = None
        self._resuming: asyncio.Task[None] | None = None
        self._told = ""

    @abstractmethod
    async def subscribe(self, wire: Wire) -> None:
        """Declares what is missing, and consumes. Raises TransportError with a sentence."""

    @abstractmethod
    async def abort(self) -> None:
        """Ends at once; what is in work goes back to the queue."""

    def gone(self, subscription: Subscription) -> None:  # noqa: B027 - a tail has nothing to forget
        """What it had brought comes again, if its queue is still there."""

    async def consume(
        self, wire: Wire, queue: str, take: Callable[[Subscription, Content], None], prefetch: int, **fields: Any
    ) -> None:
        line = await wire.line()
        subscription = self.subscription = Subscription(line, wire.tag())
        tag = subscription.tag.encode()
        wire.consumers[tag] = functools.partial(take, subscription)
        cancelled: list[str] = []
        line.cancelled = cancelled.append
        try:
            await line.call("basic.qos", prefetch_count=min(prefetch, PREFETCH_MAX))
            await line.call("basic.consume", queue=queue, consumer_tag=subscription.tag, **fields)
        except BaseException:
            self._drop(wire, subscription)
            raise
        if cancelled:
            self._drop(wire, subscription)
            raise TransportError(f"{queue} was deleted")
        line.ended = functools.partial(self._ended, wire, subscription)
        line.cancelled = functools.partial(self._cancelled, wire, subscription)

    async def unsubscribe(self) -> None:
        """Takes no more."""
        subscription = self.subscription
        if subscription is not None and not subscription.lost:
            with contextlib.suppress(TransportError, TimeoutError):
                async with asyncio.timeout(CLOSING_SECONDS):
                    await subscription.line.call("basic.cancel", consumer_tag=subscription.tag)

    def release(self) -> None:
        """From now on it is not subscribed again."""
        self.carrier.release(self)
        if self._resuming is not None:
            self._resuming.cancel()

    async def leave(self) -> None:
        """Acknowledges what is done; the rest goes back to the queue."""
        subscription = self.subscription
        if subscription is not None:
            subscription.flush()
            closing = self._drop(subscription.line.session, subscription)
            await asyncio.wait([closing], timeout=CLOSING_SECONDS)

    def _drop(self, wire: Wire, subscription: Subscription) -> asyncio.Task[None]:
        """Forgets it, and closes its AMQP channel."""
        line = subscription.line
        line.ended = line.cancelled = _nothing
        wire.consumers.pop(subscription.tag.encode(), None)
        if self.subscription is subscription:
            self.subscription = None
        return wire.loop.create_task(line.close())

    def resume(self, wire: Wire, after: float = 0.0) -> None:
        if self._resuming is not None:
            self._resuming.cancel()
        self._resuming = wire.loop.create_task(self._resume(wire, after))

    async def _resume(self, wire: Wire, after: float) -> None:
        """Subscribes again, as often as it takes: a queue whose leader is being elected, a right that is missing."""
        await self.carrier.clock.sleep(after)
        pause = AGAIN_FIRST
        while wire.error is None:
            try:
                await self.subscribe(wire)
            except (TransportError, CallError, ProtocolError) as error:
                if wire.error is None and str(error) != self._told:
                    self._told = str(error)
                    self.report(error)
                await self.carrier.clock.sleep(pause)
                pause = min(pause * 2, AGAIN_LONGEST)
            else:
                self._told = ""
                return

    def report(self, error: Exception) -> None:
        """A failure that no caller waits for."""
        asyncio.get_running_loop().call_exception_handler({"message": f"{self.name}: {error}", "exception": error})

    def _ended(self, wire: Wire, subscription: Subscription, error: Exception) -> None:
        self._drop(wire, subscription)
        self.gone(subscription)
        if wire.error is None:  # the broker closed this one alone: a delivery was too long in work, or its queue failed
            self.report(TransportError(f"{self.name} at {self.carrier.address}: {error}; it is served again"))
            self.resume(wire)

    def _cancelled(self, wire: Wire, subscription: Subscription, _: str) -> None:
        """The queue was deleted, or has moved."""
        self._drop(wire, subscription)
        self.gone(subscription)
        self.resume(wire, NOTICED)


def _nothing(_: Any) -> None: ...
