"""The stream for Hystrix' dashboards: every key that they insist on, in its order, with what really happened."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from callee import Callee, Passengers, run

from quintet import (
    Breaker,
    Bulkhead,
    CircuitOpen,
    Contract,
    Fault,
    InvalidMessage,
    Policy,
    RemoteError,
    Retry,
    Service,
    Unavailable,
    connect,
    on,
    request,
    serve,
)
from quintet.filter import State
from quintet.meter import BOUNDS, CLIENTS, Latencies, meters, percentiles
from quintet.observe import Observer
from quintet.testing import FakeClock

COUNTS = [
    *("BadRequests", "CollapsedRequests", "Emit", "ExceptionsThrown", "Failure", "FallbackEmit", "FallbackFailure"),
    *("FallbackMissing", "FallbackRejection", "FallbackSuccess", "ResponsesFromCache", "SemaphoreRejected"),
    *("ShortCircuited", "Success", "ThreadPoolRejected", "Timeout"),
]
PERCENTILES = ["0", "25", "50", "75", "90", "95", "99", "99.5", "100"]
KEYS: dict[str, type | tuple[type, ...]] = {
    "type": str,
    "name": str,
    "group": str,
    "currentTime": int,
    "isCircuitBreakerOpen": bool,
    "errorPercentage": int,
    "errorCount": int,
    "requestCount": int,
    **{f"rollingCount{name}": int for name in COUNTS},
    "currentConcurrentExecutionCount": int,
    "rollingMaxConcurrentExecutionCount": int,
    "latencyExecute_mean": int,
    "latencyExecute": dict,
    "latencyTotal_mean": int,
    "latencyTotal": dict,
    "propertyValue_circuitBreakerRequestVolumeThreshold": int,
    "propertyValue_circuitBreakerSleepWindowInMilliseconds": int,
    "propertyValue_circuitBreakerErrorThresholdPercentage": int,
    "propertyValue_circuitBreakerForceOpen": bool,
    "propertyValue_circuitBreakerForceClosed": bool,
    "propertyValue_circuitBreakerEnabled": bool,
    "propertyValue_executionIsolationStrategy": str,
    "propertyValue_executionIsolationThreadTimeoutInMilliseconds": int,
    "propertyValue_executionTimeoutInMilliseconds": int,
    "propertyValue_executionIsolationThreadInterruptOnTimeout": bool,
    "propertyValue_executionIsolationThreadPoolKeyOverride": (str, type(None)),
    "propertyValue_executionIsolationSemaphoreMaxConcurrentRequests": int,
    "propertyValue_fallbackIsolationSemaphoreMaxConcurrentRequests": int,
    "propertyValue_metricsRollingStatisticalWindowInMilliseconds": int,
    "propertyValue_requestCacheEnabled": bool,
    "propertyValue_requestLogEnabled": bool,
    "reportingHosts": int,
    "threadPool": str,
}
"""What a dashboard wants, and of which type; the one that may be null says so."""


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    for meter in meters(CLIENTS):  # of other tests' clients that nobody has closed
        meter.watch.ended = True


class Declared(Fault):
    why: str


class Dashboard:
    """Looks at the stream of an observer, as a dashboard does."""

    def __init__(self, clock: FakeClock) -> None:
        self.observer = Observer(clock, list)
        self.observer.start()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        body = (await self.observer.pages["/hystrix.stream"]({})).body
        assert not isinstance(body, bytes)
        return body

    async def read(self, name: str = "passengers.get") -> dict[str, Any]:
        """The command of this name, as it is now."""
        stream = await self.chunks()
        chunk = await anext(stream)
        await stream.aclose()
        return commands(chunk)[name]


def commands(chunk: bytes) -> dict[str, dict[str, Any]]:
    *events, ping, rest = chunk.split(b"\n\n")
    assert (ping, rest) == (b"ping: ", b"")
    assert all(event.startswith(b"data: {") for event in events)
    found = [json.loads(event.removeprefix(b"data: ")) for event in events]
    return {command["name"]: command for command in found}


def test_every_key_is_there_in_its_order_with_its_type_and_never_null_but_one() -> None:
    async def main() -> None:
        clock = FakeClock()
        dashboard, callee = Dashboard(clock), Callee(Policy(), clock)
        await callee.succeed()
        command = await dashboard.read()
        assert list(command) == list(KEYS)
        wrong = {key: value for key, value in command.items() if not isinstance(value, KEYS[key])}
        assert not wrong
        assert not [key for key, kind in KEYS.items() if kind is int and isinstance(command[key], bool)]
        for latencies in ("latencyExecute", "latencyTotal"):
            assert list(command[latencies]) == PERCENTILES
            assert all(type(value) is int for value in command[latencies].values())

    run(main)


def test_a_command_shows_its_policy() -> None:
    async def main() -> None:
        clock = FakeClock()
        breaker = Breaker(min_calls=7, open_for=2.5, error_rate=0.29, force_open=True)
        dashboard, _ = Dashboard(clock), Callee(Policy(timeout=0.3, breaker=breaker, bulkhead=Bulkhead(12)), clock)
        command = await dashboard.read()
        shown = {key.removeprefix("propertyValue_"): value for key, value in command.items() if "propertyV" in key}
        assert shown == {
            "circuitBreakerRequestVolumeThreshold": 7,
            "circuitBreakerSleepWindowInMilliseconds": 2500,
            "circuitBreakerErrorThresholdPercentage": 29,
            "circuitBreakerForceOpen": True,
            "circuitBreakerForceClosed": False,
            "circuitBreakerEnabled": True,
            "executionIsolationStrategy": "SEMAPHORE",
            "executionIsolationThreadTimeoutInMilliseconds": 300,
            "executionTimeoutInMilliseconds": 300,
            "executionIsolationThreadInterruptOnTimeout": True,
            "executionIsolationThreadPoolKeyOverride": None,
            "executionIsolationSemaphoreMaxConcurrentRequests": 12,
            "fallbackIsolationSemaphoreMaxConcurrentRequests": 10,
            "metricsRollingStatisticalWindowInMilliseconds": 10000,
            "requestCacheEnabled": False,
            "requestLogEnabled": False,
        }
        assert (command["type"], command["name"]) == ("HystrixCommand", "passengers.get")
        assert (command["group"], command["threadPool"], command["reportingHosts"]) == ("passengers", "passengers", 1)
        assert command["currentTime"] == 1_767_225_600_000
        assert command["isCircuitBreakerOpen"] is True

    run(main)


def test_a_breaker_that_is_switched_off_is_shown_so() -> None:
    async def main() -> None:
        clock = FakeClock()
        dashboard, callee = Dashboard(clock), Callee(Policy(breaker=False), clock)
        await callee.fail(30)
        command = await dashboard.read()
        assert command["propertyValue_circuitBreakerEnabled"] is False
        assert command["propertyValue_circuitBreakerForceClosed"] is False
        assert command["isCircuitBreakerOpen"] is False
        assert command["rollingCountFailure"] == 30

    run(main)


def test_the_counts_are_those_of_the_last_ten_seconds() -> None:
    async def main() -> None:
        clock = FakeClock()
        dashboard, callee = Dashboard(clock), Callee(Policy(bulkhead=Bulkhead(3)), clock)
        await callee.succeed(6)
        await callee.call(Declared(why="none there"))
        await callee.call(InvalidMessage("no"))
        hanging = [callee.start() for _ in range(3)]
        await clock.settle()
        await callee.call()  # refused by the limit
        busy = await dashboard.read()
        assert (busy["currentConcurrentExecutionCount"], busy["rollingMaxConcurrentExecutionCount"]) == (3, 3)
        assert busy["rollingCountSemaphoreRejected"] == 1
        assert busy["rollingCountExceptionsThrown"] == 1
        await clock.advance(1.1)  # they are timed out
        await asyncio.gather(*hanging)
        await callee.fail(11)
        assert isinstance(await callee.call(), CircuitOpen)
        command = await dashboard.read()
        counted = {name: command[f"rollingCount{name}"] for name in COUNTS}
        assert {name: count for name, count in counted.items() if count} == {
            "BadRequests": 2,
            "ExceptionsThrown": 16,
            "Failure": 11,
            "SemaphoreRejected": 1,
            "ShortCircuited": 1,
            "Success": 6,
            "Timeout": 3,
        }
        assert (command["errorCount"], command["requestCount"], command["errorPercentage"]) == (14, 20, 70)
        assert command["isCircuitBreakerOpen"] is True
        assert (command["currentConcurrentExecutionCount"], command["rollingMaxConcurrentExecutionCount"]) == (0, 3)
        await clock.advance(11)
        later = await dashboard.read()
        assert (later["errorCount"], later["requestCount"], later["errorPercentage"]) == (0, 0, 0)
        assert later["rollingMaxConcurrentExecutionCount"] == 0
        assert not any(later[f"rollingCount{name}"] for name in COUNTS)

    run(main)


def test_refusals_are_errors_where_the_breaker_counts_them() -> None:
    async def main() -> None:
        clock = FakeClock()
        policy = Policy(bulkhead=Bulkhead(1), breaker=Breaker(count_refusals=True))
        dashboard, callee = Dashboard(clock), Callee(policy, clock)
        hanging = callee.start()
        await clock.settle()
        await callee.call()
        command = await dashboard.read()
        assert (command["errorCount"], command["requestCount"]) == (1, 1)
        callee.hanging[0].set_result(None)
        await hanging

    run(main)


def test_the_percentiles_are_those_of_the_last_sixty_seconds() -> None:
    async def main() -> None:
        clock = FakeClock()
        dashboard, callee = Dashboard(clock), Callee(Policy(timeout=5.0, breaker=Breaker(window=600.0)), clock)

        async def lasting(seconds: float) -> None:
            call = callee.start()
            await clock.advance(seconds)
            callee.hanging.pop().set_result(None)
            await call

        for milliseconds in (10, 10, 10, 20, 20, 30, 30, 40, 40, 1040):
            await lasting(milliseconds / 1000)
        command = await dashboard.read()
        assert command["latencyExecute"] == {
            "0": 10,
            "25": 10,
            "50": 20,
            "75": 40,
            "90": 40,
            "95": 1100,  # two significant digits above 100 ms
            "99": 1100,
            "99.5": 1100,
            "100": 1100,
        }
        assert command["latencyExecute_mean"] == 125
        assert command["latencyTotal"] == command["latencyExecute"]
        await clock.advance(30)
        assert (await dashboard.read())["latencyExecute"]["50"] == 20
        await clock.advance(40)
        gone = await dashboard.read()
        assert set(gone["latencyExecute"].values()) == {0}
        assert gone["latencyExecute_mean"] == 0

    run(main)


def test_a_repeat_s_latency_is_its_own_and_not_the_wait_before_it() -> None:
    async def main() -> None:
        clock = FakeClock()
        policy = Policy(timeout=60.0, retry=Retry(1, first=20.0, longest=20.0))
        dashboard, callee = Dashboard(clock), Callee(policy, clock)
        callee.outcomes = [Unavailable("nobody there")]
        call = asyncio.get_running_loop().create_task(callee.call())
        await clock.advance(20)
        await call
        assert callee.begun == 2
        assert (await dashboard.read())["latencyExecute"]["100"] <= 1

    run(main)


def test_latencies_do_not_pile_up_where_nobody_looks() -> None:
    async def main() -> None:
        clock = FakeClock()
        callee = Callee(Policy(), clock)
        for _ in range(30):
            await callee.succeed(10)
            await clock.advance(1)
        assert len(callee.circuit.latencies.unfolded) <= 10
        assert sum(callee.circuit.latencies.fold().counts) == 300

    run(main)


def test_what_was_counted_before_anybody_looked_is_not_of_the_last_seconds() -> None:
    async def main() -> None:
        clock = FakeClock()
        callee = Callee(Policy(), clock)
        await callee.succeed(5)
        dashboard = Dashboard(clock)
        await callee.succeed(2)
        assert (await dashboard.read())["rollingCountSuccess"] == 2

    run(main)


def test_operations_that_share_a_circuit_are_one_command() -> None:
    async def main() -> None:
        clock, shared = FakeClock(), State()
        dashboard, policy = Dashboard(clock), Policy(breaker=Breaker(per="service"))
        get = Callee(policy, clock, Passengers.get, shared)
        book = Callee(policy, clock, Passengers.book, shared)
        await get.succeed(2)
        await book.succeed(3)
        command = await dashboard.read("passengers")
        assert command["rollingCountSuccess"] == 5

    run(main)


def test_clients_of_one_operation_are_one_command_and_open_where_one_of_them_is() -> None:
    async def main() -> None:
        clock = FakeClock()
        dashboard, one, other = Dashboard(clock), Callee(Policy(), clock), Callee(Policy(), clock)
        await one.succeed(2)
        await other.fail(20)
        command = await dashboard.read()
        assert (command["rollingCountSuccess"], command["rollingCountFailure"]) == (2, 20)
        assert command["isCircuitBreakerOpen"] is True

    run(main)


def test_the_stream_comes_every_half_second_and_ends_with_the_service() -> None:
    async def main() -> None:
        clock = FakeClock()
        dashboard, _ = Dashboard(clock), Callee(Policy(), clock)
        stream = await dashboard.chunks()
        assert b"ping: \n\n" in await anext(stream)
        following = asyncio.ensure_future(anext(stream))
        await clock.advance(0.49)
        assert not following.done()
        await clock.advance(0.01)
        assert following.done()
        last = asyncio.ensure_future(anext(stream))
        await clock.settle()
        dashboard.observer.stop()
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(last, 45)
        assert clock.timers == []

    run(main)


def test_fallbacks_are_counted_by_how_they_ended() -> None:
    class Store(Contract, name="fallen-back"):
        @request
        async def price(self, item: str) -> int: ...

        @request
        async def stock(self, item: str) -> int: ...

    service = Service(Store)

    @service.handles(Store.price)
    async def price(item: str) -> int:
        raise RuntimeError("broken")

    @service.handles(Store.stock)
    async def stock(item: str) -> int:
        raise RuntimeError("broken")

    async def fails(item: str) -> int:
        raise ValueError("the fallback is broken too")

    async def main() -> None:
        clock = FakeClock()
        dashboard, at = Dashboard(clock), "memory://fallen-back"
        policy = [on(Store.price, fallback=[fails, 7]), on(Store.stock, fallback=[fails])]
        async with serve(service, at=at), connect(Store, at, policy=policy) as store:
            assert await store.price("pen") == 7
            with pytest.raises(RemoteError):
                await store.stock("pen")
            first, second = await dashboard.read("fallen-back.price"), await dashboard.read("fallen-back.stock")
        for command, counted in ((first, (1, 1, 0, 0)), (second, (0, 1, 1, 1))):
            names = ("FallbackSuccess", "FallbackFailure", "FallbackMissing", "ExceptionsThrown")
            assert tuple(command[f"rollingCount{name}"] for name in names) == counted

    run(main)


def test_latencies_are_rounded_up_to_two_digits_and_none_is_lost() -> None:
    latencies = Latencies()
    for seconds in (0.0, 0.00004, 0.0123, 0.0123, 3.21, 77.0):
        latencies.add(seconds)
    latencies.unfolded += [0.5, 0.5]
    assert sum(latencies.fold().counts) == 8
    assert latencies.fold().seconds == pytest.approx(81.23464)
    assert percentiles(latencies.counts, [0, 25, 50, 75, 100]) == [0.001, 0.001, 0.013, 0.5, 10.0]
    assert percentiles([0] * len(latencies.counts), [0, 100]) == [0.0, 0.0]
    assert sorted(BOUNDS) == BOUNDS
