"""Retry: only what is safe, within the budget, within the deadline."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from callee import HANG, Callee, Passengers, run

from quintet import (
    Breaker,
    Bulkhead,
    CallError,
    CircuitOpen,
    ConnectionLost,
    DeadlineExceeded,
    Fault,
    LimitReached,
    Overloaded,
    Policy,
    RemoteError,
    Retry,
    Unavailable,
)
from quintet.budget import Budget
from quintet.filter import Guarded, client_chain
from quintet.message import Message
from quintet.policy import DEFAULT
from quintet.testing import FakeClock


class NoSuchPassenger(Fault):
    passenger_id: str


def callee(retry: Retry | None = None, operation: object = Passengers.get, timeout: float = 60.0) -> Callee:
    policy = Policy(retry=retry or Retry(2), timeout=timeout, breaker=False)
    return Callee(policy, FakeClock(), operation)


async def ended(service: Callee, outcome: object = None) -> BaseException | None:
    call = asyncio.ensure_future(service.call(outcome))
    await service.clock.advance(30)
    return call.result()


@pytest.mark.parametrize(
    ("error", "idempotent", "attempts"),
    [
        (Unavailable("nobody there"), True, 3),
        (Unavailable("nobody there"), False, 3),  # never sent: safe whatever the operation does
        (Overloaded("too much"), False, 3),
        (ConnectionLost("gone"), True, 3),
        (ConnectionLost("gone"), False, 1),  # it may have been done
        (RuntimeError("not ours"), True, 3),
        (RuntimeError("not ours"), False, 1),
        (RemoteError("failed"), True, 1),  # it answered: to ask again changes nothing
        (NoSuchPassenger(passenger_id="p-1"), True, 1),
    ],
)
def test_only_what_is_safe_is_repeated(error: Exception, idempotent: bool, attempts: int) -> None:
    async def main() -> None:
        service = callee(operation=Passengers.get if idempotent else Passengers.book)
        assert await ended(service, error) is error
        assert service.begun == attempts

    run(main)


def test_a_later_attempt_that_succeeds_is_the_answer() -> None:
    async def main() -> None:
        service = callee()
        service.outcomes = [Unavailable("nobody there"), Unavailable("nobody there"), None]
        assert await ended(service) is None
        assert service.begun == 3

    run(main)


def test_the_waits_grow_by_chance_within_a_growing_bound_and_up_to_the_longest() -> None:
    async def main() -> None:
        longest = [0.0] * 6
        for seed in range(50):
            clock, times = FakeClock(seed), list[float]()

            async def unavailable(message: Message, clock: FakeClock = clock, times: list[float] = times) -> None:
                times.append(clock.now())
                raise Unavailable("nobody there")

            policy = Policy(retry=Retry(6, first=0.1, longest=1.0), timeout=60, breaker=False).over(DEFAULT)
            send = client_chain(Guarded(Passengers.get, policy, clock), [unavailable])
            call = asyncio.ensure_future(send(Message(channel=Passengers.get.channel)))
            await clock.advance(10)
            assert isinstance(call.exception(), Unavailable)
            waits = [later - earlier for earlier, later in itertools.pairwise(times)]
            longest = [max(pair) for pair in zip(longest, waits, strict=True)]
        for seen, bound in zip(longest, [0.1, 0.2, 0.4, 0.8, 1.0, 1.0], strict=True):
            assert bound * 0.7 < seen <= bound + 1e-6

    run(main)


def test_what_the_service_asked_to_wait_is_waited() -> None:
    async def main() -> None:
        service = callee(Retry(1))
        call = asyncio.ensure_future(service.call(Overloaded("too much", retry_after=3.0)))
        await service.clock.advance(2.99)
        assert service.begun == 1
        await service.clock.advance(0.02)
        assert service.begun == 2
        await asyncio.wait([call])

    run(main)


def test_a_wait_that_would_pass_the_deadline_is_not_begun() -> None:
    """Behaviour 27."""

    async def main() -> None:
        service = callee(timeout=1.0)
        error = Overloaded("too much", retry_after=1.5)
        assert await service.call(error) is error  # at once: no time was moved
        assert service.begun == 1

    run(main)


@pytest.mark.parametrize("error", [CircuitOpen("open"), LimitReached("full"), RemoteError("failed")])
def test_our_own_refusals_and_what_is_not_retryable_spend_no_budget(error: CallError) -> None:
    """Behaviour 31."""

    async def main() -> None:
        service = callee()
        for _ in range(500):
            assert await service.call(error) is error
        assert service.begun == 500
        assert service.guarded.shared.of(Budget, Budget)._window.counts == [500, 0]

    run(main)


def test_a_full_bulkhead_and_an_open_circuit_are_not_tried_again() -> None:
    """Behaviour 31."""

    async def main() -> None:
        policy = Policy(retry=Retry(3), bulkhead=Bulkhead(1), breaker=Breaker(min_calls=1))
        service = Callee(policy, FakeClock())
        holding = service.start()
        await service.clock.settle()
        assert isinstance(await service.call(), LimitReached)
        service.hanging[0].set_result(RemoteError("failed"))
        await holding
        assert isinstance(await service.call(), CircuitOpen)
        assert service.guarded.shared.of(Budget, Budget)._window.counts == [3, 0]

    run(main)


def test_an_empty_budget_hands_back_the_last_real_error_at_once() -> None:
    async def main() -> None:
        service = callee(Retry(1, budget=0.2, first=0.0))
        error = Unavailable("nobody there")
        for _ in range(1000):
            assert await service.call(error) is error
        retries = service.begun - 1000
        assert retries == 300  # 20 % of 1,000 calls, and 10 a second for 10 seconds
        await service.clock.advance(11)
        await service.call(error)
        assert service.begun == 1302  # the window has passed: there is a budget again

    run(main)


def test_all_operations_of_a_service_share_the_budget() -> None:
    async def main() -> None:
        clock = FakeClock()
        policy = Policy(retry=Retry(1, budget=0.0, first=0.0), breaker=False)
        one = Callee(policy, clock)
        other = Callee(policy, clock, Passengers.book, one.guarded.shared)
        for _ in range(100):
            await one.call(Unavailable("nobody there"))
        assert one.begun == 200
        await other.call(Unavailable("nobody there"))
        assert other.begun == 1

    run(main)


def test_an_attempt_timeout_leaves_time_for_another_attempt() -> None:
    async def main() -> None:
        service = callee(Retry(1, attempt_timeout=0.3, first=0.0), timeout=1.0)
        service.outcomes = [HANG, None]
        call = asyncio.ensure_future(service.call())
        await service.clock.advance(0.31)
        assert await call is None
        assert service.begun == 2

    run(main)


def test_without_one_an_attempt_that_hangs_has_all_the_time() -> None:
    async def main() -> None:
        service = callee(Retry(1), timeout=1.0)
        call = asyncio.ensure_future(service.call(HANG))
        await service.clock.advance(1.01)
        assert isinstance(call.result(), DeadlineExceeded)
        assert service.begun == 1

    run(main)


def test_a_caller_that_is_cancelled_while_it_waits_is_not_tried_again() -> None:
    async def main() -> None:
        service = callee(Retry(1))
        call = asyncio.ensure_future(service.call(Overloaded("too much", retry_after=3.0)))
        await service.clock.settle()
        call.cancel()
        await service.clock.advance(10)
        assert call.cancelled()
        assert service.begun == 1
        assert service.outstanding.busy == 0

    run(main)
