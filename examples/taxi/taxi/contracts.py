"""What the services of the taxi company promise each other: agreed on first, before any code."""
# mypy: disable-error-code="empty-body"
# pyright: reportReturnType=false

from decimal import Decimal
from enum import Enum

from msgspec import Struct

from quintet import Contract, Fault, Http, Link, async_request, event, notification, request, survey


class Passenger(Struct, frozen=True):
    id: str
    name: str
    active: bool = True


class Progress(Enum):
    """How far a trip has come. It only ever moves on."""

    REQUESTED = "requested"
    DRIVER_PROPOSED = "driver proposed"
    COMPLETED = "completed"
    CANCELLED = "cancelled"


class NewTrip(Struct, frozen=True):
    """Its id is dealt by the phone: the same request, sent again, is the same trip."""

    id: str
    passenger_id: str
    pickup: str
    destination: str


class Trip(Struct, frozen=True):
    id: str
    passenger_id: str
    pickup: str
    destination: str
    progress: Progress = Progress.REQUESTED
    driver: str = ""


class Offer(Struct, frozen=True):
    """What a driver answers to the dispatcher."""

    minutes: int
    car: str


class Proposal(Struct, frozen=True):
    trip_id: str
    driver: str
    minutes: int
    car: str


class Receipt(Struct, frozen=True):
    trip_id: str
    passenger_id: str
    destination: str
    driver: str
    total: Decimal


class Notice(Struct, frozen=True):
    """What a phone shows when a trip has come so far."""

    trip_id: str
    progress: Progress
    text: str


class NoSuchPassenger(Fault, status=404):
    passenger_id: str


class PassengerInactive(Fault, status=403):
    passenger_id: str


class NoSuchTrip(Fault, status=404):
    trip_id: str


class TooLateToCancel(Fault, status=409):
    trip_id: str
    progress: Progress


class TripCancelled(Fault, status=410):
    trip_id: str


class TripNotOver(Fault, status=409):
    trip_id: str
    progress: Progress


def may_be_cancelled(trip: Trip) -> bool:
    return trip.progress in (Progress.REQUESTED, Progress.DRIVER_PROPOSED)


class Passengers(Contract, name="passengers", version="1.0"):
    """Passenger Management: who may ride."""

    @request(http="GET /passengers/{passenger_id}", faults=[NoSuchPassenger])
    async def get(self, passenger_id: str) -> Passenger: ...


class Trips(Contract, name="trips", version="1.0", http_level=3):
    """Trip Management: what becomes of a trip, from the wish to the arrival."""

    @notification(http="POST /pickups")
    async def pickup_requested(self, trip_id: str, place: str) -> None:
        """Somebody wants to be picked up."""

    @request(
        http=Http("POST /trips", location="/trips/{id}"),
        faults=(NoSuchPassenger, PassengerInactive),
        links={
            "trip": Link("get", fill={"trip_id": "id"}),
            "cancel": Link("cancel", when=may_be_cancelled, fill={"trip_id": "id"}),
        },
        idempotent=True,
    )
    async def create(self, new: NewTrip) -> Trip:
        """Creates the trip."""

    @request(
        http="GET /trips/{trip_id}",
        faults=[NoSuchTrip],
        links={"cancel": Link("cancel", when=may_be_cancelled, fill={"trip_id": "id"})},
    )
    async def get(self, trip_id: str) -> Trip:
        """The trip as it stands."""

    @request(http="DELETE /trips/{trip_id}", faults=(NoSuchTrip, TooLateToCancel))
    async def cancel(self, trip_id: str) -> Trip:
        """Cancels the trip."""

    @notification(http="POST /trips/{trip_id}/arrival", key="trip_id")
    async def arrived(self, trip_id: str, driver: str) -> None:
        """The driver says: we are there."""

    @event(key="trip.id")
    async def created(self, trip: Trip) -> None: ...

    @event(key="trip.id")
    async def completed(self, trip: Trip) -> None: ...


class Dispatch(Contract, name="dispatch", version="1.0"):
    """The Dispatcher: brings a trip and a driver together."""

    @survey
    async def offers(self, trip: Trip) -> Offer:
        """Who can take this trip, and how soon? A driver who does not want to declines."""

    @event(key="proposal.trip_id")
    async def driver_proposed(self, proposal: Proposal) -> None: ...


class Billing(Contract, name="billing", version="1.0"):
    """Billing: what a trip costs."""

    @async_request(http="POST /receipts", faults=(NoSuchTrip, TripNotOver), key="trip_id")
    async def receipt(self, trip_id: str) -> Receipt:
        """The receipt of a trip that is over: made in its own time, kept to be collected."""


class Phone(Contract, name="phone", version="1.0"):
    """The passenger's phone."""

    @async_request(http="POST /rides", faults=(NoSuchPassenger, PassengerInactive, TripCancelled))
    async def ride(self, passenger_id: str, pickup: str, destination: str) -> Receipt:
        """The passenger's finger: take me there. The answer comes when the ride is over."""

    @notification(http="POST /notices", key="notice.trip_id")
    async def show(self, notice: Notice) -> None:
        """A push message."""

    @request(http="GET /screen")
    async def screen(self) -> list[str]:
        """What it shows, oldest line first."""
