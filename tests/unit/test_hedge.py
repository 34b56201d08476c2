"""Hedging: another attempt beside a slow one, only where it is harmless, and nothing of the losers remains."""

from __future__ import annotations

import asyncio

import pytest
from callee import HANG, Callee, Passengers, run

from quintet import ConfigurationError, Fault, Hedge, Policy, RemoteError, on
from quintet.filters.hedge import Hedges
from quintet.testing import FakeClock


class NoSuchPassenger(Fault):
    passenger_id: str


def callee(hedge: Hedge | None = None, operation: object = Passengers.get) -> Callee:
    return Callee(Policy(hedge=hedge or Hedge(0.05), timeout=1.0), FakeClock(), operation)


async def nothing_remains(service: Callee) -> None:
    await service.clock.settle()
    assert service.outstanding.busy == 0
    assert len(asyncio.all_tasks()) == 2  # this one, and the one that ends it in time
    assert not any(service.clock.wheel(asyncio.get_running_loop())._slots.values())


def test_a_slow_attempt_gets_another_beside_it_and_the_first_answer_counts() -> None:
    async def main() -> None:
        service = callee()
        service.outcomes = [HANG, None]
        call = asyncio.ensure_future(service.call())
        await service.clock.advance(0.049)
        assert service.begun == 1
        await service.clock.advance(0.002)
        assert await call is None
        assert service.begun == 2
        await nothing_remains(service)
        assert (service.total("success"), service.total("cancelled")) == (1, 1)

    run(main)


def test_a_quick_answer_needs_no_other_attempt() -> None:
    async def main() -> None:
        service = callee()
        assert await service.call() is None
        assert service.clock.now() + 0.05 not in service.clock.timers
        await service.clock.advance(1)
        assert service.begun == 1
        await nothing_remains(service)

    run(main)


def test_the_slow_attempt_may_still_win() -> None:
    async def main() -> None:
        service = callee(Hedge(0.05, times=2))
        call = service.start()
        await service.clock.advance(0.11)
        assert service.begun == 3
        await service.clock.advance(0.5)
        assert service.begun == 3  # no more than that
        service.hanging[0].set_result(None)
        assert await call is None
        await nothing_remains(service)

    run(main)


def test_one_failure_does_not_end_what_the_other_may_still_answer() -> None:
    async def main() -> None:
        service = callee()
        call = service.start()
        await service.clock.advance(0.051)
        service.hanging[0].set_result(RemoteError("failed"))
        await service.clock.settle()
        assert not call.done()
        service.hanging[1].set_result(None)
        assert await call is None

    run(main)


def test_where_all_fail_the_last_failure_is_raised_and_a_fault_at_once() -> None:
    async def main() -> None:
        service = callee()
        assert isinstance(await service.call(RemoteError("failed")), RemoteError)
        call = service.start()
        await service.clock.advance(0.051)
        service.hanging[0].set_result(NoSuchPassenger(passenger_id="p-1"))
        assert isinstance(await call, NoSuchPassenger)
        await nothing_remains(service)

    run(main)


def test_a_cancelled_caller_takes_all_its_attempts_with_it() -> None:
    async def main() -> None:
        service = callee()
        call = service.start()
        await service.clock.advance(0.051)
        call.cancel()
        await asyncio.wait([call])
        await nothing_remains(service)
        assert service.total("cancelled") == 2

    run(main)


def test_hedges_have_a_budget() -> None:
    async def main() -> None:
        service = callee(Hedge(0.05, budget=0.0))
        calls = [service.start() for _ in range(200)]
        await service.clock.advance(0.06)
        assert service.begun == 300  # the reserve of 10 a second for 10 seconds
        assert service.guarded.shared.of(Hedges, Hedges)._window.counts == [200, 100]
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)

    run(main)


def test_what_is_not_idempotent_is_not_hedged() -> None:
    async def main() -> None:
        service = callee(operation=Passengers.book)
        call = service.start()
        await service.clock.advance(0.5)
        assert service.begun == 1
        call.cancel()
        await asyncio.wait([call])

    run(main)
    with pytest.raises(ConfigurationError, match=r"on\(Passengers.book, hedge=...\): it may be done twice"):
        on(Passengers.book, hedge=Hedge(0.05))
