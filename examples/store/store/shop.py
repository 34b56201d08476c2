"""Shop: accepts orders, and hands them to Fulfilment, be it there or not.

Whoever clicks twice, and whoever asks again since this process died before it answered, means one order: it is written
down once, and the message to Fulfilment is part of that commit. It leaves when the order is on disk, and only then.
"""

from quintet import Service, Store, current
from store.contracts import Fulfilment, Order, Shop

AT = "sqlite:///state/shop.db"
SCHEMA = """
CREATE TABLE IF NOT EXISTS accepted (order_id TEXT PRIMARY KEY, product_id TEXT NOT NULL, quantity INTEGER NOT NULL)
"""

service = Service(Shop, idempotent=Store(AT, schema=SCHEMA), outbox=AT)
fulfilment = service.uses(Fulfilment)


@service.handles(Shop.order)
async def order(order_id: str, product_id: str, quantity: int) -> Order:
    tables = current().store
    accepted = Order(order_id, product_id, quantity)
    insert = "INSERT INTO accepted VALUES (?, ?, ?) ON CONFLICT DO NOTHING RETURNING order_id"
    if await tables.execute(insert, order_id, product_id, quantity):
        service.outbox.add(tables, fulfilment.fulfil.using(id=order_id), accepted)
    return accepted
