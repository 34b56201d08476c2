"""For tests: a clock that a test moves."""

from quintet.testing.clock import FakeClock

__all__ = ["FakeClock"]
