"""For tests: services in one event loop, a clock that a test moves, a transport that fails by chance, and the checks
that every transport passes."""

from quintet.testing.bench import Bench, Receiver
from quintet.testing.checks import CHECKS, Check, skips
from quintet.testing.clock import FakeClock
from quintet.testing.faulty import FaultyTransport
from quintet.testing.harness import Harness, harness

__all__ = ["CHECKS", "Bench", "Check", "FakeClock", "FaultyTransport", "Harness", "Receiver", "harness", "skips"]
