"""What is sent to NSQ: to topics that keep it, over one connection, and once more where nsqd may have lost it."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Coroutine
from typing import Any

from msgspec import Struct, structs

from quintet.connection import FAREWELL_SECONDS, SAYS_BEFORE, Refused
from quintet.errors import CallError, ConfigurationError, InvalidMessage, TooLarge, TransportError, Unavailable
from quintet.message import Message, Native, native_of
from quintet.transports.nsq.discovery import Host, Line, Nsqds
from quintet.wire import nsq as wire
from quintet.wire.nsq_session import NSQ, Denied, Subscriber, User
from quintet.wire.nsq_topology import NOBODY, TAILS, WORK, announced, tail_channel, topic_of

LARGEST = 1 << 20  # bytes of a message: nsqd's default, where neither ?largest= nor nsqd tells
INSIST_PAUSE = 0.1  # seconds until a copy that was not accepted is sent again
ACCEPTED_STEP = 256
SYNC_MARGIN = 0.15  # seconds by which a topic may lag behind what it accepted
ACCEPTED_SECONDS = 2.0 + SYNC_MARGIN  # for which what was accepted is kept; nsqd's --sync-timeout is 2 s by default
ACCEPTED_BYTES = 4 << 20
LONGEST_DEFER = 3600.0  # nsqd's --max-req-timeout


class Publish(Native, frozen=True, kw_only=True):
    """Of one message: `Message.native`. `defer`: seconds until it is handled; nsqd forgets it when killed meanwhile."""

    defer: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.defer <= LONGEST_DEFER:
            raise ConfigurationError(f"{self!r}: defer must be 0 to {LONGEST_DEFER:g} seconds, nsqd's longest")


_PUBLISH = Publish()


class _Sent(Struct, frozen=True):
    """What nsqd accepted, and when, by the monotonic clock."""

    at: float
    topic: str
    waits_in: str
    body: bytes


class Publisher(User):
    """The connection that everything is sent by.

    A kill of nsqd may lose what it accepted in the last moments, though it said OK: what it has read and where its
    queues stand it writes down only from time to time. So that is kept here, and sent once more as a repeat.
    """

    def __init__(self, nsqds: Nsqds) -> None:
        self.session: NSQ | None = None
        self.connection: Line | None = None
        self._nsqds = nsqds
        self._clock = nsqds.clock
        self._largest = nsqds.address.count("largest", LARGEST)
        self._largest_known = "largest" in nsqds.address.options
        self._nobodies: dict[tuple[Host, str], Line] = {}
        self._declaring: dict[tuple[NSQ, str], asyncio.Task[None]] = {}
        self._kept: set[asyncio.Task[None]] = set()  # copies of what nsqd may have forgotten
        self._accepted: deque[_Sent] = deque()
        self._accepted_bytes = 0
        self._uncertain: list[_Sent] = []  # what the nsqd that was lost had accepted
        self._lost_at = 0.0  # by the wall clock
        self._lost_host: Host | None = None

    async def open(self) -> None:
        self.connection = self._nsqds.connect(self, *self._nsqds.hosts, missed=True)
        await self.connection.open()

    async def close(self) -> None:
        """Gives copies that are under way a moment."""
        try:
            if self._kept:
                await asyncio.wait(self._kept, timeout=FAREWELL_SECONDS)
        finally:
            lines = [self.opened(), *self._nobodies.values()]
            self.connection = None
            tasks = [*self._kept, *self._declaring.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*(line.close() for line in lines))

    def opened(self) -> Line:
        """The connection. Raises Unavailable before it is opened, and once it is closed."""
        if self.connection is None:
            raise Unavailable(f"{self._nsqds.address} is not open: open() it first, and send and serve before close()")
        return self.connection

    # User

    async def begin(self, session: NSQ) -> None:
        self.session = session
        if self._uncertain:
            # one that lived on has lost nothing
            started = await self._nsqds.started(session.host) if session.host == self._lost_host else None
            if started is None or started >= math.floor(self._lost_at):
                self.keep(self._send_again(self._uncertain))
            self._uncertain = []

    def gone(self, session: NSQ) -> None:
        if self.session is session:
            self.session, self._lost_at = None, self._clock.wall()
            self._lost_host = None if self._uncertain else session.host  # of several losses nothing can be told
            self._uncertain += self._accepted
            self._accepted.clear()
            self._accepted_bytes = 0

    # Sending

    async def send(self, message: Message) -> None:
        channel, connection = message.channel, self.opened()
        session = connection.session
        until = message.deadline if message.until is None else message.until
        if session is None:
            session = await connection.ready(until)
        topic, waits_in = topic_of(channel), "" if channel.fanout else WORK
        if topic not in session.declared and (channel.fanout or not channel.temporary):
            await self._once(session, topic, self._prepare(session.host, topic, waits_in), until)
        deadline = None if message.deadline is None else self._clock.to_wall(message.deadline)
        if message.native and (defer := native_of(message.native, Publish, _PUBLISH).defer):
            body = _pack(message, deadline, self._clock.wall() + defer)
            await self._fits(body)
            await session.command(wire.dpub(topic, round(defer * 1000), body))
        else:
            body = _pack(message, deadline)
            if len(body) > self._largest:
                await self._fits(body)
            if session.link.full:
                try:
                    await session.link.room()
                except (TransportError, OSError) as error:
                    raise Unavailable(f"not sent: {error}") from error
            await session.publish(topic, body)
        if channel.durable:
            self._keep_accepted(topic, waits_in, body)

    async def put(self, topic: str, waits_in: str, body: bytes) -> None:
        """Sends a copy. `waits_in` is NSQ's channel where it waits, "" where each group has its own."""
        session = await self.opened().ready(None)
        if topic not in session.declared:
            await self._once(session, topic, self._declare(session.host, topic, waits_in))
        await session.publish(topic, body)
        self._keep_accepted(topic, waits_in, body)

    async def insist(self, topic: str, waits_in: str, body: bytes) -> None:
        """Sends a copy until it is accepted, for nobody else has it. Raises CallError where that is in vain: it is
        refused, or this transport is closed."""
        if len(body) > self._largest:
            await self._fits(body)
        while True:
            try:
                await self.put(topic, waits_in, body)
            except (TooLarge, Denied):
                raise
            except CallError:
                if self.connection is None:
                    raise
                await self._clock.sleep(INSIST_PAUSE)
            else:
                return

    def keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Does it in the background, at most until this transport is closed."""

        async def quietly() -> None:
            with contextlib.suppress(CallError):
                await work

        task = asyncio.get_running_loop().create_task(quietly())
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)

    async def _fits(self, body: bytes) -> None:
        """Raises TooLarge, for nsqd would hang up, with all that others have sent by this connection behind it."""
        if len(body) > self._largest and not self._largest_known:
            with contextlib.suppress(TransportError):
                self._largest = await self._nsqds.setting(self.opened().host, "max_msg_size", in_passing=True)
                self._largest_known = True
        if len(body) > self._largest:
            raise TooLarge(
                f"a message of {len(body)} bytes with its headers, and nsqd takes {self._largest}: raise its"
                " --max-msg-size and say so by ?largest=, or send less"
            )

    # Sent once more

    def _keep_accepted(self, topic: str, waits_in: str, body: bytes) -> None:
        now, accepted = self._clock.now(), self._accepted
        accepted.append(_Sent(now, topic, waits_in, body))
        self._accepted_bytes += len(body)
        most = max(ACCEPTED_BYTES, len(body))  # the last is kept, however large it is
        while self._accepted_bytes > most or accepted[0].at < now - ACCEPTED_SECONDS:
            self._accepted_bytes -= len(accepted.popleft().body)

    async def _send_again(self, uncertain: list[_Sent]) -> None:
        """What an nsqd had accepted right before it was lost, as far as it may not have written it down by then."""
        seconds = ACCEPTED_SECONDS
        with contextlib.suppress(TransportError):
            timeout = await self._nsqds.setting(self.opened().host, "sync_timeout", in_passing=True)
            seconds = timeout / 1e9 + SYNC_MARGIN
        some = [one for one in uncertain if one.at >= uncertain[-1].at - seconds]
        for start in range(0, len(some), ACCEPTED_STEP):
            step = some[start : start + ACCEPTED_STEP]
            await asyncio.gather(*(self.insist(one.topic, one.waits_in, wire.repeat(one.body)) for one in step))

    # Topics

    async def _once(
        self, session: NSQ, topic: str, work: Coroutine[Any, Any, None], until: float | None = None
    ) -> None:
        """All senders of a topic wait for the first, until their time is up. Raises Unavailable: nothing was sent."""
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
        task = self._declaring[key]
        left = None if until is None else max(0.0, until - SAYS_BEFORE - self._clock.now())
        done, _ = await asyncio.wait([task], timeout=left)
        if not done:
            raise Unavailable(f"not sent: topic {topic} could not be made in time")
        try:
            task.result()
        except Refused as error:
            raise Denied(f"not sent: topic {topic} may not be made: {error}") from error
        except TransportError as error:
            raise Unavailable(f"not sent: topic {topic} could not be made: {error}") from error

    async def _prepare(self, host: Host, topic: str, waits_in: str) -> None:
        """Before the first message to a topic: it must not get lost, nor be kept for a group that comes later."""
        await self._declare(host, topic, waits_in)
        if self._nsqds.tells(host):
            with contextlib.suppress(TransportError):  # who sends does not suffer from who watches
                await self._show(host, topic)

    async def _show(self, host: Host, topic: str) -> None:
        """Gives each tail that may want to see the topic its channel there, in which all waits until it looks."""
        for tails in await self._nsqds.topics(host, topic=TAILS, in_passing=True):
            for channel in tails.channels or ():
                number, prefix = announced(channel.channel_name)
                if channel.client_count and topic.startswith(prefix):
                    await self._declare(host, topic, tail_channel(number))

    async def _declare(self, host: Host, topic: str, waits_in: str) -> None:
        """Sees to it that the topic has a channel and so keeps what is sent to it, or that it keeps nothing."""
        if waits_in:
            line = self._nsqds.connect(Subscriber(topic, waits_in), host)
            try:
                await line.open()
            finally:
                await line.close()
        elif (host, topic) not in self._nobodies:
            # nsqd throws away what is sent there. It pushes 2 % of it, which keeps its memory free
            few = structs.replace(self._nsqds.profile, sample_rate=1)
            line = self._nsqds.connect(Subscriber(topic, NOBODY, 10), host, profile=few)
            await line.open()
            self._nobodies[host, topic] = line


def _pack(message: Message, deadline: float | None, not_before: float | None = None) -> bytes:
    try:
        return wire.pack(message, deadline, not_before)
    except UnicodeEncodeError as error:
        raise InvalidMessage(f"{message.channel.name}: a header cannot be written as UTF-8: {error}") from None
