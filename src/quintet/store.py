"""What outlives a call: answers of async requests and what was handled, kept where every instance finds them."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

from msgspec import Struct, msgpack, structs

from quintet.clock import SYSTEM, Clock
from quintet.database import (
    Database,
    Transaction,
    Work,
    blames_file,
    close_database,
    file_of,
    mode_of,
    one_by_one,
    open_database,
)
from quintet.errors import AddressError, ConfigurationError, QuintetError, Unavailable
from quintet.message import Message
from quintet.transport import parse_address

T = TypeVar("T")

KEEP_SECONDS = 7 * 24 * 3600.0
LOOK_SECONDS = 2.0  # between two looks of one who waits, in case its wake-up was lost

State: TypeAlias = Literal["pending", "answered", "cancelled"]


class Kept(Struct):
    """What is known of one async request; `reply` where it is answered, be it a failure."""

    id: str
    state: State
    reply: Message | None = None


def open_store(address: str, *, keep: float = KEEP_SECONDS, clock: Clock = SYSTEM) -> AnswerStore:
    """A store, not yet opened: sqlite:///rides.db, which processes and transports share, or memory:// for one alone.

    `keep`: seconds that an entry is kept after its last change, by the wall clock. Raises AddressError.
    """
    return AnswerStore(address, keep, clock)


def open_seen(store: Store | str, *, clock: Clock = SYSTEM) -> SeenStore:
    """The store that knows what was handled, not yet opened, by itself or its address. Raises AddressError."""
    return SeenStore(Store(store) if isinstance(store, str) else store, clock)


class _Store:
    """A few tables in a SQLite file, or in memory, and how one waits for a change in them."""

    holds: ClassVar[str]
    topic: ClassVar[str]
    schema: ClassVar[str]

    def __init__(self, address: str, keep: float, clock: Clock) -> None:
        parsed = parse_address(address)
        if parsed.scheme not in ("sqlite", "memory"):
            raise AddressError(
                f"{address}: {self.holds} are kept in sqlite:///rides.db or, for one process alone, in memory://"
            )
        self._address = parsed
        self._file = file_of(parsed) if parsed.scheme == "sqlite" else None
        self._mode = mode_of(parsed)
        self._keep = keep
        self._clock = clock
        self._opened: Database | None = None
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}

    def __repr__(self) -> str:
        return f"<{self.holds} at {self._address}>"

    @property
    def _database(self) -> Database:
        if self._opened is None:
            raise Unavailable(f"{self!r} are not open")
        return self._opened

    async def open(self) -> None:
        """Opens the file and makes its tables. Raises TransportError."""
        self._opened = await open_database(self._file, self._address.host, self._mode)
        try:
            await self._opened.submit(_CREATE, self.schema)
            await self._opened.listen(self.topic, self._wake)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        if self._opened is None:
            return
        database, self._opened = self._opened, None
        try:
            await database.unlisten(self.topic, self._wake)
        finally:
            await close_database(database)
            self._wake("")

    async def _watch(self, key: str, look: Callable[[], Awaitable[T]], settled: Callable[[T], bool], until: float) -> T:
        """What `look` finds once it is settled, or at `until`: it looks after each wake-up for this key."""
        clock, loop = self._clock, asyncio.get_running_loop()
        waiting = self._waiting.setdefault(key, set())
        woken: asyncio.Future[None] | None = None
        try:
            while True:
                woken = loop.create_future()  # before the look, so that nothing falls between
                waiting.add(woken)
                found = await look()
                if settled(found) or clock.now() >= until:
                    return found
                timer = clock.call_at(min(until, clock.now() + LOOK_SECONDS), lambda: self._wake(key))
                try:
                    await woken
                finally:
                    timer.cancel()
                    waiting.discard(woken)
        finally:
            if woken is not None:
                waiting.discard(woken)
            if not waiting and self._waiting.get(key) is waiting:
                del self._waiting[key]

    def _wake(self, key: str) -> None:
        """Has those that wait for this key, or all, look again."""
        for waiting in [self._waiting.get(key, set())] if key else list(self._waiting.values()):
            for woken in waiting:
                if not woken.done():
                    woken.set_result(None)

    def _entry(self, key: str) -> _Entry:
        now = self._clock.wall()
        return _Entry(key, now, now - self._keep)


class _Entry(Struct):
    """What is to be written: at `now`, and what was last changed before `horizon` may go."""

    id: str
    now: float
    horizon: float
    reply: bytes | None = None


_encode = msgpack.Encoder().encode
_decode = msgpack.Decoder(Message).decode


def _bare(reply: Message) -> Message:
    """A deadline is of the process that set it: it does not outlive the call."""
    return structs.replace(reply, deadline=None)


def _create(transaction: Transaction, schema: str) -> None:
    transaction.execute(schema)


_CREATE = one_by_one(_create)


# The answers of async requests


class AnswerStore(_Store):
    """The answers of one service, by the id of the submission. All of it may raise TransportError or Unavailable."""

    holds, topic = "answers", "answers"
    schema = """
      CREATE TABLE IF NOT EXISTS quintet_answer (
        id TEXT PRIMARY KEY, state TEXT NOT NULL, changed REAL NOT NULL, reply BLOB);
      CREATE INDEX IF NOT EXISTS quintet_answer_changed ON quintet_answer (changed)"""

    async def accept(self, id: str) -> None:  # noqa: A002 - the word for it
        """Makes the id known as pending, unless it is settled already; whoever asks for it again keeps it so."""
        await self._database.submit(_ACCEPT, self._entry(id), durable=True)

    async def answer(self, id: str, reply: Message) -> bool:  # noqa: A002
        """Keeps the reply; returns once it is on disk. The first wins: False where it is answered or cancelled."""
        entry = self._entry(id)
        entry.reply = _encode(_bare(reply))
        return await self._database.submit(_ANSWER, entry, durable=True)

    async def cancel(self, id: str) -> bool:  # noqa: A002
        """Marks it cancelled, also an unknown one that may still arrive. False where it is answered already."""
        return await self._database.submit(_CANCEL, self._entry(id), durable=True)

    async def get(self, id: str, wait: float = 0.0) -> Kept | None:  # noqa: A002
        """What is known, as soon as it is settled by whichever process, after at most `wait` seconds.

        At once None where the id is unknown: never accepted, or not touched for longer than is kept.
        """
        return await self._watch(
            id,
            lambda: self._read(id),
            lambda kept: kept is None or kept.state != "pending",
            self._clock.now() + wait,
        )

    async def _read(self, key: str) -> Kept | None:
        found = await self._database.submit(_GET, self._entry(key))
        if found is None:
            return None
        state, reply = found
        return Kept(key, state, None if reply is None else _decode(reply))


def _accept(transaction: Transaction, entry: _Entry) -> None:
    _forget_answers(transaction, entry)
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
    _forget_answers(transaction, entry)
    sql = """
      INSERT INTO quintet_answer (id, state, changed, reply) VALUES (?, ?, ?, ?)
      ON CONFLICT (id) DO UPDATE SET state = excluded.state, changed = excluded.changed, reply = excluded.reply
      WHERE state = 'pending' RETURNING id"""
    first = bool(transaction.execute(sql, entry.id, state, entry.now, entry.reply))
    if first:
        transaction.notify(AnswerStore.topic, entry.id)
    return first


def _get(transaction: Transaction, entry: _Entry) -> tuple[State, bytes | None] | None:
    sql = "SELECT state, reply FROM quintet_answer WHERE id = ? AND changed >= ?"
    found: list[Any] = transaction.execute(sql, entry.id, entry.horizon)
    return found[0] if found else None


def _forget_answers(transaction: Transaction, entry: _Entry) -> None:
    transaction.execute("DELETE FROM quintet_answer WHERE changed < ?", entry.horizon)


_ACCEPT, _ANSWER = one_by_one(_accept), one_by_one(_answer)
_CANCEL, _GET = one_by_one(_cancel), one_by_one(_get)


# The messages that were handled


class Store(Struct, frozen=True):
    """Where a service keeps what it has handled: `Service(..., idempotent=Store("sqlite:///orders.db", schema=...))`.

    `keep`: seconds that a repeat is known as one. `schema`: statements run at each start, CREATE TABLE IF NOT EXISTS
    and the like, for the tables that handlers use through `current().store`. Who opens the file beside it in the same
    process does so by apsw: the standard library's sqlite3 does not see its locks.
    """

    address: str
    keep: float = KEEP_SECONDS
    schema: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.keep < math.inf:
            raise ConfigurationError(f"Store(keep={self.keep!r}): seconds must be more than 0")


class Handled(Struct, frozen=True):
    """A message that was handled before, with the reply that it had."""

    reply: Message


class Conflict(Exception):
    """What a handler read has changed since: what it decided from that must not be written."""


class Step(Struct):
    """A statement of a handler, and what came of it: its rows, or the class of its error. `notify`: who is told, as
    Transaction.notify does, once it is committed."""

    sql: str
    values: tuple[Any, ...]
    reads_only: bool = False
    outcome: list[Any] | type[Exception] | None = None
    notify: tuple[str, str] | None = None


class UnitOfWork:
    """What a handler does to the store's tables: nothing of it is there for others until the handler has returned,
    then all of it is, together with the mark that its message was handled; or nothing, where anything failed.

    No lock is held meanwhile. Each statement is tried behind those before it and taken back; at the end all run again,
    and where one has another outcome than the handler saw, the handler begins anew.
    """

    def __init__(self, store: SeenStore, *, reads_only: bool = False) -> None:
        self._store = store
        self._reads_only = reads_only
        self.steps: list[Step] = []
        self.ended = False

    def __repr__(self) -> str:
        return f"<unit of work, {len(self.steps)} statements{', ended' if self.ended else ''}>"

    async def execute(self, sql: str, *values: Any) -> list[Any]:
        """The rows of a SQL statement, as tuples, which sees what this handler has executed before.

        Raises apsw.ConstraintError, apsw.SQLError and the like for what is wrong in the statement, TransportError
        where the file fails. What is another each time, random() or the time, must be given as a value.
        """
        self._check_it_goes_on()
        step = Step(sql, values, self._reads_only)
        try:
            step.outcome = rows = await self._store.rehearse([*self.steps, step])
        except (Conflict, QuintetError):
            raise
        except Exception as error:
            step.outcome = type(error)  # what the handler makes of it holds only as long as it is so
            raise
        finally:
            if step.outcome is not None:
                self.steps.append(step)
        return rows

    def enclose(self, database: Database, sql: str, *values: Any, notify: tuple[str, str]) -> None:
        """Has a statement that gives no rows done with the others at the end, and somebody told of it.

        Raises ConfigurationError where its table is in another database than the store.
        """
        self._check_it_goes_on()
        if self._reads_only:
            raise QuintetError("a GET changes nothing, and so it sends nothing; let its operation have another verb")
        if self._store._database is not database:
            raise ConfigurationError(f"{self._store!r} and {database!r} are two: one commit needs one")
        self.steps.append(Step(sql, values, outcome=[], notify=notify))

    def _check_it_goes_on(self) -> None:
        if self.ended:
            raise QuintetError("current().store: the handler has ended; execute what belongs to it before it returns")


class SeenStore(_Store):
    """The messages that were handled, with their replies. All of it may raise TransportError or Unavailable."""

    holds, topic = "handled messages", "handled"
    schema = """
      CREATE TABLE IF NOT EXISTS quintet_handled (id TEXT PRIMARY KEY, changed REAL NOT NULL, reply BLOB NOT NULL);
      CREATE INDEX IF NOT EXISTS quintet_handled_changed ON quintet_handled (changed);
      CREATE TABLE IF NOT EXISTS quintet_claim (
        id TEXT PRIMARY KEY, address TEXT NOT NULL REFERENCES quintet_process ON DELETE CASCADE)"""

    def __init__(self, store: Store, clock: Clock) -> None:
        super().__init__(store.address, store.keep, clock)
        self._schema = store.schema
        self.turn = asyncio.Lock()  # of handlers that others have overtaken

    async def open(self) -> None:
        await super().open()
        if self._schema:
            try:
                await self._database.submit(_CREATE, self._schema)
            except BaseException:
                await self.close()
                raise

    async def begin(self, key: str, until: float = math.inf) -> Handled | None:
        """None where the message is the caller's to handle now, until `finish` or `release`.

        Where another has it, of whichever process, this waits until that one is finished, failed or dead.
        Raises TimeoutError at `until`.
        """
        found: bytes | bool = await self._watch(key, lambda: self._claim(key), lambda found: found is not False, until)
        if found is False:
            raise TimeoutError
        return Handled(_decode(found)) if isinstance(found, bytes) else None

    async def _claim(self, key: str) -> bytes | bool:
        found: bytes | bool = await self._database.submit(_CLAIM, self._entry(key))
        if found is False:
            await self._database.bury()  # should its holder have died, that wakes us
        return found

    async def rehearse(self, steps: list[Step]) -> list[Any]:
        """The rows of the last step, behind the others; none of it stays. Raises Conflict, and what is wrong in it."""
        return await self._database.submit(_REHEARSE, steps)

    async def finish(self, key: str, reply: Message, steps: Sequence[Step]) -> Handled | None:
        """Runs the steps and marks the message as handled, both or neither, and returns once it is on disk.

        The first wins: gives the reply of another that was before us, and nothing is done. Raises Conflict.
        """
        entry = self._entry(key)
        entry.reply = _encode(_bare(reply))
        found = await self._database.submit(_FINISH, (entry, steps), durable=True)
        return None if found is None else Handled(_decode(found))

    def release(self, key: str) -> None:
        """Gives back what was begun and is not finished."""
        if self._opened is not None:
            self._opened.submit(_RELEASE, key).add_done_callback(lambda done: done.cancelled() or done.exception())


def _claim(transaction: Transaction, entry: _Entry) -> bytes | bool:
    transaction.execute("DELETE FROM quintet_handled WHERE changed < ?", entry.horizon)
    handled = transaction.execute("SELECT reply FROM quintet_handled WHERE id = ?", entry.id)
    if handled:
        reply: bytes = handled[0][0]
        return reply
    # others may have thought this process dead
    transaction.execute("INSERT OR IGNORE INTO quintet_process VALUES (?, ?)", transaction.address, os.getpid())
    sql = "INSERT INTO quintet_claim VALUES (?, ?) ON CONFLICT DO NOTHING RETURNING id"
    return bool(transaction.execute(sql, entry.id, transaction.address))


def _rehearse(transaction: Transaction, steps: list[Step]) -> list[Any] | Exception:
    with transaction.savepoint(keep=False):
        try:
            return _run(transaction, steps)
        except Exception as error:
            if _is_of_file(error, transaction):
                raise
            return error


def _run(transaction: Transaction, steps: Sequence[Step]) -> list[Any]:
    """The rows of the last step. Raises Conflict where one before has another outcome than it had."""
    rows: list[Any] = []
    for step in steps:
        try:
            rows = transaction.execute_foreign(step.sql, step.values, reads_only=step.reads_only)
            outcome: list[Any] | type[Exception] = rows
        except Exception as error:
            if step.outcome is None or _is_of_file(error, transaction):
                raise
            outcome = type(error)
        if step.outcome is not None and outcome != step.outcome:
            raise Conflict
    return rows


def _is_of_file(error: Exception, transaction: Transaction) -> bool:
    """Whether it concerns more than one statement: then nothing of the transaction may stay."""
    return blames_file(error) or not transaction.goes_on


def _finish(transaction: Transaction, work: tuple[_Entry, Sequence[Step]]) -> bytes | Exception | None:
    entry, steps = work
    handled = transaction.execute("SELECT reply FROM quintet_handled WHERE id = ?", entry.id)
    if handled:
        before: bytes = handled[0][0]
        return before
    try:
        with transaction.savepoint():
            _run(transaction, steps)
    except Conflict as conflict:
        return conflict
    for step in steps:
        if step.notify:
            transaction.notify(*step.notify)
    transaction.execute("INSERT INTO quintet_handled VALUES (?, ?, ?)", entry.id, entry.now, entry.reply)
    _release(transaction, entry.id)
    return None


def _release(transaction: Transaction, key: str) -> None:
    transaction.execute("DELETE FROM quintet_claim WHERE id = ? AND address = ?", key, transaction.address)
    transaction.notify(SeenStore.topic, key)


_CLAIM: Work[_Entry, bytes | bool] = one_by_one(_claim)
_REHEARSE, _FINISH, _RELEASE = one_by_one(_rehearse), one_by_one(_finish), one_by_one(_release)
