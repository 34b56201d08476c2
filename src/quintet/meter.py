"""What the filters count, gathered for those who look: nothing here is done on a message's way but one addition."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from threading import Lock
from typing import Protocol
from weakref import WeakKeyDictionary

from quintet.contract import Operation
from quintet.message import Handler
from quintet.outcome import OUTCOMES
from quintet.policy import Breaker, Policy
from quintet.watch import Watch

BOUNDS = [round(mantissa * 10.0**power, 5) for power in (-4, -3, -2, -1) for mantissa in range(10, 100)] + [10.0]
"""Upper ends of the buckets in seconds: two significant digits from 1 ms to 10 s, as HdrHistogram has them."""


_bucket = partial(bisect_left, BOUNDS)


class Latencies:
    """How long attempts took, since the start: how many fell into each bucket, and all their seconds.

    What only stands in `unfolded` is not in them yet: to append there is all that is done on the way of a good call.
    """

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0
        self.unfolded: list[float] = []
        self._folding = Lock()

    def __repr__(self) -> str:
        return f"<latencies of {sum(self.counts)} attempts, {self.seconds:.3g} s in all>"

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds

    def fold(self) -> Latencies:
        """Takes in what was left for later; whoever reads does so first."""
        with self._folding:  # a scrape may come from another thread than the calls
            taken = self.unfolded[:]
            del self.unfolded[: len(taken)]
            self.seconds += sum(taken)
            for bucket, count in Counter(map(_bucket, taken)).items():
                self.counts[bucket] += count
        return self


def percentiles(counts: Sequence[int], wanted: Sequence[float]) -> list[float]:
    """The least bound, in seconds, that so many per cent of what was counted do not exceed; 0 where there is none."""
    total, sums = sum(counts), list(accumulate(counts))
    least = next((index for index, count in enumerate(counts) if count), 0)
    found: list[float] = []
    for percent in wanted:
        index = max(least, bisect_left(sums, total * percent / 100)) if total else -1
        found.append(BOUNDS[min(index, len(BOUNDS) - 1)] if total else 0.0)
    return found


class ShownCircuit(Protocol):
    """What the breaker shows of itself (filters/breaker.py)."""

    name: str
    totals: list[int]
    latencies: Latencies

    @property
    def state(self) -> str: ...
    @property
    def settings(self) -> Breaker: ...
    def try_now(self) -> None: ...


class ShownOutstanding(Protocol):
    """What the bulkhead shows of itself (filters/bulkhead.py)."""

    busy: int
    limit: int
    peak: int


class Meter:
    """One operation, as its caller or its service sees it: each of its filters enters what it counts."""

    def __init__(self) -> None:
        self.operation: Operation[..., object, object]
        self.watch = Watch()
        self.policy = Policy()
        self.circuit: ShownCircuit | None = None
        self.outstanding: ShownOutstanding | None = None
        self.extra = {"retry": 0, "hedge": 0}  # attempts beside the first one
        self.fallbacks = {"success": 0, "failure": 0, "rejected": 0, "missing": 0}
        self.totals = [0] * len(OUTCOMES)  # on the service's side: how handling ended, as in OUTCOMES
        self.latencies = Latencies()

    @property
    def owner(self) -> str:
        """The service or client that calls or handles."""
        return self.watch.owner

    @property
    def contract(self) -> str:
        """The name of the operation's contract; a guarded function has none, and stands for itself."""
        info = getattr(self.operation.contract, "__quintet__", None)
        return info.name if info else self.operation.full_name

    def __repr__(self) -> str:
        return f"<meter of {self.operation.full_name} in {self.owner or '?'}>"


CLIENTS: WeakKeyDictionary[Handler, Meter] = WeakKeyDictionary()
SERVERS: WeakKeyDictionary[Handler, Meter] = WeakKeyDictionary()
"""All chains of filters in this process, until they are closed or forgotten: one registry a process."""


def meters(chains: WeakKeyDictionary[Handler, Meter]) -> list[Meter]:
    """Those that stand; other threads may add some meanwhile."""
    found = [chains[handler] for ref in chains.keyrefs() if (handler := ref()) is not None]
    return [meter for meter in dict.fromkeys(found) if not meter.watch.ended]  # a chain built anew keeps its meter
