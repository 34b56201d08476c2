"""What travels: a message on a channel, and the one function shape that carries it (imports nothing of ours)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Awaitable, Callable
from typing import TypeAlias, TypeVar

from msgspec import Struct


class Native(Struct, frozen=True):
    """Options of one transport for a channel or a message; each transport that has any derives its own kinds."""


N = TypeVar("N", bound=Native)


def native_of(options: tuple[Native, ...], kind: type[N], default: N) -> N:
    """The options of this kind among those given, the first where there are several."""
    return next((option for option in options if isinstance(option, kind)), default)


class Channel(Struct, frozen=True, cache_hash=True):
    """Where a message goes.

    `fanout`: every group receives a copy, one member of each; otherwise one receiver gets it.
    `durable`: accepted means on disk, where the transport can; requests and surveys are not, their caller waits.
    `temporary`: belongs to the one process that serves it and goes with it (replies, every-instance groups).
    `keyed`: its messages have keys, and those of one key are handled in order, where the transport is ORDERED.
    `replies`: takes the replies to this process, which reach it by what its transport writes as their address.
    `route`: what a REST binding serves this channel under, as "GET /v1/passengers/{passenger_id}".
    `native`: what one transport alone can do, in its own typed options (`quintet.transports.amqp.Queue`); the others
    pass over them.
    """

    name: str
    fanout: bool = False
    durable: bool = False
    temporary: bool = False
    keyed: bool = False
    replies: bool = False
    route: str = ""
    native: tuple[Native, ...] = ()


class Message(Struct, kw_only=True):
    """Headers and body bytes. Knows no socket, no acknowledgement and no Python object.

    `deadline` is this process's monotonic clock in seconds, None where nothing expires; a transport carries it as
    remaining milliseconds (direct) or as wall-clock time (queues); `until` is when the sender gives up, and stays here:
    the time-out of what nobody waits for bounds its acceptance only; `hurried` is when the caller gives up, where that
    is earlier than its policy would; `begun` is when this attempt was. `status` is
    empty on requests and good replies, else the code of the failure (`errors.py`). Pseudo headers (":method", ":path",
    ":status", RFC 9113) travel in `headers` beside the user's own and the W3C trace context. `cache_key` is there where
    the sender's policy keeps replies, and stays here.
    """

    channel: Channel
    body: bytes = b""
    id: str = ""
    operation: str = ""
    sender: str = ""
    media_type: str = ""
    version: str = ""
    key: str = ""
    reply_to: str = ""
    correlation_id: str = ""
    status: str = ""
    deadline: float | None = None
    until: float | None = None
    hurried: float | None = None
    begun: float = 0.0
    attempt: int = 1
    headers: dict[str, str] = {}
    native: tuple[Native, ...] = ()
    cache_key: bytes = b""

    def __repr__(self) -> str:
        failed = f", {self.status}" if self.status else ""
        return f"<Message {self.id} {self.operation or self.channel.name} from {self.sender or '?'}{failed}>"


Handler: TypeAlias = Callable[[Message], Awaitable[Message | None]]
"""The centre: a transport's send, a server's handler and a wrapped client all have this shape."""


_prefix = ""
_counter = itertools.count()


def _reseed() -> None:
    global _prefix
    _prefix = os.urandom(8).hex() + "-"


_reseed()
os.register_at_fork(after_in_child=_reseed)  # two children must not deal the same ids


def new_id() -> str:
    """A fresh message id: 64 random bits of the process and a counter (a tenth of the cost of uuid4)."""
    return f"{_prefix}{next(_counter):x}"
