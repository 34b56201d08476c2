"""What stands on a RabbitMQ broker that Quintet uses: exchanges, queues, and the typed options of a channel's queue.

| exchange | type | takes | to |
|---|---|---|---|
| `quintet` | topic | what is sent, by the channel's name as routing key | the queues bound to that name |
| `quintet.delay` | headers | copies that wait, by their header `quintet-delay` | `quintet.delay.<milliseconds>` |
| `quintet.again` | direct | what has waited, by its queue's name as routing key | that queue, else `quintet.dead` |
| `quintet.dead` | fanout | what a queue's length or delivery limit pushed out of it | the queue `quintet.dead` |
| `quintet.tails` | fanout | what a tail says of itself, its pattern | all who send requests |

| queue | of | is |
|---|---|---|
| `<channel>` | a point-to-point channel | quorum where it is durable, else classic with x-expires |
| `<channel>@<group>` | a group of a fan-out channel | the same |
| `<channel>@<group>.<...>` | a temporary group | classic and exclusive |
| `quintet.delay.<ms>` | copies that wait so long | quorum, dead-lettered at least once to `quintet.again` |
| `quintet.dead` | the dead letters of all channels | quorum |

A request goes to its queue by the default exchange, as a topic exchange costs the broker a third of all its work for
it; and by `quintet`, where it is seen, while somebody tails its channel.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any, Final, Literal

from msgspec import Struct
from msgspec.structs import force_setattr

from quintet.errors import ConfigurationError
from quintet.message import Channel, Native, native_of
from quintet.wire.amqp_message import DELAY, DELAYS
from quintet.wire.names import DEAD

EXCHANGE: Final = "quintet"
AGAIN: Final = "quintet.again"
TAILS: Final = "quintet.tails"
EXCHANGES: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    EXCHANGE: ("topic", {}),
    DELAYS: ("headers", {}),
    DEAD: ("fanout", {}),
    TAILS: ("fanout", {}),
    AGAIN: ("direct", {"alternate-exchange": DEAD}),
}
"""Each exchange's type and arguments; all are durable."""

DELIVERY_LIMIT: Final = 1_000_000  # RabbitMQ 4 has 20, and then drops: here a receiver that crashes is counted by us
UNUSED_SECONDS: Final = 600  # until a queue that is not durable is deleted

QUORUM: Final = {"x-queue-type": "quorum", "x-delivery-limit": DELIVERY_LIMIT}
DEAD_QUEUE: Final = QUORUM

WAITS: Final = (10, 25, 50, *sorted(base << power for base in (100, 150) for power in range(20)))
"""The milliseconds that a copy may wait, each in a queue of its own: a short wait must not stay behind a long one."""


def wait(seconds: float) -> int:
    """The milliseconds among WAITS for a wait of so many seconds, not less as far as they go."""
    wanted = seconds * 1000
    return next((ms for ms in WAITS if ms >= wanted), WAITS[-1])


def delay_queue(ms: int) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The name of the queue for copies that wait so long, its arguments and those of its binding."""
    arguments = {
        "x-queue-type": "quorum",
        "x-message-ttl": ms,
        "x-dead-letter-exchange": AGAIN,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",  # which that strategy needs
    }
    return f"{DELAYS}.{ms}", arguments, {"x-match": "all", DELAY: ms}


class Queue(Native, frozen=True, kw_only=True):
    """What RabbitMQ alone can do for a channel: `@service.handles(op, native=[Queue(max_priority=9)])`.

    Raises ConfigurationError for what contradicts itself. The arguments of a queue that exists cannot be changed.
    """

    type: Literal["", "quorum", "classic", "stream"] = ""
    """Empty: quorum where the channel is durable, else classic."""
    max_priority: int = 0
    """1 to 255: messages with a higher `Publish(priority=)` go first. Only classic queues can."""
    max_length: int = 0
    """Messages that may wait. Over it a sender is refused (ChannelFull); of a group the oldest become dead letters."""
    max_bytes: int = 0
    overflow: Literal["", "reject-publish", "drop-head"] = ""
    exclusive: bool = False
    """Of all receivers one gets the messages; when it goes away, another."""
    message_ttl: float = 0.0
    """Seconds that a message waits at most; then it is a dead letter."""
    consumer_timeout: float = 0.0
    """Seconds that a delivery may be in work, instead of the broker's 30 minutes (RabbitMQ 3.12 and later)."""
    consumer_priority: int = 0
    """Receivers with a higher one are served first."""
    stream_offset: Literal["", "first", "last", "next"] | int | datetime.datetime = ""
    """Where a stream is read from: each time it is served, as the broker keeps no place for AMQP."""
    declare: bool = True
    """False: the queue is there and is taken as it is."""
    arguments: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    """Further arguments of queue.declare, in RabbitMQ's own words."""

    def __post_init__(self) -> None:
        if isinstance(self.arguments, Mapping):
            force_setattr(self, "arguments", tuple(self.arguments.items()))  # so that a channel can be hashed
        stream = self.type == "stream"
        for wrong, why in (
            (not 0 <= self.max_priority <= 255, "max_priority must be 1 to 255"),
            (self.max_priority and self.type in ("quorum", "stream"), "only a classic queue has priorities"),
            (self.stream_offset != "" and not stream, "stream_offset is for type='stream'"),
            (stream and (self.exclusive or self.message_ttl or self.overflow), "no stream can do that"),
            (min(self.max_length, self.max_bytes, self.message_ttl, self.consumer_timeout) < 0, "a limit is negative"),
        ):
            if wrong:
                raise ConfigurationError(f"{self!r}: {why}")


class Publish(Native, frozen=True, kw_only=True):
    """What RabbitMQ alone can do for a message: `trips.create.using(native=[Publish(priority=5)])`."""

    priority: int = 0
    """0 to 255, for queues that have priorities."""

    def __post_init__(self) -> None:
        if not 0 <= self.priority <= 255:
            raise ConfigurationError(f"{self!r}: priority must be 0 to 255")


USUAL: Final = Queue()


class Place(Struct, frozen=True):
    """A queue as it is declared and consumed."""

    queue: str
    durable: bool
    exclusive: bool
    declared: bool
    arguments: dict[str, Any]
    consumer: dict[str, Any]
    """The arguments of basic.consume."""


def place_of(channel: Channel, group: str, *, lasting: bool, suffix: str = "") -> Place:
    """The queue of a channel, or of a group of it.

    `lasting`: the broker (RabbitMQ 4) wants queues that are shared to be durable, whatever is in them. `suffix`: makes
    the name of a temporary group's queue its session's own, as the one of a lost session may still be there. Raises
    ConfigurationError for an option that the channel cannot have.
    """
    wish = native_of(channel.native, Queue, USUAL)
    name = f"{channel.name}@{group}" if channel.fanout else channel.name
    if channel.temporary:
        arguments: dict[str, Any] = {"x-queue-type": "classic"}
        return Place(name + suffix if channel.fanout else name, False, True, True, arguments, {})
    if wish.type == "stream" and not channel.fanout:
        raise ConfigurationError(
            f"{channel.name}: a stream is for events, each who reads it handles all that is in it; leave out {wish!r}"
        )
    kind = wish.type or ("quorum" if channel.durable and not wish.max_priority else "classic")
    arguments = {"x-queue-type": kind}
    durable = lasting or channel.durable or kind != "classic"
    if kind == "quorum":
        arguments |= QUORUM
    if channel.durable and kind != "stream":
        arguments["x-dead-letter-exchange"] = DEAD
    if not channel.durable:
        arguments["x-expires"] = UNUSED_SECONDS * 1000
    if channel.keyed or wish.exclusive:
        arguments["x-single-active-consumer"] = True
    if wish.max_priority:
        arguments["x-max-priority"] = wish.max_priority
    if wish.max_length:
        arguments["x-max-length"] = wish.max_length
    if wish.max_bytes:
        arguments["x-max-length-bytes"] = wish.max_bytes
    if (wish.max_length or wish.max_bytes) and kind != "stream":
        arguments["x-overflow"] = wish.overflow or ("drop-head" if channel.fanout else "reject-publish")
    if wish.message_ttl:
        arguments["x-message-ttl"] = round(wish.message_ttl * 1000)
    if wish.consumer_timeout:
        arguments["x-consumer-timeout"] = round(wish.consumer_timeout * 1000)
    arguments |= dict(wish.arguments)
    consumer: dict[str, Any] = {}
    if wish.consumer_priority:
        consumer["x-priority"] = wish.consumer_priority
    if wish.stream_offset != "":
        consumer["x-stream-offset"] = wish.stream_offset
    return Place(name, durable, False, wish.declare, arguments, consumer)
