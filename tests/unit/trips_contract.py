"""The contracts that the tests of the core speak."""
# mypy: disable-error-code="empty-body"

from __future__ import annotations

from msgspec import Struct

from quintet import Contract, Fault, Http, Link, async_request, event, notification, request, survey


class Place(Struct):
    lat: float
    lon: float = 0.0


class Trip(Struct):
    id: str
    pickup: Place
    state: str = "new"


class NoSuchTrip(Fault, status=404):
    trip_id: str


class Busy(Fault, status=409):
    reason: str = "busy"


class Trips(Contract, name="trips", version="1.2", http_level=3):
    @request(
        http=Http("POST /trips", location="/trips/{id}"),
        links={"cancel": Link("cancel", when=lambda trip: trip.state == "new", fill={"trip_id": "id"})},
    )
    async def create(self, trip: Trip) -> Trip: ...

    @request(http="GET /trips/{trip_id}", faults=[NoSuchTrip])
    async def get(self, trip_id: str) -> Trip: ...

    @request(http="DELETE /trips/{trip_id}", faults=[NoSuchTrip, Busy])
    async def cancel(self, trip_id: str, *, reason: str = "") -> None: ...

    @notification(key="trip_id")
    async def pickup_requested(self, trip_id: str, place: Place) -> None: ...

    @async_request(faults=[NoSuchTrip])
    async def receipt(self, trip_id: str) -> str: ...

    @event(key="trip.id")
    async def created(self, trip: Trip) -> None: ...

    @survey
    async def offers(self, trip: Trip) -> int: ...


class Fares(Contract, name="fares"):
    @request
    async def fare(self, trip_id: str) -> float: ...
