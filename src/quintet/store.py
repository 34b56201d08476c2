"""What outlives a call: the answers of async requests, kept where every instance of a service finds them."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

from msgspec import Struct, msgpack, structs

from quintet.clock import SYSTEM, Clock
from quintet.database import Database, Transaction, close_database, file_of, one_by_one, open_database
from quintet.errors import AddressError, Unavailable
from quintet.message import Message
from quintet.transport import Address, parse_address

KEEP_SECONDS = 7 * 24 * 3600.0
LOOK_SECONDS = 2.0  # between two looks of a waiting `get`, in case its wake-up was lost

State: TypeAlias = Literal["pending", "answered", "cancelled"]


class Kept(Struct):
    """What is known of one async request; `reply` where it is answered, be it a failure."""

    id: str
    state: State
    reply: Message | None = None


class AnswerStore(Protocol):
    """The answers of one service, by the id of the submission. All of it may raise TransportError or Unavailable."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def accept(self, id: str) -> None:  # noqa: A002 - the word for it
        """Makes the id known as pending, unless it is settled already; whoever asks for it again keeps it so."""
        ...

    async def answer(self, id: str, reply: Message) -> bool:  # noqa: A002
        """Keeps the reply; returns once it is on disk. The first wins: False where it is answered or cancelled."""
        ...

    async def cancel(self, id: str) -> bool:  # noqa: A002
        """Marks it cancelled, also an unknown one that may still arrive. False where it is answered already."""
        ...

    async def get(self, id: str, wait: float = 0.0) -> Kept | None:  # noqa: A002
        """What is known, as soon as it is settled by whichever process, after at most `wait` seconds.

        At once None where the id is unknown: never accepted, or not touched for longer than is kept.
        """
        ...


def open_store(address: str, *, keep: float = KEEP_SECONDS, clock: Clock = SYSTEM) -> AnswerStore:
    """A store, not yet opened: sqlite:///rides.db, which processes and transports share, or memory:// for one alone.

    `keep`: seconds that an entry is kept after its last change, by the wall clock. Raises AddressError.
    """
    parsed = parse_address(address)
    for kind in (_SqliteStore, _MemoryStore):
        if kind.scheme == parsed.scheme:
            return kind(parsed, keep, clock)
    raise AddressError(f"{address}: answers are kept in sqlite:///rides.db or, for one process alone, in memory://")


class _Store(ABC):
    """How one waits for an answer: both kinds do so alike."""

    scheme: ClassVar[str]

    def __init__(self, address: Address, keep: float, clock: Clock) -> None:
        self._address = address
        self._keep = keep
        self._clock = clock
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}

    def __repr__(self) -> str:
        return f"<answers at {self._address}>"

    @abstractmethod
    async def _read(self, key: str) -> Kept | None: ...

    async def get(self, id: str, wait: float = 0.0) -> Kept | None:  # noqa: A002
        clock, loop = self._clock, asyncio.get_running_loop()
        until = clock.now() + wait
        waiting = self._waiting.setdefault(id, set())
        settled: asyncio.Future[None] | None = None
        try:
            while True:
                settled = loop.create_future()  # before the look, so that nothing falls between
                waiting.add(settled)
                kept = await self._read(id)
                if kept is None or kept.state != "pending" or clock.now() >= until:
                    return kept
                timer = clock.call_at(min(until, clock.now() + LOOK_SECONDS), lambda: self._wake(id))
                try:
                    await settled
                finally:
                    timer.cancel()
                    waiting.discard(settled)
        finally:
            if settled is not None:
                waiting.discard(settled)
            if not waiting and self._waiting.get(id) is waiting:
                del self._waiting[id]

    def _wake(self, key: str) -> None:
        """Has those that wait for this id, or all, look again."""
        for waiting in [self._waiting.get(key, set())] if key else list(self._waiting.values()):
            for settled in waiting:
                if not settled.done():
                    settled.set_result(None)


class _MemoryStore(_Store):
    """Answers that go with the process."""

    scheme = "memory"

    def __init__(self, address: Address, keep: float, clock: Clock) -> None:
        super().__init__(address, keep, clock)
        self._entries: dict[str, tuple[Kept, float]] = {}  # with the time of its last change, oldest first

    async def open(self) -> None: ...

    async def close(self) -> None:
        self._entries.clear()
        self._wake("")

    async def accept(self, id: str) -> None:  # noqa: A002
        self._forget()
        if id not in self._entries or self._entries[id][0].state == "pending":
            self._put(Kept(id, "pending"))

    async def answer(self, id: str, reply: Message) -> bool:  # noqa: A002
        self._forget()
        if id in self._entries and self._entries[id][0].state != "pending":
            return False
        self._settle(Kept(id, "answered", _bare(reply)))
        return True

    async def cancel(self, id: str) -> bool:  # noqa: A002
        self._forget()
        if id not in self._entries or self._entries[id][0].state == "pending":
            self._settle(Kept(id, "cancelled"))
        return self._entries[id][0].state == "cancelled"

    async def _read(self, key: str) -> Kept | None:
        self._forget()
        kept = self._entries.get(key)
        return kept[0] if kept else None

    def _settle(self, kept: Kept) -> None:
        self._put(kept)
        self._wake(kept.id)

    def _put(self, kept: Kept) -> None:
        self._entries.pop(kept.id, None)
        self._entries[kept.id] = (kept, self._clock.wall())

    def _forget(self) -> None:
        horizon = self._clock.wall() - self._keep
        while self._entries and self._entries[oldest := next(iter(self._entries))][1] < horizon:
            del self._entries[oldest]


_TOPIC = "answers"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS quintet_answer (id TEXT PRIMARY KEY, state TEXT NOT NULL, changed REAL NOT NULL, reply BLOB);
CREATE INDEX IF NOT EXISTS quintet_answer_changed ON quintet_answer (changed);
"""
_encode = msgpack.Encoder().encode
_decode = msgpack.Decoder(Message).decode


class _Entry(Struct):
    """What is to be written: at `now`, and what was last changed before `horizon` may go."""

    id: str
    now: float
    horizon: float
    reply: bytes | None = None


class _SqliteStore(_Store):
    """Answers in a SQLite file, which the sqlite transport may share."""

    scheme = "sqlite"

    def __init__(self, address: Address, keep: float, clock: Clock) -> None:
        super().__init__(address, keep, clock)
        self._file = file_of(address)
        self._opened: Database | None = None

    @property
    def _database(self) -> Database:
        if self._opened is None:
            raise Unavailable(f"{self!r} are not open")
        return self._opened

    async def open(self) -> None:
        self._opened = await open_database(self._file)
        try:
            await self._opened.submit(_CREATE, None)
            await self._opened.listen(_TOPIC, self._wake)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        if self._opened is None:
            return
        database, self._opened = self._opened, None
        try:
            await database.unlisten(_TOPIC, self._wake)
        finally:
            await close_database(database)
            self._wake("")

    async def accept(self, id: str) -> None:  # noqa: A002
        await self._database.submit(_ACCEPT, self._entry(id), durable=True)

    async def answer(self, id: str, reply: Message) -> bool:  # noqa: A002
        entry = self._entry(id)
        entry.reply = _encode(_bare(reply))
        return await self._database.submit(_ANSWER, entry, durable=True)

    async def cancel(self, id: str) -> bool:  # noqa: A002
        return await self._database.submit(_CANCEL, self._entry(id), durable=True)

    async def _read(self, key: str) -> Kept | None:
        found = await self._database.submit(_GET, self._entry(key))
        if found is None:
            return None
        state, reply = found
        return Kept(key, state, None if reply is None else _decode(reply))

    def _entry(self, key: str) -> _Entry:
        now = self._clock.wall()
        return _Entry(key, now, now - self._keep)


def _bare(reply: Message) -> Message:
    """A deadline is of the process that set it: it does not outlive the call."""
    return structs.replace(reply, deadline=None)


def _accept(transaction: Transaction, entry: _Entry) -> None:
    _forget(transaction, entry)
    sql = """
      INSERT INTO quintet_answer (id, state, changed) VALUES (?, 'pending', ?)
      ON CONFLICT (id) DO UPDATE SET changed = excluded.changed WHERE state = 'pending'"""
    transaction.execute(sql, entry.id, entry.now)


def _answer(transaction: Transaction, entry: _Entry) -> bool:
    return _settle(transaction, entry, "answered")


def _cancel(transaction: Transaction, entry: _Entry) -> bool:
    if _settle(transaction, entry, "cancelled"):
        return True
    sql = "SELECT 1 FROM quintet_answer WHERE id = ? AND state = 'cancelled'"
    return bool(transaction.execute(sql, entry.id))


def _settle(transaction: Transaction, entry: _Entry, state: State) -> bool:
    _forget(transaction, entry)
    sql = """
      INSERT INTO quintet_answer (id, state, changed, reply) VALUES (?, ?, ?, ?)
      ON CONFLICT (id) DO UPDATE SET state = excluded.state, changed = excluded.changed, reply = excluded.reply
      WHERE state = 'pending' RETURNING id"""
    first = bool(transaction.execute(sql, entry.id, state, entry.now, entry.reply))
    if first:
        transaction.notify(_TOPIC, entry.id)
    return first


def _get(transaction: Transaction, entry: _Entry) -> tuple[State, bytes | None] | None:
    sql = "SELECT state, reply FROM quintet_answer WHERE id = ? AND changed >= ?"
    found: list[Any] = transaction.execute(sql, entry.id, entry.horizon)
    return found[0] if found else None


def _forget(transaction: Transaction, entry: _Entry) -> None:
    transaction.execute("DELETE FROM quintet_answer WHERE changed < ?", entry.horizon)


def _create(transaction: Transaction, _: None) -> None:
    transaction.execute(_SCHEMA)


_CREATE, _ACCEPT, _ANSWER = one_by_one(_create), one_by_one(_accept), one_by_one(_answer)
_CANCEL, _GET = one_by_one(_cancel), one_by_one(_get)
