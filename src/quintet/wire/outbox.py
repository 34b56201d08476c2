"""The outbox's table in SQLite, as SQL: for either library that a service may use SQLite through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from msgspec import Struct, json

Execute: TypeAlias = Callable[..., list[Any]]
"""Runs a statement with its values within a transaction that may write, and gives the rows."""

SCHEMA = (
    """CREATE TABLE IF NOT EXISTS quintet_outbox (
         seq INTEGER PRIMARY KEY AUTOINCREMENT,
         service TEXT NOT NULL, channel TEXT NOT NULL, key TEXT NOT NULL, id TEXT NOT NULL,
         added REAL NOT NULL, expires REAL, message BLOB NOT NULL, reason TEXT)""",
    """CREATE INDEX IF NOT EXISTS quintet_outbox_waiting ON quintet_outbox (service, channel, seq)
         WHERE reason IS NULL""",
    """CREATE TABLE IF NOT EXISTS quintet_relay (
         service TEXT PRIMARY KEY, holder TEXT NOT NULL, process TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID""",
)
"""`reason`: why a message was set aside. Who relays a service's rows is the `holder`, an instance, in a `process`,
`until` it should have shown itself again. Times are wall-clock."""

INSERT = "INSERT INTO quintet_outbox (service, channel, key, id, added, expires, message) VALUES (?, ?, ?, ?, ?, ?, ?)"

LEASE = 5.0
"""Seconds after which another instance relays where the one that did does not show itself."""


class Look(Struct, frozen=True):
    """Who asks, and when."""

    service: str
    holder: str
    process: str
    now: float


class Turn(Struct, frozen=True):
    """What became of rows, and a wish for the next ones: (seq, key, expires, message)."""

    look: Look
    channel: str
    sent: list[int]
    refused: list[tuple[int, str]]
    limit: int
    most_bytes: int


def create(execute: Execute, _: None) -> None:
    """The tables, where the file has none yet."""
    for statement in SCHEMA:
        execute(statement)


def look(execute: Execute, asked: Look) -> list[str] | None:
    """The channels in which something waits; None where another instance relays."""
    if not _leads(execute, asked):
        return None
    # steps from channel to channel through the index, for there may be a million rows
    sql = """
      WITH RECURSIVE waiting (channel) AS (
        SELECT min(channel) FROM quintet_outbox WHERE service = ?1 AND reason IS NULL
        UNION ALL
        SELECT (SELECT min(channel) FROM quintet_outbox
                WHERE service = ?1 AND reason IS NULL AND channel > waiting.channel)
        FROM waiting WHERE channel IS NOT NULL)
      SELECT channel FROM waiting WHERE channel IS NOT NULL"""
    return [channel for (channel,) in execute(sql, asked.service)]


def turn(execute: Execute, wish: Turn) -> list[Any]:
    if wish.sent:
        listed = json.encode(wish.sent).decode()
        execute("DELETE FROM quintet_outbox WHERE seq IN (SELECT value FROM json_each(?))", listed)
    for seq, reason in wish.refused:
        execute("UPDATE quintet_outbox SET reason = ? WHERE seq = ?", reason, seq)
    if wish.limit == 0 or not _leads(execute, wish.look):
        return []
    sql = """
      SELECT seq, key, expires, message FROM (
        SELECT *, sum(length(message)) OVER (ORDER BY seq) - length(message) AS before FROM (
          SELECT seq, key, expires, message FROM quintet_outbox
          WHERE service = ? AND channel = ? AND reason IS NULL ORDER BY seq LIMIT ?))
      WHERE before < ? ORDER BY seq"""
    return execute(sql, wish.look.service, wish.channel, wish.limit, wish.most_bytes)


def count(execute: Execute, asked: Look) -> list[Any]:
    """(channel, waiting, set aside, how many seconds the oldest that waits is old)."""
    sql = """
      SELECT channel, count(*) - count(reason), count(reason),
        max(0.0, ?1 - min(added) FILTER (WHERE reason IS NULL))
      FROM quintet_outbox WHERE service = ?2 GROUP BY channel"""
    return execute(sql, asked.now, asked.service)


def leave(execute: Execute, asked: Look) -> None:
    execute("DELETE FROM quintet_relay WHERE service = ? AND holder = ?", asked.service, asked.holder)


def _leads(execute: Execute, asked: Look) -> bool:
    """Whether this instance relays, be it from now on; prolongs that."""
    now, until = asked.now, asked.now + LEASE
    for holder, held in execute("SELECT holder, until FROM quintet_relay WHERE service = ?", asked.service):
        fresh = now < held <= until  # beyond that the clock was set back since
        if fresh and holder != asked.holder:
            return False
        if fresh and held - now > LEASE / 2:
            return True
    sql = "INSERT OR REPLACE INTO quintet_relay VALUES (?, ?, ?, ?)"
    execute(sql, asked.service, asked.holder, asked.process, until)
    return True
