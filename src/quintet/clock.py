"""Time and chance as arguments (law 11): the system's clock here, a fake one in `quintet.testing`."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Protocol


class Handle(Protocol):
    def cancel(self) -> None: ...


class Clock:
    """Monotonic and wall-clock time, timers of the running loop, and the random source.

    `now` decides within a process; `wall` only where a time must outlive one (leases, expiry on queues).
    """

    now: Callable[[], float] = staticmethod(time.monotonic)
    wall: Callable[[], float] = staticmethod(time.time)

    def __init__(self, seed: int | None = None) -> None:
        self.random = random.Random(seed)  # noqa: S311 - jitter, not secrets

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
