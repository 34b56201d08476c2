"""What a binding is: how an operation's values become a message on one kind of transport, and back."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from msgspec import Struct

from quintet.contract import FANOUT, Fault, Operation
from quintet.errors import CallError, ContractError, QuintetError, RemoteError, UnsupportedMediaType
from quintet.format import Codec, by_media_type, format_named, installed
from quintet.message import Channel, Message

PENDING = "pending"
"""The status of a reply that says: no answer yet, ask again."""
DECLINED = "declined"
"""The status of a reply to a survey that says: I have no answer."""


FAULT = "fault:"
"""What the status of a reply begins with that is a fault; its name follows."""


class Bound(Protocol):
    """One operation in one binding, compiled at start-up. Pure: values and messages, no socket."""

    channel: Channel

    # on the caller's side
    def request(self, record: Struct) -> Message:
        """The operation's parameters as a message (channel, operation, body, media type, pseudo headers)."""
        ...

    def result(self, reply: Message) -> Any:
        """The value of a good reply. Raises InvalidMessage where it does not fit the contract."""
        ...

    def failure(self, reply: Message) -> QuintetError | None:
        """The fault or CallError that a reply stands for; None for a good one, PENDING and DECLINED included."""
        ...

    def links(self, reply: Message) -> Mapping[str, str]:
        """The operations that may follow, by link name, with their address where the binding knows one."""
        ...

    def follow(self, message: Message, href: str, said: Collection[str]) -> None:
        """Send a request to the address that a link named; `said` are the parameters that the caller gave beside it."""
        ...

    # on the service's side
    def arguments(self, message: Message) -> Struct:
        """The parameters out of a request. Raises InvalidMessage or UnsupportedMediaType."""
        ...

    def reply(self, request: Message, value: Any) -> Message:
        """The handler's value as a reply. Raises NotAcceptable."""
        ...

    def refuse(self, request: Message, error: Fault | CallError) -> Message:
        """A fault or failure as a reply."""
        ...

    def accepted(self, request: Message) -> Message:
        """The reply that says: it is kept, and will be worked on (notifications into an inbox, async requests)."""
        ...

    def pending(self, request: Message) -> Message:
        """The reply (to the companion `result`) that says: no answer yet."""
        ...


def bind(binding: str, operation: Operation[Any, Any, Any], format_name: str = "json") -> Bound:
    """Compiles an operation for the binding of that name. `format_name` is what requests are written in; whatever
    format is installed is read. Raises ContractError where the operation cannot be bound."""
    bound: Bound = importlib.import_module(f"quintet.bindings.{binding}").bind(operation, format_name)
    return bound


def check(operation: Operation[Any, Any, Any]) -> None:
    """Raise ContractError where a binding has no place for one of the operation's parameters."""
    if operation.style not in FANOUT:
        importlib.import_module("quintet.bindings.rest").Route(operation)


def undeclared(name: str, code: str) -> RemoteError:
    """The failure that stands for a fault of a later version: an answer, whose fields our contract does not know."""
    fault = code.removeprefix(FAULT)
    error = RemoteError(f"{name}: answered with the fault {fault!r:.200}, which the contract here does not declare")
    error.answered = True
    return error


class Codecs:
    """The codecs of an operation's parameters, result and faults in every installed format."""

    def __init__(self, operation: Operation[Any, Any, Any], format_name: str) -> None:
        self._name = operation.full_name
        format_named(format_name)  # refuses an unknown name
        self.records: dict[str, Codec[Any]] = {}
        self.results: dict[str, Codec[Any]] = {}
        self.faults: dict[str, dict[str, Codec[Any]]] = {fault.code: {} for fault in operation.faults}
        self.classes = {fault.code: fault for fault in operation.faults}
        self.media_type = format_named(format_name).media_type
        for name, format_ in installed().items():
            media_type = format_.media_type
            try:
                record, result = format_.codec(operation.record), format_.codec(operation.result)
                faults = {fault.code: format_.codec(fault.record) for fault in operation.faults}
            except (TypeError, ContractError) as error:
                if name == format_name:
                    raise ContractError(f"{operation!r}: {error}") from None
                continue  # a format that could read a request and not write its reply is refused before the work
            self.records[media_type], self.results[media_type] = record, result
            for code, codec in faults.items():
                self.faults[code][media_type] = codec
        self.record = self.records[self.media_type]
        self.has_result = operation.result is not type(None)

    def of(self, codecs: Mapping[str, Codec[Any]], media_type: str) -> Codec[Any]:
        """The codec for a media type that came with a message. Raises UnsupportedMediaType."""
        codec = codecs.get(media_type or self.media_type)
        if codec is None:
            name = by_media_type(self._name, media_type)
            raise UnsupportedMediaType(f"{self._name}: its types cannot be carried as {name}")
        return codec


def allowed_links(operation: Operation[Any, Any, Any], value: Any) -> list[str]:
    """The names of the links whose condition holds on this reply."""
    return [name for name, link in operation.links.items() if link.when is None or link.when(value)]


def fill_link(operation: Operation[Any, Any, Any], name: str, value: Any) -> dict[str, Any]:
    """The parameters of a linked operation that the reply itself provides: of the same name, or as `fill` says."""
    link = operation.links[name]
    target = operation.contract.__quintet__.operations[link.operation]
    found = {parameter: link.fill.get(parameter, parameter) for parameter in target.record.__struct_fields__}
    return {parameter: getattr(value, field) for parameter, field in found.items() if hasattr(value, field)}
