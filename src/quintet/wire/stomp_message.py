"""How a Message and its channel look in STOMP, on each of the brokers that speak it.

A field travels as the header that STOMP or the broker has for it, or as one of `wire/names.py` where it has none:

| field            | header                                                                                     |
|------------------|--------------------------------------------------------------------------------------------|
| `id`             | quintet-id; where its sender gave none, the broker's message-id                            |
| `media_type`     | content-type                                                                               |
| `operation`      | type                                                                                       |
| `correlation_id` | correlation-id                                                                             |
| `reply_to`       | reply-to, a destination; `/topic/NAME` is the temporary channel NAME                       |
| `deadline`       | quintet-deadline, seconds since 1970; on channels that are not durable what makes the      |
|                  | broker drop it: expires, milliseconds since 1970 (RabbitMQ: also expiration, from now)     |
| `attempt`        | quintet-attempt, left out where it is 1                                                    |
| `key`            | quintet-key; on keyed channels of ActiveMQ beside it JMSXGroupID, which it shows nobody    |
| `sender`, `version`, `status` | quintet-sender, quintet-version, quintet-status                               |
| `headers`        | each under its own name; where that means something here, behind quintet-header-           |

Beside them: persistent (true where the channel is durable), priority (of `Publish(priority=)`), content-length always.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import filterfalse
from typing import Final
from urllib.parse import quote, unquote

from msgspec import Struct
from msgspec.structs import force_setattr

from quintet.clock import Clock
from quintet.errors import ConfigurationError
from quintet.message import Channel, Message, Native
from quintet.wire.names import ATTEMPT, DEAD, DEADLINE, FIELDS, MEDIA_TYPE, PREFIX

CRASHED: Final = "quintet-crashed"
"""How often receivers of a message went away in the midst of it: written by the one that gets it then."""
MARK: Final = "quintet-mark"
"""Of what is no message, but tells whoever sent it that all before it were read."""

GONE: Final = "quintet-dead-temporary"
"""Of a dead letter whose channel or group went with its process: nobody is there to get it again."""

USERS: Final = "quintet-header-"
TEMPORARY: Final = "/topic/"

_OWN: Final = frozenset({*FIELDS.values(), ATTEMPT, DEADLINE, CRASHED, MARK, "correlation-id", "reply-to", MEDIA_TYPE})
_STOMPS: Final = frozenset(
    {"ack", "content-length", "destination", "id", "message-id", "receipt", "receipt-id", "redelivered", "selector"}
    | {"subscription", "transaction", "version", "heart-beat", "message", "server", "session"}
)
_BROKERS: Final = frozenset(
    {"amq-msg-type", "AMQ_SCHEDULED_CRON", "AMQ_SCHEDULED_DELAY", "AMQ_SCHEDULED_PERIOD", "AMQ_SCHEDULED_REPEAT"}
    | {"browser", "expires", "JMSXGroupFirstForConsumer", "JMSXGroupID", "JMSXGroupSeq", "JMSXUserID"}
    | {"original-destination", "persistent", "priority", "scheduledJobId", "timestamp", "transformation", "type"}
    | {"amqp-message-id", "app-id", "auto-delete", "cluster-id", "content-encoding", "durable", "exclusive"}
    | {"expiration", "prefetch-count", "user-id", "x-consumer-timeout", "x-dead-letter-exchange", "x-death"}
    | {"x-dead-letter-routing-key", "x-delivery-count", "x-expires", "x-first-death-exchange", "x-first-death-queue"}
    | {"x-first-death-reason", "x-last-death-exchange", "x-last-death-queue", "x-last-death-reason", "x-max-length"}
    | {"x-max-length-bytes", "x-max-priority", "x-message-ttl", "x-original-exchange", "x-original-routing-key"}
    | {"x-overflow", "x-queue-name", "x-queue-type", "x-single-active-consumer", "x-stream-offset"}
)
TAKEN: Final = _OWN | _STOMPS | _BROKERS
"""Names that mean something to STOMP, to a broker or to us: no header of a user's is written under one of them."""

SHORT_HEAD: Final = 2500
"""Bytes of a head that is within every limit, also that on the number of headers."""
LONGEST_HEAD: Final = 60_000
"""Bytes of all that stands before a message's body. Brokers add to it, and who receives it reads only so much."""
_CUT = 1500  # bytes that are kept of a header of ours where a copy is over a limit: with all of them it is within it
_LINES = 10  # that come to a message's headers: where it goes, its length, what its channel has it say

_WAITS: Final = [step * 10**power for power in range(6) for step in (10, 15, 20, 30, 50, 70)] + [10_000_000]
"""Milliseconds that the queues of delayed messages hold theirs: a queue for each, so there are not too many."""

_ID, _, _SENDER, _VERSION, _KEY, _, _, _STATUS = FIELDS.values()


class Dialect(Struct, frozen=True, kw_only=True):
    """What one broker makes of STOMP. {channel} and {group} stand for their names: in a destination as `in_path` writes
    them, in a header as `in_header` does."""

    name: str
    server: str
    """How the server header of its CONNECTED begins."""
    escapes_all: bool
    """Of names all but letters, digits and ._-~ is percent-encoded, of groups' names the dot too; else only / and %."""
    queue: str = "/queue/{channel}"
    """Where what one receiver is to get is sent, and received."""
    events: str
    """Where what every group is to get is sent, and received by a group that is gone when it leaves."""
    group: str
    """What a group that stays subscribes to,"""
    group_headers: Mapping[str, str] = {}
    """with these headers,"""
    copy: str
    """and where a copy for this one group is sent."""
    dead: str
    """Where dead letters are kept."""
    dead_lock: str = ""
    """A queue that only one connection can have, where there is no `exclusive`: it looks at the dead letters alone."""
    replies: str
    """The temporary destination for replies, with a name of ours behind it."""
    replies_subscribed: bool
    """It is subscribed to; else a SEND that names it as its reply-to does that."""
    prefetch: str
    """The header of SUBSCRIBE that bounds what is delivered and not yet acknowledged."""
    exclusive: Mapping[str, str] = {}
    """Headers of SUBSCRIBE by which only one of several receivers is served at a time; none where it cannot do that."""
    key: str = ""
    """The header that keeps messages of one value with one receiver; without it there is no order of several."""
    expiration: str = ""
    """The header that tells how many milliseconds a message lives; without it `expires` tells until when."""
    hangs_up: bool
    """After an ERROR, and often without saying to which frame, it ends the connection."""
    transactions: bool
    """SEND and ACK take effect together, and many of them for the price of one."""
    unsubscribe_returns: bool
    """UNSUBSCRIBE gives back what was delivered and not acknowledged; else only the end of the connection does."""
    selectors: bool
    scheduler: bool
    """It may be able to delay a message; else it waits in a queue of its own, until its time to live is over."""
    refused: Mapping[str, str]
    """Names that no header may have, for each the reason."""
    longest_header: int = LONGEST_HEAD
    """Bytes of one header as it is written,"""
    most_headers: int = LONGEST_HEAD
    """and how many there may be: over a message with more it hangs up."""

    def in_path(self, name: str) -> str:
        """A name as part of a destination."""
        return quote(name, safe="") if self.escapes_all else self.in_header(name).replace("/", "%2F")

    def in_header(self, name: str) -> str:
        """The name of a queue where it is the value of a header."""
        return name.replace("%", "%25")  # %2F would come out as / there

    def group_in_path(self, group: str) -> str:
        name = self.in_path(group)
        return name.replace(".", "%2E") if self.escapes_all else name


DIALECTS: Final = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            name="activemq",
            server="ActiveMQ/",
            escapes_all=True,
            events="/topic/VirtualTopic.{channel}",
            group="/queue/Consumer.{group}.VirtualTopic.{channel}",
            copy="/queue/Consumer.{group}.VirtualTopic.{channel}",
            dead="/queue/quintet.dead",
            replies="/temp-topic/",  # costs the broker less than a queue
            replies_subscribed=True,
            prefetch="activemq.prefetchSize",
            exclusive={"activemq.exclusive": "true"},
            key="JMSXGroupID",
            hangs_up=False,
            transactions=True,
            unsubscribe_returns=True,
            selectors=True,
            scheduler=True,
            refused={"": "ActiveMQ hangs up over it"},
            longest_header=10 << 10,
            most_headers=990,  # of its 1000, as receipt, transaction and the like come to it
        ),
        Dialect(
            name="rabbitmq",
            server="RabbitMQ/",
            escapes_all=False,
            events="/topic/{channel}",
            group="/topic/{channel}",
            group_headers={"durable": "true", "auto-delete": "false", "x-queue-name": "{channel}@{group}"},
            copy="/amq/queue/{channel}@{group}",
            dead="/queue/quintet.dead.stomp",  # over AMQP quintet.dead is a queue that STOMP cannot declare alike
            dead_lock="/queue/quintet.dead.lock",
            replies="/temp-queue/",
            replies_subscribed=False,
            prefetch="prefetch-count",
            expiration="expiration",
            hangs_up=True,
            transactions=False,
            unsubscribe_returns=False,
            selectors=False,
            scheduler=False,
            refused=dict.fromkeys(("CC", "BCC"), "RabbitMQ sends copies by it"),
        ),
    )
}
"""The brokers whose STOMP is known."""


def destination(dialect: Dialect, channel: Channel, group: str = "") -> str:
    """Where a message on the channel is sent to; with a group: for this one alone."""
    if channel.name == DEAD:
        return dialect.dead
    if channel.temporary:
        return channel.name if channel.name.startswith("/") else TEMPORARY + dialect.in_path(channel.name)
    form = dialect.queue if not channel.fanout else dialect.copy if group else dialect.events
    return form.format(channel=dialect.in_path(channel.name), group=dialect.group_in_path(group))


def subscription(dialect: Dialect, channel: Channel, group: str) -> dict[str, str]:
    """The headers of SUBSCRIBE by which a group receives the channel."""
    if not channel.fanout or channel.temporary:
        form = dialect.events if channel.fanout else TEMPORARY + "{channel}" if channel.temporary else dialect.queue
        return {"destination": form.format(channel=dialect.in_path(channel.name))}
    path = {"channel": dialect.in_path(channel.name), "group": dialect.group_in_path(group)}
    named = {"channel": dialect.in_header(channel.name), "group": dialect.in_header(group)}
    headers = {name: value.format(**named) for name, value in dialect.group_headers.items()}
    return {"destination": dialect.group.format(**path), **headers}


def waiting_room(dialect: Dialect, channel: Channel, group: str, after: float) -> dict[str, str]:
    """The headers of a SEND into a queue where a message lives for about so many seconds and then goes to the group."""
    queue = f"{channel.name}@{group}" if channel.fanout else channel.name
    wait = next(wait for wait in _WAITS if wait >= min(after * 1000, _WAITS[-1]))
    return {
        "destination": dialect.queue.format(channel=dialect.in_path(f"quintet.again.{wait}.{queue}")),
        "persistent": "true",
        "x-message-ttl": str(wait),
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": dialect.in_header(queue),
    }


def headers_of(message: Message, dialect: Dialect, clock: Clock, *, durable: bool, keyed: bool) -> dict[str, str]:
    """The headers of a SEND that a message's fields become, but for its reply-to."""
    headers: dict[str, str] = {}
    for name, value in message.headers.items():
        if name in TAKEN:
            headers[USERS + name] = value
        elif not name.startswith(":"):  # pseudo headers are REST's
            headers[name] = value
    if message.id:
        headers[_ID] = message.id
    if message.media_type:
        headers[MEDIA_TYPE] = message.media_type
    if message.operation:
        headers["type"] = message.operation
    if message.sender:
        headers[_SENDER] = message.sender
    if message.version:
        headers[_VERSION] = message.version
    if message.correlation_id:
        headers["correlation-id"] = message.correlation_id
    if message.status:
        headers[_STATUS] = message.status
    if message.attempt != 1:
        headers[ATTEMPT] = str(message.attempt)
    if message.key:
        headers[_KEY] = message.key
        if keyed and dialect.key:
            headers[dialect.key] = message.key
    if message.deadline is not None:
        left = message.deadline - clock.now()
        if durable or dialect.expiration:  # ActiveMQ keeps what is durable and has expired, in a queue of its own
            headers[DEADLINE] = f"{clock.wall() + left:.3f}"
        if not durable:
            if dialect.expiration:
                headers[dialect.expiration] = str(max(0, int(left * 1000)))
            else:
                headers["expires"] = str(int((clock.wall() + left) * 1000))
    return headers


def message_of(headers: Mapping[str, str], body: bytes, channel: Channel, clock: Clock) -> Message:
    """The message that a frame carries, whoever sent it: what makes no sense in its headers is passed over."""
    get = headers.get
    users: dict[str, str] = {}
    for name in filterfalse(TAKEN.__contains__, headers):
        users[name.removeprefix(USERS)] = headers[name]
    message = Message(
        channel=channel,
        body=body,
        id=get(_ID) or get("amqp-message-id") or get("message-id", ""),
        operation=get("type", ""),
        sender=get(_SENDER, ""),
        media_type=get(MEDIA_TYPE, ""),
        version=get(_VERSION, ""),
        key=get(_KEY, ""),
        correlation_id=get("correlation-id", ""),
        status=get(_STATUS, ""),
        headers=users,
    )
    if reply_to := get("reply-to", ""):
        named = reply_to.startswith(TEMPORARY)
        message.reply_to = unquote(reply_to[len(TEMPORARY) :]) if named else reply_to
    if ATTEMPT in headers:
        message.attempt = max(1, int(_number(headers[ATTEMPT])))
    if DEADLINE in headers:
        message.deadline = clock.from_wall(_number(headers[DEADLINE]) or None)
    elif get("expires", "0") != "0":
        message.deadline = clock.from_wall(_number(headers["expires"]) / 1000 or None)
    return message


def crashes(headers: Mapping[str, str]) -> int:
    """How often receivers went away in the midst of a message, as was counted so far."""
    return max(0, int(_number(headers[CRASHED]))) if CRASHED in headers else 0


def _number(text: str) -> float:
    """A number that a header tells; 0 for what is none."""
    try:
        number = float(text) if text else 0.0
    except ValueError:
        return 0.0
    return number if abs(number) < 1e15 else 0.0


# What a broker takes


def check(dialect: Dialect, headers: Mapping[str, str], head: bytes) -> None:
    """Raises ValueError for a message that the broker would hang up over, or that whoever receives it could not read.
    `head`: its headers as they are written."""
    for name in dialect.refused:
        if name in headers:
            raise ValueError(f"a header cannot be named {name!r}: {dialect.refused[name]}; take another name")
    lines = head.split(b"\n")
    longest = max(lines, key=len)
    if len(longest) > dialect.longest_header:
        name = longest.partition(b":")[0][:40].decode(errors="ignore")
        raise ValueError(
            f"its header {name!r} takes {len(longest)} bytes, and may take {dialect.longest_header}: say less in it"
        )
    if len(lines) > dialect.most_headers:
        raise ValueError(f"it has {len(lines)} headers, and may have {dialect.most_headers}")
    if len(head) > LONGEST_HEAD:
        raise ValueError(f"its headers take {len(head)} bytes, and may take {LONGEST_HEAD}: say less in them")


def cut(dialect: Dialect, headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of a copy that must be taken, though `check` refused it: ours are cut, and a user's left out that
    are long, or one too many."""
    kept: dict[str, str] = {}
    for name, value in headers.items():
        if name in TAKEN or (name.startswith(PREFIX) and not name.startswith(USERS)):
            kept[name] = value.encode(errors="replace")[:_CUT].decode(errors="ignore")
    most = min(dialect.longest_header, LONGEST_HEAD) // 2  # escaped it may be twice as long
    room = LONGEST_HEAD // 2 - _CUT - sum(map(_size, kept.items()))
    for header in headers.items():
        name, value = header
        if name in kept or name in dialect.refused or len(kept) > dialect.most_headers - _LINES:
            continue
        if (size := _size(header)) <= min(most, room):
            kept[name] = value
            room -= size
    return kept


def _size(header: tuple[str, str]) -> int:
    return sum(len(part.encode(errors="replace")) + 1 for part in header)


# What only STOMP can do


class Subscription(Native, frozen=True, kw_only=True):
    """Of a channel that is served: `Channel.native`.

    `selector`: which messages to receive at all, an SQL 92 condition on headers whose names have no "-" (ActiveMQ).
    `exclusive`: of all receivers only one is served at a time. `prefetch`: messages that the broker may hand out before
    they are acknowledged, instead of the handlers' limit. `headers`: further ones of SUBSCRIBE, as they are.
    """

    selector: str = ""
    exclusive: bool = False
    prefetch: int = 0
    headers: Mapping[str, str] | tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.prefetch < 0:
            raise ConfigurationError(f"{self!r}: prefetch must be 1 or more messages, or 0 for the handlers' limit")
        _take_headers(self, self.headers)


class Publish(Native, frozen=True, kw_only=True):
    """Of one message, or of all that are sent to a channel: `Message.native`, `Channel.native`.

    `priority`: 0 to 9, where 4 is what all others have. `headers`: further ones of SEND, as they are.
    """

    priority: int | None = None
    headers: Mapping[str, str] | tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.priority is not None and not 0 <= self.priority <= 9:
            raise ConfigurationError(f"{self!r}: priority must be 0 to 9")
        _take_headers(self, self.headers)

    @property
    def written(self) -> dict[str, str]:
        """The headers of SEND that it stands for."""
        return dict(self.headers) | ({} if self.priority is None else {"priority": str(self.priority)})


_OURS = frozenset({"destination", "id", "ack", "receipt", "transaction", "content-length", "selector"})


def _take_headers(options: Native, headers: Mapping[str, str] | tuple[tuple[str, str], ...]) -> None:
    pairs = tuple(headers.items()) if isinstance(headers, Mapping) else headers
    if taken := [name for name, _ in pairs if name in _OURS]:
        raise ConfigurationError(f"{options!r}: the header {taken[0]} is not for you to write")
    force_setattr(options, "headers", pairs)  # so that a channel can be hashed
