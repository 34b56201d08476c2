"""One connection to a STOMP broker on one link: the greeting, what comes, and what is sent together."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from msgspec import Struct

from quintet.clock import Clock, Handle
from quintet.connection import Link, Lost, Refused, credentials
from quintet.connection import Session as BrokerSession
from quintet.errors import QuintetError, TransportError
from quintet.message import Channel, native_of
from quintet.transport import Address
from quintet.wire.stomp import BEAT, VERSIONS, Frame, Parser, agree_beats, encode, encode_rest, escape, header_lines
from quintet.wire.stomp_message import DIALECTS, SHORT_HEAD, Dialect, Publish, check, cut, destination, waiting_room

SILENT_BEATS = 2.0  # heart-beats that may be missing until the broker is taken for gone
COMMITS: Final = 2  # transactions under way at once: what comes meanwhile goes into the next one together
TOGETHER, TOGETHER_BYTES = 256, 1 << 20  # messages and bytes of one transaction
WAYS_KEPT = 4096
REFUSED_PAUSE = 1.0  # seconds until a subscription is tried again that the broker refused after a reconnect
PROBE_SECONDS = 5.0  # in which a scheduler that there is delivers a message
DELAY: Final = "AMQ_SCHEDULED_DELAY"

_PUBLISH = Publish()


class Refusal(TransportError):
    """The broker answered a frame with ERROR: it did nothing of it. `text` is all that it says."""

    def __init__(self, frame: Frame) -> None:
        message, body = frame.headers.get("message", ""), frame.body.decode("utf-8", "replace").strip()
        first = body.partition("\n")[0].strip()
        super().__init__(first if message in first or not message else f"{message}: {first}".removesuffix(": "))
        self.text = f"{message}\n{body}"


class Unwritten(Exception):
    """The session ended before the bytes were written."""


class _Unit(Struct, eq=False):
    """What is to happen together: a message that is sent, and perhaps a delivery that is acknowledged by it."""

    data: bytes  # of a SEND, from behind its command on
    done: asyncio.Future[None]
    ack: str
    alone: bool


class Way(Struct):
    """How messages of one channel are written: what is the same for all, as lines."""

    written: str
    durable: bool
    temporary: bool
    keyed: bool


class Profile(Struct, frozen=True):
    """How a session presents itself, and whom it takes the broker for; the heart-beat is in seconds, 0 for none."""

    address: Address
    heartbeat: float
    dialect: Dialect | None
    """None: the one whose name the broker says."""


class Subscribed:
    """What is subscribed to on a line: again on each of its connections."""

    def __init__(self, id_: str, headers: dict[str, str] | None) -> None:
        """`headers`: those of SUBSCRIBE; None where none is to be sent."""
        self.id = id_
        self.headers = headers
        self.session: Session | None = None
        self.heard: Callable[[Session, Frame], None] = _nothing
        self.lost: Callable[[Session], None] = _nothing
        self.refused: Callable[[Refusal | None], None] = _nothing  # when it is repeated; None: it was taken


class Session(BrokerSession):
    """One connection to a broker, from CONNECTED to its loss. `Carrier.native` gives the one that sends: its `request`
    has the broker do what Quintet has no word for. Do not keep it: the next connection has another one."""

    def __init__(self, link: Link, profile: Profile, subscribed: dict[str, Subscribed], clock: Clock) -> None:
        super().__init__(link)
        self.server = ""
        self.version = ""
        self.beats = (0.0, 0.0)
        self.dialect = DIALECTS["activemq"]
        self._profile = profile
        self._subscribed = subscribed
        self._clock = clock
        self._parser = Parser()
        self._loop = asyncio.get_running_loop()
        self._greeted: asyncio.Future[Frame] = self._loop.create_future()
        self._receipts: dict[str, Callable[[Exception | None], None]] = {}
        self._count = 0
        self._ways: dict[Channel, Way] = {}
        self._waiting: deque[_Unit] = deque()
        self._commits = 0
        self._flushing = False
        self._scheduler: asyncio.Future[bool] | None = None
        self._asking: Handle | None = None
        self._reason: Refusal | None = None  # that the broker gave when it hung up
        self._answered = True
        self._gone: Exception | None = None  # why it is over
        self._repeating: dict[str, asyncio.Task[None]] = {}  # subscriptions that were refused

    def __repr__(self) -> str:
        return f"<session with {self.server or 'a broker'}, STOMP {self.version or '?'}>"

    async def request(self, command: str, headers: Mapping[str, str], body: bytes = b"") -> None:
        """Writes any frame and waits for its receipt. Raises Refusal where the broker answers with an error, and Lost
        where the connection broke before it answered."""
        if self._gone is not None:
            raise self._gone
        done: asyncio.Future[None] = self._loop.create_future()
        receipt = self._receipt(partial(_resolve, done))
        self.link.write(encode(self.version, command, {**headers, "receipt": receipt}, body))
        try:
            await done
        except Lost as lost:
            raise self._reason or lost from None

    # what connections call

    async def greet(self) -> None:
        heartbeat, address = self._profile.heartbeat, self._profile.address
        beat = str(int(heartbeat * 1000))
        headers = {
            "accept-version": ",".join(VERSIONS),
            "host": address.path[1:] or "/",
            "heart-beat": f"{beat},{beat}",
        }
        user, password = credentials(address)
        if user:
            headers |= {"login": user, "passcode": password}
        self.link.write(encode("", "CONNECT", headers))
        connected = await self._greeted
        self.version = self._parser.version
        self.server = connected.headers.get("server", "")
        self.dialect = self._recognize()
        self.beats = agree_beats((heartbeat, heartbeat), connected.headers.get("heart-beat", ""))
        if self.beats[0]:
            self.link.beat(self.beats[0] / 2, BEAT)  # brokers allow no delay on the way
        if heartbeat:
            self.link.expect(max(self.beats[1], heartbeat) * SILENT_BEATS)
            self._ask_later()
        for subscribed in list(self._subscribed.values()):
            await self._repeat(subscribed)

    def _recognize(self) -> Dialect:
        """Whose STOMP it is. Raises Refused where nobody knows."""
        found = (one for one in DIALECTS.values() if self.server.startswith(one.server))
        dialect = self._profile.dialect or next(found, None)
        if dialect is None:
            raise Refused(
                f"{self._profile.address}: {self.server or 'a broker that does not say what it is'} is none that"
                f" Quintet knows: say ?dialect={' or ?dialect='.join(DIALECTS)}, whichever it resembles"
            )
        return dialect

    def received(self, data: bytes) -> bool:
        whole = False
        for frame in self._parser.feed(data):
            command, headers = frame.command, frame.headers
            whole = True
            if self._reason is not None:
                break  # RabbitMQ's ERROR may be followed by the RECEIPT of the very frame that failed
            if command == "MESSAGE":
                subscribed = self._subscribed.get(headers.get("subscription", ""))
                if subscribed is not None:
                    subscribed.heard(self, frame)
            elif command == "RECEIPT":
                answered = self._receipts.pop(headers.get("receipt-id", ""), None)
                if answered is not None:
                    answered(None)
            elif command == "ERROR":
                self._refused(frame)
            elif command == "CONNECTED" and not self._greeted.done():
                self._greeted.set_result(frame)
        return whole or self.link.full  # while we send at length the broker has nothing to answer

    def _ask_later(self) -> None:
        self._asking = self._clock.call_at(self._clock.now() + self._profile.heartbeat, self._ask)

    def _ask(self) -> None:
        """Has the broker answer something: a connection that brings a byte now and then would pass for a live one, as
        a heart-beat is no more than that."""
        self._ask_later()
        if self._answered:
            self._answered = False
            receipt = self._receipt(self._answers)
            self.link.write(f"BEGIN\ntransaction:q\n\n\0ABORT\ntransaction:q\nreceipt:{receipt}\n\n\0".encode())

    def _answers(self, _: Exception | None) -> None:
        self._answered = True

    def _refused(self, frame: Frame) -> None:
        refusal = Refusal(frame)
        answered = self._receipts.pop(frame.headers.get("receipt-id", ""), None)
        if answered is not None:
            answered(refusal)
        elif not self._greeted.done():
            self._greeted.set_exception(Refused(f"{self._profile.address}: the broker refuses us: {refusal}"))
        elif self.dialect.hangs_up:
            self._reason = refusal  # it does not say of what, so that only who waits alone may take it for their own
            self.link.drop(Lost(str(refusal)))

    def lost(self, error: Exception) -> None:
        if not isinstance(error, QuintetError):  # the socket's own: whoever waits for a receipt is to get one of ours
            error = Lost(str(error) or type(error).__name__)
        self._gone = error
        if self._asking is not None:
            self._asking.cancel()
        for task in self._repeating.values():
            task.cancel()
        if not self._greeted.done():
            self._greeted.cancel()
        receipts, self._receipts = self._receipts, {}
        for answered in receipts.values():
            answered(error)
        for unit in self._waiting:
            if not unit.done.done():
                unit.done.set_exception(Unwritten())
        self._waiting.clear()
        if self._scheduler is not None and not self._scheduler.done():
            self._scheduler.set_result(False)
        for subscribed in self._subscribed.values():
            if subscribed.session is self:
                subscribed.session = None
                subscribed.lost(self)

    async def farewell(self) -> None:
        await self.request("DISCONNECT", {})

    async def _repeat(self, subscribed: Subscribed) -> None:
        """Subscribes as on the connection before. What is refused is tried again later, and keeps no other from being
        served."""
        try:
            await self.subscribe(subscribed)
        except Refusal as refusal:
            if self.dialect.hangs_up:
                raise
            subscribed.session = None
            subscribed.refused(refusal)
            self._repeating[subscribed.id] = self._loop.create_task(self._repeat_later(subscribed))
        else:
            subscribed.refused(None)

    async def _repeat_later(self, subscribed: Subscribed) -> None:
        await self._clock.sleep(REFUSED_PAUSE)
        if self._subscribed.get(subscribed.id) is subscribed:
            with contextlib.suppress(TransportError):  # the connection is lost: the next one repeats it
                await self._repeat(subscribed)

    # what the carrier calls

    async def subscribe(self, subscribed: Subscribed) -> None:
        subscribed.session = self
        if subscribed.headers is not None:
            await self.request("SUBSCRIBE", {"id": subscribed.id} | subscribed.headers)

    def way(self, channel: Channel, group: str = "") -> Way:
        """How a message is sent to the channel; with a group: to it alone."""
        found = None if group else self._ways.get(channel)
        if found is None:
            dialect = self.dialect
            headers = {"destination": destination(dialect, channel, group)}
            if channel.durable:
                headers["persistent"] = "true"
            headers |= native_of(channel.native, Publish, _PUBLISH).written
            found = Way(header_lines(self.version, headers), channel.durable, channel.temporary, channel.keyed)
            if not group:
                if len(self._ways) >= WAYS_KEPT:  # the callers of a service come and go
                    self._ways.clear()
                self._ways[channel] = found
        return found

    def send(self, way: Way, headers: dict[str, str], body: bytes) -> None:
        """Writes a message and asks for no receipt. Raises ValueError."""
        self.link.write(b"SEND\n" + self._encode(way, headers, body))

    def _encode(self, way: Way, headers: Mapping[str, str], body: bytes) -> bytes:
        """A SEND from behind its command on. Raises ValueError for what the version or the broker cannot take."""
        data = encode_rest(self.version, "SEND", headers, body, way.written)
        size = len(data) - len(body)
        if size > SHORT_HEAD or not headers.keys().isdisjoint(self.dialect.refused):
            check(self.dialect, headers, data[:size])
        return data

    def waiting_room(self, channel: Channel, group: str, after: float) -> Way:
        """How a message is sent that the channel's group is to get after so many seconds, without a scheduler."""
        headers = waiting_room(self.dialect, channel, group, after)
        return Way(header_lines(self.version, headers), durable=True, temporary=False, keyed=False)

    def acknowledge(self, headers: Mapping[str, str]) -> None:
        self.link.write(f"ACK\n{self.ack(headers)}\n\0".encode())

    def _fit(self, headers: dict[str, str]) -> dict[str, str]:
        """The headers of a copy, which must not fail: 1.0 has no line breaks and no colons in names."""
        if self.version == "1.0":
            headers = {name: text.replace("\n", " ") for name, text in headers.items() if not {":", "\n"} & {*name}}
        return cut(self.dialect, headers)

    def ack(self, headers: Mapping[str, str]) -> str:
        """The lines by which an ACK names a delivery."""
        version = self.version
        if version == "1.2":
            return f"id:{escape(headers.get('ack', ''), version)}\n"
        message = f"message-id:{escape(headers.get('message-id', ''), version)}\n"
        if version == "1.0":
            return message
        return f"{message}subscription:{escape(headers.get('subscription', ''), version)}\n"

    def together(
        self, way: Way, headers: dict[str, str], body: bytes, *, ack: str = "", alone: bool = False, copy: bool = False
    ) -> asyncio.Future[None]:
        """Sends a message, acknowledges a delivery if and when that is certain, and tells when it is.

        Where the broker has transactions, all that is only sent goes into one: it costs one write to the disk. `alone`:
        no transaction will do. `copy`: it must be taken, so its headers are cut where they are over a limit; others
        raise ValueError then. The future fails with Refusal, Lost or Unwritten.
        """
        try:
            data = self._encode(way, headers, body)
        except ValueError:
            if not copy:
                raise
            data = self._encode(way, self._fit(headers), body)
        unit = _Unit(data, self._loop.create_future(), ack, alone)
        if self._gone is not None:
            unit.done.set_exception(Unwritten())
        else:
            self._waiting.append(unit)
            self._flush_soon()
        return unit.done

    def _flush_soon(self) -> None:
        if not self._flushing and self._commits < COMMITS:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        waiting, transactions = self._waiting, self.dialect.transactions
        units: list[_Unit] = []
        size = 0
        while waiting and size < TOGETHER_BYTES and len(units) < TOGETHER:
            unit = waiting.popleft()
            if unit.done.done():  # its sender waits no longer: it is not sent
                continue
            if unit.alone or not transactions:
                self._single(unit)
            elif unit.ack:
                self._exchange(unit)
            else:
                units.append(unit)
                size += len(unit.data)
        if units:
            self._commits += 1
            self._commit(units)
        if waiting:
            self._flush_soon()

    def _single(self, unit: _Unit) -> None:
        """Sends, and acknowledges once that is certain."""

        def answered(error: Exception | None) -> None:
            if error is None and unit.ack:
                self.link.write(f"ACK\n{unit.ack}\n\0".encode())
            _resolve(unit.done, error)

        self._send(unit, f"receipt:{self._receipt(answered)}\n")

    def _exchange(self, unit: _Unit) -> None:
        """Sends and acknowledges in one transaction; what is refused is not acknowledged, for that cannot be undone."""

        def answered(error: Exception | None) -> None:
            if error is None:
                self.link.write(f"ACK\n{unit.ack}{within}\n\0".encode())
                end = f"COMMIT\n{within}receipt:{self._receipt(partial(_resolve, unit.done))}\n\n\0"
            else:
                _resolve(unit.done, error)
                end = f"ABORT\n{within}\n\0"
            self.link.write(end.encode())

        receipt = self._receipt(answered)
        within = f"transaction:t{receipt}\n"
        self.link.write(f"BEGIN\n{within}\n\0".encode())
        self._send(unit, f"{within}receipt:{receipt}\n")

    def _commit(self, units: list[_Unit]) -> None:
        """Sends them in one transaction."""

        def answered(error: Exception | None) -> None:
            self._commits -= 1
            if isinstance(error, Refusal) and len(units) > 1:  # one of them is at fault, and it undid them all
                for unit in units:
                    if not unit.done.done():
                        self._commits += 1
                        self._commit([unit])
            else:
                for unit in units:
                    _resolve(unit.done, error)
            if self._waiting:
                self._flush_soon()

        receipt = self._receipt(answered)
        if len(units) == 1:
            self._send(units[0], f"receipt:{receipt}\n")
            return
        within = f"transaction:t{receipt}\n"
        self.link.write(f"BEGIN\n{within}\n\0".encode())
        for unit in units:
            self._send(unit, within)
        self.link.write(f"COMMIT\n{within}receipt:{receipt}\n\n\0".encode())

    def _send(self, unit: _Unit, line: str) -> None:
        self.link.write(b"SEND\n" + line.encode())
        self.link.write(unit.data)

    def _receipt(self, answered: Callable[[Exception | None], None]) -> str:
        self._count += 1
        receipt = str(self._count)
        self._receipts[receipt] = answered
        return receipt

    async def delays(self) -> bool:
        """Whether this broker delays messages: known by a message to ourselves, for it says so nowhere else."""
        if not self.dialect.scheduler:
            return False
        if self._scheduler is None:
            known = self._scheduler = self._loop.create_future()
            where = {"destination": f"{self.dialect.replies}probe"}
            probe = Subscribed("probe", where | {"ack": "auto"})

            def heard(_: Session, frame: Frame) -> None:
                if not known.done():
                    known.set_result("scheduledJobId" in frame.headers)
                    self._subscribed.pop(probe.id, None)

            probe.heard = heard
            self._subscribed[probe.id] = probe
            await self.subscribe(probe)
            self.link.write(encode(self.version, "SEND", where | {DELAY: "1"}))
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                return await asyncio.shield(self._scheduler)
        except TimeoutError:
            if not self._scheduler.done():
                self._scheduler.set_result(False)
            return False


def _resolve(future: asyncio.Future[None], error: Exception | None) -> None:
    if not future.done():
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


def _nothing(*_: object) -> None:
    """What there is to do until somebody wants to know."""
