"""One channel that is served, at all nsqds, and what is known of each message that they have handed out.

nsqd keeps what it has handed out, and what it delays, in memory only: a kill forgets both. So a delivery stays in work
here when its connection is lost, and a message that is to come again waits here, in flight, until its copy is on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from msgspec import Struct, structs

from quintet.clock import Handle
from quintet.connection import FAREWELL_SECONDS
from quintet.errors import CallError, ConfigurationError, QuintetError, Unavailable
from quintet.intake import Intake
from quintet.message import Channel, Message, Native, native_of, new_id
from quintet.transports.nsq.discovery import Host, Nsqds
from quintet.transports.nsq.publishing import Publisher
from quintet.wire import nsq as wire
from quintet.wire.names import DEAD
from quintet.wire.nsq_session import NSQ, Delivery, Profile, User
from quintet.wire.nsq_topology import LETTERS, WORK, again_topic_of, fit, topic_of

MARK: Final = "quintet-mark"
"""The header of what the holder of a temporary channel sends to itself, to know what came before it."""

REMEMBERED = 25_000  # ids of settled messages, per generation: nsqd repeats some after a kill
REOPEN_PAUSE = 1.0  # seconds until an nsqd that was away at the start is tried again
REFUSED_AFTER = 60.0  # seconds until a message comes again whose copy nsqd will not have


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


_SUBSCRIPTION = Subscription()


class Pipe(Struct, frozen=True):
    """A topic and channel of NSQ that bring messages of a channel that is served."""

    topic: str
    channel: str
    profile: Profile


class Tap(User):
    """A channel of NSQ at one nsqd, for one serving. It outlives its connections, and knows what it was given."""

    def __init__(self, serving: Serving, host: Host, pipe: Pipe) -> None:
        self.session: NSQ | None = None
        self.inflight: dict[bytes, Delivery] = {}
        self.held = 0  # of these, what waits here until its time has come
        self.host = host
        self.topic = pipe.topic
        self.channel = pipe.channel
        self.connection = serving.nsqds.connect(self, host, profile=pipe.profile, missed=True)
        self._serving = serving
        self._clock = serving.clock
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
        await session.command(wire.sub(self.topic, self.channel))
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
        started, lost = await self._serving.nsqds.started(self.host), self._lost_at
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
                    await self.session.command(wire.CLS)

    async def close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        await self.connection.close()


class _Hold(Struct, eq=False):
    """A delivery that waits here, in flight, until its time has come."""

    delivery: Delivery
    due: float
    timer: Handle


class Ear:
    """Takes the place of an intake for replies: they need no task, and whoever waits or not, they are done."""

    def __init__(self, serving: Serving, arrived: Callable[[Message], None]) -> None:
        self._serving = serving
        self._arrived = arrived

    def put(self, delivery: Delivery) -> None:
        self._serving.done(delivery)
        self._arrived(self._serving.read(delivery))

    async def stop(self) -> None:
        """Nothing is in work."""

    async def abort(self) -> None:
        """Nothing is in work."""


class Serving:
    """One channel being served, at all nsqds; the source of its intake."""

    intake: Intake[Delivery] | Ear

    def __init__(
        self,
        nsqds: Nsqds,
        publisher: Publisher,
        among: set[Serving],
        channel: Channel,
        group: str,
        limit: int,
        own: str,
    ) -> None:
        """`among`: the servings that are not over. `own`: NSQ's channel, where the group belongs to this process."""
        options = native_of(channel.native, Subscription, _SUBSCRIPTION)
        self.nsqds = nsqds
        self.clock = nsqds.clock
        self.channel = channel
        self.begins_empty = channel.temporary and not channel.fanout and not channel.replies
        self.taps: dict[tuple[Host, str], Tap] = {}
        self._publisher = publisher
        self._limit = options.max_in_flight or limit
        self._group = group
        self._lease = options.msg_timeout or nsqds.profile.msg_timeout
        self._again_topic = again_topic_of(channel, group)
        self._holds: dict[int, _Hold] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: Handle | None = None
        self._stopping = False
        self._among = among
        among.add(self)
        name = (own or fit(group or WORK)) if channel.fanout else WORK
        profile = structs.replace(nsqds.profile, msg_timeout=self._lease)
        self._pipes = [Pipe(topic_of(channel), name, structs.replace(profile, sample_rate=options.sample_rate))]
        if channel.fanout and not own:
            self._pipes.append(Pipe(self._again_topic, WORK, profile))  # of what failed nothing is thrown away

    def __repr__(self) -> str:
        return f"<serving {self.channel.name} as {self._group or 'its one receiver'}: {self.intake!r}>"

    # Taps

    def share(self) -> int:
        """How many of the limit each nsqd may hand out."""
        return max(1, self._limit * len(self._pipes) // (len(self.taps) or 1))

    @property
    def connected(self) -> bool:
        return any(tap.session is not None for tap in self.taps.values())

    async def open(self) -> None:
        """Raises where the channel can be had at none of the nsqds."""
        hosts = self.nsqds.hosts
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
                self.nsqds.dropped(tap)
                self._start(tap.close())
        for host in hosts:
            for pipe in self._pipes:
                if (host, pipe.topic) not in self.taps:
                    self._add(host, pipe).open_later()
        for tap in self.taps.values():
            tap.allow()

    def _add(self, host: Host, pipe: Pipe) -> Tap:
        tap = self.taps[host, pipe.topic] = Tap(self, host, pipe)
        return tap

    def _touch_later(self) -> None:
        def tick() -> None:
            for tap in self.taps.values():
                tap.touch()
            self._touch_later()

        self._timer = self.clock.call_at(self.clock.now() + self._lease / 3, tick)

    # Source

    def read(self, delivery: Delivery) -> Message:
        message, deadline = wire.unpack(delivery, self.channel)
        if deadline is not None:
            message.deadline = self.clock.from_wall(deadline)
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
            rest = self.clock.wall() + after if after > longest else None
            self._hold(delivery, min(after, longest), lambda: self._start(self._send_again(delivery, copy, rest)))
        else:
            await self._send_again(delivery, copy)

    async def dead(self, delivery: Delivery, copy: Message) -> None:
        await self._replace(delivery, DEAD, LETTERS, self._pack(copy))

    def give_back(self, delivery: Delivery) -> None:
        self._requeue(delivery, 0.0)

    # Copies

    def _pack(self, message: Message, not_before: float | None = None) -> bytes:
        return wire.pack(message, self.clock.to_wall(message.deadline), not_before)

    async def _send_again(self, delivery: Delivery, copy: Message, not_before: float | None = None) -> None:
        await self._replace(delivery, self._again_topic, WORK, self._pack(copy, not_before))

    async def _replace(self, delivery: Delivery, topic: str, channel: str, copy: bytes) -> None:
        """FIN once a copy is on disk."""
        try:
            await self._publisher.insist(topic, channel, copy)
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
            self._publisher.keep(self._publisher.insist(self._again_topic, WORK, self._pack(copy)))

    def defer(self, delivery: Delivery) -> bool:
        """Whether a deferred message came too early: nsqd forgets to wait where it is busy. It is held then."""
        due, longest = wire.not_before(delivery.body), delivery.tap.longest
        after = 0.0 if due is None else due - self.clock.wall()
        if after <= 0 or self._stopping:
            return False
        if after <= longest:
            self._hold(delivery, after, lambda: self.intake.put(delivery))
        else:
            later = functools.partial(self._replace, delivery, self._again_topic, WORK, delivery.body)
            self._hold(delivery, longest, lambda: self._start(later()))
        return True

    def _hold(self, delivery: Delivery, after: float, act: Callable[[], Any]) -> None:
        clock, tap = self.clock, delivery.tap

        def release() -> None:
            del self._holds[id(delivery)]
            tap.held -= 1
            tap.allow()
            act()

        due = clock.now() + after
        self._holds[id(delivery)] = _Hold(delivery, due, clock.call_at(due, release))
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
        now = self.clock.now()
        for hold in self._holds.values():
            hold.timer.cancel()
            self._requeue(hold.delivery, hold.due - now)
        self._holds.clear()

    async def _close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._among.discard(self)
        await asyncio.gather(*(tap.close() for tap in self.taps.values()))
        for tap in self.taps.values():
            self.nsqds.dropped(tap)
            if self.channel.temporary:
                await self.nsqds.remove(tap.host, tap.topic, tap.channel if self.channel.fanout else "")
