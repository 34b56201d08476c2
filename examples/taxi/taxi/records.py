"""A service's own memory: records by id, each on disk before the call returns, so that no kill takes it away."""

import asyncio
import sqlite3
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from msgspec import json

T = TypeVar("T")


class Records(Generic[T]):
    """Records of one type, in a database file of their own in the folder `state`."""

    def __init__(self, name: str, kind: type[T]) -> None:
        self._file = Path("state", f"{name}.db")
        self._encode = json.Encoder().encode
        self._decode = json.Decoder(kind).decode

    async def get(self, record_id: str) -> T | None:
        return await asyncio.to_thread(self._update, record_id, lambda old: old)

    async def add(self, record_id: str, record: T) -> T:
        """Adds it, unless there is one of that id already; gives back the one that is kept."""
        kept = await asyncio.to_thread(self._update, record_id, lambda old: record if old is None else old)
        return record if kept is None else kept

    async def change(self, record_id: str, change: Callable[[T], T]) -> T | None:
        """Changes it, with nobody in between, and gives back the changed one; None where there is none of that id."""
        return await asyncio.to_thread(self._update, record_id, lambda old: None if old is None else change(old))

    async def all(self) -> list[T]:
        """In the order in which they were added."""
        return await asyncio.to_thread(self._all)

    def _update(self, record_id: str, update: Callable[[T | None], T | None]) -> T | None:
        with self._transaction() as database:
            row = database.execute("SELECT body FROM records WHERE id = ?", [record_id]).fetchone()
            old = self._decode(row[0]) if row else None
            new = update(old)
            if new is not None and new != old:
                database.execute(
                    "INSERT INTO records VALUES (?1, ?2) ON CONFLICT (id) DO UPDATE SET body = ?2",
                    [record_id, self._encode(new)],
                )
            return new

    def _all(self) -> list[T]:
        with self._transaction() as database:
            return [self._decode(body) for (body,) in database.execute("SELECT body FROM records ORDER BY rowid")]

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection, None, None]:
        self._file.parent.mkdir(exist_ok=True)
        with closing(sqlite3.connect(self._file, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("CREATE TABLE IF NOT EXISTS records (id TEXT UNIQUE NOT NULL, body BLOB NOT NULL)")
            yield database
            database.execute("COMMIT")  # left out where something was raised: then nothing has happened
