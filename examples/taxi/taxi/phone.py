"""The passenger's phone: the story of one ride, told from top to bottom.

`ride` works on a durable message, which comes again where this process was killed or anything failed: then the story
starts over, and every step may be done twice, since all of them carry the trip's id.
"""

import asyncio

from quintet import Redelivery, Service, current
from taxi.contracts import Billing, NewTrip, Notice, Phone, Progress, Receipt, TripCancelled, Trips
from taxi.records import Records

service = Service(Phone, redelivery=Redelivery(attempts=100, longest=2.0))
trips = service.uses(Trips)
billing = service.uses(Billing)

shown = Records("screen", str)
news = asyncio.Condition()


@service.handles(Phone.ride)
async def ride(passenger_id: str, pickup: str, destination: str) -> Receipt:
    trip_id = current().id  # the same on every repeat
    await trips.pickup_requested(trip_id, pickup)
    trip = await trips.create(NewTrip(trip_id, passenger_id, pickup, destination))
    if trip.progress is Progress.CANCELLED:
        raise TripCancelled(trip_id=trip_id)
    await told(trip_id, Progress.DRIVER_PROPOSED)
    await told(trip_id, Progress.COMPLETED)
    receipt = await billing.receipt.using(id=f"receipt-{trip_id}")(trip_id)  # of the same id, it is the same receipt
    return await receipt.wait(timeout=20.0)


async def told(trip_id: str, progress: Progress) -> None:
    """Waits until this has been shown. Raises TimeoutError, and then the ride starts over."""
    async with asyncio.timeout(5.0), news:
        while await shown.get(f"{trip_id} {progress.value}") is None:
            await news.wait()


@service.handles(Phone.show)
async def show(notice: Notice) -> None:
    await shown.add(f"{notice.trip_id} {notice.progress.value}", notice.text)
    async with news:
        news.notify_all()


@service.handles(Phone.screen)
async def screen() -> list[str]:
    return await shown.all()
