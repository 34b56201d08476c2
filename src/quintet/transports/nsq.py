"""NSQ: a topic for each channel, one of NSQ's channels for each group, on all nsqds that an address leads to.

`nsq://host:4150,host2:4150` names the nsqds, `nsq+lookup://host:4161` the lookup daemons that know them. What is sent
goes to one nsqd, what is served is taken from all of them. docs/nsq.md has the names, so that any program takes part.

nsqd keeps what it has handed out, and what it delays, in memory only: a kill forgets both. So a delivery stays in work
here when its connection is lost, and a message that is to come again waits here, in flight, until its copy is on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, ClassVar, Final, Literal, Self, TypeAlias, TypeVar
from urllib.parse import urlencode, urlsplit

from msgspec import Struct, structs

from quintet.clock import SYSTEM, Clock, Handle
from quintet.connection import FAREWELL_SECONDS, TLS_OPTIONS, Connection, Refused, credentials, tls
from quintet.errors import (
    AddressError,
    CallError,
    ConfigurationError,
    QuintetError,
    TooLarge,
    TransportError,
    Unavailable,
)
from quintet.intake import Intake
from quintet.letters import letter, revive
from quintet.message import Channel, Message, Native, native_of, new_id
from quintet.transport import (
    Address,
    ChannelState,
    DeadLetter,
    Finding,
    Receive,
    Tell,
    Trait,
    Transport,
)
from quintet.wire import nsq as wire
from quintet.wire import nsq_http as http
from quintet.wire.names import DEAD, FAILED_AT
from quintet.wire.nsq_session import NSQ, Delivery, Denied, Profile, User

WORK: Final = "work"
"""NSQ's channel of a point-to-point channel's topic: whoever serves it shares it."""
LETTERS: Final = "letters"
"""NSQ's channel of the topic of dead letters."""
TEMPORARY: Final = ".temporary"
"""How topics and channels end that belong to one process; those that nobody holds any more are swept away."""
AGAIN: Final = ".again"
"""How the topic ends that brings a message once more to one group of an event, and to no other."""
NOBODY: Final = "nobody#ephemeral"
"""NSQ's channel in which an event's copy for nobody ends, or a topic without groups would keep it for the first."""
TAILS: Final = "quintet.tails"
"""The topic on which who watches says so, that new topics are shown to it from their first message on."""
MARK: Final = "quintet-mark"
"""The header of what the holder of a temporary channel sends to itself, to know what came before it."""

PORT, LOOKUP_PORT = 4150, 4161
HEARTBEAT = 5.0  # seconds between nsqd's signs of life, unless ?heartbeat= says otherwise
MSG_TIMEOUT = 5.0  # seconds after which nsqd gives a delivery to another when this process has died
REPLIES_IN_FLIGHT = 1000
ACCEPTED_STEP = 256
SYNC_MARGIN = 0.15  # seconds by which a topic may lag behind what it accepted
ACCEPTED_SECONDS, ACCEPTED_BYTES = (
    2.0 + SYNC_MARGIN,
    4 << 20,
)  # of what was accepted; nsqd's --sync-timeout is 2 s by default
LARGEST = 1 << 20  # bytes of a message: nsqd's default, where neither ?largest= nor nsqd tells
REMEMBERED = 25_000  # ids of settled messages, per generation: nsqd repeats some after a kill
POLL = 15.0  # seconds between two questions to the lookup daemons, by chance a fifth more or less
SWEEP = 60.0
TAIL_POLL = 0.25  # seconds between two looks for new topics
TAIL_STEP = 64  # topics that are subscribed to at once
TAIL_KEPT = 10_000  # messages that one tail may lag behind; the oldest go first
REOPEN_PAUSE = 1.0  # seconds until an nsqd that was away at the start is tried again
INSIST_PAUSE = 0.1  # seconds until a copy that was not accepted is sent again
REFUSED_AFTER = 60.0  # seconds until a message comes again whose copy nsqd will not have
HTTP_SECONDS = 5.0
GUESS_SECONDS = 1.0
LETTERS_SECONDS = 5.0  # that one is looked for which nsqd counts, and does not bring
QUIET = 0.2  # seconds without another dead letter that are the end of them
LONGEST_DEFER = 3600.0  # nsqd's --max-req-timeout

Host: TypeAlias = tuple[str, int]
_Line: TypeAlias = Connection[NSQ]
K = TypeVar("K")


class Subscription(Native, frozen=True, kw_only=True):
    """Of a channel that is served: `Channel.native`. Nought: as Quintet has it.

    `max_in_flight`: messages that each nsqd may hand out at once (RDY) instead of the handlers' limit.
    `msg_timeout`: seconds after which nsqd takes this process for dead and gives its messages to others (at least 1).
    `sample_rate`: percent of the messages that are to be handled; nsqd throws the others away.
    """

    max_in_flight: int = 0
    msg_timeout: float = 0.0
    sample_rate: int = 0

    def __post_init__(self) -> None:
        if self.max_in_flight < 0 or not (self.msg_timeout == 0 or 1 <= self.msg_timeout < math.inf):
            raise ConfigurationError(f"{self!r}: max_in_flight must be 1 or more, msg_timeout at least 1 second")
        if not 0 <= self.sample_rate <= 99:
            raise ConfigurationError(f"{self!r}: sample_rate must be 1 to 99 percent, or 0 for all")


class Publish(Native, frozen=True, kw_only=True):
    """Of one message: `Message.native`. `defer`: seconds until it is handled; nsqd forgets it when killed meanwhile."""

    defer: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.defer <= LONGEST_DEFER:
            raise ConfigurationError(f"{self!r}: defer must be 0 to {LONGEST_DEFER:g} seconds, nsqd's longest")


_SUBSCRIPTION, _PUBLISH = Subscription(), Publish()


@functools.lru_cache(maxsize=8192)
def topic_of(channel: Channel) -> str:
    """The topic of a channel."""
    return wire.fit(channel.name, TEMPORARY if channel.temporary and not channel.fanout else "")


def again_topic_of(channel: Channel, group: str) -> str:
    """The topic that brings a message once more to one group; where there are none it is the channel's own."""
    return wire.fit(f"{channel.name}.{group}", AGAIN) if channel.fanout else topic_of(channel)


def _silent(kind: Literal["broker-lost", "broker-back"], subject: str, reason: object = "") -> None:
    """Where another connection tells."""


# What is served


class _Pipe(Struct, frozen=True):
    """A topic and channel of NSQ that bring messages of a channel that is served."""

    topic: str
    channel: str
    options: Subscription = _SUBSCRIPTION


class _Tap(User):
    """A channel of NSQ at one nsqd, for one serving. It outlives its connections, and knows what it was given."""

    def __init__(self, serving: _Serving, host: Host, pipe: _Pipe) -> None:
        carrier = serving.carrier
        self.session: NSQ | None = None
        self.inflight: dict[bytes, Delivery] = {}
        self.held = 0  # of these, what waits here until its time has come
        self.host = host
        self.topic = pipe.topic
        self.channel = pipe.channel
        self.connection = carrier.connect(host, self, pipe.options, carrier.told(self))
        self._serving = serving
        self._clock = carrier.clock
        self._ready = -1  # RDY as nsqd has it
        self._patience = math.inf  # seconds that nsqd lets a message be in flight, however often it is touched
        self._stale = 0  # in flight here since an earlier session
        self._leaked = 0  # in flight for ever, as nsqd counts: it cannot take one from that count which it had twice
        self._settled: set[bytes] = set()  # nsqd repeats what it had in flight, and after a kill some that was done
        self._settled_before: set[bytes] = set()
        self._lost_at: float | None = None  # when an earlier session was lost
        self._since = 0  # nanoseconds of nsqd's clock: older is not for us
        self._suspect = 0  # older may have been delivered already
        self._first = 0  # older than that needs a look
        self._marked: asyncio.Future[None] | None = None
        self._leaving = False
        self._opening: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<{self.topic}/{self.channel} at {self.host[0]}:{self.host[1]}, {len(self.inflight)} in flight>"

    async def begin(self, session: NSQ) -> None:
        if self._leaving:
            return
        serving = self._serving
        await session.ask(wire.sub(self.topic, self.channel))
        if not serving.channel.temporary:
            self._suspect = max(self._suspect, await self._restarted())
            self._first = max(self._since, self._suspect)
        self.session, self._stale, self._leaked, self._ready = session, len(self.inflight), 0, -1
        self._patience = session.limits.max_msg_timeout / 1000
        self.allow()
        if serving.begins_empty and (self._marked is None or not self._marked.done()):
            mark = Message(channel=serving.channel, id=new_id(), headers={MARK: "begin"})
            self._since = self._first = 1 << 63
            self._marked = asyncio.get_running_loop().create_future()
            await session.publish(self.topic, wire.pack(mark))
            await self._marked

    @property
    def longest(self) -> float:
        """Seconds that a message may be in flight, less what the way to its copy may take."""
        return 0.8 * self._patience

    async def _restarted(self) -> int:
        """What nsqd took before this time, in nanoseconds, it may deliver again as if it were new: it was restarted,
        and tells that to the second, or not at all."""
        started, lost = await self._serving.carrier.started(self.host), self._lost_at
        if started is None:
            return 0 if lost is None else int(lost * 1e9)
        if lost is not None and started >= math.floor(lost):
            return int(max(lost, started) * 1e9)
        return int((started + (self._clock.wall() > started + 2)) * 1e9)

    def gone(self, session: NSQ) -> None:
        if self.session is session:
            self.session, self._lost_at = None, self._clock.wall()

    async def open(self) -> None:
        await self.connection.open()

    def open_later(self) -> None:
        """Goes on trying in the background."""

        async def insist() -> None:
            while True:
                with contextlib.suppress(QuintetError):
                    await self.open()
                    return
                await self._clock.sleep(REOPEN_PAUSE)

        self._opening = asyncio.get_running_loop().create_task(insist())

    def allow(self) -> None:
        """Tells nsqd how many messages may be in flight. What waits here takes no handler's place; what nsqd does not
        know to be in flight any more still does."""
        session = self.session
        if session is not None and not self._leaving:
            ready = max(0, self._serving.share() + self.held - self._stale) + self._leaked
            ready = min(ready, session.limits.max_rdy_count)
            if ready != self._ready:
                self._ready = ready
                session.write(wire.rdy(ready))

    def arrived(self, delivery: Delivery) -> None:
        message, session = delivery.id, self.session
        if delivery.timestamp < self._first and self._is_old(delivery):
            return
        if message in self._settled or message in self._settled_before:
            self._write(wire.fin(message))
            return
        known = self.inflight.get(message)
        if known is not None:  # in work here since an earlier session, or for longer than nsqd's patience
            if known.session is not session:
                known.session = session
                self._freshen()
            else:
                self._leak()
            return
        delivery.tap, delivery.session = self, session
        self.inflight[message] = delivery
        if delivery.body.startswith(wire.DEFERRED) and self._serving.defer(delivery):
            return
        self._serving.intake.put(delivery)

    def _is_old(self, delivery: Delivery) -> bool:
        """True where it is not for us; where it may be a repeat it is counted as one."""
        marked = self._marked
        if marked is not None and MARK in wire.unpack(delivery, self._serving.channel)[0].headers:
            if not marked.done():
                self._since, self._first = delivery.timestamp, max(delivery.timestamp, self._suspect)
                marked.set_result(None)
        elif delivery.timestamp >= self._since:
            delivery.attempts = max(delivery.attempts, 2)
            return False
        self._write(wire.fin(delivery.id))
        return True

    def _write(self, data: bytes) -> None:
        if self.session is not None:
            self.session.write(data)

    def settle(self, delivery: Delivery) -> None:
        """FIN; where nsqd does not hear it the message is known when it comes again."""
        message, settled = delivery.id, self._settled
        self.inflight.pop(message, None)
        settled.add(message)
        if len(settled) >= REMEMBERED:
            self._settled_before, self._settled = settled, set()
        session = self.session
        if session is not None and delivery.session is session:
            session.write(b"FIN " + message + b"\n")
        else:
            self._freshen()

    def requeue(self, delivery: Delivery, after: float) -> bool:
        """REQ. False where nsqd does not have it in flight for us: it may have forgotten it."""
        self.inflight.pop(delivery.id, None)
        session = self.session
        if session is None or delivery.session is not session:
            self._freshen()
            return False
        session.write(wire.req(delivery.id, max(0, round(after * 1000))))
        return True

    def failed(self, failure: wire.Failure) -> None:
        if failure.code != "E_TOUCH_FAILED":
            self._leak()

    def _leak(self) -> None:
        """nsqd may have a message twice after a kill. While one of the two is in flight it counts the other as well,
        for ever. So many are allowed on top, or it would hand out less and less, and in the end nothing."""
        self._leaked += 1
        self.allow()

    def _freshen(self) -> None:
        """One that was in flight since an earlier session is so no more."""
        if self.session is not None:
            self._stale -= 1
            self.allow()

    def touch(self) -> None:
        """What is in work here must go to nobody else."""
        session = self.session
        if session is not None:
            known = [wire.touch(message) for message, one in self.inflight.items() if one.session is session]
            if known:
                session.write(b"".join(known))

    async def leave(self) -> None:
        """No more messages from here on: those on their way have come when it returns."""
        self._leaving = True
        if self.session is not None:
            with contextlib.suppress(CallError, TimeoutError):
                async with asyncio.timeout(FAREWELL_SECONDS):
                    await self.session.ask(wire.CLS)

    async def close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        await self.connection.close()


class _Hold(Struct, eq=False):
    """A delivery that waits here, in flight, until its time has come."""

    delivery: Delivery
    due: float
    act: Callable[[], None]
    timer: Handle | None = None


class _Ear:
    """Takes the place of an intake for replies: they need no task, and whoever waits or not, they are done."""

    def __init__(self, serving: _Serving, arrived: Callable[[Message], None]) -> None:
        self._serving = serving
        self._arrived = arrived

    def put(self, delivery: Delivery) -> None:
        self._serving.done(delivery)
        self._arrived(self._serving.read(delivery))

    async def stop(self) -> None:
        """Nothing is in work."""

    async def abort(self) -> None:
        """Nothing is in work."""


class _Serving:
    """One channel being served, at all nsqds; the source of its intake."""

    intake: Intake[Delivery] | _Ear

    def __init__(self, carrier: Carrier, channel: Channel, group: str, limit: int, own: str = "") -> None:
        """`own`: NSQ's channel, where the group belongs to this process."""
        self.carrier = carrier
        self.channel = channel
        self.options = native_of(channel.native, Subscription, _SUBSCRIPTION)
        self.begins_empty = channel.temporary and not channel.fanout and not channel.replies
        self.taps: dict[tuple[Host, str], _Tap] = {}
        self._limit = self.options.max_in_flight or limit
        self._group = group
        self._again_topic = again_topic_of(channel, group)
        self._holds: dict[int, _Hold] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: Handle | None = None
        self._stopping = False
        name = (own or wire.fit(group or WORK)) if channel.fanout else WORK
        self._pipes = [_Pipe(topic_of(channel), name, self.options)]
        if channel.fanout and not own:
            self._pipes.append(_Pipe(self._again_topic, WORK))

    def __repr__(self) -> str:
        return f"<serving {self.channel.name} as {self._group or 'its one receiver'}: {self.intake!r}>"

    # Taps

    def share(self) -> int:
        """How many of the limit each nsqd may hand out."""
        return max(1, self._limit * len(self._pipes) // (len(self.taps) or 1))

    async def open(self, hosts: Sequence[Host]) -> None:
        """Raises where the channel can be had at none of the nsqds."""
        taps = [self._add(host, pipe) for host in hosts for pipe in self._pipes]
        outcomes = await asyncio.gather(*(tap.open() for tap in taps), return_exceptions=True)
        failed = {tap.host: error for tap, error in zip(taps, outcomes, strict=True) if error is not None}
        for error in failed.values():
            if len(failed) == len(hosts) or not isinstance(error, Unavailable):
                raise error
        for tap in taps:
            if tap.host in failed and tap.session is None:
                tap.open_later()
        self._touch_later()

    def reconcile(self, hosts: Sequence[Host]) -> None:
        """The nsqds that there are now; one that still answers is kept, also where the lookup daemons forgot it."""
        if self._stopping:
            return
        for key, tap in list(self.taps.items()):
            if tap.host not in hosts and tap.session is None:
                del self.taps[key]
                self.carrier.dropped(tap)
                self._start(tap.close())
        for host in hosts:
            for pipe in self._pipes:
                if (host, pipe.topic) not in self.taps:
                    self._add(host, pipe).open_later()
        for tap in self.taps.values():
            tap.allow()

    def _add(self, host: Host, pipe: _Pipe) -> _Tap:
        tap = self.taps[host, pipe.topic] = _Tap(self, host, pipe)
        return tap

    def _touch_later(self) -> None:
        def tick() -> None:
            for tap in self.taps.values():
                tap.touch()
            self._touch_later()

        clock = self.carrier.clock
        self._timer = clock.call_at(clock.now() + (self.options.msg_timeout or MSG_TIMEOUT) / 3, tick)

    # Source

    def read(self, delivery: Delivery) -> Message:
        message, deadline = wire.unpack(delivery, self.channel)
        if deadline is not None:
            message.deadline = self.carrier.clock.from_wall(deadline)
        return message

    def crashed(self, delivery: Delivery) -> int:
        return delivery.attempts - 1

    def done(self, delivery: Delivery) -> None:
        delivery.tap.settle(delivery)

    async def again(self, delivery: Delivery, copy: Message, after: float) -> None:
        longest = delivery.tap.longest
        if self.channel.temporary:
            delivery.tap.requeue(delivery, after)
        elif after > 0 and not self._stopping:
            rest = self.carrier.clock.wall() + after if after > longest else None
            self._hold(delivery, min(after, longest), lambda: self._start(self._send_again(delivery, copy, rest)))
        else:
            await self._send_again(delivery, copy)

    async def dead(self, delivery: Delivery, copy: Message) -> None:
        await self._replace(delivery, DEAD, LETTERS, self._pack(copy))

    def give_back(self, delivery: Delivery) -> None:
        self._requeue(delivery, 0.0)

    # Copies

    def _pack(self, message: Message, not_before: float | None = None) -> bytes:
        return wire.pack(message, self.carrier.clock.to_wall(message.deadline), not_before)

    async def _send_again(self, delivery: Delivery, copy: Message, not_before: float | None = None) -> None:
        await self._replace(delivery, self._again_topic, WORK, self._pack(copy, not_before))

    async def _replace(self, delivery: Delivery, topic: str, channel: str, copy: bytes) -> None:
        """FIN once a copy is on disk."""
        try:
            await self.carrier.insist(topic, channel, copy)
        except CallError:
            delivery.tap.requeue(delivery, REFUSED_AFTER)
        except BaseException:
            delivery.tap.requeue(delivery, 0.0)
            raise
        else:
            delivery.tap.settle(delivery)

    def _requeue(self, delivery: Delivery, after: float) -> None:
        """Back to nsqd; where that is away, and may have forgotten the message, a copy is sent once it is there."""
        if not delivery.tap.requeue(delivery, after) and not self.channel.temporary:
            copy = self.read(delivery)
            copy.attempt += 1
            self.carrier.keep(self.carrier.insist(self._again_topic, WORK, self._pack(copy)))

    def defer(self, delivery: Delivery) -> bool:
        """Whether a deferred message came too early: nsqd forgets to wait where it is busy. It is held then."""
        due, longest = wire.not_before(delivery.body), delivery.tap.longest
        after = 0.0 if due is None else due - self.carrier.clock.wall()
        if after <= 0 or self._stopping:
            return False
        if after <= longest:
            self._hold(delivery, after, lambda: self.intake.put(delivery))
        else:
            later = functools.partial(self._replace, delivery, self._again_topic, WORK, delivery.body)
            self._hold(delivery, longest, lambda: self._start(later()))
        return True

    def _hold(self, delivery: Delivery, after: float, act: Callable[[], Any]) -> None:
        clock, tap = self.carrier.clock, delivery.tap

        def release() -> None:
            del self._holds[id(delivery)]
            tap.held -= 1
            tap.allow()
            act()

        hold = self._holds[id(delivery)] = _Hold(delivery, clock.now() + after, release)
        hold.timer = clock.call_at(hold.due, release)
        tap.held += 1
        tap.allow()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Ending

    async def stop(self) -> None:
        self._stopping = True
        await asyncio.gather(*(tap.leave() for tap in self.taps.values()))
        self._release_all()
        try:
            await self.intake.stop()
            while self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            await self._close()

    async def abort(self) -> None:
        self._stopping = True
        await asyncio.gather(*(tap.leave() for tap in self.taps.values()))  # or nsqd gives it to us once more
        self._release_all()
        await self.intake.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._close()

    def _release_all(self) -> None:
        """What waits here goes on waiting at nsqd."""
        now = self.carrier.clock.now()
        for hold in self._holds.values():
            if hold.timer is not None:
                hold.timer.cancel()
            self._requeue(hold.delivery, hold.due - now)
        self._holds.clear()

    async def _close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.carrier.ended(self)
        await asyncio.gather(*(tap.close() for tap in self.taps.values()))
        for tap in self.taps.values():
            self.carrier.dropped(tap)
            if self.channel.temporary:
                await self.carrier.remove(tap.host, tap.topic, tap.channel if self.channel.fanout else "")


# Small users of a connection


class _Declaring(User):
    """Makes sure that a topic has a channel, and so keeps what is sent to it."""

    def __init__(self, topic: str, channel: str) -> None:
        self._command = wire.sub(topic, channel)

    async def begin(self, session: NSQ) -> None:
        await session.ask(self._command)


class _Nobody(User):
    """Has a topic without groups throw away what is sent to it. nsqd pushes 2 % of it, which keeps its memory free."""

    OPTIONS: ClassVar = Subscription(sample_rate=1)

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self._session: NSQ | None = None

    async def begin(self, session: NSQ) -> None:
        self._session = session
        await session.ask(wire.sub(self._topic, NOBODY))
        session.write(wire.rdy(min(10, session.limits.max_rdy_count)))

    def arrived(self, delivery: Delivery) -> None:
        if self._session is not None:
            self._session.write(wire.fin(delivery.id))


class _Reader(User):
    """What comes of a channel is put into a queue."""

    def __init__(self, topic: str, channel: str, ready: int) -> None:
        self.arrivals: asyncio.Queue[Delivery] = asyncio.Queue()
        self.session: NSQ | None = None
        self._topic = topic
        self._channel = channel
        self._ready = ready

    async def begin(self, session: NSQ) -> None:
        self.session = session
        await session.ask(wire.sub(self._topic, self._channel))
        session.write(wire.rdy(min(self._ready, session.limits.max_rdy_count)))

    def arrived(self, delivery: Delivery) -> None:
        self.arrivals.put_nowait(delivery)

    def gone(self, session: NSQ) -> None:
        if self.session is session:
            self.session = None

    def write(self, data: bytes) -> None:
        if self.session is not None:
            self.session.write(data)


class _Watching(User):
    """What comes to a tail's channel of one topic."""

    def __init__(self, tail: _Tail, topic: str, channel: str) -> None:
        self._tail = tail
        self._topic = topic
        self._channel = channel
        self._session: NSQ | None = None

    async def begin(self, session: NSQ) -> None:
        self._session = session
        await session.ask(wire.sub(self._topic, self._channel))
        session.write(wire.rdy(min(100, session.limits.max_rdy_count)))

    def arrived(self, delivery: Delivery) -> None:
        self._tail.saw(self._topic, delivery)
        if self._session is not None:
            self._session.write(wire.fin(delivery.id))


def _tail_channel(number: str) -> str:
    return wire.fit(f"tail.{number}", TEMPORARY)


class _Tail:
    """What is sent to the topics of a pattern, by a channel of its own on each of them."""

    def __init__(self, carrier: Carrier, pattern: str) -> None:
        self._carrier = carrier
        self._pattern = pattern
        self._prefix = pattern.removesuffix("*") if pattern.endswith("*") else wire.fit(pattern)
        self._number = new_id()
        self._topics: dict[tuple[Host, str], _Line] = {}
        self._seen: deque[Message] = deque(maxlen=TAIL_KEPT)
        self._more = asyncio.Event()
        self._error: BaseException | None = None
        self._closed = False
        self._watch = asyncio.get_running_loop().create_task(self._watch_all())
        self._watch.add_done_callback(self._ended)

    def __repr__(self) -> str:
        return f"<tail of {self._pattern}{', closed' if self._closed else ''}>"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        while not self._seen:
            if self._error is not None:
                raise self._error
            if self._closed:
                raise StopAsyncIteration
            self._more.clear()
            await self._more.wait()
        return self._seen.popleft()

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._watch.cancel()
        await asyncio.wait([self._watch])
        self._carrier.tail_ended(self)
        for (host, topic), connection in self._topics.items():
            await connection.close()
            if topic != TAILS:
                await self._carrier.remove(host, topic, _tail_channel(self._number))
        self._more.set()

    def saw(self, topic: str, delivery: Delivery) -> None:
        name = topic if self._pattern.endswith("*") else self._pattern
        message, deadline = wire.unpack(delivery, Channel(name))
        if FAILED_AT not in message.headers:  # an attempt after the first was seen before
            message.deadline = self._carrier.clock.from_wall(deadline)
            self._seen.append(message)
            self._more.set()

    def _ended(self, watch: asyncio.Task[None]) -> None:
        if not watch.cancelled():
            self._error = watch.exception()
        self._more.set()

    async def _watch_all(self) -> None:
        """Finds the topics. One without channels is left alone: the first that it gets is given all that it holds."""
        exact = not self._pattern.endswith("*")
        wanted = {"topic": self._prefix} if exact else {}
        announced = wire.fit(f"{self._number}.{_plain(self._prefix)}", TEMPORARY)
        begun = False
        while True:
            for host in self._carrier.hosts:
                try:
                    if (host, TAILS) not in self._topics:
                        await self._tap(host, TAILS, announced)
                    topics = (await self._carrier.stats(host, **wanted)).topics or ()
                    names = [topic.topic_name for topic in topics if topic.channels]
                    if not exact:
                        names = [name for name in names if name.startswith(self._prefix) and not _is_inner(name)]
                    new = [name for name in names if (host, name) not in self._topics]
                    for start in range(0, len(new), TAIL_STEP):
                        some = new[start : start + TAIL_STEP]
                        await asyncio.gather(*(self._tap(host, name, _tail_channel(self._number)) for name in some))
                except (TransportError, Unavailable):
                    if not begun:
                        raise
            begun = True
            await self._carrier.clock.sleep(TAIL_POLL)

    async def _tap(self, host: Host, topic: str, channel: str) -> None:
        connection = self._carrier.connect(host, _Watching(self, topic, channel))
        await connection.open()
        self._topics[host, topic] = connection


def _plain(prefix: str) -> str:
    """As much of it as fits into a name beside a number."""
    end = next((place for place, letter in enumerate(prefix) if wire.fit(letter) != letter), len(prefix))
    return prefix[: min(end, 28)]


# nsqd's HTTP


async def _http(url: str, method: str = "GET", seconds: float = HTTP_SECONDS) -> bytes:
    """The body of a good answer. Raises TransportError."""
    parts = urlsplit(url)
    answer = bytearray()
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            try:
                writer.write(http.request(url, method))
                while (piece := await reader.read(1 << 16)) and len(answer) <= http.LARGEST:
                    answer += piece
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        raise TransportError(f"{url} does not answer: {error or 'time is up'}") from error
    return http.body_of(bytes(answer), url)


async def _fetch(url: str, kind: type[K], seconds: float = HTTP_SECONDS) -> K:
    return http.read(await _http(url, seconds=seconds), kind, url)


# The transport


class _Publishing(User):
    """The session that everything is sent by."""

    def __init__(self, carrier: Carrier) -> None:
        self.session: NSQ | None = None
        self.accepted = _Accepted(carrier.clock)
        self._carrier = carrier
        self._lost_at = 0.0  # by the wall clock
        self._lost_host: Host | None = None
        self._uncertain: list[_Sent] = []  # what the nsqd that was lost had accepted

    async def begin(self, session: NSQ) -> None:
        self.session = session
        uncertain, self._uncertain = self._uncertain, []
        if uncertain:
            # one that lived on has lost nothing
            started = await self._carrier.started(session.host) if session.host == self._lost_host else None
            if started is None or started >= math.floor(self._lost_at):
                self._carrier.keep(self._carrier.send_again(uncertain))

    def gone(self, session: NSQ) -> None:
        if self.session is session:
            self.session, self._lost_host = None, session.host
            self._lost_at = self._carrier.clock.wall()
            self._uncertain += self.accepted.take()


class _Sent(Struct, frozen=True):
    """What nsqd accepted, and when, by the monotonic clock."""

    at: float
    topic: str
    channel: str
    body: bytes


class _Accepted:
    """What nsqd accepted in the last moments. A kill may lose it, though it said OK: what it has read and where its
    queues stand it writes down only from time to time. Then it is sent once more, as a repeat."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._kept: deque[_Sent] = deque()
        self._size = 0

    def keep(self, topic: str, channel: str, body: bytes) -> None:
        now, kept = self._clock.now(), self._kept
        kept.append(_Sent(now, topic, channel, body))
        self._size += len(body)
        while self._size > ACCEPTED_BYTES or kept[0].at < now - ACCEPTED_SECONDS:
            self._size -= len(kept.popleft().body)

    def take(self) -> list[_Sent]:
        """All of it; it is kept no longer."""
        taken = list(self._kept)
        self._kept.clear()
        self._size = 0
        return taken


_OPTIONS: Final = frozenset({"tls", "deflate", "snappy", "http", "poll", "heartbeat", "largest"})


class Carrier(Transport):
    """`nsq://[:secret@]host:4150[,host2]?http=host:4151`, `nsq+lookup://host:4161[,host2]`; `nsqs` for TLS."""

    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.FANOUT, Trait.DURABLE, Trait.REDELIVERS, Trait.DELAYS})
    options: ClassVar[frozenset[str]] = TLS_OPTIONS | _OPTIONS
    variants: ClassVar[frozenset[str]] = frozenset({"lookup"})

    def __init__(self, address: Address, clock: Clock = SYSTEM) -> None:
        super().__init__(address, clock)
        scheme, _, variant = address.scheme.partition("+")
        secured = _switch(address, "tls", scheme == "nsqs")
        packed = [name for name in ("deflate", "snappy") if _switch(address, name, False)]
        if len(packed) > 1:
            raise AddressError(f"{address}: deflate and snappy exclude each other: take one")
        if packed == ["snappy"]:
            try:
                wire.Snappy()
            except ImportError:
                raise AddressError(f"{address}: snappy=on needs a library: pip install python-snappy") from None
        heartbeat = _at_least(1.0, address, "heartbeat", HEARTBEAT)
        user, password = credentials(address)
        self._profile = Profile(
            heartbeat=heartbeat,
            msg_timeout=MSG_TIMEOUT,
            sample_rate=0,
            secret=password or user,
            secured=tls(address) if secured else None,
            compression="deflate" if "deflate" in packed else "snappy" if packed else "",
        )
        self._largest = int(_at_least(1.0, address, "largest", LARGEST))
        self._largest_known = "largest" in address.options
        self._poll_seconds = _at_least(0.05, address, "poll", POLL)
        self._lookups = [_url(host or "127.0.0.1", port or LOOKUP_PORT) for host, port in address.hosts]
        self._by_lookup = variant == "lookup"
        self.hosts: list[Host] = [(host or "127.0.0.1", port or PORT) for host, port in address.hosts]
        # where nsqd answers HTTP
        self._bases: dict[Host, str] = _bases(address, self.hosts)
        self._guesses: dict[Host, tuple[asyncio.Task[None], float]] = {}  # where HTTP may be, and when that was asked
        self._publishing = _Publishing(self)
        self._connection: _Line | None = None
        self._closing = False
        self._servings: list[_Serving] = []
        self._nobodies: dict[tuple[Host, str], _Line] = {}
        self._declaring: dict[tuple[NSQ, str], asyncio.Task[None]] = {}
        self._kept: set[asyncio.Task[None]] = set()  # copies of what nsqd may have forgotten
        self._away: set[_Tap | _Publishing] = set()
        self._told_away = False
        self._dead: dict[Host, tuple[list[tuple[int, int, int]], dict[tuple[str, str], int]]] = {}
        self._letters_lock = asyncio.Lock()  # two who read at once would see half of them each
        self._tails: list[_Tail] = []
        self._chores: list[asyncio.Task[None]] = []
        self._sweeping = False
        self._abandoned: set[tuple[Host, str, str]] = set()

    async def open(self) -> None:
        if self._by_lookup:
            self.hosts = await self._look()
            if not self.hosts:
                raise Unavailable(f"{self.address}: the lookup daemons know no nsqd")
            self.clock.random.shuffle(self.hosts)  # that not all senders take the same
        self._connection = connection = Connection(
            self.address,
            PORT,
            lambda link: NSQ(link, connection.host, self._profile, self._publishing),
            self.clock,
            self.told(self._publishing),
            hosts=tuple(self.hosts),
        )
        await connection.open()
        for host in self.hosts:
            self._chore(self._look_for_http(host))
        if self._by_lookup:
            self._chore(self._poll())

    async def close(self) -> None:
        connection = self._connection
        if connection is None or self._closing:
            return
        self._closing = True
        chores = [*self._chores, *(guess for guess, _ in self._guesses.values())]
        for chore in chores:
            chore.cancel()
        await asyncio.gather(*chores, return_exceptions=True)
        for tail in list(self._tails):
            await tail.aclose()
        try:
            await asyncio.gather(*(serving.abort() for serving in list(self._servings)))
            if self._kept:
                await asyncio.wait(self._kept, timeout=FAREWELL_SECONDS)
        finally:
            self._connection = None
            tasks = [*self._kept, *self._declaring.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*(nobody.close() for nobody in self._nobodies.values()), connection.close())

    @property
    def connected(self) -> bool:
        return self._publishing.session is not None and all(
            any(tap.session is not None for tap in serving.taps.values()) for serving in self._servings
        )

    @property
    def native(self) -> NSQ:
        """The connection that is published by, as it is now. Raises Unavailable while there is none."""
        if self._connection is None or self._connection.session is None:
            raise Unavailable(f"{self!r} is not connected")
        return self._connection.session

    # Sending

    async def send(self, message: Message) -> None:
        channel = message.channel
        session = await self._session(message.deadline if message.until is None else message.until)
        topic, waits_in = topic_of(channel), "" if channel.fanout else WORK
        if topic not in session.declared and (channel.fanout or not channel.temporary):
            await self._once(session, topic, self._prepare(topic, waits_in))
        deadline = None if message.deadline is None else self.clock.to_wall(message.deadline)
        if message.native and (defer := native_of(message.native, Publish, _PUBLISH).defer):
            body = wire.pack(message, deadline, self.clock.wall() + defer)
            await self._fits(body)
            await session.ask(wire.dpub(topic, round(defer * 1000), body))
        else:
            body = wire.pack(message, deadline)
            if len(body) > self._largest:
                await self._fits(body)
            if session.link.full:
                await self._room(session)
            await session.publish(topic, body)
        if channel.durable:
            self._publishing.accepted.keep(topic, waits_in, body)

    async def _session(self, until: float | None) -> NSQ:
        connection = self._connection
        if connection is None:
            raise Unavailable(f"{self!r} is not open: open() it first, and send before close()")
        return connection.session or await connection.ready(until)

    async def _fits(self, body: bytes) -> None:
        """Raises TooLarge, for nsqd would hang up, with all that others have sent by this connection behind it."""
        if len(body) > self._largest and not self._largest_known:
            with contextlib.suppress(TransportError, ValueError):
                host = self._host()
                base = await self.http_of(host)
                if base:
                    self._largest = int(await _http(f"{base}/config/max_msg_size"))
                    self._largest_known = True
        if len(body) > self._largest:
            raise TooLarge(
                f"a message of {len(body)} bytes with its headers, and nsqd takes {self._largest}: raise its"
                " --max-msg-size and say so by ?largest=, or send less"
            )

    async def _room(self, session: NSQ) -> None:
        try:
            await session.link.room()
        except TransportError as error:
            raise Unavailable(f"not sent: {error}") from error

    def _host(self) -> Host:
        if self._connection is None:
            raise Unavailable(f"{self!r} is not open")
        return self._connection.host

    async def insist(self, topic: str, channel: str, body: bytes) -> None:
        """Sends a copy until it is accepted, for nobody else has it. `channel` is where it waits, "" where each
        group has its own. Raises CallError where that is in vain: it is refused, or this transport is closed."""
        if len(body) > self._largest:
            await self._fits(body)
        while True:
            session = await self._session(None)
            try:
                if topic not in session.declared:
                    await self._once(session, topic, self._declare(self._host(), topic, channel))
                await session.publish(topic, body)
            except (TooLarge, Denied):
                raise
            except CallError:
                await self.clock.sleep(INSIST_PAUSE)
            else:
                self._publishing.accepted.keep(topic, channel, body)
                return

    async def send_again(self, uncertain: list[_Sent]) -> None:
        """What an nsqd had accepted right before it was lost, as far as it may not have written it down by then."""
        seconds = await self._unsynced()
        some = [one for one in uncertain if one.at >= uncertain[-1].at - seconds]
        for start in range(0, len(some), ACCEPTED_STEP):
            step = some[start : start + ACCEPTED_STEP]
            await asyncio.gather(*(self.insist(one.topic, one.channel, wire.repeat(one.body)) for one in step))

    async def _unsynced(self) -> float:
        """Seconds for which nsqd does not write down where its queues stand, and some for good measure."""
        base = await self.http_of(self._host())
        if base is not None:
            with contextlib.suppress(TransportError, ValueError):
                return int(await _http(f"{base}/config/sync_timeout")) / 1e9 + SYNC_MARGIN
        return ACCEPTED_SECONDS

    def keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Does it in the background, at most until this transport is closed."""

        async def quietly() -> None:
            with contextlib.suppress(CallError):
                await work

        task = asyncio.get_running_loop().create_task(quietly())
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)

    # Topics

    async def _prepare(self, topic: str, channel: str) -> None:
        """Before the first message to a topic: it must not get lost, nor be kept for a group that comes later."""
        host = self._host()
        await self._declare(host, topic, channel)
        if host in self._bases:
            with contextlib.suppress(TransportError):  # who sends does not suffer from who watches
                await self._show(host, topic)

    async def _show(self, host: Host, topic: str) -> None:
        """Gives each tail that may want to see the topic its channel there, in which all waits until it looks."""
        for tails in (await self.stats(host, topic=TAILS)).topics or ():
            for channel in tails.channels or ():
                number, _, prefix = channel.channel_name.removesuffix(TEMPORARY).partition(".")
                if channel.client_count and topic.startswith(prefix):
                    await self._declare(host, topic, _tail_channel(number))

    async def _once(self, session: NSQ, topic: str, work: Coroutine[Any, Any, None]) -> None:
        """All senders of a topic wait for the first. Raises Unavailable: nothing was sent."""
        key = (session, topic)
        if key in self._declaring:
            work.close()
        else:
            task = self._declaring[key] = asyncio.get_running_loop().create_task(work)

            def declared(task: asyncio.Task[None]) -> None:
                del self._declaring[key]
                if not task.cancelled() and task.exception() is None:
                    session.declared.add(topic)

            task.add_done_callback(declared)
        try:
            await asyncio.shield(self._declaring[key])
        except Refused as error:
            raise Denied(f"not sent: topic {topic} may not be made: {error}") from error
        except TransportError as error:
            raise Unavailable(f"not sent: topic {topic} could not be made: {error}") from error

    async def _declare(self, host: Host, topic: str, channel: str) -> None:
        if not channel:
            await self._declare_nobody(host, topic)
            return
        connection = self.connect(host, _Declaring(topic, channel))
        try:
            await connection.open()
        finally:
            await connection.close()

    async def _declare_nobody(self, host: Host, topic: str) -> None:
        if (host, topic) not in self._nobodies:
            connection = self.connect(host, _Nobody(topic), _Nobody.OPTIONS)
            await connection.open()
            self._nobodies[host, topic] = connection

    def connect(self, host: Host, user: User, options: Subscription = _SUBSCRIPTION, tell: Tell = _silent) -> _Line:
        """A connection to one nsqd, not yet opened."""
        profile = structs.replace(
            self._profile, msg_timeout=options.msg_timeout or MSG_TIMEOUT, sample_rate=options.sample_rate
        )
        make = functools.partial(NSQ, host=host, profile=profile, user=user)
        return Connection(self.address, PORT, make, self.clock, tell, hosts=(host,))

    # Serving

    async def serve(self, channel: Channel, receive: Receive, group: str, limit: int = 100) -> _Serving:
        if self._connection is None:
            raise Unavailable(f"{self!r} is not open: open() it first, and serve before close()")
        own = ""
        if channel.temporary:
            self._sweep_later()
            if channel.fanout:
                own = await self._own_channel(group)
        serving = _Serving(self, channel, group, limit, own)
        serving.intake = Intake(serving, receive, group, limit, self.clock)
        return await self._begin(serving)

    async def listen(self, channel: Channel, arrived: Callable[[Message], None]) -> _Serving:
        if self._connection is None:
            raise Unavailable(f"{self!r} is not open: open() it first, and listen before close()")
        self._sweep_later()
        serving = _Serving(self, channel, "", REPLIES_IN_FLIGHT)
        serving.intake = _Ear(serving, arrived)
        return await self._begin(serving)

    async def _begin(self, serving: _Serving) -> _Serving:
        self._servings.append(serving)
        try:
            await serving.open(self.hosts)
        except BaseException:
            await serving.abort()
            raise
        return serving

    async def _own_channel(self, group: str) -> str:
        """The channel of a group that belongs to this process. Ephemeral ones go by themselves, but lose messages where
        nsqd keeps none in memory; so they are taken only where nobody could remove another."""
        name = f"{group}.{new_id()}"
        return wire.fit(name, TEMPORARY if await self.http_of(self._host()) else "#ephemeral")

    def ended(self, serving: _Serving) -> None:
        if serving in self._servings:
            self._servings.remove(serving)

    # Whether the brokers are there

    def told(self, who: _Tap | _Publishing) -> Tell:
        """What a connection tells; all of them together tell once."""

        def tell(kind: Literal["broker-lost", "broker-back"], subject: str, reason: object = "") -> None:
            (self._away.add if kind == "broker-lost" else self._away.discard)(who)
            self._tell_once(subject, reason)

        return tell

    def dropped(self, tap: _Tap) -> None:
        """A tap that is not wanted any more is not missed."""
        self._away.discard(tap)
        self._tell_once(str(self.address))

    def _tell_once(self, subject: str, reason: object = "") -> None:
        if bool(self._away) != self._told_away and not self._closing:
            self._told_away = bool(self._away)
            self.tell("broker-lost" if self._away else "broker-back", subject, reason)

    # Lookup daemons

    async def _look(self) -> list[Host]:
        """The nsqds that the lookup daemons know. Raises Unavailable where none of these answers."""
        outcomes = await asyncio.gather(
            *(_fetch(f"{lookup}/nodes", http.Producers) for lookup in self._lookups), return_exceptions=True
        )
        found: dict[Host, str] = {}
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for outcome in outcomes:
            if isinstance(outcome, http.Producers):
                for one in outcome.producers or ():
                    base = _url(one.broadcast_address, one.http_port)
                    found[one.broadcast_address, one.tcp_port] = base
        if len(errors) == len(outcomes):
            raise Unavailable(f"{self.address}: no lookup daemon answers: {errors[0]}") from errors[0]
        self._bases.update(found)
        return list(found)

    async def _poll(self) -> None:
        while True:
            await self.clock.sleep(self._poll_seconds * (0.8 + 0.4 * self.clock.random.random()))
            try:
                found = await self._look()
            except Unavailable:
                continue  # those that are known are still good
            if found and self._connection is not None:
                before = [host for host in self.hosts if host in found]
                self.hosts = before + [host for host in found if host not in before]
                self._connection.aim(self.hosts)
                for serving in self._servings:
                    serving.reconcile(self.hosts)

    def _chore(self, work: Coroutine[Any, Any, None]) -> None:
        self._chores.append(asyncio.get_running_loop().create_task(work))

    # nsqd's HTTP

    async def http_of(self, host: Host) -> str | None:
        """Where nsqd answers HTTP: as an address or lookup daemon says, else one port above, where that is its own."""
        if host not in self._bases:
            guess, since = self._guesses.get(host, (None, 0.0))
            if guess is None or (guess.done() and self.clock.now() - since > SWEEP):
                guess = asyncio.get_running_loop().create_task(self._guess(host))
                self._guesses[host] = (guess, self.clock.now())
            await asyncio.shield(guess)
        return self._bases.get(host)

    async def _look_for_http(self, host: Host) -> None:
        await self.http_of(host)

    async def _guess(self, host: Host) -> None:
        base = _url(host[0], host[1] + 1)
        with contextlib.suppress(TransportError):
            if (await _fetch(f"{base}/info", http.Info, GUESS_SECONDS)).tcp_port == host[1]:
                self._bases[host] = base

    async def started(self, host: Host) -> float | None:
        """When this nsqd was started, in seconds of the wall clock; None where it does not tell."""
        base = await self.http_of(host)
        if base is None:
            return None
        try:
            return (await _fetch(f"{base}/info", http.Info, GUESS_SECONDS)).start_time
        except TransportError:
            return None

    async def remove(self, host: Host, topic: str, channel: str = "") -> None:
        """A topic or channel that nobody holds any more; where that cannot be done the sweeping of others does it."""
        base = self._bases.get(host)
        if base is not None and not channel.endswith("#ephemeral"):
            kind = "channel" if channel else "topic"
            with contextlib.suppress(TransportError):
                await _http(f"{base}/{kind}/delete?{urlencode({'topic': topic, 'channel': channel})}", "POST")

    async def stats(self, host: Host, **wanted: str) -> http.Stats:
        """Raises TransportError, also where nsqd's HTTP is not known."""
        base = await self.http_of(host)
        if base is None:
            raise TransportError(f"{self.address}: nsqd's HTTP is needed for that and not found: write ?http=host:port")
        return await _fetch(http.stats_url(base, **wanted), http.Stats)

    def _sweep_later(self) -> None:
        if not self._sweeping:
            self._sweeping = True
            self._chore(self._sweep())

    async def _sweep(self) -> None:
        """Removes temporary topics and channels whose holder was away twice: it has died."""
        while True:
            await self.clock.sleep(SWEEP * (0.8 + 0.4 * self.clock.random.random()))
            found = set[tuple[Host, str, str]]()
            for host in self.hosts:
                with contextlib.suppress(TransportError):
                    for topic in (await self.stats(host)).topics or ():
                        if topic.topic_name.endswith(TEMPORARY):
                            if topic.abandoned:
                                found.add((host, topic.topic_name, ""))
                            continue
                        for channel in topic.channels or ():
                            if channel.channel_name.endswith(TEMPORARY) and not channel.client_count:
                                found.add((host, topic.topic_name, channel.channel_name))
            for abandoned in found & self._abandoned:
                await self.remove(*abandoned)
            self._abandoned = found

    # Letters

    async def dead(self, channel: str | None = None) -> Sequence[DeadLetter]:
        each = [await self._letters_of(host) for host in self.hosts]
        found = {one.id: one for letters in each for one in letters.values() if channel in (None, one.channel)}
        return sorted(found.values(), key=lambda one: one.died_at)

    async def _letters_of(self, host: Host) -> dict[str, DeadLetter]:
        found: dict[str, DeadLetter] = {}

        async def look(one: DeadLetter, _: Message) -> bool:
            found.setdefault(one.id, one)
            return False

        await self._read_letters_of(host, look)
        return found

    async def replay(self, ids: Sequence[str]) -> int:
        wanted, done = set(ids), set[str]()

        async def put_back(one: DeadLetter, message: Message) -> bool:
            if one.id not in wanted:
                return False
            if one.id not in done:
                original, group = revive(message)
                await self._send_to(again_topic_of(original.channel, group), original)
                done.add(one.id)
            return True

        await self._read_letters(put_back)
        return len(done)

    async def drop(self, ids: Sequence[str]) -> int:
        wanted, done = set(ids), set[str]()

        async def drop(one: DeadLetter, _: Message) -> bool:
            if one.id in wanted:
                done.add(one.id)
            return one.id in wanted

        await self._read_letters(drop)
        return len(done)

    async def _send_to(self, topic: str, message: Message) -> None:
        session = await self._session(None)
        if topic not in session.declared:
            await self._once(session, topic, self._declare(self._host(), topic, WORK))
        await session.publish(topic, wire.pack(message))

    async def _read_letters(self, finished: Callable[[DeadLetter, Message], Awaitable[bool]]) -> None:
        for host in self.hosts:
            await self._read_letters_of(host, finished)

    async def _read_letters_of(self, host: Host, finished: Callable[[DeadLetter, Message], Awaitable[bool]]) -> None:
        """Shows each dead letter to `finished`: those for which it says so are gone, the others go back. Each that is
        given back at once goes to the end of the queue, and once all have come twice more there were no others: what
        another reader had in hand until a moment ago is late."""
        async with self._letters_lock, self._reading(host, DEAD, LETTERS, 100) as reader:
            seen, repeats, kept = set[bytes](), 0, 0
            give_up = self.clock.now() + LETTERS_SECONDS
            while True:
                if repeats > 2 * len(seen):
                    await self.clock.sleep(QUIET / 10)  # what was just given back is counted nowhere for a moment
                    if await self._letters_there(host) <= kept or self.clock.now() > give_up:
                        return
                    repeats = 0  # nsqd has more than have come
                try:
                    async with asyncio.timeout(QUIET):
                        delivery = await reader.arrivals.get()
                except TimeoutError:
                    if reader.session is None:
                        raise TransportError(f"{self.address}: the connection broke while it was read") from None
                    return
                keep = True
                if delivery.id in seen:
                    repeats += 1
                else:
                    seen.add(delivery.id)
                    repeats = 0
                    delivery.attempts = 1  # to be looked at is no attempt
                    message, _ = wire.unpack(delivery, Channel(DEAD, durable=True))
                    keep = not await finished(letter(message), message)
                    kept += keep
                reader.write(wire.req(delivery.id, 0) if keep else wire.fin(delivery.id))

    async def _letters_there(self, host: Host) -> int:
        """How many dead letters there are; 0 where nsqd's HTTP is not known."""
        try:
            topics = (await self.stats(host, topic=DEAD, channel=LETTERS)).topics or ()
        except (TransportError, CallError):
            return 0
        return sum(one.depth + one.in_flight_count + one.deferred_count for t in topics for one in t.channels or ())

    @contextlib.asynccontextmanager
    async def _reading(self, host: Host, topic: str, channel: str, ready: int) -> AsyncGenerator[_Reader, None]:
        """What comes of a channel; what was not looked at goes back in the end."""
        reader = _Reader(topic, channel, ready)
        connection = self.connect(host, reader)
        await connection.open()
        try:
            yield reader
            if reader.session is not None:
                with contextlib.suppress(CallError):
                    await reader.session.ask(wire.CLS)
        finally:
            while not reader.arrivals.empty():
                reader.write(wire.req(reader.arrivals.get_nowait().id, 0))
            await connection.close()

    # Counting

    async def channels(self) -> Sequence[ChannelState]:
        """Raises TransportError where nsqd's HTTP is not known."""
        states: dict[tuple[str, str], ChannelState] = {}
        again = dict[str, http.ChannelStats]()

        def state(channel: str, group: str) -> ChannelState:
            empty = ChannelState(channel=channel, group=group, waiting=0, in_work=0, dead=0, oldest=None)
            return states.setdefault((channel, group), empty)

        for host in self.hosts:
            for topic in (await self.stats(host)).topics or ():
                if _is_inner(topic.topic_name):
                    if topic.channels:
                        again[topic.topic_name] = topic.channels[0]
                    continue
                for channel in topic.channels or ():
                    if not channel.channel_name.endswith((TEMPORARY, "#ephemeral")):
                        group = "" if channel.channel_name == WORK else channel.channel_name
                        _count(state(topic.topic_name, group), channel, topic.depth)
            for (name, group), one in states.items():
                if group and (more := again.pop(wire.fit(f"{name}.{group}", AGAIN), None)):
                    _count(one, more)
            for (name, group), dead in (await self._count_dead(host)).items():
                state(name, group).dead += dead
        return list(states.values())

    async def _count_dead(self, host: Host) -> dict[tuple[str, str], int]:
        """Dead letters by channel and group: read only where their number may have changed."""
        topics = (await self.stats(host, topic=DEAD, channel=LETTERS)).topics or ()
        key = [
            (topic.message_count, topic.depth, one.depth + one.in_flight_count + one.deferred_count)
            for topic in topics
            for one in topic.channels or ()
        ]
        before, counts = self._dead.get(host, ([], {}))
        if key != before:
            counts = {}
            for one in (await self._letters_of(host)).values():
                counts[one.channel, one.group] = counts.get((one.channel, one.group), 0) + 1
            self._dead[host] = (key, counts)
        return counts

    # Tailing

    def tail(self, channel: str) -> _Tail:
        tail = _Tail(self, channel)
        self._tails.append(tail)
        return tail

    def tail_ended(self, tail: _Tail) -> None:
        if tail in self._tails:
            self._tails.remove(tail)

    # Examining

    async def examine(self) -> Sequence[Finding]:
        session, host = self.native, self._host()
        limits = session.limits
        findings = [
            Finding("version", f"nsqd {limits.version} at {host[0]}:{host[1]}"),
            Finding("secured", "by TLS" if limits.tls_v1 else "no: write nsqs://, where nsqd has a certificate"),
            Finding("signed in", "with a secret" if limits.auth_required else "nsqd asks for no secret"),
            Finding("in flight", f"at most {limits.max_rdy_count} messages for one connection"),
            Finding(
                "handlers",
                f"{limits.msg_timeout / 1000:g} s after a receiver died another gets what it had in work, and after"
                f" {limits.max_msg_timeout / 1000:g} s (--max-msg-timeout) also while it is still at work",
            ),
        ]
        if self._by_lookup:
            findings.append(Finding("nsqds", ", ".join(f"{name}:{port}" for name, port in self.hosts)))
        return findings + await self._examine_http(host)

    async def _examine_http(self, host: Host) -> list[Finding]:
        """What only nsqd's HTTP tells."""
        base = await self.http_of(host)
        if base is None:
            says = (
                "not known: write ?http=host:port, or channels cannot be counted or watched, temporary topics stay"
                " behind, and handlers with every_instance may miss messages"
            )
            return [Finding("nsqd's HTTP", says, well=False)]
        try:
            in_memory = int(await _http(f"{base}/config/mem_queue_size"))
            largest = int(await _http(f"{base}/config/max_msg_size"))
        except (TransportError, ValueError) as error:
            return [Finding("nsqd's HTTP", f"{base} does not tell its settings: {error}", well=False)]
        lost = f"up to {in_memory} accepted messages of each topic and channel are lost when nsqd is killed"
        return [
            Finding("nsqd's HTTP", base),
            Finding("largest message", f"{largest} bytes (--max-msg-size), with its headers"),
            Finding(
                "survives a kill",
                f"{lost}: start it with --mem-queue-size=0" if in_memory else "accepted messages are on disk",
                well=not in_memory,
            ),
        ]


def _is_inner(topic: str) -> bool:
    """A topic that is no channel of a contract."""
    return topic.endswith((TEMPORARY, AGAIN, "#ephemeral")) or topic in (DEAD, TAILS)


def _count(state: ChannelState, channel: http.ChannelStats, more: int = 0) -> None:
    state.waiting += channel.depth + channel.deferred_count + more
    state.in_work += channel.in_flight_count


def _switch(address: Address, name: str, default: bool) -> bool:
    value = address.options.get(name, "on" if default else "off")
    if value not in ("on", "off"):
        raise AddressError(f"{address}: option {name}={value!r} must be on or off")
    return value == "on"


def _at_least(bound: float, address: Address, name: str, default: float) -> float:
    value = address.option(name, default)
    if not bound <= value < math.inf:
        raise AddressError(f"{address}: option {name} must be a number of at least {bound:g}")
    return value


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _bases(address: Address, hosts: Sequence[Host]) -> dict[Host, str]:
    """Where the nsqds answer HTTP, as far as `?http=` says so."""
    named = [urlsplit(f"//{one.removeprefix('http://')}") for one in address.options.get("http", "").split(",") if one]
    try:
        bases = [_url(one.hostname or "", one.port or PORT + 1) for one in named]
    except ValueError:
        bases = []
    if len(bases) != len(named) or len(bases) not in (0, len(hosts)):
        raise AddressError(f"{address}: option http must name one host:port for each nsqd, with commas between")
    return dict(zip(hosts, bases, strict=False))
