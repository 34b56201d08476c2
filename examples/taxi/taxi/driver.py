"""The drivers: each a service of its own. One is near, one is too slow to answer, one declines."""

import asyncio

from quintet import Declined, Redelivery, Service
from taxi.contracts import Dispatch, Offer, Proposal, Trip, Trips

LENGTH_OF_A_RIDE = 0.5  # seconds: this town is small


def driver(name: str, car: str, minutes: int, *, thinks: float = 0.0, never_to: str = "") -> Service:
    """A driver who is so many minutes away, thinks for so many seconds before answering, and has a dislike."""
    service = Service(name=name, redelivery=Redelivery(attempts=100, longest=2.0))
    trips = service.uses(Trips)

    @service.handles(Dispatch.offers)
    async def offers(trip: Trip) -> Offer:
        await asyncio.sleep(thinks)
        if trip.destination == never_to:
            raise Declined
        return Offer(minutes, car)

    @service.handles(Dispatch.driver_proposed)
    async def driver_proposed(proposal: Proposal) -> None:
        if proposal.driver == service.name:
            await asyncio.sleep(LENGTH_OF_A_RIDE)
            await trips.arrived(proposal.trip_id, service.name)

    return service


maria = driver("maria", "a red Saab", minutes=4)
viktor = driver("viktor", "a white Volvo", minutes=2, thinks=1.5)
olga = driver("olga", "a blue Lada", minutes=3, never_to="Opera")
