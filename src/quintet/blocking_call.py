"""What a caller in a thread holds: the calls of call.py, which here return when they are answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Generic, ParamSpec, Protocol, Self, TypeVar, Unpack

from quintet.call import DEFAULTS, Line, Options, UsingNow
from quintet.call import Reply as AsyncReply

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Run(Protocol):
    """Runs an async function in the loop that serves all threads, and waits for it: its result, or its error."""

    def __call__(self, function: Callable[..., Awaitable[Any]], /, *args: Any, **kwargs: Any) -> Any: ...


class Reply(Generic[R_co]):
    """A reply with what travels beside its value, as call.Reply; its links are called without `await`."""

    def __init__(
        self, value: R_co, headers: Mapping[str, str], links: Mapping[str, Callable[..., Any]], stale: bool
    ) -> None:
        self.value = value
        self.headers = headers
        self.links = links
        self.stale = stale

    def __repr__(self) -> str:
        links = f", links: {', '.join(self.links)}" if self.links else ""
        return f"<Reply {self.value!r}{links}{', stale' if self.stale else ''}>"


class Call(Generic[P, R]):
    """An operation of a connected blocking client: `client.get("p-1")`.

    Raises the contract's declared faults, and a CallError where no answer came.
    """

    def __init__(self, line: Line, run: Run, options: Options = DEFAULTS) -> None:
        self._line = line
        self._run = run
        self._options = options

    def __repr__(self) -> str:
        return f"<blocking call {self._line.name}>"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        value: R = self._run(self._line.value, args, kwargs, self._options)
        return value

    def using(self, **options: Unpack[UsingNow]) -> Self:
        """The same call with other options: timeout=, key=, headers=, expires=, id=, native= (call.UsingNow)."""
        return type(self)(self._line, self._run, Options.of(options))

    def reply(self, *args: P.args, **kwargs: P.kwargs) -> Reply[R]:
        """As the call itself, with what travels beside the value: links, headers, staleness."""
        reply: AsyncReply[Any] = self._run(self._line.reply, args, kwargs, self._options)
        links = {name: partial(self._run, follow) for name, follow in reply.links.items()}
        return Reply(self._held(reply.value), reply.headers, links, reply.stale)

    def _held(self, value: Any) -> Any:
        return value


class Pending(Generic[R_co]):
    """An answer that is being worked on. `result()` waits for it; `id` finds it again from another process."""

    def __init__(self, line: Line, run: Run, pending_id: str) -> None:
        self._line = line
        self._run = run
        self.id = pending_id

    def __repr__(self) -> str:
        return f"<blocking pending {self._line.name} {self.id}>"

    def result(self) -> R_co:
        """The answer, or the fault or failure raised, however long it takes."""
        value: R_co = self._run(self._line.result, self.id, None)
        return value

    def wait(self, timeout: float) -> R_co:
        """As `result`, but DeadlineExceeded after `timeout` seconds (the work goes on)."""
        value: R_co = self._run(self._line.result, self.id, timeout)
        return value

    def cancel(self) -> None:
        """Gives the work up: whoever waits for it gets Cancelled. Does nothing where it is answered already."""
        self._run(self._line.cancel, self.id)


class PendingCall(Call[P, Pending[R]]):
    """A request whose answer comes later: `pending = client.receipt(...)`, then `pending.result()`."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Pending[R]:
        return self._held(super().__call__(*args, **kwargs))

    def pending(self, pending_id: str) -> Pending[R]:
        """The pending answer of an earlier submission, perhaps of another process."""
        return Pending(self._line, self._run, pending_id)

    def _held(self, value: Any) -> Pending[R]:
        return self.pending(value.id)
