"""A service: its handlers, what a failure becomes, publish and ask, start-up and drain."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from trips_contract import Busy, Fares, NoSuchTrip, Place, Trip, Trips

from quintet import (
    CannotCarry,
    ConfigurationError,
    DeadlineExceeded,
    Declined,
    InvalidMessage,
    Policy,
    QuintetError,
    Redelivery,
    RemoteError,
    Service,
    TooLarge,
    connect,
    current,
    deadline,
    on,
    serve,
)
from quintet.client import Carriers
from quintet.message import Channel, Message, Native, new_id
from quintet.record import read
from quintet.testing import FakeClock
from quintet.transport import Letters, parse_address
from quintet.transports.memory import Carrier as Memory

TRIP = Trip("t-1", Place(1.5))


def trips(**options: Any) -> Service:
    """A whole Trips service whose handlers the tests replace."""
    service = Service(Trips, answers="memory://", **options)

    @service.handles(Trips.create)
    async def create(trip: Trip) -> Trip:
        return trip

    @service.handles(Trips.get)
    async def get(trip_id: str) -> Trip:
        return await service.does("get", trip_id)

    @service.handles(Trips.cancel)
    async def cancel(trip_id: str, *, reason: str = "") -> None:
        await service.does("cancel", trip_id, reason)

    @service.handles(Trips.pickup_requested)
    async def pickup_requested(trip_id: str, place: Place) -> None:
        await service.does("pickup_requested", trip_id, place)

    @service.handles(Trips.receipt)
    async def receipt(trip_id: str) -> str:
        return await service.does("receipt", trip_id)

    behaviours: dict[str, Callable[..., Awaitable[Any]]] = {}

    async def does(name: str, *args: Any) -> Any:
        return await behaviours[name](*args)

    service.does = does  # type: ignore[attr-defined]
    service.behaviours = behaviours  # type: ignore[attr-defined]
    return service


def behave(service: Service, name: str, function: Callable[..., Awaitable[Any]]) -> None:
    service.behaviours[name] = function  # type: ignore[attr-defined]


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def within_time() -> None:
        await asyncio.wait_for(main(), 20)

    asyncio.run(within_time())


def test_a_request_brings_the_handlers_value() -> None:
    async def main() -> None:
        service = trips()
        async with serve(service, at="memory://"), connect(Trips, "memory://") as client:
            assert await client.create(TRIP) == TRIP

    run(main)


def test_a_declared_fault_arrives_as_that_fault_with_its_fields() -> None:
    async def main() -> None:
        service = trips()

        async def missing(trip_id: str) -> Trip:
            raise NoSuchTrip(trip_id=trip_id)

        behave(service, "get", missing)
        async with serve(service, at="memory://"), connect(Trips, "memory://") as client:
            with pytest.raises(NoSuchTrip) as caught:
                await client.get("t-9")
            assert caught.value.trip_id == "t-9"

    run(main)


@pytest.mark.parametrize("error", [ValueError("the password is 1234"), Busy(), InvalidMessage("inner", path="x.y")])
def test_any_other_failure_is_a_remote_error_without_inner_details(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault that this operation does not declare, and the failure of a nested call, are inner details too."""

    async def main() -> None:
        service = trips()

        async def fail(trip_id: str) -> Trip:
            raise error

        behave(service, "get", fail)
        async with serve(service, at="memory://"), connect(Trips, "memory://") as client:
            with pytest.raises(RemoteError) as caught:
                await client.get("t-1")
        assert str(caught.value) == "trips.get failed in trips"
        assert caught.value.correlation_id in caplog.text
        assert str(error) in caplog.text

    run(main)


def test_what_does_not_fit_the_contract_is_refused_naming_the_path() -> None:
    async def main() -> None:
        async with serve(trips(), at="memory://"):
            carriers = Carriers("test", FakeClock())
            transport = await carriers.reach("memory://")
            replies = await carriers.replies(transport)
            message = Message(
                channel=Trips.create.channel,
                id=new_id(),
                media_type="application/json",
                body=b'{"trip":{"id":"1","pickup":{}}}',
            )
            reply = await replies.exchange(message)
            assert reply.status == "invalid"
            assert b'"path":"trip.pickup.lat"' in reply.body
            await carriers.close()

    run(main)


def test_a_body_over_the_limit_is_refused() -> None:
    async def main() -> None:
        async with serve(trips(max_body=100), at="memory://"), connect(Trips, "memory://") as client:
            with pytest.raises(TooLarge, match="100 are allowed"):
                await client.create(Trip("x" * 100, Place(1)))

    run(main)


def test_a_caller_never_waits_longer_than_its_timeout() -> None:
    async def main() -> None:
        clock, service, begun = FakeClock(), trips(), asyncio.Event()

        async def hang(trip_id: str) -> Trip:
            begun.set()
            await asyncio.Event().wait()
            return TRIP

        behave(service, "get", hang)
        server = serve(service, at="memory://", clock=clock)
        await server.__aenter__()
        async with connect(Trips, "memory://", policy=Policy(timeout=0.5), clock=clock) as client:
            call = asyncio.ensure_future(client.get("t-1"))
            await begun.wait()
            await clock.advance(0.49)
            assert not call.done()
            await clock.advance(0.02)
            with pytest.raises(DeadlineExceeded, match=r"trips.get did not answer within 0.5 s at memory://"):
                await call

    run(main)


def test_the_remaining_time_travels_with_every_nested_call() -> None:
    async def main() -> None:
        clock, service, seen = FakeClock(), trips(), []

        async def nested(trip_id: str) -> Trip:
            await clock.sleep(0.2)
            seen.append(current().remaining)
            with deadline(0.05, clock=clock):
                seen.append(current().remaining)
            return await client.create(TRIP)  # the caller has 0.3 s left, whatever this client's own time-out is

        async def stuck(trip: Trip) -> Trip:
            await asyncio.Event().wait()
            return trip

        behave(service, "get", nested)
        service.handlings[Trips.create] = type(service.handlings[Trips.create])(
            Trips.create, stuck, False, Redelivery()
        )
        server = serve(service, at="memory://", clock=clock)
        await server.__aenter__()
        async with connect(
            Trips, "memory://", policy=[Policy(timeout=9), on(Trips.get, timeout=0.5)], clock=clock
        ) as client:
            call = asyncio.ensure_future(client.get("t-1"))
            await clock.advance(0.2)
            assert seen == [pytest.approx(0.3), pytest.approx(0.05)]
            await clock.advance(0.31)
            with pytest.raises(DeadlineExceeded):
                await call

    run(main)


def test_a_request_whose_deadline_has_passed_is_not_begun() -> None:
    async def main() -> None:
        clock, service, handled = FakeClock(), trips(concurrency=1), []

        async def slow(trip_id: str) -> Trip:
            handled.append(trip_id)
            await clock.sleep(3)
            return TRIP

        behave(service, "get", slow)
        async with serve(service, at="memory://", clock=clock), connect(Trips, "memory://", clock=clock) as client:
            calls = [asyncio.ensure_future(client.get(f"t-{n}")) for n in range(3)]
            await clock.advance(10)
            assert handled == ["t-0"]
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, DeadlineExceeded)

    run(main)


def test_a_notification_is_retried_with_growing_delay_and_then_dead() -> None:
    async def main() -> None:
        clock = FakeClock()
        service = trips(redelivery=Redelivery(attempts=3, first=1.0))
        attempts: list[tuple[int, float]] = []

        async def fail(trip_id: str, place: Place) -> None:
            attempts.append((current().attempt, clock.now()))
            raise ValueError("not today")

        behave(service, "pickup_requested", fail)
        async with serve(service, at="memory://", clock=clock), connect(Trips, "memory://", clock=clock) as client:
            await client.pickup_requested("t-1", Place(1))
            await clock.advance(10)
            assert [attempt for attempt, _ in attempts] == [1, 2, 3]
            first, second = attempts[1][1] - attempts[0][1], attempts[2][1] - attempts[1][1]
            assert 0.5 <= first <= 1.0 <= second <= 2.0
            carriers = Carriers("test", clock)
            transport = await carriers.reach("memory://")
            assert isinstance(transport, Letters)
            (letter,) = await transport.dead()
            assert letter.reason == "ValueError: not today (attempt 3 of 3)"
            await carriers.close()

    run(main)


def test_a_message_that_cannot_be_read_is_dead_at_once_and_the_service_goes_on() -> None:
    async def main() -> None:
        service, handled = trips(), asyncio.Event()

        async def handle(trip_id: str, place: Place) -> None:
            handled.set()

        behave(service, "pickup_requested", handle)
        async with serve(service, at="memory://"), connect(Trips, "memory://") as client:
            carriers = Carriers("test", FakeClock())
            transport = await carriers.reach("memory://")
            for body in (b"{", b"\xff", b"[" * 100_000, b'{"trip_id":3}'):
                await transport.send(
                    Message(
                        channel=Trips.pickup_requested.channel, id=new_id(), media_type="application/json", body=body
                    )
                )
            await client.pickup_requested("t-1", Place(1))
            await handled.wait()
            assert isinstance(transport, Letters)
            assert len(await transport.dead()) == 4
            await carriers.close()

    run(main)


def test_an_event_reaches_every_group_once_and_every_instance_where_asked() -> None:
    async def main() -> None:
        owner, heard = trips(), []
        everybody = asyncio.Event()
        listeners = []
        for name, every_instance in (("dispatch", False), ("dispatch", False), ("board", True), ("board", True)):
            listener = Service(name=name)
            listeners.append(listener)

            @listener.handles(Trips.created, every_instance=every_instance)
            async def created(trip: Trip, name: str = name) -> None:
                heard.append(name)
                if len(heard) == 3:
                    everybody.set()

        async with serve(owner, *listeners, at="memory://"):
            await owner.publish(Trips.created, TRIP)
            await everybody.wait()
            assert sorted(heard) == ["board", "board", "dispatch"]

    run(main)


def test_a_survey_gives_answers_as_they_come_until_enough_or_the_time_is_up(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        clock, owner = FakeClock(), trips()

        def responder(name: str, answer: Callable[[], Awaitable[int]]) -> Service:
            service = Service(name=name)

            @service.handles(Trips.offers)
            async def offers(trip: Trip) -> int:
                return await answer()

            return service

        async def at_once() -> int:
            return 1

        async def later() -> int:
            await clock.sleep(1)
            return 2

        async def too_late() -> int:
            await clock.sleep(5)
            return 3

        async def declines() -> int:
            raise Declined

        async def fails() -> int:
            raise ValueError("flat tyre")

        kinds = {"ann": at_once, "bob": later, "carl": too_late, "dora": declines, "eve": fails}
        services = [responder(name, answer) for name, answer in kinds.items()]

        async def ask(enough: int | None) -> list[tuple[str, int]]:
            async with owner.ask(Trips.offers, TRIP).within(2.0, enough=enough) as answers:
                return [(answer.sender, answer.value) async for answer in answers]

        async with serve(owner, *services, at="memory://", clock=clock):
            asking = asyncio.ensure_future(ask(None))
            await clock.advance(6)
            assert await asking == [("ann", 1), ("bob", 2)]
            assert "flat tyre" in caplog.text
            asking = asyncio.ensure_future(ask(1))
            await clock.settle()
            assert asking.result() == [("ann", 1)]
            await clock.advance(6)

    caplog.set_level(logging.WARNING)
    run(main)


def test_an_async_request_is_answered_later_and_found_again_by_its_id() -> None:
    async def main() -> None:
        service, go = trips(), asyncio.Event()

        async def receipt(trip_id: str) -> str:
            await go.wait()
            return f"receipt of {trip_id}"

        behave(service, "receipt", receipt)
        async with serve(service, at="memory://"):
            async with connect(Trips, "memory://") as client:
                pending = await client.receipt("t-1")
                asyncio.get_running_loop().call_soon(go.set)
                assert await pending == "receipt of t-1"
            async with connect(Trips, "memory://") as other:
                assert await other.receipt.pending(pending.id) == "receipt of t-1"

    run(main)


def test_the_failure_of_an_async_request_is_its_answer_after_the_retries() -> None:
    async def main() -> None:
        clock, attempts = FakeClock(), []
        service = trips(redelivery=Redelivery(attempts=2, first=0.1))

        async def fail(trip_id: str) -> str:
            attempts.append(trip_id)
            raise NoSuchTrip(trip_id=trip_id) if trip_id == "t-9" else ValueError("no paper")

        behave(service, "receipt", fail)
        async with serve(service, at="memory://", clock=clock), connect(Trips, "memory://", clock=clock) as client:
            broken, unknown = await client.receipt("t-1"), await client.receipt("t-9")
            await clock.advance(1)
            with pytest.raises(RemoteError):
                await broken
            with pytest.raises(NoSuchTrip):
                await unknown
            assert sorted(attempts) == ["t-1", "t-1", "t-9"]

    run(main)


def test_a_cancelled_async_request_stops_and_says_so() -> None:
    async def main() -> None:
        from quintet import Cancelled

        service, begun, stopped = trips(), asyncio.Event(), asyncio.Event()

        async def hang(trip_id: str) -> str:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                stopped.set()
            return ""

        behave(service, "receipt", hang)
        async with serve(service, at="memory://"), connect(Trips, "memory://") as client:
            pending = await client.receipt("t-1")
            await begun.wait()
            await pending.cancel()
            await stopped.wait()
            with pytest.raises(Cancelled):
                await pending

    run(main)


def test_those_who_wait_for_an_answer_do_not_keep_it_from_being_made() -> None:
    async def main() -> None:
        service, begun, go = trips(concurrency=1), asyncio.Event(), asyncio.Event()

        async def receipt(trip_id: str) -> str:
            begun.set()
            await go.wait()
            return trip_id

        behave(service, "receipt", receipt)
        async with serve(service, at="memory://"), connect(Trips, "memory://") as client:
            first, second = await client.receipt("t-1"), await client.receipt("t-2")
            await begun.wait()
            waiting = [asyncio.create_task(pending.wait(10.0)) for pending in (first, second)]
            await asyncio.sleep(0)
            go.set()
            async with asyncio.timeout(45):
                assert await asyncio.gather(*waiting) == ["t-1", "t-2"]

    run(main)


def test_a_service_that_drains_answers_at_once_those_who_wait_for_a_later_answer() -> None:
    async def main() -> None:
        service, asked = trips(), asyncio.Event()

        async def fail(trip_id: str) -> str:
            asked.set()
            raise ValueError("comes again later")

        behave(service, "receipt", fail)
        async with serve(service, at="memory://other"), connect(Trips, "memory://other") as client:
            pending = await client.receipt("t-1")
            await asked.wait()
            waiting = asyncio.create_task(pending.wait(55.0))
            running = service.running
            assert running
            while not running._pending._looking:
                await asyncio.sleep(0)
            async with asyncio.timeout(45):
                await running.stop()
            waiting.cancel()

    run(main)


def test_at_most_so_many_handlers_run_at_once() -> None:
    async def main() -> None:
        service, running, most, go = trips(concurrency=3), 0, 0, asyncio.Event()

        async def work(*args: Any) -> Any:
            nonlocal running, most
            running += 1
            most = max(most, running)
            if most == 3:
                go.set()
            await go.wait()
            running -= 1
            return TRIP

        behave(service, "get", work)
        behave(service, "cancel", lambda *args: work())
        async with serve(service, at="memory://"), connect(Trips, "memory://") as client:
            await asyncio.gather(*(client.get("t") for _ in range(10)), *(client.cancel("t") for _ in range(10)))
        assert most == 3

    run(main)


def test_a_drain_lets_what_is_in_work_end() -> None:
    async def main() -> None:
        service, begun, go, ended = trips(), asyncio.Event(), asyncio.Event(), []

        async def work(trip_id: str, place: Place) -> None:
            begun.set()
            await go.wait()
            ended.append(trip_id)

        behave(service, "pickup_requested", work)
        async with serve(service, at="memory://"), connect(Trips, "memory://") as client:
            await client.pickup_requested("t-1", Place(1))
            await begun.wait()
            asyncio.get_running_loop().call_soon(go.set)
        assert ended == ["t-1"]

    run(main)


def test_work_that_outlasts_the_grace_is_cancelled_and_comes_again() -> None:
    async def main() -> None:
        service, begun, attempts = trips(grace=0.01), asyncio.Event(), []

        async def work(trip_id: str, place: Place) -> None:
            attempts.append(trip_id)
            begun.set()
            if len(attempts) == 1:
                await asyncio.Event().wait()

        behave(service, "pickup_requested", work)
        async with connect(Trips, "memory://") as client:
            async with serve(service, at="memory://"):
                await client.pickup_requested("t-1", Place(1))
                await begun.wait()
            begun.clear()
            async with serve(service, at="memory://"):
                await begun.wait()
        assert attempts == ["t-1", "t-1"]

    run(main)


def test_current_tells_the_sender_the_headers_and_the_attempt() -> None:
    async def main() -> None:
        service, seen = trips(), []

        async def look(trip_id: str) -> Trip:
            message = current()
            seen.append((message.sender, message.headers["x-colour"], message.attempt, message.operation))
            return TRIP

        behave(service, "get", look)
        async with serve(service, at="memory://"), connect(Trips, "memory://", name="phone") as client:
            await client.get.using(headers={"x-colour": "red"})("t-1")
        assert seen == [("phone", "red", 1, "trips.get")]
        with pytest.raises(QuintetError, match="outside of a handler"):
            current()

    run(main)


def test_the_lifespan_surrounds_all_handling() -> None:
    async def main() -> None:
        order: list[str] = []

        @asynccontextmanager
        async def lifespan(service: Service) -> AsyncIterator[None]:
            order.append("up")
            yield
            order.append("down")

        service = trips(lifespan=lifespan)

        async def get(trip_id: str) -> Trip:
            order.append("handled")
            return TRIP

        behave(service, "get", get)
        async with serve(service, at="memory://"), connect(Trips, "memory://") as client:
            await client.get("t-1")
        assert order == ["up", "handled", "down"]

    run(main)


def test_what_was_exchanged_is_recorded(tmp_path: Path) -> None:
    async def main() -> None:
        service = trips()

        async def missing(trip_id: str) -> Trip:
            raise NoSuchTrip(trip_id=trip_id)

        behave(service, "get", missing)
        record = tmp_path / "record.jsonl"
        async with (
            serve(service, at="memory://", record=str(record)),
            connect(Trips, "memory://", name="phone") as client,
        ):
            await client.create(TRIP)
            with pytest.raises(NoSuchTrip):
                await client.get("t-1")
        told = [(exchange.sender, exchange.receiver, exchange.operation, exchange.outcome) for exchange in read(record)]
        assert told == [("phone", "trips", "trips.create", "done"), ("phone", "trips", "trips.get", "NoSuchTrip")]

    run(main)


def test_a_missing_handler_is_refused_at_start_up() -> None:
    async def main() -> None:
        with pytest.raises(
            ConfigurationError, match=r"no handler for Fares.fare: write @service.handles\(Fares.fare\)"
        ):
            async with serve(Service(Fares), at="memory://"):
                pass

    run(main)


def test_a_second_start_in_this_process_is_refused_and_leaves_the_first_running() -> None:
    async def main() -> None:
        service = trips()
        async with serve(service, at="memory://first"), connect(Trips, "memory://first") as client:
            with pytest.raises(ConfigurationError, match="trips is running already in this process"):
                async with serve(service, at="memory://second"):
                    pass
            await service.publish(Trips.created, TRIP)
            assert await client.create(TRIP) == TRIP

    run(main)


def test_a_used_service_without_an_address_is_refused_at_start_up() -> None:
    async def main() -> None:
        service = Service(name="lonely")
        service.uses(Fares)
        with pytest.raises(ConfigurationError, match="uses Fares: say where it is"):
            async with serve(service, at="memory://"):
                pass

    run(main)


def test_a_style_that_no_address_can_carry_is_refused_at_start_up() -> None:
    async def main() -> None:
        service = trips()
        with pytest.raises(CannotCarry, match=r"Trips.created \(publish/subscribe\).*http://127.0.0.1:0 lacks FANOUT"):
            async with serve(service, at="http://127.0.0.1:0"):
                pass

    run(main)


def test_an_event_is_published_with_other_options_than_usual_and_a_channel_is_served_with_native_ones() -> None:
    class Urgent(Native, frozen=True):
        level: int

    sent: list[Message] = []
    served: list[Channel] = []

    class Watched(Memory):
        async def send(self, message: Message) -> Message | None:
            sent.append(message)
            return await super().send(message)

        async def serve(self, channel: Channel, *more: Any, **named: Any) -> Any:
            served.append(channel)
            return await super().serve(channel, *more, **named)

    async def main() -> None:
        owner, reader = trips(), Service(name="reader")

        @reader.handles(Trips.created, native=[Urgent(1)])
        async def created(trip: Trip) -> None: ...

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("quintet.client.open_address", lambda text, clock: Watched(parse_address(text), clock))
            async with serve(owner, reader, at="memory://native"):
                options = owner.using(key="k", headers={"x-city": "Zürich"}, id="e-1", expires=60, native=[Urgent(2)])
                await options.publish(Trips.created, TRIP)
                assert isinstance(await owner.transport("memory://native"), Watched)
        (event,) = [message for message in sent if message.channel.fanout]
        assert (event.key, event.headers["x-city"], event.id, event.native) == ("k", "Zürich", "e-1", (Urgent(2),))
        assert event.deadline is not None
        assert [channel.native for channel in served if channel.name == "trips.v1.created"] == [(Urgent(1),)]

    run(main)


def test_only_its_own_service_publishes_and_asks() -> None:
    async def main() -> None:
        stranger = Service(name="stranger")
        with pytest.raises(QuintetError, match="not running"):
            await stranger.publish(Trips.created, TRIP)
        async with serve(stranger, at="memory://"):
            with pytest.raises(ConfigurationError, match=r"stranger cannot publish Trips\.created"):
                await stranger.publish(Trips.created, TRIP)

    run(main)


def wrong_name(trip: str) -> None: ...
async def fine(trip_id: str) -> Any: ...
async def lacks() -> Any: ...
async def wants_more(trip_id: str, colour: str) -> Any: ...


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (wrong_name, "must be `async def`.*asyncio.to_thread"),
        (lacks, "lacks the parameter trip_id"),
        (wants_more, "wants colour, which the contract has not"),
    ],
)
def test_a_handler_that_does_not_fit_is_refused_where_it_is_written(function: Any, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        Service(Trips).handles(Trips.get)(function)


def test_a_second_handler_and_a_foreign_request_are_refused() -> None:
    service = Service(Trips)
    service.handles(Trips.get)(fine)
    with pytest.raises(ConfigurationError, match="there is one already"):
        service.handles(Trips.get)(fine)
    with pytest.raises(ConfigurationError, match=r"handled by the service of its own contract, Service\(Fares\)"):
        service.handles(Fares.fare)(fine)
    with pytest.raises(ConfigurationError, match="every_instance= is for events"):
        service.handles(Trips.receipt, every_instance=True)(fine)


def test_a_reply_to_a_caller_that_is_gone_harms_nobody() -> None:
    async def main() -> None:
        async with serve(trips(), at="memory://"), connect(Trips, "memory://") as client:
            carriers = Carriers("test", FakeClock())
            transport = await carriers.reach("memory://")
            body = b'{"trip":{"id":"1","pickup":{"lat":1}}}'
            await transport.send(
                Message(
                    channel=Channel("trips.v1.create"),
                    id="x",
                    media_type="application/json",
                    body=body,
                    reply_to="replies.gone",
                )
            )
            assert await client.create(TRIP) == TRIP
            await carriers.close()

    run(main)
