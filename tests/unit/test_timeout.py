"""The attempt time-out and the deadline: what is ours, what is the caller's, and what comes too late."""

from __future__ import annotations

import asyncio

import pytest
from callee import HANG, Callee, Passengers, run

from quintet import DeadlineExceeded, Policy, Safety, Service, connect, deadline, serve
from quintet.filters import timeout
from quintet.message import Message
from quintet.testing import FakeClock


def callee() -> Callee:
    return Callee(Policy(timeout=1.0), FakeClock())


def test_a_call_that_takes_too_long_ends_in_time_and_its_late_result_is_dropped() -> None:
    """Behaviour 24."""

    async def main() -> None:
        service = callee()
        call = service.start()
        await service.clock.advance(0.99)
        assert not call.done()
        await service.clock.advance(0.02)
        error = call.result()
        assert isinstance(error, DeadlineExceeded)
        assert str(error) == "passengers.get did not answer within 1 s"
        await service.clock.advance(4)
        assert (service.total("timeout"), service.total("success")) == (1, 0)

    run(main)


def test_work_that_swallows_its_cancellation_brings_a_late_result_that_is_no_success() -> None:
    """Behaviour 24."""

    async def main() -> None:
        service = callee()

        async def stubborn(message: Message) -> Message:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                return message
            raise AssertionError("it is cancelled")

        guard = timeout.client(service.guarded, stubborn)

        async def caller() -> int:
            with pytest.raises(DeadlineExceeded):
                await guard(Message(channel=Passengers.get.channel, until=service.clock.now() + 1))
            task = asyncio.current_task()
            assert task is not None
            return task.cancelling()

        call = asyncio.ensure_future(caller())
        await service.clock.advance(1.01)
        assert await call == 0

    run(main)


@pytest.mark.parametrize("first", ["caller", "timer"])
def test_a_cancel_by_the_caller_in_the_same_tick_as_the_deadline_is_a_cancel(first: str) -> None:
    """Behaviour 25."""

    async def main() -> None:
        service = callee()
        call = service.start()
        await service.clock.settle()
        (timers,) = [timers for timers in service.clock.wheel(asyncio.get_running_loop())._slots.values() if timers]
        (timer,) = timers
        for step in [call.cancel, timer.fire] if first == "caller" else [timer.fire, call.cancel]:
            step()
        await asyncio.wait([call])
        assert call.cancelled()
        assert service.total("cancelled") == 1

    run(main)


def test_a_task_whose_time_was_up_can_go_on_and_can_still_be_cancelled() -> None:
    async def main() -> None:
        service = callee()

        async def caller() -> str:
            assert isinstance(await service.call(HANG), DeadlineExceeded)
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0
            async with asyncio.timeout(45):
                await asyncio.sleep(0)
            return "went on"

        call = asyncio.ensure_future(caller())
        await service.clock.advance(1.01)
        assert await call == "went on"

    run(main)


def test_a_function_that_raises_a_timeout_error_itself_failed() -> None:
    """Behaviour 26."""

    async def main() -> None:
        service = callee()
        error = TimeoutError("the database did not answer")
        assert await service.call(error) is error
        assert (service.total("failure"), service.total("timeout")) == (1, 0)

    run(main)


def test_the_smaller_of_the_callers_remaining_time_and_our_own_timeout_holds() -> None:
    """Behaviour 27."""

    async def main() -> None:
        service = callee()

        async def hurried() -> BaseException | None:
            with deadline(0.3, clock=service.clock):
                return await service.call(HANG)

        call = asyncio.ensure_future(hurried())
        await service.clock.advance(0.29)
        assert not call.done()
        await service.clock.advance(0.02)
        assert isinstance(call.result(), DeadlineExceeded)

    run(main)


def test_with_no_time_left_nothing_is_sent_and_nobody_blamed() -> None:
    """Behaviour 27."""

    async def main() -> None:
        service = callee()
        with deadline(0.3, clock=service.clock):
            await service.clock.advance(0.3)
            error = await service.call()
        assert isinstance(error, DeadlineExceeded)
        assert error.safety is Safety.NOT_SENT
        assert service.begun == 0
        assert service.circuit.totals == [0] * len(service.circuit.totals)

    run(main)


def test_a_timer_that_is_set_in_the_past_fires_at_once() -> None:
    async def main() -> None:
        clock, fired = FakeClock(), []

        class Noting:
            def fire(self) -> None:
                fired.append(clock.now())

        for times in (1, 2):
            clock.wheel(asyncio.get_running_loop()).set(clock.now() - 1, Noting())
            await clock.advance(0.01)
            assert len(fired) == times

    run(main)


def test_no_time_at_all_is_refused_before_sending() -> None:
    async def main() -> None:
        service = callee()
        message = Message(channel=Passengers.get.channel, until=service.clock.now())  # using(timeout=0)
        with pytest.raises(DeadlineExceeded, match="no time was left to send it") as refused:
            await service.send(message)
        assert refused.value.safety is Safety.NOT_SENT
        assert service.begun == 0

    run(main)


def test_a_call_without_a_limit_waits_longer_than_its_policy_says() -> None:
    async def main() -> None:
        clock, asked = FakeClock(), asyncio.Event()
        service = Service(Passengers)

        @service.handles(Passengers.get)
        async def get(passenger_id: str) -> str:
            asked.set()
            await clock.sleep(60)
            return "late"

        @service.handles(Passengers.book)
        async def book(passenger_id: str) -> str:
            return "booked"

        async with (
            serve(service, at="memory://", clock=clock),
            connect(Passengers, "memory://", clock=clock) as passengers,
        ):
            call = asyncio.ensure_future(passengers.get.using(timeout=None)("p-1"))
            await asked.wait()
            await clock.advance(61)
            assert await call == "late"

    run(main)
