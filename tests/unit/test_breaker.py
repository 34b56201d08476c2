"""The circuit breaker (where nothing else is said: 20 calls, 50 %, 10 s, open for 5 s, 1 probe)."""

from __future__ import annotations

import asyncio
import logging

import pytest
from callee import HANG, Callee, Passengers, run

from quintet import (
    Breaker,
    Bulkhead,
    CircuitOpen,
    DeadlineExceeded,
    Fault,
    InvalidMessage,
    Policy,
    RemoteError,
    Unavailable,
    deadline,
)
from quintet.binding import bind
from quintet.filters.breaker import Circuit, StateChange
from quintet.message import Message
from quintet.outcome import OUTCOMES, outcome_of
from quintet.testing import FakeClock


def callee(**settings: object) -> Callee:
    return Callee(Policy(breaker=Breaker(**settings), timeout=1.0), FakeClock())


async def opened(**settings: object) -> Callee:
    service = callee(**settings)
    await service.fail(20)
    assert service.circuit.state == "open"
    return service


async def half_open(**settings: object) -> Callee:
    service = await opened(**settings)
    await service.clock.advance(5.001)
    return service


class NoSuchPassenger(Fault):
    passenger_id: str


def test_the_twentieth_of_twenty_failures_opens_the_circuit() -> None:
    """Behaviour 1."""

    async def main() -> None:
        service = callee()
        await service.fail(19)
        assert service.circuit.state == "closed"
        await service.fail()
        assert service.circuit.state == "open"

    run(main)


@pytest.mark.parametrize(("good", "bad", "state"), [(10, 10, "open"), (11, 9, "closed")])
def test_half_of_the_calls_failed_is_enough_and_less_is_not(good: int, bad: int, state: str) -> None:
    """Behaviour 2."""

    async def main() -> None:
        service = callee()
        await service.succeed(good)
        await service.fail(bad)
        assert service.circuit.state == state

    run(main)


def test_a_success_that_completes_the_minimum_can_open_the_circuit() -> None:
    """Behaviour 3."""

    async def main() -> None:
        service = callee(min_calls=5)
        await service.fail(3)
        await service.succeed(1)
        assert service.circuit.state == "closed"
        await service.succeed(1)
        assert service.circuit.state == "open"

    run(main)


def test_an_error_rate_is_compared_exactly() -> None:
    async def main() -> None:
        service = callee(min_calls=100, error_rate=0.07)  # 0.07 * 100 is more than 7 among floats
        await service.succeed(93)
        await service.fail(6)
        assert service.circuit.state == "closed"
        await service.fail(1)
        assert service.circuit.state == "open"

    run(main)


def test_failures_that_are_older_than_the_window_are_forgotten() -> None:
    """Behaviour 4."""

    async def main() -> None:
        service = callee()
        await service.fail(19)
        await service.clock.advance(60)
        await service.fail()
        assert service.circuit.state == "closed"
        assert service.circuit.counts == [0, 0, 1]

    run(main)


def test_the_window_slides_bucket_by_bucket() -> None:
    async def main() -> None:
        service = callee()
        for _ in range(30):
            await service.fail()
            await service.clock.advance(1.0)
            assert sum(service.circuit.counts) <= 10
        assert service.circuit.state == "closed"

    run(main)


def test_an_open_circuit_refuses_without_running_the_function() -> None:
    """Behaviour 5."""

    async def main() -> None:
        service = await opened()
        begun, counts = service.begun, list(service.circuit.counts)
        await service.clock.advance(2)
        error = await service.call()
        assert isinstance(error, CircuitOpen)
        assert error.retry_after == pytest.approx(3.0)
        assert service.begun == begun
        assert service.circuit.counts == counts
        assert service.total("short-circuited") == 1

    run(main)


def test_it_is_tried_again_after_the_open_time_and_not_before() -> None:
    """Behaviour 6."""

    async def main() -> None:
        service = await opened()
        changes: list[StateChange] = []
        service.circuit.listeners.append(changes.append)
        await service.clock.advance(4.999)
        assert isinstance(await service.call(), CircuitOpen)
        assert changes == []
        await service.clock.advance(0.002)
        probe = service.start()
        await service.clock.settle()
        assert service.circuit.state == "half-open"
        assert changes == [StateChange("passengers.get", "open", "half-open")]
        probe.cancel()
        await asyncio.wait([probe])

    run(main)


def test_an_open_circuit_is_tried_at_once_when_what_made_it_open_may_be_over() -> None:
    async def main() -> None:
        service = await opened()
        service.circuit.try_now()
        assert await service.call() is None
        assert service.circuit.state == "closed"
        service.circuit.try_now()
        assert service.circuit.state == "closed"

    run(main)


def test_a_closed_circuit_forgets_what_failed_and_what_is_under_way_when_that_may_be_over() -> None:
    async def main() -> None:
        service = callee()
        await service.fail(19)
        waiting = [service.start() for _ in range(20)]
        await service.clock.settle()
        service.circuit.try_now()
        assert service.circuit.counts == [0, 0, 0]
        for future in service.hanging:
            future.set_result(Unavailable("it waited too long"))
        await asyncio.wait(waiting)
        assert service.circuit.state == "closed"
        await service.fail(20)
        assert service.circuit.state == "open"

    run(main)


def test_of_a_hundred_concurrent_calls_exactly_one_is_the_probe() -> None:
    """Behaviour 7."""

    async def main() -> None:
        service = await half_open()
        begun = service.begun
        calls = [service.start() for _ in range(100)]
        await service.clock.settle()
        assert service.begun == begun + 1
        assert sum(isinstance(call.result(), CircuitOpen) for call in calls if call.done()) == 99
        service.hanging[0].set_result(None)
        await asyncio.wait(calls)

    run(main)


def test_a_good_probe_closes_the_circuit_with_an_empty_window() -> None:
    """Behaviour 8."""

    async def main() -> None:
        service = await half_open()
        await service.succeed()
        assert service.circuit.state == "closed"
        assert service.circuit.counts == [0, 0, 0]
        await service.fail(19)
        assert service.circuit.state == "closed"

    run(main)


def test_a_failed_probe_opens_the_circuit_for_a_full_period_from_that_failure() -> None:
    """Behaviour 8."""

    async def main() -> None:
        service = await half_open()
        probe = service.start()
        await service.clock.advance(0.9)
        service.hanging[0].set_result(RemoteError("failed"))
        await probe
        assert service.circuit.state == "open"
        await service.clock.advance(4.999)
        assert isinstance(await service.call(), CircuitOpen)
        await service.clock.advance(5.002)  # twice as long at most
        assert await service.call() is None

    run(main)


def test_failed_probes_make_it_wait_longer_up_to_a_limit_and_a_close_resets_that() -> None:
    async def main() -> None:
        service = await opened(longest=40)
        waits = []
        for _ in range(8):
            error = await service.call()
            assert isinstance(error, CircuitOpen)
            assert error.retry_after is not None
            waits.append(error.retry_after)
            await service.clock.advance(error.retry_after)
            await service.fail()
        for wait, full in zip(waits, [5, 10, 20, 40, 40, 40, 40, 40], strict=True):
            assert max(5, full / 2) <= wait <= full
        assert len(set(waits[4:])) > 1  # jittered
        await service.clock.advance(40)
        await service.succeed()
        await service.fail(20)
        error = await service.call()
        assert isinstance(error, CircuitOpen)
        assert error.retry_after == 5

    run(main)


@pytest.mark.parametrize(("good", "bad", "state"), [(3, 1, "closed"), (2, 2, "open")])
def test_with_several_probes_the_same_error_rate_decides(good: int, bad: int, state: str) -> None:
    """Behaviour 9."""

    async def main() -> None:
        service = await half_open(probes=4)
        calls = [service.start() for _ in range(10)]
        await service.clock.settle()
        assert len(service.hanging) == 4
        for number, probe in enumerate(service.hanging):
            assert service.circuit.state == "half-open"
            probe.set_result(RemoteError("failed") if number < bad else None)
            await service.clock.settle()
        assert service.circuit.state == state
        await asyncio.wait(calls)

    run(main)


def test_several_probes_may_come_at_any_distance() -> None:
    async def main() -> None:
        service = await half_open(probes=3)
        for _ in range(3):
            assert service.circuit.state != "closed"
            await service.succeed()
            await service.clock.advance(60)
        assert service.circuit.state == "closed"

    run(main)


def test_a_cancellation_by_the_caller_counts_nowhere_and_frees_slot_and_timer() -> None:
    """Behaviour 10."""

    async def main() -> None:
        service = callee()
        await service.fail(19)
        call = service.start()
        await service.clock.settle()
        call.cancel()
        await asyncio.wait([call])
        assert service.circuit.counts == [0, 0, 19]
        assert service.outstanding.busy == 0
        assert not any(service.clock.wheel(asyncio.get_running_loop())._slots.values())
        assert service.total("cancelled") == 1

    run(main)


def test_a_cancelled_probe_does_not_close_the_circuit_and_another_takes_its_place() -> None:
    """Behaviour 10."""

    async def main() -> None:
        service = await half_open()
        probe = service.start()
        await service.clock.settle()
        probe.cancel()
        await asyncio.wait([probe])
        assert service.circuit.state == "half-open"
        assert await service.call() is None
        assert service.circuit.state == "closed"

    run(main)


def test_a_probe_that_never_ends_does_not_stick() -> None:
    """Behaviour 11."""

    async def main() -> None:
        clock = FakeClock()
        circuit = Circuit("passengers.get", clock, Breaker(min_calls=1))
        circuit.settle(circuit.admit(), 2)
        await clock.advance(5.001)
        stuck = circuit.admit()
        with pytest.raises(CircuitOpen) as refused:
            circuit.admit()
        assert refused.value.retry_after == 5
        await clock.advance(5)
        another = circuit.admit()
        circuit.settle(stuck, 2)  # late: decides nothing
        assert circuit.state == "half-open"
        circuit.settle(another, 0)
        assert circuit.state == "closed"

    run(main)


def test_a_late_failure_while_open_is_counted_in_the_metrics_only() -> None:
    """Behaviour 12."""

    async def main() -> None:
        service = callee()
        changes: list[StateChange] = []
        service.circuit.listeners.append(changes.append)
        late = service.start()
        await service.clock.settle()
        await service.fail(20)
        await service.clock.advance(0.9)
        service.hanging[0].set_result(RemoteError("failed"))
        await late
        assert service.total("failure") == 21
        assert [change.after for change in changes] == ["open"]
        error = await service.call()
        assert isinstance(error, CircuitOpen)
        assert error.retry_after == pytest.approx(4.1)

    run(main)


@pytest.mark.parametrize("end", [None, RemoteError("failed"), "cancelled"])
def test_the_end_of_an_old_call_moves_nothing_in_half_open(end: object) -> None:
    """Behaviour 13."""

    async def main() -> None:
        service = Callee(Policy(timeout=60), FakeClock())
        old = service.start()
        await service.clock.settle()
        await service.fail(20)
        await service.clock.advance(5.001)
        probe = service.start()
        await service.clock.settle()
        if end == "cancelled":
            old.cancel()
        else:
            service.hanging[0].set_result(end)
        await asyncio.wait([old])
        assert service.circuit.state == "half-open"
        assert isinstance(await service.call(), CircuitOpen)  # the probe's place is still taken
        service.hanging[1].set_result(None)
        await probe
        assert service.circuit.state == "closed"

    run(main)


def test_refused_and_cancelled_calls_move_nothing_while_the_probe_runs() -> None:
    """Behaviour 14."""

    async def main() -> None:
        service = Callee(Policy(timeout=60), FakeClock())
        old = [service.start() for _ in range(50)]
        await service.clock.settle()
        await service.fail(20)
        await service.clock.advance(5.001)
        probe = service.start()
        await service.clock.settle()
        for call in old:
            call.cancel()
        await asyncio.wait(old)
        for _ in range(50):
            assert isinstance(await service.call(), CircuitOpen)
        assert service.circuit.state == "half-open"
        service.hanging[-1].set_result(None)
        await probe
        assert service.circuit.state == "closed"

    run(main)


def test_force_open_beats_force_closed_and_ignores_time() -> None:
    """Behaviour 15."""

    async def main() -> None:
        service = callee(force_open=True, force_closed=True)
        await service.clock.advance(1000)
        assert isinstance(await service.call(), CircuitOpen)
        assert service.begun == 0

    run(main)


def test_force_closed_admits_everything_and_goes_on_counting() -> None:
    """Behaviour 15."""

    async def main() -> None:
        service = callee(force_closed=True)
        await service.fail(30)
        assert service.begun == 30
        assert service.circuit.counts == [0, 0, 30]
        service.circuit.settings = Breaker()
        await service.fail()
        assert service.circuit.state == "open"
        service.circuit.settings = Breaker(force_closed=True)
        assert await service.call() is None

    run(main)


@pytest.mark.parametrize("jump", [-5.0, 3600.0])
def test_a_jump_of_the_wall_clock_has_no_effect(jump: float) -> None:
    """Behaviour 16."""

    async def main() -> None:
        service = callee()
        await service.fail(19)
        service.clock._offset += jump
        await service.fail()
        assert service.circuit.state == "open"
        service.clock._offset += jump
        await service.clock.advance(4.999)
        assert isinstance(await service.call(), CircuitOpen)
        await service.clock.advance(0.002)
        assert await service.call() is None

    run(main)


def test_a_listener_that_raises_does_not_touch_the_call(caplog: pytest.LogCaptureFixture) -> None:
    """Behaviour 17."""

    async def main() -> None:
        service = callee()
        heard: list[StateChange] = []

        def broken(change: StateChange) -> None:
            raise RuntimeError("the listener is broken")

        service.circuit.listeners += [broken, heard.append]
        await service.fail(19)
        assert isinstance(await service.call(RemoteError("failed")), RemoteError)
        assert [change.after for change in heard] == ["open"]

    with caplog.at_level(logging.INFO, "quintet.breaker"):
        run(main)
    assert "the listener is broken" in caplog.text


def test_twenty_failures_in_one_tick_are_one_event() -> None:
    """Behaviour 17."""

    async def main() -> None:
        service = callee()
        heard: list[StateChange] = []
        service.circuit.listeners.append(heard.append)
        calls = [service.start() for _ in range(40)]
        await service.clock.settle()
        for call in service.hanging:
            call.set_result(RemoteError("failed"))
        await asyncio.wait(calls)
        assert heard == [StateChange("passengers.get", "closed", "open")]

    run(main)


def test_one_guard_serves_two_runs_of_asyncio_in_turn() -> None:
    """Behaviour 18."""
    service = Callee(Policy(bulkhead=Bulkhead(2, queue=5)), FakeClock())

    async def main() -> None:
        await service.fail(5)
        calls = [service.start() for _ in range(4)]
        await service.clock.settle()
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)

    run(main)
    run(main)
    assert service.circuit.counts == [0, 0, 10]
    assert service.outstanding.busy == 0


def test_fifty_hung_calls_open_the_circuit_and_each_is_counted_once() -> None:
    """Behaviour 24."""

    async def main() -> None:
        service = callee()
        calls = [service.start() for _ in range(50)]
        await service.clock.advance(1.01)
        assert all(isinstance(call.result(), DeadlineExceeded) for call in calls)
        assert service.circuit.state == "open"
        assert service.total("timeout") == 50

    run(main)


def test_a_caller_that_had_less_time_than_our_own_timeout_is_not_the_fault_of_the_callee() -> None:
    """Behaviour 27."""

    async def main() -> None:
        service = callee()

        async def hurried() -> BaseException | None:
            with deadline(0.3, clock=service.clock):
                return await service.call(HANG)

        calls = [asyncio.ensure_future(hurried()) for _ in range(50)]
        await service.clock.advance(0.29)
        assert not any(call.done() for call in calls)
        await service.clock.advance(0.02)
        assert all(isinstance(call.result(), DeadlineExceeded) for call in calls)
        assert service.circuit.state == "closed"
        assert service.circuit.counts == [0, 0, 0]

    run(main)


@pytest.mark.parametrize("answer", [NoSuchPassenger(passenger_id="p-1"), InvalidMessage("passenger_id is no string")])
def test_a_declared_fault_is_an_answer_and_does_not_count(answer: Exception) -> None:
    async def main() -> None:
        service = callee()
        for _ in range(30):
            assert await service.call(answer) is answer
        assert service.circuit.counts == [0, 0, 0]
        assert service.total("answered") == 30

    run(main)


def test_a_probe_that_gets_a_declared_fault_closes_the_circuit() -> None:
    async def main() -> None:
        service = await half_open()
        await service.call(NoSuchPassenger(passenger_id="p-1"))
        assert service.circuit.state == "closed"

    run(main)


@pytest.mark.parametrize(("counted", "state"), [(False, "closed"), (True, "open")])
def test_refusals_by_our_own_limit_count_only_where_asked_for(counted: bool, state: str) -> None:
    async def main() -> None:
        policy = Policy(bulkhead=Bulkhead(1), breaker=Breaker(count_refusals=counted))
        service = Callee(policy, FakeClock())
        holding = service.start()
        await service.clock.settle()
        for _ in range(20):
            await service.call()
        assert service.circuit.state == state
        service.hanging[0].set_result(None)
        await holding

    run(main)


def test_slow_calls_open_the_circuit_where_asked_for() -> None:
    async def main() -> None:
        service = callee(slow_call=0.2, min_calls=2)
        for _ in range(2):
            assert service.circuit.state == "closed"
            call = service.start()
            await service.clock.advance(0.3)
            service.hanging.pop().set_result(None)
            assert await call is None
        assert service.circuit.state == "open"

    run(main)


def test_each_operation_has_its_own_circuit_unless_the_service_shall_have_one() -> None:
    async def main() -> None:
        clock = FakeClock()
        one = Callee(Policy(), clock)
        other = Callee(Policy(), clock, Passengers.book, one.guarded.shared)
        await one.fail(20)
        assert await other.call() is None

        one = Callee(Policy(breaker=Breaker(per="service")), clock)
        other = Callee(Policy(breaker=Breaker(per="service")), clock, Passengers.book, one.guarded.shared)
        await one.fail(20)
        error = await other.call()
        assert isinstance(error, CircuitOpen)
        assert str(error) == "passengers: not sent, its circuit is open"

    run(main)


def test_under_five_hundred_callers_it_closes_within_the_open_time_and_one_probe() -> None:
    async def main() -> None:
        service = Callee(Policy(), FakeClock())
        await service.fail(20)
        healthy_at = service.clock.now()

        async def caller() -> None:
            while service.circuit.state != "closed":
                try:
                    await service.send(Message(channel=Passengers.get.channel))
                except CircuitOpen:
                    await service.clock.sleep(1.0)

        callers = [asyncio.ensure_future(caller()) for _ in range(500)]
        await service.clock.advance(5.01)
        assert service.circuit.state == "closed"
        assert service.clock.now() - healthy_at < 5.1
        await asyncio.gather(*callers)

    run(main)


def test_a_circuit_tells_its_state() -> None:
    async def main() -> None:
        service = callee()
        await service.fail(3)
        assert repr(service.circuit) == "<circuit passengers.get closed: 0 good, 0 slow, 3 bad in 10 s>"

    run(main)


def test_a_probe_that_takes_longer_than_the_open_time_and_less_than_its_time_out_closes_the_circuit() -> None:
    async def main() -> None:
        service = Callee(Policy(timeout=30.0), FakeClock())
        await service.fail(20)
        await service.clock.advance(5.001)
        probe = service.start()
        await service.clock.advance(5.5)
        assert isinstance(await service.call(), CircuitOpen)  # it is not given up
        service.hanging[0].set_result(None)
        assert await probe is None
        assert service.circuit.state == "closed"

    run(main)


def test_a_reload_with_fewer_probes_than_have_ended_decides_by_those() -> None:
    async def main() -> None:
        service = await half_open(probes=5)
        await service.succeed(2)
        lost = [service.start() for _ in range(2)]
        await service.clock.settle()
        service.circuit.settings = Breaker(probes=1)
        assert service.circuit.state == "closed"
        assert await service.call() is None
        for probe in lost:
            probe.cancel()
        await asyncio.wait(lost)

    run(main)


def test_a_reload_with_fewer_probes_than_are_out_is_not_stuck() -> None:
    async def main() -> None:
        service = await half_open(probes=5)
        lost = [service.start() for _ in range(4)]
        await service.clock.settle()
        service.circuit.settings = Breaker(probes=1)
        error = await service.call()
        assert isinstance(error, CircuitOpen)
        assert error.retry_after is not None
        assert error.retry_after > 0
        await service.clock.advance(1.01)  # the first of them that ends decides
        assert service.circuit.state == "open"
        await service.clock.advance(10.001)
        assert await service.call() is None
        assert service.circuit.state == "closed"
        await asyncio.wait(lost)

    run(main)


def test_a_reload_judges_what_was_counted_by_the_new_settings() -> None:
    async def main() -> None:
        service = callee()
        await service.fail(10)
        service.circuit.settings = Breaker(min_calls=10)
        assert service.circuit.state == "open"
        service.circuit.settings = Breaker(min_calls=10, open_for=1.0)
        await service.clock.advance(1.001)
        assert await service.call() is None
        assert service.circuit.state == "closed"

    run(main)


def test_a_caller_with_less_time_than_the_policy_gives_does_not_blame_the_service() -> None:
    async def main() -> None:
        service = callee()
        service.always = HANG
        for _ in range(20):
            message = Message(channel=Passengers.get.channel, until=service.clock.now() + 0.05)
            call = asyncio.ensure_future(service.send(message))
            await service.clock.advance(0.06)
            assert isinstance(call.exception(), DeadlineExceeded)
        assert service.circuit.state == "closed"
        assert service.total("cancelled") == 20

    run(main)


def test_an_answer_that_says_no_is_no_failure_of_the_service() -> None:
    async def main() -> None:
        service = callee()
        refusal = RemoteError("answered 409 Conflict")
        refusal.answered = True
        for _ in range(30):
            await service.call(refusal)
        assert service.circuit.state == "closed"
        assert service.total("answered") == 30

    run(main)


def test_a_fault_that_our_contract_does_not_declare_is_named_and_is_no_failure() -> None:
    bound = bind("body", Passengers.get)
    reply = Message(channel=bound.channel, status="Banned", media_type="application/json", body=b'{"until":"2027"}')
    failure = bound.failure(reply)
    assert isinstance(failure, RemoteError)
    assert "'Banned'" in str(failure)
    assert OUTCOMES[outcome_of(failure, reply)] == "answered"
