"""Time and chance as arguments (law 11): the system's clock here, a fake one in `quintet.testing`."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol
from weakref import WeakKeyDictionary


class Handle(Protocol):
    def cancel(self) -> None: ...


class Timer(Protocol):
    def fire(self) -> None: ...


class Wheel:
    """Many coarse timers behind few of the loop's: to set and to clear one costs next to nothing.

    Time-outs are set on every call and almost never fire. A timer fires at most `GRAIN` seconds late, never early.
    """

    GRAIN = 1 / 128

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._slots: dict[int, set[Timer]] = {}

    def set(self, when: float, timer: Timer) -> set[Timer]:
        """Fires the timer once `now()` has reached `when`, unless it is discarded from the returned set before."""
        slot = int(when / self.GRAIN) + 1
        timers = self._slots.get(slot)
        if timers is None:
            timers = self._slots[slot] = set()
            self._clock.call_at(slot * self.GRAIN, partial(self._fire, slot))
        timers.add(timer)
        return timers

    def _fire(self, slot: int) -> None:
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

    def wheel(self) -> Wheel:
        """The running loop's coarse timers."""
        loop, latest = asyncio.get_running_loop(), self._latest  # read once: another thread may run another loop
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

    def to_wall(self, deadline: float | None) -> float | None:
        """A deadline of this process as wall-clock time, for carriers that outlive it."""
        return None if deadline is None else self.wall() + (deadline - self.now())

    def from_wall(self, wall: float | None) -> float | None:
        """The reverse of `to_wall`, in the process that receives."""
        return None if wall is None else self.now() + (wall - self.wall())


SYSTEM = Clock()
