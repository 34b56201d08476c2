"""The metrics of this process in the words of Prometheus, taken from the filters' own counters when it asks.

Names and units are OpenTelemetry's where it has some (rpc.client.call.duration and the like), else begin with quintet.
What the application registers with prometheus-client itself, and what that tells of the process, stands beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from quintet.contract import Style
from quintet.meter import BOUNDS, CLIENTS, SERVERS, Latencies, Meter, ShownCircuit, meters
from quintet.outcome import OUTCOMES
from quintet.transport import ChannelState

if TYPE_CHECKING:
    from prometheus_client.core import Metric

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""Seconds: the boundaries that OpenTelemetry advises for durations; each is one of meter.BOUNDS."""
STATES = ("closed", "open", "half-open")

_Key = tuple[str, ...]


def text(accept: str, channels: Sequence[ChannelState]) -> tuple[bytes, str]:
    """The page and its media type, in the form that the scraper accepts."""
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.exposition import choose_encoder

    class Everything(CollectorRegistry):
        def collect(self) -> Iterator[Metric]:
            yield from REGISTRY.collect()
            yield from collect(channels)

    encode, media_type = choose_encoder(accept)
    return encode(Everything()), media_type


def collect(channels: Sequence[ChannelState]) -> Iterator[Metric]:
    """Every metric of ours. Meters of one name are added up: a process may have several clients of one service."""
    clients, servers = meters(CLIENTS), meters(SERVERS)
    yield from _durations(clients, servers)
    yield from _outcomes(clients, servers)
    yield from _circuits(clients)
    yield from _limits(clients, "client", "outstanding to the service")
    yield from _limits(servers, "server", "in work")
    yield from _repeats(clients)
    yield from _channels(channels)


def _durations(clients: Iterable[Meter], servers: Iterable[Meter]) -> Iterator[Metric]:
    from prometheus_client.core import HistogramMetricFamily

    called = [(meter, circuit.latencies) for meter, circuit in _circuits_of(clients).items()]
    handled = [(meter, meter.latencies) for meter in servers]
    for name, rpc, found, said in (
        ("rpc_client_call_duration", True, called, "Attempts to call an operation."),
        ("rpc_server_call_duration", True, handled, "Requests handled."),
        ("messaging_client_operation_duration", False, called, "Attempts to send a message."),
        ("messaging_process_duration", False, handled, "Messages handled."),
    ):
        labels = ("rpc_system_name", "rpc_method") if rpc else ("messaging_system", "messaging_destination_name")
        family = HistogramMetricFamily(name, said, labels=("service_name", *labels), unit="seconds")
        sums: dict[_Key, Latencies] = {}
        for meter, latencies in found:
            if (meter.operation.style is Style.REQUEST) is rpc and not meter.operation.parent:
                key: _Key = (meter.owner, "quintet", _method(meter) if rpc else meter.operation.full_name)
                _add(sums.setdefault(key, Latencies()), latencies.fold())
        for key, latencies in sums.items():
            cumulative = list(accumulate(latencies.counts))
            buckets = [(str(bound), cumulative[BOUNDS.index(bound)]) for bound in BUCKETS]
            family.add_metric(key, [*buckets, ("+Inf", cumulative[-1])], latencies.seconds)
        yield family


def _outcomes(clients: Iterable[Meter], servers: Iterable[Meter]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily

    called = [(meter, circuit.totals) for meter, circuit in _circuits_of(clients).items()]
    handled = [(meter, meter.totals) for meter in servers if not meter.operation.parent]
    for name, found, said in (
        ("quintet_client_attempts", called, "How attempts to call or send ended."),
        ("quintet_server_deliveries", handled, "How the handling of requests and messages ended."),
    ):
        family = CounterMetricFamily(name, said, labels=("service_name", "operation", "outcome"))
        sums: dict[_Key, int] = {}
        for meter, totals in found:
            for outcome, count in zip(OUTCOMES, totals, strict=True):
                key: _Key = (meter.owner, meter.operation.full_name, outcome)
                sums[key] = sums.get(key, 0) + count
        for key, count in sums.items():
            family.add_metric(key, count)
        yield family


def _circuits(clients: Iterable[Meter]) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(
        "quintet_client_circuit_state",
        "How many circuits are in this state: 0 or 1, more where several clients have one of the name.",
        labels=("service_name", "circuit", "state"),
    )
    sums: dict[_Key, int] = {}
    for meter, circuit in _circuits_of(clients).items():
        for state in STATES:
            key: _Key = (meter.owner, circuit.name, state)
            sums[key] = sums.get(key, 0) + (circuit.state == state)
    for key, count in sums.items():
        family.add_metric(key, count)
    yield family


def _limits(found: Iterable[Meter], side: str, what: str) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    labels = ("service_name", "remote_service" if side == "client" else "contract")
    busy = GaugeMetricFamily(f"quintet_{side}_requests", f"Requests {what} now.", labels=labels)
    limit = GaugeMetricFamily(f"quintet_{side}_requests_limit", "How many there may be at once.", labels=labels)
    sums: dict[_Key, list[int]] = {}
    for meter, outstanding in {id(meter.outstanding): (meter, meter.outstanding) for meter in found}.values():
        if outstanding is not None:
            both = sums.setdefault((meter.owner, meter.contract), [0, 0])
            both[0] += outstanding.busy
            both[1] += outstanding.limit
    for key, both in sums.items():
        busy.add_metric(key, both[0])
        limit.add_metric(key, both[1])
    yield from (busy, limit)


def _repeats(clients: Iterable[Meter]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily

    extra = CounterMetricFamily(
        "quintet_client_extra_attempts",
        "Attempts beside the first one of a call.",
        labels=("service_name", "operation", "why"),
    )
    fallbacks = CounterMetricFamily(
        "quintet_client_fallbacks",
        "How fallbacks ended.",
        labels=("service_name", "operation", "outcome"),
    )
    for family, name in ((extra, "extra"), (fallbacks, "fallbacks")):
        sums: dict[_Key, int] = {}
        for meter in clients:
            counted: dict[str, int] = getattr(meter, name)
            for what, count in counted.items():
                key: _Key = (meter.owner, meter.operation.full_name, what)
                sums[key] = sums.get(key, 0) + count
        for key, count in sums.items():
            family.add_metric(key, count)
        yield family


def _channels(channels: Sequence[ChannelState]) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    depth = GaugeMetricFamily(
        "quintet_channel_messages", "Messages in a channel, by their state.", labels=("channel", "group", "state")
    )
    age = GaugeMetricFamily(
        "quintet_channel_oldest_message_age",
        "How old the oldest waiting message is.",
        labels=("channel", "group"),
        unit="seconds",
    )
    for (channel, group), one in {(one.channel, one.group): one for one in channels}.items():
        for state, count in (("waiting", one.waiting), ("in_work", one.in_work), ("dead", one.dead)):
            depth.add_metric((channel, group, state), count)
        age.add_metric((channel, group), one.oldest or 0.0)
    yield from (depth, age)


def _circuits_of(clients: Iterable[Meter]) -> dict[Meter, ShownCircuit]:
    """Each circuit once, with the first of the meters that share it."""
    once = {id(meter.circuit): meter for meter in clients if meter.circuit is not None}
    return {meter: meter.circuit for meter in once.values() if meter.circuit is not None}


def _method(meter: Meter) -> str:
    return meter.operation.full_name.replace(".", "/", 1)


def _add(to: Latencies, more: Latencies) -> None:
    to.counts = [one + other for one, other in zip(to.counts, more.counts, strict=True)]
    to.seconds += more.seconds
