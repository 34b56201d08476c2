"""A service's own memory: records by id, each on disk before the call returns, so that no kill takes it away."""

import asyncio
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from apsw import Connection
from msgspec import json

T = TypeVar("T")


def nobody(transaction: Connection, record: object) -> None:
    """Where nobody is to be told of a record."""


class Records(Generic[T]):
    """Records of one type, in a database file of their own in the folder `state`.

    Who is to be told of a new record or a changed one: `tell` is called with it within the transaction, for
    `service.outbox.add(transaction, ...)`. So the record is written and others are told, or neither.
    """

    def __init__(self, name: str, kind: type[T]) -> None:
        self._file = Path("state", f"{name}.db")
        self.address = f"sqlite:///{self._file}"
        self._encode = json.Encoder().encode
        self._decode = json.Decoder(kind).decode

    async def get(self, record_id: str) -> T | None:
        return await asyncio.to_thread(self._update, record_id, lambda old: old, nobody)

    async def add(self, record_id: str, record: T, tell: Callable[[Connection, T], None] = nobody) -> T:
        """Adds it, unless there is one of that id already; gives back the one that is kept."""
        kept = await asyncio.to_thread(self._update, record_id, lambda old: record if old is None else old, tell)
        return record if kept is None else kept

    async def change(
        self, record_id: str, change: Callable[[T], T], tell: Callable[[Connection, T], None] = nobody
    ) -> T | None:
        """Changes it, with nobody in between, and gives back the changed one; None where there is none of that id."""
        return await asyncio.to_thread(self._update, record_id, lambda old: None if old is None else change(old), tell)

    async def all(self) -> list[T]:
        """In the order in which they were added."""
        return await asyncio.to_thread(self._all)

    def _update(
        self, record_id: str, update: Callable[[T | None], T | None], tell: Callable[[Connection, T], None]
    ) -> T | None:
        with self._transaction() as database:
            row = database.execute("SELECT body FROM records WHERE id = ?", [record_id]).fetchone()
            old = self._decode(row[0]) if row else None
            new = update(old)
            if new is not None and new != old:
                database.execute(
                    "INSERT INTO records VALUES (?1, ?2) ON CONFLICT (id) DO UPDATE SET body = ?2",
                    [record_id, self._encode(new)],
                )
                tell(database, new)
            return new

    def _all(self) -> list[T]:
        with self._transaction() as database:
            return [self._decode(body) for (body,) in database.execute("SELECT body FROM records ORDER BY rowid")]

    @contextmanager
    def _transaction(self) -> Generator[Connection, None, None]:
        self._file.parent.mkdir(exist_ok=True)
        with closing(Connection(str(self._file))) as database:
            database.set_busy_timeout(5000)
            database.execute("BEGIN IMMEDIATE")
            database.execute("CREATE TABLE IF NOT EXISTS records (id TEXT UNIQUE NOT NULL, body BLOB NOT NULL)")
            yield database
            database.execute("COMMIT")  # left out where something was raised: then nothing has happened
