"""The Dispatcher: asks the drivers around who can take a new trip, and proposes the best who answers in time."""

from apsw import Connection

from quintet import Redelivery, Service
from taxi.contracts import Dispatch, Proposal, Trip, Trips
from taxi.records import Records

TIME_TO_ANSWER = 1.0  # seconds

proposals = Records("proposals", Proposal)
# Where no driver answers, the trip is delivered again, and all are asked again: for as long as a passenger would wait.
service = Service(Dispatch, outbox=proposals.address, redelivery=Redelivery(attempts=100, longest=2.0))


class NoDriver(Exception):
    """Nobody wants this trip, or nobody said so in time."""


@service.handles(Trips.created)
async def created(trip: Trip) -> None:
    if await proposals.get(trip.id) is None:
        await proposals.add(trip.id, await best_offer(trip), tell)


def tell(transaction: Connection, proposal: Proposal) -> None:
    service.outbox.add(transaction, Dispatch.driver_proposed, proposal)


async def best_offer(trip: Trip) -> Proposal:
    async with service.ask(Dispatch.offers, trip).within(TIME_TO_ANSWER) as answers:
        offers = [answer async for answer in answers]
    if not offers:
        raise NoDriver(trip.id)
    best = min(offers, key=lambda answer: answer.value.minutes)
    return Proposal(trip.id, driver=best.sender, car=best.value.car, minutes=best.value.minutes)
