"""The outbox in SQLite and in PostgreSQL: rows a second, and how soon after its commit a message is handled.

Service, relay and receiver are one process, over the memory transport (what the relay itself can do) and over the
embedded broker, which has each message on disk before its row is deleted. A row holds 100 bytes of text. 5,000 rows are
added in one transaction; "relayed" is from its commit until the last of them is handled.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from pathlib import Path
from typing import Any, TypeAlias

import apsw
import uvloop
from msgspec import Struct

from benchmarks.brokers import Missing, broker
from benchmarks.figure import Figure
from quintet import Contract, Service, event, serve

ROWS, KEYS, LONE = 5_000, 50, 200
TEXT = "x" * 100


class Bench(Contract, name="outbox-bench"):
    @event
    async def apart(self, number: int, text: str) -> None: ...

    @event(key="number")
    async def keyed(self, number: int, text: str) -> None: ...


class Transaction(Struct):
    """How a user of the database begins one, adds to the outbox in it, and commits it."""

    begin: Callable[[], Awaitable[object]]
    add: Callable[[Any, int], Awaitable[object]]
    commit: Callable[[], Awaitable[object]]


@asynccontextmanager
async def sqlite(service: Service) -> AsyncIterator[Transaction]:
    with closing(apsw.Connection(service.outbox.address.removeprefix("sqlite:///"))) as connection:
        connection.set_busy_timeout(5000)

        async def begin() -> None:
            connection.execute("BEGIN IMMEDIATE")

        async def add(what: Any, number: int) -> None:
            service.outbox.add(connection, what, number, TEXT)

        async def commit() -> None:
            connection.execute("COMMIT")

        yield Transaction(begin, add, commit)


@asynccontextmanager
async def postgresql(service: Service) -> AsyncIterator[Transaction]:
    import psycopg

    async with await psycopg.AsyncConnection.connect(service.outbox.address) as connection:

        async def begin() -> None:
            await connection.execute("SELECT 1")

        async def add(what: Any, number: int) -> None:
            await service.outbox.add(connection, what, number, TEXT)

        yield Transaction(begin, add, connection.commit)


class Heard:
    """Counts what is handled."""

    def __init__(self) -> None:
        self.service = Service(name="ears")
        self.count = 0
        self._until = 0
        self._enough = asyncio.Event()
        for what in (Bench.apart, Bench.keyed):
            self.service.handles(what)(self._handle)

    async def _handle(self, number: int, text: str) -> None:  # noqa: ARG002
        self.count += 1
        if self.count == self._until:
            self._enough.set()

    async def so_many(self, count: int) -> None:
        self._until = count
        if self.count < count:
            self._enough.clear()
            await self._enough.wait()


Begin: TypeAlias = Callable[[Service], AbstractAsyncContextManager[Transaction]]


async def measure(name: str, outbox: str, transaction: Begin, at: str) -> list[Figure]:
    service, heard = Service(Bench, outbox=outbox), Heard()
    where = f"{name}, over {at.partition(':')[0].replace('sqlite', 'the embedded broker')}"
    async with serve(service, heard.service, at=at, connect={Bench: at}), transaction(service) as user:
        waits: list[float] = []
        for number in range(LONE):
            await user.begin()
            await user.add(Bench.apart, number)
            began = time.perf_counter()
            await user.commit()
            await heard.so_many(number + 1)
            waits.append(time.perf_counter() - began)
        figures = [
            Figure(f"{where}: one, from its commit to its handling, median", statistics.median(waits) * 1e3, "ms")
        ]
        for what, words in ((Bench.apart, "without keys"), (Bench.keyed, f"of {KEYS} keys")):
            began, before = time.perf_counter(), heard.count
            await user.begin()
            for number in range(ROWS):
                await user.add(what, number % KEYS)
            figures.append(Figure(f"{where}: added, {words}", ROWS / (time.perf_counter() - began), "rows/s"))
            began = time.perf_counter()
            await user.commit()
            await heard.so_many(before + ROWS)
            figures.append(Figure(f"{where}: relayed, {words}", ROWS / (time.perf_counter() - began), "rows/s"))
    return figures


def figures() -> list[Figure]:
    found: list[Figure] = []

    def both(name: str, outbox: str, transaction: Begin, folder: Path) -> None:
        for at in ("memory://", f"sqlite:///{folder}/broker.db"):
            found.extend(uvloop.run(measure(name, outbox, transaction, at)))

    with tempfile.TemporaryDirectory(dir=".") as folder:
        both("SQLite", f"sqlite:///{folder}/bench.db", sqlite, Path(folder))
    try:
        with broker("postgresql") as server, tempfile.TemporaryDirectory(dir=".") as folder:
            both("PostgreSQL", server.entry["address"], postgresql, Path(folder))
    except Missing as missing:
        found.append(Figure(f"PostgreSQL: {missing}", float("nan"), ""))
    return found
