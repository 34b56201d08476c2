"""The outbox in a SQLite file that the service uses through the standard library's sqlite3, aiosqlite or SQLAlchemy."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from quintet.clock import Clock
from quintet.database import file_of, is_open
from quintet.errors import ConfigurationError, TransportError, Unavailable
from quintet.message import new_id
from quintet.outbox import BATCH_BYTES, GROUP, Box, Kept, Row, Settled
from quintet.transport import Address, ChannelState
from quintet.wire import outbox as sql

A = TypeVar("A")
R = TypeVar("R")

OLDEST_SAFE = (3, 51, 3)  # in WAL mode: before, two that write and checkpoint at once can damage the file
BUSY_SECONDS = 5.0


class Keeper(Box):
    """sqlite3:///relative.db or sqlite3:////absolute.db.

    It is a kind of its own since apsw brings a SQLite of its own, and two libraries in one process do not see each
    other's locks on a file.
    """

    def __init__(self, address: Address, service: str, clock: Clock) -> None:
        super().__init__(address, service, clock)
        self._file = file_of(address)
        self._holder = new_id()
        self._thread: ThreadPoolExecutor | None = None
        self._connection: sqlite3.Connection | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: Callable[[str], None] = _nobody

    async def open(self, wake: Callable[[str], None]) -> None:
        self._wake, self._loop = wake, asyncio.get_running_loop()
        if is_open(self._file):
            raise ConfigurationError(
                f"{self!r}: {self._file} is open in this process through apsw (a broker, an inbox, answers or an"
                " idempotent store), and two SQLite libraries do not see each other's locks: take another file for one"
            )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"outbox {self._file.name}")
        try:
            await self._run(self._connect, None)
        except BaseException:
            await self.close()
            raise

    def _connect(self, _: None) -> None:
        self._file.parent.mkdir(exist_ok=True)
        connection = sqlite3.connect(self._file, BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        self._connection = connection
        ((mode,),) = connection.execute("PRAGMA journal_mode").fetchall()
        if mode == "wal" and sqlite3.sqlite_version_info < OLDEST_SAFE:
            raise ConfigurationError(
                f"{self._file} is in WAL mode, which SQLite {sqlite3.sqlite_version} can damage where two connections"
                " write (fixed in 3.51.3): set PRAGMA journal_mode = DELETE, or use apsw and an outbox at sqlite://"
            )
        self._transact(lambda execute, _: [execute(statement) for statement in sql.SCHEMA], None)

    async def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        connection, self._connection = self._connection, None

        def leave() -> None:
            if connection is not None:
                with contextlib.suppress(sqlite3.Error):  # then the lease ends it
                    connection.execute("DELETE FROM quintet_relay WHERE holder = ?", [self._holder])
                connection.close()

        await asyncio.get_running_loop().run_in_executor(thread, leave)
        thread.shutdown()

    def add(self, transaction: Any, kept: Kept) -> Awaitable[None] | None:
        values = (self.service, kept.channel, kept.key, kept.id, kept.added, kept.expires, kept.message)
        if not isinstance(transaction, sqlite3.Connection) and not hasattr(transaction, "commit"):
            raise ConfigurationError(
                f"{self!r}: give it a sqlite3.Connection (or aiosqlite's), not {transaction!r};"
                " for current().store and apsw the outbox is at sqlite://..."
            )
        written: Any = transaction.execute(sql.INSERT, values)
        if isinstance(transaction, sqlite3.Connection):
            self._soon(kept.channel)
            return None
        return self._ended(written, kept.channel)

    async def _ended(self, execution: Awaitable[object], channel: str) -> None:
        await execution
        self._soon(channel)

    def _soon(self, channel: str) -> None:
        # The relay's look waits for the lock that the user's transaction holds by now, and so for its end.
        assert self._loop is not None, "a running service has opened it"  # noqa: S101
        with contextlib.suppress(RuntimeError):  # that loop has ended: the next start sends it
            self._loop.call_soon_threadsafe(self._wake, channel)

    # on the thread

    async def _run(self, work: Callable[[A], R], argument: A) -> R:
        if self._thread is None:
            raise Unavailable(f"{self!r} is not open")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, argument)
        except sqlite3.Error as error:
            raise TransportError(f"{self._file}: SQLite says {error}") from error

    def _transact(self, work: Callable[[sql.Execute, A], R], argument: A) -> R:
        connection = self._connection
        assert connection is not None, "it is open"  # noqa: S101
        connection.execute("BEGIN IMMEDIATE")
        try:
            result = work(lambda statement, *values: connection.execute(statement, values).fetchall(), argument)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return result

    def _asked(self) -> sql.Look:
        return sql.Look(self.service, self._holder, "", self.clock.wall())

    async def look(self) -> Sequence[str] | None:
        return await self._run(lambda asked: self._transact(sql.look, asked), self._asked())

    async def turn(self, channel: str, settled: Settled, limit: int) -> Sequence[Row]:
        wish = sql.Turn(self._asked(), channel, settled.sent, settled.refused, limit, BATCH_BYTES)
        return [Row(*row) for row in await self._run(lambda wish: self._transact(sql.turn, wish), wish)]

    async def channels(self) -> Sequence[ChannelState]:
        now = self.clock.wall()
        counted = await self._run(lambda service: self._transact(sql.count, service), self.service)
        return [
            ChannelState(
                channel=channel,
                group=GROUP,
                waiting=waiting,
                in_work=0,
                dead=dead,
                oldest=None if oldest is None else max(0.0, now - oldest),
            )
            for channel, waiting, dead, oldest in counted
        ]


def _nobody(channel: str) -> None:
    """Where it is not open yet."""
