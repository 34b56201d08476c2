"""STOMP, to ActiveMQ Classic and to RabbitMQ's plugin (how a message looks there: `wire/stomp_message.py`).

Everything is sent over one connection, and what is served comes over another, so that a broker that will not take more
does not keep acknowledgements from being read. Replies come over the one that their requests went out by.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import ClassVar, Final, Literal, TypeAlias

from msgspec import Struct, structs

from quintet.clock import SYSTEM, Clock, Handle
from quintet.connection import TLS_OPTIONS, Connection, Lost, tls_if
from quintet.dead_letters import DEAD_LETTERS, letter, revive
from quintet.errors import (
    AddressError,
    CallError,
    ChannelFull,
    ConfigurationError,
    ConnectionLost,
    InvalidMessage,
    QuintetError,
    TransportError,
    Unavailable,
)
from quintet.intake import Intake
from quintet.message import Channel, Message, native_of, new_id
from quintet.transport import DONE, Address, DeadLetter, Finding, Receive, Trait, Transport, Verdict
from quintet.wire.names import DEAD, FIELDS
from quintet.wire.stomp import Frame
from quintet.wire.stomp_message import (
    CRASHED,
    DIALECTS,
    GONE,
    MARK,
    TEMPORARY,
    Dialect,
    Publish,
    Subscription,
    crashes,
    destination,
    headers_of,
    message_of,
    subscription,
)
from quintet.wire.stomp_session import DELAY, Profile, Refusal, Session, Subscribed, Unwritten, Way

__all__ = ["Carrier", "Publish", "Subscription"]

PORT, TLS_PORT = 61613, 61614
HEARTBEAT = 5.0  # seconds, unless ?heartbeat= says otherwise
REFUSED_PAUSE = 1.0  # seconds until a copy that the broker refused is sent again
UNSUBSCRIBE_SECONDS = 2.0  # that a broker may take for it; then it goes with the connection

KEYED_PREFETCH: Final = 4  # times the limit: what waits behind its key must not keep the others from coming
BEGUN_KEPT = 1000  # ids of deliveries that are remembered, to know those that a restarted broker brings again
LETTERS_READ = 10_000  # dead letters that are looked at, the oldest
LETTERS_SECONDS = 10.0  # that another process may keep us from looking
LETTERS_PAUSE = 0.05  # seconds until it is tried again
LETTERS_NUDGE = 0.05  # seconds without another letter until the broker is nudged to bring more
SHORTEST_WAIT = 0.02  # seconds of delay that are not worth a queue of their own

_SUBSCRIPTION, _PUBLISH = Subscription(), Publish()


class _Line:
    """A connection that comes back, and what is subscribed to on it."""

    def __init__(self, carrier: Carrier, *, alone: bool = False) -> None:
        """`alone`: it has one subscription, and ends with it."""
        self.carrier = carrier
        self.alone = alone
        self.subscribed: dict[str, Subscribed] = {}
        secured = carrier.address.scheme.endswith("s")
        self.connection = Connection(
            carrier.address,
            TLS_PORT if secured else PORT,
            lambda link: Session(link, carrier.profile, self.subscribed, carrier.clock),
            carrier.clock,
            partial(carrier.told, self),
            secured=tls_if(secured, carrier.address),
        )

    async def close(self) -> None:
        self.carrier.closed(self)
        await self.connection.close()

    async def subscribe(self, subscribed: Subscribed) -> None:
        """Returns once the broker has confirmed it; it is repeated on each new connection. Raises Refusal."""
        self.subscribed[subscribed.id] = subscribed
        try:
            while subscribed.session is not (session := await self.connection.ready(None)):
                with contextlib.suppress(Lost):
                    await session.subscribe(subscribed)
        except BaseException:
            self.subscribed.pop(subscribed.id, None)
            raise

    async def unsubscribe(self, subscribed: Subscribed) -> None:
        self.subscribed.pop(subscribed.id, None)
        session, subscribed.session = subscribed.session, None
        if session is not None and subscribed.headers is not None:
            with contextlib.suppress(TransportError, TimeoutError):  # gone, and the subscription with it
                async with asyncio.timeout(UNSUBSCRIBE_SECONDS):
                    await session.request("UNSUBSCRIBE", {"id": subscribed.id})


# One channel that is served


class _Delivery(Struct, eq=False):
    """A message as it came, and the session that is to hear what became of it."""

    headers: dict[str, str]
    body: bytes
    session: Session | None
    broken: int = 0  # 1: whoever had it before did not end
    copy: Message | None = None  # what is handed out instead: the next attempt, of a message that has no queue


Copy: TypeAlias = tuple[Way, dict[str, str], bytes]
"""A message that is to be sent in the place of a delivery: how, its headers, its body."""


class _Serving:
    """A channel that is received: the Source of its Intake."""

    def __init__(
        self,
        carrier: Carrier,
        line: _Line,
        subscribed: Subscribed,
        channel: Channel,
        receive: Receive,
        group: str,
        limit: int,
    ) -> None:
        self.carrier = carrier
        self.line = line
        self.channel = channel
        self.group = group
        self.subscribed = subscribed
        subscribed.heard, subscribed.lost = self._heard, self._lost
        self.intake: Intake[_Delivery] = Intake(self, receive, group, limit, carrier.clock, keyed=channel.keyed)
        self._acknowledges = not channel.replies
        self._temporary = channel.temporary  # it has no queue that a copy could be sent to
        self._keyed = channel.keyed  # and a copy would lose its place
        self._begun: deque[str] = deque(maxlen=BEGUN_KEPT)
        self._suspects: frozenset[str] = frozenset()
        self._timers: set[Handle] = set()
        self._leaving = False

    def __repr__(self) -> str:
        return f"<serving {self.channel.name} as {self.group or 'its one receiver'}: {self.intake!r}>"

    def _heard(self, session: Session, frame: Frame) -> None:
        headers = frame.headers
        delivery = _Delivery(headers, frame.body, session)
        if self._acknowledges and (
            headers.get("redelivered") == "true"
            or (self._suspects and headers.get("message-id", "") in self._suspects)  # of a broker that has forgotten it
        ):
            delivery.broken = 1
            if not (self._keyed or self._temporary or self._leaving):
                self._recount(session, delivery)
                return
        self.intake.put(delivery, headers.get(FIELDS["key"], "") if self._keyed else "")

    def _recount(self, session: Session, delivery: _Delivery) -> None:
        """Its receiver went away in the midst of it, and the broker does not count that: a copy that does takes its
        place, before anyone begins, or what kills its receivers would do so for ever."""
        copy = self.read(delivery)
        more = {CRASHED: str(self.crashed(delivery))}
        self._settle(session, self._copy(session, copy, more), session.ack(delivery.headers))

    def _settle(self, session: Session, copy: Copy, ack: str, alone: bool = False) -> asyncio.Future[None]:
        """Sends a copy in the place of a delivery. What the broker refuses now it may take later: until then the
        delivery is not acknowledged."""

        def settled(outcome: asyncio.Future[None]) -> None:
            if not outcome.cancelled() and isinstance(outcome.exception(), Refusal):
                self._later(REFUSED_PAUSE, lambda: self._settle(session, copy, ack, alone))

        settling = session.together(*copy, ack=ack, alone=alone, copy=True)
        settling.add_done_callback(settled)
        return settling

    def _copy(self, session: Session, copy: Message, more: dict[str, str]) -> Copy:
        way = session.way(self.channel, self.group)
        return way, self.carrier.headers(copy, session, way) | more, copy.body

    def _lost(self, session: Session) -> None:
        if not self._temporary:
            self._drop_timers()
        self._suspects = frozenset(self._begun)
        self.intake.forget(lambda delivery: delivery.session is session)

    def _later(self, after: float, act: Callable[[], object]) -> None:
        def due() -> None:
            self._timers.discard(timer)
            act()

        timer = self.carrier.clock.call_at(self.carrier.clock.now() + after, due)
        self._timers.add(timer)

    def _drop_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    # Source

    def read(self, delivery: _Delivery) -> Message:
        if delivery.copy is not None:
            return structs.replace(delivery.copy, headers=delivery.copy.headers.copy())
        headers = delivery.headers
        if self._acknowledges:
            self._begun.append(headers.get("message-id", ""))
        message = message_of(headers, delivery.body, self.channel, self.carrier.clock)
        message.attempt += delivery.broken
        return message

    def crashed(self, delivery: _Delivery) -> int:
        return crashes(delivery.headers) + delivery.broken

    def done(self, delivery: _Delivery) -> None:
        if self._acknowledges and delivery.session is not None:
            delivery.session.acknowledge(delivery.headers)

    async def again(self, delivery: _Delivery, copy: Message, after: float) -> None:
        session = delivery.session
        if self._temporary or session is None:
            self.done(delivery)
            waiting = _Delivery({}, copy.body, None, copy=copy)
            self._later(after, lambda: self.intake.put(waiting, copy.key if self._keyed else ""))
            return
        ack = session.ack(delivery.headers)
        with contextlib.suppress(TransportError, Unwritten):
            if after < SHORTEST_WAIT:
                await self._settle(session, self._copy(session, copy, {}), ack)
            elif not session.dialect.scheduler:
                _, headers, body = self._copy(session, copy, {})
                await self._settle(session, (session.waiting_room(self.channel, self.group, after), headers, body), ack)
            elif await session.delays():
                # in a transaction it would be scheduled behind the commit: a crash between the two would lose it
                delayed = self._copy(session, copy, {DELAY: str(int(after * 1000))})
                await self._settle(session, delayed, ack, alone=True)
            else:
                ready = self._copy(session, copy, {})
                self._later(after, lambda: self._settle(session, ready, ack))

    async def dead(self, delivery: _Delivery, copy: Message) -> None:
        session = delivery.session
        if self._temporary or session is None:
            copy.headers[GONE] = "yes"
            with contextlib.suppress(CallError):
                await self.carrier.send(copy, copy=True)
                self.done(delivery)
            return
        way = session.way(DEAD_LETTERS)
        headers = self.carrier.headers(copy, session, way)
        with contextlib.suppress(TransportError, Unwritten):
            await self._settle(session, (way, headers, copy.body), session.ack(delivery.headers))

    def give_back(self, delivery: _Delivery) -> None:
        """It stays as it is until the subscription ends, for to free its place here would bring another one."""

    # Ending

    async def stop(self) -> None:
        try:
            await self.intake.stop()
        finally:
            self._leaving = True
            self._drop_timers()
            self.carrier.ended(self)
            if self.line.alone:
                await self.line.close()
            else:
                await self.line.unsubscribe(self.subscribed)

    async def abort(self) -> None:
        """Its line is closed next, which gives back what was not settled."""
        self._leaving = True
        self._drop_timers()
        await self.intake.abort()


# The transport


async def _unused(_: Message) -> Verdict:
    return DONE


class Carrier(Transport):
    """`stomp://[user:password@]host[:61613][,host...][/vhost]`, `stomps://` with TLS (61614), with these options:

    dialect=activemq    or rabbitmq: whose STOMP it is, where the broker does not say so itself
    heartbeat=5         seconds between two signs of life, both ways; twice that is silence and the end of a connection
    ca, cert, certkey, verify: how TLS is secured (`connection.py`)
    """

    traits: ClassVar[frozenset[Trait]] = frozenset(
        {Trait.FANOUT, Trait.DURABLE, Trait.REDELIVERS, Trait.DELAYS, Trait.ORDERED}
    )
    options: ClassVar[frozenset[str]] = TLS_OPTIONS | {"dialect", "heartbeat"}

    def __init__(self, address: Address, clock: Clock = SYSTEM) -> None:
        super().__init__(address, clock)
        heartbeat = address.option("heartbeat", HEARTBEAT)
        if not 0 <= heartbeat < 3600:
            raise AddressError(f"{address}: option heartbeat must be a number of seconds, 0 for none")
        name = address.options.get("dialect", "")
        if name and name not in DIALECTS:
            raise AddressError(f"{address}: option dialect={name!r} must be {' or '.join(DIALECTS)}")
        self.profile = Profile(address, heartbeat, DIALECTS.get(name))
        self._take_traits(self.profile.dialect)
        self._out = _Line(self)
        self._in: _Line | None = None
        self._opening = asyncio.Lock()
        self._lines: list[_Line] = [self._out]
        self._away: set[_Line | _Serving] = set()
        self._servings: list[_Serving] = []
        self._replies: dict[str, str] = {}
        self._numbers = itertools.count(1)

    async def open(self) -> None:
        await self._out.connection.open()
        self._take_traits((await self._out.connection.ready(None)).dialect)

    def _take_traits(self, dialect: Dialect | None) -> None:
        if dialect is not None and not dialect.key:
            vars(self)["traits"] = type(self).traits - {Trait.ORDERED}  # this instance's own

    async def close(self) -> None:
        """Cancels what is still in work; it goes back to its channel."""
        self._away.clear()
        servings, self._servings = self._servings, []
        await asyncio.gather(*(serving.abort() for serving in servings))
        await asyncio.gather(*(line.close() for line in list(self._lines)))

    @property
    def connected(self) -> bool:
        return not self._away

    @property
    def native(self) -> Session:
        """The connection that sends: `await transport.native.request("SEND", {"destination": ...}, body)`."""
        session = self._out.connection.session
        if session is None:
            raise Unavailable(f"{self!r} is not connected to its broker")
        return session

    async def examine(self) -> Sequence[Finding]:
        session = await self._out.connection.ready(None)
        ours, theirs = session.beats
        findings = [
            Finding("broker", f"{session.server or 'does not say what it is'}, taken for {session.dialect.name}"),
            Finding("protocol", f"STOMP {session.version}"),
            Finding(
                "heart-beats", f"every {ours:g} s from here, every {theirs:g} s from the broker", bool(ours and theirs)
            ),
        ]
        if not session.dialect.scheduler:
            says = "in a queue for each delay, which the broker keeps"
            findings.append(Finding("delayed redelivery", says))
        elif await session.delays():
            findings.append(Finding("delayed redelivery", "by the broker's scheduler"))
        else:
            says = (
                "its scheduler is off: what is to come again waits in this process, which must hold it until then;"
                ' write schedulerSupport="true" at <broker> in activemq.xml'
            )
            findings.append(Finding("delayed redelivery", says, well=False))
        return findings

    # Sending

    async def send(self, message: Message, *, copy: bool = False) -> None:
        """`copy`: of a delivery, whose headers are cut where the broker would not take them."""
        connection = self._out.connection
        while True:
            session = connection.session
            if session is None:
                session = await connection.ready(message.deadline if message.until is None else message.until)
            try:
                if session.link.full:
                    await session.link.room()
                way = session.way(message.channel)
                headers = self.headers(message, session, way)
                if way.temporary or (message.reply_to and not way.durable):
                    session.send(way, headers, message.body)  # whoever waits for a reply needs no receipt beside it
                    return None
                confirmed = session.together(way, headers, message.body, copy=copy)
            except (TransportError, OSError):
                continue  # the socket broke: on the next connection there is room
            except ValueError as error:
                raise InvalidMessage(f"{message.channel.name}: {error}") from error
            try:
                return await confirmed
            except Unwritten:
                continue  # nothing of it was written: it goes out on the next connection, if that comes in time
            except QuintetError as error:
                raise _failure(error, message) from error

    def headers(self, message: Message, session: Session, way: Way) -> dict[str, str]:
        """A message's headers, those of its own options among them."""
        headers = headers_of(message, session.dialect, self.clock, durable=way.durable, keyed=way.keyed)
        reply_to = message.reply_to
        if reply_to:
            if not reply_to.startswith("/"):
                reply_to = self._replies.get(reply_to) or TEMPORARY + session.dialect.in_path(reply_to)
            headers["reply-to"] = reply_to
        if message.native:
            headers |= native_of(message.native, Publish, _PUBLISH).written
        return headers

    # Serving

    async def serve(self, channel: Channel, receive: Receive, group: str, limit: int = 100) -> _Serving:
        dialect = (await self._out.connection.ready(None)).dialect
        options = native_of(channel.native, Subscription, _SUBSCRIPTION)
        where = f"{channel.name} at {self.address}: {dialect.name}'s STOMP"
        if options.selector and not dialect.selectors:
            raise ConfigurationError(f"{where} has no selectors: receive all, and pass over what you do not want")
        if options.exclusive and not dialect.exclusive:
            raise ConfigurationError(f"{where} has no exclusive receivers: run one, or take another address (amqp://)")
        number = str(next(self._numbers))
        if channel.replies:
            place = self._replies[channel.name] = f"{dialect.replies}{number}"
            headers = {"destination": place, "ack": "auto"}
            line = self._out
            subscribed = Subscribed(number, headers) if dialect.replies_subscribed else Subscribed(place, None)
        else:
            keyed = KEYED_PREFETCH if channel.keyed else 1
            headers = subscription(dialect, channel, group)
            headers |= {"ack": "client-individual", dialect.prefetch: str(options.prefetch or limit * keyed)}
            if options.selector:
                headers["selector"] = options.selector
            if options.exclusive:
                headers |= dialect.exclusive
            line = await self._line(dialect)
            subscribed = Subscribed(number, headers | dict(options.headers))
        serving = _Serving(self, line, subscribed, channel, receive, group if channel.fanout else "", limit)
        subscribed.refused = partial(self.refused, serving)
        self._servings.append(serving)
        try:
            await line.subscribe(subscribed)
        except BaseException as error:
            await serving.abort()
            self.ended(serving)
            if line.alone:
                await line.close()
            if isinstance(error, Refusal):
                raise TransportError(f"{self.address}: {_refused(channel, error)}") from error
            raise
        return serving

    async def listen(self, channel: Channel, arrived: Callable[[Message], None]) -> _Serving:
        """Takes replies as they come: nothing of them is acknowledged, so they need no queue and no task."""
        serving = await self.serve(channel, _unused, "")
        serving.subscribed.heard = lambda _, frame: arrived(serving.read(_Delivery(frame.headers, frame.body, None)))
        return serving

    async def _line(self, dialect: Dialect) -> _Line:
        """What a channel is received over: a line for all, unless only its end gives back what was not handled."""
        if not dialect.unsubscribe_returns:
            return await self._open_line(alone=True)
        async with self._opening:
            if self._in is None:
                self._in = await self._open_line()
            return self._in

    async def _open_line(self, *, alone: bool = False) -> _Line:
        line = _Line(self, alone=alone)
        await line.connection.open()
        self._lines.append(line)
        return line

    def ended(self, serving: _Serving) -> None:
        if serving in self._servings:
            self._servings.remove(serving)
        self.told(serving, "broker-back", str(self.address))
        self._replies.pop(serving.channel.name, None)

    def closed(self, line: _Line) -> None:
        if line in self._lines:
            self._lines.remove(line)
        self.told(line, "broker-back", str(self.address))  # what is not wanted any more is not missed

    def refused(self, serving: _Serving, refusal: Refusal | None) -> None:
        """The broker is back, and will not let us receive a channel; None: now it does."""
        if refusal is None:
            self.told(serving, "broker-back", str(self.address))
        else:
            self._away.add(serving)
            self.tell("broker-lost", str(self.address), _refused(serving.channel, refusal))

    def told(
        self,
        who: _Line | _Serving,
        kind: Literal["broker-lost", "broker-back"],
        subject: str,
        reason: object = "",
    ) -> None:
        """Tells of the broker, not of each connection."""
        before = bool(self._away)
        if kind == "broker-lost":
            self._away.add(who)
        else:
            self._away.discard(who)
        if bool(self._away) != before:
            self.tell(kind, subject, reason)

    # Letters

    async def dead(self, channel: str | None = None) -> Sequence[DeadLetter]:
        found: list[DeadLetter] = []
        async with self._letters() as letters:
            while (frame := await letters.next()) is not None:
                shown = letter(letters.read(frame))
                if channel in (None, shown.channel):
                    found.append(shown)
        return found

    async def replay(self, ids: Sequence[str]) -> int:
        wanted, settled = set(ids), list[asyncio.Future[None]]()
        async with self._letters() as letters:
            while wanted and (frame := await letters.next()) is not None:
                message = letters.read(frame)
                if (id_ := letter(message).id) in wanted and GONE not in message.headers:
                    wanted.discard(id_)
                    settled.append(self._revive(letters.session, message, frame))
            return sum(error is None for error in await asyncio.gather(*settled, return_exceptions=True))

    def _revive(self, session: Session, message: Message, frame: Frame) -> asyncio.Future[None]:
        revived, group = revive(message)
        revived.channel = structs.replace(revived.channel, keyed=bool(revived.key))
        way = session.way(revived.channel, group)
        headers = self.headers(revived, session, way)
        return session.together(way, headers, revived.body, ack=session.ack(frame.headers), copy=True)

    async def drop(self, ids: Sequence[str]) -> int:
        wanted, count = set(ids), 0
        async with self._letters() as letters:
            while wanted and (frame := await letters.next()) is not None:
                if (id_ := letter(letters.read(frame)).id) in wanted:
                    wanted.discard(id_)
                    letters.session.acknowledge(frame.headers)
                    count += 1
        return count

    @contextlib.asynccontextmanager
    async def _letters(self) -> AsyncGenerator[_Letters]:
        line = await self._line_of_letters()
        try:
            letters = _Letters(line)
            await letters.open()
            yield letters
        finally:
            await line.close()  # which gives back what was not taken, in its place

    async def _line_of_letters(self) -> _Line:
        """A line that looks at the dead letters alone, as far as the queue itself does not see to that."""
        lock = (await self._out.connection.ready(None)).dialect.dead_lock
        give_up = self.clock.now() + LETTERS_SECONDS
        while True:
            line = await self._open_line(alone=True)
            if not lock:
                return line
            queue = {"durable": "false", "auto-delete": "true", "exclusive": "true"}
            try:
                await line.subscribe(Subscribed("lock", {"destination": lock, "ack": "auto"} | queue))
            except BaseException as error:
                await line.close()
                if not isinstance(error, Refusal) or self.clock.now() > give_up:
                    raise
                await self.clock.sleep(LETTERS_PAUSE)
            else:
                return line


class _Letters:
    """The dead letters as they lie, oldest first, held by this process until its line is closed.

    Browsing is no use: ActiveMQ shows 400 and no more, its selectors see no further, and RabbitMQ's plugin has neither.
    """

    def __init__(self, line: _Line) -> None:
        self._line = line
        self._mark = new_id()
        self._marks = 0  # sent
        self._last = 0  # the mark that is the end, where no letter comes before it
        self._came: asyncio.Queue[Frame | None] = asyncio.Queue()
        self._left = LETTERS_READ
        self.session: Session

    async def open(self) -> None:
        dialect = (await self._line.connection.ready(None)).dialect
        headers = {"destination": destination(dialect, DEAD_LETTERS), "ack": "client-individual"}
        headers |= {dialect.prefetch: str(LETTERS_READ), **dialect.exclusive}
        subscribed = Subscribed("letters", headers)
        subscribed.heard = lambda _, frame: self._came.put_nowait(frame)
        subscribed.lost = lambda _: self._came.put_nowait(None)
        await self._line.subscribe(subscribed)
        assert subscribed.session is not None  # noqa: S101
        self.session = subscribed.session
        self._send_mark()

    def _send_mark(self) -> None:
        carrier, session = self._line.carrier, self.session
        mark = Message(channel=Channel(DEAD), headers={}, deadline=carrier.clock.now() + LETTERS_SECONDS)
        way = session.way(mark.channel)
        self._marks += 1
        session.send(way, carrier.headers(mark, session, way) | {MARK: f"{self._mark} {self._marks}"}, b"")

    async def next(self) -> Frame | None:
        """The next one; None behind the last. Raises TransportError.

        ActiveMQ lets a mark overtake letters that it still has on disk only, so that one mark alone proves nothing: the
        end is one that was sent after another had come, with no letter between them."""
        while self._left:
            frame = await self._next_frame()
            if frame is None:
                address = self._line.carrier.address
                raise TransportError(f"{address}: the connection broke while the dead letters were read; try again")
            owner, _, number = frame.headers.get(MARK, "").partition(" ")
            if not owner:
                self._left -= 1
                self._last = 0
                return frame
            if owner == self._mark:
                self.session.acknowledge(frame.headers)
                if not self._last:
                    self._send_mark()
                    self._last = self._marks
                elif int(number) >= self._last:
                    break
        return None

    async def _next_frame(self) -> Frame | None:
        """What comes next. Of many letters ActiveMQ brings 200, and then none until something happens on the queue:
        so the mark is sent again."""
        carrier = self._line.carrier
        give_up = carrier.clock.now() + LETTERS_SECONDS
        while carrier.clock.now() < give_up:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LETTERS_NUDGE):
                    return await self._came.get()
            if self._left < LETTERS_READ:
                self._send_mark()
        if self._left == LETTERS_READ:
            raise TransportError(f"{carrier.address}: another process holds the dead letters; try again later")
        raise TransportError(f"{carrier.address}: the broker brings no more of its dead letters; try again later")

    def read(self, frame: Frame) -> Message:
        return message_of(frame.headers, frame.body, DEAD_LETTERS, self._line.carrier.clock)


def _refused(channel: Channel, refusal: Refusal) -> str:
    return f"the broker does not let us receive {channel.name}: {refusal}"


def _failure(error: QuintetError, message: Message) -> CallError:
    """The one door for what the broker, or its loss, makes of a message that was sent."""
    name = message.channel.name
    if not isinstance(error, Refusal):
        return ConnectionLost(f"{name}: sent, and then the connection broke before the broker confirmed it: {error}")
    if "ResourceAllocationException" in error.text or "is full" in error.text.lower():
        return ChannelFull(f"{name}: the broker has no room for it: {error}")
    return Unavailable(f"{name}: the broker refused it: {error}")
