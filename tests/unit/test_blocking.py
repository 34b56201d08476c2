"""Blocking clients: many threads, one loop; what interrupts, closes, forks and ends them."""
# mypy: disable-error-code="empty-body"

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct

import quintet
from quintet import (
    Breaker,
    Bulkhead,
    CallError,
    Cancelled,
    CircuitOpen,
    ConnectionLost,
    Contract,
    DeadlineExceeded,
    Fault,
    Http,
    LimitReached,
    Link,
    Policy,
    QuintetError,
    Service,
    Unavailable,
    async_request,
    blocking,
    current,
    deadline,
    event,
    notification,
    on,
    request,
    serve,
)
from quintet.blocking import _Host, _Work
from quintet.policy import Policies

PATIENCE = 20.0
NOBODY = "http://127.0.0.1:9"


class Trip(Struct):
    id: str
    state: str = "new"


class NoSuchTrip(Fault, status=404):
    trip_id: str


class Trips(Contract, name="trips", http_level=3):
    @request(
        http=Http("GET /trips/{trip_id}"), faults=[NoSuchTrip], links={"cancel": Link("cancel", fill={"trip_id": "id"})}
    )
    async def get(self, trip_id: str) -> Trip: ...

    @request(http="DELETE /trips/{trip_id}")
    async def cancel(self, trip_id: str) -> Trip: ...

    @request
    async def hang(self) -> str: ...

    @request
    async def remaining(self) -> float: ...

    @request
    async def remaining_in_a_thread(self) -> float: ...

    @notification
    async def ping(self, text: str) -> None: ...

    @async_request(faults=[NoSuchTrip])
    async def receipt(self, trip_id: str) -> str: ...

    @event
    async def created(self, trip: Trip) -> None: ...


class Server:
    """The service in a loop of another thread, until the test is over. `begun` counts the calls that hang."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.pinged: list[str] = []
        self.client: blocking.Client[Trips]  # which the service itself uses, in a thread
        self._ready: Future[str] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="server")

    def __enter__(self) -> str:
        self._thread.start()
        return self._ready.result(PATIENCE)

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        service = Service(Trips, answers="memory://", policy=Policy(timeout=3600.0))

        @service.handles(Trips.get)
        async def get(trip_id: str) -> Trip:
            if trip_id == "none":
                raise NoSuchTrip(trip_id=trip_id)
            return Trip(trip_id)

        @service.handles(Trips.cancel)
        async def cancel(trip_id: str) -> Trip:
            return Trip(trip_id, "cancelled")

        @service.handles(Trips.hang)
        async def hang() -> str:
            self.begun.release()
            await self._end.wait()
            return "late"

        @service.handles(Trips.remaining)
        async def remaining() -> float:
            return current().remaining or -1.0

        @service.handles(Trips.remaining_in_a_thread)
        async def remaining_in_a_thread() -> float:
            return await asyncio.to_thread(self.client.remaining)

        @service.handles(Trips.ping)
        async def ping(text: str) -> None:
            self.pinged.append(text)

        @service.handles(Trips.receipt)
        async def receipt(trip_id: str) -> str:
            if trip_id == "none":
                raise NoSuchTrip(trip_id=trip_id)
            if trip_id == "slow":
                self.begun.release()
                await self._end.wait()
            return f"receipt of {trip_id}"

        async with serve(service, at=["http://127.0.0.1:0", "memory://"]) as at:
            self._ready.set_result(at[0])
            await self._end.wait()


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def address(server: Server) -> Iterator[str]:
    with server as address:
        yield address


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert threads() == []


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "quintet.blocking"]


@contextmanager
def in_thread(function: Callable[[], Any]) -> Generator[Future[Any]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(function)


# calls


def test_a_call_returns_the_value_and_raises_the_declared_fault(address: str) -> None:
    with blocking.connect(Trips, address) as client:
        assert client.get("t-1") == Trip("t-1")
        assert client.get(trip_id="t-2") == Trip("t-2")
        with pytest.raises(NoSuchTrip) as raised:
            client.get("none")
        assert raised.value == NoSuchTrip(trip_id="none")


def test_a_notification_is_accepted(address: str, server: Server) -> None:
    with blocking.connect(Trips, address) as client:
        client.ping("hello")
        assert server.pinged == ["hello"]


def test_using_changes_one_call(address: str) -> None:
    with blocking.connect(Trips, address, policy=Policy(timeout=PATIENCE)) as client:
        assert 5.0 < client.remaining() <= PATIENCE
        assert client.remaining.using(timeout=5.0)() <= 5.0


def test_a_reply_carries_links_that_are_called_without_await(address: str) -> None:
    with blocking.connect(Trips, address) as client:
        reply = client.get.reply("t-1")
        assert reply.value == Trip("t-1")
        assert not reply.stale
        assert reply.headers["content-type"].startswith("application/")
        assert reply.links["cancel"]() == Trip("t-1", "cancelled")
        assert repr(reply) == "<Reply Trip(id='t-1', state='new'), links: cancel>"


def test_a_pending_answer_is_fetched_and_found_again_by_its_id(address: str) -> None:
    with blocking.connect(Trips, address) as client:
        pending = client.receipt("t-1")
        assert pending.result() == "receipt of t-1"
        assert client.receipt.pending(pending.id).wait(PATIENCE) == "receipt of t-1"
        assert client.receipt.reply("t-2").value.result() == "receipt of t-2"
        with pytest.raises(NoSuchTrip):
            client.receipt.using(timeout=PATIENCE)("none").result()


def test_a_pending_answer_is_waited_for_in_bounds_and_cancelled(address: str, server: Server) -> None:
    with blocking.connect(Trips, address) as client:
        pending = client.receipt("slow")
        assert server.begun.acquire(timeout=PATIENCE)
        with pytest.raises(DeadlineExceeded, match="the work goes on"):
            pending.wait(0.01)
        pending.cancel()
        with pytest.raises(Cancelled):
            pending.result()


def test_wrong_arguments_are_a_type_error_in_the_caller() -> None:
    with blocking.connect(Trips, NOBODY) as client, pytest.raises(TypeError, match=r"Trips\.get: .*argument"):
        client.get()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def test_an_error_shows_the_line_that_called_and_where_it_came_from(address: str) -> None:
    with blocking.connect(Trips, address) as client, pytest.raises(NoSuchTrip) as raised:
        client.get("none")
    names = [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert names[0] == "test_an_error_shows_the_line_that_called_and_where_it_came_from"
    assert "exchange_or_raise" in names  # the client's side of it, which ran in another thread


def test_an_error_is_held_by_nobody_but_its_caller() -> None:
    host = _Host()

    async def fail() -> None:
        raise NoSuchTrip(trip_id="none")

    async def succeed() -> None: ...

    def here() -> weakref.ref[BaseException]:
        try:
            host.run(fail, (), {})
        except NoSuchTrip as error:
            return weakref.ref(error)
        raise AssertionError

    gc.disable()
    try:
        kept = here()
        host.run(succeed, (), {})  # the loop has done with the call before
        assert kept() is None
    finally:
        gc.enable()
        host.stop()


# policies


def test_the_deadline_of_the_calling_thread_holds(address: str) -> None:
    with blocking.connect(Trips, address, policy=Policy(timeout=PATIENCE)) as client:
        with deadline(5.0):
            assert client.remaining() <= 5.0
        with deadline(0.02), pytest.raises(DeadlineExceeded):
            client.hang()


def test_the_deadline_of_a_message_holds_in_the_threads_of_its_handler(address: str, server: Server) -> None:
    with blocking.connect(Trips, address, policy=Policy(timeout=60.0)) as client:
        server.client = client
        assert client.remaining_in_a_thread.using(timeout=5.0)() <= 5.0
        assert client.remaining_in_a_thread() > 5.0


def test_a_dead_service_holds_no_more_threads_than_its_bulkhead_lets_in(address: str, server: Server) -> None:
    policy: Policies = [Policy(timeout=PATIENCE), on(Trips.hang, timeout=0.2, bulkhead=Bulkhead(2), breaker=False)]
    with blocking.connect(Trips, address, policy=policy) as client, ThreadPoolExecutor(8) as pool:
        failures = [call.exception(PATIENCE) for call in [pool.submit(client.hang) for _ in range(8)]]
        kinds = [type(failure) for failure in failures]
        assert kinds.count(LimitReached) == 6
        assert kinds.count(DeadlineExceeded) == 2
        assert client.get("t-1") == Trip("t-1")


def test_the_circuit_is_one_for_all_threads() -> None:
    policy = Policy(timeout=PATIENCE, breaker=Breaker(min_calls=4, error_rate=0.5))
    with blocking.connect(Trips, NOBODY, policy=policy) as client, ThreadPoolExecutor(4) as pool:
        kinds = [type(pool.submit(client.get, "t-1").exception(PATIENCE)) for _ in range(6)]
    assert kinds == [Unavailable] * 4 + [CircuitOpen] * 2


def test_a_listener_is_told_in_the_background_thread_what_happens() -> None:
    told: list[tuple[str, str]] = []
    policy = Policy(timeout=PATIENCE, breaker=Breaker(min_calls=1))
    with (
        blocking.connect(
            Trips,
            NOBODY,
            policy=policy,
            listener=lambda what: told.append((what.kind, threading.current_thread().name)),
        ) as client,
        pytest.raises(Unavailable),
    ):
        client.get("t-1")
    assert ("circuit-opened", "quintet.blocking") in told


def test_a_fallback_answers_and_whatever_it_raises_is_its_callers(address: str) -> None:
    async def leave(trip_id: str) -> Trip:
        if trip_id == "leave":
            raise SystemExit(3)
        return Trip(trip_id, "guessed")

    policy = [on(Trips.get, fallback=[leave])]
    with blocking.connect(Trips, NOBODY, policy=policy) as client:
        assert client.get("t-1") == Trip("t-1", "guessed")
        with pytest.raises(SystemExit):
            client.get("leave")
        assert client.get("t-2") == Trip("t-2", "guessed")  # the loop goes on


# one loop, and its end


def test_one_thread_serves_all_clients_and_ends_with_the_last(address: str) -> None:
    first, second = blocking.connect(Trips, address), blocking.connect(Trips, address)
    with first as one:
        with second as two, ThreadPoolExecutor(8) as pool:
            assert list(pool.map(one.get, "abcdefgh")) == [Trip(name) for name in "abcdefgh"]
            assert list(pool.map(two.get, "abcdefgh")) == [Trip(name) for name in "abcdefgh"]
            assert len(threads()) == 1
        assert one.get("t-1") == Trip("t-1")
    assert threads() == []
    with blocking.connect(Trips, address) as again:
        assert again.get("t-1") == Trip("t-1")


def test_a_connect_that_fails_leaves_no_thread() -> None:
    with pytest.raises(QuintetError, match="unknown scheme"), blocking.connect(Trips, "gopher://host"):
        pass
    assert threads() == []


def test_ctrl_c_cancels_the_call_and_the_client_goes_on(address: str, server: Server) -> None:
    main = threading.get_ident()

    def interrupt() -> None:
        assert server.begun.acquire(timeout=PATIENCE)
        signal.pthread_kill(main, signal.SIGINT)

    with blocking.connect(Trips, address, policy=Policy(timeout=PATIENCE, bulkhead=Bulkhead(1))) as client:
        with in_thread(interrupt), pytest.raises(KeyboardInterrupt):
            client.hang()
        assert client.get("t-1") == Trip("t-1")  # the only place is free again


def test_a_blocking_call_in_a_running_loop_is_refused(address: str) -> None:
    with blocking.connect(Trips, address) as client:

        async def main() -> None:
            with pytest.raises(QuintetError, match=r"use `await` here, with `async with quintet\.connect"):
                client.get("t-1")
            with pytest.raises(QuintetError, match="use `await` here"), blocking.connect(Trips, address):
                pass
            assert await asyncio.to_thread(client.get, "t-1") == Trip("t-1")

        asyncio.run(main())


def test_a_closed_client_says_so(address: str) -> None:
    connect = blocking.connect(Trips, address)
    with connect as client:
        assert repr(client) == "<Trips blocking client, connected>"
        assert repr(client.get) == "<blocking call trips.get>"
        pending = client.receipt("t-1")
    assert repr(client) == "<Trips blocking client, closed>"
    for call in (
        lambda: client.get("t-1"),
        pending.result,
        pending.cancel,
        lambda: client.receipt.pending("x").wait(1),
    ):
        with pytest.raises(QuintetError, match="is closed: its `with` block has ended"):
            call()
    with pytest.raises(QuintetError, match="is used up"), connect:
        pass


def test_what_is_no_call_of_a_client_says_why() -> None:
    with blocking.connect(Trips, NOBODY) as client:
        with pytest.raises(AttributeError, match=r"Trips\.created is sent by its own service"):
            client.created(Trip("t-1"))  # type: ignore[operator]  # pyright: ignore[reportCallIssue]
        with pytest.raises(AttributeError, match="delete"):
            client.delete("t-1")  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError, match=r"Trips\.get is an operation: it is called on a connected client"):
        Trips.get("t-1")


def test_a_call_on_its_way_ends_when_its_client_is_closed(address: str, server: Server) -> None:
    connect = blocking.connect(Trips, address, policy=Policy(timeout=PATIENCE))
    with blocking.connect(Trips, address) as other:
        with connect as client, in_thread(client.hang) as call:
            assert server.begun.acquire(timeout=PATIENCE)
            connect.__exit__(None, None, None)
            assert isinstance(call.exception(PATIENCE), CallError)
        assert other.get("t-1") == Trip("t-1")


def test_calls_in_a_loop_that_ends_are_given_up_and_none_hangs() -> None:
    host, begun = _Host(), threading.Event()

    async def hang() -> None:
        begun.set()
        await asyncio.Event().wait()

    with in_thread(lambda: host.run(hang, (), {})) as call:
        assert begun.wait(PATIENCE)
        host.stop()
        assert isinstance(call.exception(PATIENCE), ConnectionLost)
    with pytest.raises(QuintetError, match="is closed"):
        host.run(hang, (), {})
    host.gone = ""  # as for a caller who looked just before
    with pytest.raises(QuintetError, match="is closed"):
        host.run(hang, (), {})


def test_a_call_that_comes_too_late_to_be_begun_is_given_up() -> None:
    host = _Host()

    async def late() -> None:
        raise AssertionError

    work = _Work(host, late, (), {})
    host.works.add(work)
    host.stop()
    assert work.lock.acquire(timeout=PATIENCE)
    assert isinstance(work.error, ConnectionLost)


def test_a_host_whose_loop_broke_is_replaced(address: str) -> None:
    with blocking.connect(Trips, address) as client:
        blocking._host.stop()  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]
        with pytest.raises(QuintetError, match="is closed"):
            client.get("t-1")
        with blocking.connect(Trips, address) as another:
            assert another.get("t-1") == Trip("t-1")


def test_what_is_still_open_at_the_end_is_closed() -> None:
    class Open:
        closed = False

        async def __aexit__(self, *_: object) -> None:
            self.closed = True

    host, one = _Host(), Open()
    open_clients: set[Any] = host.clients
    open_clients.add(one)
    host.stop()
    assert one.closed


def script(code: str, *arguments: str) -> str:
    """What a process of its own prints, to either stream, before it ends."""
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(quintet.__file__).parents[1]), str(Path(__file__).parent)]),
        },
        capture_output=True,
        text=True,
        timeout=PATIENCE * 2,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_process_ends_though_a_client_is_open_and_a_daemon_waits_for_it(address: str, server: Server) -> None:
    code = """
import atexit, threading
names = lambda: [thread.name for thread in threading.enumerate() if thread.name == "quintet.blocking"]
atexit.register(lambda: print(names()))  # what is registered first runs last

from test_blocking import *
client = blocking.connect(Trips, sys.argv[1], policy=Policy(timeout=3600.0)).__enter__()
def wait():
    try:
        client.hang()
    except CallError:
        pass
threading.Thread(target=wait, daemon=True).start()
print(client.get("t-1"), names())
"""
    assert script(code, address) == "Trip(id='t-1', state='new') ['quintet.blocking']\n[]\n"


def test_a_client_is_refused_in_a_fork_where_another_can_be_connected(address: str) -> None:
    code = """
import os
from test_blocking import *
with blocking.connect(Trips, sys.argv[1]) as client:
    client.get("t-1")
    with blocking._lock:  # as another thread may hold it at that moment
        if os.fork() == 0:
            try:
                client.get("t-1")
            except QuintetError as error:
                print(error)
            with blocking.connect(Trips, sys.argv[1]) as own:
                print(own.get("child"))
            sys.exit()
    os.wait()
    print(client.get("parent"))
"""
    assert script(code, address).splitlines() == [
        "this blocking client was connected before the process was forked: connect in each process, after the fork",
        "Trip(id='child', state='new')",
        "Trip(id='parent', state='new')",
    ]
