"""Reads the feeds of all processes, and makes of them what the page shows."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal
from urllib.parse import urlsplit

import httptools
import msgspec
from msgspec import Struct, field

from quintet.clock import SYSTEM, Clock
from quintet.contract import FANOUT
from quintet.diagram import svg
from quintet.errors import ConfigurationError, QuintetError, TransportError, Unavailable
from quintet.feed import CONTROL, CircuitState, OperationState, Order, Snapshot
from quintet.meter import BOUNDS, percentiles
from quintet.record import Exchange

MINUTE = 60  # points of a chart, one a second
RATE = 10  # seconds over which rates are taken
LATE = 0.25  # seconds by which a snapshot may come late
DRAWN, ALIKE = 16, 2  # exchanges in the diagram, and those of one operation between the same two
SILENCE = 10.0  # seconds without a snapshot after which a process counts as gone
LARGEST = 16 * 1024 * 1024  # bytes of one snapshot

_BAD = ("failure", "timeout")
_GOOD = ("success", "slow", "answered")
_REFUSED = ("refused", "short-circuited")
_FANOUT = {style.value for style in FANOUT}


class _Counted(Struct):
    """What was counted in one second, or until now."""

    good: int = 0
    bad: int = 0
    refused: int = 0
    latencies: dict[int, int] = field(default_factory=dict[int, int])

    def since(self, before: _Counted) -> _Counted:
        return _Counted(
            self.good - before.good,
            self.bad - before.bad,
            self.refused - before.refused,
            {
                bucket: count - before.latencies.get(bucket, 0)
                for bucket, count in self.latencies.items()
                if count != before.latencies.get(bucket, 0)
            },
        )

    def add(self, more: _Counted) -> None:
        self.good += more.good
        self.bad += more.bad
        self.refused += more.refused
        for bucket, count in more.latencies.items():
            self.latencies[bucket] = self.latencies.get(bucket, 0) + count


class _Series:
    """The last minute, second by second, of one operation, over all processes."""

    def __init__(self, now: float) -> None:
        self.begun = now
        self.seconds: deque[tuple[int, _Counted]] = deque(maxlen=MINUTE + 1)

    def add(self, second: int, counted: _Counted) -> None:
        if not self.seconds or self.seconds[-1][0] != second:
            self.seconds.append((second, _Counted()))
        self.seconds[-1][1].add(counted)

    def numbers(self, now: float) -> dict[str, Any]:
        """Rates of the last ten seconds, percentiles (ms) of the last minute, and the minute's chart."""
        last = int(now - LATE) - 1  # a second of which not all has come would look like a drop
        points = dict(self.seconds)
        chart = [points.get(second) or _NONE for second in range(last - MINUTE + 1, last + 1)]
        recent, minute = _Counted(), _Counted()
        for counted in chart[-RATE:]:
            recent.add(counted)
        for counted in chart:
            minute.add(counted)
        span = max(1.0, min(RATE, now - self.begun))
        ended = recent.good + recent.bad
        return {
            "rate": (ended + recent.refused) / span,
            "bad": recent.bad / ended if ended else 0.0,
            "refused": recent.refused / span,
            "ms": _percentiles(minute.latencies),
            "chart": [[one.good, one.bad, one.refused] for one in chart],
        }


_NONE = _Counted()


def _percentiles(latencies: dict[int, int]) -> list[float]:
    counts = [0] * (len(BOUNDS) + 1)
    for bucket, count in latencies.items():
        if bucket < len(counts):
            counts[bucket] = max(count, 0)
    return [round(seconds * 1000, 1) for seconds in percentiles(counts, (50, 90, 99))]


def _counted(state: OperationState) -> _Counted:
    good, bad, refused = (sum(state.totals.get(kind, 0) for kind in kinds) for kinds in (_GOOD, _BAD, _REFUSED))
    return _Counted(good, bad, refused, state.latencies)


Side = Literal["call", "handler", "pair"]
_Key = tuple[Side, str, str, str]
_WORST = {"closed": 0, "half-open": 1, "open": 2}


class Source(Struct):
    """An address whose feed is read."""

    address: str
    up: bool = False
    trouble: str = ""
    snapshot: Snapshot | None = None
    seen: float = 0.0


class Collector:
    """Keeps the last minute of all feeds. `token`: what feeds want that are not on this machine's loopback alone."""

    def __init__(self, addresses: Iterable[str] = (), *, token: str = "", clock: Clock = SYSTEM) -> None:
        self.sources: dict[str, Source] = {}
        self._token, self._clock = token, clock
        self._before: dict[tuple[str, *_Key], _Counted] = {}
        self._series: dict[_Key, _Series] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._addresses = list(addresses)

    def __repr__(self) -> str:
        return f"<collector of {len(self.sources)} feeds>"

    async def __aenter__(self) -> Collector:
        for address in self._addresses:
            self.follow(address)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def follow(self, address: str) -> None:
        """Reads the feed at http://HOST:PORT from now on, and again whenever it was away. Raises ConfigurationError."""
        checked(address)
        if address not in self._tasks:
            self.sources[address] = Source(address)
            self._tasks[address] = asyncio.create_task(self._follow(address))

    def forget(self, address: str) -> None:
        """Reads it no longer: its process has ended for good."""
        task = self._tasks.pop(address, None)
        if task is not None:
            task.cancel()
            del self.sources[address]

    async def _follow(self, address: str) -> None:
        source, pause = self.sources[address], 0.25
        decode = msgspec.json.Decoder(Snapshot).decode
        while True:
            try:
                async with _exchange(address, "GET", "/quintet.stream", self._token) as (status, body):
                    if status != 200:
                        raise Unavailable(f"{address}/quintet.stream answers {status}")
                    async for event in _events(body):
                        self.take(source, decode(event))
                        pause = 0.25
                source.trouble = "it ended"
            except (OSError, QuintetError, msgspec.MsgspecError, RecursionError, httptools.HttpParserError) as error:
                source.trouble = str(error)
            source.up = False
            await self._clock.sleep(pause)
            pause = min(pause * 2, 4.0)

    def take(self, source: Source, snapshot: Snapshot) -> None:
        """Adds a snapshot: what was counted since the one before becomes the latest second."""
        now = self._clock.wall()
        twin = any(
            other.snapshot is not None and other.snapshot.process == snapshot.process and other.up
            for other in self.sources.values()
            if other is not source
        )
        first = source.snapshot is None or source.snapshot.process != snapshot.process
        if first and source.snapshot is not None:
            self._before = {key: counted for key, counted in self._before.items() if key[0] != source.snapshot.process}
        second = int(now - 0.5 if now - source.seen > 2 else (source.seen + now) / 2)  # in which most of it was counted
        source.up, source.trouble, source.seen = True, "", now
        if twin:  # one process at two addresses
            source.snapshot = None
            return
        source.snapshot = snapshot
        sides: list[tuple[Side, list[OperationState]]] = [("call", snapshot.calls), ("handler", snapshot.handlers)]
        found: dict[_Key, _Counted] = {}
        for side, states in sides:
            for state in states:
                found.setdefault((side, state.owner, state.operation, ""), _Counted()).add(_counted(state))
        for pair in snapshot.pairs:
            found[("pair", pair.sender, pair.operation, pair.receiver)] = _Counted(pair.done, pair.failed)
        for key, counted in found.items():
            before = self._before.get((snapshot.process, *key), counted if first else _NONE)
            series = self._series.get(key) or self._series.setdefault(key, _Series(now))
            series.add(second, counted.since(before))
            self._before[snapshot.process, *key] = counted

    # what the page shows

    def view(self) -> dict[str, Any]:
        """All that the page shows, for JSON."""
        now = self._clock.wall()
        for source in self.sources.values():
            if source.up and now - source.seen > SILENCE:
                source.up, source.trouble = False, f"silent for {now - source.seen:.0f} s"
        there = [source.snapshot for source in self.sources.values() if source.snapshot is not None and source.up]
        calls, handlers = self._calls(there, now), self._handlers(there, now)
        channels, letters = _channels(there)
        return {
            "at": now,
            "sources": [
                {"address": source.address, "up": source.up, "trouble": source.trouble}
                for source in self.sources.values()
            ],
            "services": sorted({name for snapshot in there for name in snapshot.services}),
            "calls": calls,
            "handlers": handlers,
            "edges": self._edges(there, calls, handlers, now),
            "channels": channels,
            "letters": letters,
            "diagram": diagram(exchange for snapshot in there for exchange in snapshot.exchanges),
        }

    def _calls(self, there: Sequence[Snapshot], now: float) -> list[dict[str, Any]]:
        found: dict[tuple[str, str], list[OperationState]] = {}
        for snapshot in there:
            for state in snapshot.calls:
                if not state.companion or (state.circuit and state.circuit.state != "closed"):
                    found.setdefault((state.owner, state.operation), []).append(state)
        return [
            {
                **_named(states[0]),
                **self._series["call", owner, operation, ""].numbers(now),
                "circuit": _circuit([state.circuit for state in states if state.circuit]),
                "bulkhead": _bulkhead(states),
                "retries": sum(state.retries for state in states),
                "fallbacks": sum(state.fallbacks for state in states),
                "ever": any(state.totals for state in states),
            }
            for (owner, operation), states in sorted(found.items())
        ]

    def _handlers(self, there: Sequence[Snapshot], now: float) -> list[dict[str, Any]]:
        found: dict[tuple[str, str], list[OperationState]] = {}
        for snapshot in there:
            for state in snapshot.handlers:
                if not state.companion:
                    found.setdefault((state.owner, state.operation), []).append(state)
        return [
            {
                **_named(states[0]),
                **self._series["handler", owner, operation, ""].numbers(now),
                "bulkhead": _bulkhead(states),
                "ever": any(state.totals for state in states),
            }
            for (owner, operation), states in sorted(found.items())
        ]

    def _edges(
        self, there: Sequence[Snapshot], calls: list[dict[str, Any]], handlers: list[dict[str, Any]], now: float
    ) -> list[dict[str, Any]]:
        """Who calls whom. What is called is the service that handles it; events go to each that does."""
        homes: dict[str, list[str]] = {}
        for handler in handlers:
            homes.setdefault(handler["operation"], []).append(handler["owner"])
        edges: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for call in calls:
            if call["style"] not in _FANOUT and call["ever"]:
                for home in homes.get(call["operation"], [call["service"]]):
                    edges.setdefault((call["owner"], home), []).append(call)
        for handler in handlers:
            if handler["style"] in _FANOUT and handler["ever"]:
                edges.setdefault((handler["service"], handler["owner"]), []).append(handler)
        seen = {call["owner"] for call in calls} | {name for snapshot in there for name in snapshot.services}
        for snapshot in there:
            for pair in snapshot.pairs:
                if (
                    pair.sender and pair.sender not in seen and pair.style not in _FANOUT
                ):  # nobody shows it but who it calls
                    key: _Key = ("pair", pair.sender, pair.operation, pair.receiver)
                    numbers = self._series[key].numbers(now) | {"style": pair.style, "operation": pair.operation}
                    edges.setdefault((pair.sender, pair.receiver), []).append(numbers)
        return [{"from": source, "to": target, **_edge(lines)} for (source, target), lines in sorted(edges.items())]

    async def order(self, order: Order) -> list[str]:
        """Has it done by each process that it is for; says what was done. ConfigurationError, TransportError."""
        body = msgspec.json.encode(order)
        said: list[str] = []
        troubles: list[str] = []
        for source in list(self.sources.values()):
            if source.snapshot is None or not source.up or not _is_for(order, source.snapshot):
                continue
            try:
                async with (
                    asyncio.timeout(10),
                    _exchange(source.address, "POST", "/quintet.control", self._token, body) as (status, chunks),
                ):
                    text = b"".join([chunk async for chunk in chunks]).decode(errors="replace")
            except (OSError, QuintetError, httptools.HttpParserError) as error:
                status, text = 0, f"{source.address}: {error}"
            (said if status == 200 else troubles).append(text)
            if order.do == "replay" and status == 200:
                return said  # who else sees these letters sees the same ones
        if troubles:
            raise TransportError("; ".join(troubles))
        if not said:
            raise ConfigurationError("no process that is there can do that")
        return said


def _is_for(order: Order, snapshot: Snapshot) -> bool:
    if order.do == "replay":
        return any(state.address == order.address for state in snapshot.addresses)
    return any(call.owner == order.owner and call.operation == order.operation for call in snapshot.calls)


def _named(state: OperationState) -> dict[str, Any]:
    return {
        "owner": state.owner,
        "service": state.service,
        "operation": state.operation,
        "style": state.style,
    }


def _circuit(circuits: list[CircuitState]) -> dict[str, Any] | None:
    """The worst of those of several processes, and how many of them stand as it does."""
    if not circuits:
        return None
    worst = max(circuits, key=_badness)
    return msgspec.structs.asdict(worst) | {
        "processes": len(circuits),
        "alike": sum(_badness(one) == _badness(worst) for one in circuits),
        "good": sum(one.good for one in circuits),
        "slow": sum(one.slow for one in circuits),
        "bad": sum(one.bad for one in circuits),
    }


def _badness(circuit: CircuitState) -> int:
    return 2 if circuit.forced == "open" else 0 if circuit.forced == "closed" else _WORST.get(circuit.state, 0)


def _bulkhead(states: list[OperationState]) -> dict[str, Any] | None:
    found = [state.bulkhead for state in states if state.bulkhead]
    if not found:
        return None
    return {name: sum(getattr(one, name) for one in found) for name in ("busy", "limit", "waiting", "queue")}


def _edge(lines: list[dict[str, Any]]) -> dict[str, Any]:
    rate = sum(line["rate"] for line in lines)
    shown = [line["circuit"] for line in lines if line.get("circuit")]
    states = ["open" if one["forced"] == "open" else "closed" if one["forced"] else one["state"] for one in shown]
    return {
        "rate": rate,
        "bad": sum(line["bad"] * line["rate"] for line in lines) / rate if rate else 0.0,
        "p50": max(line["ms"][0] for line in lines),
        "p99": max(line["ms"][2] for line in lines),
        "circuit": max(states, key=lambda state: _WORST.get(state, 0), default=""),
        "styles": sorted({line["style"] for line in lines}),
        "operations": sorted({line["operation"] for line in lines}),
    }


def _channels(there: Sequence[Snapshot]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Each channel and dead letter once, however many processes look at the same file."""
    channels: dict[tuple[str, str, str], dict[str, Any]] = {}
    letters: dict[tuple[str, str], dict[str, Any]] = {}
    for snapshot in there:
        for state in snapshot.addresses:
            for channel in state.channels:
                key = (state.address, channel.channel, channel.group)
                channels[key] = msgspec.structs.asdict(channel) | {"address": state.address}
            for letter in state.letters:
                letters[state.address, letter.id] = msgspec.structs.asdict(letter) | {"address": state.address}
    newest = sorted(letters.values(), key=lambda letter: -letter["died_at"])
    return sorted(channels.values(), key=lambda one: (one["address"], one["channel"], one["group"])), newest


def diagram(exchanges: Iterable[Exchange]) -> str:
    """The newest exchanges as a sequence diagram; empty where there is none."""
    told = {(one.id, one.operation, one.receiver, one.attempt): one for one in exchanges if _tells(one)}
    alike: Counter[tuple[str, str, str]] = Counter()
    drawn: list[Exchange] = []
    for one in sorted(told.values(), key=lambda one: one.started, reverse=True):
        way = (one.sender, one.receiver, one.operation)
        if alike[way] < ALIKE and len(drawn) < DRAWN:  # a flood of one kind must not push all others out
            alike[way] += 1
            drawn.append(one)
    return svg(drawn, title="") if drawn else ""


def _tells(exchange: Exchange) -> bool:
    return exchange.outcome != "StillPending" and not exchange.operation.endswith(".result")


# one request to a feed

_Body = AsyncIterator[bytes]


def checked(address: str) -> tuple[str, int, bool]:
    """Host, port and whether it is https. Raises ConfigurationError."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        host, port, parts = None, 0, urlsplit("")
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigurationError(
            f"{address!r} is no address of a feed: write http://HOST:PORT, as http://127.0.0.1:9001"
        )
    return host, port, parts.scheme == "https"


class _Response:
    def __init__(self) -> None:
        self.headed = self.complete = False
        self.chunks: list[bytes] = []

    def on_headers_complete(self) -> None:
        self.headed = True

    def on_body(self, body: bytes) -> None:
        self.chunks.append(body)

    def on_message_complete(self) -> None:
        self.complete = True


@asynccontextmanager
async def _exchange(
    address: str, method: str, path: str, token: str, body: bytes = b""
) -> AsyncGenerator[tuple[int, _Body]]:
    """The status and the body, as it comes. Raises OSError, Unavailable, HttpParserError."""
    host, port, secure = checked(address)
    context = ssl.create_default_context() if secure else None
    async with asyncio.timeout(5):
        reader, writer = await asyncio.open_connection(host, port, ssl=context)
    try:
        named = f"[{host}]" if ":" in host else host
        head = [f"{method} {urlsplit(address).path.rstrip('/')}{path} HTTP/1.1", f"Host: {named}:{port}"]
        head += [f"{CONTROL}: {token or 'yes'}", f"Content-Length: {len(body)}", "Content-Type: application/json"]
        writer.write("\r\n".join([*head, "\r\n"]).encode() + body)
        response = _Response()
        parser = httptools.HttpResponseParser(response)

        async def feed() -> None:
            async with asyncio.timeout(SILENCE):
                data = await reader.read(65536)
            if not data and not response.complete:
                raise Unavailable(f"{address} broke the connection")
            parser.feed_data(data)

        async def chunks() -> _Body:
            while True:
                for chunk in response.chunks:
                    yield chunk
                response.chunks.clear()
                if response.complete:
                    return
                await feed()

        while not response.headed:
            await feed()
        yield parser.get_status_code(), chunks()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _events(body: _Body) -> AsyncIterator[bytes]:
    """The data of each server-sent event. Raises Unavailable for one that has no end."""
    held = bytearray()
    async for chunk in body:
        seen = max(0, len(held) - 1)  # the end of an event may have come in two pieces
        held += chunk
        while (end := held.find(b"\n\n", seen)) >= 0:
            event, seen = bytes(held[:end]), 0
            del held[: end + 2]
            if event.startswith(b"data:"):
                yield event[5:].strip()
        if len(held) > LARGEST:
            raise Unavailable(f"a snapshot of more than {LARGEST} bytes is not read")
