"""HTTP/1.1 as pure bytes and tables: which route a request means, and how a Message looks as a request and a response.

What a binding finds in `Message.headers` of a request beside the client's own headers (names in lower case):

| pseudo header  | value                                                                            |
|----------------|----------------------------------------------------------------------------------|
| `:method`      | as sent; a `HEAD` reaches the route of `GET`, its body is dropped by the server  |
| `:path`        | as sent: percent-encoded, with the address's path and the raw query string       |
| `:param-NAME`  | what stands in the path for `{NAME}`, percent-decoded, never empty               |

A request without `:method` and `:path` goes to its channel's route, and where that is empty to `POST /NAME-OF-CHANNEL`.
In a reply `:status` is the HTTP status; without it 204 where there is no body, else the one of `Message.status`
(200 where that is empty). The other fields of a Message travel as FIELDS says. Names and values are UTF-8 (obs-text of
RFC 9110, section 5.5); framing headers (FRAMING) are this module's and are never taken from a Message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from operator import attrgetter
from typing import Final, Generic, TypeAlias, TypeVar
from urllib.parse import quote, unquote

import httptools
from msgspec import Struct

from quintet.errors import (
    BY_CODE,
    PROBLEM_MEDIA_TYPE,
    CallError,
    InvalidMessage,
    TooLarge,
    UnknownOperation,
    to_problem,
)
from quintet.message import Channel, Message, Native, native_of, new_id

Target = TypeVar("Target")

FIELDS: Final = {
    "id": "idempotency-key",
    "operation": "quintet-operation",
    "sender": "quintet-sender",
    "version": "quintet-version",
    "key": "quintet-key",
    "reply_to": "quintet-reply-to",
    "correlation_id": "quintet-correlation",
    "status": "quintet-status",
}
"""The header that carries each text field of a Message. `media_type` is Content-Type; the two numbers are below."""

TIMEOUT: Final = "quintet-timeout"  # the remaining milliseconds until `deadline`
ATTEMPT: Final = "quintet-attempt"

OWNED: Final = frozenset(
    {
        ":*", "accept", "accept-charset", "accept-encoding", "access-control-*", "connection", "content-*", "date",
        "expect", "forwarded", "host", "http2-settings", "idempotency-key", "if-*", "keep-alive", "max-forwards",
        "origin", "prefer", "proxy-*", "quintet-*", "range", "referer", "sec-*", "te", "trailer", "transfer-encoding",
        "upgrade", "upgrade-insecure-requests", "via", "x-forwarded-*", "x-http-method", "x-http-method-override",
        "x-method-override",
    }
)  # fmt: skip
"""The headers of a request that HTTP owns, whoever sends them: neither read nor written as the user's. "*": all that
begin so."""

CREDENTIALS: Final = frozenset({"authorization", "cookie"})
"""Written as the user's and not read as such: what a caller proves itself by must not go along to another service."""

SPARSE: Final = 8  # bytes that may come for each byte of a body: chunks of one byte take six

FRAMING: Final = frozenset(
    {"connection", "content-length", "content-type", "expect", "host", "keep-alive", "te", "trailer"}
    | {"transfer-encoding", "upgrade"}
)
"""Headers that belong to one connection or to the body's frame."""

_ID, _OPERATION, _SENDER, _VERSION, _KEY, _REPLY_TO, _CORRELATION, _STATUS = FIELDS.values()
_OURS = FRAMING | {*FIELDS.values(), TIMEOUT, ATTEMPT, "date"}
_REQUEST_FIELDS = tuple((field, name) for field, name in FIELDS.items() if field != "status")
_REPLIED = [field for field in FIELDS if field not in {"id", "operation", "key"}]
_REPLY_NAMES = tuple(FIELDS[field].encode() for field in _REPLIED)
_reply_fields = attrgetter(*_REPLIED)

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")

FOREIGN: Final = {
    400: "invalid",
    404: "unknown-operation",
    406: "not-acceptable",
    413: "too-large",
    415: "unsupported-media-type",
    422: "invalid",
    429: "overloaded",
    502: "connection-lost",
    503: "overloaded",
    504: "deadline",
}
"""The failure that an HTTP status means where the server is no Quintet and names none; others are "remote"."""


Lines: TypeAlias = list[tuple[bytes, bytes]]
"""Header lines, as an ASGI server gives and takes them."""


class MalformedHTTP(Exception):
    """Bytes that are no HTTP/1.1 response; the text says why."""


# --- whose a header is

_OWNED = frozenset(name for name in OWNED if name[-1] != "*")
_FAMILIES = tuple(name[:-1] for name in OWNED if name[-1] == "*")
_LONGEST_NAME = 255  # bytes, of AMQP
_HANDED_ON = 16 * 1024  # bytes of names and values, half of the head that our servers take
_COPIES = frozenset({"CC", "BCC"})  # RabbitMQ sends copies to what they name


def refusal(name: str, value: str) -> str:
    """Why a user may not write a header, as the end of a sentence; "" where every transport carries it."""
    lower = name.lower()
    if lower in _OWNED or lower.startswith(_FAMILIES):
        return "HTTP owns this name, leave it out"
    if not _TOKEN.fullmatch(name) or len(name) > _LONGEST_NAME or name in _COPIES:
        return "not every transport carries this name, write letters, digits and hyphens"
    if not value.isprintable() and (_CONTROL.search(value) or _SURROGATE.search(value)):
        return "not every transport carries this value, it holds a control character"
    return ""


def own_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that are the user's own, fit to be handed on to any other service over any transport.

    What is too much for the head of a request is left out.
    """
    own: dict[str, str] = {}
    left = _HANDED_ON
    for name, value in headers.items():
        if name.lower() in CREDENTIALS or refusal(name, value):
            continue
        size = len(name) + len(value.encode())
        if size <= left:
            own[name] = value
            left -= size
    return own


class Peer(Native, frozen=True):
    """The other end of a connection: `Message.native` of a request that HTTP itself delivered."""

    client: str
    scheme: str


class HttpRequest(Struct, frozen=True):
    """A request as it came: `current().http`.

    `path` is percent-encoded, with its query; `client` the address of the connection's other end, `scheme` "http" or
    "https"; `headers` all there are, names in lower case. `if_match`: the entity tags of If-Match, or "*"; what is none
    stands as it came, and is equal to no tag.
    """

    method: str
    path: str
    client: str
    scheme: str
    headers: Mapping[str, str]
    if_match: tuple[str, ...]


_NO_PEER = Peer("", "")
_TAG = re.compile(r'\s*((?:W/)?"[\x21\x23-\x7e\x80-\U0010ffff]*"|\*)\s*(?:,|$)')  # RFC 9110, section 8.8.3


def http_request(message: Message) -> HttpRequest | None:
    """The request that a message came as; None where it did not come over HTTP."""
    peer = native_of(message.native, Peer, _NO_PEER) if message.native else _NO_PEER
    if peer is _NO_PEER:
        return None
    headers = {name: value for name, value in message.headers.items() if name[:1] != ":"}
    method, path = message.headers[":method"], message.headers[":path"]
    return HttpRequest(method, path, peer.client, peer.scheme, headers, entity_tags(headers.get("if-match", "")))


def entity_tags(text: str) -> tuple[str, ...]:
    """The entity tags of If-Match in their quotes, or "*" (RFC 9110, section 13.1.1)."""
    tags: list[str] = []
    at = 0
    while at < len(text):
        found = _TAG.match(text, at)
        if found is None:
            return (text,)
        tags.append(found[1])
        at = found.end()
    return tuple(tags)


# --- routes


class _Leaf(Generic[Target]):
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names  # of the path's parameters, as pseudo headers
        self.targets: dict[str, Target] = {}  # by operation; "" where the route alone decides


class _Node(Generic[Target]):
    def __init__(self) -> None:
        self.literals: dict[str, _Node[Target]] = {}
        self.parameter: _Node[Target] | None = None
        self.methods: dict[str, _Leaf[Target]] = {}


class NotRouted(Exception):
    """No target: `error` says why, `status` is the HTTP status, `allow` the methods that the path knows."""

    def __init__(self, status: int, allow: str, error: CallError) -> None:
        super().__init__(str(error))
        self.status, self.allow, self.error = status, allow, error


class Router(Generic[Target]):
    """Finds the target of a method and a path. A literal segment beats a parameter, segment by segment."""

    def __init__(self) -> None:
        self._root: _Node[Target] = _Node()

    def add(self, route: str, target: Target) -> None:
        """Adds "GET /v1/passengers/{passenger_id}", or "POST /v1#get" for one of several operations there.

        Raises ValueError with a sentence where the route is malformed or taken.
        """
        method, path, operation = split_route(route)
        node, names = self._root, []
        for segment in path[1:].split("/"):
            name = segment[1:-1]
            if segment == f"{{{name}}}" and name.isidentifier():
                node.parameter = node.parameter or _Node()
                node = node.parameter
                names.append(f":param-{name}")
            elif "{" in segment or "}" in segment:
                raise ValueError(f"route {route!r}: a parameter takes a whole segment of the path, as /{{name}}/")
            else:
                node = node.literals.setdefault(unquote(segment), _Node())
        leaf = node.methods.setdefault(method, _Leaf(tuple(names)))
        if operation in leaf.targets or (leaf.targets and "" in {operation, *leaf.targets}):
            raise ValueError(f"route {route!r} is served twice: give one of the two another path or method")
        if leaf.names != tuple(names):
            raise ValueError(f"route {route!r} names its parameters otherwise than {', '.join(leaf.names)}")
        leaf.targets[operation] = target

    def remove(self, route: str) -> None:
        """Takes a route away; its path answers 404 or 405 from now on."""
        method, path, operation = split_route(route)
        node = self._root
        for segment in path[1:].split("/"):
            parameter = node.parameter if segment.startswith("{") else None
            node = parameter or node.literals[unquote(segment)]
        leaf = node.methods[method]
        del leaf.targets[operation]
        if not leaf.targets:
            del node.methods[method]

    def find(self, method: str, path: str, operation: str = "") -> tuple[Target, dict[str, str]]:
        """The target and the path's parameters as pseudo headers; `path` is raw, without query. Raises NotRouted."""
        segments = path[1:].split("/")
        if "%" in path:
            try:
                segments = [unquote(segment, errors="strict") for segment in segments]
            except UnicodeDecodeError:
                raise NotRouted(400, "", InvalidMessage(f"the path {path!r} is not UTF-8 when decoded")) from None
        values: list[str] = []
        node: _Node[Target] | None = self._root
        for segment in segments:  # most often all of them are literal
            node = node.literals.get(segment) if node else None
        if node is None or not node.methods:
            node = _walk(self._root, segments, 0, values)
        if node is None:
            raise NotRouted(404, "", UnknownOperation(f"nothing is served at {path!r}"))
        leaf = node.methods.get(method)
        if leaf is None and method == "HEAD":
            leaf = node.methods.get("GET")
        if leaf is None:
            known = {*node.methods, "OPTIONS"} | ({"HEAD"} if "GET" in node.methods else set())
            allow = ", ".join(sorted(known))
            raise NotRouted(405, allow, UnknownOperation(f"{path!r} knows no {method}, only {allow}"))
        target = leaf.targets.get("")
        if target is None:
            target = leaf.targets.get(operation)
            if target is None:
                there = ", ".join(sorted(leaf.targets))
                said = f"is {operation!r}" if operation else "is missing"
                raise NotRouted(
                    404, "", UnknownOperation(f"the header Quintet-Operation {said}; {path!r} serves: {there}")
                )
        return target, dict(zip(leaf.names, values, strict=True)) if values else {}


def _walk(node: _Node[Target], segments: list[str], depth: int, values: list[str]) -> _Node[Target] | None:
    """The node with methods behind the segments; `values` receives what stood for the parameters."""
    if depth == len(segments):
        return node if node.methods else None
    segment = segments[depth]
    literal = node.literals.get(segment)
    if literal is not None:
        found = _walk(literal, segments, depth + 1, values)
        if found is not None:
            return found
    if node.parameter is not None and segment:
        values.append(segment)
        found = _walk(node.parameter, segments, depth + 1, values)
        if found is not None:
            return found
        values.pop()
    return None


def split_route(route: str) -> tuple[str, str, str]:
    """The method, the path and the operation of "POST /v1/passengers#get". Raises ValueError."""
    method, space, rest = route.partition(" ")
    path, _, operation = rest.partition("#")
    if not space or not method.isupper() or not method.isalpha() or not path.startswith("/") or " " in rest:
        raise ValueError(f"route {route!r}: write a method and a path, as 'GET /v1/passengers/{{passenger_id}}'")
    return method, path, operation


def route_of(channel: Channel) -> str:
    """What a channel is served under: its own route, else `POST /name`."""
    return channel.route or f"POST /{quote(channel.name, safe='')}"


# --- a Message as a request


def request_bytes(message: Message, host: str, prefix: str, now: float) -> bytes:
    """Head and body of the request. `host` is the Host header's value, `prefix` what stands before every path.

    `now` is the monotonic time by which the remaining milliseconds are reckoned. Raises InvalidMessage where a header
    or the path cannot stand in HTTP.
    """
    headers = message.headers
    path = headers.get(":path")
    if path is None:
        method, path, _ = split_route(route_of(message.channel))
        if "{" in path:
            raise InvalidMessage(f"{message.channel.name}: its path {path} has parameters, and the message no :path")
    else:
        method = headers.get(":method", "POST")
    body = message.body
    lines = [f"{method} {prefix}{path} HTTP/1.1\r\nhost: {host}"]
    if body or method not in _BODILESS:
        lines.append(f"content-length: {len(body)}")
    if message.media_type and body:
        lines.append(f"content-type: {message.media_type}")
    for field, name in _REQUEST_FIELDS:
        value = getattr(message, field)
        if value:
            lines.append(f"{name}: {value}")
    if message.deadline is not None:
        lines.append(f"{TIMEOUT}: {max(0, int((message.deadline - now) * 1000))}")
    if message.attempt != 1:
        lines.append(f"{ATTEMPT}: {message.attempt}")
    if " " in path or not path.isascii():
        raise InvalidMessage(f"the path {path!r} must be percent-encoded")
    try:  # what framed an earlier journey is left out, where it is in lower case as we read it
        for name, value in headers.items():
            if name[0] != ":" and name not in _OURS:
                lines.append(f"{_name(name)}: {value}")
    except ValueError as error:
        raise InvalidMessage(f"{message!r}: {error}") from None
    head = "\r\n".join(lines)
    # one look at the whole shows every line break that came in by a value
    if head.count("\n") != len(lines) or head.count("\r") != len(lines) or "\0" in head:
        raise InvalidMessage(f"{message!r}: a header holds a line break, which cannot stand in HTTP")
    return f"{head}\r\n\r\n".encode() + body


def _name(name: str) -> str:
    if name not in _KNOWN_NAMES and (not _TOKEN.fullmatch(name) or name.lower() in _OURS):
        raise ValueError(f"the header {name!r} cannot stand in HTTP: its name is malformed or reserved")
    return name


_BODILESS = frozenset({"GET", "HEAD", "DELETE", "OPTIONS"})
_KNOWN_NAMES = {
    name: name
    for name in (
        *FIELDS.values(), TIMEOUT, ATTEMPT, *FRAMING, "accept", "accept-encoding", "accept-language", "authorization",
        "baggage", "cache-control", "cookie", "date", "etag", "if-match", "if-modified-since", "if-none-match", "link",
        "last-modified", "location", "prefer", "retry-after", "server", "traceparent", "tracestate",
        "user-agent", "vary",
    )
}  # fmt: skip
_NAME_OF = {name.encode(): name for name in _KNOWN_NAMES}


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def add_header(headers: dict[str, str], raw_name: bytes, raw_value: bytes) -> None:
    """Name in lower case; what stands twice is joined by commas."""
    name = _NAME_OF.get(raw_name) or raw_name.decode("latin-1").lower()
    value = _text(raw_value)
    if name in headers:  # RFC 9110, section 5.3; cookies are the exception
        value = headers[name] + ("; " if name == "cookie" else ", ") + value
    headers[name] = value


def declared_length(headers: dict[str, str]) -> int:
    """The Content-Length, 0 where there is none: a number, as the parser has checked, which may have any length."""
    return int(headers.get("content-length", "").strip().lstrip("0")[:19] or 0)


def read_headers(lines: Lines) -> dict[str, str]:
    """Names in lower case; what stands twice is joined by commas."""
    try:
        headers = {_NAME_OF[name]: value.decode() for name, value in lines}
        if len(headers) == len(lines):
            return headers
    except (KeyError, UnicodeDecodeError):
        pass
    headers = {}  # one is twice there, or of the user's own
    for name, value in lines:
        add_header(headers, name, value)
    return headers


def read_request(
    channel: Channel, headers: dict[str, str], body: bytes, now: float, native: tuple[Native, ...] = ()
) -> Message:
    """The Message of a request whose `headers` hold the pseudo headers already. Raises InvalidMessage (a 400)."""
    get = headers.get
    media_type = get("content-type", "")
    if ";" in media_type or media_type != media_type.lower():
        media_type = media_type.partition(";")[0].strip().lower()
    return Message(
        channel=channel,
        body=body,
        id=get(_ID) or new_id(),
        operation=get(_OPERATION, ""),
        sender=get(_SENDER, ""),
        version=get(_VERSION, ""),
        key=get(_KEY, ""),
        reply_to=get(_REPLY_TO, ""),
        correlation_id=get(_CORRELATION, ""),
        media_type=media_type,
        deadline=now + _number(headers, TIMEOUT) / 1000 if TIMEOUT in headers else None,
        attempt=max(1, _number(headers, ATTEMPT)) if ATTEMPT in headers else 1,
        headers=headers,
        native=native,
    )


def _number(headers: dict[str, str], name: str) -> int:
    text = headers[name]
    if not (text.isascii() and text.isdecimal()) or len(text) > 12:
        raise InvalidMessage(f"the header {name.title()} must be a whole number, not {text[:40]!r}")
    return int(text)


# --- a Message as a response


class Response(Struct):
    """A response's parts; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes
    keep_alive: bool = True


ResponseParts: TypeAlias = tuple[int, Lines, bytes]
"""Status, header lines and body, as an ASGI server takes them; it drops the body of the answer to a HEAD."""


def response_parts(reply: Message | None) -> ResponseParts:
    """The response of a delivery that is done. Raises ValueError where the reply cannot stand in HTTP."""
    if reply is None:
        return 204, [], b""
    headers, body = reply.headers, reply.body
    said = headers.get(":status")
    if said is not None:
        status = int(said)
        if not 200 <= status <= 599:
            raise ValueError(f"{status} is no status of a final response: from 200 to 599")
    elif reply.status:
        status = BY_CODE[reply.status].http_status if reply.status in BY_CODE else 500
    else:
        status = 200 if body else 204
    lines: Lines = []
    if status in _NO_BODY:
        body = b""
    else:
        lines.append((b"content-length", b"%d" % len(body)))
        if reply.media_type:
            lines.append((b"content-type", _value(reply.media_type)))
    for name, text in zip(_REPLY_NAMES, _reply_fields(reply), strict=True):
        if text:
            lines.append((name, _value(text)))
    for own, text in headers.items():
        if own[0] != ":" and own not in _OURS:
            lines.append((_name(own).encode(), _value(text)))
    return status, lines, body


def problem_parts(error: CallError, status: int = 0, *more: tuple[bytes, bytes]) -> ResponseParts:
    """A failure as application/problem+json (RFC 9457); `status` is 0 or not the error's own."""
    body = to_problem(error)
    if status and status != error.http_status:
        body = body.replace(b'"status":%d' % error.http_status, b'"status":%d' % status, 1)
    lines: Lines = [
        (b"content-length", b"%d" % len(body)),
        (b"content-type", PROBLEM_MEDIA_TYPE.encode()),
        (_STATUS.encode(), error.code.encode()),
        *more,
    ]
    return status or error.http_status, lines, body


_NO_BODY = frozenset({204, 304})


def _value(text: str) -> bytes:
    if not text.isprintable() and _CONTROL.search(text):
        raise ValueError("a header holds a line break or another control character, which cannot stand in HTTP")
    return text.encode()


def read_response(response: Response, request: Message) -> Message:
    """The reply Message. A failure's code is the server's own word, else what FOREIGN says of the HTTP status."""
    headers = response.headers
    status = headers.get(_STATUS, "")
    if not status and response.status >= 300:
        status = FOREIGN.get(response.status, "remote")
    headers[":status"] = str(response.status)
    media_type = headers.get("content-type", "")
    if ";" in media_type:
        media_type = media_type.partition(";")[0].rstrip()
    get = headers.get
    return Message(
        channel=request.channel,
        body=response.body,
        operation=request.operation,
        sender=get(_SENDER, ""),
        version=get(_VERSION, ""),
        media_type=media_type,
        correlation_id=get(_CORRELATION) or request.correlation_id or request.id,
        status=status,
        headers=headers,
    )


class ResponseParser:
    """Bytes of one connection into Responses, one request at a time. Feed it, and ask for `take`.

    `max_head` and `max_body` are bytes. Raises MalformedHTTP, and TooLarge over `max_body`; it is of no use after that.
    """

    def __init__(self, max_body: int, max_head: int = 65536) -> None:
        self.max_body, self.max_head = max_body, max_head
        self._parser = httptools.HttpResponseParser(self)
        self._response: Response | None = None
        self.expect("")

    def expect(self, method: str) -> None:
        """The next response answers a request of this method: the one to HEAD has no body (RFC 9112, section 6.3)."""
        self._head_only = method == "HEAD"
        self._in_head, self._fed, self._size = True, 0, 0

    @property
    def begun(self) -> bool:
        """Whether bytes of the expected response have come."""
        return self._fed > 0

    def feed(self, data: bytes) -> Response | None:
        """The response, once its last byte has come."""
        self._fed += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            raise MalformedHTTP("the server switched protocols unasked") from None
        except httptools.HttpParserError as error:
            if self._response is not None:
                self._response.keep_alive = False  # what follows a whole response is not its business
            elif isinstance(error.__context__, TooLarge):
                raise error.__context__ from None
            else:
                raise MalformedHTTP(str(error) or "it is malformed") from None
        if self._fed > self.max_head + SPARSE * self._size:
            raise MalformedHTTP(f"there are more than {self.max_head} bytes around the body")
        response, self._response = self._response, None
        return response

    def finish(self) -> Response | None:
        """The connection has ended: the response, where its end is the body's end."""
        if self._in_head or self._framed or self._head_only:
            return None
        return Response(self._status, self._headers, b"".join(self._body), False)

    def on_message_begin(self) -> None:
        if self._response is not None:
            raise MalformedHTTP("more came than was asked for")
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # trailers are nobody's
            add_header(self._headers, name, value)

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        if self._status < 200:
            return
        headers = self._headers
        self._in_head = False
        self._framed = "content-length" in headers or "transfer-encoding" in headers
        if declared_length(headers) > self.max_body and not self._head_only:
            raise TooLarge(f"the answer has {headers['content-length']:.19} bytes, {self.max_body} are allowed")
        if self._head_only:  # the parser would wait for the body, so this connection ends here
            self._response = Response(self._status, headers, b"", False)

    def on_body(self, body: bytes) -> None:
        if self._head_only:
            return
        self._size += len(body)
        if self._size > self.max_body:
            raise TooLarge(f"the answer has more than the {self.max_body} bytes allowed")
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._status < 200 or self._head_only:  # 1xx announces the real one
            return
        body = self._body
        self._response = Response(
            self._status,
            self._headers,
            body[0] if len(body) == 1 else b"".join(body),
            self._parser.should_keep_alive(),
        )
