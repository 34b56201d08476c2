"""How a Message looks in AMQP: its properties and headers, and back.

A field travels as the property that AMQP has for it, or as a header of `wire/names.py` where it has none and where a
value is longer than the 255 bytes that a property may have:

| field            | property       |   | field      | header                                              |
|------------------|----------------|---|------------|-----------------------------------------------------|
| `media_type`     | content-type   |   | `version`  | quintet-version                                     |
| `id`             | message-id     |   | `key`      | quintet-key                                         |
| `correlation_id` | correlation-id |   | `status`   | quintet-status                                      |
| `reply_to`       | reply-to       |   | `attempt`  | quintet-attempt: an integer, left out where it is 1 |
| `operation`      | type           |   | `deadline` | quintet-deadline: a double, seconds since 1970      |
| `sender`         | app-id         |   | `headers`  | each under its own name, as a long string           |

Beside them: delivery-mode (2 where the channel is durable), priority (of `Publish(priority=)`) and timestamp (when it
was sent, in whole seconds). On channels that are not durable the deadline is the expiration, in milliseconds from the
timestamp on, and no header: the broker drops by it, and reads it with less work.
"""

from __future__ import annotations

import datetime
import json
import struct
from collections.abc import Mapping
from math import ceil, isfinite
from typing import Any, Final, TypeAlias

from quintet.clock import Clock
from quintet.errors import InvalidMessage, ProtocolError
from quintet.message import Channel, Message, new_id
from quintet.wire.amqp import (
    LENGTHS,
    NUMERIC,
    U16,
    U32,
    U64,
    Content,
    long,
    read_short,
    read_table,
    read_value,
    short,
)
from quintet.wire.names import (
    ATTEMPT,
    DEAD,
    DEAD_AT,
    DEAD_CHANNEL,
    DEAD_FANOUT,
    DEAD_GROUP,
    DEAD_ID,
    DEAD_REASON,
    DEADLINE,
    FIELDS,
)

PROPERTIES: Final = (
    (0x8000, "content-type", "S"),
    (0x4000, "content-encoding", "S"),
    (0x2000, "headers", "T"),
    (0x1000, "delivery-mode", "o"),
    (0x0800, "priority", "o"),
    (0x0400, "correlation-id", "S"),
    (0x0200, "reply-to", "S"),
    (0x0100, "expiration", "S"),
    (0x0080, "message-id", "S"),
    (0x0040, "timestamp", "q"),
    (0x0020, "type", "S"),
    (0x0010, "user-id", "S"),
    (0x0008, "app-id", "S"),
    (0x0004, "cluster-id", "S"),
)
"""The properties of a message in the order that they travel in: the bit that says that one is there, name and type."""

COUNT: Final = "x-delivery-count"  # of a quorum queue: how often it was delivered and not settled
BROKERS_OWN: Final = (
    COUNT,
    "x-acquired-count",
    "x-death",
    "x-first-death-reason",
    "x-first-death-queue",
    "x-first-death-exchange",
    "x-last-death-reason",
    "x-last-death-queue",
    "x-last-death-exchange",
    "x-stream-offset",
)
"""Headers that RabbitMQ writes for one queue or one delivery: they do not belong to the message."""

ROUTING: Final = ("CC", "BCC")
"""Headers by which RabbitMQ sends copies to other queues; it closes the channel over one that is a plain text."""

DELAYS: Final = "quintet.delay"
"""The exchange of copies that wait, and the start of their queues' names."""
DELAY: Final = "quintet-delay"
"""Milliseconds that a copy waits: what the exchange of the delay queues routes by."""

EXPIRATION_MOST: Final = 4_000_000  # seconds: RabbitMQ refuses more than 2**32 milliseconds

_TEXTS: Final = frozenset(FIELDS)
_FIELD_OF: Final = {
    **{header.encode(): field for field, header in FIELDS.items()},
    ATTEMPT.encode(): "attempt",
    DEADLINE.encode(): "deadline",
    **dict.fromkeys((name.encode() for name in (*BROKERS_OWN, *ROUTING, DELAY)), ""),
    COUNT.encode(): COUNT,
}
_RESERVED: Final = frozenset(name.decode() for name in _FIELD_OF)
_STAMPS_KEPT = 1000


def _name(text: str) -> bytes:
    return short(text) + b"S"


_ENTRY: Final = {field: _name(header) for field, header in FIELDS.items()}
_ATTEMPT: Final = short(ATTEMPT) + b"I"
_DEADLINE: Final = short(DEADLINE) + b"d"
_DOUBLE, _INT = struct.Struct(">d"), struct.Struct(">i")
_MODE: Final = {False: b"\x01", True: b"\x02"}

_Stamp: TypeAlias = tuple[int, bytes, bytes, bytes]
_stamps: dict[tuple[str, str, str, str], _Stamp] = {}
_names: dict[str, bytes] = {}


def _stamp(message: Message) -> _Stamp:
    """What is the same in each message of one operation: flags, content type, entries of the table, and the end."""
    known = (message.media_type, message.operation, message.sender, message.version)
    entries = bytearray()
    flags, start = _property(0x8000, "", message.media_type, bytearray())
    if message.version:
        entries += _ENTRY["version"] + long(message.version.encode())
    more, end = _property(0x0020, "operation", message.operation, entries)
    last, tail = _property(0x0008, "sender", message.sender, entries)
    if len(_stamps) >= _STAMPS_KEPT:  # media types may come from anyone
        _stamps.clear()
    found = _stamps[known] = (flags | more | last | 0x1000, start, bytes(entries), end + tail)
    return found


def _property(flag: int, field: str, value: str, entries: bytearray) -> tuple[int, bytes]:
    """A property that is there where it has a value; one that is too long becomes a header."""
    data = value.encode()
    if not data:
        return 0, b""
    if len(data) < 256:
        return flag, LENGTHS[len(data)] + data
    if not field:
        raise InvalidMessage(f"the media type {value[:50]!r}... has {len(data)} bytes, AMQP allows 255")
    entries += _ENTRY[field] + long(data)
    return 0, b""


def properties(
    message: Message,
    *,
    durable: bool,
    deadline: float | None = None,
    timestamp: int = 0,
    expires: bool = False,
    priority: int | None = None,
    reply_to: str = "",
    delay: int = 0,
) -> bytes:
    """A message's content header from the property flags on.

    `deadline`, `timestamp`: seconds of the wall clock; 0 for no timestamp. `expires`: the broker drops it at its
    deadline, which needs a timestamp. `reply_to`: stands for the message's own. Raises InvalidMessage, and
    UnicodeEncodeError.
    """
    stamp = _stamps.get((message.media_type, message.operation, message.sender, message.version)) or _stamp(message)
    flags, start, constant, end = stamp
    entries = bytearray(constant) if constant else bytearray()
    middle = _MODE[durable]
    if priority is not None:
        flags |= 0x0800
        middle += LENGTHS[priority]
    data = message.correlation_id.encode()
    if data:
        if len(data) < 256:
            flags |= 0x0400
            middle += LENGTHS[len(data)] + data
        else:
            entries += _ENTRY["correlation_id"] + long(data)
    data = (reply_to or message.reply_to).encode()
    if data:
        if len(data) < 256:
            flags |= 0x0200
            middle += LENGTHS[len(data)] + data
        else:
            entries += _ENTRY["reply_to"] + long(data)
    if deadline is not None and isfinite(deadline):  # over any other the broker closes the connection
        if expires and deadline - timestamp < EXPIRATION_MOST:
            flags |= 0x0100
            data = b"%d" % max(1, ceil((deadline - timestamp) * 1000))
            middle += LENGTHS[len(data)] + data
        else:
            entries += _DEADLINE + _DOUBLE.pack(deadline)
    data = message.id.encode()
    if data:
        if len(data) < 256:
            flags |= 0x0080
            middle += LENGTHS[len(data)] + data
        else:
            entries += _ENTRY["id"] + long(data)
    if timestamp:
        flags |= 0x0040
        middle += U64.pack(timestamp)
    if message.key:
        entries += _ENTRY["key"] + long(message.key.encode())
    if message.status:
        entries += _ENTRY["status"] + long(message.status.encode())
    if message.attempt != 1:
        entries += _ATTEMPT + _INT.pack(min(message.attempt, 2**31 - 1))
    if delay:
        entries += short(DELAY) + b"I" + _INT.pack(delay)
    if message.headers:
        _headers(message.headers, entries)
    if entries:
        return b"".join((U16.pack(flags | 0x2000), start, U32.pack(len(entries)), entries, middle, end))
    return b"".join((U16.pack(flags), start, middle, end))


def _headers(headers: Mapping[str, str], entries: bytearray) -> None:
    for name, value in headers.items():
        if name in _RESERVED:
            if name in ROUTING:
                raise InvalidMessage(
                    f"a header cannot be named {name!r}: RabbitMQ sends copies by it; take another name"
                )
            continue
        known = _names.get(name)
        if known is None:
            if len(_names) >= _STAMPS_KEPT:
                _names.clear()
            known = _names[name] = _name(name)
        entries += known
        entries += long(value.encode())


def read(content: Content, channel: Channel, clock: Clock) -> Message:
    """The message that a content is, whoever sent it: what makes no sense in its headers is passed over.

    Its attempt counts the deliveries that broke off, too. Raises ProtocolError where the properties are no properties.
    """
    data, end = content.properties, len(content.properties)
    message = Message(channel=channel, body=content.body, headers={})
    crashes, expiration = content.redelivered, b""
    try:
        flags = data[0] << 8 | data[1]
        start, more = 2, flags & 1
        while more:  # flags of properties that nobody has defined yet
            more = data[start + 1] & 1
            start += 2
        if flags & 0x8000:
            stop = start + 1 + data[start]
            message.media_type, start = data[start + 1 : stop].decode("utf-8", "replace"), stop
        if flags & 0x4000:
            message.headers["content-encoding"], start = read_short(data, start, end)
        if flags & 0x2000:
            rest = start + 4 + U32.unpack_from(data, start)[0]
            start += 4
            while start < rest:
                stop = start + 1 + data[start]
                name = data[start + 1 : stop]
                known = _FIELD_OF.get(name)
                if data[stop] == 0x53:  # S, the usual case
                    start = stop + 5 + U32.unpack_from(data, stop + 1)[0]
                    text = data[stop + 5 : start].decode("utf-8", "replace")
                    if known is None:
                        message.headers[name.decode("utf-8", "replace")] = text
                    elif known in _TEXTS:
                        setattr(message, known, text)
                    elif known:
                        _take(message, known, text, clock)
                    continue
                value, start = read_value(data, stop, rest)
                if known is None:
                    message.headers[name.decode("utf-8", "replace")] = _text(value)
                elif known == COUNT:
                    crashes = value if type(value) is int else crashes
                elif known:
                    _take(message, known, value, clock)
            if start != rest:
                raise ProtocolError("a message's headers do not end where they should")
        if flags & 0x1000:
            start += 1
        if flags & 0x0800:
            start += 1
        if flags & 0x0400:
            stop = start + 1 + data[start]
            message.correlation_id, start = data[start + 1 : stop].decode("utf-8", "replace"), stop
        if flags & 0x0200:
            stop = start + 1 + data[start]
            message.reply_to, start = data[start + 1 : stop].decode("utf-8", "replace"), stop
        if flags & 0x0100:
            stop = start + 1 + data[start]
            expiration, start = data[start + 1 : stop], stop
        if flags & 0x0080:
            stop = start + 1 + data[start]
            message.id, start = data[start + 1 : stop].decode("utf-8", "replace"), stop
        if flags & 0x0040:
            if flags & 0x0100 and message.deadline is None and expiration.isdigit():
                message.deadline = clock.from_wall(U64.unpack_from(data, start)[0] + int(expiration) / 1000)
            start += 8
        if flags & 0x0020:
            stop = start + 1 + data[start]
            message.operation, start = data[start + 1 : stop].decode("utf-8", "replace"), stop
        if flags & 0x0010:
            start += 1 + data[start]
        if flags & 0x0008:
            stop = start + 1 + data[start]
            message.sender, start = data[start + 1 : stop].decode("utf-8", "replace"), stop
    except (struct.error, IndexError):
        start = end + 1
    if start > end:
        raise ProtocolError("a message's properties end before they should")
    if crashes:
        content.crashes = crashes
        message.attempt += crashes
    if not message.id:
        content.made_up = message.id = content.made_up or new_id()
    return message


def _take(message: Message, field: str, value: Any, clock: Clock) -> None:
    """A header of ours, as any client may have written it."""
    try:
        if field == "deadline":
            if isfinite(wall := float(value)):  # nan and inf are no time, and could not be written into a copy
                message.deadline = clock.from_wall(wall)
        elif field == "attempt":
            message.attempt = max(1, int(value))
        elif field in _TEXTS:
            setattr(message, field, _text(value))
    except (TypeError, ValueError, OverflowError):
        pass


def _text(value: Any) -> str:
    """A header's value of any type as text: our headers are text."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    if isinstance(value, dict | list):
        return json.dumps(value, default=_text)
    return str(value)


def headers_of(content: Content) -> dict[str, Any]:
    """All headers of a content in their own types, the broker's among them. Raises ProtocolError."""
    found: dict[str, Any] = properties_of(content).get("headers", {})
    return found


def properties_of(content: Content) -> dict[str, Any]:
    """All properties of a content by their names in PROPERTIES. Raises ProtocolError."""
    data = content.properties
    found: dict[str, Any] = {}
    try:
        flags = data[0] << 8 | data[1]
        start, end = 2, len(data)
        for flag, name, kind in PROPERTIES:
            if not flags & flag:
                continue
            if kind == "S":
                found[name], start = read_short(data, start, end)
            elif kind == "T":
                found[name], start = read_table(data, start, end)
            else:
                found[name] = NUMERIC[kind].unpack_from(data, start)[0]
                start += NUMERIC[kind].size
    except (struct.error, IndexError):
        raise ProtocolError("a message's properties end before they should") from None
    return found


# -------------------------------------------------------------------------------------------------------- dead letters

_LETTERS: Final = Channel(DEAD, durable=True)
_WHY: Final = {
    "maxlen": "its queue was full, and it was the oldest",
    "expired": "it waited longer than its queue or its sender allows",
    "rejected": "a receiver that is not ours rejected it",
    "delivery_limit": "its receivers went away more often than its queue allows",
}


def read_death(content: Content) -> dict[str, Any]:
    """Why, when and in which queue the broker last dead-lettered it; empty where it did not."""
    deaths = headers_of(content).get("x-death")
    return deaths[0] if isinstance(deaths, list) and deaths and isinstance(deaths[0], dict) else {}


def read_dead(content: Content, clock: Clock) -> Message:
    """A dead letter as `bury` has written it; of one that the broker put there its x-death header tells."""
    message = read(content, _LETTERS, clock)
    message.attempt = max(1, message.attempt - content.crashes)  # the looks at it are no attempts
    if DEAD_CHANNEL in message.headers:
        return message
    death = read_death(content)
    queue, reason, when = str(death.get("queue", "")), str(death.get("reason", "")), death.get("time")
    why = _WHY.get(reason, reason)
    if queue.startswith(f"{DELAYS}."):  # it had waited there, to go back to its own
        keys = death.get("routing-keys")
        queue, why = str(keys[0]) if isinstance(keys, list) and keys else "", "its queue is gone"
    name, _, group = queue.partition("@")
    message.headers |= {
        DEAD_CHANNEL: name,
        DEAD_FANOUT: "yes" if group else "",
        DEAD_GROUP: group,
        DEAD_REASON: why,
        DEAD_AT: f"{when.timestamp():.3f}" if isinstance(when, datetime.datetime) else "",
        DEAD_ID: "",
    }
    return message
