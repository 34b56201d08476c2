"""What a service shows of itself: /metrics, /hystrix.stream, /health."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, ClientTimeout
from callee import Callee, Passengers, run
from prometheus_client import Counter
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from quintet import (
    Breaker,
    Bulkhead,
    ConfigurationError,
    Contract,
    Fault,
    Policy,
    RemoteError,
    Retry,
    Service,
    Unavailable,
    connect,
    event,
    notification,
    request,
    serve,
)
from quintet.filter import client_chain
from quintet.meter import BOUNDS, CLIENTS, SERVERS, meters
from quintet.metrics import BUCKETS, text
from quintet.observe import Observer
from quintet.testing import FakeClock
from quintet.transport import parse_address
from quintet.transports.memory import Carrier


class NoSuchTrip(Fault, status=404):
    trip_id: str


class Trips(Contract, name="shown"):
    @request(faults=[NoSuchTrip], http="GET /trips/{trip_id}")
    async def get(self, trip_id: str) -> str: ...

    @notification
    async def cancel(self, trip_id: str) -> None: ...

    @event
    async def created(self, trip_id: str) -> None: ...


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    for meter in (*meters(CLIENTS), *meters(SERVERS)):  # of other tests' clients that nobody has closed
        meter.watch.ended = True


def trips() -> Service:
    service = Service(Trips)

    @service.handles(Trips.get)
    async def get(trip_id: str) -> str:
        if trip_id == "broken":
            raise ValueError(trip_id)
        if trip_id == "none":
            raise NoSuchTrip(trip_id=trip_id)
        return trip_id

    @service.handles(Trips.cancel)
    async def cancel(trip_id: str) -> None: ...

    return service


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(page: str) -> Samples:
    found: Samples = {}
    for family in parse(page):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, f"{key} stands there twice"
            found[key] = sample.value
    return found


def of(found: Samples, name: str, **labels: str) -> float:
    (value,) = [
        value for (sample, given), value in found.items() if sample == name and set(labels.items()) <= set(given)
    ]
    return value


def scraped() -> Samples:
    return samples(text("", [])[0].decode())


@asynccontextmanager
async def browser() -> AsyncGenerator[ClientSession]:
    async with ClientSession(timeout=ClientTimeout(10)) as session:
        yield session


def test_a_service_s_http_address_shows_the_metrics_of_both_sides() -> None:
    async def main() -> None:
        async with (
            serve(trips(), at=["http://127.0.0.1:0", "memory://shown"]) as (at, _),
            connect(Trips, at, name="page") as client,
            browser() as session,
        ):
            for trip in ("t-1", "t-2", "broken", "none"):
                try:
                    await client.get(trip)
                except (RemoteError, NoSuchTrip):
                    continue
            async with session.get(f"{at}/metrics") as response:
                assert response.status == 200
                assert response.headers["content-type"].startswith("text/plain; version=")
                found = samples(await response.text())
        page, service = {"service_name": "page"}, {"service_name": "shown"}
        method = {"rpc_method": "shown/get", "rpc_system_name": "quintet"}
        assert of(found, "rpc_client_call_duration_seconds_count", **page, **method) == 4
        assert of(found, "rpc_server_call_duration_seconds_count", **service, **method) == 4
        assert of(found, "rpc_server_call_duration_seconds_bucket", **service, **method, le="+Inf") == 4
        assert 0 < of(found, "rpc_server_call_duration_seconds_sum", **service, **method) < 5
        get = {"operation": "shown.get"}
        for name, owner in (("quintet_client_attempts_total", page), ("quintet_server_deliveries_total", service)):
            counted = {outcome: of(found, name, **owner, **get, outcome=outcome) for outcome in OUTCOMES_SEEN}
            assert counted == OUTCOMES_SEEN
        assert of(found, "quintet_client_circuit_state", **page, circuit="shown.get", state="closed") == 1
        assert of(found, "quintet_client_requests", **page, remote_service="shown") == 0
        assert of(found, "quintet_client_requests_limit", **page, remote_service="shown") == 1000
        assert of(found, "process_resident_memory_bytes") > 0

    run(main)


OUTCOMES_SEEN = {"success": 2.0, "failure": 1.0, "answered": 1.0, "timeout": 0.0, "refused": 0.0}


def test_messages_have_metrics_of_their_own_and_their_channels_too(tmp_path: Path) -> None:
    handled = asyncio.Event()
    reader = Service(name="reader")

    @reader.handles(Trips.created)
    async def created(trip_id: str) -> None:
        handled.set()

    owner = trips()

    async def main() -> None:
        queue = f"sqlite:///{tmp_path}/trips.db"
        async with (
            serve(owner, reader, at=["http://127.0.0.1:0", queue], connect={Trips: queue}) as (at, _),
            connect(Trips, queue, name="page") as client,
            browser() as session,
        ):
            await client.cancel("t-1")
            await owner.publish(Trips.created, "t-1")
            await asyncio.wait_for(handled.wait(), 5)
            async with session.get(f"{at}/metrics") as response:
                found = samples(await response.text())
        sent = "messaging_client_operation_duration_seconds_count"
        processed = "messaging_process_duration_seconds_count"
        cancel = {"messaging_destination_name": "shown.cancel"}
        assert of(found, sent, service_name="page", messaging_system="quintet", **cancel) == 1
        assert of(found, sent, service_name="shown", messaging_destination_name="shown.created") == 1
        assert of(found, processed, service_name="reader", messaging_destination_name="shown.created") <= 1
        for state in ("waiting", "in_work", "dead"):
            of(found, "quintet_channel_messages", channel="shown.v1.created", group="reader", state=state)

    run(main)


def test_a_histogram_counts_what_took_at_most_so_long() -> None:
    async def main() -> None:
        clock = FakeClock()
        callee = Callee(Policy(timeout=60.0), clock)
        for seconds in (0.004, 0.005, 0.0051, 0.2, 20.0):
            call = callee.start()
            await clock.advance(seconds)
            callee.hanging.pop().set_result(None)
            await call
        found, method = scraped(), {"rpc_method": "passengers/get"}
        buckets = {
            bound: of(found, "rpc_client_call_duration_seconds_bucket", **method, le=str(bound)) for bound in BUCKETS
        }
        assert buckets == {bound: 2.0 if bound < 0.01 else 3.0 if bound < 0.25 else 4.0 for bound in BUCKETS}
        assert of(found, "rpc_client_call_duration_seconds_bucket", **method, le="+Inf") == 5
        assert of(found, "rpc_client_call_duration_seconds_sum", **method) == pytest.approx(20.2141)
        assert set(BUCKETS) <= set(BOUNDS)

    run(main)


def test_circuits_limits_retries_and_fallbacks_are_shown() -> None:
    async def main() -> None:
        clock = FakeClock()
        policy = Policy(breaker=Breaker(min_calls=2), bulkhead=Bulkhead(7), retry=Retry(1))
        callee = Callee(policy, clock)
        call = asyncio.get_running_loop().create_task(callee.fail(1))
        await clock.advance(1)
        await call
        found = scraped()
        states = {s: of(found, "quintet_client_circuit_state", circuit="passengers.get", state=s) for s in STATES}
        assert states == {"closed": 1, "open": 0, "half-open": 0}
        await callee.fail(1)
        found = scraped()
        assert of(found, "quintet_client_circuit_state", circuit="passengers.get", state="open") == 1
        assert of(found, "quintet_client_requests_limit", remote_service="passengers") == 7
        assert of(found, "quintet_client_extra_attempts_total", operation="passengers.get", why="retry") == 0
        assert of(found, "quintet_client_fallbacks_total", operation="passengers.get", outcome="success") == 0

    run(main)


STATES = ("closed", "open", "half-open")


def test_clients_of_one_operation_are_added_up() -> None:
    async def main() -> None:
        one, other = Callee(Policy(), FakeClock()), Callee(Policy(), FakeClock(), Passengers.get)
        await one.succeed(2)
        await other.succeed(3)
        found = scraped()
        assert of(found, "quintet_client_attempts_total", operation="passengers.get", outcome="success") == 5
        assert of(found, "rpc_client_call_duration_seconds_count", rpc_method="passengers/get") == 5

    run(main)


def test_a_chain_that_is_built_anew_goes_on_counting_and_counts_once() -> None:
    async def main() -> None:
        callee = Callee(Policy(), FakeClock())
        await callee.succeed(2)
        before = callee.send
        callee.send = client_chain(callee.guarded, [callee.exchange])
        await callee.succeed(3)
        assert of(scraped(), "quintet_client_attempts_total", operation="passengers.get", outcome="success") == 5
        assert before is not callee.send
        assert meters(CLIENTS).count(callee.guarded.meter) == 1

    run(main)


def test_a_client_or_service_that_is_closed_is_shown_no_longer() -> None:
    async def main() -> None:
        async with serve(trips(), at="memory://closed"), connect(Trips, "memory://closed") as client:
            await client.get("t-1")
            assert [m for m in meters(CLIENTS) if m.contract == "shown"]
            kept = client.get  # whoever still holds a call keeps it from being forgotten
        assert not [m for chains in (CLIENTS, SERVERS) for m in meters(chains) if m.contract == "shown"]
        assert repr(kept) == "<call shown.get>"

    run(main)


def test_the_application_s_own_metrics_stand_beside_ours_and_openmetrics_is_spoken() -> None:
    counter = Counter("rides_started", "Rides begun.")
    counter.inc(3)
    page, media_type = text("application/openmetrics-text; version=1.0.0", [])
    assert media_type.startswith("application/openmetrics-text")
    found = {family.name: family for family in parse_openmetrics(page.decode())}
    assert found["rides_started"].samples[0].value == 3
    assert found["rpc_client_call_duration_seconds"].type == "histogram"
    assert found["rpc_client_call_duration_seconds"].unit == "seconds"


def test_a_service_without_an_http_address_is_observed_at_one_of_its_own() -> None:
    observed = trips()

    async def main() -> None:
        observe = "http://127.0.0.1:0"
        async with serve(observed, at="memory://observed", observe=observe), browser() as session:
            assert observed.running is not None
            at = str((await observed.running.carriers.reach(observe)).address)
            for path in ("/metrics", "/health/live", "/health/ready"):
                async with session.get(f"{at}{path}") as response:
                    assert response.status == 200
            async with session.get(f"{at}/hystrix.stream") as response:
                assert response.headers["content-type"] == "text/event-stream;charset=UTF-8"
                assert b"ping: \n\n" in await response.content.readany()
            async with session.get(f"{at}/elsewhere") as response:
                assert response.status == 404
            reader, writer = await asyncio.open_connection("127.0.0.1", parse_address(at).port)
            for request_line in ("HEAD /hystrix.stream", "GET /health/live"):  # a head is all of the first answer
                writer.write(f"{request_line} HTTP/1.1\r\nHost: here\r\n\r\n".encode())
                assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            writer.close()

    run(main)


def test_the_stream_over_http_shows_the_calls_of_this_process_and_does_not_hold_up_the_drain() -> None:
    async def main() -> None:
        async with browser() as session:
            async with (
                serve(trips(), at=["http://127.0.0.1:0", "memory://shown"]) as (at, _),
                connect(Trips, at, name="page") as client,
            ):
                await client.get("t-1")
                response = await session.get(f"{at}/hystrix.stream")
                first = await response.content.readuntil(b"ping: \n\n")
                commands = [json.loads(line[6:]) for line in first.splitlines() if line.startswith(b"data: ")]
                (command,) = [command for command in commands if command["name"] == "shown.get"]
                assert (command["rollingCountSuccess"], command["group"]) == (1, "shown")
            rest = await response.content.read()  # ended, and not cut off
            assert rest.endswith(b"ping: \n\n") or not rest
            response.close()

    run(main)


def test_ready_says_that_it_drains_as_soon_as_it_does() -> None:
    async def main() -> None:
        observer = Observer(FakeClock(), list)
        observer.start()
        assert (await observer.pages["/health/ready"]({})).status == 200
        observer.stop()
        assert (await observer.pages["/health/ready"]({})).status == 503

    run(main)


def test_ready_says_which_broker_is_away() -> None:
    class Away(Carrier):
        connected = False

    async def main() -> None:
        there, away = Carrier(parse_address("memory://there")), Away(parse_address("memory://u:secret@away"))
        observer = Observer(FakeClock(), lambda: [there, away])
        shown = await observer.pages["/health/ready"]({})
        assert (shown.status, shown.body) == (503, b'{"status":"disconnected","away":["memory://u:***@away"]}')

    run(main)


@pytest.mark.parametrize("observe", ["memory://", "sqlite:///never.db"])
def test_an_address_that_cannot_show_pages_is_refused(observe: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)

    async def main() -> None:
        with pytest.raises(ConfigurationError, match="cannot show pages"):
            async with serve(trips(), at="memory://refused", observe=observe):
                raise AssertionError("it was served")

    run(main)


def test_a_channel_that_cannot_be_looked_at_leaves_the_rest_of_the_page() -> None:
    class Broken(Carrier):
        async def channels(self) -> Any:
            raise Unavailable("no broker there")

    async def main() -> None:
        broken = Broken(parse_address("memory://broken"))
        page = await Observer(FakeClock(), lambda: [broken]).pages["/metrics"]({})
        assert isinstance(page.body, bytes)
        assert b"process_resident_memory_bytes" in page.body

    run(main)
