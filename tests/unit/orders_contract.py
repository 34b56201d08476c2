"""The contract that the tests of repeats speak, one operation of each style."""
# mypy: disable-error-code="empty-body"

from __future__ import annotations

from msgspec import Struct

from quintet import Contract, Fault, async_request, event, notification, request, survey


class Receipt(Struct):
    order_id: str
    total: int


class SoldOut(Fault, status=409):
    left: int


class Orders(Contract, name="orders"):
    @request(http="POST /orders/{order_id}", faults=[SoldOut])
    async def place(self, order_id: str, amount: int) -> Receipt: ...

    @request(http="GET /orders/total")
    async def total(self) -> int: ...

    @notification
    async def note(self, order_id: str, amount: int) -> None: ...

    @async_request
    async def invoice(self, order_id: str, amount: int) -> Receipt: ...

    @event
    async def placed(self, order_id: str, amount: int) -> None: ...

    @survey
    async def offers(self, order_id: str, amount: int) -> Receipt: ...


SCHEMA = "CREATE TABLE IF NOT EXISTS ledger (order_id TEXT, amount INTEGER CHECK (amount > 0))"
