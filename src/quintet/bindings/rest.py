"""The REST binding: an operation's verb, path, query, status and body, at levels 0 to 3 of Richardson's model.

Pure: parameters and Messages, no socket. The request's pseudo headers are `:method` and `:path` (raw), and on the
service's side `:param-NAME` for what the router found in the path; the reply's is `:status`. Header names are in lower
case. Specifications: RFC 9110 (HTTP), 9457 (problem details), 7240 (Prefer), 6570 (link templates), and the HAL draft.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping
from email.utils import parsedate_to_datetime
from functools import lru_cache
from hashlib import blake2b
from http import HTTPStatus
from operator import attrgetter
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Union, get_args, get_origin
from urllib.parse import quote, unquote

import msgspec
from msgspec import NODEFAULT, Struct, convert, inspect, structs, to_builtins

from quintet.binding import FAULT, PENDING, allowed_links, fill_link, undeclared
from quintet.contract import FANOUT, Fault, Operation, Style
from quintet.errors import (
    BY_CODE,
    PROBLEM_MEDIA_TYPE,
    CallError,
    ContractError,
    InvalidMessage,
    NotAcceptable,
    QuintetError,
    RemoteError,
    Safety,
    UnknownOperation,
    UnsupportedMediaType,
    from_problem,
    to_problem,
)
from quintet.format import Codec, format_named, installed
from quintet.message import Channel, Message
from quintet.wire.http import FOREIGN

JSON: Final = "application/json"
HAL: Final = "application/hal+json"
URN: Final = "urn:quintet:"  # with a fault's code behind it, the type of its problem
RETRY_AFTER: Final = "1"  # seconds, for who asks again without Prefer: wait
PROBLEM_MEMBERS: Final = frozenset({"type", "title", "status", "detail", "instance"})
"""RFC 9457, section 3.1. What a fault has in a field of one of these names travels under `fields`."""


# --- one parameter as text: what stands in a path or a query

_SCALARS = (
    inspect.StrType, inspect.IntType, inspect.FloatType, inspect.BoolType, inspect.DecimalType, inspect.UUIDType,
    inspect.DateType, inspect.TimeType, inspect.DateTimeType, inspect.TimeDeltaType, inspect.BytesType,
    inspect.EnumType, inspect.LiteralType,
)  # fmt: skip
_LISTS = (inspect.ListType, inspect.SetType, inspect.FrozenSetType, inspect.VarTupleType)
_RECORDS = (inspect.StructType, inspect.DataclassType, inspect.TypedDictType, inspect.DictType)


class Parameter(Struct, frozen=True):
    """A parameter that travels as text."""

    name: str
    key: str  # the name and "=", as they stand in a query
    type: Any  # without its None
    plain: bool  # the text is its value
    many: bool  # a repeated key
    optional: bool  # None is its absence
    default: bool

    @classmethod
    def of(
        cls, operation: Operation[Any, Any, Any], field: structs.FieldInfo, place: str, whole_body: str = ""
    ) -> Parameter:
        """Raises ContractError, naming what to write instead, where the type cannot stand in a path or query.

        `whole_body`: the parameter that is the body, where this one travels beside it.
        """
        kinds = _kinds(field.type)
        first, *others = [kind for kind in kinds if not isinstance(kind, inspect.NoneType)] or kinds
        optional = len(kinds) > 1 + len(others)
        many = isinstance(first, _LISTS)
        item = _bare(first.item_type) if isinstance(first, _LISTS) else first
        why, instead = "", ""
        if others or not isinstance(item, _SCALARS) or _is_mixed(item):
            why, instead = f"its type cannot stand in a {place}", "pass what it holds as parameters, or use POST"
        elif place == "path" and (optional or many):
            why, instead = "what stands in a path is one value that is always there", "take it out of the {braces}"
        elif many and (optional or field.default not in (NODEFAULT, (), frozenset())):
            why, instead = "in a query an empty list looks like none given", "make its default the empty list"
        elif optional and field.default not in (NODEFAULT, None):
            why, instead = "in a query None looks like not given", "make its default None"
        if why and whole_body:
            instead = f"put it into the record {whole_body!r}, which is the body over HTTP"
        if why:
            raise ContractError(f"{operation!r}: parameter {field.name!r}: {why}: {instead}")
        plain = first == inspect.StrType()
        return cls(
            field.name, f"{quote(field.name)}=", _without_none(field.type), plain, many, optional, not field.required
        )

    def read(self, given: str | list[str]) -> Any:
        """The value, from the text (of each item). Raises InvalidMessage."""
        if self.plain:
            return given
        try:
            return convert(given, self.type, strict=False)
        except (ValueError, ArithmeticError) as error:
            said = str(error).partition(", got ")[0].partition(" - at ")[0]
            raise InvalidMessage(f"{self.name}={given!r:.80}: {said}", path=self.name) from None

    def absent(self) -> Any:
        """The value where the query does not name it and it has no default. Raises InvalidMessage."""
        if self.many:
            return self.read([])
        if self.optional:
            return None
        raise InvalidMessage(f"{self.name}: missing required parameter", path=self.name)


def _bare(kind: Any) -> Any:
    return _bare(kind.type) if isinstance(kind, inspect.Metadata) else kind


def _kinds(annotation: Any) -> list[Any]:
    """What msgspec makes of a type: each alternative of a union, else the one."""
    try:
        kind = _bare(inspect.type_info(annotation))
    except TypeError:  # no type that msgspec knows: the formats say so better
        kind = inspect.AnyType()
    return [_bare(one) for one in kind.types] if isinstance(kind, inspect.UnionType) else [kind]


def _is_mixed(kind: Any) -> bool:
    """Whether a Literal holds both 1 and "1"."""
    return isinstance(kind, inspect.LiteralType) and len({type(value) for value in kind.values}) > 1


def _is_record(annotation: Any) -> bool:
    return all(isinstance(kind, _RECORDS) for kind in _kinds(annotation))


def _whole_body(fields: Mapping[str, structs.FieldInfo]) -> str:
    """The name of the one parameter that is the body; "" where the body is the record of all of them.

    Only parameters without a default decide, so that adding one with a default changes no body.
    """
    required = [name for name, field in fields.items() if field.required]
    return required[0] if len(required) == 1 and _is_record(fields[required[0]].type) else ""


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) is Annotated:
        inner, *meta = get_args(annotation)
        return Annotated[(_without_none(inner), *meta)]
    if get_origin(annotation) in (Union, UnionType):
        return Union[tuple(one for one in get_args(annotation) if one is not NoneType)]  # noqa: UP007 - made of a list
    return annotation


_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]*").fullmatch
_SEGMENT = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._~-]+").fullmatch


def _text(value: Any) -> str:
    """A scalar, percent-encoded (RFC 3986, section 2.1)."""
    if type(value) is int:
        return str(value)
    plain = value if type(value) is str else to_builtins(value)
    if type(plain) is not str:
        plain = str(plain).lower() if type(plain) is bool else str(plain)
    return plain if _UNRESERVED(plain) else quote(plain, safe="")


def _segment(name: str, value: Any) -> str:
    """A scalar as one segment of a path: never empty, never a dot segment (RFC 3986, section 5.2.4)."""
    if type(value) is str and _SEGMENT(value):
        return value
    text = _text(value)
    if not text:
        raise InvalidMessage(f"{name}: an empty text cannot stand in a path", path=name)
    return text.replace(".", "%2E") if text in (".", "..") else text


def _decoded(text: str) -> str:
    """What stands in a query, decoded as HTML forms encode it. Raises InvalidMessage."""
    if "+" in text:
        text = text.replace("+", " ")
    if "%" not in text:
        return text
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise InvalidMessage(f"the query's {text!r:.80} is not UTF-8 when decoded") from None


# --- one operation's route: what of it stands where

_BRACES = re.compile(r"{([^{}]*)}")
_COMPANION_VERBS = {"result": "GET", "cancel": "DELETE"}


class Route:
    """Where an operation is served, and which of its parameters stand in the path, the query and the body.

    Raises ContractError where the operation cannot be served over REST.
    """

    def __init__(self, operation: Operation[Any, Any, Any]) -> None:
        if operation.style in FANOUT:
            raise ContractError(f"{operation!r}: REST carries no {operation.style.value}, it knows one receiver only")
        info = operation.contract.__quintet__
        self.operation, self.level = operation, info.level
        self.verb, path = _declared(operation)
        suffix = ""
        if self.level == 0:
            self.verb, path, suffix = "POST", f"/{info.name}", f"#{operation.full_name}"
        elif self.level == 1:
            self.verb = "POST"
            paths = [_declared(other)[1] for other in _served(info.operations.values())]
            alike = [other for other in paths if _BRACES.sub("{}", other) == _BRACES.sub("{}", path)]
            if len(set(alike)) > 1:
                raise ContractError(f"{operation!r}: at level 1 one path is written one way: {', '.join(alike)}")
            suffix = f"#{operation.full_name}" if len(alike) > 1 else ""
        path = f"/v{info.major}{path}"
        names = _BRACES.findall(path)
        odd = [part for part in path.split("/") if ("{" in part or "}" in part) and not _BRACES.fullmatch(part)]
        if odd or len(set(names)) < len(names):
            raise ContractError(f"{operation!r}: in {path!r} each {{parameter}} takes a whole segment, and only once")
        self.path = _encoded(path)
        self.channel = _on_route(operation.channel, f"{self.verb} {self.path}{suffix}")

        fields = {field.name: field for field in structs.fields(operation.record)}
        self.in_path = {name: Parameter.of(operation, fields.pop(name), "path") for name in names}
        self.collects = operation.parent is not None and "wait" in fields
        # how long to wait for a pending answer is a preference, not part of what it identifies (RFC 7240, section 4.3)
        self.waits = self.collects and self.level >= 2 and bool(fields.pop("wait"))
        bodiless = self.verb in ("GET", "DELETE")
        self.whole_body = "" if bodiless or self.level == 0 else _whole_body(fields)
        query, self.in_body = (fields, {}) if bodiless else ({}, fields)
        if self.whole_body:
            self.in_body = {self.whole_body: fields.pop(self.whole_body)}
            query = fields
        self.in_query = {
            name: Parameter.of(operation, field, "query", self.whole_body) for name, field in query.items()
        }
        self._path_values = [(name, attrgetter(name)) for name in names]
        self._path_format = _BRACES.sub("%s", self.path.replace("%", "%%"))

    def target(self, record: Struct) -> str:
        """The request target of these parameters: path and query. Raises InvalidMessage."""
        try:
            path = self._path_format
            if self.in_path:
                path %= tuple([_segment(name, read(record)) for name, read in self._path_values])
            elif "%" in path:
                path %= ()
            if not self.in_query:
                return path
            query = _query((one, getattr(record, name)) for name, one in self.in_query.items())
        except UnicodeEncodeError as error:
            raise InvalidMessage(f"{self.operation!r}: {error.object!r:.80} holds half a surrogate pair") from None
        return f"{path}?{query}" if query else path

    def link(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The HAL link to it with these parameters; a template (RFC 6570) where there are others."""
        open_path = {name for name in self.in_path if values.get(name) in (None, "")}
        href = _BRACES.sub(
            lambda found: found[0] if found[1] in open_path else _segment(found[1], values[found[1]]), self.path
        )
        query = _query((one, values[name]) for name, one in self.in_query.items() if name in values)
        open_query = ",".join(
            f"{name}*" if one.many else name for name, one in self.in_query.items() if name not in values
        )
        if query:
            href += f"?{query}"
        if open_query:
            href += f"{{{'&' if query else '?'}{open_query}}}"
        link: dict[str, Any] = {"href": href}
        if open_path or open_query:
            link["templated"] = True
        if self.operation.doc:
            link["title"] = self.operation.doc.partition("\n")[0]
        return link


def _encoded(template: str) -> str:
    """A path with its literal pieces percent-encoded, and its {parameters} as they are."""
    pieces = _BRACES.split(template)
    pieces[::2] = [quote(literal, safe="/:@!$&'()*+,;=~%") for literal in pieces[::2]]
    return "".join(f"{{{piece}}}" if n % 2 else piece for n, piece in enumerate(pieces))


def _declared(operation: Operation[Any, Any, Any]) -> tuple[str, str]:
    """Verb and path at level 2, without the version."""
    contract = operation.contract.__quintet__.name
    if operation.parent is not None:  # the same for every route, which may hold parameters that a companion lacks
        name = operation.name.removeprefix(f"{operation.parent.name}.")
        return _COMPANION_VERBS[name], f"/{contract}/{operation.parent.name}/pending/{{id}}"
    verb, _, path = (operation.http.route or f"POST /{contract}/{operation.name}").partition(" ")
    return verb, path


def _served(operations: Iterable[Operation[Any, Any, Any]]) -> Iterable[Operation[Any, Any, Any]]:
    for operation in operations:
        if operation.style not in FANOUT:
            yield operation
        if operation.style is Style.ASYNC_REQUEST:
            yield from operation.companions


def _on_route(channel: Channel, route: str) -> Channel:
    return Channel(channel.name, fanout=False, durable=channel.durable, route=route)


def _query(given: Iterable[tuple[Parameter, Any]]) -> str:
    pairs: list[str] = []
    for one, value in given:
        if one.many and value is not None:
            pairs += [one.key + _text(item) for item in value]
        elif value is not None:
            pairs.append(one.key + _text(value))
    return "&".join(pairs)


# --- the operation, bound


class _Head(Struct):
    """What tells one problem from another."""

    type: str = ""
    code: str = ""
    title: str = ""
    detail: str = ""


class _Link(Struct):
    href: str
    templated: bool = False


class _Linked(Struct, rename={"links": "_links"}):
    links: dict[str, _Link | list[_Link]] = {}


_NO_HEAD = _Head()
_PHRASES = {one.value: one.phrase for one in HTTPStatus}
_head = msgspec.json.Decoder(_Head).decode
_linked = msgspec.json.Decoder(_Linked).decode
_json = msgspec.json.Encoder().encode
_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?([0-9]{1,9}(?:\.[0-9]{1,9})?)(?![0-9.])", re.IGNORECASE)


class Rest:
    """One operation over REST. Requests are written in `format_name`, and replies too where Accept leaves it open."""

    def __init__(self, operation: Operation[Any, Any, Any], format_name: str) -> None:
        self.operation = operation
        self.route = route = Route(operation)
        self.channel = route.channel
        self._name = operation.full_name
        self._version = operation.contract.__quintet__.version
        self._media_type = format_named(format_name).media_type
        self._record = operation.record
        self._params = [(name, f":param-{name}", one) for name, one in route.in_path.items()]
        self._body_type = _body_type(route)
        self._bodies = _codecs(operation, self._body_type, self._media_type) if route.in_body else {}
        self._missing = next((name for name, field in route.in_body.items() if field.required), "")

        self._has_result = operation.result is not NoneType
        self._results = _codecs(operation, operation.result, self._media_type) if self._has_result else {}
        self._writes = self._has_result and operation.style is Style.REQUEST
        self._linked = {}
        if route.level == 3 and operation.links:
            self._linked = {name: Route(_linked_operation(operation, name)) for name in operation.links}
        self._offered = tuple(self._results)
        self._request_headers = {":method": route.verb}
        if self._writes:
            self._request_headers["accept"] = self._media_type
        if self._linked:  # HAL is JSON, so a client that writes another format still asks for links
            self._results[HAL] = _codecs(operation, operation.result, JSON)[JSON]
            at = self._offered.index(JSON)
            self._offered = (*self._offered[:at], HAL, *self._offered[at:])
            self._request_headers["accept"] = f"{HAL}, {JSON};q=0.9"
        self._status, self._reply_headers, self._location = _success(route, self._has_result, len(self._offered) > 1)
        self._tagged = self._status == "200" and route.verb == "GET" and not route.waits
        self._faults = {URN + fault.code: _FaultCodec(operation, fault) for fault in operation.faults}

    # on the caller's side

    def request(self, record: Struct) -> Message:
        headers = self._request_headers.copy()
        headers[":path"] = self.route.target(record)
        body, media_type = b"", ""
        if self._bodies:
            media_type = self._media_type
            body = self._bodies[media_type].encode(self._body_of(record))
        if self.route.waits and record.wait > 0:  # type: ignore[attr-defined]
            headers["prefer"] = f"wait={_seconds(record.wait)}"  # type: ignore[attr-defined]
        return Message(
            channel=self.channel,
            operation=self._name,
            version=self._version,
            media_type=media_type,
            body=body,
            headers=headers,
        )

    def _body_of(self, record: Struct) -> Any:
        if self.route.whole_body:
            return getattr(record, self.route.whole_body)
        if self._body_type is self._record:
            return record
        return self._body_type(**{name: getattr(record, name) for name in self.route.in_body})

    def result(self, reply: Message) -> Any:
        if not self._has_result:
            return None
        try:
            return self._codec(self._results, reply.media_type).decode(reply.body)
        except InvalidMessage as error:
            said = f"the reply of {self._name} does not fit its contract: {error}"
            raise InvalidMessage(said, path=error.path) from None

    def failure(self, reply: Message) -> QuintetError | None:
        status = int(reply.headers.get(":status", "200"))
        if 200 <= status < 300:
            if status == 202 and self.route.collects:
                reply.status = PENDING  # a server that is no Quintet says it by the HTTP status alone
            return None
        head = _NO_HEAD
        if reply.media_type.endswith("json"):
            try:
                head = _head(reply.body)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                head = _NO_HEAD
        try:
            if head.type in self._faults:
                return self._faults[head.type].decode(reply.body)
        except InvalidMessage as error:
            return InvalidMessage(f"the fault of {self._name} does not fit its contract: {error}", path=error.path)
        fault = head.type or URN + reply.status
        if fault.startswith(URN + FAULT) and fault not in self._faults:
            return undeclared(self._name, fault.removeprefix(URN))
        if head.code in BY_CODE:
            return from_problem(reply.body, head.code)
        said = f"{self._name}: answered {status} {_PHRASES.get(status, '')}".rstrip()
        failure = (BY_CODE.get(reply.status) or BY_CODE[FOREIGN.get(status, "remote")])(
            ": ".join(filter(None, (said, head.title, head.detail))),
            safety=Safety.UNKNOWN if status == 503 else None,  # a foreign server may say so in the middle of its work
            correlation_id=reply.correlation_id,
            retry_after=_retry_after(reply.headers),
        )
        if isinstance(failure, RemoteError):
            failure.answered = status < 500 and status != HTTPStatus.REQUEST_TIMEOUT
        return failure

    def links(self, reply: Message) -> Mapping[str, str]:
        """By name, with the address where it is whole; "" where it is a template or leads to another server."""
        if not self._linked or reply.media_type not in (HAL, JSON):
            return {}
        try:
            found = _linked(reply.body).links
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return {}
        first = {name: to[0] if isinstance(to, list) else to for name, to in found.items() if to}
        return {
            name: "" if to.templated or to.href[:1] != "/" or to.href[:2] == "//" else to.href
            for name, to in first.items()
            if name in self._linked
        }

    def follow(self, message: Message, href: str, said: Collection[str]) -> None:
        path, _, query = href.partition("?")
        keys = tuple(one.key for name, one in self.route.in_query.items() if name in said)
        mine = message.headers[":path"].partition("?")[2]
        pairs = [pair for pair in query.split("&") if pair and not pair.startswith(keys)]
        pairs += [pair for pair in mine.split("&") if pair.startswith(keys)]
        message.headers[":path"] = f"{path}?{'&'.join(pairs)}" if pairs else path

    # on the service's side

    def arguments(self, message: Message) -> Struct:
        """Also raises NotAcceptable: better before the work than after it."""
        headers = message.headers
        if self.route.level == 1 and message.operation not in ("", self._name):
            # an operation of a later version, whose path at this level is the same
            raise UnknownOperation(f"{message.operation:.200} is not served here, only {self._name}")
        if self._writes:
            self._accepted(headers)
        values: dict[str, Any] = {}
        for name, header, one in self._params:
            values[name] = one.read(headers.get(header, ""))
        if self.route.in_query:
            self._read_query(headers.get(":path", "").partition("?")[2], values)
        if self.route.waits and "prefer" in headers:
            values["wait"] = _preferred_wait(headers)
        if self._bodies and not message.body and self._missing:
            raise InvalidMessage(f"{self._missing}: missing, the request has no body", path=self._missing)
        if self._bodies and message.body:
            found = self._codec(self._bodies, message.media_type).decode(message.body)
            if self.route.whole_body:
                values[self.route.whole_body] = found
            elif self._body_type is self._record:
                record: Struct = found
                return record
            else:
                for name in self.route.in_body:
                    values[name] = getattr(found, name)
        return self._record(**values)

    def _read_query(self, query: str, values: dict[str, Any]) -> None:
        known = self.route.in_query
        found: dict[str, list[str]] = {}
        for pair in query.split("&"):
            raw, _, text = pair.partition("=")
            name = _decoded(raw)
            if name in known:
                found.setdefault(name, []).append(_decoded(text))
        for name, one in known.items():
            given = found.get(name)
            if given is None:
                if not one.default:
                    values[name] = one.absent()
            elif one.many:
                values[name] = one.read(given)
            elif len(given) > 1:
                raise InvalidMessage(f"{name}: given {len(given)} times, and is one value", path=name)
            else:
                values[name] = one.read(given[0])

    def reply(self, request: Message, value: Any) -> Message:
        headers = self._reply_headers.copy()
        reply = Message(channel=self.channel, operation=self._name, headers=headers)
        if self._location:
            location = _filled(self._location, value)
            if location:
                headers["location"] = location
        if self.route.waits and "prefer" in request.headers:
            headers["preference-applied"] = f"wait={_seconds(_preferred_wait(request.headers))}"
        if not self._has_result:
            return reply
        reply.media_type = self._accepted(request.headers)
        reply.body = self._codec(self._results, reply.media_type).encode(value)
        if self._linked and reply.media_type in (HAL, JSON):
            reply.body = self._with_links(reply.body, request, headers, value)
        if self._tagged:
            tag = f'"{blake2b(reply.body, digest_size=12).hexdigest()}"'
            headers["etag"] = tag
            known = request.headers.get("if-none-match")
            if known is not None and _names(known, tag):
                headers[":status"], reply.body, reply.media_type = "304", b"", ""
        return reply

    def _with_links(self, body: bytes, request: Message, headers: dict[str, str], value: Any) -> bytes:
        if body[:1] != b"{":  # null: nothing may follow from nothing
            return body
        links: dict[str, Any] = {}
        itself = headers.get("location") or (request.headers.get(":path") if self.route.verb == "GET" else None)
        if itself:
            links["self"] = {"href": itself}
        for name in allowed_links(self.operation, value):
            links[name] = self._linked[name].link(fill_link(self.operation, name, value))
        return b'%b%b"_links":%b}' % (body[:-1], b"," if len(body) > 2 else b"", _json(links))

    def refuse(self, request: Message, error: Fault | CallError) -> Message:  # noqa: ARG002 - problems are JSON always
        reply = Message(
            channel=self.channel, operation=self._name, status=error.code, media_type=PROBLEM_MEDIA_TYPE, headers={}
        )
        if isinstance(error, Fault):
            reply.headers[":status"] = str(error.status)
            reply.body = self._faults[URN + error.code].encode(error)
        else:
            reply.headers[":status"] = str(error.http_status)
            reply.body = to_problem(error)
            if error.retry_after is not None:
                reply.headers["retry-after"] = str(max(0, math.ceil(error.retry_after)))
        return reply

    def accepted(self, request: Message) -> Message:
        """202; of an async request with the `id` of its pending answer, which is the id of the request."""
        reply = Message(channel=self.channel, operation=self._name, headers={":status": "202"})
        if self.operation.style is Style.ASYNC_REQUEST:
            reply.media_type, reply.body = JSON, _json({"id": request.id})
            reply.headers["retry-after"] = RETRY_AFTER
            if self.route.level >= 1:
                major, pending = self.operation.contract.__quintet__.major, _declared(self.operation.companions[0])[1]
                reply.headers["location"] = f"/v{major}{pending.replace('{id}', _text(request.id))}"
        return reply

    def pending(self, request: Message) -> Message:
        headers = {":status": "202", "retry-after": RETRY_AFTER, "cache-control": "no-store"}
        if self.route.waits and "prefer" in request.headers:
            headers["preference-applied"] = f"wait={_seconds(_preferred_wait(request.headers))}"
        return Message(channel=self.channel, operation=self._name, status=PENDING, headers=headers)

    # on both

    def _codec(self, codecs: Mapping[str, Codec[Any]], media_type: str) -> Codec[Any]:
        codec = codecs.get(media_type or self._media_type)
        if codec is None and media_type.endswith("+json"):  # RFC 6839, section 3.1
            codec = codecs.get(JSON)
        if codec is None:
            raise UnsupportedMediaType(f"{self._name}: cannot read {media_type!r}; send one of {', '.join(codecs)}")
        return codec

    def _accepted(self, headers: Mapping[str, str]) -> str:
        accept = headers.get("accept")
        if accept is None:
            return self._offered[0]
        chosen = negotiate(accept, self._offered)
        if not chosen:
            raise NotAcceptable(f"{self._name}: cannot write {accept:.200}; there are {', '.join(self._offered)}")
        return chosen


class _FaultCodec:
    """A fault as problem details: its fields are extension members (RFC 9457, section 3.2).

    A field whose name the RFC has taken stands in the member `fields`; each field decides that for itself, so that
    another one beside it moves none.
    """

    def __init__(self, operation: Operation[Any, Any, Any], fault: type[Fault]) -> None:
        fields = {field.name: field for field in structs.fields(fault.record)}
        self._fault = fault
        self._nested = [name for name in fields if name in PROBLEM_MEMBERS or name == "fields"]
        self._plain = [name for name in fields if name not in self._nested]
        read = [_field(fields[name]) for name in self._plain]
        if self._nested:
            inner = [_field(fields[name]) for name in self._nested]
            self._inner = msgspec.defstruct("fields", inner, kw_only=True, module=fault.__module__)
            optional = not any(fields[name].required for name in self._nested)
            read.append(
                ("fields", self._inner, msgspec.field(default_factory=self._inner) if optional else msgspec.field())
            )
        members = [("type", str, msgspec.field()), ("title", str, msgspec.field()), ("status", int, msgspec.field())]
        self._head = {"type": URN + fault.code, "title": fault.__name__, "status": fault.status}
        self._written = msgspec.defstruct(fault.__name__, [*members, *read], kw_only=True)
        codec = _codecs(operation, msgspec.defstruct(fault.__name__, read, kw_only=True), JSON)[JSON]
        self._encode, self._decode = codec.encode, codec.decode

    def encode(self, fault: Fault) -> bytes:
        values = {name: getattr(fault, name) for name in self._plain}
        if self._nested:
            values["fields"] = self._inner(**{name: getattr(fault, name) for name in self._nested})
        return self._encode(self._written(**self._head, **values))

    def decode(self, body: bytes) -> Fault:
        found = self._decode(body)
        values = {name: getattr(found, name) for name in self._plain}
        return self._fault(**values, **{name: getattr(found.fields, name) for name in self._nested})


def _codecs(operation: Operation[Any, Any, Any], type_: Any, own: str) -> dict[str, Codec[Any]]:
    """By media type, our own first; a format that cannot carry the type is left out, unless it is our own."""
    found: dict[str, Codec[Any]] = {}
    for format_ in sorted(installed().values(), key=lambda one: one.media_type != own):
        try:
            found[format_.media_type] = format_.codec(type_)
        except (TypeError, ContractError) as error:
            if format_.media_type == own:
                raise ContractError(f"{operation!r}: {error}") from None
    return found


def _body_type(route: Route) -> Any:
    operation, fields = route.operation, route.in_body
    if route.whole_body:
        return fields[route.whole_body].type
    if len(fields) == len(structs.fields(operation.record)):
        return operation.record
    name = operation.record.__name__
    rest = [_field(field) for field in fields.values()]
    return msgspec.defstruct(name, rest, kw_only=True, module=operation.contract.__module__)


def _field(field: structs.FieldInfo) -> tuple[str, Any, Any]:
    if field.required:
        return field.name, field.type, msgspec.field()
    if field.default_factory is not NODEFAULT:
        return field.name, field.type, msgspec.field(default_factory=field.default_factory)
    return field.name, field.type, field.default


def _success(route: Route, has_result: bool, negotiable: bool) -> tuple[str, dict[str, str], str]:
    """The status, the constant headers and the Location template of a good reply. Raises ContractError."""
    operation, http = route.operation, route.operation.http
    if operation.style is Style.ASYNC_REQUEST or route.level == 0:
        return ("200" if has_result else "204"), {":status": "200" if has_result else "204"}, ""
    status = http.status or (201 if http.location else 200 if has_result else 204)
    if not 200 <= status <= 299 or (status in (204, 205) and has_result):
        raise ContractError(f"{operation!r}: status={status} cannot be what success answers with {operation.result!r}")
    location = f"/v{operation.contract.__quintet__.major}{_encoded(http.location)}" if http.location else ""
    missing = set(_BRACES.findall(location)) - _fields(operation.result)
    if missing:
        raise ContractError(f"{operation!r}: location={http.location!r}: the reply has no {', '.join(sorted(missing))}")
    headers = {":status": str(status)}
    if http.cache and route.level >= 2:
        headers["cache-control"] = http.cache
    if route.waits:
        headers["cache-control"] = "no-store"
    if route.verb == "GET" and negotiable:
        headers["vary"] = "accept"
    return str(status), headers, location


def _fields(record: Any) -> set[str]:
    if isinstance(record, type) and issubclass(record, Struct):
        return set(record.__struct_fields__)
    return {field.name for field in dataclasses.fields(record)} if dataclasses.is_dataclass(record) else set()


def _linked_operation(operation: Operation[Any, Any, Any], name: str) -> Operation[Any, Any, Any]:
    if not all(isinstance(kind, (*_RECORDS, inspect.NoneType)) for kind in _kinds(operation.result)):
        raise ContractError(f"{operation!r}: links are carried by a reply that is a record, not by {operation.result}")
    return operation.contract.__quintet__.operations[operation.links[name].operation]


def _filled(template: str, value: Any) -> str:
    """The template filled with the fields of a value; "" where one of them is None or empty."""
    values = {name: getattr(value, name) for name in _BRACES.findall(template)}
    if any(one is None or one == "" for one in values.values()):
        return ""
    return _BRACES.sub(lambda found: _segment(found[1], values[found[1]]), template)


def _seconds(wait: float) -> str:
    """RFC 7240 knows whole seconds; milliseconds are ours."""
    return f"{wait:.3f}".rstrip("0").rstrip(".")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Retry-After in seconds, also where it is a date (RFC 9110, section 10.2.3): counted from the reply's own Date."""
    after = headers.get("retry-after", "")
    if after.isascii() and after.isdecimal() and len(after) <= 9:
        return float(after)
    try:
        until, sent = (parsedate_to_datetime(text).timestamp() for text in (after, headers.get("date", "")))
    except (ValueError, OverflowError):
        return None
    return max(0.0, until - sent)


def _preferred_wait(headers: Mapping[str, str]) -> float:
    """The seconds of `Prefer: wait=N`; what cannot be read is no preference (RFC 7240, section 2)."""
    found = _WAIT.search(headers["prefer"])
    return float(found[1]) if found else 0.0


def _names(known: str, tag: str) -> bool:
    """Whether If-None-Match names the tag, by weak comparison (RFC 9110, section 13.1.2)."""
    return known.strip() == "*" or any(one.strip().removeprefix("W/") == tag for one in known.split(","))


@lru_cache(maxsize=512)
def negotiate(accept: str, offered: tuple[str, ...]) -> str:
    """The media type to answer with, "" where none is accepted (RFC 9110, section 12.5.1). Ties go to the first."""
    ranges: dict[str, float] = {}
    for part in accept.split(","):
        range_, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = next((piece[2:].strip() for piece in parameters if piece.startswith("q=")), "1")
        if "/" in range_ and re.fullmatch(r"[01]|[01]?\.[0-9]{0,6}", quality):
            ranges[range_] = float(quality + "0" if quality[-1] == "." else quality)
    if not ranges:
        return offered[0]
    qualities = [
        next((ranges[one] for one in (type_, f"{type_.partition('/')[0]}/*", "*/*") if one in ranges), 0.0)
        for type_ in offered
    ]
    best = max(qualities)
    return offered[qualities.index(best)] if best > 0 else ""


def bind(operation: Operation[Any, Any, Any], format_name: str) -> Rest:
    return Rest(operation, format_name)
