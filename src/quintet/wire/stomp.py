"""STOMP as pure bytes: frames of 1.0, 1.1 and 1.2 out of a stream in any pieces, and back (stomp.github.io).

Until the version is negotiated, and in 1.0, nothing is escaped; 1.1 escapes LF, colon and backslash; 1.2 escapes CR as
well and lets lines end in CR LF. Of a header that is repeated the first counts (1.2, "Repeated Header Entries").
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from msgspec import Struct

from quintet.errors import ProtocolError

VERSIONS: Final = ("1.0", "1.1", "1.2")
"""The versions that are spoken, the one to prefer last."""

COMMANDS: Final = frozenset(
    {"CONNECTED", "MESSAGE", "RECEIPT", "ERROR"}
    | {"CONNECT", "STOMP", "SEND", "SUBSCRIBE", "UNSUBSCRIBE", "ACK", "NACK", "BEGIN", "COMMIT", "ABORT", "DISCONNECT"}
)
GREETINGS: Final = frozenset({"CONNECT", "STOMP", "CONNECTED"})  # never escaped: 1.0 must be able to read them
WITH_BODY: Final = frozenset({"SEND", "MESSAGE", "ERROR"})

MAX_HEAD: Final = 1 << 20
"""Bytes that the command and the headers of a frame may have."""
MAX_BODY: Final = 1 << 28
"""Bytes that a body may have, unless a parser is told otherwise."""

BEAT: Final = b"\n"

_EOLS = re.compile(rb"[\r\n]*")
_LENGTH = re.compile(r"[0-9]{1,18}")
_COLON = "\\c"
_SEQUENCE = re.compile(r"\\(.?)", re.DOTALL)
_TO_PLAIN = {
    "1.1": {"\\": "\\", "c": ":", "n": "\n"},
    "1.2": {"\\": "\\", "c": ":", "n": "\n", "r": "\r"},
}


class Frame(Struct):
    """One frame; its headers as their sender meant them, not as they were escaped."""

    command: str
    headers: dict[str, str]
    body: bytes = b""


class Parser:
    """Makes frames of the bytes of one connection, and learns the version from the CONNECTED that comes (where none
    comes, on the broker's side, `version` is to be set). What is no frame or over a limit raises ProtocolError, and
    from then on everything does. A length that is only declared allocates nothing; no byte is looked at twice."""

    def __init__(self, max_body: int = MAX_BODY) -> None:
        self.version = ""
        self._max_body = max_body
        self._held: list[bytes] = []  # the beginning of a frame, in the pieces in which it came
        self._size = 0
        self._worth = 0  # how much of the frame there must be before it is worth a look,
        self._until: tuple[bytes, ...] = ()  # or one of these must have come, up to that size
        self._tail = b""  # the last bytes held: a mark may have come in two pieces
        self._error: ProtocolError | None = None

    def __repr__(self) -> str:
        return f"<parser of STOMP {self.version or '?'}, {self._size} bytes held>"

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that these bytes complete: to be read to the end. Raises ProtocolError behind the last good."""
        if self._error is not None:
            raise self._error
        if self._held:
            self._held.append(data)
            self._size += len(data)
            seam = self._tail + data
            if self._size < self._worth and not any(mark in seam for mark in self._until):
                self._tail = seam[-2:]
                return
            data = b"".join(self._held)
            self._held = []
            self._size = 0
        start, size = 0, len(data)
        try:
            while start < size:
                if data[start] in b"\r\n":
                    start += 1  # mostly there is one, but who sends a million of them shall not take our time
                    if start < size and data[start] in b"\r\n":
                        start = _end(_EOLS, data, start)
                    continue
                end = data.find(b"\n\n", start)
                head, body = data[start:end], end + 2
                if end < 0 or end - start > MAX_HEAD or b"\r" in head:  # else the usual case
                    end, body = self._head(data, start)
                    if end < 0:
                        break
                    head = data[start:end]
                command, headers = self._parse(head)
                stop = self._stop(data, start, body, headers.get("content-length"))
                if stop < 0:
                    break
                if command == "CONNECTED":
                    self._agree(headers.get("version", "1.0"))
                yield Frame(command, headers, data[body:stop])
                start = stop + 1
        except ProtocolError as error:
            self._error = error
            raise
        if start < size:
            self._held = [data[start:] if start else data]
            self._size = size - start
            self._tail = self._held[0][-2:]

    def _wait(self, size: int, *until: bytes) -> None:
        self._worth, self._until = size, until

    def _head(self, data: bytes, start: int) -> tuple[int, int]:
        """Where the head of the frame ends and where its body begins; -1 where the head is not complete."""
        end = data.find(b"\n\n", start)
        body = end + 2
        if self.version not in ("1.0", "1.1"):
            other = data.find(b"\n\r\n", start, len(data) if end < 0 else end + 1)
            if other >= 0:
                end, body = other, other + 3
        if (len(data) - 2 if end < 0 else end) - start > MAX_HEAD:
            raise ProtocolError(f"the head of a frame has more than {MAX_HEAD} bytes")
        if end < 0:
            self._wait(MAX_HEAD + 3, b"\n\n", *(() if self.version in ("1.0", "1.1") else (b"\n\r\n",)))
        return end, body

    def _parse(self, head: bytes) -> tuple[str, dict[str, str]]:
        version = self.version
        try:
            text = head.decode()
        except UnicodeDecodeError as error:
            raise ProtocolError(f"the head of a frame is not UTF-8: {error}") from None
        lines = text.split("\n")
        if "\r" in text and version not in ("1.0", "1.1"):
            lines = [line.removesuffix("\r") for line in lines]
        command = lines[0]
        if command not in COMMANDS:
            raise ProtocolError(f"{command[:40]!r} is no command of STOMP")
        try:
            headers: dict[str, str] = dict([line.split(":", 1) for line in lines[:0:-1]])  # the first of a name stays
        except ValueError:
            raise ProtocolError(f"a header of a {command} has no colon") from None
        if "\\" in text and version in _TO_PLAIN and command not in GREETINGS:
            self._unescape(headers, [line for line in lines if "\\" in line])
        return command, headers

    def _unescape(self, headers: dict[str, str], lines: list[str]) -> None:
        """Puts what those lines mean into the headers, where they are the first of their names."""
        plain: dict[str, str] = {}
        for line in lines:
            name, value = line.split(":", 1)
            if headers[name] == value and name not in plain:
                meant = value.replace("\\c", ":")  # which the ids of brokers are full of
                plain[name] = meant if "\\" not in meant else _plain(value, self.version)
        for name, value in plain.items():
            if "\\" in name:
                del headers[name]
                name = _plain(name, self.version)
            headers[name] = value

    def _stop(self, data: bytes, start: int, body: int, length: str | None) -> int:
        """Where the NUL behind the body is; -1 where it has not come yet."""
        most = self._max_body
        if length is None:
            stop = data.find(b"\0", body)
            if (len(data) if stop < 0 else stop) - body > most:
                raise ProtocolError(f"the body of a frame has more than {most} bytes")
            if stop < 0:
                self._wait(body - start + most + 1, b"\0")
            return stop
        if not (length.isdigit() and length.isascii() and len(length) < 19):
            raise ProtocolError(f"content-length {length[:40]!r} is no number of bytes")
        if (declared := int(length)) > most:
            raise ProtocolError(f"a body of {declared} bytes is declared, {most} are allowed")
        stop = body + declared
        if stop >= len(data):
            self._wait(stop - start + 1)
            return -1
        if data[stop]:
            raise ProtocolError(f"no NUL stands behind the {declared} bytes of body that a frame declares")
        return stop

    def _agree(self, version: str) -> None:
        if version not in VERSIONS:
            raise ProtocolError(f"the other end speaks STOMP {version[:40]!r}, we speak {', '.join(VERSIONS)}")
        self.version = version


def _end(pattern: re.Pattern[bytes], data: bytes, start: int) -> int:
    match = pattern.match(data, start)
    return match.end() if match else start


def _plain(text: str, version: str) -> str:
    if "\\\\" not in text:  # then each sequence stands for itself, and replacing them one after another is faster
        plain = text.replace("\\c", ":").replace("\\n", "\n")
        if version == "1.2":
            plain = plain.replace("\\r", "\r")
        if "\\" not in plain:
            return plain
    try:
        return _SEQUENCE.sub(lambda sequence: _TO_PLAIN[version][sequence[1]], text)
    except KeyError as error:
        raise ProtocolError(f"\\{error.args[0]} in a header stands for nothing in STOMP {version}") from None


def escape(text: str, version: str) -> str:
    """A header's name or value as it is written. Raises ValueError for what the version cannot write."""
    if version in _TO_PLAIN:
        text = text.replace("\\", "\\\\").replace(":", "\\c").replace("\n", "\\n")
        return text.replace("\r", "\\r") if version == "1.2" else text
    if "\n" in text:
        raise ValueError(f"STOMP {version or '1.0'} cannot carry a line break in a header: {text[:40]!r}")
    return text


def encode(version: str, command: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
    """A frame as bytes. Raises ValueError where a header cannot be written; 1.2 can write every one."""
    return command.encode() + b"\n" + encode_rest(version, command, headers, body)


def encode_rest(version: str, command: str, headers: Mapping[str, str], body: bytes = b"", written: str = "") -> bytes:
    """What stands behind a frame's command. `written`: lines of headers, escaped already, that are to stand first.
    Raises ValueError as `encode` does."""
    head = "".join([f"{name}:{value}\n" for name, value in headers.items()])
    count = len(headers)
    if head.count("\n") != count or "\\" in head or "\r" in head:
        head = header_lines(version if command not in GREETINGS else "", headers)
    elif head.count(":") != count:  # nothing else in it needs a second look
        if version not in _TO_PLAIN or command in GREETINGS or ":" in "".join(headers):
            head = header_lines(version if command not in GREETINGS else "", headers)
        else:
            head = "".join([f"{name}:{value.replace(':', _COLON)}\n" for name, value in headers.items()])
    if command in WITH_BODY:
        head = f"{head}content-length:{len(body)}\n"
    return b"%b\n%b\0" % (f"{written}{head}".encode(), body)


def header_lines(version: str, headers: Mapping[str, str]) -> str:
    """Headers as they are written. Raises ValueError as `encode` does."""
    if version not in _TO_PLAIN and (odd := [name for name in headers if ":" in name]):
        raise ValueError(f"STOMP {version or '1.0'} cannot carry a colon in the name of a header: {odd[0][:40]!r}")
    return "".join([f"{escape(name, version)}:{escape(value, version)}\n" for name, value in headers.items()])


def agree_beats(ours: tuple[float, float], theirs: str) -> tuple[float, float]:
    """How many seconds may pass at most between two signs of life, from us and from the other end; 0: none is owed.

    `ours`: what we can send and what we want; `theirs`: the heart-beat header of the other end (1.2, "Heart-beating").
    """
    numbers = theirs.split(",") if theirs else ["0", "0"]
    if len(numbers) != 2 or not all(_LENGTH.fullmatch(number) for number in numbers):
        raise ProtocolError(f"heart-beat {theirs[:40]!r} is no pair of milliseconds")
    can, want = (int(number) / 1000 for number in numbers)
    return (
        max(ours[0], want) if ours[0] and want else 0.0,
        max(can, ours[1]) if can and ours[1] else 0.0,
    )
