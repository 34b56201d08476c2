"""The feed of a process, what the collector makes of feeds, the orders, and who is refused."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest

from quintet import (
    Breaker,
    CircuitOpen,
    ConfigurationError,
    Contract,
    Fault,
    Policy,
    Redelivery,
    RemoteError,
    Service,
    TransportError,
    connect,
    notification,
    request,
    serve,
)
from quintet.dashboard.collector import Collector, Source, checked
from quintet.dashboard.site import serve_dashboard
from quintet.feed import SENDERS, BulkheadState, Feed, Newest, OperationState, Order, Snapshot
from quintet.message import Channel, Message
from quintet.record import Exchange
from quintet.testing import FakeClock
from quintet.transport import Done


class NoSuchPassenger(Fault, status=404):
    passenger_id: str


class Passengers(Contract, name="passengers"):
    @request(faults=[NoSuchPassenger])
    async def get(self, passenger_id: str) -> str: ...

    @notification
    async def seen(self, passenger_id: str) -> None: ...


class Stage:
    """A service that fails when it is told to, observed over HTTP."""

    def __init__(self) -> None:
        self.broken = False
        self.seen: list[str] = []
        self.service = Service(Passengers, redelivery=Redelivery(attempts=1))
        self.service.handles(Passengers.get)(self.get)
        self.service.handles(Passengers.seen)(self.note)
        self.observe = f"http://127.0.0.1:{free_port()}"
        self.bus = f"memory://{id(self)}"

    async def get(self, passenger_id: str) -> str:
        if passenger_id == "nobody":
            raise NoSuchPassenger(passenger_id=passenger_id)
        if self.broken:
            raise ConnectionError("the database is gone")
        return passenger_id

    async def note(self, passenger_id: str) -> None:
        if self.broken:
            raise ConnectionError("the database is gone")
        self.seen.append(passenger_id)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[Any]:
        policy = Policy(breaker=Breaker(min_calls=5))
        async with (
            serve(self.service, at=self.bus, observe=self.observe),
            connect(Passengers, self.bus, name="trips", policy=policy) as passengers,
        ):
            yield passengers


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as held:
        return int(held.getsockname()[1])


async def ask(address: str, method: str, path: str, headers: dict[str, str] | None = None, body: str = "") -> Any:
    """Status, headers and body, over a connection of its own."""
    parts = urlsplit(address)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    given = {"Host": parts.netloc, "Content-Length": str(len(body)), "Connection": "close", **(headers or {})}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
    writer.write("\r\n".join([*lines, "", body]).encode())
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    found = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
    text = ""
    if "content-length" in found:
        text = (await reader.readexactly(int(found["content-length"]))).decode()
    writer.close()
    await writer.wait_closed()
    return int(head.split()[1]), found, text


async def until(holds: Callable[[], Any | Awaitable[Any]]) -> Any:
    async with asyncio.timeout(45):
        while True:
            found = holds()
            found = await found if asyncio.iscoroutine(found) else found
            if found:
                return found
            await asyncio.sleep(0.02)


def call_of(snapshot: Snapshot, operation: str = "passengers.get") -> OperationState:
    return next(call for call in snapshot.calls if call.owner == "trips" and call.operation == operation)


async def feed_of(stage: Stage) -> Snapshot:
    source: list[Snapshot] = []
    async with Collector([stage.observe]) as collector:
        await until(lambda: collector.sources[stage.observe].snapshot)
        source += [found for found in [collector.sources[stage.observe].snapshot] if found]
    return source[0]


# the feed


async def test_a_snapshot_tells_calls_handlers_circuit_limit_channels_and_exchanges() -> None:
    stage = Stage()
    async with stage.running() as passengers:
        assert await passengers.get("p-1") == "p-1"
        with pytest.raises(NoSuchPassenger):
            await passengers.get("nobody")
        snapshot = await feed_of(stage)
    call = call_of(snapshot)
    assert call.totals == {"success": 1, "answered": 1}
    assert sum(call.latencies.values()) == 2
    assert call.circuit
    assert (call.circuit.state, call.circuit.good, call.circuit.min_calls) == ("closed", 1, 5)
    assert call.bulkhead
    assert (call.bulkhead.busy, call.bulkhead.limit) == (0, 1000)
    handler = next(one for one in snapshot.handlers if one.operation == "passengers.get")
    assert (handler.owner, handler.totals) == ("passengers", {"success": 1, "answered": 1})
    assert {channel.channel for channel in snapshot.addresses[0].channels} >= {"passengers.v1.seen"}
    assert [(one.sender, one.receiver, one.outcome) for one in snapshot.exchanges] == [
        ("trips", "passengers", "done"),
        ("trips", "passengers", "NoSuchPassenger"),
    ]
    assert [(pair.sender, pair.done, pair.failed) for pair in snapshot.pairs] == [("trips", 2, 0)], (
        "a fault is an answer"
    )


async def test_a_circuit_is_opened_closed_and_left_alone_by_hand() -> None:
    stage = Stage()
    async with stage.running() as passengers, Collector([stage.observe]) as collector:
        source = collector.sources[stage.observe]
        await until(lambda: source.snapshot)

        async def order(do: Any) -> None:
            assert (
                "passengers.get" in (await collector.order(Order(do=do, owner="trips", operation="passengers.get")))[0]
            )

        await order("open")
        with pytest.raises(CircuitOpen, match="forced open"):
            await passengers.get("p-1")
        await order("close")
        stage.broken = True
        for _ in range(8):
            with pytest.raises(RemoteError):
                await passengers.get("p-1")
        await order("auto")
        for _ in range(2):
            with pytest.raises((RemoteError, CircuitOpen)):
                await passengers.get("p-1")
        with pytest.raises(CircuitOpen):
            await passengers.get("p-1")
        circuit = await until(
            lambda: (found := source.snapshot and call_of(source.snapshot).circuit) and found.state == "open" and found
        )
        assert circuit.forced == ""


async def test_a_dead_letter_is_shown_without_its_content_and_replayed() -> None:
    stage = Stage()
    stage.broken = True
    async with stage.running() as passengers, Collector([stage.observe]) as collector:
        await passengers.seen("secret-p-1")
        (letter,) = await until(lambda: collector.view()["letters"])
        assert (letter["operation"], letter["sender"], letter["attempts"]) == ("passengers.seen", "trips", 1)
        assert "secret-p-1" not in msgspec.json.encode(collector.view()).decode()
        stage.broken = False
        said = await collector.order(Order(do="replay", address=letter["address"], ids=[letter["id"]]))
        assert said == [f"1 of 1 dead letters replayed at {stage.bus}"]
        await until(lambda: stage.seen == ["secret-p-1"])
        await until(lambda: not collector.view()["letters"])


async def test_an_order_that_nobody_can_follow_says_why() -> None:
    stage = Stage()
    async with stage.running(), Collector([stage.observe]) as collector:
        await until(lambda: collector.sources[stage.observe].snapshot)
        with pytest.raises(ConfigurationError, match="no process that is there can do that"):
            await collector.order(Order(do="open", owner="trips", operation="passengers.nothing"))
        status, _, text = await ask(
            stage.observe, "POST", "/quintet.control", {"X-Quintet-Control": "yes"}, '{"do": "open", "owner": "nobody"}'
        )
        assert (status, text) == (400, "nobody has no breaker for ?")
        status, _, text = await ask(
            stage.observe, "POST", "/quintet.control", {"X-Quintet-Control": "yes"}, '{"do": "explode"}'
        )
        assert status == 400


async def test_a_service_drains_while_a_dashboard_looks_on() -> None:
    stage = Stage()
    async with Collector([stage.observe]) as collector:
        async with asyncio.timeout(45):
            async with stage.running():
                await until(lambda: collector.sources[stage.observe].up)
        await until(lambda: not collector.sources[stage.observe].up)
        async with stage.running():
            await until(lambda: collector.sources[stage.observe].up)


async def test_the_names_of_senders_fill_no_memory() -> None:
    newest = Newest()
    for number in range(SENDERS * 2):
        newest.write(exchange(sender=f"stranger-{number}"))
    newest.write(exchange(sender="stranger-0"))
    assert len(newest.pairs) == SENDERS
    assert newest.pairs["stranger-0", "trips", "trips.get", "request/response", False] == 2
    assert len(newest.exchanges) < SENDERS


def exchange(**given: Any) -> Exchange:
    made: dict[str, Any] = {
        "started": 1.0,
        "ended": 1.1,
        "sender": "phone",
        "receiver": "trips",
        "operation": "trips.get",
        "style": "request/response",
        "id": "m-1",
        "attempt": 1,
        "outcome": "done",
    }
    return Exchange(**{**made, **given})


# who is refused


@pytest.mark.parametrize(
    ("host", "token", "headers", "shown"),
    [
        ("127.0.0.1", "", {"host": "127.0.0.1:9001"}, True),
        ("localhost", "", {"host": "localhost"}, True),
        ("::1", "", {"host": "[::1]:9001"}, True),
        ("127.0.0.1", "", {"host": "evil.example"}, False),
        ("127.0.0.1", "", {"host": "127.0.0.1.evil.example"}, False),
        ("127.0.0.1", "", {"host": "[::1"}, False),
        ("127.0.0.1", "", {}, False),
        ("0.0.0.0", "", {"host": "127.0.0.1"}, False),
        ("10.0.0.7", "", {"host": "10.0.0.7", "x-quintet-control": "yes"}, False),
        ("10.0.0.7", "s3cret", {"host": "10.0.0.7", "x-quintet-control": "s3cret"}, True),
        ("10.0.0.7", "s3cret", {"host": "10.0.0.7", "x-quintet-control": "s3cre"}, False),
        ("127.0.0.1", "s3cret", {"host": "127.0.0.1"}, False),
        ("127.0.0.1", "s3cret", {"host": "127.0.0.1", "x-quintet-control": "ü"}, False),
    ],
)
def test_a_feed_is_shown_on_loopback_under_its_own_name_or_for_the_token(
    host: str, token: str, headers: dict[str, str], shown: bool
) -> None:
    assert (Feed(["trips"], list, host=host, token=token).refusal(headers) == "") is shown


@pytest.mark.parametrize("body", [b"", b"\xff", b"[]", b'{"do": "open", "more": 1}', b'{"do": "replay", "ids": 3}'])
async def test_an_order_that_is_none_is_refused(body: bytes) -> None:
    feed = Feed(["trips"], list)
    headers = {"host": "127.0.0.1", "x-quintet-control": "yes"}
    verdict = await feed.receive(Message(channel=Channel("x"), body=body, headers=headers))
    assert isinstance(verdict, Done)
    assert verdict.reply
    assert verdict.reply.headers[":status"] == "400"


async def test_a_foreign_page_can_give_no_order_to_a_service() -> None:
    stage = Stage()
    body = '{"do": "open", "owner": "trips", "operation": "passengers.get"}'
    async with stage.running() as passengers:
        for headers in (
            {},
            {"Content-Type": "text/plain"},  # what a form may send without asking first
            {"X-Quintet-Control": "yes", "Host": "evil.example"},  # a name that was made to point here
        ):
            status, _, _ = await ask(stage.observe, "POST", "/quintet.control", headers, body)
            assert status == 403
        asked = {"Origin": "http://evil.example", "Access-Control-Request-Headers": "x-quintet-control"}
        _, found, _ = await ask(stage.observe, "OPTIONS", "/quintet.control", asked)
        assert not [name for name in found if name.startswith("access-control")]
        assert await passengers.get("p-1") == "p-1"


async def test_the_feed_and_its_orders_want_the_token_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUINTET_TOKEN", "s3cret")
    stage = Stage()
    async with stage.running():
        assert (await ask(stage.observe, "GET", "/quintet.stream"))[0] == 403
        assert (await ask(stage.observe, "POST", "/quintet.control", {"X-Quintet-Control": "yes"}))[0] == 403
        async with Collector([stage.observe], token="s3cret") as collector:
            await until(lambda: collector.sources[stage.observe].up)
        async with Collector([stage.observe], token="wrong") as collector:
            await until(lambda: "403" in collector.sources[stage.observe].trouble)


async def test_what_a_service_is_served_at_shows_no_feed_and_takes_no_orders() -> None:
    stage = Stage()
    port = free_port()
    async with serve(stage.service, at=f"http://127.0.0.1:{port}", observe=stage.observe):
        assert (await ask(f"http://127.0.0.1:{port}", "GET", "/quintet.stream"))[0] == 404
        assert (await ask(f"http://127.0.0.1:{port}", "POST", "/quintet.control"))[0] == 404


# the page's own server


async def test_the_dashboard_takes_orders_from_its_own_page_alone() -> None:
    async with Collector() as collector, serve_dashboard(collector) as page:
        order = '{"do": "open", "owner": "trips", "operation": "trips.get"}'
        mine = {"X-Quintet-Control": "page"}
        assert (await ask(page, "POST", "/control", {}, order))[0] == 403
        assert (await ask(page, "POST", "/control", {**mine, "Sec-Fetch-Site": "cross-site"}, order))[0] == 403
        assert (await ask(page, "POST", "/control", {**mine, "Host": "evil.example"}, order))[0] == 403
        assert (await ask(page, "GET", "/stream", {"Host": "evil.example"}))[0] == 403
        assert (await ask(page, "POST", "/control", mine, "x" * 70_000))[0] == 400
        status, _, text = await ask(page, "POST", "/control", mine, order)
        assert (status, text) == (400, "no process that is there can do that")


async def test_the_page_needs_nothing_from_elsewhere_and_may_load_nothing() -> None:
    html = files("quintet.dashboard").joinpath("page.html").read_text()
    assert set(re.findall(r"https?://[^\s\"')]+", html)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=\"(?!data:)", html)
    assert "innerHTML" not in html
    async with Collector() as collector, serve_dashboard(collector) as page:
        status, headers, text = await ask(page, "GET", "/")
    assert (status, text) == (200, html)
    assert "default-src 'none'" in headers["content-security-policy"]


async def test_the_dashboard_ends_at_once_while_a_page_is_open() -> None:
    async with Collector() as collector:
        async with asyncio.timeout(45):
            async with serve_dashboard(collector) as page:
                parts = urlsplit(page)
                reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
                writer.write(f"GET /stream HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
                assert b"data: {" in await reader.readuntil(b"\n\n")
            writer.close()
            await writer.wait_closed()


async def test_a_port_in_use_is_told_in_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        async with Collector() as collector:
            with pytest.raises(
                TransportError, match=f"the dashboard cannot listen at 127.0.0.1:{port}: Address already"
            ):
                async with serve_dashboard(collector, port):
                    pass


# what the collector makes of snapshots


def state(owner: str = "trips", good: int = 0, bad: int = 0, **more: Any) -> OperationState:
    made: dict[str, Any] = {
        "owner": owner,
        "service": "passengers",
        "operation": "passengers.get",
        "style": "request/response",
        "companion": False,
        "totals": {"success": good, "failure": bad},
        "latencies": {0: good + bad},
    }
    return OperationState(**{**made, **more})


def shot(process: str, *calls: OperationState, **more: Any) -> Snapshot:
    made: dict[str, Any] = {"services": ["trips"], "at": 0.0, "handlers": [], "addresses": [], "pairs": []}
    return Snapshot(process=process, calls=list(calls), exchanges=[], **{**made, **more})


class Watched:
    """A collector on a fake clock, which is handed its snapshots."""

    def __init__(self, *addresses: str) -> None:
        self.clock = FakeClock()
        self.collector = Collector(clock=self.clock)
        self.collector.sources = {address: Source(address) for address in addresses}

    async def take(self, **snapshots: Snapshot) -> None:
        for address, snapshot in snapshots.items():
            self.collector.take(self.collector.sources[address], snapshot)
        await self.clock.advance(1)

    @property
    def call(self) -> dict[str, Any]:
        (call,) = self.collector.view()["calls"]
        return call  # type: ignore[no-any-return]


async def test_rates_are_of_what_was_counted_since_and_instances_are_added_up() -> None:
    watched = Watched("one", "two")
    for second in range(15):
        await watched.take(one=shot("a", state(good=1000 + 30 * second)), two=shot("b", state(good=10 * second)))
    assert watched.call["rate"] == pytest.approx(40)
    assert watched.call["chart"][-5:] == [[40, 0, 0]] * 5
    assert watched.call["chart"][0] == [0, 0, 0]
    assert max(good for good, _, _ in watched.call["chart"]) == 40, "what was counted before anybody looked is no peak"


async def test_a_process_that_was_restarted_counts_from_nothing_again() -> None:
    watched = Watched("one")
    for second in range(12):
        await watched.take(one=shot("a", state(good=100 * second)))
    await watched.take(one=shot("restarted", state(good=3)))
    await watched.take(one=shot("restarted", state(good=5)))
    assert min(good for good, _, _ in watched.call["chart"]) == 0
    assert watched.call["chart"][-1] == [2, 0, 0]


async def test_one_process_at_two_addresses_is_counted_once() -> None:
    watched = Watched("one", "two")
    limit = BulkheadState(busy=1, limit=10, waiting=0, queue=0)
    for second in range(12):
        same = shot("a", state(good=10 * second, bulkhead=limit))
        await watched.take(one=same, two=same)
    assert watched.call["rate"] == pytest.approx(10)
    assert watched.call["bulkhead"]["limit"] == 10


async def test_the_error_rate_and_percentiles_are_of_all_instances_together() -> None:
    watched = Watched("one", "two")
    for second in range(12):
        await watched.take(
            one=shot("a", state(good=98 * second, latencies={0: 98 * second})),
            two=shot("b", state(bad=2 * second, latencies={90: 2 * second})),
        )
    assert watched.call["bad"] == pytest.approx(0.02)
    assert watched.call["ms"] == [1.0, 1.0, 10.0]


async def test_a_process_that_falls_silent_is_no_longer_shown() -> None:
    watched = Watched("one")
    await watched.take(one=shot("a", state(good=1)))
    assert watched.collector.view()["services"] == ["trips"]
    await watched.clock.advance(11)
    view = watched.collector.view()
    assert view["services"] == []
    assert view["sources"] == [{"address": "one", "up": False, "trouble": "silent for 12 s"}]


async def test_who_calls_whom_leads_to_the_service_that_handles_it() -> None:
    watched = Watched("one", "two")
    handled = state(owner="registry", good=1)
    heard = state(owner="billing", service="trips", operation="trips.created", style="publish/subscribe", good=1)
    await watched.take(one=shot("a", state(good=1)), two=shot("b", handlers=[handled, heard], services=["registry"]))
    edges = {(edge["from"], edge["to"]) for edge in watched.collector.view()["edges"]}
    assert edges == {("trips", "registry"), ("trips", "billing")}


@pytest.mark.parametrize("address", ["9001", "ftp://127.0.0.1", "http://", "http://127.0.0.1:x", "sqlite:///a.db"])
def test_an_address_that_is_none_is_refused_in_one_sentence(address: str) -> None:
    with pytest.raises(ConfigurationError, match="is no address of a feed: write http://HOST:PORT"):
        checked(address)


# the command

SERVICES = """
from quintet import Contract, Service, request

class Echo(Contract, name="echo"):
    @request
    async def say(self, text: str) -> str: ...

service = Service(Echo)

@service.handles(Echo.say)
async def say(text: str) -> str:
    return text
"""
DEPLOYMENT = """
[service.echo]
app = "echo:service"
at = "sqlite:///echo.db"
instances = 2
"""


async def test_up_shows_each_instance_of_its_services_on_a_dashboard(tmp_path: Path) -> None:
    (tmp_path / "echo.py").write_text(SERVICES)
    (tmp_path / "quintet.toml").write_text(DEPLOYMENT)
    up = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "quintet", "up", "--dashboard", "--port", "0"),
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        assert up.stdout
        said = ""
        while "the dashboard is at" not in said:
            said = (await up.stdout.readline()).decode()
            assert said, "it ended"
        page = said.split()[-1]
        parts = urlsplit(page)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(f"GET /stream HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
        view: dict[str, Any] = {"sources": [{"up": False}]}
        async with asyncio.timeout(30):
            while not all(source["up"] for source in view["sources"]):
                event = (await reader.readuntil(b"\n\n")).partition(b"data: ")[2]
                view = msgspec.json.decode(event) if event else view
        assert len(view["sources"]) == 2
        assert view["services"] == ["echo"]
        assert "echo.v1.say" in {channel["channel"] for channel in view["channels"]}
        for source in view["sources"]:  # who has not the token of this deployment sees nothing
            assert (await ask(source["address"], "GET", "/quintet.stream"))[0] == 403
        writer.close()
        await writer.wait_closed()
    finally:
        up.send_signal(signal.SIGINT)
        await up.communicate()
    assert up.returncode == 0
