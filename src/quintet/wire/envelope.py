"""A message as it is kept in a table: all that has no column of its own, in one MessagePack array."""

from __future__ import annotations

from msgspec import DecodeError, Struct, msgpack

from quintet.message import Channel, Message


class _Envelope(Struct, array_like=True):
    """Append only, with defaults: what is kept outlives a deployment."""

    id: str
    operation: str
    sender: str
    media_type: str
    version: str
    key: str
    reply_to: str
    correlation_id: str
    status: str
    headers: dict[str, str]
    body: bytes


_encode = msgpack.Encoder().encode
_decode = msgpack.Decoder(_Envelope).decode


def pack(message: Message) -> bytes:
    """All of a message but its channel, deadline and attempt."""
    m = message
    named = (m.id, m.operation, m.sender, m.media_type, m.version, m.key, m.reply_to, m.correlation_id, m.status)
    return _encode((*named, m.headers, m.body))


def unpack(packed: bytes, channel: Channel, attempt: int = 1, deadline: float | None = None) -> Message:
    """The reverse of `pack`. Raises DecodeError."""
    try:
        e = _decode(packed)
    except RecursionError:
        raise DecodeError("it is nested too deep") from None
    return Message(
        channel=channel,
        body=e.body,
        id=e.id,
        operation=e.operation,
        sender=e.sender,
        media_type=e.media_type,
        version=e.version,
        key=e.key,
        reply_to=e.reply_to,
        correlation_id=e.correlation_id,
        status=e.status,
        deadline=deadline,
        attempt=attempt,
        headers=e.headers,
    )
