"""Fulfilment: takes from the shelf, packs and sends, each order once in effect.

An order comes again where this process died with it in work, or where its customer clicked twice. The handler below is
written as if that could not be: what it does to its tables is one commit with the mark that the order was handled.
"""

import asyncio

from quintet import Service, Store, current
from store.contracts import Fulfilment, Order, Warehouse

SCHEMA = """
CREATE TABLE IF NOT EXISTS shelf (product_id TEXT PRIMARY KEY, pieces INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS parcel (order_id TEXT NOT NULL, product_id TEXT NOT NULL);
INSERT OR IGNORE INTO shelf VALUES ('b-1', 1000)
"""

service = Service(Fulfilment, concurrency=10, idempotent=Store("sqlite:///state/fulfilment.db", schema=SCHEMA))


@service.handles(Fulfilment.fulfil)
async def fulfil(order: Order) -> None:
    tables = current().store
    await tables.execute("UPDATE shelf SET pieces = pieces - ? WHERE product_id = ?", order.quantity, order.product_id)
    await asyncio.sleep(0.05)  # packing takes its time
    await tables.execute("INSERT INTO parcel VALUES (?, ?)", order.id, order.product_id)


@service.handles(Fulfilment.warehouse)
async def warehouse(product_id: str) -> Warehouse:
    tables = current().store
    parcels = await tables.execute("SELECT order_id FROM parcel WHERE product_id = ?", product_id)
    ((pieces,),) = await tables.execute("SELECT pieces FROM shelf WHERE product_id = ?", product_id)
    return Warehouse([order_id for (order_id,) in parcels], pieces)
