"""Billing: makes the receipt of a trip that is over."""

import asyncio
from decimal import Decimal

from quintet import Redelivery, Service
from taxi.contracts import Billing, Progress, Receipt, TripNotOver, Trips

PRICE = Decimal("14.50")  # of any ride: this town is small
TIME_TO_PRINT = 0.5  # seconds

# Where Trip Management cannot be reached, the request is delivered again: the receipt is late, but it comes.
service = Service(Billing, redelivery=Redelivery(attempts=100, longest=2.0))
trips = service.uses(Trips)


@service.handles(Billing.receipt)
async def receipt(trip_id: str) -> Receipt:
    trip = await trips.get(trip_id)
    if trip.progress is not Progress.COMPLETED:
        raise TripNotOver(trip_id=trip_id, progress=trip.progress)
    await asyncio.sleep(TIME_TO_PRINT)
    return Receipt(trip.id, trip.passenger_id, trip.destination, trip.driver, PRICE)
