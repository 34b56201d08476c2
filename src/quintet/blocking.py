"""The same clients for synchronous code and threads: one loop in one background thread serves all callers of a process.

`with blocking.connect(Passengers, "http://127.0.0.1:8001") as passengers: passengers.get("p-1")`
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from asyncio.events import _get_running_loop  # the public twin raises where there is none, which costs much more
from collections.abc import Awaitable, Callable, Sequence
from contextvars import copy_context
from types import TracebackType
from typing import Any, Generic, TypeAlias, TypeVar

from quintet import client
from quintet.blocking_call import Call, Pending, PendingCall, Reply
from quintet.call import PendingCall as AsyncPendingCall
from quintet.contract import Contract
from quintet.errors import ConnectionLost, QuintetError
from quintet.policy import Policies
from quintet.watch import Listener

__all__ = ["Call", "Client", "Pending", "PendingCall", "Reply", "connect"]

C = TypeVar("C", bound=Contract)

Client: TypeAlias = type[C]
"""What `connect` gives: `def ride(passengers: blocking.Client[Passengers]) -> None: ...`.

No type can say "this contract, but blocking": so it is typed as the contract's class, whose operations are typed as
calls that block, too."""

PATIENCE = 5.0  # seconds that the end of a process, or of the last client, waits for what closes


class _Work:
    """One call on its way through the loop. Its caller waits for the lock; nothing else is shared."""

    __slots__ = ("_args", "_function", "_host", "_kwargs", "_task", "context", "error", "lock", "value")

    def __init__(self, host: _Host, function: Callable[..., Awaitable[Any]], args: Any, kwargs: dict[str, Any]) -> None:
        self._host = host
        self._function, self._args, self._kwargs = function, args, kwargs
        self._task: asyncio.Task[None] | None = None
        self.context = copy_context()  # the deadline above the call, and what else the caller's thread has set
        self.value: Any = None
        self.error: BaseException | None = None
        self.lock = threading.Lock()
        self.lock.acquire()

    def start(self) -> None:
        self._task = self._host.loop.create_task(self._run(), context=self.context)

    async def _run(self) -> None:
        try:
            self.value = await self._function(*self._args, **self._kwargs)
        except BaseException as error:  # its caller's, whatever it is: nothing may stop the loop of all others
            self.error = _closed_meanwhile() if isinstance(error, asyncio.CancelledError) else error
        self._host.works.discard(self)
        self.lock.release()

    def cancel(self) -> None:
        """For a caller that waits no longer."""
        self._host.works.discard(self)
        if self._task is not None:
            self._task.cancel()

    def give_up(self) -> None:
        """For a loop that has ended."""
        self.error = _closed_meanwhile()
        self.lock.release()


def _closed_meanwhile() -> ConnectionLost:
    return ConnectionLost("the blocking client was closed while this call was on its way")


class _Host:
    """The loop that serves all blocking clients of a process, in a thread of its own."""

    def __init__(self) -> None:
        self.loop = _new_loop()
        self.clients: set[client.connect[Any]] = set()
        self.works: set[_Work] = set()
        self.gone = ""  # why it serves no more
        self._stop = asyncio.Event()
        # a daemon: the end of the process does not wait for it, `_at_exit` stops it
        self._thread = threading.Thread(target=self._serve, name="quintet.blocking", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<host of {len(self.clients)} blocking clients, {len(self.works)} calls on their way>"

    def run(self, function: Callable[..., Awaitable[Any]], args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs it in the loop for this thread, in a copy of its context. Raises what it raises."""
        if self.gone:
            raise QuintetError(self.gone)
        work = _Work(self, function, args, kwargs)
        self.works.add(work)
        try:
            self.loop.call_soon_threadsafe(work.start, context=work.context)
            work.lock.acquire()
        except BaseException as error:  # KeyboardInterrupt and its like, or the loop was closed just now
            self.works.discard(work)
            if isinstance(error, RuntimeError) and self.loop.is_closed():
                raise QuintetError(_CLOSED) from None
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(work.cancel)
            raise
        failure, work.error = work.error, None  # or it would hold itself, through the frames of its traceback
        if failure is None:
            return work.value
        try:
            raise failure
        finally:
            del failure

    def stop(self) -> None:
        """Closes the clients that are still open, ends the loop and its thread."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)

    def _serve(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
                runner.run(self._until_stopped())
        finally:
            self.gone = self.gone or _CLOSED
            for work in list(self.works):  # began too late to be run
                work.give_up()

    async def _until_stopped(self) -> None:
        await self._stop.wait()
        with contextlib.suppress(Exception):  # the process ends: nobody is there to be told
            async with asyncio.timeout(PATIENCE / 2):
                for one in list(self.clients):
                    await one.__aexit__(None, None, None)


_CLOSED = "this blocking client is closed: its `with` block has ended"
_FORKED = "this blocking client was connected before the process was forked: connect in each process, after the fork"
_IN_A_LOOP = (
    "a blocking client would stop the event loop that runs in this thread:"
    " use `await` here, with `async with quintet.connect(...)`"
)

_lock = threading.Lock()  # over _host, and over the clients of it
_host: _Host | None = None


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # not on Windows
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _enter(one: client.connect[Any]) -> _Host:
    """The process's host, started with its first client."""
    global _host
    with _lock:
        if _host is None or _host.gone:
            _host = _Host()
        _host.clients.add(one)
        return _host


def _leave(host: _Host, one: client.connect[Any]) -> None:
    """Ends the host with its last client."""
    global _host
    with _lock:
        host.clients.discard(one)
        last = not host.clients
        if last and _host is host:
            _host = None
    if last:
        host.stop()


@atexit.register
def _at_exit() -> None:
    if _host is not None:
        _host.stop()


def _after_fork() -> None:
    global _host, _lock
    _lock = threading.Lock()  # another thread may have held it
    if _host is not None:
        _host.gone = _FORKED
        _host = None


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


class _Connected:
    """What `connect` gives: a call per operation, as its attributes."""

    def __init__(self, contract: type[Contract], host: _Host) -> None:
        self._contract = contract
        self._host = host
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "connected"
        return f"<{self._contract.__name__} blocking client, {state}>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._contract(), name)  # raises, and says why it is no call of a client

    def _run(self, function: Callable[..., Awaitable[Any]], /, *args: Any, **kwargs: Any) -> Any:
        if _get_running_loop() is not None:
            raise QuintetError(_IN_A_LOOP)
        if self._closed:
            raise QuintetError(_CLOSED)
        return self._host.run(function, args, kwargs)


class connect(Generic[C]):  # noqa: N801 - reads as a verb: with blocking.connect(Trips, address) as trips
    """A typed client of a contract for threads: `with blocking.connect(Passengers, "http://...") as passengers: ...`.

    Takes what `quintet.connect` takes, and its calls are the same without `await`; any number of threads may share it.
    A `listener` is called in the background thread. Raises ConfigurationError on entering; its calls raise declared
    faults and CallError, and QuintetError where a call cannot block: inside a running event loop, after the `with`
    block, in a process forked meanwhile.
    """

    def __init__(
        self,
        contract: type[C],
        addresses: str | Sequence[str],
        *,
        policy: Policies = (),
        name: str = "client",
        format: str = "json",  # noqa: A002 - the word users know
        listener: Listener | None = None,
    ) -> None:
        self._contract = contract
        self._connect = client.connect(contract, addresses, policy=policy, name=name, format=format, listener=listener)
        self._connected: _Connected | None = None

    def __repr__(self) -> str:
        return f"<blocking {self._connect!r}>"

    def __enter__(self) -> Client[C]:
        if _get_running_loop() is not None:
            raise QuintetError(_IN_A_LOOP)
        if self._connected is not None:
            raise QuintetError(f"{self!r} is used up: write blocking.connect(...) for each `with`")
        host = _enter(self._connect)
        try:
            calls = vars(host.run(self._connect.__aenter__, (), {}))
        except BaseException:
            _leave(host, self._connect)
            raise
        connected: Any = _Connected(self._contract, host)
        for name, call in calls.items():
            kind: type[Call[Any, Any]] = PendingCall if isinstance(call, AsyncPendingCall) else Call
            connected.__dict__[name] = kind(call._line, connected._run)
        self._connected = connected
        result: Client[C] = connected
        return result

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        connected = self._connected
        if connected is None or connected._closed:
            return
        connected._closed = True
        host = connected._host
        if host.gone:  # at the end of the process, or in a fork: the connections are the parent's
            return
        try:
            host.run(self._connect.__aexit__, (None, None, None), {})
        finally:
            _leave(host, self._connect)
