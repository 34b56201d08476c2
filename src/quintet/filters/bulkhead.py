"""The bulkhead: a limit on outstanding requests, so that one dead service cannot hold everything that we have."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from quintet.clock import Clock
from quintet.contract import Style
from quintet.errors import CallError, LimitReached, Overloaded
from quintet.filter import Guarded
from quintet.message import Handler, Message
from quintet.policy import Bulkhead

PLACE = 50  # above the balancer: a full service is refused before an instance is chosen for it


class Outstanding:
    """The requests that are under way, at most `limit`, and up to `queue` callers that wait for a place."""

    def __init__(self, clock: Clock) -> None:
        self.limit = 0
        self.queue = 0
        self.busy = 0
        self.peak = 0
        """The most that were under way at once since somebody set it back to `busy`; never above `limit`."""
        self._clock = clock
        self.waiting: deque[asyncio.Future[bool]] = deque()

    def __repr__(self) -> str:
        return f"<outstanding {self.busy} of {self.limit}, {len(self.waiting)} waiting>"

    def configure(self, settings: Bulkhead) -> None:
        """Sets the limits. Calls under way go on; a lower limit holds as soon as enough of them have ended."""
        self.limit, self.queue = settings.limit, settings.queue
        self.peak = min(self.peak, self.limit)
        self.let_in()

    async def enter(self, until: float | None, full: CallError) -> None:
        """Takes a place, waiting for one until then where the queue allows it. Raises `full`."""
        if self.busy < self.limit:
            self.busy += 1
            return
        if len(self.waiting) >= self.queue:
            raise full
        place: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.waiting.append(place)
        timer = None if until is None else self._clock.call_at(until, lambda: _settle(place, False))
        given = False
        try:
            given = await place
        except asyncio.CancelledError:
            if not place.cancelled() and place.result():
                self.leave()  # its caller was cancelled in the moment in which it was given the place
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if not given and place in self.waiting:
                self.waiting.remove(place)
        if not given:
            raise full

    def leave(self) -> None:
        self.busy -= 1
        if self.waiting:
            self.let_in()

    def let_in(self) -> None:
        while self.waiting and self.busy < self.limit:
            place = self.waiting.popleft()
            self.busy += 1
            try:  # the one that waits may belong to another thread's loop
                place.get_loop().call_soon_threadsafe(self._give, place)
            except RuntimeError:  # its loop is closed
                self.busy -= 1

    def _give(self, place: asyncio.Future[bool]) -> None:
        if place.done():  # it gave up meanwhile
            self.leave()
        else:
            place.set_result(True)


def _settle(place: asyncio.Future[bool], given: bool) -> None:
    if not place.done():
        place.set_result(given)


def client(guarded: Guarded, handler: Handler) -> Handler:
    operation = guarded.operation
    if operation.style is not Style.REQUEST or operation.parent:
        return handler  # one-way sends are not outstanding, and who waits for a pending answer holds nothing up
    name, service = operation.full_name, operation.contract.__quintet__.name
    return _limit(
        guarded,
        handler,
        lambda limit: LimitReached(
            f"{name}: not sent, {limit} requests to {service} are outstanding (Bulkhead(limit) says how many may be)"
        ),
    )


def server(guarded: Guarded, handler: Handler) -> Handler:
    operation = guarded.operation
    if operation.style is not Style.REQUEST or operation.parent:
        return handler  # what is queued waits where it is, and is taken as fast as it is worked off
    return _limit(
        guarded,
        handler,
        lambda limit: Overloaded(f"{operation.full_name}: {limit} requests are in work, more are refused"),
    )


def _limit(guarded: Guarded, handler: Handler, full: Callable[[int], CallError]) -> Handler:
    settings = guarded.policy.bulkhead
    if not isinstance(settings, Bulkhead):
        return handler
    outstanding = guarded.state(settings.per).of(Outstanding, lambda: Outstanding(guarded.clock))
    outstanding.configure(settings)
    guarded.meter.outstanding = outstanding
    name, watch = guarded.operation.full_name, guarded.watch

    async def bulkhead(message: Message) -> Message | None:
        if outstanding.busy < outstanding.peak:  # the usual case without an await
            outstanding.busy += 1
        elif outstanding.busy < outstanding.limit:
            outstanding.busy += 1
            outstanding.peak = outstanding.busy
        else:
            try:
                await outstanding.enter(message.until, full(outstanding.limit))
            except CallError as error:
                watch.tell("refused", name, error)
                raise
        try:
            return await handler(message)
        finally:
            outstanding.busy -= 1
            if outstanding.waiting:
                outstanding.let_in()

    return bulkhead
