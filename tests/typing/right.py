# mypy: disable-error-code="empty-body"
"""What users may write: both type checkers accept all of it, and infer what assert_type says."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, assert_type

import apsw
from msgspec import Struct

from quintet import (
    Answer,
    Breaker,
    Bulkhead,
    Call,
    CallError,
    Contract,
    Declined,
    Fault,
    Http,
    Link,
    Pending,
    PendingCall,
    Policy,
    Rate,
    Redelivery,
    Reply,
    Retry,
    Service,
    async_request,
    blocking,
    connect,
    current,
    deadline,
    event,
    notification,
    on,
    request,
    serve,
    stale,
    survey,
)
from quintet.compiler import model_of
from quintet.message import Native
from quintet.model import Alias, ContractModel, Deprecated, Facet, Float32, Int32, Number, Reserved


class State(Enum):
    WAITING = "waiting"
    DRIVING = "driving"


@dataclass
class Place:
    lat: float
    lon: Annotated[Float32, Number(2)] = 0.0


@Reserved(numbers=[3, range(7, 10)], names=["colour"])
@Facet("protobuf", package="rides")
class Trip(Struct):
    id: str
    pickup: Annotated[Place, Number(5), Alias("start")]
    seats: Int32 = 1
    state: State = State.WAITING
    note: Annotated[str, Deprecated("nobody read it")] | None = None


class NoSuchTrip(Fault, status=404):
    """Nobody knows it."""

    trip_id: str
    hint: str = ""


@Reserved(names=["recreate"])
class Trips(Contract, name="trips", version="1.2"):
    """A contract with every style and every option."""

    @request(http="GET /trips/{trip_id}", faults=[NoSuchTrip], links={"cancel": "cancel"})
    async def get(self, trip_id: str) -> Trip: ...

    @request(
        http=Http("POST /trips", location="/trips/{id}"),
        links={"cancel": Link("cancel", when=lambda trip: trip.seats > 0, fill={"trip_id": "id"})},
        idempotent=True,
    )
    async def create(self, pickup: Place, *, seats: int = 1) -> Trip: ...

    @request
    async def cancel(self, trip_id: str) -> None: ...

    @notification(key="trip_id", expires=60.0, http="POST /pickups")
    async def pick_up(self, trip_id: str, at: Place | None = None) -> None: ...

    @notification
    async def ping(self) -> None: ...

    @async_request(faults=[NoSuchTrip], key="trip_id", expires=3600.0)
    async def receipt(self, trip_id: str) -> list[str]: ...

    @async_request
    async def report(self) -> bytes: ...

    @event(key="trip.id", deprecated="hear `changed`")
    @Reserved(numbers=[2])
    async def created(self, trip: Trip) -> None: ...

    @event
    async def changed(self, trip: Trip, before: State) -> None: ...

    @survey
    async def offers(self, trip: Trip, seats: Annotated[int, Number(4)] = 1) -> float: ...


# the service


@asynccontextmanager
async def lifespan(service: Service) -> AsyncGenerator[None]:
    yield


service = Service(Trips, inbox="sqlite:///inbox.db", answers="memory://", concurrency=10, lifespan=lifespan)
listener = Service(name="listener")
trips = listener.uses(Trips, policy=Policy(timeout=0.3))
assert_type(trips, Trips)


@service.handles(Trips.get)
async def get(trip_id: str) -> Trip:
    if not trip_id:
        raise NoSuchTrip(trip_id=trip_id)
    return Trip(trip_id, Place(1.0))


@service.handles(Trips.create)
async def create(pickup: Place, *, seats: int = 1) -> Trip:
    trip = Trip("t-1", pickup, seats)
    await service.publish(Trips.created, trip)
    await service.using(key="t-1", headers={"x-city": "Zürich"}, native=[Native()]).publish(Trips.created, trip)
    await service.publish(Trips.changed, trip, before=State.WAITING)
    return trip


@service.handles(Trips.pick_up, redelivery=Redelivery())
async def pick_up(trip_id: str, at: Place | None = None) -> None:
    here = current()
    assert_type(here.sender, str)
    assert_type(here.attempt, int)
    assert_type(here.headers, Mapping[str, str])
    assert_type(here.remaining, float | None)


@service.handles(Trips.receipt)
async def receipt(trip_id: str) -> list[str]:
    return [trip_id]


class Awaited:
    """What psycopg.AsyncConnection and aiosqlite.Connection have in common."""

    async def execute(self, statement: str, values: Sequence[object]) -> object: ...
    async def commit(self) -> None: ...


async def within(mine: apsw.Connection, standard: sqlite3.Connection, awaited: Awaited, trip: Trip) -> None:
    outbox = service.outbox
    assert_type(outbox.add(current().store, Trips.created, trip), str)
    assert_type(outbox.using(key="t-1").add(mine, Trips.changed, trip, before=State.WAITING), str)
    assert_type(outbox.add(standard, trips.pick_up.using(id="m-1"), "t-1", at=Place(1.0)), str)
    assert_type(trips.receipt.pending(await outbox.add(awaited, trips.receipt, "t-1")), Pending[list[str]])


@listener.handles(Trips.created, every_instance=True)
async def heard(trip: Trip) -> None:
    assert_type(await trips.get(trip.id), Trip)


@listener.handles(Trips.offers)
async def offer(trip: Trip, seats: int = 1) -> float:
    if seats > 4:
        raise Declined
    return 9.5


class Bookkeeper:
    """A handler that is a method of an object."""

    async def changed(self, trip: Trip, before: State) -> None: ...


listener.handles(Trips.changed)(Bookkeeper().changed)


async def ask(trip: Trip) -> list[float]:
    prices: list[float] = []
    async with service.ask(Trips.offers, trip, seats=2).within(2.0, enough=3) as answers:
        async for answer in answers:
            assert_type(answer, Answer[float])
            assert_type(answer.value, float)
            assert_type(answer.sender, str)
            prices.append(answer.value)
    return prices


# the caller


async def call() -> None:
    async with connect(
        Trips, ["http://127.0.0.1:8001", "sqlite:///rides.db"], policy=[Policy(timeout=0.3), on(Trips.get, timeout=2.0)]
    ) as client:
        assert_type(client, Trips)
        assert_type(await client.get("t-1"), Trip)
        assert_type(await client.get(trip_id="t-1"), Trip)
        assert_type(await client.create(Place(1.0), seats=2), Trip)
        await client.pick_up("t-1")
        await client.ping()
        assert_type(await client.get.using(timeout=0.1, key="t-1", headers={"x": "y"})("t-1"), Trip)
        await client.pick_up.using(expires=60.0)("t-1", at=Place(2.0))
        with deadline(0.5):
            reply = await client.get.reply("t-1")
        assert_type(reply, Reply[Trip])
        assert_type(reply.value, Trip)
        await reply.links["cancel"]()

        pending = await client.receipt("t-1")
        assert_type(pending, Pending[list[str]])
        assert_type(await pending, list[str])
        assert_type(await pending.wait(timeout=1.0), list[str])
        assert_type(await client.receipt.pending(pending.id), list[str])
        await pending.cancel()
        submit: PendingCall[[str], list[str]] = client.receipt.using(key="t-1")
        ping: Call[[], None] = client.ping
        await asyncio.gather(submit("t-1"), ping())
        try:
            await client.get("t-2")
        except NoSuchTrip as fault:
            assert_type(fault.trip_id, str)
            assert_type(fault.hint, str)
        except CallError as error:
            assert_type(error.path, str)


# policies

UNKNOWN = Trip("?", Place(0.0))


async def guess(trip_id: str) -> Trip:
    return UNKNOWN


@Policy(
    timeout=0.3, bulkhead=Bulkhead(20), breaker=Breaker(error_rate=0.5, min_calls=20), retry=Retry(2, budget=0.2)
).guards
async def resize(picture: bytes, *, width: int = 100) -> bytes:
    return picture[:width]


@Policy(rate=Rate(10)).guards(name="mail.send", idempotent=True)
async def send(to: str) -> int:
    return len(to)


async def guarded() -> None:
    on(Trips.get, fallback=[stale(max_age=60), guess, UNKNOWN])
    on(Trips.get, fallback=[UNKNOWN], breaker=False, bulkhead=Bulkhead(5))
    on(Trips.get, fallback=[guess])
    assert_type(await resize(b"", width=3), bytes)
    assert_type(await send("ada"), int)


# the caller in a thread


def ride(client: blocking.Client[Trips]) -> Trip:
    return client.get("t-1")


def call_and_wait() -> None:
    with blocking.connect(
        Trips, ["http://127.0.0.1:8001"], policy=[Policy(timeout=0.3), on(Trips.get, timeout=2.0)]
    ) as client:
        assert_type(client, blocking.Client[Trips])
        assert_type(ride(client), Trip)
        assert_type(client.get("t-1"), Trip)
        assert_type(client.get(trip_id="t-1"), Trip)
        assert_type(client.create(Place(1.0), seats=2), Trip)
        client.pick_up("t-1")
        client.ping()
        assert_type(client.get.using(timeout=0.1, key="t-1", headers={"x": "y"})("t-1"), Trip)
        client.pick_up.using(expires=60.0, native=[Native()])("t-1", at=Place(2.0))
        with deadline(0.5):
            reply = client.get.reply("t-1")
        assert_type(reply, blocking.Reply[Trip])
        assert_type(reply.value, Trip)
        reply.links["cancel"]()

        pending = client.receipt("t-1")
        assert_type(pending, blocking.Pending[list[str]])
        assert_type(pending.result(), list[str])
        assert_type(pending.wait(1.0), list[str])
        assert_type(client.receipt.pending(pending.id).result(), list[str])
        assert_type(client.receipt.using(key="t-1")("t-1").id, str)
        pending.cancel()
        submit: blocking.PendingCall[[str], list[str]] = client.receipt
        ping: blocking.Call[[], None] = client.ping
        assert_type(list(map(client.get, ["t-1", "t-2"])), list[Trip])
        submit("t-1")
        ping()


async def main() -> None:
    async with serve(service, listener, at="memory://", connect={Trips: "memory://", "billing": ["memory://"]}) as at:
        assert_type(at, list[str])
        await call()


assert_type(model_of(Trips), ContractModel)
assert_type(Trips.get.name, str)
everything: list[Any] = [ask, main, call_and_wait, guarded]
