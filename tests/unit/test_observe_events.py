"""What happens to calls and deliveries is told: to a listener, to the log."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from callee import HANG, Callee, Passengers, run

from quintet import (
    Bulkhead,
    CircuitOpen,
    ConfigurationError,
    Contract,
    Hedge,
    LimitReached,
    Occurrence,
    Policy,
    Rate,
    Redelivery,
    RemoteError,
    Retry,
    Service,
    Unavailable,
    connect,
    event,
    on,
    request,
    serve,
)
from quintet.cli.serve import _Json
from quintet.clock import Clock
from quintet.filter import Guarded, client_chain, server_chain
from quintet.message import Message
from quintet.policy import DEFAULT
from quintet.testing import FakeClock
from quintet.transport import Transport, open_address
from quintet.watch import KINDS, Watch


class Trips(Contract, name="observed"):
    @request
    async def get(self, trip_id: str) -> str: ...

    @event
    async def created(self, trip_id: str) -> None: ...


class Heard:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.all: list[Occurrence] = []

    def __call__(self, occurrence: Occurrence) -> None:
        self.all.append(occurrence)

    @property
    def kinds(self) -> list[str]:
        return [occurrence.kind for occurrence in self.all]


def heard_callee(policy: Policy, heard: Heard, clock: FakeClock) -> Callee:
    callee = Callee(policy, clock)
    watch = Watch("trips", heard, clock)
    callee.guarded = Guarded(Passengers.get, policy.over(DEFAULT), clock, watch=watch)
    callee.send = client_chain(callee.guarded, [callee.exchange])
    return callee


def test_each_change_of_a_circuit_is_told_once_and_each_refusal() -> None:
    async def main() -> None:
        clock, heard = FakeClock(), Heard()
        callee = heard_callee(Policy(), heard, clock)
        await callee.fail(20)
        assert isinstance(await callee.call(), CircuitOpen)
        await clock.advance(5.001)
        await callee.call()
        assert heard.kinds == ["circuit-opened", "refused", "circuit-half-open", "circuit-closed"]
        opened, refused = heard.all[:2]
        assert (opened.subject, opened.owner, opened.at) == ("passengers.get", "trips", 1_767_225_600.0)
        assert refused.reason == "passengers.get: not sent, its circuit is open"

    run(main)


def test_refusals_by_the_limit_and_the_rate_and_the_caller_s_time_are_told() -> None:
    async def main() -> None:
        clock, heard = FakeClock(), Heard()
        callee = heard_callee(Policy(bulkhead=Bulkhead(1), rate=Rate(2)), heard, clock)
        first = callee.start()
        await clock.settle()
        assert isinstance(await callee.call(), LimitReached)
        assert isinstance(await callee.call(), LimitReached)
        assert [(one.kind, "outstanding" in one.reason) for one in heard.all] == [("refused", True), ("refused", False)]
        callee.hanging[0].set_result(None)
        await first

    run(main)


def test_a_time_out_and_each_repeat_are_told() -> None:
    async def main() -> None:
        clock, heard = FakeClock(), Heard()
        callee = heard_callee(Policy(timeout=1.0, retry=Retry(1)), heard, clock)
        callee.outcomes = [Unavailable("nobody there"), HANG]
        call = asyncio.get_running_loop().create_task(callee.call())
        await clock.advance(2)
        await call
        assert heard.kinds == ["retried", "timed-out"]
        assert (heard.all[0].reason, heard.all[0].attempt) == ("nobody there", 1)

    run(main)


def test_a_hedged_attempt_is_told() -> None:
    async def main() -> None:
        clock, heard = FakeClock(), Heard()
        callee = heard_callee(Policy(hedge=Hedge(after=0.1)), heard, clock)
        callee.outcomes = [HANG, None]
        call = asyncio.get_running_loop().create_task(callee.call())
        await clock.advance(0.2)
        assert await call is None
        assert heard.kinds == ["hedged"]

    run(main)


def test_a_service_tells_which_requests_came_too_late() -> None:
    async def main() -> None:
        clock, heard = FakeClock(), Heard()
        guarded = Guarded(Passengers.get, DEFAULT, clock, watch=Watch("passengers", heard, clock))

        async def never(message: Message) -> Message:
            raise AssertionError("it was begun")

        handle = server_chain(guarded, never)
        with pytest.raises(TimeoutError):
            await handle(Message(channel=Passengers.get.channel, deadline=clock.now()))
        assert heard.kinds == ["refused"]

    run(main)


def test_a_fallback_is_told_with_the_error_that_it_stands_in_for() -> None:
    async def main() -> None:
        heard, service = Heard(), Service(Trips)

        @service.handles(Trips.get)
        async def get(trip_id: str) -> str:
            raise RuntimeError("broken")

        policy = on(Trips.get, fallback=["none"])
        async with (
            serve(service, at="memory://fell-back"),
            connect(Trips, "memory://fell-back", name="page", listener=heard, policy=policy) as trips,
        ):
            assert await trips.get("t-1") == "none"
        assert heard.kinds == ["connected", "fell-back", "disconnected"]
        assert "failed in observed" in heard.all[1].reason
        assert {one.owner for one in heard.all} == {"page"}

    run(main)


def test_dead_letters_connections_and_the_drain_are_told() -> None:
    async def main() -> None:
        heard, dead = Heard(), asyncio.Event()
        owner, reader = Service(Trips), Service(name="reader", redelivery=Redelivery(attempts=1))

        def listener(occurrence: Occurrence) -> None:
            heard(occurrence)
            if occurrence.kind == "dead-letter":
                dead.set()

        @owner.handles(Trips.get)
        async def get(trip_id: str) -> str:
            return trip_id

        @reader.handles(Trips.created)
        async def created(trip_id: str) -> None:
            raise ValueError(trip_id)

        async with serve(owner, reader, at="memory://told", listener=listener):
            await owner.publish(Trips.created, "t-1")
            await asyncio.wait_for(dead.wait(), 5)
        assert heard.kinds == ["connected", "dead-letter", "draining", "draining", "disconnected"]
        letter = heard.all[1]
        assert (letter.subject, letter.owner, letter.attempt) == ("observed.created", "reader", 1)
        assert letter.reason == "ValueError: t-1 (attempt 1 of 1)"

    run(main)


def test_a_broker_that_is_back_is_told_and_the_circuits_that_opened_meanwhile_are_tried_at_once() -> None:
    async def main() -> None:
        heard, service = Heard(), Service(Trips)
        down = True

        @service.handles(Trips.get)
        async def get(trip_id: str) -> str:
            if down:
                raise RuntimeError("broken")
            return trip_id

        opened: list[Transport] = []

        def remember(address: str, clock: Clock) -> Transport:
            opened.append(open_address(address, clock))
            return opened[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("quintet.client.open_address", remember)
            async with (
                serve(service, at="memory://back"),
                connect(Trips, "memory://back", listener=heard) as trips,
            ):
                for _ in range(20):
                    with pytest.raises(RemoteError):
                        await trips.get("t-1")
                with pytest.raises(CircuitOpen):
                    await trips.get("t-1")
                down = False
                opened[1].tell("broker-lost", "memory://back", "killed")
                with pytest.raises(CircuitOpen):
                    await trips.get("t-1")
                opened[1].tell("broker-back", "memory://back")
                assert await trips.get("t-1") == "t-1"
        told = [(one.kind, one.reason) for one in heard.all if one.kind.startswith("broker")]
        assert told == [("broker-lost", "killed"), ("broker-back", "")]

    run(main)


def test_a_listener_that_raises_touches_nothing_but_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Behaviour 17."""

    def broken(occurrence: Occurrence) -> None:
        raise RuntimeError("the listener is broken")

    async def main() -> None:
        clock = FakeClock()
        callee = Callee(Policy(), clock)
        callee.guarded = Guarded(Passengers.get, DEFAULT, clock, watch=Watch("trips", broken, clock))
        callee.send = client_chain(callee.guarded, [callee.exchange])
        for _ in range(20):
            assert isinstance(await callee.call(RemoteError("failed")), RemoteError)
        assert isinstance(await callee.call(), CircuitOpen)

    run(main)
    assert "the listener is broken" in caplog.text


def test_a_listener_that_would_have_to_be_awaited_is_refused_at_once() -> None:
    async def listener(occurrence: Occurrence) -> None: ...

    with pytest.raises(ConfigurationError, match="must be a plain function"):
        connect(Trips, "memory://", listener=listener)  # type: ignore[arg-type]


def test_the_log_has_one_line_for_each_with_its_fields(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "quintet.watch"):
        for kind in KINDS:
            Watch("trips").tell(kind, "passengers.get", "passengers.get: why", 2)
    assert [record.levelno for record in caplog.records] == [level for level, _ in KINDS.values()]
    assert caplog.records[0].getMessage() == "circuit-opened: passengers.get: why"
    line = json.loads(_Json().format(caplog.records[0]))
    assert line["owner"] == "trips"
    assert line["kind"] == "circuit-opened"
    assert line["subject"] == "passengers.get"
    assert line["attempt"] == 2


def test_what_happens_to_single_calls_is_not_logged_unless_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "quintet.watch"):
        Watch().tell("refused", "passengers.get", "why")
        Watch().tell("circuit-opened", "passengers.get")
    assert [record.getMessage() for record in caplog.records] == ["circuit-opened: passengers.get"]


def test_a_counting_breaker_stands_even_where_the_policy_has_none() -> None:
    async def main() -> None:
        callee = Callee(Policy(breaker=False), FakeClock())
        await callee.fail(30)
        assert await callee.call() is None
        assert callee.total("failure") == 30
        assert callee.circuit.state == "closed"

    run(main)
