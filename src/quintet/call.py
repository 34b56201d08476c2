"""What a caller holds: typed calls, replies, pending answers and the answers of a survey."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, ParamSpec, Protocol, Self, TypedDict, TypeVar, Unpack

from msgspec import UNSET, Struct, UnsetType

from quintet.errors import ConfigurationError
from quintet.message import Native
from quintet.wire.http import refusal

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Using(TypedDict, total=False):
    """What `using` says of one message wherever it is said: `key` for order, the user's `headers`, after how many
    seconds a queued message `expires`, and the message's `id`, by which a repeat of it is known as one."""

    key: str
    headers: Mapping[str, str] | None
    expires: float | None
    id: str


class UsingNow(Using, total=False):
    """What it says where the message is sent at once: `timeout` in seconds, and by `native` what one transport alone
    can do, as `amqp.Publish(priority=5)`; others pass over it."""

    timeout: float | None
    native: Sequence[Native]


class Options(Struct, frozen=True, kw_only=True):
    """What was said by `using`."""

    timeout: float | UnsetType | None = UNSET
    key: str = ""
    headers: Mapping[str, str] = {}
    expires: float | None = None
    id: str = ""
    native: tuple[Native, ...] = ()

    def __post_init__(self) -> None:
        for name, seconds in (("timeout", self.timeout), ("expires", self.expires)):
            if isinstance(seconds, float | int) and not 0 <= seconds < math.inf:
                raise ConfigurationError(f"using({name}={seconds}): seconds from 0 on, or None for no limit")
        for name, value in self.headers.items():
            if why := refusal(name, value):
                raise ConfigurationError(f"using(headers={{{name!r:.100}: ...}}): {why}")

    @classmethod
    def of(cls, using: UsingNow | Using) -> Options:
        given: dict[str, Any] = {**using}
        given["headers"], given["native"] = given.get("headers") or {}, tuple(given.get("native", ()))
        return cls(**given)


DEFAULTS = Options()


class Reply(Generic[R_co]):
    """A reply with what travels beside its value.

    `links`: the operations that may follow from this reply, by name; each is awaited like a call, its parameters
    filled from the reply. `stale`: the value is an old one that a fallback kept.
    """

    def __init__(
        self,
        value: R_co,
        headers: Mapping[str, str],
        links: Mapping[str, Callable[..., Awaitable[Any]]] | None = None,
        stale: bool = False,
    ) -> None:
        self.value = value
        self.headers = headers
        self.links = links or {}
        self.stale = stale

    def __repr__(self) -> str:
        links = f", links: {', '.join(self.links)}" if self.links else ""
        return f"<Reply {self.value!r}{links}{', stale' if self.stale else ''}>"


class Line(Protocol):
    """One operation as a client reaches it, compiled when the client connects (client.py)."""

    name: str

    def value(self, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> Coroutine[Any, Any, Any]: ...
    async def reply(self, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> Reply[Any]: ...
    async def result(self, pending_id: str, wait: float | None) -> Any: ...
    async def cancel(self, pending_id: str) -> None: ...


class Call(Generic[P, R]):
    """An operation of a connected client: `await client.get("p-1")`.

    Raises the contract's declared faults, and a CallError where no answer came.
    """

    def __init__(self, line: Line, options: Options = DEFAULTS) -> None:
        self._line = line
        self._options = options

    def __repr__(self) -> str:
        return f"<call {self._line.name}>"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        return self._line.value(args, kwargs, self._options)

    def using(self, **options: Unpack[UsingNow]) -> Self:
        """The same call with other options: timeout=, key=, headers=, expires=, id=, native= (UsingNow)."""
        return type(self)(self._line, Options.of(options))

    async def reply(self, *args: P.args, **kwargs: P.kwargs) -> Reply[R]:
        """As the call itself, with what travels beside the value: links, headers, staleness."""
        reply: Reply[R] = await self._line.reply(args, kwargs, self._options)
        return reply


class Pending(Generic[R_co]):
    """An answer that is being worked on. `await pending` waits for it; `id` finds it again from another process."""

    def __init__(self, line: Line, pending_id: str) -> None:
        self._line = line
        self.id = pending_id

    def __repr__(self) -> str:
        return f"<pending {self._line.name} {self.id}>"

    def __await__(self) -> Generator[Any, None, R_co]:
        return self.wait().__await__()

    async def wait(self, timeout: float | None = None) -> R_co:
        """The answer, or the fault or failure raised. DeadlineExceeded after `timeout` seconds (the work goes on)."""
        value: R_co = await self._line.result(self.id, timeout)
        return value

    async def cancel(self) -> None:
        """Gives the work up: whoever waits for it gets Cancelled. Does nothing where it is answered already."""
        await self._line.cancel(self.id)


class PendingCall(Call[P, Pending[R]]):
    """A request whose answer comes later: `pending = await client.receipt(...)`, then `await pending`."""

    def pending(self, pending_id: str) -> Pending[R]:
        """The pending answer of an earlier submission, perhaps of another process."""
        return Pending(self._line, pending_id)


class Answer(Struct, Generic[R], frozen=True):
    """One answer to a survey."""

    value: R
    sender: str


class Answers(Protocol[R]):
    """The answers of a survey, as they come: `async with service.ask(...).within(2.0) as answers`."""

    async def __aenter__(self) -> AsyncIterator[Answer[R]]: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
