"""How a Message looks as a Kafka record, what topics and groups are called, and what is done of a partition.

| field            | in the record              |   | field      | header                                  |
|------------------|----------------------------|---|------------|-----------------------------------------|
| `body`           | its value                  |   | `sender`   | quintet-sender                          |
| `key`            | its key (UTF-8)            |   | `version`  | quintet-version                         |
| `media_type`     | header content-type        |   | `status`   | quintet-status                          |
| `id`             | header quintet-id          |   | `reply_to` | quintet-reply-to: the name of a topic   |
| `correlation_id` | header quintet-correlation |   | `attempt`  | quintet-attempt: left out where it is 1 |
| `operation`      | header quintet-operation   |   | `deadline` | quintet-deadline: seconds since 1970    |
| `headers`        | each under its own name    |   |            |                                         |

A record in a retry topic has the header quintet-due, too: seconds since 1970, before which it is not to be handled. In
`quintet.dead` a record's key is the letter's id, and the message's own key is in the header quintet-key.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Any, Final, Protocol, TypeAlias

from quintet.clock import Clock
from quintet.message import Channel, Message
from quintet.wire.names import ATTEMPT, DEADLINE, FIELDS, MEDIA_TYPE

DUE: Final = "quintet-due"
KEY: Final = FIELDS["key"]

LONGEST_TOPIC = 249  # characters, Kafka's own limit
MOST_ATTEMPTS = 2**31 - 1  # that other transports carry
LONGEST_NOTE = 3500  # characters; Kafka takes 4,096 bytes of metadata with a committed offset

Headers: TypeAlias = list[tuple[str, str | bytes]]
"""What users write is in bytes: librdkafka would cut text where it holds a NUL."""


class Record(Protocol):
    """What is read of confluent_kafka.Message."""

    def topic(self) -> str | None: ...
    def partition(self) -> int | None: ...
    def offset(self) -> int | None: ...
    def key(self) -> Any: ...
    def value(self) -> Any: ...
    def headers(self) -> Any: ...


# names


_VALID = re.compile(r"[A-Za-z0-9._-]{1,249}")


def topic_name(channel: str, *, collides: bool = False) -> str:
    """The topic of a channel: its name, where Kafka allows that; else what is left of it, and a hash of it.

    `collides`: Kafka refuses a name that differs from another topic's in `.` and `_` only.
    """
    if not collides and _VALID.fullmatch(channel) and channel not in (".", ".."):
        return channel
    mark = hashlib.sha256(channel.encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9.-]', '-', channel)[: LONGEST_TOPIC - 13]}-{mark}"


def group_name(channel: Channel, group: str) -> str:
    """The consumer group: of a point-to-point channel its own name, whoever receives, so that there is one."""
    return f"{group}.{channel.name}" if channel.fanout else channel.name


def retry_channel(channel: Channel, group: str) -> str:
    """The channel in which what failed waits for its next attempt: of each group its own."""
    return f"quintet.retry.{channel.name}--{group}" if channel.fanout else f"quintet.retry.{channel.name}"


def retry_group(channel: Channel, group: str) -> str:
    """The consumer group of all retry topics of a group, or of a contract and version ("trips.v1")."""
    return f"quintet.retry.{group if channel.fanout else channel.name.rpartition('.')[0] or channel.name}"


# records


def to_headers(message: Message, clock: Clock) -> Headers:
    """A record's headers, but for the message's key. Raises UnicodeEncodeError where one holds a lone surrogate."""
    headers: Headers = [(name, value.encode()) for name, value in message.headers.items()]
    if headers:
        "".join(message.headers).encode()  # a name that is no UTF-8 would crash librdkafka's Python
    add = headers.append
    if message.id:
        add(("quintet-id", message.id.encode()))
    if message.operation:
        add(("quintet-operation", message.operation))
    if message.sender:
        add(("quintet-sender", message.sender))
    if message.media_type:
        add((MEDIA_TYPE, message.media_type))
    if message.version:
        add(("quintet-version", message.version))
    if message.reply_to:
        add(("quintet-reply-to", topic_name(message.reply_to).encode()))
    if message.correlation_id:
        add(("quintet-correlation", message.correlation_id.encode()))
    if message.status:
        add(("quintet-status", message.status))
    if message.attempt != 1:
        add((ATTEMPT, b"%d" % message.attempt))
    if message.deadline is not None:
        add((DEADLINE, f"{clock.to_wall(message.deadline):.3f}".encode()))
    return headers


_FIELDS: Final = {header: field for field, header in FIELDS.items()} | {MEDIA_TYPE: "media_type"}
_NUMBERS: Final = frozenset({ATTEMPT, DEADLINE, DUE})


def from_record(record: Record, channel: Channel, clock: Clock) -> Message:
    """The message in a record, whoever wrote it: one without an id is known by its place in the topic."""
    message = Message(channel=channel, body=record.value() or b"", key=key_of(record))
    for name, value in record.headers() or ():
        text = "" if value is None else value.decode("utf-8", "replace")
        field = _FIELDS.get(name)
        if field is not None:
            setattr(message, field, text)
        elif name not in _NUMBERS:
            message.headers[name] = text
        elif name == ATTEMPT:
            message.attempt = _attempt(text)
        elif name == DEADLINE:
            message.deadline = clock.from_wall(_number(text))
    if not message.id:
        message.id = f"{record.topic()}-{record.partition()}-{record.offset()}"
    return message


def key_of(record: Record) -> str:
    """The key by which a record's message is in order."""
    key = record.key()
    return "" if key is None else key.decode("utf-8", "replace")


def due(record: Record) -> float:
    """Seconds of the wall clock before which a record is not to be handled; 0 where it says nothing."""
    for name, value in record.headers() or ():
        if name == DUE:
            return _number(str(value, "utf-8", "replace")) or 0.0
    return 0.0


def _attempt(text: str) -> int:
    try:
        return min(max(1, int(text)), MOST_ATTEMPTS)
    except ValueError:  # also of more digits than Python reads
        return 1


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


# positions


class Progress:
    """What is done of one partition. Deliveries end in any order, and Kafka keeps but one offset for a group: what was
    done beyond it is noted in the metadata of the commit, so that whoever takes the partition over does not repeat it.
    """

    def __init__(self, offset: int, note: str = "") -> None:
        """Goes on from what was committed."""
        self._open: dict[int, None] = {}  # taken and not done, in order
        self._next = offset  # one past the last that was taken
        self._last_done = -1
        self._done_before, self._open_before, self.crashes = _read_note(offset, note)
        """The last: how many members went away, one after the other, with the one at `first` in work."""
        self.first = offset
        self._begun = 0

    def __repr__(self) -> str:
        return f"<progress: all done before {self.position()}, {len(self._open)} open>"

    def take(self, offset: int) -> bool:
        """A delivery has come; False where it was done before."""
        self._next = offset + 1
        if offset < self._done_before and offset not in self._open_before:
            self._last_done = offset
            return False
        self._open[offset] = None
        return True

    def done(self, offset: int) -> None:
        self._open.pop(offset, None)
        if offset > self._last_done:
            self._last_done = offset

    def position(self) -> int:
        """All before it is done: what is to be committed."""
        return next(iter(self._open), self._next)

    def begin(self) -> None:
        """From now on whoever goes away has the first that is open in work."""
        self._begun = 1

    def leave(self) -> None:
        """Others go on, and nobody went away with anything in work."""
        self._begun = 0

    def note(self, in_work: int = 0) -> str:
        """What is done beyond the position, and how many are in work: "quintet 2 9:0,4" says two in work, and that of
        the nine from the position on all are done but the first and the fifth. "quintet 2 9:0,4 3" says beside it that
        the first is in work for the third time, without having been settled."""
        position, following = self.position(), self._next
        until = max(self._last_done + 1, self._done_before)  # what was noted before holds until it has come again
        gaps: list[str] = []
        begun = self.crashes + self._begun if position == self.first else 0
        if until <= position:
            return f"quintet {in_work} 0: {begun}" if begun else f"quintet {in_work}" if in_work else ""
        size = 0
        for offset in (*self._open, *sorted(gap for gap in self._open_before if gap >= following)):
            if offset >= until:
                break
            text = str(offset - position)
            size += len(text) + 1
            if size > LONGEST_NOTE:
                until = offset  # what no longer fits is not said to be done
                break
            gaps.append(text)
        return f"quintet {in_work} {until - position}:{','.join(gaps)}" + (f" {begun}" if begun else "")


def in_work(note: str) -> int:
    """How many a commit's metadata says are in work."""
    words = note.split(" ")
    return int(words[1]) if len(words) > 1 and words[0] == "quintet" and words[1].isdecimal() else 0


def _read_note(offset: int, note: str) -> tuple[int, frozenset[int], int]:
    """Before which offset all is done but those, and how often the first was begun; what others wrote says nothing."""
    words: Sequence[str] = note.split(" ")
    if len(words) not in (3, 4) or words[0] != "quintet":
        return offset, frozenset(), 0
    count, _, gaps = words[2].partition(":")
    try:
        open_before = frozenset(offset + int(gap) for gap in gaps.split(",") if gap)
        return offset + int(count), open_before, max(0, int(words[3])) if len(words) == 4 else 0
    except ValueError:
        return offset, frozenset(), 0


# versions


VERSIONS_ASKED: Final = b"\0\0\0\x1d\0\x12\0\3\0\0\0\1\0\7quintet\0\x08quintet\x020\0"
"""ApiVersions, version 3, with its length: what the brokers can do together. It may be asked before any login."""

_RELEASES: Final = (
    *((26, "4.1"), (22, "4.0"), (21, "3.9"), (20, "3.8"), (15, "3.7"), (12, "3.6"), (9, "3.5"), (8, "3.4"), (4, "3.3")),
)
"""From which level on the feature metadata.version means which release of Kafka."""


def version(answer: bytes) -> str:
    """The release that the answer to ApiVersions tells, as "4.1"; empty where it tells none."""
    _, mark, after = answer.partition(b"\x11metadata.version")
    level = 0
    for _ in range(2):  # what the broker supports comes first, what is in force second
        if not mark or len(after) < 4:
            return ""
        level = int.from_bytes(after[:2], "big")
        _, mark, after = after.partition(b"\x11metadata.version")
        if not mark:
            break
    return next((release for least, release in _RELEASES if level >= least), "")
