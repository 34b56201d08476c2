# mypy: disable-error-code="empty-body"
"""Two minor versions of one contract, each style in both, and the proof that they understand each other."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from datetime import date
from typing import Any

import pytest
from msgspec import Struct

from quintet import (
    Contract,
    Fault,
    Http,
    Link,
    RemoteError,
    Service,
    async_request,
    connect,
    event,
    notification,
    request,
    serve,
    survey,
)
from quintet.errors import Safety

PAIRS = [("1.0", "1.0"), ("1.0", "1.1"), ("1.1", "1.0"), ("1.1", "1.1")]
"""The version of who sends, and of who receives."""
WITHIN = 50.0
DAY = date(2026, 11, 30)


class Place(Struct):
    lat: float
    lon: float


class Version(Struct, frozen=True):
    """One minor version of a contract, and of another with its events and surveys."""

    contract: Any
    signals: Any
    trip: type[Struct]
    full: type[Fault]
    banned: type[Fault] | None


def version(number: str, name: str, level: int = 2) -> Version:
    """`name` keeps the channels of one test apart from those of others at the same broker."""
    return _old(name, level) if number == "1.0" else _new(name, level)


class Old:
    """The types of 1.0."""

    class Trip(Struct):
        id: str

    class Full(Fault, status=409):
        trip_id: str


class New:
    """The types of 1.1."""

    class Trip(Struct):
        id: str
        seats: int = 1

    class Full(Fault, status=409):
        trip_id: str
        detail: str = ""  # a name that RFC 9457 has taken
        safety: str = "not sent"

    class Banned(Fault, status=503):
        title: str = "banned"
        safety: str = "not sent"
        retry_after: float = 5.0


def _old(name: str, level: int) -> Version:
    class Trips(Contract, name=name, version="1.0", http_level=level):
        @request(http=Http("POST /trips", location="/trips/{id}"), links={"move": Link("move", fill={"trip_id": "id"})})
        async def create(self, trip: Old.Trip) -> Old.Trip: ...
        @request(http="PATCH /trips/{trip_id}")
        async def move(self, trip_id: str, to: Place) -> str: ...
        @request(http="GET /trips/{trip_id}", faults=[Old.Full])
        async def get(self, trip_id: str) -> Old.Trip: ...
        @request
        async def rename(self, text: str) -> str: ...
        @request
        async def ping(self) -> str: ...
        @request
        async def settle(self, trip: Old.Trip | None = None) -> str: ...
        @notification
        async def arrived(self, trip: Old.Trip) -> None: ...
        @notification(http="PUT /trips/{trip_id}/left")
        async def left(self, trip_id: str) -> None: ...
        @async_request(http="POST /trips/{trip_id}/receipt")
        async def receipt(self, trip_id: str, place: Place) -> str: ...

    class Signals(Contract, name=f"{name}-signals", version="1.0"):
        @event
        async def created(self, trip: Old.Trip) -> None: ...
        @survey
        async def offers(self, trip: Old.Trip) -> str: ...

    return Version(Trips, Signals, Old.Trip, Old.Full, None)


def _new(name: str, level: int) -> Version:
    class Trips(Contract, name=name, version="1.1", http_level=level):
        @request(http=Http("POST /trips", location="/trips/{id}"), links={"move": Link("move", fill={"trip_id": "id"})})
        async def create(
            self, trip: New.Trip, note: str = "none", tags: Sequence[str] = (), day: date | None = None
        ) -> New.Trip: ...
        @request(http="PATCH /trips/{trip_id}")
        async def move(self, trip_id: str, to: Place, note: str = "none") -> str: ...
        @request(http="GET /trips/{trip_id}", faults=(New.Full, New.Banned))
        async def get(self, trip_id: str, note: str = "none") -> New.Trip: ...
        @request
        async def rename(self, text: str, note: str = "none", place: Place | None = None) -> str: ...
        @request
        async def ping(self, note: str = "none") -> str: ...
        @request
        async def settle(self, trip: New.Trip | None = None, note: str = "none") -> str: ...
        @notification
        async def arrived(self, trip: New.Trip, *, note: str = "none") -> None: ...
        @notification(http="PUT /trips/{trip_id}/left")
        async def left(self, trip_id: str, place: Place | None = None) -> None: ...
        @async_request(http="POST /trips/{trip_id}/receipt")
        async def receipt(self, trip_id: str, place: Place, note: str = "none") -> str: ...

    class Signals(Contract, name=f"{name}-signals", version="1.1"):
        @event
        async def created(self, trip: New.Trip, note: str = "none", place: Place | None = None) -> None: ...
        @survey
        async def offers(self, trip: New.Trip, note: str = "none") -> str: ...

    return Version(Trips, Signals, New.Trip, New.Full, New.Banned)


class Heard:
    """What reached the handlers of notifications and events."""

    def __init__(self) -> None:
        self.came: list[tuple[Any, ...]] = []
        self._more = asyncio.Event()

    def add(self, *what: Any) -> None:
        self.came.append(what)
        self._more.set()

    async def until(self, *what: Any) -> None:
        async with asyncio.timeout(WITHIN):
            while what not in self.came:
                self._more.clear()
                await self._more.wait()


def services(of: Version, heard: Heard) -> tuple[Service, Service]:
    """The service of the contract, and one that hears the signals."""
    Trips, Signals = of.contract, of.signals
    trips, listener = Service(Trips, answers="memory://"), Service(name="listener")
    new = of.banned is not None

    async def create(trip: Any, note: str = "none", tags: Sequence[str] = (), day: date | None = None) -> Any:
        return of.trip(f"{trip.id}/{note}/{'+'.join(tags)}/{day}")

    async def move(trip_id: str, to: Place, note: str = "none") -> str:
        return f"{trip_id}/{to.lat}/{note}"

    async def get(trip_id: str, note: str = "none") -> Any:
        if trip_id == "banned" and of.banned:
            raise of.banned()
        if trip_id == "full":
            raise of.full(trip_id=trip_id, **({"detail": "seats"} if new else {}))
        return of.trip(f"{trip_id}/{note}")

    async def rename(text: str, note: str = "none", place: Place | None = None) -> str:
        return f"{text}/{note}/{place.lat if place else ''}"

    async def ping(note: str = "none") -> str:
        return note

    async def settle(trip: Any = None, note: str = "none") -> str:
        return f"{trip.id if trip else ''}/{note}"

    async def arrived(trip: Any, note: str = "none") -> None:
        heard.add("arrived", trip.id, note)

    async def left(trip_id: str, place: Place | None = None) -> None:
        heard.add("left", trip_id, place)

    async def receipt(trip_id: str, place: Place, note: str = "none") -> str:
        return f"{trip_id}/{place.lon}/{note}"

    async def created(trip: Any, note: str = "none", place: Place | None = None) -> None:
        heard.add("created", trip.id, note, place)

    async def offers(trip: Any, note: str = "none") -> str:
        return f"{trip.id}/{note}"

    for handler in (create, move, get, rename, ping, settle, arrived, left, receipt):
        trips.handles(getattr(Trips, handler.__name__))(_narrowed(handler, getattr(Trips, handler.__name__)))
    for handler in (created, offers):
        operation = getattr(Signals, handler.__name__)
        listener.handles(operation)(_narrowed(handler, operation))
    return trips, listener


def _narrowed(handler: Any, operation: Any) -> Any:
    """The handler with no parameters but those of its version."""
    names = operation.record.__struct_fields__

    async def narrowed(*args: Any) -> Any:
        return await handler(**dict(zip(names, args, strict=True)))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    narrowed.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    return narrowed


async def prove(address: str, sender: str, receiver: str, name: str, *, level: int = 2, fanout: bool = True) -> None:
    """Every style, sent by one version and received by another, with and without what the later one adds."""
    heard, here, there = Heard(), version(sender, name, level), version(receiver, name, level)
    trips, listener = services(there, heard)
    owner = Service(here.signals)
    given = sender == receiver == "1.1"  # else what 1.1 adds is not known to one of the two
    more: dict[str, Any] = {"note": "é &/?"} if sender == "1.1" else {}
    note = "é &/?" if given else "none"
    place, trip = Place(1.5, 2.5), here.trip(id="t")
    running = (trips, listener, owner) if fanout else (trips,)
    async with serve(*running, at=address, connect={here.signals: address} if fanout else {}) as addresses:
        at = addresses[0] if address.startswith("http") else address
        async with connect(here.contract, at) as client:
            assert (await client.create(trip)).id == "t/none//None"
            dated = {"tags": ["a", "b c"], "day": DAY} if more else {}
            want = f"t/{note}/a+b c/{DAY}" if given else "t/none//None"
            assert (await client.create(trip, **more, **dated)).id == want
            assert await client.move("t/1", place) == "t/1/1.5/none"
            assert await client.move("t/1", place, **more) == f"t/1/1.5/{note}"
            followed = (await client.create.reply(trip)).links.get("move")
            if followed is not None:
                assert (await followed(place, **more)).endswith(f"/1.5/{note}")
            assert (await client.get("t", **more)).id == f"t/{note}"
            with pytest.raises(here.full) as full:
                await client.get("full")
            assert vars(full.value) == vars(here.full(trip_id="full", **({"detail": "seats"} if given else {})))
            assert await client.rename("x") == "x/none/"
            beside = {"place": place} if more else {}
            assert await client.rename("x", **more, **beside) == (f"x/{note}/1.5" if given else "x/none/")
            assert await client.ping(**more) == note
            assert await client.settle() == "/none"
            assert await client.settle(trip, **more) == f"t/{note}"
            await client.arrived(trip)
            await client.left("t/1")
            await heard.until("arrived", "t", "none")
            await heard.until("left", "t/1", None)
            await client.arrived(trip, **more)
            await client.left("t/2", **beside)
            await heard.until("arrived", "t", note)
            await heard.until("left", "t/2", place if given else None)
            assert await (await client.receipt("t", place)) == "t/2.5/none"
            assert await (await client.receipt("t", place, **more)) == f"t/2.5/{note}"
            if there.banned is not None:
                await _banned(client, here)
        if fanout:
            await owner.publish(here.signals.created, trip)
            await heard.until("created", "t", "none", None)
            await owner.publish(here.signals.created, trip, **more, **beside)
            await heard.until("created", "t", note, place if given else None)
            async with owner.ask(here.signals.offers, trip, **more).within(WITHIN, enough=1) as answers:
                assert [answer.value async for answer in answers] == [f"t/{note}"]


async def _banned(client: Any, here: Version) -> None:
    """A fault that a later version added is an answer that names it."""
    if here.banned is not None:
        with pytest.raises(here.banned) as banned:
            await client.get("banned")
        assert banned.value == here.banned()
        return
    with pytest.raises(RemoteError, match="'Banned'") as raised:
        await client.get("banned")
    error = raised.value
    assert (error.answered, error.safety, error.retry_after) == (True, Safety.FAILED, None)
