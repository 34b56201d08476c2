"""One SQLite file, opened safely: a writer thread per process and file commits the work of many callers at once."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import queue
import random
import re
import socket
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import apsw

from quintet.errors import (
    AddressError,
    CallError,
    ChannelFull,
    ConfigurationError,
    QuintetError,
    Safety,
    TransportError,
    Unavailable,
)
from quintet.transport import Address

A = TypeVar("A")
R = TypeVar("R")

OLDEST_SAFE = 3_051_003
"""SQLite before 3.51.3 can corrupt a WAL file that several processes write (the "WAL-reset" bug)."""
BUSY_SECONDS = 5.0
CHECKPOINT_PAGES = 2_000  # of 4 KiB: how far the write-ahead log grows before it is carried into the file
LOCK_POLL_SECONDS = 0.0001  # while another process may be in a transaction of ours, which lasts about 1 ms
LOCKED_LONG = 100  # polls after which it is no such transaction
LOOK_EVERY = 0.05  # seconds between two looks whether the file is where it was, where nothing has to last
LONGEST_SOCKET_PATH = 100  # bytes; the kernel's bound is 104 to 108

_SCHEMA = """
CREATE TABLE IF NOT EXISTS quintet_process (address TEXT PRIMARY KEY, pid INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS quintet_listener (
  topic TEXT NOT NULL, address TEXT NOT NULL REFERENCES quintet_process ON DELETE CASCADE,
  PRIMARY KEY (topic, address)) WITHOUT ROWID;
"""


class Transaction:
    """What a work runs its statements on; it is committed, with the work of others, after the work returned."""

    def __init__(self, connection: apsw.Connection, address: str) -> None:
        self._connection = connection
        self.address = address  # where this process is woken; the key of its row in quintet_process
        self.notes: set[tuple[str, str]] = set()
        self.everyone = False

    def execute(self, sql: str, *values: Any) -> list[Any]:
        """Runs one statement, or several without values, to the end (apsw alone would stop at the first row)."""
        return self._connection.execute(sql, values or None).fetchall()

    def many(self, sql: str, rows: Iterable[Sequence[Any]]) -> int:
        """Runs one statement per row; returns how many rows of the file changed."""
        before = self._connection.total_changes()
        self._connection.executemany(sql, rows).fetchall()
        return self._connection.total_changes() - before

    def execute_foreign(self, sql: str, values: Sequence[Any], *, reads_only: bool = False) -> list[Any]:
        """Runs a user's statement, which may do all but begin or end a transaction, for this one is of many."""
        cursor = self._connection.cursor()
        cursor.exec_trace = _refuse_change if reads_only else _refuse_control
        return cursor.execute(sql, values or None).fetchall()

    @contextlib.contextmanager
    def savepoint(self, *, keep: bool = True) -> Generator[None]:
        """Takes back what is done inside where that raises, and always unless it is to `keep`."""
        self._connection.execute("SAVEPOINT inside").fetchall()
        try:
            yield
        except BaseException:
            keep = False
            raise
        finally:
            if self.goes_on:
                if not keep:
                    self._connection.execute("ROLLBACK TO inside").fetchall()
                self._connection.execute("RELEASE inside").fetchall()

    @property
    def goes_on(self) -> bool:
        """False where SQLite has rolled all of it back, as it does after some errors."""
        return self._connection.in_transaction

    def notify(self, topic: str, payload: str = "") -> None:
        """Once committed, calls whoever listens to the topic, in every process."""
        self.notes.add((topic, payload))

    def notify_everyone(self) -> None:
        """Once committed, calls all listeners of all topics with an empty payload."""
        self.everyone = True


def _refuse_control(cursor: apsw.Cursor, sql: str, _: Any) -> bool:
    if cursor.is_readonly and not cursor.get_description():  # COMMIT, SAVEPOINT, ATTACH and the like
        raise QuintetError(f"{sql.strip()!r}: what is executed here is committed together, by itself; leave it out")
    return True


def _refuse_change(cursor: apsw.Cursor, sql: str, bindings: Any) -> bool:
    if not cursor.is_readonly:
        raise QuintetError(f"{sql.strip()!r}: a GET changes nothing; let its operation have another verb")
    return _refuse_control(cursor, sql, bindings)


Work: TypeAlias = Callable[[Transaction, list[A]], Sequence[R | Exception]]
"""Does the same for many callers at once: one result, or exception, per argument.

It runs again, alone, when another work of its transaction failed, so it must touch nothing but the transaction.
"""
Job: TypeAlias = tuple[Work[Any, Any], Any, "asyncio.Future[Any]", bool]
Listener: TypeAlias = Callable[[str], None]
Outcome: TypeAlias = tuple["asyncio.Future[Any]", Any]
Wake: TypeAlias = tuple[str, str, str]  # address of the process, topic, payload


def one_by_one(step: Callable[[Transaction, A], R | Exception]) -> Work[A, R]:
    """The work of callers that have nothing to share."""
    return lambda transaction, arguments: [step(transaction, argument) for argument in arguments]


class Database:
    """One file in one process, shared by all who open it there, from whichever event loop.

    Every process that has it open is a row of `quintet_process`, named by the Unix datagram socket that wakes it. A
    refused datagram proves that the process died: its row goes, and what belongs to it by ON DELETE CASCADE.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.address = ""
        self._users = 0
        self._inbox: queue.SimpleQueue[list[Job] | None] = queue.SimpleQueue()
        self._pending: dict[asyncio.AbstractEventLoop, list[Job]] = {}
        self._listeners: dict[str, list[tuple[asyncio.AbstractEventLoop, Listener]]] = {}
        self._closed = False
        self._gate = threading.Lock()
        self._synchronous = ""  # what the connection is set to
        self._waits_until = 0.0
        self._inode: tuple[int, int] | None = None  # None: in memory
        self._look_at = 0.0
        self.removed = False
        """Its file is no longer where it was: what is written goes to nobody, so everything is refused."""

    def __repr__(self) -> str:
        return f"<database {self.path}{' closed' if self._closed else ''}>"

    # What users call, on their event loop

    def submit(self, work: Work[A, R], argument: A, *, durable: bool = False) -> asyncio.Future[R]:
        """Has the work done in the next transaction, with everything else submitted by then.

        `durable`: the result comes only when the disk has it. Otherwise it outlives this process, but the last
        moments may be gone after a power cut. Fails with TransportError, naming the file.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()
        if self._closed:
            future.set_exception(self._gone())
            return future
        pending = self._pending.get(loop)
        if pending is None:  # hand over at the end of this turn of the loop, so that one transaction takes all of it
            pending = self._pending[loop] = []
            loop.call_soon(self._hand_over, loop)
        pending.append((work, argument, future, durable))
        return future

    def listen(self, topic: str, callback: Listener) -> Awaitable[None]:
        """Calls back on this loop with the payload of each `notify(topic)`, from whichever process.

        An empty payload means "look yourself". A wake-up may get lost in rare cases: look every few seconds too.
        """
        self._listeners.setdefault(topic, []).append((asyncio.get_running_loop(), callback))
        return self.submit(self._enrol, None)

    def unlisten(self, topic: str, callback: Listener) -> Awaitable[None]:
        """Ends `listen`."""
        kept = [pair for pair in self._listeners.pop(topic, []) if pair[1] != callback]
        if kept:
            self._listeners[topic] = kept
        return self.submit(self._forget, topic)

    def enrol(self) -> Awaitable[None]:
        """Writes this process and its topics into the file again, after others thought it dead."""
        return self.submit(self._enrol, None)

    def bury(self) -> Awaitable[None]:
        """Removes the processes that died, and what was theirs."""
        return self.submit(self._bury, None)

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        jobs = self._pending.pop(loop)
        with self._gate:
            if not self._closed:
                self._inbox.put(jobs)
                return
        _resolve([(future, self._gone()) for _, _, future, _ in jobs])

    def _gone(self) -> TransportError:
        return TransportError(f"{self.path} is closed in this process")

    # Opening and closing

    def _start(self) -> None:
        self._socket, self.address = _wake_socket(self.path)
        opened: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, args=[opened], name=f"write {self.path.name}", daemon=True)
        self._waiter = threading.Thread(target=self._wait, name=f"wake {self.path.name}", daemon=True)
        self._writer.start()
        failure = opened.get()
        if failure is not None:
            self._abandon()
            Path(self.address).unlink(missing_ok=True)
            raise failure
        self._waiter.start()

    def _close(self) -> None:
        with self._gate:  # nothing is handed over behind the end
            self._closed = True
            self._inbox.put(None)
        self._writer.join()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # ends the thread that waits
            self._waiter.join()
        self._socket.close()
        Path(self.address).unlink(missing_ok=True)

    def _abandon(self) -> None:
        """In a forked child the file belongs to the parent: nothing of it may be used there, or closed by SQLite."""
        self._gate = threading.Lock()
        self._closed = True
        self._socket.close()

    # The writer thread

    def _write(self, opened: queue.SimpleQueue[Exception | None]) -> None:
        try:
            wakes = self._connect()
        except Exception as error:
            opened.put(translate(error, self.path))
            return
        opened.put(None)
        self._deliver([], wakes)
        while (jobs := self._inbox.get()) is not None:
            with contextlib.suppress(queue.Empty):  # what came while the last transaction ran shares this one
                while (more := self._inbox.get_nowait()) is not None:
                    jobs += more
                self._inbox.put(None)
            self._deliver(*self._settle(jobs))
        with contextlib.suppress(apsw.Error):  # who comes next finds this process dead
            self._commit(_leave)
        self._connection.close(True)

    def _connect(self) -> list[Wake]:
        """Asks again where others make or remove the write-ahead log just now, for there SQLite does not wait."""
        until = time.monotonic() + BUSY_SECONDS
        while True:
            self._connection = connection = apsw.Connection(str(self.path))
            try:
                connection.set_busy_handler(self._wait_for_lock)
                for pragma in _PRAGMAS:
                    connection.execute(f"PRAGMA {pragma}").fetchall()
                self._inode = _inode(self.path)
                return self._commit(self._prepare)[1]
            except BaseException as error:
                connection.close(True)
                if not isinstance(error, apsw.BusyError | apsw.ProtocolError) or time.monotonic() > until:
                    raise
            time.sleep(LOCK_POLL_SECONDS)

    def _prepare(self, transaction: Transaction) -> None:
        if transaction.execute("PRAGMA journal_mode") != [("wal",)]:
            raise TransportError(f"{self.path} is on a file system without shared memory: use a local one")
        transaction.execute(_SCHEMA)
        self._enrol(transaction, [None])
        self._bury(transaction, [None])

    def _wait_for_lock(self, tries: int) -> bool:
        """SQLite's own waiting grows to 100 ms, and so starves who lost once: the lock goes to who asks often."""
        if tries == 0:
            self._waits_until = time.monotonic() + BUSY_SECONDS
        pause = LOCK_POLL_SECONDS if tries < LOCKED_LONG else 20 * LOCK_POLL_SECONDS
        time.sleep(random.uniform(0.5, 1.5) * pause)  # noqa: S311 - so that two do not meet again
        return time.monotonic() < self._waits_until

    def _settle(self, jobs: list[Job]) -> tuple[list[Outcome], list[Wake]]:
        """All jobs in one transaction; where that fails each in its own, so that only the guilty fail."""
        if self.removed:
            self._look()
        if self.removed:
            return [(job[2], self._nowhere()) for job in jobs], []
        try:
            return self._transact(jobs)
        except Exception as error:
            if len(jobs) == 1 or self.removed or isinstance(error, apsw.BusyError):
                return [(job[2], translate(error, self.path)) for job in jobs], []
        alone = [self._settle([job]) for job in jobs]
        return [outcome for outcomes, _ in alone for outcome in outcomes], [
            wake for _, wakes in alone for wake in wakes
        ]

    def _transact(self, jobs: list[Job]) -> tuple[list[Outcome], list[Wake]]:
        groups: dict[Work[Any, Any], list[Job]] = {}
        for job in jobs:
            groups.setdefault(job[0], []).append(job)
        lasting = any(job[3] for job in jobs)
        synchronous = "FULL" if lasting else "NORMAL"
        if synchronous != self._synchronous:
            self._connection.execute(f"PRAGMA synchronous = {synchronous}").fetchall()
            self._synchronous = synchronous

        def work_all(transaction: Transaction) -> list[Outcome]:
            outcomes: list[Outcome] = []
            for work, group in groups.items():
                results = work(transaction, [job[1] for job in group])
                outcomes += [(job[2], result) for job, result in zip(group, results, strict=True)]
            return outcomes

        done = self._commit(work_all)
        if self._inode is not None and (lasting or time.monotonic() >= self._look_at):
            self._look()
            if self.removed:
                raise self._nowhere()
        return done

    def _look(self) -> None:
        """Finds out whether the file is where it was."""
        self._look_at = time.monotonic() + LOOK_EVERY
        self.removed = self._inode != _inode(self.path)

    def _nowhere(self) -> TransportError:
        return TransportError(
            f"{self.path} was removed or replaced while it is open: put it back, or stop all processes that use it"
            " before they use another file"
        )

    def _commit(self, act: Callable[[Transaction], R]) -> tuple[R, list[Wake]]:
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE").fetchall()
        try:
            transaction = Transaction(connection, self.address)
            result = act(transaction)
            wakes = self._listening(transaction)
            connection.execute("COMMIT").fetchall()
        except BaseException:
            if connection.in_transaction:  # SQLite itself has rolled back after some errors
                connection.execute("ROLLBACK").fetchall()
            raise
        return result, wakes

    def _listening(self, transaction: Transaction) -> list[Wake]:
        if transaction.everyone:
            everyone = transaction.execute("SELECT address FROM quintet_process")
            return [(address, "", "") for (address,) in everyone]
        return [
            (address, topic, payload)
            for topic, payload in transaction.notes
            for (address,) in transaction.execute("SELECT address FROM quintet_listener WHERE topic = ?", topic)
        ]

    def _deliver(self, outcomes: list[Outcome], wakes: list[Wake]) -> None:
        """Results first, then who listens in this process, then the other processes."""
        loops: dict[asyncio.AbstractEventLoop, list[Outcome]] = {}
        for outcome in outcomes:
            loops.setdefault(outcome[0].get_loop(), []).append(outcome)
        for loop, mine in loops.items():
            _call(loop, _resolve, mine)
        refused = False
        for address, topic, payload in wakes:
            if address == self.address:
                self._call_listeners(topic, payload)
            elif not (_is_wake_socket(address, self.path) and _poke(self._socket, address, f"{topic}\0{payload}")):
                refused = True
        if refused:
            with contextlib.suppress(apsw.Error):  # somebody does it later
                self._deliver([], self._commit(lambda transaction: self._bury(transaction, []))[1])

    # Waking and being woken

    def _wait(self) -> None:
        while not self._closed:
            topic, _, payload = self._socket.recv(65536).decode(errors="replace").partition("\0")
            if topic != _PROBE and not self._closed:
                self._call_listeners(topic, payload)

    def _call_listeners(self, topic: str, payload: str) -> None:
        for name in [topic] if topic else list(self._listeners):
            for loop, callback in tuple(self._listeners.get(name, ())):
                _call(loop, callback, payload)

    def _enrol(self, transaction: Transaction, arguments: list[None]) -> list[None]:
        address = transaction.address
        transaction.execute("INSERT OR IGNORE INTO quintet_process VALUES (?, ?)", address, os.getpid())
        rows = [(topic, address) for topic in list(self._listeners)]
        transaction.many("INSERT OR IGNORE INTO quintet_listener VALUES (?, ?)", rows)
        return arguments

    def _forget(self, transaction: Transaction, topics: list[str]) -> list[None]:
        sql = "DELETE FROM quintet_listener WHERE topic = ? AND address = ?"
        rows = [(topic, transaction.address) for topic in topics if topic not in self._listeners]
        transaction.many(sql, rows)
        return [None] * len(topics)

    def _bury(self, transaction: Transaction, arguments: list[None]) -> list[None]:
        for (address,) in transaction.execute("SELECT address FROM quintet_process"):
            ours = _is_wake_socket(address, self.path)
            if address != transaction.address and not (ours and _poke(self._socket, address, _PROBE)):
                transaction.execute("DELETE FROM quintet_process WHERE address = ?", address)
                transaction.notify_everyone()
                if ours:
                    Path(address).unlink(missing_ok=True)
        return arguments


_PROBE = "?"
_PRAGMAS = (
    "journal_mode = WAL",
    "foreign_keys = ON",
    f"wal_autocheckpoint = {CHECKPOINT_PAGES}",
    "journal_size_limit = 16777216",
)


def _leave(transaction: Transaction) -> None:
    transaction.execute("DELETE FROM quintet_process WHERE address = ?", transaction.address)


def _resolve(outcomes: list[Outcome]) -> None:
    for future, result in outcomes:
        if not future.done():  # the caller may have gone
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


def _call(loop: asyncio.AbstractEventLoop, callback: Callable[[Any], None], argument: Any) -> None:
    with contextlib.suppress(RuntimeError):  # that loop is closed: nobody waits there any more
        loop.call_soon_threadsafe(callback, argument)


def _inode(path: Path) -> tuple[int, int] | None:
    """What tells the file of this path from any other; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _wake_socket(path: Path) -> tuple[socket.socket, str]:
    """A bound Unix datagram socket beside the file, or, where its path would be too long, in the temporary folder."""
    name = f"{path.name}-{os.urandom(6).hex()}.wake"
    address = str(path.with_name(name))
    if len(os.fsencode(address)) > LONGEST_SOCKET_PATH:
        address = str(Path(tempfile.gettempdir()) / f"quintet-{name[-17:]}")
    wake = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        wake.bind(address)
    except OSError as error:
        wake.close()
        raise TransportError(f"{path} cannot be opened: its folder must exist and be writable ({error})") from error
    return wake, address


def _is_wake_socket(address: object, path: Path) -> bool:
    """Whether an address that stands in a file can be the socket of one who has it open: a row may say anything."""
    if not isinstance(address, str):
        return False
    folder, _, name = address.rpartition("/")
    if folder == str(path.parent):
        return re.fullmatch(rf"{re.escape(path.name)}-[0-9a-f]{{12}}\.wake", name) is not None
    return folder == tempfile.gettempdir() and re.fullmatch(r"quintet-[0-9a-f]{12}\.wake", name) is not None


def _poke(wake: socket.socket, address: str, text: str) -> bool:
    """Wakes the process of that address; False where it is certain that the process is dead."""
    try:
        wake.sendto(text.encode(errors="replace"), socket.MSG_DONTWAIT, address)
    except ConnectionRefusedError:
        return False
    except OSError:  # its queue is full, so it wakes anyway, or its folder cannot be seen from here: leases decide
        return True
    return True


class MemoryDatabase(Database):
    """The same in memory, for those who open it under one name: what is submitted is done at once."""

    def __init__(self) -> None:
        super().__init__(Path(":memory:"))
        self._connection = apsw.Connection(":memory:")
        self._connection.execute("PRAGMA foreign_keys = ON").fetchall()
        self._commit(self._prepare)

    def submit(self, work: Work[A, R], argument: A, *, durable: bool = False) -> asyncio.Future[R]:
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        if self._closed:
            future.set_exception(self._gone())
            return future
        outcomes, wakes = self._settle([(work, argument, future, durable)])
        _resolve(outcomes)
        for _, topic, payload in wakes:
            self._call_listeners(topic, payload)
        return future

    def _prepare(self, transaction: Transaction) -> None:
        transaction.execute(_SCHEMA)
        self._enrol(transaction, [None])

    def _close(self) -> None:
        self._closed = True
        self._connection.close(True)


# Opening by address


_open: dict[Path, Database] = {}
_shared: dict[str, MemoryDatabase] = {}  # those in memory that have a name
_opening = threading.Lock()
_reserved: list[Path] = []  # once for each that reserved it
_TWO_LIBRARIES = ", and two SQLite libraries in one process do not see each other's locks: take another file for one"


def file_of(address: Address) -> Path:
    """The file behind sqlite:///relative.db or sqlite:////absolute.db. Raises AddressError."""
    if address.host or address.path in ("", "/"):
        raise AddressError(f"{address}: write sqlite:///rides.db (in this folder) or sqlite:////var/lib/rides.db")
    return Path(address.path[1:])


def mode_of(address: Address) -> int:
    """The permissions that `?mode=` asks for a file that is made, 0600 without. Raises AddressError."""
    text = address.options.get("mode", "600")
    if not re.fullmatch(r"0?[0-7]{3}", text) or int(text, 8) & 0o711 != 0o600:
        raise AddressError(f"{address}: mode={text} must be octal, as 0660, with read and write for the owner")
    return int(text, 8)


def make_file(path: Path, mode: int) -> None:
    """Make the file, and its folder, where they are missing, for those alone whom `mode` names."""
    with contextlib.suppress(OSError):  # one level, as .quintet/; what is missing above is a slip of the pen
        path.parent.mkdir(mode=0o700)
        path.parent.chmod(mode | (mode & 0o444) >> 2)
    with contextlib.suppress(OSError):  # it is there, or opening it tells what is wrong
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.fchmod(file, mode)
        os.close(file)


def reserve(path: Path) -> None:
    """Keeps a file for the standard library's SQLite, until `give_back`. Raises ConfigurationError where it is open."""
    path = path.resolve()
    with _opening:
        if path in _open:
            raise ConfigurationError(
                f"{path} is open in this process through apsw (a broker, an inbox, answers or an idempotent store)"
                + _TWO_LIBRARIES
            )
        _reserved.append(path)


def give_back(path: Path) -> None:
    """Ends `reserve`."""
    with _opening:
        _reserved.remove(path.resolve())


async def open_database(path: Path | None, shared: str = "", mode: int = 0o600) -> Database:
    """The database of the file, shared in this process, or a new one in memory; each needs one `close_database`.

    `shared`: the name by which one in memory is shared, too, until its last user closes it. `mode`: the permissions of
    a file that is not there yet.

    Raises TransportError where the file cannot be used: an old SQLite, no database, damaged, read-only, locked; and
    ConfigurationError where this process has it open through another SQLite library.
    """
    if apsw.SQLITE_VERSION_NUMBER < OLDEST_SAFE or _library_version() < OLDEST_SAFE:
        raise TransportError(
            f"SQLite {apsw.sqlite_lib_version()} can damage a file that several processes write (fixed in 3.51.3): "
            "install apsw 3.51.3 or later from its wheel"
        )
    if path is None:
        found = _shared.get(shared) or MemoryDatabase()
        found._users += 1
        if shared:
            _shared[shared] = found
        return found
    opening = asyncio.get_running_loop().run_in_executor(None, _acquire, path, mode)
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_not_wanted)
        raise


async def close_database(database: Database) -> None:
    """The last user of a database closes the file, after everything that was submitted is done."""
    if isinstance(database, MemoryDatabase):
        database._users -= 1
        if database._users == 0:
            for name in [name for name, known in _shared.items() if known is database]:
                del _shared[name]
            database._close()
        return
    await asyncio.sleep(0)  # what was submitted in this turn of the loop is handed over first
    await asyncio.to_thread(_release, database)


def _not_wanted(opening: asyncio.Future[Database]) -> None:
    if opening.exception() is None:
        _release(opening.result())


def _library_version() -> int:
    major, minor, patch = (int(part) for part in apsw.sqlite_lib_version().split("."))
    return major * 1_000_000 + minor * 1_000 + patch


def _acquire(path: Path, mode: int) -> Database:
    path = path.resolve()
    with _opening:
        if path in _abandoned:
            raise TransportError(
                f"{path} was open when this process was forked, which SQLite does not survive: "
                "open it after the fork only, or start processes with spawn"
            )
        if path in _reserved:
            raise ConfigurationError(f"{path} is open in this process for an outbox at sqlite3://{_TWO_LIBRARIES}")
        database = _open.get(path)
        if database is None:
            make_file(path, mode)
            database = Database(path)
            database._start()
            _open[path] = database
        database._users += 1
        return database


def _release(database: Database) -> None:
    with _opening:
        database._users -= 1
        if database._users == 0 and _open.get(database.path) is database:
            del _open[database.path]
            database._close()


def _close_all() -> None:
    for database in list(_open.values()):
        database._close()


_abandoned: dict[Path, Database] = {}  # kept, for SQLite must not close in a child what its parent has open


def _after_fork() -> None:
    global _opening
    _opening = threading.Lock()
    for database in _open.values():
        database._abandon()
    _abandoned.update(_open)
    _open.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_after_fork)


# The one door of foreign errors

_SENTENCES: dict[type[Exception], str] = {
    apsw.NotADBError: "{path} is not a SQLite database: name another file, or move this one away",
    apsw.CorruptError: "{path} is damaged ({detail}): stop its users, then restore a backup or `sqlite3 FILE .recover`",
    apsw.ReadOnlyError: "{path} is read-only for this process: make the file and its folder writable for its user",
    apsw.PermissionsError: "{path} may not be accessed by this process: make it readable and writable for its user",
    apsw.FullError: "no room for {path}: its disk or quota is full, so this was not stored; make room",
    apsw.BusyError: "{path} was locked by another process for {busy:g} s: end its long transaction",
    apsw.LockedError: "{path} was locked by another process for {busy:g} s: end its long transaction",
    apsw.CantOpenError: "{path} cannot be opened: its folder must exist and be writable",
    apsw.IOError: "reading or writing {path} failed ({detail}): check its disk",
}


def translate(error: Exception, path: Path) -> Exception:
    """A SQLite failure as TransportError, with one sentence that names the file; anything else unchanged."""
    if not isinstance(error, apsw.Error):
        return error
    sentence = next(
        (text for kind, text in _SENTENCES.items() if isinstance(error, kind)), "{path}: SQLite says {detail}"
    )
    translated = TransportError(sentence.format(path=path, detail=error, busy=BUSY_SECONDS))
    translated.__cause__ = error
    return translated


def blames_file(error: Exception) -> bool:
    """Whether it says something of the file, its disk or its locks, not of a statement."""
    return isinstance(error, tuple(_SENTENCES))


def refusal(error: TransportError) -> CallError:
    """The same failure where it met a send: whether it may be sent again depends on what failed."""
    kind = ChannelFull if isinstance(error.__cause__, apsw.FullError) else Unavailable
    torn = isinstance(error.__cause__, apsw.IOError)  # perhaps after the commit reached the disk
    return kind(str(error), safety=Safety.UNKNOWN if torn else Safety.NOT_SENT)
