"""A shop whose orders are rows and whose news of them is sent by its outbox; as a program it is there to be killed."""
# mypy: disable-error-code="empty-body"

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import Awaitable, Callable

import apsw

from quintet import Contract, Service, async_request, event, notification, request, serve
from quintet.outbox import Settled
from quintet.outboxes.sqlite import Keeper

TABLE = "CREATE TABLE IF NOT EXISTS orders (id TEXT PRIMARY KEY)"


class Shop(Contract, name="shop"):
    @request(http="POST /orders/{order_id}")
    async def place(self, order_id: str, amount: int) -> int: ...

    @request(http="GET /orders")
    async def look(self) -> int: ...

    @event(key="order_id")
    async def placed(self, order_id: str, amount: int) -> None: ...

    @event
    async def gossip(self, text: str) -> None: ...


class Mail(Contract, name="mail"):
    @notification(http="POST /mails/{to}", expires=60.0)
    async def send(self, to: str, text: str) -> None: ...

    @async_request(http="POST /letters")
    async def letter(self, to: str) -> str: ...

    @request
    async def ask(self, to: str) -> str: ...


async def orders_until_killed(outbox: str, broker: str, name: str, dies: str) -> None:
    """Writes orders, a third of which it takes back, each with its news; `dies`: by itself, before a row that was sent
    is deleted."""
    shop = Service(Shop, outbox=outbox)
    shop.handles(Shop.place)(never)
    shop.handles(Shop.look)(look)
    if dies:

        async def turn(self: Keeper, channel: str, settled: Settled, limit: int) -> object:
            if settled.sent:
                os.kill(os.getpid(), signal.SIGKILL)
            return await turned(self, channel, settled, limit)

        turned, Keeper.turn = Keeper.turn, turn  # type: ignore[method-assign,assignment]
    chance = random.Random(name)
    async with serve(shop, at=broker):
        write = await postgresql(outbox, shop) if outbox.startswith("postgresql") else sqlite(outbox, shop)
        for number in range(1_000_000):
            ids = [f"{name}-{number}-{part}" for part in range(3)]
            await write(ids, number, "ROLLBACK" if chance.random() < 0.3 else "COMMIT")
            await asyncio.sleep(0.001)
            if number == 0:
                print("at work", flush=True)


Write = Callable[[list[str], int, str], Awaitable[None]]


def sqlite(outbox: str, shop: Service) -> Write:
    connection = apsw.Connection(outbox.removeprefix("sqlite:///"))
    connection.set_busy_timeout(5000)

    async def write(ids: list[str], number: int, end: str) -> None:
        connection.execute("BEGIN IMMEDIATE")
        for order_id in ids:
            connection.execute("INSERT INTO orders VALUES (?)", [order_id])
            shop.outbox.add(connection, Shop.placed, order_id, number)
        connection.execute(end)

    return write


async def postgresql(outbox: str, shop: Service) -> Write:
    from psycopg import AsyncConnection

    connection = await AsyncConnection.connect(outbox)

    async def write(ids: list[str], number: int, end: str) -> None:
        for order_id in ids:
            await connection.execute("INSERT INTO orders VALUES (%s)", [order_id])
            await shop.outbox.add(connection, Shop.placed, order_id, number)
        await (connection.commit() if end == "COMMIT" else connection.rollback())

    return write


async def never(order_id: str, amount: int) -> int:
    raise AssertionError("nobody calls it")


async def look() -> int:
    return 0


if __name__ == "__main__":
    asyncio.run(orders_until_killed(*sys.argv[1:]))
