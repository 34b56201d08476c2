"""The queue as SQL: what a message becomes in the file, from the send to its end (the sqlite transport's engine).

A queue is a point-to-point channel or one group of a fan-out channel. A delivery is one message in one queue:

    waiting     due = 0, in order of seq         delayed     due = the wall-clock time to deliver it again
    in work     owner = the receiver that has it held back   neither: an older one of its key is not done yet

Only waiting and delayed ones stand in the index that claims read, so the cost of a claim does not grow with the queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from msgspec import DecodeError, Struct

from quintet.database import Transaction, one_by_one
from quintet.errors import ChannelFull
from quintet.message import Channel, Message
from quintet.transport import ChannelState, DeadLetter
from quintet.wire.envelope import unpack

SCHEMA = """
CREATE TABLE IF NOT EXISTS quintet_receiver (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  address TEXT NOT NULL REFERENCES quintet_process ON DELETE CASCADE,
  expires REAL NOT NULL);
CREATE TABLE IF NOT EXISTS quintet_queue (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  fanout INTEGER NOT NULL, channel TEXT NOT NULL, member TEXT NOT NULL,
  receiver INTEGER,
  size INTEGER NOT NULL DEFAULT 0,
  UNIQUE (fanout, channel, member));
CREATE TABLE IF NOT EXISTS quintet_delivery (
  seq INTEGER PRIMARY KEY,
  queue INTEGER NOT NULL, owner INTEGER, due REAL, attempt INTEGER NOT NULL, crashes INTEGER NOT NULL,
  key TEXT NOT NULL, expires REAL, sent REAL NOT NULL, message BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS quintet_ready ON quintet_delivery (queue, due) WHERE due IS NOT NULL;
CREATE INDEX IF NOT EXISTS quintet_keyed ON quintet_delivery (queue, key) WHERE key <> '';
CREATE INDEX IF NOT EXISTS quintet_expiring ON quintet_delivery (expires) WHERE expires IS NOT NULL;
CREATE TABLE IF NOT EXISTS quintet_dead (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  fanout INTEGER NOT NULL, channel TEXT NOT NULL, member TEXT NOT NULL,
  reason TEXT NOT NULL, attempts INTEGER NOT NULL, died REAL NOT NULL, key TEXT NOT NULL, message BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS quintet_done (
  id INTEGER PRIMARY KEY,
  channel TEXT NOT NULL, member TEXT NOT NULL, done REAL NOT NULL, until REAL NOT NULL, message BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS quintet_done_until ON quintet_done (until);
CREATE TABLE IF NOT EXISTS quintet_tail (
  id INTEGER PRIMARY KEY AUTOINCREMENT, pattern TEXT NOT NULL, receiver INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS quintet_seen (
  seq INTEGER PRIMARY KEY, tail INTEGER NOT NULL,
  channel TEXT NOT NULL, fanout INTEGER NOT NULL, message BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS quintet_seen_by ON quintet_seen (tail);
CREATE TRIGGER IF NOT EXISTS quintet_receiver_gone AFTER DELETE ON quintet_receiver BEGIN
  DELETE FROM quintet_delivery WHERE queue IN (SELECT id FROM quintet_queue WHERE receiver = old.id);
  DELETE FROM quintet_queue WHERE receiver = old.id;
  DELETE FROM quintet_seen WHERE tail IN (SELECT id FROM quintet_tail WHERE receiver = old.id);
  DELETE FROM quintet_tail WHERE receiver = old.id;
  UPDATE quintet_delivery SET owner = NULL, due = 0, crashes = crashes + 1 WHERE owner = old.id;
END;
"""
"""`member` is the group, empty for point-to-point; `receiver` whose temporary queue it is. Times are wall-clock."""

SUSPECT = 2
"""A message that was in work at so many crashes is tried alone, so that it takes no innocent ones with it."""
TAIL_CAPACITY = 100_000  # messages that a tail may be behind
SUSPECT_PAUSE = 0.2  # seconds until the next suspect may have its turn


def queue_topic(queue: int) -> str:
    """What the receivers of a queue listen to."""
    return f"queue {queue}"


def tail_topic(tail: int) -> str:
    """What a tail listens to."""
    return f"tail {tail}"


# Receivers and their queues


class Beat(Struct):
    """A sign of life of one receiver."""

    receiver: int
    expires: float
    now: float


def join(transaction: Transaction, expires: float) -> int:
    """Deals a new receiver id; never the same twice, so that a late verdict of a dead receiver means nothing."""
    sql = "INSERT INTO quintet_receiver (address, expires) VALUES (?, ?) RETURNING id"
    return int(transaction.execute(sql, transaction.address, expires)[0][0])


def beat(transaction: Transaction, beat: Beat) -> bool:
    """Prolongs the lease, removes receivers whose lease is over, what has expired and what is retained no longer.

    False where others found this receiver dead: its messages and temporary queues are gone, it must join again.
    """
    t = transaction
    alive = t.execute("UPDATE quintet_receiver SET expires = ? WHERE id = ? RETURNING id", beat.expires, beat.receiver)
    if t.execute("DELETE FROM quintet_receiver WHERE expires < ? RETURNING id", beat.now):
        t.notify_everyone()
    sql = "DELETE FROM quintet_delivery WHERE expires < ? AND owner IS NULL RETURNING queue, key"
    expired = t.execute(sql, beat.now)  # where nobody serves its turn never comes, and it would fill the channel
    t.many("UPDATE quintet_queue SET size = size - 1 WHERE id = ?", [(queue,) for queue, _ in expired])
    t.many(_NEXT_OF_KEY, expired)
    t.execute("DELETE FROM quintet_done WHERE until < ?", beat.now)
    return bool(alive)


def leave(transaction: Transaction, receiver: int) -> None:
    """Ends a receiver in order, with its temporary queues."""
    transaction.execute("DELETE FROM quintet_receiver WHERE id = ?", receiver)


class Subscribe(Struct):
    """A queue to be served: `receiver` where it is temporary."""

    fanout: bool
    channel: str
    member: str
    receiver: int | None


def subscribe(transaction: Transaction, wish: Subscribe) -> int:
    """The id of the queue, which exists from now on."""
    sql = """
      INSERT INTO quintet_queue (fanout, channel, member, receiver) VALUES (?, ?, ?, ?)
      ON CONFLICT DO UPDATE SET receiver = excluded.receiver RETURNING id"""
    return int(transaction.execute(sql, wish.fanout, wish.channel, wish.member, wish.receiver)[0][0])


def remove(transaction: Transaction, queue: int) -> None:
    """Ends a temporary queue with what is in it."""
    transaction.execute("DELETE FROM quintet_delivery WHERE queue = ?", queue)
    transaction.execute("DELETE FROM quintet_queue WHERE id = ?", queue)


# Sending


class Send(Struct):
    channel: str
    fanout: bool
    temporary: bool
    key: str
    expires: float | None
    attempt: int
    now: float
    capacity: int
    message: bytes


class _Queue:
    """What one transaction knows of a queue that it sends to."""

    def __init__(self, number: int, member: str, size: int, temporary: bool) -> None:
        self.id, self.member, self.size, self.temporary = number, member, size, temporary
        self.added = 0
        self.keys: set[str] = set()  # of what this transaction adds

    def holds_back(self, transaction: Transaction, key: str) -> bool:
        """Whether an older message of the key is not done yet. Remembers the key."""
        if key in self.keys:
            return True
        self.keys.add(key)
        return _has_key(transaction, self.id, key)


def _has_key(transaction: Transaction, queue: int, key: str) -> bool:
    sql = "SELECT 1 FROM quintet_delivery WHERE queue = ? AND key = ? AND key <> '' LIMIT 1"
    return bool(transaction.execute(sql, queue, key))


def enqueue(transaction: Transaction, sends: list[Send]) -> list[Exception | None]:
    """Puts each message into every queue of its channel, or refuses it with ChannelFull."""
    results: list[Exception | None] = [None] * len(sends)
    queues: dict[tuple[str, bool], list[_Queue]] = {}
    rows: list[tuple[Any, ...]] = []
    tails = transaction.execute("SELECT id, pattern FROM quintet_tail")
    for position, send in enumerate(sends):
        address = (send.channel, send.fanout)
        if not queues.get(address):
            queues[address] = _queues_of(transaction, send)
        for queue in queues[address]:
            if queue.size + queue.added >= send.capacity:
                if not send.fanout:
                    results[position] = ChannelFull(
                        f"channel {send.channel} holds {send.capacity} messages, as many as it may: "
                        "wait until its receivers have caught up, or raise ?capacity="
                    )
                elif not queue.temporary:  # a group that lags must not stop the sender: its own copy dies
                    reason = f"group {queue.member} had {send.capacity} messages waiting, as many as it may"
                    row = (True, send.channel, queue.member, reason, 0, send.now, send.key, send.message)
                    transaction.execute(_DIE_AT_ONCE, *row)
                continue
            queue.added += 1
            held = send.key != "" and queue.holds_back(transaction, send.key)
            rows.append(
                (queue.id, None if held else 0, send.key, send.expires, send.now, send.message, send.attempt - 1)
            )
    transaction.many(_INSERT, rows)
    for queue in (queue for found in queues.values() for queue in found if queue.added):
        transaction.execute("UPDATE quintet_queue SET size = size + ? WHERE id = ?", queue.added, queue.id)
        transaction.notify(queue_topic(queue.id))
    if tails:
        _show(transaction, tails, [send for send, result in zip(sends, results, strict=True) if result is None])
    return results


_INSERT = """
  INSERT INTO quintet_delivery (queue, due, key, expires, sent, message, attempt, crashes)
  VALUES (?, ?, ?, ?, ?, ?, ?, 0)"""
_DIE_AT_ONCE = """
  INSERT INTO quintet_dead (fanout, channel, member, reason, attempts, died, key, message)
  VALUES (?, ?, ?, ?, ?, ?, ?, ?)"""


def _queues_of(transaction: Transaction, send: Send) -> list[_Queue]:
    sql = "SELECT id, member, size, receiver IS NOT NULL FROM quintet_queue WHERE fanout = ? AND channel = ?"
    found = [_Queue(*row) for row in transaction.execute(sql, send.fanout, send.channel)]
    if not found and not send.fanout and not send.temporary:  # waits there for its first receiver
        found = [_Queue(subscribe(transaction, Subscribe(False, send.channel, "", None)), "", 0, False)]
    return found


def _show(transaction: Transaction, tails: list[tuple[int, str]], sends: list[Send]) -> None:
    """Copies to who watches; a tail that does not look is left out, never the sender held up."""
    for tail, pattern in tails:
        prefix = pattern[:-1] if pattern.endswith("*") else None
        seen = [
            send
            for send in sends
            if send.channel == pattern or (prefix is not None and send.channel.startswith(prefix))
        ]
        if seen and transaction.execute("SELECT count(*) FROM quintet_seen WHERE tail = ?", tail)[0][0] < TAIL_CAPACITY:
            rows = [(tail, send.channel, send.fanout, send.message) for send in seen]
            transaction.many("INSERT INTO quintet_seen (tail, channel, fanout, message) VALUES (?, ?, ?, ?)", rows)
            transaction.notify(tail_topic(tail))


# Receiving


class Claim(Struct):
    queue: int
    receiver: int
    count: int
    now: float
    attempts: int


Row: TypeAlias = tuple[int, int, str, "float | None", bytes]
"""seq, attempt, key, expires, message"""


class Claimed(Struct):
    """What was taken, oldest first. `full`: as much as asked for. `next_due`: when a delayed one will be, if any."""

    rows: list[Row]
    full: bool
    next_due: float | None


_CLAIM = """
  UPDATE quintet_delivery SET owner = ?, due = NULL, attempt = attempt + 1
  WHERE seq IN (SELECT seq FROM quintet_delivery WHERE queue = ? AND due {} ORDER BY due, seq LIMIT ?)
  RETURNING seq, attempt, key, expires, message, crashes"""
_CLAIM_DELAYED, _CLAIM_WAITING = _CLAIM.format("> 0 AND due <= ?"), _CLAIM.format("= 0")


def claim(transaction: Transaction, claim: Claim) -> Claimed:
    """Takes at most `count` messages: those whose delay is over, which are older, and then those that wait."""
    queue, receiver = claim.queue, claim.receiver
    if not transaction.execute("SELECT 1 FROM quintet_receiver WHERE id = ?", receiver):
        return Claimed([], False, None)  # others found it dead: what it took would never come back
    rows = sorted(transaction.execute(_CLAIM_DELAYED, receiver, queue, claim.now, claim.count))
    if len(rows) < claim.count:
        rows += sorted(transaction.execute(_CLAIM_WAITING, receiver, queue, claim.count - len(rows)))
    full = len(rows) == claim.count
    if any(row[5] >= min(SUSPECT, claim.attempts) for row in rows):
        rows = _alone(transaction, claim, rows)
    expired = [row for row in rows if row[3] is not None and row[3] <= claim.now]
    if expired:
        done, keys = [row[0] for row in expired], [row[2] for row in expired]
        _settle(transaction, Settle(queue, receiver, claim.now, done=done, keys=keys))
        rows = [row for row in rows if row not in expired]
    sql = "SELECT min(due) FROM quintet_delivery WHERE queue = ? AND due > 0"
    next_due = None if full else transaction.execute(sql, queue)[0][0]
    return Claimed([row[:5] for row in rows], full, next_due)


def _alone(transaction: Transaction, claim: Claim, rows: list[Any]) -> list[Any]:
    """Lets one suspect through, puts off the others, and ends those that crashed too many receivers."""
    suspects = [row for row in rows if row[5] >= min(SUSPECT, claim.attempts)]
    guilty = [row for row in suspects if row[5] >= claim.attempts]
    later = [row for row in suspects if row not in guilty][1:]
    not_begun = [*guilty, *later]
    sql = "UPDATE quintet_delivery SET attempt = attempt - 1 WHERE seq = ?"
    transaction.many(sql, [(row[0],) for row in not_begun])
    settle = Settle(claim.queue, claim.receiver, claim.now, again=[(SUSPECT_PAUSE, row[0]) for row in later])
    settle.dead = [(row[0], f"its receivers crashed {row[5]} times with it in work") for row in guilty]
    settle.keys = [row[2] for row in guilty]
    _settle(transaction, settle)
    return [row for row in rows if row not in not_begun]


class Settle(Struct):
    """What became of messages that the receiver had in work, by seq; what is not its own any more stays untouched."""

    queue: int
    receiver: int
    now: float = 0.0
    retain: float = 0.0
    done: list[int] = []
    again: list[tuple[float, int]] = []
    """After how many seconds, and which."""
    dead: list[tuple[int, str]] = []
    unstarted: list[int] = []
    keys: list[str] = []
    """The keys of those in `done` and `dead`: the next message of each may go."""


def settle(transaction: Transaction, settles: Sequence[Settle]) -> list[None]:
    """Acts on verdicts, and gives back what was not begun or broken off."""
    for one in settles:
        _settle(transaction, one)
    return [None] * len(settles)


def _settle(transaction: Transaction, s: Settle) -> None:
    t, receiver = transaction, s.receiver
    ended = 0
    if s.done:
        if s.retain:
            t.many(_RETAIN, [(s.now, s.now + s.retain, seq, receiver) for seq in s.done])
        ended += t.many("DELETE FROM quintet_delivery WHERE seq = ? AND owner = ?", [(seq, receiver) for seq in s.done])
    if s.dead:
        t.many(_DIE, [(reason, s.now, seq, receiver) for seq, reason in s.dead])
        rows = [(seq, receiver) for seq, _ in s.dead]
        ended += t.many("DELETE FROM quintet_delivery WHERE seq = ? AND owner = ?", rows)
    if ended:
        t.execute("UPDATE quintet_queue SET size = size - ? WHERE id = ?", ended, s.queue)
    if s.keys and t.many(_NEXT_OF_KEY, [(s.queue, key) for key in set(s.keys)]):
        t.notify(queue_topic(s.queue))
    if s.again:
        sql = "UPDATE quintet_delivery SET owner = NULL, due = ? WHERE seq = ? AND owner = ?"
        t.many(sql, [(s.now + after if after > 0 else 0, seq, receiver) for after, seq in s.again])
        t.notify(queue_topic(s.queue))
    if s.unstarted:
        sql = "UPDATE quintet_delivery SET owner = NULL, due = 0, attempt = attempt - 1 WHERE seq = ? AND owner = ?"
        t.many(sql, [(seq, receiver) for seq in s.unstarted])
        t.notify(queue_topic(s.queue))


_RETAIN = """
  INSERT INTO quintet_done (channel, member, done, until, message)
  SELECT q.channel, q.member, ?, ?, d.message FROM quintet_delivery d JOIN quintet_queue q ON q.id = d.queue
  WHERE d.seq = ? AND d.owner = ?"""
_DIE = """
  INSERT INTO quintet_dead (fanout, channel, member, reason, attempts, died, key, message)
  SELECT q.fanout, q.channel, q.member, ?, d.attempt, ?, d.key, d.message
  FROM quintet_delivery d JOIN quintet_queue q ON q.id = d.queue WHERE d.seq = ? AND d.owner = ?"""
_NEXT_OF_KEY = """
  UPDATE quintet_delivery SET due = 0 WHERE owner IS NULL AND due IS NULL
  AND seq = (SELECT min(seq) FROM quintet_delivery WHERE queue = ? AND key = ? AND key <> '')"""


# Looking


class Watch(Struct):
    """A tail to be opened."""

    pattern: str
    receiver: int


def watch(transaction: Transaction, wish: Watch) -> int:
    """The id of a tail, which sees what is sent from now on."""
    sql = "INSERT INTO quintet_tail (pattern, receiver) VALUES (?, ?) RETURNING id"
    return int(transaction.execute(sql, wish.pattern, wish.receiver)[0][0])


def look(transaction: Transaction, tail: int) -> list[Message]:
    """What a tail saw since the last look, oldest first."""
    sql = "DELETE FROM quintet_seen WHERE tail = ? RETURNING seq, channel, fanout, message"
    rows = sorted(transaction.execute(sql, tail))
    return [unpack(message, Channel(channel, fanout=bool(fanout))) for _, channel, fanout, message in rows]


def unwatch(transaction: Transaction, tail: int) -> None:
    """Ends a tail."""
    transaction.execute("DELETE FROM quintet_seen WHERE tail = ?", tail)
    transaction.execute("DELETE FROM quintet_tail WHERE id = ?", tail)


def channels(transaction: Transaction, now: float) -> list[ChannelState]:
    """What waits, is in work and died in each queue."""
    sql = """
      SELECT q.channel, q.member, count(d.seq) - count(d.owner), count(d.owner),
        (SELECT count(*) FROM quintet_dead x
         WHERE x.fanout = q.fanout AND x.channel = q.channel AND x.member = q.member),
        ? - min(d.sent) FILTER (WHERE d.owner IS NULL)
      FROM quintet_queue q LEFT JOIN quintet_delivery d ON d.queue = q.id
      GROUP BY q.id ORDER BY q.channel, q.member"""
    names = ("channel", "group", "waiting", "in_work", "dead", "oldest")
    return [ChannelState(**dict(zip(names, row, strict=True))) for row in transaction.execute(sql, now)]


def dead(transaction: Transaction, channel: str | None) -> list[DeadLetter]:
    """The dead letters of a channel, or of all, oldest first."""
    sql = """
      SELECT id, fanout, channel, member, reason, attempts, died, message FROM quintet_dead
      WHERE channel = ?1 OR ?1 IS NULL ORDER BY id"""
    return [
        DeadLetter(
            id=str(number),
            channel=name,
            group=group,
            reason=reason,
            attempts=attempts,
            died_at=died,
            message=_looked_at(message, Channel(name, fanout=bool(fanout)), max(1, attempts)),
        )
        for number, fanout, name, group, reason, attempts, died, message in transaction.execute(sql, channel)
    ]


def _looked_at(packed: bytes, channel: Channel, attempt: int) -> Message:
    try:
        return unpack(packed, channel, attempt)
    except DecodeError:  # it died of that
        return Message(channel=channel, body=packed, attempt=attempt)


class Replay(Struct):
    ids: Sequence[str]
    now: float


def replay(transaction: Transaction, wish: Replay) -> int:
    """Puts dead letters at the end of the queue they came from, unless that is gone; they expire no more."""
    replayed = 0
    for number in _numbers(wish.ids):
        sql = """
          SELECT q.id, d.key, d.message FROM quintet_dead d
          JOIN quintet_queue q ON q.fanout = d.fanout AND q.channel = d.channel AND q.member = d.member
          WHERE d.id = ?"""
        for queue, key, message in transaction.execute(sql, number):
            held = key != "" and _has_key(transaction, queue, key)
            transaction.execute(_INSERT, queue, None if held else 0, key, None, wish.now, message, 0)
            transaction.execute("UPDATE quintet_queue SET size = size + 1 WHERE id = ?", queue)
            transaction.execute("DELETE FROM quintet_dead WHERE id = ?", number)
            transaction.notify(queue_topic(queue))
            replayed += 1
    return replayed


def drop(transaction: Transaction, ids: Sequence[str]) -> int:
    """Deletes dead letters."""
    return transaction.many("DELETE FROM quintet_dead WHERE id = ?", [(number,) for number in _numbers(ids)])


def _numbers(ids: Sequence[str]) -> list[int]:
    return [int(text) for text in ids if text.isdecimal() and len(text) < 19]


def create(transaction: Transaction, _: None) -> None:
    """The tables, where the file has none yet."""
    transaction.execute(SCHEMA)


JOIN, BEAT, LEAVE = one_by_one(join), one_by_one(beat), one_by_one(leave)
CREATE, SUBSCRIBE, REMOVE = one_by_one(create), one_by_one(subscribe), one_by_one(remove)
CLAIM = one_by_one(claim)
WATCH, LOOK, UNWATCH = one_by_one(watch), one_by_one(look), one_by_one(unwatch)
CHANNELS, DEAD, REPLAY, DROP = one_by_one(channels), one_by_one(dead), one_by_one(replay), one_by_one(drop)
"""The steps as works of a database; `enqueue` and `settle` are works as they stand."""
