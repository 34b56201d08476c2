"""The binding of every transport that is not REST or Thrift: the record of parameters is the body."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from msgspec import Struct

from quintet.binding import DECLINED, FAULT, PENDING, Codecs, allowed_links, undeclared
from quintet.contract import Fault, Operation
from quintet.errors import (
    BY_CODE,
    PROBLEM_MEDIA_TYPE,
    CallError,
    InvalidMessage,
    QuintetError,
    from_problem,
    to_problem,
)
from quintet.message import Message

_GOOD = frozenset({"", PENDING, DECLINED})
_LINKS = "links"


class Body:
    def __init__(self, operation: Operation[Any, Any, Any], format_name: str) -> None:
        self.operation = operation
        self.channel = operation.channel
        self.codecs = Codecs(operation, format_name)
        self._name = operation.full_name
        self._version = operation.contract.__quintet__.version

    def request(self, record: Struct) -> Message:
        return Message(
            channel=self.channel,
            operation=self._name,
            version=self._version,
            media_type=self.codecs.media_type,
            body=self.codecs.record.encode(record),
        )

    def result(self, reply: Message) -> Any:
        if not self.codecs.has_result:
            return None
        try:
            return self.codecs.of(self.codecs.results, reply.media_type).decode(reply.body)
        except InvalidMessage as error:
            raise InvalidMessage(
                f"the reply of {self._name} does not fit its contract: {error}", path=error.path
            ) from None

    def failure(self, reply: Message) -> QuintetError | None:
        if reply.status in _GOOD:
            return None
        fault = self.codecs.classes.get(reply.status)
        if fault is None:
            ours = reply.status in BY_CODE or reply.media_type == PROBLEM_MEDIA_TYPE
            if ours and not reply.status.startswith(FAULT):
                return from_problem(reply.body, reply.status)
            return undeclared(self._name, reply.status)
        codec = self.codecs.of(self.codecs.faults[reply.status], reply.media_type)
        return fault.from_record(codec.decode(reply.body))

    def links(self, reply: Message) -> Mapping[str, str]:
        return dict.fromkeys(filter(None, reply.headers.get(_LINKS, "").split(",")), "")

    def follow(self, message: Message, href: str, said: Collection[str]) -> None:
        """Do nothing: a channel is no address that a reply could name."""

    def arguments(self, message: Message) -> Struct:
        record: Struct = self.codecs.of(self.codecs.records, message.media_type).decode(message.body)
        return record

    def reply(self, request: Message, value: Any) -> Message:
        media_type = request.media_type or self.codecs.media_type
        reply = Message(channel=self.channel, operation=self._name, media_type=media_type)
        if self.codecs.has_result:
            reply.body = self.codecs.of(self.codecs.results, media_type).encode(value)
        if self.operation.links:
            reply.headers[_LINKS] = ",".join(allowed_links(self.operation, value))
        return reply

    def refuse(self, request: Message, error: Fault | CallError) -> Message:
        if isinstance(error, Fault):
            media_type = request.media_type if request.media_type in self.codecs.records else self.codecs.media_type
            body = self.codecs.faults[error.code][media_type].encode(error.to_record())
        else:
            media_type, body = PROBLEM_MEDIA_TYPE, to_problem(error)
        return Message(channel=self.channel, operation=self._name, status=error.code, media_type=media_type, body=body)

    def accepted(self, request: Message) -> Message:
        return Message(channel=self.channel, operation=self._name, media_type=request.media_type)

    def pending(self, request: Message) -> Message:
        return Message(channel=self.channel, operation=self._name, media_type=request.media_type, status=PENDING)


def bind(operation: Operation[Any, Any, Any], format_name: str) -> Body:
    return Body(operation, format_name)
