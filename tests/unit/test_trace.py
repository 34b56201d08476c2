"""A trace goes from a client through a service to an event's handlers, over every transport."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from callee import Callee, run
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from quintet import (
    Breaker,
    Contract,
    Fault,
    Policy,
    RemoteError,
    Retry,
    Service,
    Unavailable,
    async_request,
    connect,
    current,
    event,
    notification,
    request,
    serve,
)
from quintet.filter import client_chain
from quintet.filters import trace as trace_filter
from quintet.message import Message
from quintet.testing import FakeClock


class NoSuchTrip(Fault, status=404):
    trip_id: str


class Trips(Contract, name="traced"):
    @request(faults=[NoSuchTrip])
    async def create(self, trip_id: str) -> str: ...

    @notification
    async def cancel(self, trip_id: str) -> None: ...

    @event
    async def created(self, trip_id: str) -> None: ...


class Billing(Contract, name="traced-billing"):
    @async_request
    async def receipt(self, trip_id: str) -> str: ...


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield exporter
    provider.shutdown()


def spans(exporter: InMemorySpanExporter) -> dict[tuple[str, SpanKind], ReadableSpan]:
    return {(span.name, span.kind): span for span in exporter.get_finished_spans()}


def parent(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


@pytest.mark.parametrize("transport", ["memory", "sqlite", "http"])
def test_a_trace_goes_from_a_client_through_a_service_to_an_event_s_handlers(
    exporter: InMemorySpanExporter, transport: str, tmp_path: Path
) -> None:
    service, reader, handled = Service(Trips), Service(name="reader"), asyncio.Event()

    @service.handles(Trips.create)
    async def create(trip_id: str) -> str:
        await service.publish(Trips.created, trip_id)
        return trip_id

    @service.handles(Trips.cancel)
    async def cancel(trip_id: str) -> None: ...

    @reader.handles(Trips.created)
    async def created(trip_id: str) -> None:
        assert current().headers["traceparent"].startswith("00-")
        handled.set()

    queue = f"sqlite:///{tmp_path}/trips.db"
    at = {"memory": ["memory://traced"], "sqlite": [queue], "http": ["http://127.0.0.1:0", queue]}[transport]

    async def main() -> None:
        async with serve(service, reader, at=at) as addresses, connect(Trips, addresses) as trips:
            await trips.create("t-1")
            await asyncio.wait_for(handled.wait(), 5)

    run(main)
    found = spans(exporter)
    call, work = found["traced/create", SpanKind.CLIENT], found["traced/create", SpanKind.SERVER]
    send = found["send traced.created", SpanKind.PRODUCER]
    process = found["process traced.created", SpanKind.CONSUMER]
    assert parent(call) is None
    assert [parent(work), parent(send), parent(process)] == [
        span.context.span_id for span in (call, work, send) if span.context
    ]
    assert len({span.context.trace_id for span in found.values() if span.context}) == 1
    assert len(found) == 4


def test_a_notification_and_an_async_request_are_sent_and_processed(
    exporter: InMemorySpanExporter, tmp_path: Path
) -> None:
    trips_service, billing_service = Service(Trips), Service(Billing, answers=f"sqlite:///{tmp_path}/answers.db")
    handled = asyncio.Event()

    @trips_service.handles(Trips.create)
    async def create(trip_id: str) -> str:
        return trip_id

    @trips_service.handles(Trips.cancel)
    async def cancel(trip_id: str) -> None:
        handled.set()

    @billing_service.handles(Billing.receipt)
    async def receipt(trip_id: str) -> str:
        return f"receipt of {trip_id}"

    async def main() -> None:
        async with (
            serve(trips_service, billing_service, at="memory://handed-over"),
            connect(Trips, "memory://handed-over") as trips,
            connect(Billing, "memory://handed-over") as billing,
        ):
            await trips.cancel("t-1")
            await asyncio.wait_for(handled.wait(), 5)
            assert await (await billing.receipt("t-1")) == "receipt of t-1"

    run(main)
    assert set(spans(exporter)) == {
        ("send traced.cancel", SpanKind.PRODUCER),
        ("process traced.cancel", SpanKind.CONSUMER),
        ("send traced-billing.receipt", SpanKind.PRODUCER),
        ("process traced-billing.receipt", SpanKind.CONSUMER),
    }


def test_spans_have_the_attributes_of_the_conventions(exporter: InMemorySpanExporter) -> None:
    service, handled = Service(Trips), asyncio.Event()

    @service.handles(Trips.create)
    async def create(trip_id: str) -> str:
        if trip_id == "none":
            raise NoSuchTrip(trip_id=trip_id)
        raise ValueError("flat tyre")

    @service.handles(Trips.cancel)
    async def cancel(trip_id: str) -> None:
        handled.set()

    async def main() -> None:
        address = "memory://attributes"
        async with serve(service, at=address), connect(Trips, address) as trips:
            with pytest.raises(NoSuchTrip):
                await trips.create("none")
            answered = spans(exporter)
            assert {span.status.status_code for span in answered.values()} == {StatusCode.UNSET}  # a fault is an answer
            assert dict(answered["traced/create", SpanKind.CLIENT].attributes or {}) == {
                "rpc.system.name": "quintet",
                "rpc.method": "traced/create",
                "server.address": address,
                "rpc.response.status_code": "NoSuchTrip",
            }
            exporter.clear()
            with pytest.raises(RemoteError):
                await trips.create("t-1")
            failed = spans(exporter)
            assert {span.status.status_code for span in failed.values()} == {StatusCode.ERROR}
            there, here = failed["traced/create", SpanKind.SERVER], failed["traced/create", SpanKind.CLIENT]
            assert (there.attributes or {})["error.type"] == "ValueError"
            assert [event.name for event in there.events] == ["exception"]
            assert (here.attributes or {})["error.type"] == "RemoteError"
            assert (here.attributes or {})["rpc.response.status_code"] == "remote"
            assert "flat tyre" not in str(here.status.description)  # inner detail does not travel
            exporter.clear()
            await trips.cancel("t-1")
            await asyncio.wait_for(handled.wait(), 5)
        sent = dict(spans(exporter)["send traced.cancel", SpanKind.PRODUCER].attributes or {})
        assert sent.pop("messaging.message.id")
        assert sent == {
            "messaging.system": "quintet",
            "messaging.operation.name": "send",
            "messaging.operation.type": "send",
            "messaging.destination.name": "traced.cancel",
            "server.address": address,
        }
        processed = dict(spans(exporter)["process traced.cancel", SpanKind.CONSUMER].attributes or {})
        assert processed["messaging.consumer.group.name"] == "traced"
        assert processed["messaging.operation.type"] == "process"

    run(main)


def test_what_the_filters_do_are_events_of_the_call_s_span(exporter: InMemorySpanExporter) -> None:
    async def main() -> None:
        clock = FakeClock()
        callee = Callee(Policy(retry=Retry(1), breaker=Breaker(min_calls=1)), clock)
        callee.outcomes = [Unavailable("nobody there")]
        call = asyncio.get_running_loop().create_task(callee.call())
        await clock.advance(1)
        await call
        (span,) = exporter.get_finished_spans()
        assert [event.name for event in span.events] == [
            "quintet.circuit-opened",
            "quintet.retried",
            "quintet.refused",
        ]
        assert (span.events[1].attributes or {})["quintet.reason"] == "nobody there"

    run(main)


def test_no_span_and_no_filter_where_no_tracer_is_configured() -> None:
    async def exchange(message: Message) -> Message:
        return message

    callee = Callee(Policy(), FakeClock())
    assert trace_filter.client(callee.guarded, exchange) is exchange
    assert trace_filter.server(callee.guarded, exchange) is exchange
    assert client_chain(callee.guarded, [exchange]).__qualname__.startswith("client.")


def test_opentelemetry_is_not_even_imported_where_nobody_asks_for_it() -> None:
    program = (
        "import sys; from quintet.filter import Guarded, client_chain; from quintet.policy import DEFAULT;"
        "from quintet.clock import SYSTEM; from quintet import Contract, request\n"
        "class Trips(Contract, name='trips'):\n"
        "    @request\n"
        "    async def get(self) -> None: ...\n"
        "client_chain(Guarded(Trips.get, DEFAULT, SYSTEM), [print])\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry', 'prometheus_client'))])"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_a_provider_that_does_nothing_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", trace.NoOpTracerProvider())
    assert trace_filter._tracer() is None
