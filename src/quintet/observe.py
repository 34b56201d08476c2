"""What a service shows of itself over HTTP: /metrics for Prometheus, /hystrix.stream for Hystrix' dashboards.

All is taken from what the filters count anyway: a snapshot a second tells what was counted in the last ones.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import msgspec

from quintet import hystrix, metrics
from quintet.clock import Clock, Handle
from quintet.errors import CallError, TransportError
from quintet.meter import CLIENTS, Meter, ShownOutstanding, meters
from quintet.outcome import OUTCOMES
from quintet.transport import Address, ChannelState, Counting, Page, Shown

LOOK = 1.0  # seconds between two snapshots of the counts
LOOKS_OF_LATENCIES = 10  # every so many snapshots of the counts there is one of the latencies, which are many
PERCENTILE_LOOKS = 6  # that percentiles look back: 60 s


class Place(Protocol):
    """What the pages speak of: a transport, or the database that an outbox stands in."""

    @property
    def address(self) -> Address: ...
    @property
    def connected(self) -> bool: ...


class Recent:
    """What one meter counted in the last seconds."""

    def __init__(self, meter: Meter, new: bool) -> None:
        counts, latencies = self._read(meter)
        zeros = [0] * len(counts), ([0] * len(latencies[0]), 0.0)
        # what was counted before anybody looked may be a day old; a new meter counts from nothing
        first_counts, first_latencies = zeros if new else (counts, latencies)
        self._counts = deque([first_counts], maxlen=hystrix.ROLLING)
        self._latencies = deque([first_latencies], maxlen=PERCENTILE_LOOKS)

    @staticmethod
    def _read(meter: Meter) -> tuple[list[int], tuple[list[int], float]]:
        fallbacks = list(meter.fallbacks.values())
        if meter.circuit is None:
            return [0] * len(OUTCOMES) + fallbacks, ([], 0.0)
        latencies = meter.circuit.latencies.fold()
        return meter.circuit.totals + fallbacks, (latencies.counts.copy(), latencies.seconds)

    def look(self, meter: Meter, too: bool) -> None:
        """Remembers the counts as they are now, and the latencies too."""
        counts, latencies = self._read(meter)
        self._counts.append(counts)
        if too:
            self._latencies.append(latencies)

    def counts(self, meter: Meter) -> tuple[list[int], dict[str, int]]:
        """By OUTCOMES and by Meter.fallbacks, of the last 10 s."""
        now, _ = self._read(meter)
        since = [count - before for count, before in zip(now, self._counts[0], strict=True)]
        return since[: len(OUTCOMES)], dict(zip(meter.fallbacks, since[len(OUTCOMES) :], strict=True))

    def latencies(self, meter: Meter) -> tuple[list[int], float]:
        """By meter.BOUNDS, and their sum in seconds, of the last 60 s."""
        _, (now, seconds) = self._read(meter)
        before, seconds_before = self._latencies[0]
        return [count - earlier for count, earlier in zip(now, before, strict=True)], seconds - seconds_before


class Observer:
    """Looks at the meters of this process, and offers the pages that show them."""

    def __init__(self, clock: Clock, places: Callable[[], Iterable[Place]]) -> None:
        self._clock = clock
        self._places = places
        self._recent: WeakKeyDictionary[Meter, Recent] = WeakKeyDictionary()
        self._peaks: WeakKeyDictionary[ShownOutstanding, deque[int]] = WeakKeyDictionary()
        self._looks = 0
        self._timer: Handle | None = None
        self._streams: set[asyncio.Event] = set()
        self._ended = False

    def __repr__(self) -> str:
        return f"<observer of {len(self._recent)} operations, {len(self._streams)} streams>"

    @property
    def pages(self) -> Mapping[str, Page]:
        return {"/metrics": self.metrics, "/hystrix.stream": self.hystrix, "/health/ready": self.ready}

    def start(self) -> None:
        for meter in meters(CLIENTS):
            self._recent[meter] = Recent(meter, new=False)
        self._timer = self._clock.call_at(self._clock.now() + LOOK, self._look)

    def stop(self) -> None:
        """Ends the streams, so that they hold up no drain."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        for stream in self._streams:
            stream.set()

    def _look(self) -> None:
        self._looks += 1
        for meter in meters(CLIENTS):
            self._of(meter).look(meter, self._looks % LOOKS_OF_LATENCIES == 0)
            outstanding = meter.outstanding
            if outstanding is not None and outstanding not in self._peaks:
                self._peaks[outstanding] = deque(maxlen=hystrix.ROLLING)
        for outstanding, peaks in self._peaks.items():
            peaks.append(outstanding.peak)
            outstanding.peak = outstanding.busy
        self._timer = self._clock.call_at(self._clock.now() + LOOK, self._look)

    def _of(self, meter: Meter) -> Recent:
        found = self._recent.get(meter)
        if found is None:
            found = self._recent[meter] = Recent(meter, new=True)
        return found

    def commands(self) -> list[hystrix.Command]:
        """What is known of each circuit; those of one name (several clients of a service) are one."""
        found: dict[str, hystrix.Command] = {}
        seen: set[int] = set()
        seconds: dict[str, float] = {}
        for meter in sorted(meters(CLIENTS), key=lambda meter: meter.operation.full_name):
            circuit = meter.circuit
            if circuit is None:
                continue
            recent = self._of(meter)
            counts, fallbacks = recent.counts(meter)
            latencies, spent = recent.latencies(meter)
            command = found.get(circuit.name)
            if command is None:
                command = found[circuit.name] = hystrix.Command(
                    circuit.name,
                    meter.contract,
                    meter,
                    [0] * len(counts),
                    dict.fromkeys(fallbacks, 0),
                    [0] * len(latencies),
                    0.0,
                    0,
                )
            elif circuit.state != "closed":
                command.meter = meter  # of several, one that is open is what people look for
            command.fallbacks = {name: command.fallbacks[name] + count for name, count in fallbacks.items()}
            command.peak = max(command.peak, self._peak(meter.outstanding))
            if id(circuit) not in seen:  # operations may share one
                seen.add(id(circuit))
                command.counts = _sum(command.counts, counts)
                command.latencies = _sum(command.latencies, latencies)
                seconds[circuit.name] = seconds.get(circuit.name, 0.0) + spent
                command.mean = seconds[circuit.name] / max(1, sum(command.latencies))
        return list(found.values())

    def _peak(self, outstanding: ShownOutstanding | None) -> int:
        return 0 if outstanding is None else max(outstanding.peak, *self._peaks.get(outstanding, ()), 0)

    # the pages

    async def metrics(self, headers: Mapping[str, str]) -> Shown:
        channels: list[ChannelState] = []
        for place in self._places():
            if isinstance(place, Counting):
                try:
                    channels += await place.channels()
                except (CallError, TransportError):
                    continue  # what cannot be looked at now is left out: the rest is wanted all the more
        body, media_type = metrics.text(headers.get("accept", ""), channels)
        return Shown(body, media_type)

    async def hystrix(self, headers: Mapping[str, str]) -> Shown:  # noqa: ARG002
        return Shown(self._stream(), "text/event-stream;charset=UTF-8")

    async def ready(self, headers: Mapping[str, str]) -> Shown:  # noqa: ARG002
        away = [str(place.address) for place in self._places() if not place.connected]
        status = "draining" if self._ended else "disconnected" if away else "ready"
        state = {"status": status} | ({"away": away} if away else {})
        return Shown(msgspec.json.encode(state), "application/json", 200 if status == "ready" else 503)

    async def _stream(self) -> AsyncGenerator[bytes, None]:
        woken = asyncio.Event()
        self._streams.add(woken)
        try:
            while not self._ended:
                wall = self._clock.wall()
                yield b"".join(hystrix.event(command, wall) for command in self.commands()) + hystrix.PING
                woken.clear()
                if not self._ended:
                    await self._clock.until(woken, hystrix.INTERVAL)
        finally:
            self._streams.discard(woken)


def _sum(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [count + more for count, more in zip(one, other, strict=True)]
