"""What a handler may know about the message that it works on, and what that message leaves to the calls below it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from msgspec import Struct, structs

from quintet.clock import SYSTEM, Clock
from quintet.errors import QuintetError
from quintet.message import Channel, Message
from quintet.wire.http import HttpRequest, http_request, own_headers

if TYPE_CHECKING:  # what most services never load
    from quintet.store import UnitOfWork


class Current(Struct):
    """The message in work: `current()` inside a handler."""

    _message: Message
    _clock: Clock
    deadline: float | None
    _replies: dict[object, Message] | None = None  # to calls made while it is worked on, where a policy has them kept
    _store: UnitOfWork | None = None
    _detached: bool = False

    def __repr__(self) -> str:
        return f"<current {self._message!r}>"

    @property
    def id(self) -> str:
        """The message's id: the same on every repeat of it."""
        return self._message.id

    @property
    def sender(self) -> str:
        """The name of the service or client that sent it."""
        return self._message.sender

    @property
    def operation(self) -> str:
        return self._message.operation

    @property
    def headers(self) -> Mapping[str, str]:
        """The user's own headers, and the trace context: nothing that HTTP or a transport owns, and no credentials.

        They may be handed on: `trips.get.using(headers=current().headers)`.
        """
        return own_headers(self._message.headers)

    @property
    def http(self) -> HttpRequest | None:
        """The request, where HTTP itself delivered it: method, path, client, scheme, headers, if_match."""
        return http_request(self._message)

    @property
    def key(self) -> str:
        return self._message.key

    @property
    def attempt(self) -> int:
        """1 on the first delivery."""
        return self._message.attempt

    @property
    def remaining(self) -> float | None:
        """Seconds until the caller gives up; None where nobody waits."""
        return None if self.deadline is None else max(0.0, self.deadline - self._clock.now())

    @property
    def store(self) -> UnitOfWork:
        """The tables beside the marks of what was handled: what is executed here is done if the handler returns, and
        once, however often the message comes. Raises QuintetError where the service has no such store."""
        if self._store is None:
            raise QuintetError(
                f"{self.operation}: current().store is there in the handlers of Service(..., idempotent='sqlite:///...')"
                " except those with every_instance=, and not under detached()"
            )
        return self._store


NO_MESSAGE = Message(channel=Channel("none"))
CURRENT: ContextVar[Current] = ContextVar("quintet", default=Current(NO_MESSAGE, SYSTEM, None))  # noqa: B039 - never changed


def current() -> Current:
    """The message that the running handler works on. Raises QuintetError outside of one."""
    found = CURRENT.get()
    if found._message is NO_MESSAGE:
        raise QuintetError("current() was called outside of a handler: no message is in work")
    return found


def replies() -> dict[object, Message] | None:
    """What filters remember while the running handler works on its message. None outside of one, and when detached."""
    found = CURRENT.get()
    if found._message is NO_MESSAGE or found._detached:
        return None
    if found._replies is None:
        found._replies = {}
    return found._replies


@contextmanager
def deadline(seconds: float, *, clock: Clock = SYSTEM) -> Generator[None]:
    """Caps everything below it: no call made inside waits longer than what is left of so many seconds."""
    outer, mine = CURRENT.get(), clock.now() + seconds
    inherited = outer.deadline
    inner = structs.replace(outer, _clock=clock, deadline=mine if inherited is None else min(mine, inherited))
    token = CURRENT.set(inner)
    try:
        yield
    finally:
        CURRENT.reset(token)


@contextmanager
def detached() -> Generator[None]:
    """Frees everything below it from the deadline above it: for tasks that outlive the handler that starts them.

    `current()` still tells the message, and calls are part of its trace. Its `store` and the replies that `cache=True`
    keeps end with the handler, so neither is there.
    """
    inner = structs.replace(CURRENT.get(), deadline=None, _replies=None, _store=None, _detached=True)
    token = CURRENT.set(inner)
    try:
        yield
    finally:
        CURRENT.reset(token)
