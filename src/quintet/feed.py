"""What a process shows of itself to the dashboard: a snapshot each second, and the few orders that it takes."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import os
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, cast
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct, structs

from quintet.clock import SYSTEM, Clock
from quintet.errors import CallError, ConfigurationError, TransportError
from quintet.message import Channel, Message
from quintet.meter import CLIENTS, SERVERS, Latencies, Meter, meters
from quintet.observe import Place
from quintet.outcome import OUTCOMES
from quintet.policy import Breaker
from quintet.record import Exchange, Recorder
from quintet.transport import ChannelState, Counting, DeadLetter, Done, Letters, Shown, Verdict

log = logging.getLogger("quintet.feed")

CONTROL = "x-quintet-control"
"""The header that an order must carry, and the token in it. A foreign web page cannot send it: its browser asks the
service first whether it may, and gets no yes."""
TOKEN = "QUINTET_TOKEN"  # noqa: S105 - the name of the environment's variable
NEWEST = 120  # exchanges that a process keeps to be looked at
SENDERS = 500  # pairs of sender and operation that are counted: names of senders come from outside
ORDERS = Channel("quintet.control", route="POST /quintet.control")
LETTERS = 20  # dead letters of an address that are shown, the newest


class CircuitState(Struct, kw_only=True):
    """A breaker and its numbers: the calls in its window by how they ended, and what opens it."""

    name: str
    state: str
    forced: Literal["open", "closed", ""]
    good: int
    slow: int
    bad: int
    window: float
    error_rate: float
    min_calls: int


class BulkheadState(Struct, kw_only=True):
    """A limit on outstanding requests: how many are, how many may be, how many callers wait for a place."""

    busy: int
    limit: int
    waiting: int
    queue: int


class OperationState(Struct, kw_only=True):
    """One operation as its caller, or its service, has counted it since the start.

    `totals`: attempts by outcome (outcome.py). `latencies`: attempts by bucket (meter.BOUNDS), the empty ones left out.
    """

    owner: str
    service: str
    operation: str
    style: str
    companion: bool
    totals: dict[str, int]
    latencies: dict[int, int]
    retries: int = 0
    fallbacks: int = 0
    circuit: CircuitState | None = None
    bulkhead: BulkheadState | None = None


class Letter(Struct, kw_only=True):
    """A dead letter, without its content."""

    id: str
    channel: str
    group: str
    reason: str
    attempts: int
    died_at: float
    operation: str
    sender: str


class AddressState(Struct, kw_only=True):
    """What waits, and what is dead, at an address whose channels can be looked at."""

    address: str
    channels: list[ChannelState]
    letters: list[Letter]


class Pair(Struct, kw_only=True):
    """How often a sender's messages of an operation came to a service here, since the start."""

    sender: str
    receiver: str
    operation: str
    style: str
    done: int
    failed: int


class Snapshot(Struct, kw_only=True):
    """A process as it stands. `process` tells it from all others, and from itself before a restart."""

    process: str
    services: list[str]
    at: float
    calls: list[OperationState]
    handlers: list[OperationState]
    addresses: list[AddressState]
    pairs: list[Pair]
    exchanges: list[Exchange]


class Order(Struct, kw_only=True, forbid_unknown_fields=True):
    """What a person asks for by hand: `open`, `close` or `auto` (as its policy says) for the circuit of an owner's
    calls of an operation; `replay` for dead letters at an address."""

    do: Literal["open", "close", "auto", "replay"]
    owner: str = ""
    operation: str = ""
    address: str = ""
    ids: list[str] = []


class Newest:
    """The newest exchanges, in memory; hands each on to the recorder that stands behind it.

    `answers`: the outcomes that are no failures, the names of declared faults.
    """

    def __init__(self, recorder: Recorder | None = None, answers: Iterable[str] = ()) -> None:
        self._recorder = recorder
        self._well = {"done", "late", "declined", "StillPending", *answers}
        self.exchanges: deque[Exchange] = deque(maxlen=NEWEST)
        self.pairs: Counter[tuple[str, str, str, str, bool]] = Counter()

    def __repr__(self) -> str:
        return f"<newest: {len(self.exchanges)} exchanges>"

    def write(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)
        failed = exchange.outcome not in self._well
        pair = (exchange.sender, exchange.receiver, exchange.operation, exchange.style, failed)
        if pair in self.pairs or len(self.pairs) < SENDERS:
            self.pairs[pair] += 1
        if self._recorder is not None:
            self._recorder.write(exchange)


def snapshot(
    process: str,
    services: Sequence[str],
    at: float,
    clients: Iterable[Meter],
    servers: Iterable[Meter],
    addresses: Sequence[AddressState],
    newest: Newest,
) -> Snapshot:
    """The snapshot of what has been counted until `at` (wall-clock seconds)."""
    pairs: dict[tuple[str, str, str, str], list[int]] = {}
    for (*pair, failed), count in newest.pairs.items():
        pairs.setdefault(cast(Any, tuple(pair)), [0, 0])[failed] += count
    return Snapshot(
        process=process,
        services=list(services),
        at=at,
        calls=[_call(meter) for meter in clients],
        handlers=[_operation(meter, meter.totals, meter.latencies) for meter in servers],
        addresses=list(addresses),
        pairs=[
            Pair(sender=sender, receiver=receiver, operation=operation, style=style, done=done, failed=failed)
            for (sender, receiver, operation, style), (done, failed) in pairs.items()
        ],
        exchanges=list(newest.exchanges),
    )


def _operation(meter: Meter, totals: Sequence[int], latencies: Latencies) -> OperationState:
    operation, outstanding = meter.operation, cast(Any, meter.outstanding)
    counts = latencies.fold().counts
    return OperationState(
        owner=meter.owner,
        service=meter.contract,
        operation=operation.full_name,
        style=operation.style.value,
        companion=bool(operation.parent),
        totals={name: count for name, count in zip(OUTCOMES, totals, strict=True) if count},
        latencies={bucket: count for bucket, count in enumerate(counts) if count},
        bulkhead=outstanding
        and BulkheadState(
            busy=outstanding.busy,
            limit=outstanding.limit,
            waiting=len(outstanding.waiting),
            queue=outstanding.queue,
        ),
    )


def _call(meter: Meter) -> OperationState:
    circuit = cast(Any, meter.circuit)
    if circuit is None:
        return _operation(meter, [0] * len(OUTCOMES), Latencies())
    found, settings = _operation(meter, circuit.totals, circuit.latencies), circuit.settings
    found.retries, found.fallbacks = meter.extra["retry"], meter.fallbacks["success"]
    if isinstance(meter.policy.breaker, Breaker):
        good, slow, bad = circuit.counts
        found.circuit = CircuitState(
            name=circuit.name,
            state=circuit.state,
            forced="open" if settings.force_open else "closed" if settings.force_closed else "",
            good=good,
            slow=slow,
            bad=bad,
            window=settings.window,
            error_rate=settings.error_rate,
            min_calls=settings.min_calls,
        )
    return found


class Feed:
    """One process, the places that it speaks of, and who may look: with the token, else on loopback alone.

    `host`: of the address that it is shown at. `recorder`: what else is told of each exchange. `answers`: the names of
    declared faults.
    """

    def __init__(
        self,
        services: Sequence[str],
        places: Callable[[], Iterable[Place]],
        *,
        host: str = "127.0.0.1",
        token: str = "",
        recorder: Recorder | None = None,
        answers: Iterable[str] = (),
        clock: Clock = SYSTEM,
    ) -> None:
        self.newest = Newest(recorder, answers)
        self._services, self._places, self._clock = list(services), places, clock
        self._host, self._token = host, token
        self._process = f"{'+'.join(services)}-{os.getpid()}-{time.time_ns():x}"
        self._addresses: list[AddressState] = []
        self._look_at = 0.0
        self._dead: dict[str, int] = {}
        self._streams: set[asyncio.Event] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"<feed of {', '.join(self._services)}, {len(self._streams)} streams>"

    def close(self) -> None:
        """Ends the streams, so that they hold up no drain."""
        self._closed = True
        for woken in self._streams:
            woken.set()

    async def page(self, headers: Mapping[str, str]) -> Shown:
        """What is at /quintet.stream: a snapshot as a server-sent event each second."""
        if why := self.refusal(headers):
            return Shown(why.encode(), "text/plain; charset=utf-8", 403)
        return Shown(self._stream(), "text/event-stream;charset=UTF-8")

    async def _stream(self) -> AsyncGenerator[bytes]:
        woken = asyncio.Event()
        self._streams.add(woken)
        try:
            while not self._closed:
                yield b"data: " + msgspec.json.encode(await self.take()) + b"\n\n"
                # on the second, as all other processes: charts that add them up have no seams
                await self._clock.until(woken, 1 - self._clock.wall() % 1)
                woken.clear()
        finally:
            self._streams.discard(woken)

    def refusal(self, headers: Mapping[str, str]) -> str:
        """Why a request with these headers (names in lower case) is refused; empty where it is not."""
        if self._token:
            right = hmac.compare_digest(headers.get(CONTROL, "").encode(), self._token.encode())
            return "" if right else f"the header {CONTROL} must be what {TOKEN} is in this service's environment"
        if not is_loopback(self._host):
            return f"{self._host} is no loopback address: set {TOKEN} in the environment of service and dashboard"
        if not is_loopback(host_of(headers)):  # a foreign name that was made to point here (DNS rebinding)
            return "ask for it as localhost or 127.0.0.1"
        return ""

    async def take(self) -> Snapshot:
        """The process as it stands now."""
        await self._look()
        clients = [meter for meter in meters(CLIENTS) if meter.owner]
        return snapshot(
            self._process,
            self._services,
            self._clock.wall(),
            clients,
            meters(SERVERS),
            self._addresses,
            self.newest,
        )

    async def _look(self) -> None:
        """Looks into the channels; less often where a look takes long, as with a million messages waiting."""
        begun = self._clock.now()
        if begun < self._look_at:
            return
        before, found = {state.address: state for state in self._addresses}, list[AddressState]()
        for place in self._places():
            if isinstance(place, Counting):
                address = str(place.address)
                with contextlib.suppress(CallError, TransportError):  # what cannot be looked at now is left out
                    channels = list(await place.channels())
                    dead, known = sum(channel.dead for channel in channels), before.get(address)
                    if known is not None and dead == self._dead.get(address):
                        letters = known.letters
                    elif dead and isinstance(place, Letters):
                        letters = [_letter(letter) for letter in (await place.dead())[-LETTERS:]]
                    else:
                        letters = []
                    self._dead[address] = dead
                    found.append(AddressState(address=address, channels=channels, letters=letters))
        now = self._clock.now()
        self._addresses, self._look_at = found, now + 10 * (now - begun)

    # orders

    async def receive(self, message: Message) -> Verdict:
        """What comes to POST /quintet.control. A page of another origin cannot send the header that is wanted."""
        status, text = 403, self.refusal(message.headers)
        if not text and not message.headers.get(CONTROL):
            text = f"an order must have the header {CONTROL}"
        if not text:
            try:
                status, text = 200, await self.obey(msgspec.json.decode(message.body, type=Order))
            except (msgspec.MsgspecError, RecursionError, ConfigurationError) as error:
                status, text = 400, str(error)
            except (CallError, TransportError) as error:
                status, text = 503, str(error)
        headers = {":status": str(status)}
        return Done(Message(channel=message.channel, body=text.encode(), media_type="text/plain", headers=headers))

    async def obey(self, order: Order) -> str:
        """Does what is asked for; gives what was done as a sentence. Raises ConfigurationError where it cannot be."""
        if order.do == "replay":
            return await self._replay(order)
        found = [
            meter
            for meter in meters(CLIENTS)
            if meter.owner == order.owner and meter.operation.full_name == order.operation
        ]
        if not [meter for meter in found if force(meter, order.do)]:
            raise ConfigurationError(f"{order.owner or '?'} has no breaker for {order.operation or '?'}")
        log.warning("%s: the circuit of %s is %s, by hand", order.owner, order.operation, SAID[order.do])
        return f"{order.owner}: the circuit of {order.operation} is {SAID[order.do]}"

    async def _replay(self, order: Order) -> str:
        for place in self._places():
            if isinstance(place, Letters) and str(place.address) == order.address:
                count = await place.replay(order.ids)
                self._look_at, self._dead = 0.0, {}
                return f"{count} of {len(order.ids)} dead letters replayed at {order.address}"
        raise ConfigurationError(f"no dead letters of {order.address or '?'} are kept here")


def host_of(headers: Mapping[str, str]) -> str:
    """The name that a request asked for, without its port."""
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


SAID = {"open": "held open", "close": "held closed", "auto": "as its policy says"}


def force(meter: Meter, do: Literal["open", "close", "auto"]) -> bool:
    """Holds a circuit open or closed, or lets it be as its policy says; the next change of the policy ends it, too.

    False where there is no breaker.
    """
    circuit, policy = cast(Any, meter.circuit), meter.policy.breaker
    if circuit is None or not isinstance(policy, Breaker):
        return False
    force_open, force_closed = policy.force_open, policy.force_closed
    if do != "auto":
        force_open, force_closed = do == "open", do == "close"
    circuit.settings = structs.replace(circuit.settings, force_open=force_open, force_closed=force_closed)
    return True


def _letter(letter: DeadLetter) -> Letter:
    return Letter(
        id=letter.id,
        channel=letter.channel,
        group=letter.group,
        reason=letter.reason,
        attempts=letter.attempts,
        died_at=letter.died_at,
        operation=letter.message.operation,
        sender=letter.message.sender,
    )
