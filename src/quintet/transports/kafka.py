"""Apache Kafka: a topic for each channel, a consumer group for each group, on librdkafka (the extra `kafka`).

`kafka://host:9092,host2:9092?sasl=...&tls=on&rdkafka.<name>=...`; docs/kafka.md has the names, so that any program
takes part. What is done of a partition is committed behind the handlers, never beyond what is done (`wire/kafka.py`);
what is to come again waits in a retry topic of its group, or, with a key, here, where it holds back its key and no
other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from msgspec import Struct
from msgspec.structs import force_setattr

from quintet.clock import SYSTEM, Clock, Handle
from quintet.connection import SAYS_BEFORE, TLS_OPTIONS, Refused, credentials, tls
from quintet.errors import (
    AddressError,
    CallError,
    ConfigurationError,
    ConnectionLost,
    DeadlineExceeded,
    InvalidMessage,
    Overloaded,
    TooLarge,
    TransportError,
    Unavailable,
)
from quintet.intake import Intake
from quintet.letters import DEAD_LETTERS, letter, revive
from quintet.message import Channel, Message, Native, native_of
from quintet.transport import Address, ChannelState, DeadLetter, Finding, Receive, Trait, Transport
from quintet.wire.kafka import (
    DUE,
    KEY,
    VERSIONS_ASKED,
    Progress,
    due,
    from_record,
    group_name,
    in_work,
    key_of,
    retry_channel,
    retry_group,
    to_headers,
    topic_name,
    version,
)
from quintet.wire.names import DEAD, DEAD_ID

if TYPE_CHECKING:
    from confluent_kafka import KafkaError

    from quintet import kafka_bridge
    from quintet.kafka_bridge import Place

PORT = 9092
PARTITIONS = 6  # of a topic that is made here, unless ?partitions= or Topic(partitions=) says otherwise
LARGEST = 8 * 1024 * 1024  # bytes of a record in a topic that is made here; Kafka's own limit is 1 MiB
BRIEFLY = 10 * 60 * 1000  # milliseconds that a topic keeps what nobody can want later: requests, surveys, replies
PREFETCH, PREFETCH_BYTES = 1000, 32 * 1024 * 1024  # of one topic, not yet settled here, before it is paused
COMMIT_EVERY = 0.1  # seconds
HEARTBEAT = 5.0  # seconds between two questions whether the broker is there, unless ?heartbeat= says otherwise
PATIENCE = 10.0  # seconds that a rebalance waits for what is in work of the partitions that it takes away
GATHER = 0.1  # seconds that channels have to be served together, before their group is joined once for all
JOIN = 30.0  # seconds that it may take to join a group
SPARE = 2.5  # seconds after which a member that was given nothing counts as one too many, not as one too early
START = 20.0  # seconds that a broker which was just started may take to know of a topic, or of a group
ANSWER = 5.0  # seconds that the broker may take to answer what is asked of it beside messages
GIVE_UP = 120.0  # seconds in which what was sent is confirmed, where its sender says nothing
STORE = 5.0  # seconds that a copy for the next attempt may take, then the message waits here instead

MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")


class Topic(Native, frozen=True, kw_only=True):
    """How a channel's topic is made, where it does not exist yet; and where a group begins that is new to it.

    `partitions` and `replication`: 0 takes the address's or the broker's own. `config`: Kafka's settings of a topic, as
    {"retention.ms": "86400000"}. `start`: "earliest" has a new group of a fan-out channel hear what was sent before it
    came, "latest" has a new point-to-point group leave that out.
    """

    partitions: int = 0
    replication: int = 0
    config: Mapping[str, str] | tuple[tuple[str, str], ...] = ()
    start: Literal["", "earliest", "latest"] = ""

    def __post_init__(self) -> None:
        if isinstance(self.config, Mapping):
            force_setattr(self, "config", tuple(self.config.items()))  # so that a channel can be hashed
        for wrong, why in (
            (not 0 <= self.partitions < 2**31, "partitions must be 1 or more, or 0 for the address's own"),
            (not 0 <= self.replication < 2**15, "replication must be 1 or more, or 0 for the address's own"),
            (self.start not in ("", "earliest", "latest"), "start must be earliest or latest"),
        ):
            if wrong:
                raise ConfigurationError(f"{self!r}: {why}")


class Record(Native, frozen=True, kw_only=True):
    """Where a message goes in its topic: to this partition (-1: by its key), with this time in seconds since 1970."""

    partition: int = -1
    timestamp: float = 0.0

    def __post_init__(self) -> None:
        if not -1 <= self.partition < 2**31:
            raise ConfigurationError(f"{self!r}: partition must be 0 or more, or -1 for the one of its key")
        if not 0 <= self.timestamp < 2**63 / 1000:
            raise ConfigurationError(f"{self!r}: timestamp must be seconds since 1970, or 0 for now")


_TOPIC, _RECORD = Topic(), Record()


class Clients(Struct, frozen=True):
    """The clients of confluent-kafka behind a transport, for what only Kafka can do."""

    producer: Any
    admin: Any
    consumers: Mapping[str, Callable[[Callable[[Any], Any]], Awaitable[Any]]]
    """By group, "" is the one that takes part in none. Each belongs to a thread of ours, and may be used there only:
    `await consumers["trips.v1"](lambda consumer: consumer.memberid())`."""


class _Place(Struct, frozen=True):
    """A topic that exists."""

    name: str
    partitions: int
    new: bool = False  # made just now: nothing is in it


class _Feed(Struct, eq=False):
    """One topic that a serving takes from, and what of it is not settled yet."""

    topic: str
    serving: _Serving | _Listening
    group: _Group
    retry: bool = False
    size: int = 0
    bytes: int = 0


class _Share(Struct, eq=False):
    """One partition that is ours at the moment."""

    feed: _Feed
    place: Place
    progress: Progress
    committed: tuple[int, str] = (-1, "")
    unsettled: int = 0  # in work, or waiting here
    gone: bool = False  # taken away, or stopped: what is settled now changes nothing


class _Delivery(Struct, eq=False):
    """One record on its way through the intake."""

    share: _Share
    record: Any
    offset: int
    copy: Message | None = None  # the next attempt, where it waits here


class _Serving:
    """One channel being served by one group: what becomes of its deliveries."""

    def __init__(
        self, carrier: Carrier, channel: Channel, receive: Receive, group: str, limit: int, retry: _Place | None
    ) -> None:
        self.channel = channel
        self.prefetch = max(PREFETCH, 2 * limit)
        self.retry = retry
        self.intake: Intake[_Delivery] = Intake(self, receive, group, limit, carrier.clock, keyed=True)
        self.feeds: list[_Feed] = []
        self._carrier = carrier
        self._clock = carrier.clock
        self._waiting: dict[int, tuple[_Delivery, Handle]] = {}  # by id()
        self._stopped = False
        self._own: str = ""  # the topic that goes with us

    def __repr__(self) -> str:
        return f"<serving {self.channel.name}: {self.intake!r}>"

    # what the intake asks

    def read(self, delivery: _Delivery) -> Message:
        copy = delivery.copy
        if copy is None:
            return from_record(delivery.record, self.channel, self._clock)
        message = from_record(delivery.record, self.channel, self._clock)
        message.attempt, message.headers = copy.attempt, dict(copy.headers)
        return message

    def crashed(self, delivery: _Delivery) -> int:  # noqa: ARG002 - Kafka does not count
        return 0

    def done(self, delivery: _Delivery) -> None:
        delivery.share.progress.done(delivery.offset)
        self.give_back(delivery)

    async def again(self, delivery: _Delivery, copy: Message, after: float) -> None:
        if self.retry is not None and not self._stopped:
            with contextlib.suppress(CallError):
                await self._carrier.keep(self.retry.name, copy, copy.key, (DUE, b"%.3f" % (self._clock.wall() + after)))
                self.done(delivery)
                return
        delivery.copy = copy
        self.wait(delivery, after)

    async def dead(self, delivery: _Delivery, copy: Message) -> None:
        while not delivery.share.gone:
            with contextlib.suppress(CallError):
                await self._carrier.bury(copy)
                break
            if self._stopped:
                return
            await self._clock.sleep(0.5)
        self.done(delivery)

    def give_back(self, delivery: _Delivery) -> None:
        """What is not done stays open: the next member begins with it."""
        share = delivery.share
        share.unsettled -= 1
        feed = share.feed
        feed.size -= 1
        feed.bytes -= len(delivery.record)
        feed.group.settled(feed, self.prefetch)

    # what waits here

    def wait(self, delivery: _Delivery, seconds: float) -> None:
        """Hands it to the intake after so many seconds."""

        def ripe() -> None:
            self._waiting.pop(id(delivery), None)
            if delivery.share.gone:
                self.give_back(delivery)
            else:
                self.intake.put(delivery, key_of(delivery.record))

        if self._stopped:
            self.give_back(delivery)
        elif seconds <= 0:
            ripe()
        else:
            self._waiting[id(delivery)] = (delivery, self._clock.call_at(self._clock.now() + seconds, ripe))

    def forget(self, gone: Callable[[_Delivery], bool]) -> None:
        """Drops all that is not in work of these: it stays open, and the next member begins with it."""
        dropped: dict[int, _Delivery] = {}

        def drops(delivery: _Delivery) -> bool:
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
                await self._carrier.delete(own)
            self._carrier.ended(self)


class _Listening:
    """Replies to this process: each goes straight to whoever waits, and nothing becomes of it."""

    def __init__(self, carrier: Carrier, channel: Channel, arrived: Callable[[Message], None]) -> None:
        self.channel = channel
        self.feeds: list[_Feed] = []
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
            await self._carrier.delete(feed.topic)
        self._carrier.ended(self)

    abort = stop


class _Group:
    """One consumer: a member of a group, or of none where it has no name, with the topics that it takes.

    Each channel has a group and a consumer of its own. In one for all of a service's channels, a member that comes
    would be given as many partitions as the others have, and these may well be all of one channel and none of another.
    """

    def __init__(self, carrier: Carrier, name: str) -> None:
        self.name = name
        self.feeds: dict[str, _Feed] = {}
        self._carrier = carrier
        self._clock = carrier.clock
        self._shares: dict[Place, _Share] = {}
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

    async def begin(self, place: _Place) -> None:
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
        offsets = dict.fromkeys(missing, 0) if place.new else await self._carrier.ends(missing)
        self._inlet.starts.update(offsets)
        starts = [partition(*one, offsets[one]) for one in missing]
        # a group that others are members of, and we not yet, takes no commit of ours: then they are kept until we are
        with contextlib.suppress(self._carrier.bridge.KafkaException):
            await self._inlet.commit(starts, wait=True)

    def add(self, serving: _Serving, topic: str, *, retry: bool = False) -> None:
        """Subscribes to a topic, soon: others may follow."""
        self._take(serving, topic, retry)
        self._assigned.clear()
        if self._join is None:
            self._join = self._clock.call_at(self._clock.now() + GATHER, self._subscribe)

    async def read(self, serving: _Serving | _Listening, topic: str, places: dict[Place, int]) -> None:
        """Takes a topic's messages from these offsets on, without a group."""
        self._take(serving, topic)
        self.assigned({place: (offset, "") for place, offset in places.items()})
        await self._inlet.assign(places)

    def _take(self, serving: _Serving | _Listening, topic: str, retry: bool = False) -> None:
        feed = self.feeds[topic] = _Feed(topic, serving, self, retry)
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

    async def leave(self, feed: _Feed) -> None:
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
            if isinstance(serving, _Listening):
                serving.hear(record)
                continue
            offset = record.offset()
            if not share.progress.take(offset):
                continue
            share.unsettled += 1
            feed.size += 1
            feed.bytes += len(record)
            delivery = _Delivery(share, record, offset)
            if feed.retry:
                serving.wait(delivery, due(record) - self._clock.wall())
            else:
                serving.intake.put(delivery, key_of(record))
            if feed.size > serving.prefetch or feed.bytes > PREFETCH_BYTES:
                crowded = True
                self._crowded.add(feed.topic)
        if crowded:
            self._inlet.crowd(self._crowded)
        self._later()

    def settled(self, feed: _Feed, prefetch: int) -> None:
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
                self._shares[place] = _Share(feed, place, Progress(offset or 0, note), committed)
        self._assigned.set()
        self._later()

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
    def _forget(shares: Sequence[_Share]) -> None:
        """Takes back all of these partitions that is not in work."""
        if shares:
            gone = {id(share) for share in shares}
            for serving in {share.feed.serving for share in shares}:
                if isinstance(serving, _Serving):
                    serving.forget(lambda delivery: id(delivery.share) in gone)

    def _drop(self, shares: Sequence[_Share]) -> Sequence[Any]:
        """These partitions are ours no longer: what is to be committed of them."""
        for share in shares:
            share.gone = True
            self._shares.pop(share.place, None)
        return self._offsets(shares)

    def _offsets(self, shares: Iterable[_Share], busy: dict[int, int] | None = None) -> Sequence[Any]:
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
            if isinstance(feed.serving, _Serving) and not feed.retry:
                busy[id(feed)] = feed.serving.intake.workers.busy
        if offsets := self._offsets(self._shares.values(), busy):
            self._inlet.commit(offsets).add_done_callback(_heard)


def _heard(future: asyncio.Future[Any]) -> None:
    """It is committed when the consumer is closed, or never."""
    if not future.cancelled():
        future.exception()


class Carrier(Transport):
    """`kafka://user:password@host:9092,host2:9092?sasl=SCRAM-SHA-256&tls=on&partitions=6&replication=3`."""

    traits: ClassVar[frozenset[Trait]] = frozenset(
        {Trait.FANOUT, Trait.DURABLE, Trait.REDELIVERS, Trait.DELAYS, Trait.ORDERED}
    )
    options: ClassVar[frozenset[str]] = (
        frozenset({"sasl", "tls", "partitions", "replication", "heartbeat", "rdkafka.*"}) | TLS_OPTIONS
    )

    def __init__(self, address: Address, clock: Clock = SYSTEM) -> None:
        super().__init__(address, clock)
        partitions, replication = address.option("partitions", PARTITIONS), address.option("replication", -1)
        if not (1 <= partitions < 2**31 and (replication == -1 or 1 <= replication < 2**15)):
            raise AddressError(f"{address}: options partitions= and replication= must be 1 or more")
        self._partitions, self._replication = int(partitions), int(replication)
        self._heartbeat = address.option("heartbeat", HEARTBEAT)
        if not 0 <= self._heartbeat <= 3600:
            raise AddressError(f"{address}: option heartbeat= must be 0 (none) to 3600 seconds")
        self._config = _config(address)
        self._outlet: kafka_bridge.Outlet | None = None
        self._admin: Any = None
        self._groups: list[_Group] = []
        self._servings: set[_Serving | _Listening] = set()
        self.closing = False
        self._topics: dict[str, _Place] = {}  # by channel: those known to exist
        self._asking: dict[str, asyncio.Task[_Place | None]] = {}
        self._tails: set[_Tail] = set()
        self._letters = asyncio.Lock()
        self._up = False
        self._waiting: asyncio.Future[None] | None = None  # of those who wait for the broker
        self._reason = ""  # why no broker is there, as far as librdkafka has told
        self._probe: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None  # for signs of life

    @property
    def connected(self) -> bool:
        return self._up

    @property
    def native(self) -> Clients:
        """The producer, the admin client and the consumers of confluent-kafka. Raises Unavailable."""
        outlet = self._opened()
        return Clients(outlet.producer, self._admin, {group.name: group.ask for group in self._groups})

    @property
    def bridge(self) -> Any:
        return _bridge(self.address)

    @property
    def consuming(self) -> dict[str, Any]:
        return _consuming(self._config)

    async def open(self) -> None:
        """Raises ConfigurationError where confluent-kafka is not installed, Refused where the broker will not have us,
        Unavailable where none answers."""
        bridge = self.bridge
        self._refused = asyncio.get_running_loop().create_future()
        try:
            self._outlet = bridge.Outlet(_producing(self._config), self._trouble)
            self._admin = bridge.AdminClient(_producing(self._config))
        except bridge.KafkaException as error:
            raise AddressError(f"{self.address}: librdkafka does not take its options: {_text(error)}") from None
        answer = asyncio.ensure_future(self.asked(self._admin.describe_cluster(request_timeout=ANSWER)))
        try:
            await asyncio.wait([answer, self._refused], return_when=asyncio.FIRST_COMPLETED)
            if self._refused.done():
                answer.cancel()
                raise Refused(f"{self.address}: {self._refused.result()}")  # noqa: TRY301 - closed below, as all are
            await answer
        except BaseException:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)
            await self.close()
            raise
        self._up, self._reason = True, ""
        if self._heartbeat > 0:
            self._listening = asyncio.get_running_loop().create_task(self._listen())

    async def close(self) -> None:
        self.closing = True
        for task in filter(None, (self._listening, self._probe)):
            task.cancel()
            await asyncio.wait([task])
        for tail in list(self._tails):
            await tail.aclose()
        await asyncio.gather(*(serving.abort() for serving in list(self._servings)))
        await asyncio.gather(*(group.close() for group in list(self._groups)))
        outlet, self._outlet, self._up = self._outlet, None, False
        self._wake()
        if outlet is not None:
            await outlet.close()
        if self._admin is not None:
            # freed in another thread: it waits for threads of its own to end
            await asyncio.to_thread(self._free_admin)

    def _free_admin(self) -> None:
        self._admin = None

    # sending

    def send(self, message: Message) -> Coroutine[Any, Any, None]:
        place = self._topics.get(message.channel.name)
        if place is None:
            return self._send_first(message)
        return self.produce(place.name, message, message.key)

    async def _send_first(self, message: Message) -> None:
        """To a topic of which nothing is known yet."""
        if not self._up:
            await self._returned(_patience(message))
        place = await self._until(message.until, self._place(message.channel))
        if place is not None:  # else a temporary channel that nobody holds
            await self.produce(place.name, message, message.key)

    async def produce(
        self, topic: str, message: Message, key: str, *more: tuple[str, bytes], empty: bool = False
    ) -> None:
        """Returns once the broker has confirmed the record: who gives up before that is cancelled. Raises CallError."""
        body: bytes | None = message.body
        if type(body) is not bytes:
            body = bytes(message.body)
        place = native_of(message.native, Record, _RECORD) if message.native else _RECORD
        while True:
            if not self._up:
                await self._returned(_patience(message))
            outlet = self._opened()
            try:
                headers = to_headers(message, self.clock)
                headers += more
                return await outlet.put(
                    topic, None if empty else body, key or None, headers, place.partition, int(place.timestamp * 1000)
                )
            except BufferError:
                await self._until(message.until, outlet.room(), Overloaded)
            except UnicodeEncodeError as error:
                raise InvalidMessage(f"{message!r} cannot be written as UTF-8: {error}") from None
            except self.bridge.KafkaException as raised:
                if _no_topic(raised):
                    self._topics.pop(message.channel.name, None)
                    if message.channel.temporary and not message.channel.fanout:
                        return None  # nobody holds it any more
                raise self._translated(raised, topic) from None

    async def keep(self, topic: str, copy: Message, key: str, *more: tuple[str, bytes]) -> None:
        """What is not our sender's own to wait for: in STORE seconds, or not. Raises CallError."""
        try:
            async with asyncio.timeout(STORE):
                await self.produce(topic, copy, key, *more)
        except TimeoutError:
            raise DeadlineExceeded(f"{topic} at {self.address}: not confirmed in {STORE:g} s") from None

    async def bury(self, copy: Message) -> None:
        """Puts a message among the dead letters. Raises CallError."""
        place = await self._until(self.clock.now() + STORE, self._place(DEAD_LETTERS))
        assert place is not None  # noqa: S101
        await self.keep(place.name, copy, copy.headers[DEAD_ID], *([(KEY, copy.key.encode())] if copy.key else []))

    # serving

    async def serve(self, channel: Channel, receive: Receive, group: str, limit: int = 100) -> _Serving:
        self._opened()
        place = await self._place(channel, holder=True)
        assert place is not None  # noqa: S101
        if channel.temporary:
            serving = _Serving(self, channel, receive, group, limit, None)
            places = [(place.name, number) for number in range(place.partitions)]
            offsets = await self.ends(places) if channel.fanout and not place.new else dict.fromkeys(places, 0)
            if not channel.fanout:
                serving.own(place.name)
            await self._group("", place.name).read(serving, place.name, offsets)
        else:
            retry = await self._place(Channel(retry_channel(channel, group), durable=True)) if channel.durable else None
            serving = _Serving(self, channel, receive, group, limit, retry)
            member = self._group(group_name(channel, group), place.name)
            start = native_of(channel.native, Topic, _TOPIC).start or ("latest" if channel.fanout else "earliest")
            member.coming += 1
            try:
                if start == "latest":
                    await member.begin(place)
            finally:
                member.coming -= 1
            member.add(serving, place.name)
            if retry is not None:
                self._group(retry_group(channel, group), retry.name).add(serving, retry.name, retry=True)
        self._servings.add(serving)
        return serving

    async def listen(self, channel: Channel, arrived: Callable[[Message], None]) -> _Listening:
        self._opened()
        place = await self._place(channel, holder=True)
        assert place is not None  # noqa: S101
        listening = _Listening(self, channel, arrived)
        places = [(place.name, number) for number in range(place.partitions)]
        await self._group("", place.name).read(listening, place.name, dict.fromkeys(places, 0))
        self._servings.add(listening)
        return listening

    async def ready(self) -> None:
        await asyncio.gather(*(group.ready() for group in self._groups))

    def _group(self, name: str, topic: str) -> _Group:
        """A member of the group that does not take this topic yet."""
        for group in self._groups:
            if group.name == name and topic not in group.feeds:
                return group
        group = _Group(self, name)
        self._groups.append(group)
        return group

    def ended(self, serving: _Serving | _Listening) -> None:
        self._servings.discard(serving)

    def forget(self, group: _Group) -> None:
        if group in self._groups:
            self._groups.remove(group)

    # topics

    async def _place(self, channel: Channel, *, holder: bool = False) -> _Place | None:
        """The channel's topic, made where there is none; None of a temporary channel that nobody holds."""
        if found := self._topics.get(channel.name):
            return found
        asking = self._asking.get(channel.name)
        if asking is None:
            asking = asyncio.get_running_loop().create_task(self._find(channel, holder or not channel.temporary))
            self._asking[channel.name] = asking
            asking.add_done_callback(lambda _: self._asking.pop(channel.name, None))
        return await asyncio.shield(asking)

    async def _find(self, channel: Channel, make: bool) -> _Place | None:
        found: _Place | None = None
        for name in (topic_name(channel.name), topic_name(channel.name, collides=True)):
            found = await self._describe(name)
            if found is None and make:
                found = await self._make(name, channel)
            if found is not None or not make:
                break
        if found is not None:
            if len(self._topics) >= KNOWN:
                self._topics.clear()
            self._topics[channel.name] = _Place(found.name, found.partitions)
        return found

    async def _describe(self, name: str) -> _Place | None:
        bridge = self.bridge
        answer = self._admin.describe_topics(bridge.TopicCollection([name]), request_timeout=ANSWER)[name]
        try:
            found = await asyncio.wrap_future(answer)
        except bridge.KafkaException as raised:
            if _no_topic(raised):
                return None
            raise self._translated(raised, "") from None
        return _Place(name, len(found.partitions))

    async def _make(self, name: str, channel: Channel) -> _Place | None:
        """Makes the topic; None where Kafka takes its name for another topic's."""
        options = native_of(channel.native, Topic, _TOPIC)
        partitions = options.partitions or self._partitions
        config = {"max.message.bytes": str(LARGEST)}
        if channel.name == DEAD:
            partitions = 1
            config = {"cleanup.policy": "compact", "max.message.bytes": str(2 * LARGEST)}
        elif channel.temporary and not channel.fanout:
            partitions = 1
        if not channel.durable and not (channel.temporary and channel.fanout):
            config |= {"retention.ms": str(BRIEFLY), "segment.ms": str(BRIEFLY)}
        topic = self.bridge.NewTopic(
            name, partitions, options.replication or self._replication, config=config | dict(options.config)
        )
        error: Any = None
        try:
            await asyncio.wrap_future(self._admin.create_topics([topic], operation_timeout=ANSWER)[name])
        except self.bridge.KafkaException as raised:
            error = raised.args[0]
            if error.code() == error.TOPIC_EXCEPTION and "collides" in error.str():
                return None
            if error.code() != error.TOPIC_ALREADY_EXISTS:
                raise self._translated(raised, name) from None
        give_up = self.clock.now() + START
        while (found := await self._describe(name)) is None:  # its broker may not have heard of it yet
            if self.clock.now() > give_up:
                raise Unavailable(f"topic {name} at {self.address} was made, and is not there yet")
            await self.clock.sleep(0.01)
        return _Place(name, found.partitions, new=error is None)

    async def ends(self, places: Sequence[Place], spec: Any = None) -> dict[Place, int]:
        """The offsets at the ends of these partitions, or of the given OffsetSpec."""
        bridge = self.bridge
        found: dict[Place, int] = {}
        give_up = self.clock.now() + ANSWER
        while missing := [place for place in places if place not in found]:
            wanted = {bridge.TopicPartition(*place): spec or bridge.OffsetSpec.latest() for place in missing}
            answers = self._admin.list_offsets(wanted, request_timeout=ANSWER)
            for partition, answer in answers.items():
                try:
                    offset = (await self.asked(answer)).offset
                except (Unavailable, TransportError):  # right after it was made a partition may have no leader yet
                    if self.clock.now() > give_up:
                        raise
                else:
                    found[partition.topic, partition.partition] = offset
            if len(found) < len(places):
                await self.clock.sleep(0.02)
        return found

    async def delete(self, topic: str) -> None:
        """Deletes a topic of ours; one that cannot be deleted now is left, and keeps nothing for long."""
        for name in [name for name, place in self._topics.items() if place.name == topic]:
            del self._topics[name]
        if self._up and self._admin is not None:
            with contextlib.suppress(TransportError, CallError):
                await self.asked(self._admin.delete_topics([topic], request_timeout=ANSWER)[topic])

    # the one door of librdkafka's errors

    async def asked(self, answer: Any) -> Any:
        """Waits for what librdkafka was asked. Raises Unavailable or TransportError."""
        try:
            return await (answer if asyncio.isfuture(answer) else asyncio.wrap_future(answer))
        except self.bridge.KafkaException as error:
            raise self._translated(error, "") from None

    def _translated(self, raised: Any, topic: str) -> CallError:
        error: KafkaError = raised.args[0]
        where = f"{topic} at {self.address}" if topic else str(self.address)
        code, text = error.code(), error.str()
        if code in (error._TIMED_OUT, error._TRANSPORT) and not self._up:
            return Unavailable(f"{where}: no broker answers: {self._reason or UNHEARD}")
        if _no_topic(raised):
            return Unavailable(f"{where}: there is no such topic, or no such partition of it")
        if code in (error.MSG_SIZE_TOO_LARGE, error.RECORD_LIST_TOO_LARGE):
            return TooLarge(f"{where}: {text}; Topic(config={{'max.message.bytes': ...}}) allows more")
        if code in (error.INVALID_MSG, error.INVALID_RECORD):
            return InvalidMessage(f"{where}: {text}")
        if code == error._MSG_TIMED_OUT:
            return ConnectionLost(f"{where}: not confirmed within {GIVE_UP:g} s")
        if code in (error._PURGE_INFLIGHT, error._PURGE_QUEUE, error._DESTROY):
            return ConnectionLost(f"{where}: it was closed before the broker had confirmed")
        if code in (error.NOT_ENOUGH_REPLICAS, error.THROTTLING_QUOTA_EXCEEDED, error.POLICY_VIOLATION):
            return Overloaded(f"{where}: {text}")
        if error.fatal() or code in (error.OUT_OF_ORDER_SEQUENCE_NUMBER, error.NOT_ENOUGH_REPLICAS_AFTER_APPEND):
            return ConnectionLost(f"{where}: {text}")
        return Unavailable(f"{where}: {text}")

    # the connection

    def _opened(self) -> kafka_bridge.Outlet:
        if self._outlet is None:
            raise Unavailable(f"{self.address} is not open: open it first, and send before it is closed")
        return self._outlet

    def _trouble(self, error: KafkaError) -> None:
        code = error.code()
        if code in (error._AUTHENTICATION, error.SASL_AUTHENTICATION_FAILED, error._SSL):
            if not self._refused.done():
                self._refused.set_result(_told(error))
        elif error.fatal():
            if self._outlet is not None:  # this producer takes nothing any more: another does
                old, self._outlet = self._outlet, self.bridge.Outlet(_producing(self._config), self._trouble)
                self._ending = asyncio.get_running_loop().create_task(old.close())
        elif code != error._ALL_BROKERS_DOWN:
            self._reason = _told(error)
        elif self._up:
            self._lose(self._reason or "the broker closed the connection")
        else:
            self._reason = self._reason or HUNG_UP

    def _lose(self, reason: str) -> None:
        self._up, self._reason = False, reason
        self._probe = asyncio.get_running_loop().create_task(self._return())

    async def _listen(self) -> None:
        """Asks for a sign of life: librdkafka itself does not mind a broker that is silent."""
        every, missed = self._heartbeat, 0
        while True:
            if not missed or not self._up:  # after a first miss it is asked again at once
                missed = 0
                await self.clock.sleep(every)
            try:
                await self.asked(self._admin.describe_cluster(request_timeout=max(every, 1.0)))
                missed = 0
            except (CallError, TransportError):
                missed += 1
            if missed == 2 and self._up:
                self._lose(f"the broker was silent for {2 * max(every, 1.0):g} s")

    async def _return(self) -> None:
        """Waits until a broker answers again."""
        told = False
        while True:
            try:
                await self.asked(self._admin.describe_cluster(request_timeout=1.0))
            except (CallError, TransportError):
                if not told:
                    told = True
                    self.tell("broker-lost", str(self.address), self._reason)
                await self.clock.sleep(0.05)
            else:
                break
        self._up, self._reason = True, ""
        self._wake()
        if told:
            self.tell("broker-back", str(self.address))

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    async def _returned(self, until: float | None) -> None:
        """Waits until a broker is there. Raises Unavailable (not sent) where that is not by `until`."""
        while not self._up:
            self._opened()
            self._waiting = self._waiting or asyncio.get_running_loop().create_future()
            await self._until(until, asyncio.shield(self._waiting))

    async def _until(self, until: float | None, awaitable: Awaitable[Any], kind: type[CallError] = Unavailable) -> Any:
        """Waits, but not longer: the message is not sent then, and that is said before its sender's own time-out."""
        if until is None:
            return await awaitable
        limit = asyncio.timeout(until - SAYS_BEFORE - self.clock.now())
        try:
            async with limit:
                return await awaitable
        except TimeoutError:
            if not limit.expired():
                raise
            away = f"the broker is away: {self._reason}".removesuffix(": ")
            reason = "as many messages as it may hold wait to be sent" if kind is Overloaded else away
            raise kind(f"{self.address}: not sent, {reason}") from None

    # looking in

    async def dead(self, channel: str | None = None) -> Sequence[DeadLetter]:
        letters = [letter(message) for message in (await self._dead()).values()]
        found = [one for one in letters if channel in (None, one.channel)]
        return sorted(found, key=lambda one: one.died_at)

    async def replay(self, ids: Sequence[str]) -> int:
        count = 0
        found = await self._dead()
        for id_ in ids:
            if id_ not in found:
                continue
            message, group = revive(found[id_])
            # a point-to-point channel has one group only; of a fan-out channel no other group may get it
            channel = Channel(retry_channel(message.channel, group)) if message.channel.fanout else message.channel
            place = await self._find(channel, make=False)
            if place is None:
                continue  # of a group that was there for a while only
            await self.produce(place.name, message, message.key)
            await self._bury_for_ever(id_)
            count += 1
        return count

    async def drop(self, ids: Sequence[str]) -> int:
        found = await self._dead()
        known = [id_ for id_ in dict.fromkeys(ids) if id_ in found]
        for id_ in known:
            await self._bury_for_ever(id_)
        return len(known)

    async def _bury_for_ever(self, id_: str) -> None:
        """A record without a value: compaction drops the letter, and readers do so at once."""
        await self.produce(DEAD, Message(channel=DEAD_LETTERS), id_, empty=True)

    async def _dead(self) -> dict[str, Message]:
        self._opened()
        place = await self._find(DEAD_LETTERS, make=False)
        if place is None:
            return {}
        bridge, config = self.bridge, self.consuming
        async with self._letters:
            records = await asyncio.to_thread(bridge.read_all, config, place.name, place.partitions)
        found: dict[str, Message] = {}
        for record in records:
            found.pop(key_of(record), None)
            if record.value() is not None:
                found[key_of(record)] = from_record(record, DEAD_LETTERS, self.clock)
        return found

    def tail(self, channel: str) -> _Tail:
        self._opened()
        tail = _Tail(self, channel)
        self._tails.add(tail)
        return tail

    async def channels(self) -> Sequence[ChannelState]:
        """What waits is what is not committed; what is in work is as of the last commit, a tenth of a second ago."""
        dead: dict[tuple[str, str], int] = {}
        for each in await self.dead():
            dead[each.channel, each.group] = dead.get((each.channel, each.group), 0) + 1
        offsets: dict[tuple[str, str], list[Any]] = {}
        groups = await self.asked(self._admin.list_consumer_groups(request_timeout=ANSWER))
        for group in (one.group_id for one in groups.valid):
            asked = [self.bridge.ConsumerGroupTopicPartitions(group)]
            answer = self._admin.list_consumer_group_offsets(asked, request_timeout=ANSWER)[group]
            for place in (await self.asked(answer)).topic_partitions:
                if place.error is None and place.offset >= 0:
                    offsets.setdefault((place.topic, group), []).append(place)
        topics = set(await self.topics())
        known = {key: places for key, places in offsets.items() if key[0] in topics}
        wanted = list(dict.fromkeys(_at(one) for places in known.values() for one in places))
        ends, firsts = await self.ends(wanted), await self.ends(wanted, self.bridge.OffsetSpec.earliest())
        states: list[ChannelState] = []
        for (topic, group), places in sorted(known.items()):
            if topic.startswith(OURS):
                continue
            name = "" if group == topic else group.removesuffix(f".{topic}")
            channel = Channel(topic, fanout=bool(name))
            retry = known.get((topic_name(retry_channel(channel, name)), retry_group(channel, name)), [])
            lag = sum(max(0, ends[at] - max(one.offset, firsts[at])) for one in (*places, *retry) for at in [_at(one)])
            busy = min(lag, sum(in_work(place.metadata or "") for place in places))
            count = dead.get((topic, name), 0)
            state = ChannelState(channel=topic, group=name, waiting=lag - busy, in_work=busy, dead=count, oldest=None)
            states.append(state)
        return states

    async def topics(self) -> dict[str, int]:
        """All topics with the number of their partitions, but for Kafka's own."""
        found = await asyncio.to_thread(self._admin.list_topics, timeout=ANSWER)
        return {name: len(topic.partitions) for name, topic in found.topics.items() if not name.startswith("__")}

    async def examine(self) -> Sequence[Finding]:
        cluster = await self.asked(self._admin.describe_cluster(request_timeout=ANSWER))
        settings = await self._settings(cluster.nodes[0].id)
        brokers = ", ".join(f"{node.id} at {node.host}:{node.port}" for node in cluster.nodes)
        found = [
            Finding("version", f"Apache Kafka {await self._version(settings)}"),
            Finding("cluster", f"{cluster.cluster_id}: {brokers}"),
            await self._try_topic(),
        ]
        for name, limit, otherwise in LIMITS:
            value = settings.get(name, "")
            if not value:
                found.append(Finding(name, "not told: users need the right to describe the cluster's configuration"))
                break
            well = limit is None or float(value) >= limit
            found.append(Finding(name, value if well else f"{value}: {otherwise}", well=well))
        return found

    async def _settings(self, broker: int) -> Mapping[str, str]:
        """The broker's configuration; empty where we may not know."""
        resource = self.bridge.ConfigResource(self.bridge.ConfigResource.Type.BROKER, str(broker))
        try:
            answer = self._admin.describe_configs([resource], request_timeout=ANSWER)[resource]
            return {name: entry.value or "" for name, entry in (await self.asked(answer)).items()}
        except (CallError, TransportError):
            return {}

    async def _version(self, settings: Mapping[str, str]) -> str:
        """What version its brokers work together as: no client is told which one each is."""
        if older := settings.get("inter.broker.protocol.version"):  # until Kafka 4
            return older
        context = tls(self.address) if "SSL" in self._config["security.protocol"] else None
        for host, port in self.address.hosts:
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                async with asyncio.timeout(ANSWER):
                    reader, writer = await asyncio.open_connection(host or "127.0.0.1", port or PORT, ssl=context)
                    try:
                        writer.write(VERSIONS_ASKED)
                        answer = await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
                    finally:
                        writer.close()
                if found := version(answer):
                    return found
        return "of unknown version"

    async def _try_topic(self) -> Finding:
        """Whether topics can be made: asked, not tried."""
        topic = self.bridge.NewTopic(f"{OURS}doctor", self._partitions, self._replication)
        try:
            await self.asked(
                self._admin.create_topics([topic], validate_only=True, request_timeout=ANSWER)[topic.topic]
            )
        except (CallError, TransportError) as error:
            otherwise = "users need the right to create topics, or all topics must be there before (docs/kafka.md)"
            return Finding("makes topics", f"not possible: {error}; {otherwise}", well=False)
        return Finding("makes topics", f"yes, of {self._partitions} partitions")


LIMITS: Final = (
    (
        "default.replication.factor",
        2,
        "what a broker has accepted is lost with its disk; make topics of ?replication=3",
    ),
    ("min.insync.replicas", None, ""),
    ("offsets.retention.minutes", 1440, "a group that was away for longer begins anew, and misses what was sent"),
    ("group.min.session.timeout.ms", None, ""),
)
"""Settings of a broker, the least value that they should have, and what is to be said of less."""

OURS = "quintet."
KNOWN = 10_000  # topics that are remembered


def _no_topic(raised: Any) -> bool:
    error = raised.args[0]
    return error.code() in (error.UNKNOWN_TOPIC_OR_PART, error._UNKNOWN_TOPIC, error._UNKNOWN_PARTITION)


def _patience(message: Message) -> float | None:
    """How long it may wait to be sent."""
    return message.deadline if message.until is None else message.until


def _at(partition: Any) -> Place:
    return (partition.topic, partition.partition)


class _Tail:
    """Copies of what is sent to the topics that a pattern matches, from the moment this object is made."""

    def __init__(self, carrier: Carrier, pattern: str) -> None:
        self._carrier = carrier
        self._prefix = pattern.removesuffix("*")
        self._exact = self._prefix == pattern
        self._since = int(carrier.clock.wall() * 1000) + 1
        self._kept: asyncio.Queue[Message | None] = asyncio.Queue(TAIL_KEPT)
        self._known: set[str] = set()
        self._inlet: Any = None
        self._watch = asyncio.get_running_loop().create_task(self._follow())

    def __aiter__(self) -> _Tail:
        return self

    async def __anext__(self) -> Message:
        message = await self._kept.get()
        if message is None:
            self._kept.put_nowait(None)
            raise StopAsyncIteration
        return message

    async def aclose(self) -> None:
        self._carrier._tails.discard(self)
        self._watch.cancel()
        await asyncio.wait([self._watch])
        if self._inlet is not None:
            await self._inlet.close()
        self._put(None)

    def _matches(self, topic: str) -> bool:
        if self._exact:
            return topic == topic_name(self._prefix)
        return topic.startswith(self._prefix) and (self._prefix.startswith(OURS) or not topic.startswith(OURS))

    async def _follow(self) -> None:
        """Begins with the topics that are there, and looks for others from time to time."""
        carrier, first = self._carrier, True
        bridge = carrier.bridge
        self._inlet = bridge.Inlet(carrier.consuming, "", self)
        while True:
            with contextlib.suppress(CallError, bridge.KafkaException):
                topics = await carrier.topics()
                more = {topic: count for topic, count in topics.items() if self._matches(topic)}
                places = [
                    (topic, number)
                    for topic, count in more.items()
                    if topic not in self._known
                    for number in range(count)
                ]
                if places and first:
                    ends = await carrier.ends(places)  # first these, so that nothing falls between the two
                    since = await carrier.ends(places, bridge.OffsetSpec.for_timestamp(self._since))
                    await self._inlet.assign(
                        {place: max(since[place], -1) if since[place] >= 0 else ends[place] for place in places}
                    )
                elif places:
                    await self._inlet.assign(dict.fromkeys(places, 0))
                self._known |= more.keys()
                first = False
            await carrier.clock.sleep(TAIL_LOOKS)

    def _put(self, message: Message | None) -> None:
        if self._kept.full():
            self._kept.get_nowait()
        self._kept.put_nowait(message)

    def arrived(self, records: Sequence[Any]) -> None:
        for record in records:
            if record.error() is None:
                channel = Channel(record.topic())
                self._put(from_record(record, channel, self._carrier.clock))

    def assigned(self, places: dict[Place, tuple[int | None, str]]) -> None:
        """Never called: it is a member of no group."""

    async def revoked(self, places: Iterable[Place]) -> Sequence[Any]:  # noqa: ARG002
        return ()

    def lost(self, places: Iterable[Place]) -> None:
        """Never called."""

    def uncommitted(self, places: Iterable[Place]) -> None:
        """Never called."""

    def failed(self) -> None:
        """Never called."""


TAIL_KEPT = 10_000  # messages that one tail may lag behind; the oldest goes first
TAIL_LOOKS = 0.5  # seconds between two looks for new topics


# what librdkafka is told

SILENT = logging.Logger("quintet.librdkafka", logging.CRITICAL + 1)
"""It says to stderr what no level keeps it from."""


def _bridge(address: Address) -> Any:
    try:
        from quintet import kafka_bridge
    except ImportError as error:
        raise ConfigurationError(
            f"{address}: Kafka needs the library confluent-kafka: pip install 'quintet[kafka]' ({error})"
        ) from None
    return kafka_bridge


def _config(address: Address) -> dict[str, Any]:
    options = address.options
    hosts = ",".join(f"{host or '127.0.0.1'}:{port or PORT}" for host, port in address.hosts)
    config: dict[str, Any] = {
        "bootstrap.servers": hosts,
        "client.id": "quintet",
        "log_level": 0,  # what matters is raised or told
        "logger": SILENT,
        "allow.auto.create.topics": False,
        "reconnect.backoff.ms": 50,
        "reconnect.backoff.max.ms": 500,
        "retry.backoff.ms": 50,
        "retry.backoff.max.ms": 500,
        "socket.connection.setup.timeout.ms": 5000,
        "socket.keepalive.enable": True,
        "socket.timeout.ms": 6000,
        "topic.metadata.propagation.max.ms": 2000,
        "topic.metadata.refresh.fast.interval.ms": 50,
    }
    secured = address.scheme == "kafkas"
    if "tls" in options:
        if options["tls"] not in ("on", "off"):
            raise AddressError(f"{address}: option tls={options['tls']!r} must be on or off")
        secured = options["tls"] == "on"
    user, password = credentials(address)
    if "sasl" in options and not user:
        raise AddressError(f"{address}: option sasl= needs a user: kafka://user:password@host or QUINTET_KAFKA_USER")
    config["security.protocol"] = ("SASL_" if user else "") + ("SSL" if secured else "PLAINTEXT")
    if user:
        mechanism = options.get("sasl", "PLAIN")
        if mechanism not in MECHANISMS:
            raise AddressError(f"{address}: option sasl={mechanism!r} must be one of {', '.join(MECHANISMS)}")
        config |= {"sasl.mechanism": mechanism, "sasl.username": user, "sasl.password": password}
    config |= _tls(address) if secured else {}
    if "rdkafka.debug" in options or "rdkafka.log_level" in options:
        del config["logger"]
    return config | {
        name.removeprefix("rdkafka."): value for name, value in options.items() if name.startswith("rdkafka.")
    }


def _tls(address: Address) -> dict[str, Any]:
    options, config = address.options, dict[str, Any]()
    for name, setting in (
        ("ca", "ssl.ca.location"),
        ("cert", "ssl.certificate.location"),
        ("certkey", "ssl.key.location"),
    ):
        if name in options:
            if not Path(options[name]).is_file():
                raise AddressError(f"{address}: option {name}={options[name]!r} is no file")
            config[setting] = options[name]
    if (verify := options.get("verify", "on")) not in ("on", "off"):
        raise AddressError(f"{address}: option verify={verify!r} must be on or off")
    if verify == "off":
        config["enable.ssl.certificate.verification"] = False
    return config


def _producing(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "enable.idempotence": True,
        "linger.ms": 1,  # where many are outstanding (kafka_bridge.FEW): a third of the work, for all three
        "max.in.flight.requests.per.connection": 1,  # what comes meanwhile goes together
        "message.max.bytes": 2 * LARGEST,
        "message.timeout.ms": int(GIVE_UP * 1000),
        "partitioner": "murmur2_random",  # the Java clients' own: a key goes where their messages of that key go
        "queue.buffering.max.kbytes": 64 * 1024,
        "request.timeout.ms": 5000,
    } | config


def _consuming(config: dict[str, Any]) -> dict[str, Any]:
    member = {
        "heartbeat.interval.ms": 300,  # by which a member learns that another has come
        # who stays goes on with what it has, also while the group waits for a member that is dead
        "partition.assignment.strategy": "cooperative-sticky",
        "session.timeout.ms": 10_000,
    }
    if config.get("group.protocol") == "consumer":  # there the broker decides on these
        member = {}
    return (
        {
            "auto.offset.reset": "earliest",
            "enable.auto.offset.store": False,
            "fetch.error.backoff.ms": 50,
            "fetch.max.bytes": 16 * 1024 * 1024,
            "fetch.queue.backoff.ms": 5,
            "fetch.wait.max.ms": 200,  # partitions that are new wait so long for those that have nothing
            "message.max.bytes": 2 * LARGEST,
            "queued.max.messages.kbytes": 16 * 1024,
            "queued.min.messages": 1000,  # of each partition; what was fetched comes even when that is paused
            "topic.metadata.refresh.interval.ms": 30_000,
        }
        | member
        | config
    )


def _text(raised: Any) -> str:
    return str(raised.args[0].str())


HUNG_UP = "the connection is closed before an answer: it may want TLS (?tls=on), or a login (user:password@, ?sasl=)"
UNHEARD = "nothing is said there; does a broker of Kafka listen on that port?"
ADVICE = {
    "Connection refused": "is a broker running there?",
    "Failed to resolve": "is the host's name right?",
    "SSL connection closed by peer": "does that port speak TLS?",
    "current SASL state": "no login is wanted on that port",
}
"""What to do, by what librdkafka's texts hold."""


def _told(error: KafkaError) -> str:
    """What happened to a connection, where, and what to do."""
    text = re.sub(r"/bootstrap(?=:)| \(after [^)]*\)", "", error.str()).rstrip(": ")
    if error.code() == error._BAD_MSG:
        return f"{text.partition(': ')[0]}: what answers there is not Kafka, or wants TLS (?tls=on)"
    return "; ".join([text, *(advice for mark, advice in ADVICE.items() if mark in text)])
