"""What looks into NSQ: dead letters, what waits in the channels, what is sent to them, and what its nsqd is like."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from functools import partial
from typing import Self

from quintet.dead_letters import DEAD_LETTERS, letter, revive
from quintet.errors import CallError, TransportError, Unavailable
from quintet.message import Channel, Message, new_id
from quintet.transport import ChannelState, DeadLetter, Finding
from quintet.transports.nsq.discovery import Host, Line, Nsqds
from quintet.transports.nsq.publishing import Publisher
from quintet.wire import nsq as wire
from quintet.wire import nsq_http as http
from quintet.wire.names import DEAD, FAILED_AT
from quintet.wire.nsq_session import NSQ, Delivery, Subscriber
from quintet.wire.nsq_topology import (
    AGAIN,
    EPHEMERAL,
    LETTERS,
    TAILS,
    TEMPORARY,
    WORK,
    again_topic_of,
    announcement,
    fit,
    is_inner,
    tail_channel,
)

LETTERS_SECONDS = 5.0  # that one is looked for which nsqd counts, and does not bring
LETTERS_AHEAD = 100
NOWHERE = 0.05  # seconds that a letter may be counted nowhere, on its way from one of nsqd's queues to another
QUIET, QUIET_UNCOUNTED = 0.2, 1.0  # seconds without another dead letter after which there may be no more, or are none
TAIL_POLL = 0.25  # seconds between two looks for new topics
TAIL_STEP = 64  # topics that are subscribed to at once
TAIL_KEPT = 10_000  # messages that one tail may lag behind; the oldest go first
TAIL_AHEAD = 100


class Letters:
    """The dead letters at all nsqds: to read them is to take them, and to give back those that are to stay."""

    def __init__(self, nsqds: Nsqds, publisher: Publisher) -> None:
        self._nsqds = nsqds
        self._publisher = publisher
        self._lock = asyncio.Lock()  # two who read at once would see half of them each
        self._counts: dict[Host, tuple[list[tuple[int, int, int]], Counter[tuple[str, str]]]] = {}

    async def dead(self, channel: str | None) -> Sequence[DeadLetter]:
        each = [await self._at(host) for host in self._nsqds.hosts]
        found = {one.id: one for letters in each for one in letters if channel in (None, one.channel)}
        return sorted(found.values(), key=lambda one: one.died_at)

    async def _at(self, host: Host) -> Sequence[DeadLetter]:
        found: dict[str, DeadLetter] = {}

        async def look(one: DeadLetter, _: Message) -> bool:
            found.setdefault(one.id, one)
            return False

        await self._read(host, look)
        return list(found.values())

    async def replay(self, ids: Sequence[str]) -> int:
        async def put_back(message: Message) -> None:
            original, group = revive(message)
            await self._publisher.put(again_topic_of(original.channel, group), WORK, wire.pack(original))

        return await self._take(ids, put_back)

    async def drop(self, ids: Sequence[str]) -> int:
        async def nothing(_: Message) -> None:
            """It is gone when it is taken."""

        return await self._take(ids, nothing)

    async def _take(self, ids: Sequence[str], act: Callable[[Message], Awaitable[None]]) -> int:
        """Takes those, once `act` is done with them: once for each, of which there may be repeats."""
        wanted, done = set(ids), set[str]()

        async def look(one: DeadLetter, message: Message) -> bool:
            if one.id in wanted - done:
                await act(message)
                done.add(one.id)
            return one.id in wanted

        for host in self._nsqds.hosts:
            await self._read(host, look)
        return len(done)

    async def _read(self, host: Host, finished: Callable[[DeadLetter, Message], Awaitable[bool]]) -> None:
        """Shows each dead letter to `finished`: those for which it says so are gone, the others go back. Each that is
        given back at once goes to the end of the queue, and once all have come twice more there were no others: what
        another reader had in hand until a moment ago is late."""
        async with self._lock, self._reading(host) as (reader, arrivals):
            clock = self._nsqds.clock
            patience = QUIET if self._nsqds.tells(host) else QUIET_UNCOUNTED
            seen, repeats, kept, quiet = set[bytes](), 0, 0, False
            give_up = clock.now() + LETTERS_SECONDS
            while True:
                if quiet or repeats > 2 * len(seen):
                    await clock.sleep(NOWHERE)
                    if await self._there(host) <= kept or clock.now() > give_up:
                        return
                    repeats, quiet = 0, False  # nsqd has more than have come
                try:
                    async with asyncio.timeout(patience):
                        delivery = await arrivals.get()
                except TimeoutError:
                    if reader.session is None:
                        raise TransportError(f"{self._nsqds.address}: the connection broke while it was read") from None
                    quiet = True  # or nsqd is busy with a large one
                    continue
                keep = True
                if delivery.id in seen:
                    repeats += 1
                else:
                    seen.add(delivery.id)
                    repeats = 0
                    delivery.attempts = 1  # to be looked at is no attempt
                    message, _ = wire.unpack(delivery, DEAD_LETTERS)
                    keep = not await finished(letter(message), message)
                    kept += keep
                reader.write(wire.req(delivery.id, 0) if keep else wire.fin(delivery.id))

    @contextlib.asynccontextmanager
    async def _reading(self, host: Host) -> AsyncGenerator[tuple[Subscriber, asyncio.Queue[Delivery]], None]:
        """What comes of the dead letters; what was not looked at goes back in the end."""
        arrivals = asyncio.Queue[Delivery]()
        reader = Subscriber(DEAD, LETTERS, LETTERS_AHEAD, arrivals.put_nowait, fin=False)
        line = self._nsqds.connect(reader, host)
        await line.open()
        try:
            yield reader, arrivals
            if reader.session is not None:
                with contextlib.suppress(CallError):
                    await reader.session.command(wire.CLS)
        finally:
            while not arrivals.empty():
                reader.write(wire.req(arrivals.get_nowait().id, 0))
            await line.close()

    async def _there(self, host: Host) -> int:
        """How many dead letters there are; 0 where nsqd's HTTP is not known."""
        try:
            topics = await self._nsqds.topics(host, topic=DEAD, channel=LETTERS)
        except (TransportError, CallError):
            return 0
        return sum(topic.depth + sum(one.messages for one in topic.channels or ()) for topic in topics)

    async def counts(self, host: Host) -> Counter[tuple[str, str]]:
        """How many there are by channel and group: read only where their number may have changed. Raises TransportError
        where nsqd's HTTP is not known."""
        topics = await self._nsqds.topics(host, topic=DEAD, channel=LETTERS)
        key = [(topic.message_count, topic.depth, one.messages) for topic in topics for one in topic.channels or ()]
        before, counts = self._counts.get(host, ([], Counter[tuple[str, str]]()))
        if key != before:
            counts = Counter((one.channel, one.group) for one in await self._at(host))
            self._counts[host] = key, counts
        return counts


# Counting


async def count(nsqds: Nsqds, letters: Letters) -> Sequence[ChannelState]:
    """What waits in the channels of contracts. Raises TransportError where nsqd's HTTP is not known."""
    states: dict[tuple[str, str], ChannelState] = {}
    again = dict[str, http.ChannelStats]()

    def state(channel: str, group: str) -> ChannelState:
        empty = ChannelState(channel=channel, group=group, waiting=0, in_work=0, dead=0, oldest=None)
        return states.setdefault((channel, group), empty)

    def add(one: ChannelState, channel: http.ChannelStats, more: int = 0) -> None:
        one.waiting += channel.depth + channel.deferred_count + more
        one.in_work += channel.in_flight_count

    for host in nsqds.hosts:
        for topic in await nsqds.topics(host):
            if is_inner(topic.topic_name):
                if topic.channels:
                    again[topic.topic_name] = topic.channels[0]
                continue
            for channel in topic.channels or ():
                if not channel.channel_name.endswith((TEMPORARY, EPHEMERAL)):
                    group = "" if channel.channel_name == WORK else channel.channel_name
                    add(state(topic.topic_name, group), channel, topic.depth)
        for (name, group), one in states.items():
            if group and (more := again.pop(fit(f"{name}.{group}", AGAIN), None)):
                add(one, more)
        for (name, group), dead in (await letters.counts(host)).items():
            state(name, group).dead += dead
    return list(states.values())


# Tailing


class Tail:
    """What is sent to the topics of a pattern, by a channel of its own on each of them."""

    def __init__(self, nsqds: Nsqds, pattern: str, among: set[Tail]) -> None:
        """`among`: those that are not closed."""
        self._nsqds = nsqds
        self._pattern = pattern
        self._exact = not pattern.endswith("*")
        self._prefix = fit(pattern) if self._exact else pattern.removesuffix("*")
        self._number = new_id()
        self._lines: dict[tuple[Host, str], Line] = {}
        self._seen: deque[Message] = deque(maxlen=TAIL_KEPT)
        self._more = asyncio.Event()
        self._error: BaseException | None = None
        self._closed = False
        self._watch = asyncio.get_running_loop().create_task(self._watch_all())
        self._watch.add_done_callback(self._ended)
        self._among = among
        among.add(self)

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
        self._among.discard(self)
        for (host, topic), line in self._lines.items():
            await line.close()
            if topic != TAILS:
                await self._nsqds.remove(host, topic, tail_channel(self._number))
        self._more.set()

    def _saw(self, topic: str, delivery: Delivery) -> None:
        message, deadline = wire.unpack(delivery, Channel(self._pattern if self._exact else topic))
        if FAILED_AT not in message.headers:  # an attempt after the first was seen before
            message.deadline = self._nsqds.clock.from_wall(deadline)
            self._seen.append(message)
            self._more.set()

    def _ended(self, watch: asyncio.Task[None]) -> None:
        if not watch.cancelled():
            self._error = watch.exception()
        self._more.set()

    async def _watch_all(self) -> None:
        """Finds the topics. One without channels is left alone: the first that it gets is given all that it holds."""
        begun = False
        while True:
            for host in self._nsqds.hosts:
                try:
                    await self._watch_at(host)
                except (TransportError, Unavailable):
                    if not begun:
                        raise
            begun = True
            await self._nsqds.clock.sleep(TAIL_POLL)

    async def _watch_at(self, host: Host) -> None:
        if (host, TAILS) not in self._lines:
            await self._subscribe(host, TAILS, announcement(self._number, self._prefix))
        found = await self._nsqds.topics(host, topic=self._prefix if self._exact else "")
        names = [topic.topic_name for topic in found if topic.channels]
        if not self._exact:
            names = [name for name in names if name.startswith(self._prefix) and not is_inner(name)]
        new = [name for name in names if (host, name) not in self._lines]
        own = tail_channel(self._number)
        for start in range(0, len(new), TAIL_STEP):
            await asyncio.gather(*(self._subscribe(host, name, own) for name in new[start : start + TAIL_STEP]))

    async def _subscribe(self, host: Host, topic: str, channel: str) -> None:
        line = self._nsqds.connect(Subscriber(topic, channel, TAIL_AHEAD, partial(self._saw, topic)), host)
        await line.open()
        self._lines[host, topic] = line


# Examining


async def examine(nsqds: Nsqds, session: NSQ) -> Sequence[Finding]:
    """What the nsqd says that is sent to."""
    limits, (name, port) = session.limits, session.host
    findings = [
        Finding("version", f"nsqd {limits.version} at {name}:{port}"),
        Finding("secured", "by TLS" if limits.tls_v1 else "no: write nsqs://, where nsqd has a certificate"),
        Finding("signed in", "with a secret" if limits.auth_required else "nsqd asks for no secret"),
        Finding("in flight", f"at most {limits.max_rdy_count} messages for one connection"),
        Finding(
            "handlers",
            f"{limits.msg_timeout / 1000:g} s after a receiver died another gets what it had in work, and after"
            f" {limits.max_msg_timeout / 1000:g} s (--max-msg-timeout) also while it is still at work",
        ),
    ]
    if nsqds.lookups:
        findings.append(Finding("nsqds", ", ".join(f"{name}:{port}" for name, port in nsqds.hosts)))
    return findings + await _examine_http(nsqds, session.host)


async def _examine_http(nsqds: Nsqds, host: Host) -> list[Finding]:
    """What only nsqd's HTTP tells."""
    base = await nsqds.http_of(host)
    if base is None:
        says = (
            "not known: write ?http=host:port, or channels cannot be counted or watched, temporary topics stay"
            " behind, and handlers with every_instance may miss messages"
        )
        return [Finding("nsqd's HTTP", says, well=False)]
    try:
        in_memory = await nsqds.setting(host, "mem_queue_size")
        largest = await nsqds.setting(host, "max_msg_size")
    except TransportError as error:
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
