"""The outbox: what is added to it in a transaction is sent if, and only if, that transaction commits.

It is a table, `quintet_outbox`, in the database of the service's own tables. What is added becomes a row of it, within
the user's transaction; the relay (relay.py) of a running instance sends the rows that are there, and deletes each once
it is accepted. The databases that it may stand in live one per file in `outboxes/`, named after the address's scheme.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, ParamSpec, Protocol, Unpack, overload

from msgspec import UNSET, Struct

from quintet.call import DEFAULTS, Call, Options, Using
from quintet.clock import Clock
from quintet.contract import Event, Operation, Style
from quintet.delivery import Redelivery
from quintet.errors import AddressError, ConfigurationError
from quintet.message import Channel, Message
from quintet.store import UnitOfWork
from quintet.transport import Address, parse_address
from quintet.wire.envelope import pack, unpack

P = ParamSpec("P")

SENDABLE = frozenset({Style.EVENT, Style.NOTIFICATION, Style.ASYNC_REQUEST})
"""What the outbox takes: whatever nobody waits for."""


class Cursor(Protocol):
    def fetchall(self) -> Any: ...


class Transaction(Protocol):
    """A connection of the user's that blocks: of apsw, psycopg, or the standard library's sqlite3."""

    def execute(self, statement: Any, values: Any, /) -> Cursor: ...


class AsyncTransaction(Protocol):
    """One that is awaited: psycopg's AsyncConnection, or aiosqlite's."""

    def execute(self, statement: Any, values: Any, /) -> Awaitable[Any]: ...
    def commit(self) -> Awaitable[Any]: ...


# --- what becomes of a message


class Row(Struct, frozen=True, array_like=True):
    """A message that waits; `expires` in seconds of the wall clock."""

    seq: int
    key: str
    expires: float | None
    message: bytes

    def unpacked(self, channel: Channel, clock: Clock) -> Message:
        """Raises DecodeError."""
        return unpack(self.message, channel, deadline=clock.from_wall(self.expires))


class Kept(Struct, frozen=True, kw_only=True):
    """A message that is to wait, by the columns of its row; times in seconds of the wall clock."""

    service: str
    channel: str
    key: str
    id: str
    added: float
    expires: float | None
    message: bytes


class Settled(Struct):
    """What became of rows: those that were accepted, and those that never will be, each with the reason."""

    sent: list[int] = []
    refused: list[tuple[int, str]] = []


class Count(Struct, frozen=True):
    """What there is of a channel; how many seconds the oldest that waits is old, None where none does."""

    channel: str
    waiting: int
    set_aside: int
    oldest: float | None


class Way(Struct, frozen=True):
    """How messages of one operation leave the service: `prepare` makes one that can be kept, in the binding that all
    transports but REST share, for the next deployment may carry it over another; `send` brings one there."""

    operation: Operation[Any, Any, Any]
    prepare: Callable[[tuple[Any, ...], dict[str, Any], Options], Message]
    send: Callable[[Message], Awaitable[object]]


# --- where it waits


class Box(ABC):
    """The table in one kind of database, as one instance of one service sees it.

    Of all instances one relays at a time, to whom alone `turn` gives rows. Subclasses live one per file in `outboxes/`,
    as the class `Keeper`. What is awaited raises TransportError while the database is away.
    """

    def __init__(self, address: Address, service: str, clock: Clock) -> None:
        self.address = address
        self.service = service
        self.clock = clock

    def __repr__(self) -> str:
        return f"<outbox of {self.service} at {self.address}>"

    @abstractmethod
    async def open(self, wake: Callable[[str], None]) -> None:
        """Makes the table where there is none. Calls `wake`, on this loop, with the channel of what may wait now; in
        rare cases it does not."""

    @abstractmethod
    async def close(self) -> None: ...

    @abstractmethod
    def add(self, transaction: Any, kept: Kept) -> Awaitable[None] | None:
        """Writes the row within the user's transaction, from whichever thread holds it. Raises what that raises."""

    @abstractmethod
    async def look(self) -> Sequence[str] | None:
        """The channels in which something waits; None where another instance relays."""

    @abstractmethod
    async def turn(self, channel: str, settled: Settled, limit: int) -> Sequence[Row]:
        """Writes what became of rows of a channel, and gives the next ones in order, about 8 MB at most."""

    @abstractmethod
    async def count(self) -> Sequence[Count]:
        """How many messages of each channel wait, and how many were set aside."""


BATCH_BYTES = 8 * 1024 * 1024
"""What rows that are read at once may hold together; one that is larger comes alone."""
AGAIN = Redelivery(first=0.1, longest=2.0)
"""The waits after failures, without an end: only a message that is refused for good is set aside."""


def open_box(text: str, service: str, clock: Clock) -> Box:
    """The table at a database's address, not yet opened. Raises AddressError, or ConfigurationError where what it needs
    is not installed."""
    address = parse_address(text)
    name = "sqlite" if address.scheme == "memory" else address.scheme  # for tests: SQLite's own, in memory
    if not name.isidentifier() or not importlib.util.find_spec(f"quintet.outboxes.{name}"):
        import quintet.outboxes as folder

        known = ", ".join(sorted(file.name for file in pkgutil.iter_modules(folder.__path__)))
        raise AddressError(f"{address}: an outbox stands in the database of your own tables; known are {known}")
    keeper: type[Box] = importlib.import_module(f"quintet.outboxes.{name}").Keeper
    return keeper(address, service, clock)


# --- what users hold


class Desk(Struct, frozen=True):
    """What a running service lends its outbox: where rows go, and the ways of messages, by the operation's name."""

    box: Box
    ways: Mapping[str, Way]


class Outbox:
    """`service.outbox`: `service.outbox.add(transaction, Trips.created, trip)` instead of `service.publish(...)`.

    `address`: of the database, empty where the service has no outbox.
    """

    def __init__(self, service: str, address: str) -> None:
        self.address = address
        self._service = service
        self._options = DEFAULTS
        self._opened: list[Desk] = []  # at most one; shared with what `using` gives

    def __repr__(self) -> str:
        return f"<outbox of {self._service} at {parse_address(self.address) if self.address else 'no address'}>"

    def using(self, **options: Unpack[Using]) -> Outbox:
        """What `using` is on a call, for events too: key=, headers=, expires=, id=."""
        other = Outbox(self._service, self.address)
        other._opened = self._opened
        other._options = Options.of(options)
        return other

    @overload
    def add(
        self,
        transaction: UnitOfWork | Transaction,
        what: Operation[P, None, Event] | Call[P, Any],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> str: ...
    @overload
    def add(
        self,
        transaction: AsyncTransaction,
        what: Operation[P, None, Event] | Call[P, Any],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Coroutine[Any, Any, str]: ...
    def add(
        self, transaction: Any, what: Operation[P, None, Event] | Call[P, Any], /, *args: P.args, **kwargs: P.kwargs
    ) -> str | Coroutine[Any, Any, str]:
        """Has a message sent once the transaction has committed, and never where it has not. Returns the message's id.

        `transaction`: what the handler does through `current().store`, or a connection of your own that is in a
        transaction: apsw.Connection (sqlite://), sqlite3.Connection (sqlite3://), psycopg.Connection or, awaited,
        psycopg.AsyncConnection (postgresql://). Any thread may call it that may use the connection. `what`: an event of
        the service, or a notification or async request of a client that it `uses`, with its arguments. Raises what
        the connection raises, and QuintetError.
        """
        way, message = self._prepared(what, args, kwargs)
        box = self._opened[0].box
        written = box.add(transaction, _kept(way, message, box))
        return message.id if written is None else _written(written, message.id)

    def _prepared(
        self, what: Operation[..., Any, Any] | Call[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Way, Message]:
        if not self._opened:
            raise ConfigurationError(
                f"service {self._service} has no outbox: name its own database, Service(..., outbox='sqlite:///...')"
                if not self.address
                else f"service {self._service} is not running, and so its outbox takes nothing: `async with serve(...)`"
            )
        call = what if isinstance(what, Call) else None
        name = what._line.name if isinstance(what, Call) else what.full_name
        way = self._opened[0].ways.get(name)
        if way is None:
            raise ConfigurationError(
                f"service {self._service}: {what!r} cannot wait in an outbox: it takes the events of its own contract,"
                " and notifications and async requests of clients that it uses"
            )
        options = self._options
        if call and call._options is not DEFAULTS:
            if options is not DEFAULTS:
                raise ConfigurationError(f"{what!r}: say using(...) of the call or of the outbox, not of both")
            options = call._options
        if options.timeout is not UNSET or options.native:
            name = (
                "native=[...]" if options.native else f"timeout={options.timeout:g}" if options.timeout else "timeout"
            )
            raise ConfigurationError(
                f"{what!r}: the outbox keeps no using({name}), which is for what is sent at once; leave it out:"
                " the relay sends what waits, and tries for as long as it takes (or until expires=)"
            )
        message = way.prepare(args, kwargs, options)
        propagate: Any = sys.modules.get("opentelemetry.propagate")
        if propagate is not None:  # the relay's span belongs to the one in work now
            propagate.inject(message.headers)
        return way, message


def _kept(way: Way, message: Message, box: Box) -> Kept:
    clock, deadline, expires = box.clock, message.deadline, way.operation.expires
    if deadline is None and expires is not None:
        deadline = clock.now() + expires  # from now on, however long the wait is
    return Kept(
        service=box.service,
        channel=way.operation.channel.name,
        key=message.key,
        id=message.id,
        added=clock.wall(),
        expires=clock.to_wall(deadline),
        message=pack(message),
    )


async def _written(written: Awaitable[None], message_id: str) -> str:
    await written
    return message_id
