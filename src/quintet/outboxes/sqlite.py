"""The outbox in a SQLite file that is opened through apsw, as Quintet's own stores are, or with them in memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import apsw

from quintet import database
from quintet.clock import Clock
from quintet.errors import ConfigurationError, TransportError, Unavailable
from quintet.message import new_id
from quintet.outbox import BATCH_BYTES, GROUP, Box, Kept, Row, Settled
from quintet.store import UnitOfWork
from quintet.transport import Address, ChannelState
from quintet.wire import outbox as sql


class Keeper(Box):
    """sqlite:///relative.db or sqlite:////absolute.db, the file of the service's tables; memory://name for tests."""

    def __init__(self, address: Address, service: str, clock: Clock) -> None:
        super().__init__(address, service, clock)
        self._file = database.file_of(address).resolve() if address.scheme == "sqlite" else None
        self._holder = new_id()
        self._topic = f"outbox {service}"
        self._opened: database.Database | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: Callable[[str], None] = _nobody

    @property
    def _database(self) -> database.Database:
        if self._opened is None:
            raise Unavailable(f"{self!r} is not open")
        return self._opened

    async def open(self, wake: Callable[[str], None]) -> None:
        self._wake, self._loop = wake, asyncio.get_running_loop()
        self._opened = await database.open_database(self._file, shared=self.address.host)
        try:
            await self._opened.submit(_CREATE, None)
            await self._opened.listen(self._topic, wake)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        if self._opened is None:
            return
        opened, self._opened = self._opened, None
        try:
            with contextlib.suppress(TransportError):  # then the lease ends it
                await opened.submit(_LEAVE, self._asked(opened))
            await opened.unlisten(self._topic, self._wake)
        finally:
            await database.close_database(opened)

    def add(self, transaction: Any, kept: Kept) -> None:
        values = (self.service, kept.channel, kept.key, kept.id, kept.added, kept.expires, kept.message)
        if isinstance(transaction, UnitOfWork):
            transaction.enclose(self._database, sql.INSERT, *values, notify=(self._topic, kept.channel))
            return
        if isinstance(transaction, sqlite3.Connection):
            raise ConfigurationError(
                f"{self!r}: a sqlite3.Connection writes through another SQLite library than apsw, and two libraries in"
                f" one process do not see each other's locks: what they write gets lost. Name the outbox sqlite3://..."
                " where your transactions are the standard library's, or open the file by apsw"
            )
        if not isinstance(transaction, apsw.Connection):
            raise ConfigurationError(f"{self!r}: give it current().store or an apsw.Connection, not {transaction!r}")
        if not self._file or not _same(transaction.filename, self._file):
            raise ConfigurationError(f"{self!r}: this is a connection to {transaction.filename or 'a file in memory'}")
        transaction.execute(sql.INSERT, values)
        # The relay's look waits for the lock that the user's transaction holds by now, and so for its end.
        assert self._loop is not None, "a running service has opened it"  # noqa: S101
        with contextlib.suppress(RuntimeError):  # that loop has ended: the next start sends it
            self._loop.call_soon_threadsafe(self._wake, kept.channel)

    def _asked(self, opened: database.Database) -> sql.Look:
        return sql.Look(self.service, self._holder, opened.address, self.clock.wall())

    async def look(self) -> Sequence[str] | None:
        opened = self._database
        channels = await opened.submit(_LOOK, self._asked(opened))
        if channels is None:
            await opened.bury()  # should the instance that relays have died, that is known at the next look
        return channels

    async def turn(self, channel: str, settled: Settled, limit: int) -> Sequence[Row]:
        opened = self._database
        wish = sql.Turn(self._asked(opened), channel, settled.sent, settled.refused, limit, BATCH_BYTES)
        return [Row(*row) for row in await opened.submit(_TURN, wish)]

    async def channels(self) -> Sequence[ChannelState]:
        now, counted = self.clock.wall(), await self._database.submit(_COUNT, self.service)
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


def _same(name: str, file: Path) -> bool:
    return name == str(file) or (bool(name) and Path(name).resolve() == file)


def _create(transaction: database.Transaction, _: None) -> None:
    for statement in sql.SCHEMA:
        transaction.execute(statement)


def _look(transaction: database.Transaction, asked: sql.Look) -> list[str] | None:
    # others may have thought this process dead
    transaction.execute("INSERT OR IGNORE INTO quintet_process VALUES (?, ?)", transaction.address, os.getpid())
    transaction.execute(
        "DELETE FROM quintet_relay WHERE process <> '' AND process NOT IN (SELECT address FROM quintet_process)"
    )
    return sql.look(transaction.execute, asked)


def _turn(transaction: database.Transaction, wish: sql.Turn) -> list[Any]:
    return sql.turn(transaction.execute, wish)


def _count(transaction: database.Transaction, service: str) -> list[Any]:
    return sql.count(transaction.execute, service)


def _leave(transaction: database.Transaction, asked: sql.Look) -> None:
    sql.leave(transaction.execute, asked)


_CREATE, _LEAVE = database.one_by_one(_create), database.one_by_one(_leave)
_LOOK, _TURN, _COUNT = database.one_by_one(_look), database.one_by_one(_turn), database.one_by_one(_count)
