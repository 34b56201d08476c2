"""A clock that stands still until the test moves it (law 11: tests never sleep to wait)."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable

from quintet.clock import Clock, Handle

TURNS = 32  # of the loop after each timer: a message crosses client, transport, server and back in fewer


class _Timer:
    """One entry of the heap; earlier times first, and of one time the one that was asked for first."""

    __slots__ = ("callback", "order", "when")

    def __init__(self, when: float, order: int, callback: Callable[[], None]) -> None:
        self.when = when
        self.order = order
        self.callback: Callable[[], None] | None = callback

    def __lt__(self, other: _Timer) -> bool:
        return (self.when, self.order) < (other.when, other.order)

    def cancel(self) -> None:
        self.callback = None


class FakeClock(Clock):
    """Time that only `advance` moves, and a random source with a stated seed.

    `now` starts at 1,000 s and `wall` at 2026-01-01 00:00 UTC unless given; both move together.
    """

    def __init__(self, seed: int = 0, *, now: float = 1_000.0, wall: float = 1_767_225_600.0) -> None:
        super().__init__(seed)
        self._now = now
        self._offset = wall - now
        self._order = itertools.count()
        self._timers: list[_Timer] = []
        self.now = lambda: self._now
        self.wall = lambda: self._now + self._offset

    def __repr__(self) -> str:
        return f"<FakeClock at {self._now:g} s, {len(self.timers)} timers>"

    @property
    def timers(self) -> list[float]:
        """When the pending timers are due, earliest first: for tests that look for leaked ones."""
        return sorted(timer.when for timer in self._timers if timer.callback is not None)

    def call_at(self, when: float, callback: Callable[[], None]) -> Handle:
        if when <= self._now:
            return asyncio.get_running_loop().call_soon(callback)
        timer = _Timer(when, next(self._order), callback)
        heapq.heappush(self._timers, timer)
        return timer

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        await self.until(asyncio.Event(), seconds)

    async def advance(self, seconds: float) -> None:
        """Moves time on by `seconds` (>= 0) and runs each timer that falls due, in order and at its own time.

        Before the first and after each timer the loop takes `TURNS` turns, so that what was woken can run and set
        timers of its own. Work in threads and on sockets is not waited for: await its own result.
        What a timer raises, `advance` raises.
        """
        if seconds < 0:
            raise ValueError(f"time cannot go back: advance({seconds})")
        target = self._now + seconds
        await self.settle()
        while self._timers and self._timers[0].when <= target:
            timer = heapq.heappop(self._timers)
            if timer.callback is None:
                continue
            self._now = max(self._now, timer.when)
            timer.callback()
            await self.settle()
        self._now = target
        await self.settle()

    async def settle(self) -> None:
        """Lets what is ready run, without moving time."""
        for _ in range(TURNS):
            await asyncio.sleep(0)
