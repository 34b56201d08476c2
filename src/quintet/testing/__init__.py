"""For tests: the checks that every transport passes, and a clock that a test moves."""

from quintet.testing.bench import Bench, Receiver
from quintet.testing.checks import CHECKS, Check, skips
from quintet.testing.clock import FakeClock

__all__ = ["CHECKS", "Bench", "Check", "FakeClock", "Receiver", "skips"]
