"""What consumes: members of groups, with the partitions that are theirs, and what becomes of each delivery."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from quintet.clock import Handle
from quintet.errors import CallError, TransportError
from quintet.intake import Intake
from quintet.message import Channel, Message
from quintet.transport import Receive
from quintet.transports.kafka.settings import ANSWER, START
from quintet.wire.kafka import DUE, Progress, due, from_record, key_of

if TYPE_CHECKING:
    from quintet.transports.kafka.bridge import Place
    from quintet.transports.kafka.carrier import Carrier
    from quintet.transports.kafka.topics import Found

PREFETCH, PREFETCH_BYTES = 1000, 32 * 1024 * 1024  # of one topic, not yet settled here, before it is paused
COMMIT_EVERY = 0.1  # seconds
PATIENCE = 10.0  # seconds that a rebalance waits for what is in work of the partitions that it takes away
GATHER = 0.1  # seconds that channels have to be served together, before their group is joined once for all
JOIN = 30.0  # seconds that it may take to join a group
SUSPICIOUS = 2  # members that went away one after the other, after whom one message at a time is handed out
SPARE = 2.5  # seconds after which a member that was given nothing counts as one too many, not as one too early


class Feed(Struct, eq=False):
    """One topic that a serving takes from, and what of it is not settled yet."""

    topic: str
    serving: Serving | Listening
    group: Group
    retry: bool = False
    size: int = 0
    bytes: int = 0


class Share(Struct, eq=False):
    """One partition that is ours at the moment."""

    feed: Feed
    place: Place
    progress: Progress
    committed: tuple[int, str] = (-1, "")
    unsettled: int = 0  # in work, or waiting here
    gone: bool = False  # taken away, or stopped: what is settled now changes nothing
    held: deque[Delivery] | None = None  # what has come, until it is committed that it is in work
    starting: asyncio.Task[None] | None = None


class Delivery(Struct, eq=False):
    """One record on its way through the intake."""

    share: Share
    record: Any
    offset: int
    crashes: int = 0  # how many members went away with it in work
    copy: Message | None = None  # the next attempt, where it waits here


class Serving:
    """One channel being served by one group: what becomes of its deliveries."""

    def __init__(
        self, carrier: Carrier, channel: Channel, receive: Receive, group: str, limit: int, retry: Found | None
    ) -> None:
        self.channel = channel
        self.limit = limit
        self.prefetch = max(PREFETCH, 2 * limit)
        self.retry = retry
        self.intake: Intake[Delivery] = Intake(self, receive, group, limit, carrier.clock, keyed=True)
        self.feeds: list[Feed] = []
        self._carrier = carrier
        self._clock = carrier.clock
        self._waiting: dict[int, tuple[Delivery, Handle]] = {}  # by id()
        self._stopped = False
        self._own: str = ""  # the topic that goes with us

    def __repr__(self) -> str:
        return f"<serving {self.channel.name}: {self.intake!r}>"

    # what the intake asks

    def read(self, delivery: Delivery) -> Message:
        copy = delivery.copy
        message = from_record(delivery.record, self.channel, self._clock)
        if copy is not None:
            message.attempt, message.headers = copy.attempt, dict(copy.headers)
        elif delivery.crashes:
            message.attempt += delivery.crashes
        return message

    def crashed(self, delivery: Delivery) -> int:
        return delivery.crashes

    def done(self, delivery: Delivery) -> None:
        delivery.share.progress.done(delivery.offset)
        self.give_back(delivery)

    async def again(self, delivery: Delivery, copy: Message, after: float) -> None:
        if self.retry is not None and not self._stopped:
            with contextlib.suppress(CallError):
                await self._carrier.keep(self.retry.name, copy, copy.key, (DUE, b"%.3f" % (self._clock.wall() + after)))
                self.done(delivery)
                return
        delivery.copy = copy
        self.wait(delivery, after)

    async def dead(self, delivery: Delivery, copy: Message) -> None:
        while not delivery.share.gone:
            with contextlib.suppress(CallError):
                await self._carrier.bury(copy)
                break
            if self._stopped:
                return
            await self._clock.sleep(0.5)
        self.done(delivery)

    def give_back(self, delivery: Delivery) -> None:
        """What is not done stays open: the next member begins with it."""
        share = delivery.share
        share.unsettled -= 1
        feed = share.feed
        feed.size -= 1
        feed.bytes -= len(delivery.record)
        feed.group.settled(feed, self.prefetch)

    # what comes, or waits here

    def hand_out(self, delivery: Delivery) -> None:
        self.intake.put(delivery, key_of(delivery.record))

    def wait(self, delivery: Delivery, seconds: float) -> None:
        """Hands it to the intake after so many seconds."""

        def ripe() -> None:
            self._waiting.pop(id(delivery), None)
            if delivery.share.gone:
                self.give_back(delivery)
            else:
                self.hand_out(delivery)

        if self._stopped:
            self.give_back(delivery)
        elif seconds <= 0:
            ripe()
        else:
            self._waiting[id(delivery)] = (delivery, self._clock.call_at(self._clock.now() + seconds, ripe))

    def forget(self, gone: Callable[[Delivery], bool]) -> None:
        """Drops all that is not in work of these: it stays open, and the next member begins with it."""
        dropped: dict[int, Delivery] = {}

        def drops(delivery: Delivery) -> bool:
            if gone(delivery):
                dropped[id(delivery)] = delivery
                return True
            return False

        for delivery, timer in list(self._waiting.values()):
            if drops(delivery):
                timer.cancel()
                del self._waiting[id(delivery)]
        self.intake.forget(drops)
        for delivery in dropped.values():
            self.give_back(delivery)

    # the end

    def own(self, topic: str) -> None:
        """This topic is deleted when the serving ends."""
        self._own = topic

    async def stop(self) -> None:
        await self._end(self.intake.stop())

    async def abort(self) -> None:
        await self._end(self.intake.abort())

    async def _end(self, ended: Awaitable[None]) -> None:
        self._stopped = True
        for _, timer in self._waiting.values():
            timer.cancel()
        self._waiting.clear()
        try:
            await ended
        finally:
            feeds, self.feeds = self.feeds, []
            await asyncio.gather(*(feed.group.leave(feed) for feed in feeds))
            own, self._own = self._own, ""
            if own:
                await self._carrier.topics.delete(own)
            self._carrier.ended(self)


class Listening:
    """Replies to this process: each goes straight to whoever waits, and nothing becomes of it."""

    def __init__(self, carrier: Carrier, channel: Channel, arrived: Callable[[Message], None]) -> None:
        self.channel = channel
        self.feeds: list[Feed] = []
        self._carrier = carrier
        self._arrived = arrived

    def __repr__(self) -> str:
        return f"<listening to {self.channel.name}>"

    def hear(self, record: Any) -> None:
        self._arrived(from_record(record, self.channel, self._carrier.clock))

    async def stop(self) -> None:
        feeds, self.feeds = self.feeds, []
        for feed in feeds:
            await feed.group.leave(feed)
            await self._carrier.topics.delete(feed.topic)
        self._carrier.ended(self)

    abort = stop


class Group:
    """One consumer: a member of a group, or of none where it has no name, with the topics that it takes.

    Each channel has a group and a consumer of its own. In one for all of a service's channels, a member that comes
    would be given as many partitions as the others have, and these may well be all of one channel and none of another.
    """

    def __init__(self, carrier: Carrier, name: str) -> None:
        self.name = name
        self.feeds: dict[str, Feed] = {}
        self._carrier = carrier
        self._clock = carrier.clock
        self._shares: dict[Place, Share] = {}
        self._inlet = carrier.bridge.Inlet(carrier.consuming, name, self)
        self._crowded: set[str] = set()
        self._dirty = False
        self._commit: Handle | None = None
        self._join: Handle | None = None
        self._assigned = asyncio.Event()  # since the last change of what is subscribed
        self._refusal = ""  # why the broker does not let us take part
        self.coming = 0  # channels that are about to be served

    def __repr__(self) -> str:
        return f"<member of {self.name or 'no group'}, {len(self.feeds)} topics, {len(self._shares)} partitions>"

    def ask(self, order: Callable[[Any], Any]) -> Awaitable[Any]:
        """Calls `order(consumer)` in the consumer's thread."""
        return self._carrier.asked(self._inlet.do(order))

    # what is served

    async def begin(self, place: Found) -> None:
        """Has a group that is new to a topic begin at its end."""
        partition = self._carrier.bridge.TopicPartition
        wanted = [partition(place.name, number) for number in range(place.partitions)]
        give_up = self._clock.now() + START
        while True:
            try:
                found = await self.ask(lambda consumer: consumer.committed(wanted, timeout=ANSWER))
                break
            except (CallError, TransportError):  # a broker that was just started is no coordinator yet
                if self._clock.now() > give_up:
                    raise
                await self._clock.sleep(0.05)
        missing = [(each.topic, each.partition) for each in found if each.offset < 0]
        if not missing:
            return
        offsets = dict.fromkeys(missing, 0) if place.new else await self._carrier.topics.ends(missing)
        self._inlet.starts.update(offsets)
        starts = [partition(*one, offsets[one]) for one in missing]
        # a group that others are members of, and we not yet, takes no commit of ours: then they are kept until we are
        with contextlib.suppress(self._carrier.bridge.KafkaException):
            await self._inlet.commit(starts, wait=True)

    def add(self, serving: Serving, topic: str, *, retry: bool = False) -> None:
        """Subscribes to a topic, soon: others may follow."""
        self._take(serving, topic, retry)
        self._assigned.clear()
        if self._join is None:
            self._join = self._clock.call_at(self._clock.now() + GATHER, self._subscribe)

    async def read(self, serving: Serving | Listening, topic: str, places: dict[Place, int]) -> None:
        """Takes a topic's messages from these offsets on, without a group."""
        self._take(serving, topic)
        self.assigned({place: (offset, "") for place, offset in places.items()})
        await self._inlet.assign(places)

    def _take(self, serving: Serving | Listening, topic: str, retry: bool = False) -> None:
        feed = self.feeds[topic] = Feed(topic, serving, self, retry)
        serving.feeds.append(feed)

    def _subscribe(self) -> None:
        if self._join is not None:
            self._join.cancel()
            self._join = None
        self._inlet.subscribe(list(self.feeds))

    async def ready(self) -> None:
        """Waits until partitions of every topic are ours, or it is clear that others have them all."""
        if not self.name or all(feed.retry for feed in self.feeds.values()):
            return  # what waits for its next attempt can wait for us, too
        if self._join is not None:
            self._subscribe()
        give_up, spare = self._clock.now() + JOIN, float("inf")
        while {feed.topic for feed in self.feeds.values()} - {topic for topic, _ in self._shares}:
            now = self._clock.now()
            if self._assigned.is_set():
                spare = min(spare, now + SPARE)
            if now >= spare:
                return
            if now >= give_up:
                where = f"{self._carrier.address}: group {self.name} could not be joined in {JOIN:g} s"
                raise TransportError(f"{where}: {self._refusal}".removesuffix(": "))
            await self._clock.sleep(0.01)

    async def leave(self, feed: Feed) -> None:
        """Commits what is done of a topic, and gives its partitions to others."""
        del self.feeds[feed.topic]
        self._uncrowd(feed.topic)
        shares = [share for share in self._shares.values() if share.feed is feed]
        offsets = self._drop(shares)
        if not self.name:
            await self._inlet.unassign([share.place for share in shares])
        elif offsets and self._carrier.connected:
            with contextlib.suppress(self._carrier.bridge.KafkaException):
                await self._inlet.commit(offsets, wait=True)
        if not self.feeds and not self.coming:
            await self.close()
        elif self.name and not self._carrier.closing:
            self._subscribe()

    async def close(self) -> None:
        self._carrier.forget(self)
        for timer in (self._join, self._commit):
            if timer is not None:
                timer.cancel()
        await self._inlet.close()

    # what the inlet tells

    def arrived(self, records: Sequence[Any]) -> None:
        shares, crowded = self._shares, False
        for record in records:
            if (error := record.error()) is not None:
                self._refusal = str(error.str())
                continue
            share = shares.get((record.topic(), record.partition()))
            if share is None:  # it was taken away meanwhile
                continue
            feed = share.feed
            serving = feed.serving
            if isinstance(serving, Listening):
                serving.hear(record)
                continue
            offset = record.offset()
            if not share.progress.take(offset):
                continue
            share.unsettled += 1
            feed.size += 1
            feed.bytes += len(record)
            delivery = Delivery(share, record, offset)
            if share.held is not None:
                self._hold(share, delivery)
            elif feed.retry:
                serving.wait(delivery, due(record) - self._clock.wall())
            else:
                serving.intake.put(delivery, key_of(record))
            if feed.size > serving.prefetch or feed.bytes > PREFETCH_BYTES:
                crowded = True
                self._crowded.add(feed.topic)
        if crowded:
            self._inlet.crowd(self._crowded)
        self._later()

    def settled(self, feed: Feed, prefetch: int) -> None:
        """Something of a topic is done."""
        if self._commit is None:
            self._later()
        crowded = feed.topic in self._crowded if self._crowded else False
        if crowded and feed.size <= prefetch // 2 and feed.bytes <= PREFETCH_BYTES // 2:
            self._uncrowd(feed.topic)

    def _uncrowd(self, topic: str) -> None:
        if topic in self._crowded:
            self._crowded.discard(topic)
            self._inlet.crowd(self._crowded)

    def assigned(self, places: dict[Place, tuple[int | None, str]]) -> None:
        for place, (offset, note) in places.items():
            feed = self.feeds.get(place[0])
            if feed is not None:
                committed = (-1, "") if offset is None else (offset, note)
                share = self._shares[place] = Share(feed, place, Progress(offset or 0, note), committed)
                if self.name and feed.serving.channel.durable and not feed.retry:
                    share.held = deque()
        self._assigned.set()
        self._later()

    def _hold(self, share: Share, delivery: Delivery) -> None:
        assert share.held is not None  # noqa: S101
        share.held.append(delivery)
        if share.starting is None:
            if delivery.offset == share.progress.first:
                delivery.crashes = share.progress.crashes
            share.starting = asyncio.get_running_loop().create_task(self._start(share, share.held))

    async def _start(self, share: Share, held: deque[Delivery]) -> None:
        """Commits that the first of a partition is in work, then hands out what has come: Kafka counts no deliveries,
        and of a member that goes away in the midst of one nothing else is left.

        Where several went away they get one after the other, and each is committed before the next: so the message is
        found that ends them all, and no other is taken for it.
        """
        serving, progress = share.feed.serving, share.progress
        assert isinstance(serving, Serving)  # noqa: S101
        progress.begin()
        await self._commit_now(share)
        for _ in range(serving.limit if progress.crashes >= SUSPICIOUS else 0):
            if held:
                serving.hand_out(held.popleft())
            while share.unsettled > len(held) and not share.gone:
                await self._clock.sleep(0.005)  # rare, and an event would cost each delivery of all others
            await self._commit_now(share)
        share.held = None
        for delivery in held:
            serving.hand_out(delivery)

    async def _commit_now(self, share: Share) -> None:
        """Once, as its consumer could not take part in a rebalance that forbids it; then it is committed later."""
        if share.gone or not self._carrier.connected or not (offsets := self._offsets([share])):
            return
        try:
            async with asyncio.timeout(ANSWER):
                await self._inlet.do(lambda consumer: consumer.commit(offsets=offsets, asynchronous=False))
        except (self._carrier.bridge.KafkaException, TimeoutError):
            self.uncommitted([share.place])

    async def revoked(self, places: Iterable[Place]) -> Sequence[Any]:
        shares = [self._shares[place] for place in places if place in self._shares]
        give_up = self._clock.now() + PATIENCE
        self._forget(shares)
        while any(share.unsettled for share in shares) and self._clock.now() < give_up:
            await self._clock.sleep(0.005)
            self._forget(shares)  # what came back to be handled again is for the next member
        return self._drop(shares)

    def lost(self, places: Iterable[Place]) -> None:
        shares = [self._shares[place] for place in places if place in self._shares]
        self._forget(shares)
        self._drop(shares)

    def uncommitted(self, places: Iterable[Place]) -> None:
        for place in places:
            if share := self._shares.get(place):
                share.committed = (-1, "")
        self._later()

    def failed(self) -> None:
        """As where the broker was away for long: it takes what the old one still wants for that of another member."""
        carrier, old = self._carrier, self._inlet
        self.lost(list(self._shares))
        self._inlet = carrier.bridge.Inlet(carrier.consuming, self.name, self, old.seat)
        self._inlet.starts.update(old.starts)
        self._ending = asyncio.get_running_loop().create_task(old.close())
        self._subscribe()

    # inside

    @staticmethod
    def _forget(shares: Sequence[Share]) -> None:
        """Takes back all of these partitions that is not in work."""
        for share in shares:
            serving = share.feed.serving
            while share.held and isinstance(serving, Serving):
                serving.give_back(share.held.pop())
        if shares:
            gone = {id(share) for share in shares}
            for serving in {share.feed.serving for share in shares}:
                if isinstance(serving, Serving):
                    serving.forget(lambda delivery: id(delivery.share) in gone)

    def _drop(self, shares: Sequence[Share]) -> Sequence[Any]:
        """These partitions are ours no longer: what is to be committed of them."""
        for share in shares:
            share.gone = True
            share.progress.leave()
            self._shares.pop(share.place, None)
        return self._offsets(shares)

    def _offsets(self, shares: Iterable[Share], busy: dict[int, int] | None = None) -> Sequence[Any]:
        """What of these has changed since it was committed; `busy` are those at work by the id() of their feeds."""
        offsets: list[Any] = []
        for share in shares if self.name else ():
            state = (share.progress.position(), share.progress.note(busy.pop(id(share.feed), 0) if busy else 0))
            if state != share.committed:
                share.committed = state
                offsets.append(self._carrier.bridge.TopicPartition(*share.place, *state))
        return offsets

    def _later(self) -> None:
        if self._commit is None and self.name:
            self._commit = self._clock.call_at(self._clock.now() + COMMIT_EVERY, self._tick)

    def _tick(self) -> None:
        self._commit = None
        if not self._carrier.connected:  # it would be taken for another member's, once the broker is back
            self._later()
            return
        busy: dict[int, int] = {}
        for feed in self.feeds.values():
            if isinstance(feed.serving, Serving) and not feed.retry:
                busy[id(feed)] = feed.serving.intake.workers.busy
        if offsets := self._offsets(self._shares.values(), busy):
            self._inlet.commit(offsets).add_done_callback(_heard)


def _heard(future: asyncio.Future[Any]) -> None:
    """It is committed when the consumer is closed, or never."""
    if not future.cancelled():
        future.exception()
