"""Trip Management: creates trips, follows them to the end, and tells the others what becomes of them.

Whatever arrives may arrive twice, and this process may be killed between any two lines. So what becomes of a trip is
written down and told to the others in one transaction: when a handler is repeated, both have happened, or neither.
"""

from apsw import Connection
from msgspec.structs import replace

from quintet import Service
from taxi.contracts import (
    Dispatch,
    NewTrip,
    NoSuchTrip,
    PassengerInactive,
    Passengers,
    Progress,
    Proposal,
    TooLateToCancel,
    Trip,
    Trips,
    may_be_cancelled,
)
from taxi.records import Records

trips = Records("trips", Trip)
pickups = Records("pickups", str)
service = Service(Trips, outbox=trips.address)
passengers = service.uses(Passengers)


@service.handles(Trips.pickup_requested)
async def pickup_requested(trip_id: str, place: str) -> None:
    await pickups.add(trip_id, place)


@service.handles(Trips.create)
async def create(new: NewTrip) -> Trip:
    passenger = await passengers.get(new.passenger_id)
    if not passenger.active:
        raise PassengerInactive(passenger_id=passenger.id)
    return await trips.add(new.id, Trip(new.id, passenger.id, new.pickup, new.destination), tell_created)


def tell_created(transaction: Connection, trip: Trip) -> None:
    service.outbox.add(transaction, Trips.created, trip)


@service.handles(Trips.get)
async def get(trip_id: str) -> Trip:
    trip = await trips.get(trip_id)
    if trip is None:
        raise NoSuchTrip(trip_id=trip_id)
    return trip


@service.handles(Trips.cancel)
async def cancel(trip_id: str) -> Trip:
    def cancelled(trip: Trip) -> Trip:
        return replace(trip, progress=Progress.CANCELLED) if may_be_cancelled(trip) else trip

    trip = await trips.change(trip_id, cancelled)
    if trip is None:
        raise NoSuchTrip(trip_id=trip_id)
    if trip.progress is not Progress.CANCELLED:
        raise TooLateToCancel(trip_id=trip_id, progress=trip.progress)
    return trip


@service.handles(Dispatch.driver_proposed)
async def driver_proposed(proposal: Proposal) -> None:
    def proposed(trip: Trip) -> Trip:
        if trip.progress is not Progress.REQUESTED:
            return trip
        return replace(trip, progress=Progress.DRIVER_PROPOSED, driver=proposal.driver)

    await trips.change(proposal.trip_id, proposed)


@service.handles(Trips.arrived)
async def arrived(trip_id: str, driver: str) -> None:
    def completed(trip: Trip) -> Trip:
        if trip.progress in (Progress.COMPLETED, Progress.CANCELLED):
            return trip
        return replace(trip, progress=Progress.COMPLETED, driver=driver)

    await trips.change(trip_id, completed, tell_completed)


def tell_completed(transaction: Connection, trip: Trip) -> None:
    service.outbox.add(transaction, Trips.completed, trip)
