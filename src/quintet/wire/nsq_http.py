"""What nsqd and nsqlookupd say over HTTP, as pure bytes (https://nsq.io/components/nsqd.html#http-api)."""

from __future__ import annotations

from typing import Final, TypeVar
from urllib.parse import urlencode, urlsplit

import msgspec
from msgspec import Struct

from quintet.errors import ProtocolError

# Go writes an empty list as null

LARGEST: Final = 1 << 26  # bytes of an answer


class ChannelStats(Struct):
    """One of NSQ's channels in /stats."""

    channel_name: str
    depth: int = 0
    in_flight_count: int = 0
    deferred_count: int = 0
    client_count: int = 0

    @property
    def messages(self) -> int:
        """All that it holds."""
        return self.depth + self.in_flight_count + self.deferred_count


class TopicStats(Struct):
    """One topic in /stats."""

    topic_name: str
    depth: int = 0
    message_count: int = 0
    channels: list[ChannelStats] | None = None

    @property
    def abandoned(self) -> bool:
        """Nobody is connected to any of its channels."""
        return not any(channel.client_count for channel in self.channels or ())


class Stats(Struct):
    """nsqd's /stats."""

    topics: list[TopicStats] | None = None


class Info(Struct):
    """nsqd's /info; `start_time` in seconds of the wall clock."""

    tcp_port: int = 0
    start_time: float = 0


class Producer(Struct):
    """An nsqd that a lookup daemon knows."""

    broadcast_address: str
    tcp_port: int
    http_port: int


class Producers(Struct):
    """nsqlookupd's /nodes."""

    producers: list[Producer] | None = None


K = TypeVar("K")


def stats_url(base: str, **wanted: str) -> str:
    """Of all topics, or of the `topic` and `channel` wanted; without what costs nsqd most."""
    return f"{base}/stats?{urlencode({'format': 'json', 'include_clients': 'false', 'include_mem': 'false', **wanted})}"


def request(url: str, method: str = "GET") -> bytes:
    """HTTP/1.0, whose answer is whole and ends with the connection."""
    parts = urlsplit(url)
    path = f"{parts.path}?{parts.query}" if parts.query else parts.path
    return f"{method} {path} HTTP/1.0\r\nHost: {parts.netloc}\r\nContent-Length: 0\r\n\r\n".encode()


def body_of(answer: bytes, url: str) -> bytes:
    """The body of a good answer. Raises ProtocolError."""
    status, _, rest = answer.partition(b"\r\n")
    words = status.split(b" ", 2)
    if not status.startswith(b"HTTP/1.") or words[1:2] != [b"200"] or len(answer) > LARGEST:
        raise ProtocolError(f"{url} answered with {status[:100].decode(errors='replace')!r}")
    return rest.partition(b"\r\n\r\n")[2]


def read(body: bytes, kind: type[K], url: str) -> K:
    """An answer as what it should be. Raises ProtocolError."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ProtocolError(f"{url} answered with what is not NSQ's: {error}") from None
