"""Messages that are sent again, and dead letters, on transports that must send a copy: how those copies look."""

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
)

DEAD_LETTERS = Channel(DEAD, durable=True)

TIMES_KEPT = 100  # of failed attempts; the oldest go first
LONGEST_REASON = 4000  # bytes: ActiveMQ hangs up over a header of more than 10 KiB, and STOMP may write two for one
_OURS = frozenset({DEAD_AT, DEAD_CHANNEL, DEAD_FANOUT, DEAD_GROUP, DEAD_ID, DEAD_REASON})


def again(message: Message, clock: Clock) -> Message:
    """The copy that is sent for the next attempt, after one that has just failed."""
    return structs.replace(message, attempt=message.attempt + 1, headers=_failed_now(message, clock))


def bury(message: Message, group: str, reason: str, clock: Clock) -> Message:
    """The copy for the dead-letter channel. A repeat of it has the same DEAD_ID; the message keeps its own id."""
    channel = message.channel
    headers = _failed_now(message, clock)
    headers[DEAD_CHANNEL] = channel.name
    headers[DEAD_FANOUT] = "yes" if channel.fanout else ""
    headers[DEAD_GROUP] = group if channel.fanout else ""
    headers[DEAD_REASON] = reason.encode(errors="replace")[:LONGEST_REASON].decode(errors="ignore")
    headers[DEAD_AT] = f"{clock.wall():.3f}"
    headers[DEAD_ID] = f"{message.id}@{group if channel.fanout else channel.name}"
    return structs.replace(message, channel=DEAD_LETTERS, headers=headers, deadline=None, until=None, native=())


def letter(message: Message) -> DeadLetter:
    """What `bury` made of a message, as it is shown."""
    headers = message.headers
    original, group = _original(message)
    return DeadLetter(
        id=headers.get(DEAD_ID) or f"{message.id}@{original.channel.name}",
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
    original.attempt, original.deadline = 1, None  # who replays wants it handled, however late it is
    return original, group


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
    try:
        return float(text)
    except ValueError:
        return 0.0
