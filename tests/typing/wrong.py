# mypy: disable-error-code="empty-body"
"""What users may not write: both type checkers complain on each line that is marked, and on no other."""

from __future__ import annotations

from msgspec import Struct

from quintet import (
    Contract,
    Fault,
    Policy,
    Service,
    async_request,
    blocking,
    connect,
    current,
    event,
    notification,
    on,
    request,
    serve,
    survey,
)
from quintet.model import Number, Reserved


class Trip(Struct):
    id: str


class NoSuchTrip(Fault, status=404):
    trip_id: str


class Trips(Contract, name="trips"):
    @request(faults=[NoSuchTrip])
    async def get(self, trip_id: str, seats: int = 1) -> Trip: ...

    @notification
    async def ping(self, text: str) -> None: ...

    @async_request
    async def receipt(self, trip_id: str) -> Trip: ...

    @event
    async def created(self, trip: Trip) -> None: ...

    @survey
    async def offers(self, trip: Trip) -> float: ...


service = Service(Trips)
trip = Trip("t-1")


async def count(trip_id: str, seats: int = 1) -> int:
    return seats


async def by_number(trip_id: int, seats: int = 1) -> Trip:
    return trip


@Policy(timeout=0.3).guards
async def guarded(number: int) -> bytes:
    return bytes(number)


class Wrong(Contract, name="wrong"):
    @notification  # wrong: nothing comes back from a notification
    async def answers(self) -> int: ...

    @event()  # wrong: nothing comes back from an event
    async def replies(self) -> int: ...

    @request  # wrong: an operation is async
    def plain(self) -> int: ...

    @request(status=201)  # wrong: no option of a request
    async def created(self) -> int: ...

    @request(faults=[ValueError])  # wrong: no fault
    async def failing(self) -> int: ...

    @request(key="trip_id")  # wrong: a request is not ordered
    async def ordered(self, trip_id: str) -> int: ...


async def call() -> None:
    async with connect(Trips, "memory://") as client:
        await client.get(1)  # wrong: type of an argument
        await client.get("t-1", 2, 3)  # wrong: too many arguments
        await client.get()  # wrong: an argument is missing
        await client.get("t-1", colour="red")  # wrong: unknown keyword
        await client.get("t-1", seats="two")  # wrong: type of a keyword
        number: int = await client.get("t-1")  # wrong: type of the result
        soon: Trip = await client.receipt("t-1")  # wrong: it is a Pending until it is awaited again
        later: int = await client.receipt.pending("p-1")  # wrong: type of the answer
        await client.created(trip)  # wrong: an event is not called by a client
        await client.offers(trip)  # wrong: a survey is not called by a client
        await client.get.using(retries=3)("t-1")  # wrong: unknown option
        await client.get.using(timeout="1 s")("t-1")  # wrong: type of an option
        await client.get.using(timeout=1.0)(1)  # wrong: type of an argument behind using
        reply = await client.get.reply(1)  # wrong: type of an argument of reply
        print(reply.value.colour)  # wrong: no field of the reply's value
        await client.delete("t-1")  # wrong: no such operation
        client.get.pending("p-1")  # wrong: only an async request is pending
    print(number, soon, later)
    connect(Trip, "memory://")  # wrong: no contract
    on(Trip, timeout=1.0)  # wrong: no operation
    on(Trips.get, timeout="1 s")  # wrong: type of an option


on(Trips.get, breaker=0.5)  # wrong: settings stand in their class
on(Trips.get, fallback=["nobody"])  # wrong: type of a fallback's value
on(Trips.get, fallback=[count])  # wrong: result of a fallback function
on(Trips.get, fallback=[by_number])  # wrong: parameter of a fallback function
on(Trips.get, fallback=trip)  # wrong: a fallback is a chain
guarded("seven")  # wrong: a guarded function keeps its parameters
Policy(bulkhead=20)  # wrong: settings stand in their class


def call_and_wait(other: blocking.Client[Wrong]) -> None:
    with blocking.connect(Trips, "memory://") as client:
        client.get(1)  # wrong: type of an argument
        client.get("t-1", 2, 3)  # wrong: too many arguments
        client.get()  # wrong: an argument is missing
        client.get("t-1", colour="red")  # wrong: unknown keyword
        number: int = client.get("t-1")  # wrong: type of the result
        soon: Trip = client.receipt("t-1")  # wrong: it is a Pending until its result is asked for
        later: int = client.receipt.pending("p-1").result()  # wrong: type of the answer
        client.receipt("t-1").wait("1 s")  # wrong: type of the time-out
        client.created(trip)  # wrong: an event is not called by a client
        client.offers(trip)  # wrong: a survey is not called by a client
        client.get.using(retries=3)("t-1")  # wrong: unknown option
        client.get.using(timeout=1.0)(1)  # wrong: type of an argument behind using
        reply = client.get.reply(1)  # wrong: type of an argument of reply
        print(reply.value.colour)  # wrong: no field of the reply's value
        client.delete("t-1")  # wrong: no such operation
        client.get.pending("p-1")  # wrong: only an async request is pending
        call_and_wait(client)  # wrong: another contract's client
    print(number, soon, later, other)
    blocking.connect(Trip, "memory://")  # wrong: no contract


async def wait_for_nothing(client: blocking.Client[Trips]) -> None:
    await client.get("t-1")  # wrong: a blocking client's call is not awaited


async def send() -> None:
    await service.publish(Trips.created, 1)  # wrong: type of the event
    await service.using(key="t-1").publish(Trips.created, 1)  # wrong: type of the event
    await service.publish(Trips.created)  # wrong: the event is missing
    await service.publish(Trips.get, "t-1")  # wrong: a request is not published
    await service.publish(Trips.offers, trip)  # wrong: a survey is not published
    service.outbox.add(current().store, Trips.created, 1)  # wrong: type of the event
    service.outbox.add(current().store, Trips.created)  # wrong: the event is missing
    service.outbox.add(current().store, Trips.get, "t-1")  # wrong: a request is no client's call
    service.outbox.add("sqlite:///trips.db", Trips.created, trip)  # wrong: no transaction
    service.outbox.using(timeout=1.0)  # wrong: what is for a message that is sent at once
    service.ask(Trips.created, trip)  # wrong: an event is not asked
    service.ask(Trips.offers, "t-1")  # wrong: type of the question
    service.ask(Trips.offers, trip).within()  # wrong: the time is missing
    async with service.ask(Trips.offers, trip).within(1.0) as answers:
        async for answer in answers:
            text: str = answer.value  # wrong: type of an answer
            print(text)


@service.handles(Trips.get)  # wrong: returns something else
async def returns(trip_id: str, seats: int = 1) -> int:
    return seats


@service.handles(Trips.get)  # wrong: type of a parameter
async def takes(trip_id: int, seats: int = 1) -> Trip:
    return trip


@service.handles(Trips.get)  # wrong: name of a parameter
async def names(trip: str, seats: int = 1) -> Trip:
    return Trip(trip)


@service.handles(Trips.get)  # wrong: a parameter is missing
async def fewer(trip_id: str) -> Trip:
    return trip


@service.handles(Trips.get)  # wrong: a parameter that the contract does not have
async def more(trip_id: str, seats: int, colour: str) -> Trip:
    return trip


@service.handles(Trips.ping)  # wrong: a plain function
def sync(text: str) -> None: ...


@service.handles("get")  # wrong: no operation
async def named(trip_id: str) -> Trip:
    return trip


async def faults() -> None:
    NoSuchTrip(trip_id=1)  # wrong: type of a fault's field
    NoSuchTrip()  # wrong: a fault's field is missing
    NoSuchTrip(trip_id="t-1", colour="red")  # wrong: no field of the fault
    NoSuchTrip("t-1")  # wrong: a fault takes keywords only
    try:
        print()
    except NoSuchTrip as fault:
        print(fault.colour)  # wrong: no field of the fault


Service("trips")  # wrong: a service takes a contract, or name=
service.uses("trips")  # wrong: no contract
serve(Trips, at="memory://")  # wrong: a contract is not served, its service is
Number("3")  # wrong: a number is an integer
Number(3)(Trip)  # wrong: a number belongs to a field
Reserved(numbers=3)  # wrong: several numbers
