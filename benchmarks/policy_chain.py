"""What a guarded call costs over a bare await, beside existing stacks of breaker, limit and time-out."""

from __future__ import annotations

import asyncio
import datetime
import importlib.util
import time
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.figure import Figure, at_most
from quintet import Contract, Policy, request
from quintet.clock import SYSTEM
from quintet.filter import Guarded, client_chain
from quintet.message import Message
from quintet.policy import DEFAULT

BATCH = 1000
BATCHES = 10  # the best one counts: the others were disturbed
ROUNDS = 10
BUDGET = 2.0  # microseconds for the whole default chain


class Bench(Contract, name="bench"):
    @request
    async def call(self) -> None: ...


BARE = "a bare await"
OURS = "the default chain (time-out, breaker, bulkhead)"


async def nothing() -> None:
    return None


async def _microseconds(function: Callable[[], Awaitable[object]]) -> float:
    best = float("inf")
    for _ in range(BATCHES):
        begun = time.perf_counter()
        for _ in range(BATCH):
            await function()
        best = min(best, time.perf_counter() - begun)
    return best / BATCH * 1e6


def _default_chain() -> Callable[[], Awaitable[object]]:
    """What stands between the codec and the transport of every call."""

    async def exchange(message: Message) -> Message:
        return message

    message = Message(channel=Bench.call.channel)
    send = client_chain(Guarded(Bench.call, DEFAULT, SYSTEM), [exchange])

    def call() -> Awaitable[object]:
        message.until = None
        return send(message)

    return call


def _hyx() -> Callable[[], Awaitable[object]]:
    from hyx.bulkhead import bulkhead
    from hyx.circuitbreaker import consecutive_breaker
    from hyx.timeout import timeout

    guarded = bulkhead(max_concurrency=1000, max_capacity=1000)(timeout(1.0)(nothing))
    return consecutive_breaker(failure_threshold=20, recovery_time_secs=5)(guarded)


def _pyresilience() -> Any:
    from pyresilience import BulkheadConfig, CircuitBreakerConfig, TimeoutConfig, resilient

    return resilient(
        timeout=TimeoutConfig(seconds=1.0), circuit_breaker=CircuitBreakerConfig(), bulkhead=BulkheadConfig(1000)
    )(nothing)


def _aiobreaker() -> Callable[[], Awaitable[object]]:
    from aiobreaker import CircuitBreaker

    return CircuitBreaker(fail_max=20, timeout_duration=datetime.timedelta(seconds=5))(nothing)


def _tenacity() -> Callable[[], Awaitable[object]]:
    from tenacity import retry, stop_after_attempt

    return retry(stop=stop_after_attempt(3))(nothing)


def _asyncio_timeout() -> Callable[[], Awaitable[object]]:
    async def call() -> None:
        async with asyncio.timeout(1.0):
            await nothing()

    return call


SUBJECTS: dict[str, tuple[str, Callable[[], Callable[[], Awaitable[object]]]]] = {
    OURS: ("quintet", _default_chain),
    "Policy().guards, the same around a function": ("quintet", lambda: Policy().guards(nothing)),
    "asyncio.timeout alone": ("asyncio", _asyncio_timeout),
    "hyx: breaker, bulkhead, time-out": ("hyx", _hyx),
    "pyresilience: breaker, bulkhead, time-out": ("pyresilience", _pyresilience),
    "aiobreaker: breaker": ("aiobreaker", _aiobreaker),
    "tenacity: retry": ("tenacity", _tenacity),
}


def figures() -> list[Figure]:
    """Microseconds that each subject adds to `await nothing()`; those that are not installed are left out."""

    async def main() -> dict[str, float]:
        installed = {name: make for name, (package, make) in SUBJECTS.items() if importlib.util.find_spec(package)}
        subjects = {BARE: nothing} | {name: make() for name, make in installed.items()}
        found = dict.fromkeys(subjects, float("inf"))
        for _ in range(ROUNDS):  # in turns: what else the machine does must not fall on one of them
            for name, subject in subjects.items():
                found[name] = min(found[name], await _microseconds(subject))
        return found

    found = asyncio.run(main())
    bare = found.pop(BARE)
    costs = [(name, cost - bare) for name, cost in found.items()]
    return [
        Figure(BARE, bare, "us"),
        *(at_most(name, cost, "us", BUDGET) if name == OURS else Figure(name, cost, "us") for name, cost in costs),
    ]


if __name__ == "__main__":
    for figure in figures():
        print(f"{figure.name:60} {figure.value:12,.2f} {figure.unit:4} {figure.budget}")
