"""Counts of the last seconds: ten buckets, cleared as they are come upon, so that no timer is needed."""

from __future__ import annotations

BUCKETS = 10


class Window:
    """How often each of `kinds` kinds (0, 1, ...) was counted in the last `seconds`, to a tenth of them.

    `counts` is true as of the last `at` or `add`. Who counts on the path of every call does what `add` does in place.
    """

    def __init__(self, seconds: float, kinds: int) -> None:
        self.seconds = seconds
        self.counts = [0] * kinds
        self._width = seconds / BUCKETS
        self._buckets = [[0] * kinds for _ in range(BUCKETS)]
        self._tick = 0
        self.latest = self._buckets[0]
        self.ends = self._width  # when the latest bucket is full of time

    def __repr__(self) -> str:
        return f"<window of {self.seconds:g} s: {self.counts}>"

    def add(self, kind: int, now: float) -> None:
        """Counts one at `now` (monotonic seconds)."""
        if now >= self.ends:
            self.roll(now)
        self.latest[kind] += 1
        self.counts[kind] += 1

    def at(self, now: float) -> list[int]:
        """The counts of the seconds before `now`."""
        if now >= self.ends:
            self.roll(now)
        return self.counts

    def clear(self) -> None:
        for counts in (self.counts, *self._buckets):
            counts[:] = [0] * len(counts)

    def roll(self, now: float) -> None:
        """Forgets what is too old, and begins a new bucket."""
        tick = int(now / self._width)
        for passed in range(max(self._tick + 1, tick - BUCKETS + 1), tick + 1):
            bucket = self._buckets[passed % BUCKETS]
            for kind, count in enumerate(bucket):
                self.counts[kind] -= count
                bucket[kind] = 0
        self._tick, self.ends = tick, (tick + 1) * self._width
        self.latest = self._buckets[tick % BUCKETS]
