"""Passenger Management: knows who may ride."""

from quintet import Service
from taxi.contracts import NoSuchPassenger, Passenger, Passengers

service = Service(Passengers)

KNOWN = {passenger.id: passenger for passenger in [Passenger("p-1", "Ada"), Passenger("p-2", "Grace", active=False)]}


@service.handles(Passengers.get)
async def get(passenger_id: str) -> Passenger:
    if passenger_id not in KNOWN:
        raise NoSuchPassenger(passenger_id=passenger_id)
    return KNOWN[passenger_id]
