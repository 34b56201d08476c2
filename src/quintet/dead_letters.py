"""Messages that are sent again, and dead letters, on transports that must send a copy: how those copies look.

A dead letter is known by its message's id, by where it died, and by how often it had been replayed before: it is
another letter when it dies again, and the same one when a broker has the same death written twice.
"""

from __future__ import annotations

from msgspec import structs

from quintet.clock import Clock
from quintet.message import Channel, Message
from quintet.transport import DeadLetter
from quintet.wire.names import (
    DEAD,
    DEAD_AT,
    DEAD_CHANNEL,
    DEAD_FANOUT,
    DEAD_GROUP,
    DEAD_ID,
    DEAD_REASON,
    FAILED_AT,
    REPLAYED,
)

DEAD_LETTERS = Channel(DEAD, durable=True)

TIMES_KEPT = 100  # of failed attempts; the oldest go first
LATEST = 250_000_000_000.0  # seconds since 1970, in the year 9892: what is later is no date in some time zone
MOST_REPLAYS = 1_000_000  # that are counted; then the count begins anew
_OURS = frozenset({DEAD_AT, DEAD_CHANNEL, DEAD_FANOUT, DEAD_GROUP, DEAD_ID, DEAD_REASON})


def again(message: Message, clock: Clock) -> Message:
    """The copy that is sent for the next attempt, after one that has just failed."""
    return structs.replace(message, attempt=message.attempt + 1, headers=_failed_now(message, clock))


def bury(message: Message, group: str, reason: str, clock: Clock) -> Message:
    """The copy for the dead-letter channel. Written twice for one death it has the same DEAD_ID, and another for the
    death that follows a replay; the message keeps its own id."""
    channel = message.channel
    headers = _failed_now(message, clock)
    headers[DEAD_CHANNEL] = channel.name
    headers[DEAD_FANOUT] = "yes" if channel.fanout else ""
    headers[DEAD_GROUP] = group if channel.fanout else ""
    headers[DEAD_REASON] = reason
    headers[DEAD_AT] = f"{clock.wall():.3f}"
    headers[DEAD_ID] = letter_id(message, group if channel.fanout else channel.name)
    return structs.replace(message, channel=DEAD_LETTERS, headers=headers, deadline=None, until=None, native=())


def letter(message: Message) -> DeadLetter:
    """What `bury` made of a message, as it is shown."""
    headers = message.headers
    original, group = _original(message)
    return DeadLetter(
        id=headers.get(DEAD_ID) or letter_id(message, group or original.channel.name),
        channel=original.channel.name,
        group=group,
        reason=headers.get(DEAD_REASON, ""),
        attempts=message.attempt,
        died_at=_number(headers.get(DEAD_AT, "")),
        message=original,
        times=failures(message),
    )


def revive(message: Message) -> tuple[Message, str]:
    """The message for its first attempt once more, and the group that failed on it."""
    original, group = _original(message)
    original.headers.pop(FAILED_AT, None)
    original.headers[REPLAYED] = str(replays(message) + 1)
    original.attempt, original.deadline = 1, None  # who replays wants it handled, however late it is
    return original, group


def letter_id(message: Message, place: str) -> str:
    """The id of a message's dead letter. `place`: its group, or its channel where that has none."""
    count = replays(message)
    return f"{message.id}@{place}#{count}" if count else f"{message.id}@{place}"


def replays(message: Message) -> int:
    """How often it was replayed: what a stranger wrote into the header says nothing beyond a bound."""
    text = message.headers.get(REPLAYED, "")
    count = int(text) if len(text) <= 7 and text.isascii() and text.isdecimal() else 0
    return count if count < MOST_REPLAYS else 0


def failures(message: Message) -> list[float]:
    """When its attempts failed, in seconds of the wall clock."""
    return [_number(time) for time in message.headers.get(FAILED_AT, "").split(",") if time]


def _original(message: Message) -> tuple[Message, str]:
    headers = message.headers
    channel = Channel(headers.get(DEAD_CHANNEL, ""), fanout=headers.get(DEAD_FANOUT) == "yes", durable=True)
    kept = {name: value for name, value in headers.items() if name not in _OURS}
    return structs.replace(message, channel=channel, headers=kept), headers.get(DEAD_GROUP, "")


def _failed_now(message: Message, clock: Clock) -> dict[str, str]:
    times = [*message.headers.get(FAILED_AT, "").split(","), f"{clock.wall():.3f}"]
    return message.headers | {FAILED_AT: ",".join(filter(None, times[-TIMES_KEPT:]))}


def _number(text: str) -> float:
    """A time that a header tells, in seconds since 1970; 0 for what is none."""
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if 0 <= number < LATEST else 0.0
