# mypy: disable-error-code="empty-body"
"""The harness and the faulty transport, used as a user's test uses them."""

from __future__ import annotations

import asyncio
import sys
from functools import partial
from pathlib import Path

import pytest
from msgspec import Struct

from quintet import (
    Contract,
    Fault,
    Policy,
    Redelivery,
    Service,
    async_request,
    current,
    event,
    notification,
    request,
    survey,
)
from quintet.errors import DeadlineExceeded
from quintet.testing import FakeClock, FaultyTransport, harness


class Trip(Struct):
    id: str
    city: str = "Zürich"


class NoSuchTrip(Fault, status=404):
    trip_id: str


class Trips(Contract, name="trips", version="1.0"):
    @request(faults=[NoSuchTrip])
    async def create(self, city: str) -> Trip: ...
    @request(faults=[NoSuchTrip])
    async def get(self, trip_id: str) -> Trip: ...
    @notification
    async def pickup(self, trip_id: str) -> None: ...
    @event(key="trip.id")
    async def created(self, trip: Trip) -> None: ...
    @async_request
    async def receipt(self, trip_id: str) -> str: ...
    @survey
    async def offers(self, trip: Trip) -> str: ...


class World:
    """A trips service and a dispatcher, fresh for each test."""

    def __init__(self, *failures: Exception) -> None:
        self.trips = trips = Service(Trips)
        self.dispatch = dispatch = Service(name="dispatch")
        self.failures = list(failures)
        self.heard: list[tuple[str, int]] = []
        self.picked_up: list[str] = []

        @trips.handles(Trips.create)
        async def create(city: str) -> Trip:
            trip = Trip(f"t-{city}", city)
            await trips.publish(Trips.created, trip)
            return trip

        @trips.handles(Trips.get)
        async def get(trip_id: str) -> Trip:
            if trip_id == "slow":
                await asyncio.Event().wait()
            raise NoSuchTrip(trip_id=trip_id)

        @trips.handles(Trips.pickup)
        async def pickup(trip_id: str) -> None:
            self.picked_up.append(trip_id)

        @trips.handles(Trips.receipt)
        async def receipt(trip_id: str) -> str:
            return f"receipt for {trip_id}"

        @dispatch.handles(Trips.created, redelivery=Redelivery(attempts=3, first=2.0, longest=2.0))
        async def created(trip: Trip) -> None:
            self.heard.append((trip.id, current().attempt))
            if self.failures:
                raise self.failures.pop(0)


async def test_a_test_sees_what_was_sent_and_waits_for_what_was_handled() -> None:
    world = World()
    async with harness(world.trips, world.dispatch) as bench:
        trips = bench.connect(Trips)
        assert await trips.create("Bern") == Trip("t-Bern", "Bern")
        assert [record.trip for record in await bench.handled(Trips.created, by="dispatch")] == [Trip("t-Bern", "Bern")]
        assert [record.trip.id for record in bench.sent(Trips.created)] == ["t-Bern"]
        assert bench.messages(Trips.created)[0].key == "t-Bern"
        assert bench.messages(Trips.create)[0].sender == "test"
        await trips.pickup("t-1")
        await bench.handled(Trips.pickup)
        assert world.picked_up == ["t-1"]
        with pytest.raises(NoSuchTrip):
            await trips.get("t-2")
    assert world.trips.answers.startswith("sqlite:")  # it is the service of production again
    assert len(asyncio.all_tasks()) == 1


async def test_what_one_service_handled_does_not_count_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["quintet.testing.harness"], "WITHIN", 0.01)
    world, stuck = World(), Service(name="stuck")

    @stuck.handles(Trips.created, every_instance=True)
    async def created(trip: Trip) -> None:
        if trip.id == "t-Bern":
            await asyncio.Event().wait()

    async with harness(world.trips, world.dispatch, stuck) as bench:
        await bench.connect(Trips).create("Bern")
        await bench.handled(Trips.created, by="dispatch")
        with pytest.raises(
            AssertionError, match="0 of 1 times by stuck; it was sent 1 times; no delivery was finished"
        ):
            await bench.handled(Trips.created, by="stuck")
        await bench.connect(Trips).create("Basel")
        assert [record.trip.id for record in await bench.handled(Trips.created, by="stuck")] == ["t-Basel"]


async def test_a_failing_handler_is_tried_again_as_the_fake_clock_moves_on(caplog: pytest.LogCaptureFixture) -> None:
    world = World(RuntimeError("no car"))
    async with harness(world.trips, world.dispatch, clock=FakeClock()) as bench:
        await bench.connect(Trips).create("Bern")
        await bench.advance(0.5)
        assert world.heard == [("t-Bern", 1)]
        await bench.advance(2.0)
        await bench.handled(Trips.created, by="dispatch")
        assert world.heard == [("t-Bern", 1), ("t-Bern", 2)]


async def test_a_delivery_that_dies_is_reported_at_once_with_its_reason() -> None:
    world = World(*[RuntimeError("no car")] * 3)
    async with harness(world.trips, world.dispatch, clock=FakeClock()) as bench:
        await bench.connect(Trips).create("Bern")
        await bench.advance(10.0)
        with pytest.raises(AssertionError, match=r"created was handled 0 of 1 times by dispatch; .* died: .*no car"):
            await bench.handled(Trips.created, by="dispatch")
        assert [letter.group for letter in await bench.dead()] == ["dispatch"]


async def test_what_was_never_sent_is_named_with_what_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["quintet.testing.harness"], "WITHIN", 0.01)

    world = World()
    async with harness(world.trips, world.dispatch) as bench:
        with pytest.raises(AssertionError, match=r"sent 0 times; what was sent is nothing at all"):
            await bench.handled(Trips.created)
        await bench.connect(Trips).pickup("t-1")
        with pytest.raises(AssertionError, match=r"sent 0 times; what was sent is trips.pickup"):
            await bench.handled(Trips.created)
        with pytest.raises(TypeError, match="FakeClock"):
            await bench.advance(1)


async def test_a_survey_ends_as_the_fake_clock_passes_its_time() -> None:
    world, quick, mute = World(), Service(name="quick"), Service(name="mute")

    @quick.handles(Trips.offers)
    async def offer(trip: Trip) -> str:
        return f"{trip.id}: 3 minutes"

    @mute.handles(Trips.offers)
    async def none(trip: Trip) -> str:
        await asyncio.Event().wait()
        return ""

    async with harness(world.trips, quick, mute, clock=FakeClock()) as bench:
        answers: list[tuple[str, str]] = []

        async def ask() -> None:
            async with world.trips.ask(Trips.offers, Trip("t-1")).within(2.0) as offers:
                answers.extend([(answer.sender, answer.value) async for answer in offers])

        asking = asyncio.create_task(ask())
        await bench.advance(1.9)
        assert not asking.done()
        await bench.advance(0.2)
        await asking
        assert answers == [("quick", "t-1: 3 minutes")]


@pytest.mark.parametrize("like", [[], ["http", "sqlite"]], ids=str)
async def test_an_async_request_is_answered_without_a_file(
    like: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    world = World()
    world.trips.inbox = "sqlite:///inbox.db"
    async with harness(world.trips, like=like) as bench:
        trips = bench.connect(Trips)
        pending = await trips.receipt("t-1")
        assert await pending == "receipt for t-1"
        assert await trips.receipt.pending(pending.id) == "receipt for t-1"
        await trips.pickup("t-2")
    assert world.picked_up == ["t-2"]
    assert list(tmp_path.iterdir()) == []


async def test_a_time_out_is_reached_by_moving_the_clock() -> None:
    world = World()
    async with harness(world.trips, clock=FakeClock()) as bench:
        call = asyncio.create_task(bench.connect(Trips, policy=Policy(timeout=30)).get("slow"))
        await bench.advance(29)
        assert not call.done()
        await bench.advance(2)
        with pytest.raises(DeadlineExceeded):
            await call


async def test_two_replies_to_one_request_and_replies_that_overtake_are_sorted_out() -> None:
    world, clock, made = World(), FakeClock(), list[FaultyTransport]()

    def wrap(transport: object, **faults: object) -> FaultyTransport:
        made.append(FaultyTransport(transport, **faults))  # type: ignore[arg-type]
        return made[0]

    faults = partial(wrap, seed=3, duplicate=0.5, delay=0.2, only=FaultyTransport.replies)
    async with harness(world.trips, clock=clock, wrap=faults) as bench:
        trips = bench.connect(Trips)
        calls = [asyncio.create_task(trips.create(f"city-{number}")) for number in range(30)]
        await bench.advance(0.5)
        assert [(await call).city for call in calls] == [f"city-{number}" for number in range(30)]
        assert 5 < len(made[0].hits) < 25
        assert {what for what, _ in made[0].hits} == {"duplicated"}


async def test_a_reply_that_is_lost_becomes_a_time_out_and_not_a_hang() -> None:
    world = World()
    wrap = partial(FaultyTransport, drop=1.0, only=FaultyTransport.replies)
    async with harness(world.trips, clock=FakeClock(), wrap=wrap) as bench:
        call = asyncio.create_task(bench.connect(Trips).create("Bern"))
        await bench.advance(1.1)
        with pytest.raises(DeadlineExceeded):
            await call


def test_the_same_seed_hits_the_same_messages() -> None:
    async def hits(seed: int) -> list[str]:
        world, made = World(), list[FaultyTransport]()

        def wrap(transport: object) -> FaultyTransport:
            made.append(FaultyTransport(transport, seed=seed, drop=0.4))  # type: ignore[arg-type]
            return made[0]

        async with harness(world.trips, wrap=wrap) as bench:
            trips = bench.connect(Trips)
            for number in range(20):
                await trips.pickup(f"t-{number}")
        return [message.body.decode() for _, message in made[0].hits]

    first = asyncio.run(hits(1))
    assert 2 < len(first) < 18
    assert first == asyncio.run(hits(1))
    assert first != asyncio.run(hits(2))
