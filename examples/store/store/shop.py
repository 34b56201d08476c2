"""Shop: accepts orders, and hands them to Fulfilment, be it there or not."""

from quintet import Policy, Service
from store.contracts import Fulfilment, Order, Shop

service = Service(Shop)
fulfilment = service.uses(Fulfilment, policy=Policy(timeout=5.0))  # a disk may be busy


@service.handles(Shop.order)
async def order(order_id: str, product_id: str, quantity: int) -> Order:
    accepted = Order(order_id, product_id, quantity)
    await fulfilment.fulfil.using(id=order_id)(accepted)  # it is on disk; of the same id, it is the same order
    return accepted
