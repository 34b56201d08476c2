"""What a broker pushes, on its way to `receive`: bounded, in order of its keys, settled, given back at the end.

Every transport whose broker pushes deliveries has one for each channel that it serves, and is its `Source`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from quintet.clock import Clock, Handle
from quintet.dead_letters import again, bury
from quintet.message import Message
from quintet.transport import DONE, Again, Dead, Done, Receive
from quintet.wire.names import FAILED_AT
from quintet.workers import Workers

D = TypeVar("D")
D_contra = TypeVar("D_contra", contravariant=True)

CRASHES = 20  # times that a message's receivers may go away in the midst of it, then it is a dead letter
UNFINISHED_AFTER = 1.0  # seconds until a delivery whose receiver was cancelled comes again


class Source(Protocol[D_contra]):
    """What the broker's side does with a delivery. None of it raises: where the broker is gone meanwhile nothing is
    done, for it will deliver the message again."""

    def read(self, delivery: D_contra) -> Message:
        """The message as it came, a fresh object each time; its attempt is counted as far as the broker knows.
        Whatever a foreign sender wrote is a message: what makes no sense in its headers is passed over."""
        ...

    def crashed(self, delivery: D_contra) -> int:
        """How often its receivers went away before they had settled it, as far as the broker knows."""
        ...

    def done(self, delivery: D_contra) -> None:
        """It is handled: acknowledge it."""
        ...

    async def again(self, delivery: D_contra, copy: Message, after: float) -> None:
        """Have `copy`, which is the next attempt, delivered after so many seconds to the same group, and once that is
        certain acknowledge the delivery."""
        ...

    async def dead(self, delivery: D_contra, copy: Message) -> None:
        """Send `copy` to the dead letters, and once that is certain acknowledge the delivery."""
        ...

    def give_back(self, delivery: D_contra) -> None:
        """It was not begun, or not ended: another receiver may have it at once."""
        ...


class _Held(Generic[D]):
    """A message that failed and holds back its key: what was counted here, since the broker knows of one delivery."""

    def __init__(self, delivery: D) -> None:
        self.delivery = delivery
        self.attempts = 0
        self.times = ""
        self.timer: Handle | None = None  # while it waits


class Intake(Generic[D]):
    """Hands deliveries to `receive`, at most `limit` at a time.

    `keyed`: of the deliveries that are put with a key only the first of each is handed out; one that is to come again
    stays here for that time and holds back its key, and no other.
    """

    def __init__(
        self, source: Source[D], receive: Receive, group: str, limit: int, clock: Clock, *, keyed: bool = False
    ) -> None:
        self.workers = Workers(self._take, self._deliver, limit)
        self.size = 0  # not yet settled: waiting, held back or in work
        self._source = source
        self._receive = receive
        self._group = group
        self._clock = clock
        self._keyed = keyed
        self._ready: deque[D] = deque()
        self._lanes: dict[str, deque[D]] = {}  # by key under way: what may not start before it is settled
        self._held: dict[int, _Held[D]] = {}  # by id() of a delivery that is held back here
        self._stopping = False

    def __repr__(self) -> str:
        return f"<intake of {self.size} unsettled: {self.workers!r}>"

    def put(self, delivery: D, key: str = "") -> None:
        """A delivery has come; `key` where its channel is keyed."""
        if self._stopping:
            self._source.give_back(delivery)
            return
        self.size += 1
        if key and self._keyed:
            lane = self._lanes.get(key)
            if lane is not None:
                lane.append(delivery)
                return
            self._lanes[key] = deque()
        self._ready.append(delivery)
        self._wake()

    def forget(self, gone: Callable[[D], bool]) -> None:
        """Drops what is not in work of the deliveries that the broker will bring again, since their session is lost."""
        for held in [held for held in self._held.values() if held.timer is not None and gone(held.delivery)]:
            assert held.timer is not None  # noqa: S101
            held.timer.cancel()
            self._ready.append(held.delivery)
            del self._held[id(held.delivery)]
        for lane in [*self._lanes.values(), self._ready]:  # the ready ones last: each makes way for the next of its key
            for delivery in [delivery for delivery in lane if gone(delivery)]:
                lane.remove(delivery)
                self.size -= 1
                if self._keyed and lane is self._ready:
                    self._next(self._source.read(delivery).key)

    async def stop(self) -> None:
        """Takes no more, gives back what has not begun, and returns when what is in work is settled."""
        self._return_all()
        await self.workers.drain()

    async def abort(self) -> None:
        """Takes no more, cancels what is in work and gives it back."""
        self._return_all()
        await self.workers.cancel()

    # inside

    def _wake(self) -> None:
        workers = self.workers
        if not workers.waking:
            workers.wake()

    def _take(self) -> D | None:
        ready = self._ready
        if not ready or self._stopping:
            return None
        delivery = ready.popleft()
        if ready:
            self.workers.wake()
        return delivery

    async def _deliver(self, delivery: D) -> None:
        source = self._source
        message = self._read(delivery)
        key = message.key
        try:
            if message.deadline is not None and message.deadline <= self._clock.now():
                verdict: Done | Again | Dead = DONE  # it expired before work was begun, as its sender wished
            elif (crashed := source.crashed(delivery)) > CRASHES:
                verdict = Dead(f"its receivers went away {crashed} times while they had it in work")
            else:
                verdict = await self._receive(message)
        except BaseException as error:
            if self._stopping:
                self.size -= 1
                source.give_back(delivery)
            else:
                await self._settle(delivery, key, Again(UNFINISHED_AFTER, f"unfinished: {error!r}"))
            raise
        if type(verdict) is Done and not (key and self._keyed):  # the usual case
            self.size -= 1
            source.done(delivery)
            return
        await self._settle(delivery, key, verdict)

    async def _settle(self, delivery: D, key: str, verdict: Done | Again | Dead) -> None:
        source, keyed = self._source, bool(key and self._keyed)
        if isinstance(verdict, Again):
            if keyed and not self._stopping:
                self._hold(delivery, verdict.after)
                return
            await source.again(delivery, again(self._read(delivery), self._clock), verdict.after)
        elif isinstance(verdict, Dead):
            await source.dead(delivery, bury(self._read(delivery), self._group, verdict.reason, self._clock))
        else:
            source.done(delivery)
        self.size -= 1
        self._held.pop(id(delivery), None)
        if keyed:
            self._next(key)

    def _read(self, delivery: D) -> Message:
        message = self._source.read(delivery)
        held = self._held.get(id(delivery)) if self._held else None
        if held is not None:
            message.attempt += held.attempts
            message.headers[FAILED_AT] = held.times
        return message

    def _hold(self, delivery: D, after: float) -> None:
        copy = again(self._read(delivery), self._clock)
        held = self._held.setdefault(id(delivery), _Held(delivery))
        held.attempts += 1
        held.times = copy.headers[FAILED_AT]

        def release() -> None:
            held.timer = None
            self._ready.append(delivery)
            self._wake()

        held.timer = self._clock.call_at(self._clock.now() + after, release)

    def _next(self, key: str) -> None:
        """The next of a key may start: at the end of the line, so that one busy key does not starve the others."""
        lane = self._lanes.get(key)
        if lane:
            self._ready.append(lane.popleft())
            self._wake()
        else:
            self._lanes.pop(key, None)

    def _return_all(self) -> None:
        """Takes no more, and gives back what is not in work."""
        self._stopping = True
        waiting = [*self._ready, *(delivery for lane in self._lanes.values() for delivery in lane)]
        for held in self._held.values():
            if held.timer is not None:
                held.timer.cancel()
                waiting.append(held.delivery)
        self._ready.clear()
        self._lanes.clear()
        self._held.clear()
        self.size -= len(waiting)
        for delivery in waiting:
            self._source.give_back(delivery)
