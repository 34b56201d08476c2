"""The outbox in PostgreSQL, through psycopg 3 (the extra `outbox-postgres`)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from msgspec.structs import astuple

from quintet.clock import Clock
from quintet.errors import AddressError, ConfigurationError, TransportError
from quintet.outbox import AGAIN, BATCH_BYTES, Box, Count, Kept, Row, Settled
from quintet.transport import Address

if TYPE_CHECKING:
    from psycopg import AsyncConnection

SCHEMA = """
CREATE TABLE IF NOT EXISTS quintet_outbox (
  seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  service text NOT NULL, channel text NOT NULL, key text NOT NULL, id text NOT NULL,
  added timestamptz NOT NULL, expires timestamptz, message bytea NOT NULL, reason text);
CREATE INDEX IF NOT EXISTS quintet_outbox_waiting ON quintet_outbox (service, channel, seq) WHERE reason IS NULL"""

INSERT = """
WITH kept AS (
  INSERT INTO quintet_outbox (service, channel, key, id, added, expires, message)
  VALUES (%s, %s, %s, %s, to_timestamp(%s), to_timestamp(%s), %s))
SELECT pg_notify('quintet_outbox', %s)"""

LOOK = """
WITH RECURSIVE waiting (channel) AS (
  SELECT min(channel) FROM quintet_outbox WHERE service = %(service)s AND reason IS NULL
  UNION ALL
  SELECT (SELECT min(channel) FROM quintet_outbox
          WHERE service = %(service)s AND reason IS NULL AND channel > waiting.channel)
  FROM waiting WHERE channel IS NOT NULL)
SELECT channel FROM waiting WHERE channel IS NOT NULL"""

SETTLE = "DELETE FROM quintet_outbox WHERE seq = ANY(%(sent)s)"

TURN = f"""
WITH gone AS ({SETTLE})
SELECT seq, key, expires, message FROM (
  SELECT *, sum(octet_length(message)) OVER (ORDER BY seq) - octet_length(message) AS before FROM (
    SELECT seq, key, extract(epoch FROM expires)::float8 AS expires, message FROM quintet_outbox
    WHERE service = %(service)s AND channel = %(channel)s AND reason IS NULL AND seq <> ALL(%(sent)s)
    ORDER BY seq LIMIT %(limit)s) AS first) AS counted
WHERE before < %(most_bytes)s ORDER BY seq"""  # noqa: S608 - of our own text

REFUSE = "UPDATE quintet_outbox SET reason = %s WHERE seq = %s"

COUNT = """
SELECT channel, count(*) - count(reason), count(reason),
       extract(epoch FROM now() - min(added) FILTER (WHERE reason IS NULL))::float8
FROM quintet_outbox WHERE service = %s GROUP BY channel"""

# a lock of the session's: PostgreSQL gives it back when the process dies, and its connections with it
LEAD = "SELECT pg_try_advisory_lock(hashtextextended('quintet_outbox'::regclass::oid || ' ' || %s, 0))"
MAKE = "SELECT pg_advisory_xact_lock(hashtextextended('quintet_outbox', 0))"

PATIENCE = 10.0  # seconds that a statement may take, then its session is given up
DEFAULTS = {
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
}
"""Of the relay's connections, where the address does not say otherwise: a server that is gone is noticed."""
IDLE = "15s"  # that a session may be, which looks once a second: then its process hangs, and another is to relay


class Keeper(Box):
    """postgresql://user@host/database, and whatever else libpq takes behind that scheme.

    Two connections: the one that works holds the lock by which its instance relays, the other listens. Both are made
    anew when they break.
    """

    def __init__(self, address: Address, service: str, clock: Clock) -> None:
        super().__init__(address, service, clock)
        try:
            import psycopg
            from psycopg.conninfo import conninfo_to_dict
        except ImportError as error:
            raise ConfigurationError(
                f"{address}: an outbox in PostgreSQL needs psycopg 3 ({error}): pip install 'quintet[outbox-postgres]'"
            ) from None
        self._psycopg = psycopg
        try:
            given = conninfo_to_dict(address.text)
        except psycopg.ProgrammingError as error:
            raise AddressError(f"{address}: {_first_line(error)}") from None
        named = {"application_name": f"quintet outbox of {service}"}
        self._options: dict[str, Any] = {**DEFAULTS, **named, **given}
        self._working: AsyncConnection[Any] | None = None
        self._leads = False
        self._turn = asyncio.Lock()
        self._hearing: asyncio.Task[None] | None = None

    async def open(self, wake: Callable[[str], None]) -> None:
        async with self._translated(), await self._connect() as connection:
            await self._make(connection)
        self._hearing = asyncio.get_running_loop().create_task(self._hear(wake))

    async def _make(self, connection: AsyncConnection[Any]) -> None:
        """Makes the table, unless it is there: to ask for it would need a right that a service need not have."""
        found = await connection.execute("SELECT to_regclass('quintet_outbox')")
        if await found.fetchone() != (None,):
            return
        try:
            async with connection.transaction():
                await connection.execute(MAKE)  # CREATE TABLE IF NOT EXISTS fails where two do it at once
                await connection.execute(SCHEMA)
        except self._psycopg.errors.InsufficientPrivilege:
            raise ConfigurationError(
                f"{self.address} has no table quintet_outbox, and user {connection.info.user} may not make it:"
                f" have a role that may run{SCHEMA}; and GRANT SELECT, INSERT, UPDATE, DELETE on it"
            ) from None

    async def close(self) -> None:
        if self._hearing is not None:
            self._hearing.cancel()
            await asyncio.wait([self._hearing])
        if self._working is not None:
            await self._working.close()

    async def _connect(self) -> AsyncConnection[Any]:
        connection = await self._psycopg.AsyncConnection.connect(autocommit=True, **self._options)
        try:
            # what was sent and is there again after the server's crash is sent again, with the id that it had
            await connection.execute("SET synchronous_commit = off")
        except BaseException:
            await connection.close()
            raise
        return connection

    @asynccontextmanager
    async def _translated(self) -> AsyncGenerator[None]:
        try:
            async with asyncio.timeout(PATIENCE):
                yield
        except TimeoutError:
            raise TransportError(f"{self.address}: PostgreSQL did not answer within {PATIENCE:g} s") from None
        except self._psycopg.Error as error:
            raise TransportError(f"{self.address}: PostgreSQL says {_first_line(error)}") from error

    @asynccontextmanager
    async def _session(self) -> AsyncGenerator[AsyncConnection[Any]]:
        """The connection that works, for one at a time; `_leads` tells whether this instance is the one that relays."""
        async with self._turn:
            try:
                async with self._translated():
                    working = self._working
                    if working is None or working.closed:
                        self._leads = False
                        working = self._working = await self._connect()
                        if working.info.server_version >= 140000:
                            await working.execute(f"SET idle_session_timeout = '{IDLE}'")
                    if not self._leads:
                        self._leads = await (await working.execute(LEAD, [self.service])).fetchone() == (True,)
                    yield working
            except TransportError:
                await self._give_up()
                raise
            except asyncio.CancelledError:
                await self._give_up()  # a statement may be under way
                raise

    async def _give_up(self) -> None:
        working, self._working, self._leads = self._working, None, False
        if working is not None:
            with contextlib.suppress(self._psycopg.Error):
                await working.close()

    async def _hear(self, wake: Callable[[str], None]) -> None:
        failed = 0
        while True:
            try:
                async with await self._connect() as connection:
                    await connection.execute("LISTEN quintet_outbox")
                    failed = 0
                    wake("")
                    async for notice in connection.notifies():
                        service, _, channel = notice.payload.rpartition("/")
                        if service == self.service:
                            wake(channel)
            except self._psycopg.Error:  # whoever looks meets the same, and says so
                failed += 1
            await self.clock.sleep(AGAIN.wait(failed, self.clock.random.random()))

    def add(self, transaction: Any, kept: Kept) -> Awaitable[None] | None:
        psycopg = self._psycopg
        values = (*astuple(kept), f"{kept.service}/{kept.channel}")
        if isinstance(transaction, psycopg.AsyncConnection):
            return _ended(transaction.execute(INSERT, values))
        if not isinstance(transaction, psycopg.Connection):
            raise ConfigurationError(
                f"{self!r}: give it a psycopg.AsyncConnection or psycopg.Connection, not {transaction!r}"
            )
        transaction.execute(INSERT, values)
        return None

    async def look(self) -> Sequence[str] | None:
        async with self._session() as session:
            if not self._leads:
                return None
            found = await session.execute(LOOK, {"service": self.service})
            return [channel for (channel,) in await found.fetchall()]

    async def turn(self, channel: str, settled: Settled, limit: int) -> Sequence[Row]:
        async with self._session() as session:
            for seq, reason in settled.refused:
                await session.execute(REFUSE, [reason, seq])
            wish = {
                "service": self.service,
                "channel": channel,
                "sent": settled.sent,
                "limit": limit,
                "most_bytes": BATCH_BYTES,
            }
            if limit == 0 or not self._leads:
                await session.execute(SETTLE, wish)
                return []
            found = await session.execute(TURN, wish, binary=True)
            return [Row(*row) for row in await found.fetchall()]

    async def count(self) -> Sequence[Count]:
        async with self._session() as session:
            found = await session.execute(COUNT, [self.service])
            return [Count(*row) for row in await found.fetchall()]


async def _ended(execution: Awaitable[object]) -> None:
    await execution


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
