"""The outbox in a SQLite file that is opened through apsw, as Quintet's own stores are, or with them in memory."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import apsw
from msgspec.structs import astuple

from quintet import database
from quintet.clock import Clock
from quintet.errors import ConfigurationError, TransportError, Unavailable
from quintet.outbox import Kept
from quintet.outbox_file import FileBox
from quintet.store import UnitOfWork
from quintet.transport import Address
from quintet.wire import outbox as sql

A = TypeVar("A")
R = TypeVar("R")


class Keeper(FileBox):
    """sqlite:///relative.db or sqlite:////absolute.db, the file of the service's tables; memory://name for tests."""

    def __init__(self, address: Address, service: str, clock: Clock) -> None:
        super().__init__(address, service, clock)
        self._file = database.file_of(address).resolve() if address.scheme == "sqlite" else None
        self._topic = f"outbox {service}"
        self._opened: database.Database | None = None

    @property
    def _database(self) -> database.Database:
        if self._opened is None:
            raise Unavailable(f"{self!r} is not open")
        return self._opened

    async def do(self, step: Callable[[sql.Execute, A], R], argument: A) -> R:
        result: R = await self._database.submit(_DO, (step, argument))
        return result

    async def open(self, wake: Callable[[str], None]) -> None:
        await super().open(wake)
        self._opened = await database.open_database(self._file, self.address.host, database.mode_of(self.address))
        self.process = self._opened.address
        try:
            await self.do(sql.create, None)
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
                await opened.submit(_DO, (sql.leave, self._asked()))
            await opened.unlisten(self._topic, self._wake)
        finally:
            await database.close_database(opened)

    def add(self, transaction: Any, kept: Kept) -> None:
        if isinstance(transaction, UnitOfWork):
            transaction.enclose(self._database, sql.INSERT, *astuple(kept), notify=(self._topic, kept.channel))
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
        transaction.execute(sql.INSERT, astuple(kept))
        self._soon(kept.channel)

    async def look(self) -> Sequence[str] | None:
        channels = await self.do(_look, self._asked())
        if channels is None:
            await self._database.bury()  # should the instance that relays have died, that is known at the next look
        return channels


def _same(name: str, file: Path) -> bool:
    return name == str(file) or (bool(name) and Path(name).resolve() == file)


def _look(execute: sql.Execute, asked: sql.Look) -> list[str] | None:
    # others may have thought this process dead
    execute("INSERT OR IGNORE INTO quintet_process VALUES (?, ?)", asked.process, os.getpid())
    execute("DELETE FROM quintet_relay WHERE process <> '' AND process NOT IN (SELECT address FROM quintet_process)")
    return sql.look(execute, asked)


def _do(transaction: database.Transaction, wish: tuple[Callable[[sql.Execute, Any], Any], Any]) -> Any:
    step, argument = wish
    return step(transaction.execute, argument)


_DO: database.Work[Any, Any] = database.one_by_one(_do)
