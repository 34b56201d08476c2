"""Passenger Notification: hears what happens to a trip, and tells the passenger's phone."""

from quintet import Redelivery, Service
from taxi.contracts import Dispatch, Notice, Phone, Progress, Proposal, Trip, Trips

# A phone may be out of reach for a while: what was heard is delivered again until the phone has it.
service = Service(name="notification", redelivery=Redelivery(attempts=100, longest=2.0))
phone = service.uses(Phone)


@service.handles(Dispatch.driver_proposed)
async def driver_proposed(proposal: Proposal) -> None:
    text = f"{proposal.driver.title()} picks you up in {proposal.minutes} minutes: look for {proposal.car}"
    await phone.show(Notice(proposal.trip_id, Progress.DRIVER_PROPOSED, text))


@service.handles(Trips.completed)
async def completed(trip: Trip) -> None:
    text = f"You are there: {trip.destination}"
    await phone.show(Notice(trip.id, Progress.COMPLETED, text))
