"""AMQP 0-9-1 as RabbitMQ speaks it, as pure bytes: frames, methods and field tables.

The specification: sections 2.3 and 4.2 (framing and grammar), and RabbitMQ's errata for the types of table fields. How
a Message looks in them is in `amqp_message.py`.
"""

from __future__ import annotations

import datetime
import math
import struct
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, Final, TypeAlias

from msgspec import Struct

from quintet.errors import InvalidMessage, ProtocolError

PROTOCOL_HEADER: Final = b"AMQP\x00\x00\x09\x01"
HEARTBEAT: Final = b"\x08\x00\x00\x00\x00\x00\x00\xce"
FRAME_MAX: Final = 131_072  # bytes of a frame that we propose, RabbitMQ's own default
FRAME_LEAST: Final = 4096  # what every peer must take (section 4.2.3)
BODY_MAX: Final = 512 * 1024 * 1024  # RabbitMQ's hard limit: who declares more is no RabbitMQ
DEPTH_MAX: Final = 64  # of tables within tables

CAPABILITIES: Final = {
    "publisher_confirms": True,
    "consumer_cancel_notify": True,
    "exchange_exchange_bindings": True,
    "basic.nack": True,
    "connection.blocked": True,
    "authentication_failure_close": True,
}
"""What we can do beyond the specification, as connection.start-ok tells."""

# ------------------------------------------------------------------------------------------------------------- methods

METHODS: Final[dict[str, tuple[int, int, str]]] = {
    "connection.start": (10, 10, "o:major o:minor T:server_properties L:mechanisms L:locales"),
    "connection.start-ok": (10, 11, "T:client_properties S:mechanism L:response S:locale"),
    "connection.secure": (10, 20, "L:challenge"),
    "connection.secure-ok": (10, 21, "L:response"),
    "connection.tune": (10, 30, "s:channel_max l:frame_max s:heartbeat"),
    "connection.tune-ok": (10, 31, "s:channel_max l:frame_max s:heartbeat"),
    "connection.open": (10, 40, "S:virtual_host S:capabilities b:insist"),
    "connection.open-ok": (10, 41, "S:known_hosts"),
    "connection.close": (10, 50, "s:reply_code S:reply_text s:class_id s:method_id"),
    "connection.close-ok": (10, 51, ""),
    "connection.blocked": (10, 60, "S:reason"),
    "connection.unblocked": (10, 61, ""),
    "connection.update-secret": (10, 70, "L:new_secret S:reason"),
    "connection.update-secret-ok": (10, 71, ""),
    "channel.open": (20, 10, "S:out_of_band"),
    "channel.open-ok": (20, 11, "L:channel_id"),
    "channel.flow": (20, 20, "b:active"),
    "channel.flow-ok": (20, 21, "b:active"),
    "channel.close": (20, 40, "s:reply_code S:reply_text s:class_id s:method_id"),
    "channel.close-ok": (20, 41, ""),
    "exchange.declare": (
        40,
        10,
        "- S:exchange S:type b:passive b:durable b:auto_delete b:internal b:no_wait T:arguments",
    ),
    "exchange.declare-ok": (40, 11, ""),
    "exchange.delete": (40, 20, "- S:exchange b:if_unused b:no_wait"),
    "exchange.delete-ok": (40, 21, ""),
    "exchange.bind": (40, 30, "- S:destination S:source S:routing_key b:no_wait T:arguments"),
    "exchange.bind-ok": (40, 31, ""),
    "exchange.unbind": (40, 40, "- S:destination S:source S:routing_key b:no_wait T:arguments"),
    "exchange.unbind-ok": (40, 51, ""),
    "queue.declare": (50, 10, "- S:queue b:passive b:durable b:exclusive b:auto_delete b:no_wait T:arguments"),
    "queue.declare-ok": (50, 11, "S:queue l:message_count l:consumer_count"),
    "queue.bind": (50, 20, "- S:queue S:exchange S:routing_key b:no_wait T:arguments"),
    "queue.bind-ok": (50, 21, ""),
    "queue.purge": (50, 30, "- S:queue b:no_wait"),
    "queue.purge-ok": (50, 31, "l:message_count"),
    "queue.delete": (50, 40, "- S:queue b:if_unused b:if_empty b:no_wait"),
    "queue.delete-ok": (50, 41, "l:message_count"),
    "queue.unbind": (50, 50, "- S:queue S:exchange S:routing_key T:arguments"),
    "queue.unbind-ok": (50, 51, ""),
    "basic.qos": (60, 10, "l:prefetch_size s:prefetch_count b:global"),
    "basic.qos-ok": (60, 11, ""),
    "basic.consume": (60, 20, "- S:queue S:consumer_tag b:no_local b:no_ack b:exclusive b:no_wait T:arguments"),
    "basic.consume-ok": (60, 21, "S:consumer_tag"),
    "basic.cancel": (60, 30, "S:consumer_tag b:no_wait"),
    "basic.cancel-ok": (60, 31, "S:consumer_tag"),
    "basic.publish": (60, 40, "- S:exchange S:routing_key b:mandatory b:immediate"),
    "basic.return": (60, 50, "s:reply_code S:reply_text S:exchange S:routing_key"),
    "basic.deliver": (60, 60, "S:consumer_tag q:delivery_tag b:redelivered S:exchange S:routing_key"),
    "basic.get": (60, 70, "- S:queue b:no_ack"),
    "basic.get-ok": (60, 71, "q:delivery_tag b:redelivered S:exchange S:routing_key l:message_count"),
    "basic.get-empty": (60, 72, "S:cluster_id"),
    "basic.ack": (60, 80, "q:delivery_tag b:multiple"),
    "basic.reject": (60, 90, "q:delivery_tag b:requeue"),
    "basic.recover": (60, 110, "b:requeue"),
    "basic.recover-ok": (60, 111, ""),
    "basic.nack": (60, 120, "q:delivery_tag b:multiple b:requeue"),
    "confirm.select": (85, 10, "b:no_wait"),
    "confirm.select-ok": (85, 11, ""),
    "tx.select": (90, 10, ""),
    "tx.select-ok": (90, 11, ""),
    "tx.commit": (90, 20, ""),
    "tx.commit-ok": (90, 21, ""),
    "tx.rollback": (90, 30, ""),
    "tx.rollback-ok": (90, 31, ""),
}
"""Each method's class, number and arguments: o octet, s short, l long, q long long, S short string (text), L long
string (bytes), T table, b bit, - the ticket of AMQP 0-8, which is zero."""

_LAYOUTS: Final = {
    (class_ << 16) | number: (name, [(entry[0], entry[2:]) for entry in arguments.split()])
    for name, (class_, number, arguments) in METHODS.items()
}
_NUMBERS: Final = {name: (class_ << 16) | number for name, (class_, number, _) in METHODS.items()}
_DELIVER, _RETURN, _GET_OK = _NUMBERS["basic.deliver"], _NUMBERS["basic.return"], _NUMBERS["basic.get-ok"]
_ACK, _NACK = _NUMBERS["basic.ack"], _NUMBERS["basic.nack"]

_FRAME = struct.Struct(">BHI")
U16, U32, U64 = struct.Struct(">H"), struct.Struct(">I"), struct.Struct(">Q")
_TAGGED = struct.Struct(">QB")
_CONTENT = struct.Struct(">HHQ")  # of a content header: class, weight, size of the body
_HEADER = struct.Struct(">BHIHHQ")
_BODY = struct.Struct(">BBHI")  # the end of the frame before, and the header of a body's
_SETTLE = struct.Struct(">BHIIQBB")
NUMERIC: Final = {"o": struct.Struct(">B"), "s": U16, "l": U32, "q": U64}


class Method(Struct, eq=False):
    """One method that came, and its arguments by the names that METHODS gives them."""

    channel: int
    name: str
    fields: dict[str, Any]


class Content(Struct, eq=False):
    """A message that came: by basic.deliver, or, where `consumer` is empty, by basic.get-ok or basic.return."""

    channel: int
    number: int
    consumer: bytes
    tag: int
    redelivered: int  # 1 where it was delivered before
    arguments: bytes
    size: int = -1  # bytes of the body as declared
    properties: bytes = b""
    body: bytes = b""
    crashes: int = 0  # how often it came before and was not settled, once its headers are read
    made_up: str = ""  # the id that it was given here, where its sender gave it none
    origin: Any = None  # the subscription that brought it
    copy: Any = None  # what it has become, where it waits here to be handled again

    @property
    def fields(self) -> dict[str, Any]:
        """The arguments of the method that brought it. Raises ProtocolError."""
        return _arguments(self.number, self.arguments, 0, len(self.arguments))

    @property
    def returned(self) -> bool:
        return self.number == _RETURN


class Confirm(Struct, eq=False):
    """The broker has taken (`taken`) or refused a message that was published, `multiple`: all up to this one."""

    channel: int
    tag: int
    multiple: bool
    taken: bool


Event: TypeAlias = Method | Content | Confirm


class Parser:
    """Bytes in any pieces to events. `frame_max`: set to what was agreed on, once it is."""

    def __init__(self) -> None:
        self.frame_max = FRAME_MAX
        self._pieces: list[bytes] = []  # of a frame that is not whole yet
        self._held, self._needed = 0, 8
        self._open: dict[int, Content] = {}  # by channel: what lacks its header or the rest of its body
        self._bodies: dict[int, list[bytes]] = {}
        self._missing: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"<parser with {self._held} bytes of a frame, {len(self._open)} messages begun>"

    def feed(self, data: bytes) -> list[Event]:
        """What has come whole by now; heart-beats are no event. Raises ProtocolError: then nothing more is of use."""
        if self._pieces:
            self._pieces.append(data)
            self._held += len(data)
            if self._held < self._needed:
                return []
            data = b"".join(self._pieces)
            self._pieces.clear()
        events: list[Event] = []
        position, size, channel, opened = 0, len(data), 0, self._open
        try:
            while size - position >= 8:
                kind, channel, length = _FRAME.unpack_from(data, position)
                start, end = position + 7, position + 7 + length
                if end >= size or data[end] != 0xCE:
                    break
                if kind == 1:
                    number = U32.unpack_from(data, start)[0]
                    if number == _DELIVER:
                        named = start + 5 + data[start + 4]
                        tag, bits = _TAGGED.unpack_from(data, named)
                        if named + 9 > end or channel in opened:
                            raise ProtocolError(f"a delivery on channel {channel} makes no sense")
                        content = Content(
                            channel, number, data[start + 5 : named], tag, bits & 1, data[start + 4 : end]
                        )
                        if size - end > 31:  # the usual case: all the rest is there, and in one piece
                            header = end + 1
                            kind, other, length, class_, _, declared = _HEADER.unpack_from(data, header)
                            body = header + length + 15
                            if (
                                (kind, other, class_) == (2, channel, 60)
                                and body + declared < size
                                and data[body + declared] == 0xCE
                                and _BODY.unpack_from(data, body - 8) == (0xCE, 3, channel, declared)
                            ):
                                content.size = declared
                                content.properties = data[header + 19 : body - 8]
                                content.body = data[body : body + declared]
                                events.append(content)
                                position = body + declared + 1
                                continue
                        opened[channel] = content
                    elif number == _ACK or number == _NACK:  # noqa: SIM109 - a tuple of them costs more
                        tag, bits = _TAGGED.unpack_from(data, start + 4)
                        if length != 13:
                            raise ProtocolError("a confirmation has the wrong size")
                        events.append(Confirm(channel, tag, bits & 1 == 1, number == _ACK))
                    else:
                        self._method(events, channel, number, data, start + 4, end)
                elif kind == 2:
                    content = opened[channel]
                    class_, _, declared = _CONTENT.unpack_from(data, start)
                    if class_ != 60 or content.size >= 0 or declared > BODY_MAX or start + 14 > end:
                        raise ProtocolError(f"a content header on channel {channel} makes no sense")
                    content.size = declared
                    content.properties = data[start + 12 : end]
                    if not declared:
                        events.append(opened.pop(channel))
                elif kind == 3:
                    content = opened[channel]
                    if length == content.size and channel not in self._bodies:
                        content.body = data[start:end]
                        events.append(opened.pop(channel))
                    elif self._piece(content, data[start:end]):
                        events.append(opened.pop(channel))
                elif kind != 8 or channel or length:
                    raise ProtocolError(_foreign(data[position : position + 8]))
                position = end + 1
        except (struct.error, IndexError):
            raise ProtocolError("a frame ends before its fields do") from None
        except KeyError:
            raise ProtocolError(f"content on channel {channel} that no method has announced") from None
        if position < size:
            self._keep(data[position:] if position else data)
        return events

    def _keep(self, rest: bytes) -> None:
        """What is there of a frame waits for the rest of it, unless it can be no frame."""
        self._needed = 8
        if len(rest) >= 8:
            kind, _, length = _FRAME.unpack_from(rest)
            if kind not in (1, 2, 3, 8):
                raise ProtocolError(_foreign(rest[:8]))
            if length > self.frame_max - 8:
                raise ProtocolError(f"a frame of {length} bytes: {self.frame_max} are agreed on")
            self._needed = length + 8
            if len(rest) >= self._needed:
                raise ProtocolError("a frame does not end where it should")
        self._pieces.append(rest)
        self._held = len(rest)

    def _method(self, events: list[Event], channel: int, number: int, data: bytes, start: int, end: int) -> None:
        if number in (_RETURN, _GET_OK):
            if channel in self._open:
                raise ProtocolError(f"a message on channel {channel} is broken off by another")
            content = Content(channel, number, b"", 0, 0, data[start:end])
            if number == _GET_OK:
                content.tag, bits = _TAGGED.unpack_from(data, start)
                content.redelivered = bits & 1
            self._open[channel] = content
            return
        layout = _LAYOUTS.get(number)
        if layout is None:
            raise ProtocolError(f"method {number >> 16}.{number & 0xFFFF} is none of AMQP 0-9-1")
        events.append(Method(channel, layout[0], _arguments(number, data, start, end)))

    def _piece(self, content: Content, piece: bytes) -> bool:
        """One of several pieces of a body: True where it was the last."""
        channel = content.channel
        pieces = self._bodies.setdefault(channel, [])
        missing = self._missing.get(channel, content.size) - len(piece)
        if missing < 0 or content.size < 0 or not piece:
            raise ProtocolError(f"a body on channel {channel} does not have the size that was declared")
        pieces.append(piece)
        self._missing[channel] = missing
        if missing:
            return False
        content.body = b"".join(self._bodies.pop(channel))
        del self._missing[channel]
        return True


def _foreign(data: bytes) -> str:
    if data[:4] == b"AMQP":
        return f"the broker speaks AMQP {data[-3]}.{data[-2]}.{data[-1]}, and no 0-9-1: RabbitMQ is needed"
    return f"these bytes are no AMQP: {data!r}"


def _arguments(number: int, data: bytes, start: int, end: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    bit = 8
    try:
        for kind, name in _LAYOUTS[number][1]:
            if kind == "b":
                if bit == 8:
                    bit, start = 0, start + 1
                fields[name] = bool(data[start - 1] >> bit & 1)
                bit += 1
                continue
            bit = 8
            if kind == "-":
                start += 2
            elif kind == "S":
                fields[name], start = read_short(data, start, end)
            elif kind == "L":
                fields[name], start = read_long(data, start, end)
            elif kind == "T":
                fields[name], start = read_table(data, start, end)
            else:
                fields[name] = NUMERIC[kind].unpack_from(data, start)[0]
                start += NUMERIC[kind].size
    except (struct.error, IndexError):
        start = end + 1
    if start > end:
        raise ProtocolError(f"{_LAYOUTS[number][0]} ends before its arguments do")
    return fields


def method(channel: int, name: str, **fields: Any) -> bytes:
    """The frame of a method; arguments left out are zero, empty or false. Raises TypeError for unknown ones, and
    InvalidMessage for values that do not fit."""
    number = _NUMBERS[name]
    out = bytearray(U32.pack(number))
    bit = 8
    for kind, argument in _LAYOUTS[number][1]:
        value = fields.pop(argument, None)
        try:
            if kind == "b":
                if bit == 8:
                    bit = 0
                    out.append(0)
                out[-1] |= bool(value) << bit
                bit += 1
                continue
            bit = 8
            if kind == "-":
                out += b"\0\0"
            elif kind == "S":
                out += short(value or "")
            elif kind == "L":
                out += long(value or b"")
            elif kind == "T":
                out += table(value or {})
            else:
                out += NUMERIC[kind].pack(value or 0)
        except (struct.error, AttributeError, UnicodeEncodeError) as error:
            raise InvalidMessage(f"{name}: {argument}={value!r} does not fit: {error}") from None
    if fields:
        raise TypeError(f"{name} has no argument {', '.join(sorted(fields))}")
    return _FRAME.pack(1, channel, len(out)) + bytes(out) + b"\xce"


def settle(channel: int, tag: int, name: str = "basic.ack", bits: int = 0) -> bytes:
    """basic.ack, basic.reject or basic.nack; `bits`: 1 multiple (of reject: requeue), 2 requeue (of nack)."""
    return _SETTLE.pack(1, channel, 13, _NUMBERS[name], tag, bits, 0xCE)


def publishing(channel: int, exchange: str, routing_key: str, *, mandatory: bool = False) -> bytes:
    """What comes before the content of each message to one place."""
    return method(channel, "basic.publish", exchange=exchange, routing_key=routing_key, mandatory=mandatory)


def content(publish: bytes, channel: int, properties: bytes, body: bytes, frame_max: int) -> bytes:
    """The frames of one message: `publish` (of `publishing`), its header, and its body in as many as it takes."""
    size = len(body)
    if len(properties) + 20 > frame_max:
        raise InvalidMessage(f"its headers have {len(properties)} bytes, the broker allows {frame_max - 20}")
    header = _HEADER.pack(2, channel, 12 + len(properties), 60, 0, size)
    if not size:
        return b"".join((publish, header, properties, b"\xce"))
    most = frame_max - 8
    if size <= most:
        return b"".join((publish, header, properties, _BODY.pack(0xCE, 3, channel, size), body, b"\xce"))
    frames = [publish, header, properties]
    for start in range(0, size, most):
        piece = body[start : start + most]
        frames += (_BODY.pack(0xCE, 3, channel, len(piece)), piece)
    frames.append(b"\xce")
    return b"".join(frames)


def plain(user: str, password: str) -> bytes:
    """The response of the SASL mechanism PLAIN (RFC 4616)."""
    return f"\0{user}\0{password}".encode()


# -------------------------------------------------------------------------------------------------------------- fields

LENGTHS: Final = [bytes((length,)) for length in range(256)]
_SIZED: Final = {
    ord(kind): struct.Struct(f">{code}")
    for kind, code in {
        "t": "?",
        "b": "b",
        "B": "B",
        "s": "h",  # as RabbitMQ has it; U in the specification
        "U": "h",
        "u": "H",
        "I": "i",
        "i": "I",
        "l": "q",
        "L": "Q",
        "f": "f",
        "d": "d",
    }.items()
}
_INT, _LONG, _DOUBLE, _DECIMAL = (struct.Struct(f">{code}") for code in ("i", "q", "d", "Bi"))


def short(text: str) -> bytes:
    """A short string. Raises InvalidMessage for one of more than 255 bytes."""
    data = text.encode()
    if len(data) > 255:
        raise InvalidMessage(f"{text[:50]!r}... has {len(data)} bytes, AMQP allows 255 for a name")
    return LENGTHS[len(data)] + data


def long(data: bytes) -> bytes:
    """A long string."""
    return U32.pack(len(data)) + data


def table(fields: Mapping[str, Any]) -> bytes:
    """A field table. Raises InvalidMessage for values that it cannot hold."""
    return long(b"".join(short(name) + _field(value) for name, value in fields.items()))


def _field(value: Any) -> bytes:
    kind = type(value)
    try:
        if kind is str:
            return b"S" + long(value.encode())
        if kind is bool:
            return b"t\x01" if value else b"t\x00"
        if kind is int:
            return b"I" + _INT.pack(value) if -(2**31) <= value < 2**31 else b"l" + _LONG.pack(value)
        if kind is float and math.isfinite(value):  # over any other the broker closes the connection
            return b"d" + _DOUBLE.pack(value)
        if value is None:
            return b"V"
        if kind is bytes:
            return b"x" + long(value)
        if isinstance(value, Mapping):
            return b"F" + table(value)
        if isinstance(value, list | tuple):
            return b"A" + long(b"".join(map(_field, value)))
        if isinstance(value, datetime.datetime):
            return b"T" + U64.pack(int(value.timestamp()))
        if isinstance(value, Decimal):
            sign, digits, exponent = value.as_tuple()
            if isinstance(exponent, int) and -255 <= exponent <= 0:
                unscaled = int("".join(map(str, digits)))
                return b"D" + _DECIMAL.pack(-exponent, -unscaled if sign else unscaled)
    except (struct.error, OverflowError):
        pass
    raise InvalidMessage(f"{value!r} cannot stand in an AMQP table")


def read_short(data: bytes, start: int, end: int) -> tuple[str, int]:
    """A short string and where it ends. This and what follows raise ProtocolError, struct.error or IndexError."""
    stop = start + 1 + data[start]
    if stop > end:
        raise ProtocolError("a string reaches beyond its frame")
    return data[start + 1 : stop].decode("utf-8", "replace"), stop


def read_long(data: bytes, start: int, end: int) -> tuple[bytes, int]:
    stop = start + 4 + int(U32.unpack_from(data, start)[0])
    if stop > end:
        raise ProtocolError("a string or a table reaches beyond its frame")
    return data[start + 4 : stop], stop


def read_table(data: bytes, start: int, end: int, depth: int = 0) -> tuple[dict[str, Any], int]:
    inside, stop = read_long(data, start, end)
    return dict(read_entries(inside, depth)), stop


def read_entries(data: bytes, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """What is in a table."""
    start, end = 0, len(data)
    while start < end:
        name, start = read_short(data, start, end)
        value, start = read_value(data, start, end, depth)
        yield name, value


def read_value(data: bytes, start: int, end: int, depth: int = 0) -> tuple[Any, int]:
    kind = data[start]
    start += 1
    if kind == 0x53:  # S
        text, start = read_long(data, start, end)
        return text.decode("utf-8", "replace"), start
    if form := _SIZED.get(kind):
        return form.unpack_from(data, start)[0], start + form.size
    if depth > DEPTH_MAX:
        raise ProtocolError(f"tables within tables, more than {DEPTH_MAX} deep")
    if kind == 0x46:  # F
        return read_table(data, start, end, depth + 1)
    if kind == 0x41:  # A
        inside, stop = read_long(data, start, end)
        values: list[Any] = []
        start = 0
        while start < len(inside):
            value, start = read_value(inside, start, len(inside), depth + 1)
            values.append(value)
        return values, stop
    if kind == 0x56:  # V
        return None, start
    if kind == 0x78:  # x
        return read_long(data, start, end)
    if kind == 0x54:  # T
        return _time(U64.unpack_from(data, start)[0]), start + 8
    if kind == 0x44:  # D
        scale, unscaled = _DECIMAL.unpack_from(data, start)
        return Decimal(unscaled).scaleb(-scale), start + 5
    raise ProtocolError(f"a table field of the unknown type {chr(kind)!r}")


def _time(seconds: int) -> datetime.datetime | int:
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    except (OverflowError, ValueError, OSError):
        return seconds  # nobody lives to see it
