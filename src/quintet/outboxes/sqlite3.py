"""The outbox in a SQLite file that the service uses through the standard library's sqlite3, aiosqlite or SQLAlchemy."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from msgspec.structs import astuple

from quintet.clock import Clock
from quintet.database import file_of, give_back, make_file, mode_of, reserve
from quintet.errors import ConfigurationError, TransportError, Unavailable
from quintet.outbox import Kept
from quintet.outbox_file import FileBox
from quintet.transport import Address
from quintet.wire import outbox as sql

A = TypeVar("A")
R = TypeVar("R")

OLDEST_SAFE = (3, 51, 3)  # in WAL mode: before, two that write and checkpoint at once can damage the file
BUSY_SECONDS = 5.0


class Keeper(FileBox):
    """sqlite3:///relative.db or sqlite3:////absolute.db.

    It is a kind of its own since apsw brings a SQLite of its own, and two libraries in one process do not see each
    other's locks on a file.
    """

    def __init__(self, address: Address, service: str, clock: Clock) -> None:
        super().__init__(address, service, clock)
        self._file = file_of(address)
        self._thread: ThreadPoolExecutor | None = None
        self._connection: sqlite3.Connection | None = None

    async def open(self, wake: Callable[[str], None]) -> None:
        await super().open(wake)
        reserve(self._file)
        thread = self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"outbox {self._file.name}")
        try:
            await self._run(thread, self._connect)
            await self.do(sql.create, None)
        except BaseException:
            await self.close()
            raise

    def _connect(self) -> None:
        make_file(self._file, mode_of(self.address))
        connection = sqlite3.connect(self._file, BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        self._connection = connection
        ((mode,),) = connection.execute("PRAGMA journal_mode").fetchall()
        if mode == "wal" and sqlite3.sqlite_version_info < OLDEST_SAFE:
            raise ConfigurationError(
                f"{self._file} is in WAL mode, which SQLite {sqlite3.sqlite_version} can damage where two connections"
                " write (fixed in 3.51.3): set PRAGMA journal_mode = DELETE, or use apsw and an outbox at sqlite://"
            )

    async def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return

        def leave() -> None:
            connection, self._connection = self._connection, None
            if connection is not None:
                with contextlib.suppress(sqlite3.Error):  # then the lease ends it
                    _transact(connection, sql.leave, self._asked())
                connection.close()

        await asyncio.get_running_loop().run_in_executor(thread, leave)
        thread.shutdown()
        give_back(self._file)

    def add(self, transaction: Any, kept: Kept) -> Awaitable[None] | None:
        if not isinstance(transaction, sqlite3.Connection) and not hasattr(transaction, "commit"):
            raise ConfigurationError(
                f"{self!r}: give it a sqlite3.Connection (or aiosqlite's), not {transaction!r};"
                " for current().store and apsw the outbox is at sqlite://..."
            )
        written: Any = transaction.execute(sql.INSERT, astuple(kept))
        if isinstance(transaction, sqlite3.Connection):
            self._soon(kept.channel)
            return None
        return self._ended(written, kept.channel)

    async def _ended(self, execution: Awaitable[object], channel: str) -> None:
        await execution
        self._soon(channel)

    # on the thread

    async def do(self, step: Callable[[sql.Execute, A], R], argument: A) -> R:
        thread, connection = self._thread, self._connection
        if thread is None or connection is None:
            raise Unavailable(f"{self!r} is not open")
        return await self._run(thread, lambda: _transact(connection, step, argument))

    async def _run(self, thread: ThreadPoolExecutor, work: Callable[[], R]) -> R:
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, work)
        except sqlite3.Error as error:
            raise TransportError(f"{self._file}: SQLite says {error}") from error


def _transact(connection: sqlite3.Connection, step: Callable[[sql.Execute, A], R], argument: A) -> R:
    connection.execute("BEGIN IMMEDIATE")
    try:
        result = step(lambda statement, *values: connection.execute(statement, values).fetchall(), argument)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return result
