"""What all extra attempts to one service share, so that they cannot multiply the load on one that is failing."""

from __future__ import annotations

from quintet.window import Window

SECONDS = 10.0  # that it looks back
RESERVE = 10.0  # extra attempts a second that are allowed however few the calls are (Finagle's numbers)

_CALLS, _EXTRA = range(2)


class Budget:
    """Extra attempts may be a share of the calls of the last seconds, and a reserve."""

    def __init__(self) -> None:
        self._window = Window(SECONDS, 2)

    def __repr__(self) -> str:
        calls, extra = self._window.counts
        return f"<budget, {extra} extra attempts for {calls} calls in {SECONDS:g} s>"

    def call(self, now: float) -> None:
        """Counts a call, which adds its share."""
        self._window.add(_CALLS, now)

    def spend(self, share: float, now: float) -> bool:
        """Takes one extra attempt out, where there is one left."""
        calls, extra = self._window.at(now)
        if extra + 1 > share * calls + RESERVE * SECONDS:
            return False
        self._window.add(_EXTRA, now)
        return True
