"""NSQ's V2 protocol as pure bytes (https://nsq.io/clients/tcp_protocol_spec.html), and our envelope for headers.

NSQ's messages have no headers. Ours begin with a line of them, and what does not begin so is a bare body:

    quintet/1 {"quintet-id": "...", "content-type": "application/json", "traceparent": "..."}\\n<the body's bytes>
"""

from __future__ import annotations

import importlib
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

import msgspec
from msgspec import Struct

from quintet.errors import ProtocolError
from quintet.message import Channel, Message
from quintet.wire.names import ATTEMPT, DEADLINE, FIELDS, MEDIA_TYPE

V2: Final = b"  V2"
"""What a client says first of all."""

LARGEST_FRAME: Final = 256 << 20  # bytes; more is no frame but garbage
PIECE: Final = 1 << 18  # bytes that one step of inflating may yield

# Commands


def identify(features: Mapping[str, Any]) -> bytes:
    return b"IDENTIFY\n" + _sized(msgspec.json.encode(features))


def auth(secret: str) -> bytes:
    return b"AUTH\n" + _sized(secret.encode())


def sub(topic: str, channel: str) -> bytes:
    return f"SUB {topic} {channel}\n".encode()


def rdy(count: int) -> bytes:
    return b"RDY %d\n" % count


def fin(message: bytes) -> bytes:
    return b"FIN " + message + b"\n"


def req(message: bytes, milliseconds: int) -> bytes:
    return b"REQ %b %d\n" % (message, milliseconds)


def touch(message: bytes) -> bytes:
    return b"TOUCH " + message + b"\n"


def pub(topic: str, body: bytes) -> bytes:
    return b"PUB %b\n%b%b" % (topic.encode(), _SIZE(len(body)), body)


def mpub(topic: str, bodies: Sequence[bytes]) -> bytes:
    """All or none are accepted."""
    parts = [part for body in bodies for part in (_SIZE(len(body)), body)]
    size = 4 + 4 * len(bodies) + sum(map(len, bodies))
    return b"".join([b"MPUB %b\n" % topic.encode(), _SIZE(size), _SIZE(len(bodies)), *parts])


def dpub(topic: str, milliseconds: int, body: bytes) -> bytes:
    return b"DPUB %b %d\n%b%b" % (topic.encode(), milliseconds, _SIZE(len(body)), body)


NOP: Final = b"NOP\n"
CLS: Final = b"CLS\n"

_SIZE: Final = struct.Struct(">I").pack


def _sized(body: bytes) -> bytes:
    return _SIZE(len(body)) + body


# Frames

OK: Final = b"OK"
HEARTBEAT: Final = b"_heartbeat_"
CLOSE_WAIT: Final = b"CLOSE_WAIT"


class Response(Struct, frozen=True):
    """The answer to a command; they come in the commands' order. Heart-beats are answers to nothing."""

    body: bytes


class Failure(Struct, frozen=True):
    """A command that failed: `code` as "E_BAD_TOPIC". Most end the connection."""

    code: str
    text: str

    @property
    def unasked(self) -> bool:
        """It is about a command that is answered only where it fails; the connection lives on."""
        return self.code in _UNASKED


_UNASKED: Final = frozenset({"E_FIN_FAILED", "E_REQ_FAILED", "E_TOUCH_FAILED"})


class Arrived(Struct):
    """A message that nsqd has pushed. `timestamp`: when nsqd took it, in nanoseconds since 1970 by nsqd's clock."""

    timestamp: int
    attempts: int
    id: bytes
    body: bytes


A = TypeVar("A", bound=Arrived)

_RESPONSE, _ERROR, _MESSAGE = 0, 1, 2
_HEAD: Final = struct.Struct(">Ii")
_MESSAGE_HEAD: Final = struct.Struct(">IiqH16s")
_HEADS = _MESSAGE_HEAD.size  # 34: size and kind of the frame, then timestamp, attempts and id


class Frames(Generic[A]):
    """Makes events of one connection's bytes. What is no frame, or over `largest` bytes, raises ProtocolError, and
    from then on everything does. What is declared takes no memory before it is there."""

    def __init__(self, arrived: type[A], largest: int = LARGEST_FRAME) -> None:
        self._arrived = arrived
        self._largest = largest
        self._parts: list[bytes] = []  # of a frame that is not complete
        self._have = 0
        self._need = 8
        self._error: ProtocolError | None = None

    def feed(self, data: bytes) -> list[A | Response | Failure]:
        """The events that are complete with these bytes. Raises ProtocolError once there are none before it."""
        if self._error is not None:
            raise self._error
        if self._parts:
            self._parts.append(data)
            self._have += len(data)
            if self._have < self._need:
                return []
            data = b"".join(self._parts)
            self._parts.clear()
        events: list[A | Response | Failure] = []
        at, end = 0, len(data)
        need = 8
        try:
            while (left := end - at) >= 8:
                if left >= _HEADS:
                    size, kind, timestamp, attempts, message = _MESSAGE_HEAD.unpack_from(data, at)
                    if kind == _MESSAGE and _HEADS - 4 <= size <= self._largest:
                        stop = at + 4 + size
                        if stop > end:
                            need = 4 + size
                            break
                        events.append(self._arrived(timestamp, attempts, message, data[at + _HEADS : stop]))
                        at = stop
                        continue
                else:
                    size, kind = _HEAD.unpack_from(data, at)
                self._check(size, kind)
                stop = at + 4 + size
                if stop > end:
                    need = 4 + size
                    break
                body = data[at + 8 : stop]
                events.append(Response(body) if kind == _RESPONSE else _failure(body))
                at = stop
        except ProtocolError as error:
            self._error = error
            if not events:
                raise
            return events
        if at < end:
            rest = data[at:] if at else data
            self._parts.append(rest)
            self._have, self._need = len(rest), need
        return events

    def _check(self, size: int, kind: int) -> None:
        if not _RESPONSE <= kind <= _MESSAGE:
            raise ProtocolError(f"a frame of kind {kind} is none of NSQ's: is there an nsqd at the other end?")
        least = _HEADS - 4 if kind == _MESSAGE else 4
        if not least <= size <= self._largest:
            raise ProtocolError(f"a frame of {size} bytes: NSQ's have {least} to {self._largest} here")


def _failure(body: bytes) -> Failure:
    code, _, text = body.decode(errors="replace").partition(" ")
    return Failure(code, text)


# Compression of a connection


class Layer(Protocol):
    """What stands between the frames and the socket, where that was agreed on."""

    def pack(self, data: bytes) -> bytes: ...

    def unpack(self, data: bytes) -> Iterator[bytes]:
        """In pieces of bounded size. Raises ProtocolError."""
        ...


class Deflate:
    """DEFLATE (RFC 1951) without a header, flushed at each write."""

    def __init__(self, level: int = 1) -> None:  # more would block the loop for 20 ms and longer over a megabyte
        self._out = zlib.compressobj(level, wbits=-15)
        self._in = zlib.decompressobj(wbits=-15)

    def pack(self, data: bytes) -> bytes:
        return self._out.compress(data) + self._out.flush(zlib.Z_SYNC_FLUSH)

    def unpack(self, data: bytes) -> Iterator[bytes]:
        while True:
            try:
                piece = self._in.decompress(data, PIECE)
            except zlib.error as error:
                raise ProtocolError(f"what came is no DEFLATE: {error}") from None
            data = self._in.unconsumed_tail
            if piece:
                yield piece
            if self._in.eof:
                raise ProtocolError("nsqd ended its DEFLATE stream")
            if not data and len(piece) < PIECE:
                return


class Snappy:
    """Snappy's framing format; needs the library `python-snappy`."""

    def __init__(self) -> None:
        snappy = importlib.import_module("snappy")
        self._out: Any = snappy.StreamCompressor()
        self._in: Any = snappy.StreamDecompressor()

    def pack(self, data: bytes) -> bytes:
        return bytes(self._out.add_chunk(data))

    def unpack(self, data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), PIECE):
            try:
                piece = bytes(self._in.decompress(data[start : start + PIECE]))
            except Exception as error:  # each release of it has errors of its own
                raise ProtocolError(f"what came is no Snappy: {error}") from None
            if piece:
                yield piece


# The envelope

ENVELOPE: Final = b"quintet/1 "
NOT_BEFORE: Final = "quintet-not-before"
"""Seconds of the wall clock before which a deferred message is not handled, for nsqd may forget to wait."""
DEFERRED: Final = b'quintet/1 {"quintet-not-before":'
"""How the envelope of a deferred message begins."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(dict[str, str]).decode
_decode_any = msgspec.json.Decoder(dict[str, Any]).decode

_ID, _OPERATION, _SENDER, _VERSION = FIELDS["id"], FIELDS["operation"], FIELDS["sender"], FIELDS["version"]
_KEY, _REPLY_TO, _CORRELATION = FIELDS["key"], FIELDS["reply_to"], FIELDS["correlation_id"]
_STATUS = FIELDS["status"]


def pack(message: Message, deadline: float | None = None, not_before: float | None = None) -> bytes:
    """A message's envelope and body; both times are in seconds of the wall clock."""
    headers: dict[str, str] = {} if not_before is None else {NOT_BEFORE: f"{not_before:.3f}"}
    headers.update(message.headers)
    headers[_ID] = message.id
    if message.operation:
        headers[_OPERATION] = message.operation
    if message.sender:
        headers[_SENDER] = message.sender
    if message.version:
        headers[_VERSION] = message.version
    if message.key:
        headers[_KEY] = message.key
    if message.reply_to:
        headers[_REPLY_TO] = message.reply_to
    if message.correlation_id:
        headers[_CORRELATION] = message.correlation_id
    if message.status:
        headers[_STATUS] = message.status
    if message.media_type:
        headers[MEDIA_TYPE] = message.media_type
    if message.attempt != 1:
        headers[ATTEMPT] = str(message.attempt)
    if deadline is not None:
        headers[DEADLINE] = f"{deadline:.3f}"
    return b"%b%b\n%b" % (ENVELOPE, _encode(headers), message.body)


def unpack(arrived: Arrived, channel: Channel) -> tuple[Message, float | None]:
    """The message, and its deadline in seconds of the wall clock. Never fails: what is no envelope is a bare body, and
    a header that makes no sense is passed over. Where none tells an id it is NSQ's, the same at each redelivery."""
    body, headers = _open(arrived.body)
    if not headers:
        return Message(
            channel=channel, body=body, id=arrived.id.decode(errors="replace"), attempt=arrived.attempts, headers={}
        ), None
    pop = headers.pop
    deadline = _number(pop(DEADLINE, ""))
    before = _number(pop(ATTEMPT, "")) or 1.0
    pop(NOT_BEFORE, None)
    return Message(
        channel=channel,
        body=body,
        id=pop(_ID, "") or arrived.id.decode(errors="replace"),
        operation=pop(_OPERATION, ""),
        sender=pop(_SENDER, ""),
        media_type=pop(MEDIA_TYPE, ""),
        version=pop(_VERSION, ""),
        key=pop(_KEY, ""),
        reply_to=pop(_REPLY_TO, ""),
        correlation_id=pop(_CORRELATION, ""),
        status=pop(_STATUS, ""),
        attempt=int(before) - 1 + arrived.attempts,
        headers=headers,
    ), deadline


def repeat(body: bytes) -> bytes:
    """The body of one of our messages as that of its next attempt."""
    payload, headers = _open(body)
    headers[ATTEMPT] = str(int(_number(headers.get(ATTEMPT, "")) or 1) + 1)
    return b"%b%b\n%b" % (ENVELOPE, _encode(headers), payload)


def not_before(body: bytes) -> float | None:
    """Of a deferred message, in seconds of the wall clock."""
    return _number(_open(body)[1].get(NOT_BEFORE, ""))


def _open(body: bytes) -> tuple[bytes, dict[str, str]]:
    """The body proper and the headers; for a bare body there are none."""
    if not body.startswith(ENVELOPE):
        return body, {}
    end = body.find(b"\n", len(ENVELOPE))
    if end < 0:
        return body, {}
    line = body[len(ENVELOPE) : end]
    try:
        headers = _decode(line)
    except (msgspec.DecodeError, RecursionError):
        try:
            headers = {
                name: str(value) for name, value in _decode_any(line).items() if isinstance(value, str | int | float)
            }
        except (msgspec.DecodeError, RecursionError):
            return body, {}
    return body[end + 1 :], headers


def _number(text: str) -> float | None:
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number < 1e12 else None
