"""Time and chance as arguments (law 11): the system's clock here, a fake one in `quintet.testing`."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeAlias
from weakref import WeakKeyDictionary


class Handle(Protocol):
    def cancel(self) -> None: ...


class Timer(Protocol):
    def fire(self) -> None: ...


Timers: TypeAlias = set[Timer]


class Wheel:
    """Many coarse timers behind few of the loop's: to set and to clear one costs next to nothing.

    Time-outs are set on every call and almost never fire. A timer fires at most `GRAIN` seconds late, never early.
    """

    GRAIN = 1 / 128

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._slots: dict[int, Timers] = {}
        self._forget_latest()

    def _forget_latest(self) -> None:
        self._from, self._to, self._latest = 0.0, 0.0, Timers()

    def set(self, when: float, timer: Timer) -> Timers:
        """Fires the timer once `now()` has reached `when`, unless it is discarded from the returned set before."""
        if not self._from <= when < self._to:  # most go where the one before went
            slot = int(when / self.GRAIN) + 1
            self._from, self._to = (slot - 1) * self.GRAIN, slot * self.GRAIN
            self._latest = self._slots[slot] if slot in self._slots else self._open(slot)
        self._latest.add(timer)
        return self._latest

    def _open(self, slot: int) -> Timers:
        timers = self._slots[slot] = Timers()
        self._clock.call_at(slot * self.GRAIN, partial(self._fire, slot))
        return timers

    def _fire(self, slot: int) -> None:
        self._forget_latest()  # what is set too late for this slot needs a new one
        for timer in list(self._slots.pop(slot)):
            timer.fire()


class Clock:
    """Monotonic and wall-clock time, timers of the running loop, and the random source.

    `now` decides within a process; `wall` only where a time must outlive one (leases, expiry on queues).
    """

    now: Callable[[], float] = staticmethod(time.monotonic)
    wall: Callable[[], float] = staticmethod(time.time)

    def __init__(self, seed: int | None = None) -> None:
        self.random = random.Random(seed)  # noqa: S311 - jitter, not secrets

        self._wheels: WeakKeyDictionary[asyncio.AbstractEventLoop, Wheel] = WeakKeyDictionary()
        self._latest: tuple[asyncio.AbstractEventLoop, Wheel] | None = None

    def wheel(self, loop: asyncio.AbstractEventLoop) -> Wheel:
        """The coarse timers of the loop that is running."""
        latest = self._latest  # read once: another thread may run another loop
        if latest is not None and latest[0] is loop:
            return latest[1]
        found = self._wheels.get(loop) or self._wheels.setdefault(loop, Wheel(self))
        self._latest = (loop, found)
        return found

    def call_at(self, when: float, callback: Callable[[], None]) -> Handle:
        """Calls back on the running loop once `now()` has reached `when` (seconds)."""
        return asyncio.get_running_loop().call_later(max(0.0, when - self.now()), callback)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def until(self, event: asyncio.Event, seconds: float) -> None:
        """Waits for the event, which is set by itself after so many seconds."""
        timer = self.call_at(self.now() + seconds, event.set)
        try:
            await event.wait()
        finally:
            timer.cancel()

    def to_wall(self, deadline: float | None) -> float | None:
        """A deadline of this process as wall-clock time, for carriers that outlive it."""
        return None if deadline is None else self.wall() + (deadline - self.now())

    def from_wall(self, wall: float | None) -> float | None:
        """The reverse of `to_wall`, in the process that receives."""
        return None if wall is None else self.now() + (wall - self.wall())


SYSTEM = Clock()
