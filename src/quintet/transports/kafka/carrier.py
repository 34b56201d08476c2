"""The transport: opens, closes, sends, serves, and knows whether the broker is there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from msgspec import Struct

from quintet.clock import SYSTEM, Clock
from quintet.connection import SAYS_BEFORE, TLS_OPTIONS, Refused
from quintet.errors import (
    AddressError,
    CallError,
    ConfigurationError,
    DeadlineExceeded,
    InvalidMessage,
    Overloaded,
    TransportError,
    Unavailable,
)
from quintet.message import Channel, Message, native_of
from quintet.transport import Address, ChannelState, DeadLetter, Finding, Receive, Trait, Transport
from quintet.transports.kafka.failures import HUNG_UP, UNHEARD, no_topic, purged, text, told, translated
from quintet.transports.kafka.inspection import Tail, channels, examine
from quintet.transports.kafka.letters import Letters
from quintet.transports.kafka.members import Group, Listening, Serving
from quintet.transports.kafka.options import RECORD, TOPIC, Record, Topic
from quintet.transports.kafka.settings import ANSWER, STORE, config, consuming, producing
from quintet.transports.kafka.topics import Topics
from quintet.wire.kafka import group_name, retry_channel, retry_group, to_headers

if TYPE_CHECKING:
    from confluent_kafka import KafkaError

    from quintet.transports.kafka.bridge import Outlet

PARTITIONS = 6  # of a topic that is made here, unless ?partitions= or Topic(partitions=) says otherwise
HEARTBEAT = 5.0  # seconds between two questions whether the broker is there, unless ?heartbeat= says otherwise


class Clients(Struct, frozen=True):
    """The clients of confluent-kafka behind a transport, for what only Kafka can do."""

    producer: Any
    admin: Any
    consumers: Mapping[str, Callable[[Callable[[Any], Any]], Awaitable[Any]]]
    """By group, "" is the one that takes part in none. Each belongs to a thread of ours, and may be used there only:
    `await consumers["trips.v1"](lambda consumer: consumer.memberid())`."""


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
        self.partitions, self.replication = address.count("partitions", PARTITIONS), address.count("replication", -1)
        self._heartbeat = address.option("heartbeat", HEARTBEAT)
        self.config = config(address)
        self._outlet: Outlet | None = None
        self.admin: Any = None
        self._groups: list[Group] = []
        self._servings: set[Serving | Listening | Tail] = set()
        self.closing = False
        self.topics = Topics(self)
        self._letters = Letters(self)
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
        outlet = self.opened()
        return Clients(outlet.producer, self.admin, {group.name: group.ask for group in self._groups})

    @property
    def bridge(self) -> Any:
        return _library(self.address)

    @property
    def consuming(self) -> dict[str, Any]:
        return consuming(self.config)

    async def open(self) -> None:
        """Raises ConfigurationError where confluent-kafka is not installed, Refused where the broker will not have us,
        Unavailable where none answers."""
        bridge = self.bridge
        self._refused = asyncio.get_running_loop().create_future()
        try:
            self._outlet = bridge.Outlet(producing(self.config), self._trouble)
            self.admin = bridge.AdminClient(producing(self.config))
        except bridge.KafkaException as error:
            raise AddressError(f"{self.address}: librdkafka does not take its options: {text(error)}") from None
        answer = asyncio.ensure_future(self.asked(self.admin.describe_cluster(request_timeout=ANSWER)))
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
        await asyncio.gather(*(serving.abort() for serving in list(self._servings)))
        await asyncio.gather(*(group.close() for group in list(self._groups)))
        outlet, self._outlet, self._up = self._outlet, None, False
        self._wake()
        if outlet is not None:
            await outlet.close()
        if self.admin is not None:
            # freed in another thread: it waits for threads of its own to end
            await asyncio.to_thread(self._free_admin)

    def _free_admin(self) -> None:
        self.admin = None

    # sending

    def send(self, message: Message) -> Coroutine[Any, Any, None]:
        place = self.topics.known.get(message.channel.name)
        if place is None:
            return self._send_first(message)
        return self.produce(place.name, message, message.key)

    async def _send_first(self, message: Message) -> None:
        """To a topic of which nothing is known yet."""
        if not self._up:
            await self._returned(_patience(message))
        place = await self.until(message.until, self.topics.place(message.channel))
        if place is not None:  # else a temporary channel that nobody holds
            await self.produce(place.name, message, message.key)

    async def produce(
        self, topic: str, message: Message, key: str, *more: tuple[str, bytes], empty: bool = False
    ) -> None:
        """Returns once the broker has confirmed the record: who gives up before that is cancelled. Raises CallError."""
        body: bytes | None = message.body
        if type(body) is not bytes:
            body = bytes(message.body)
        partition, timestamp = _where(message) if message.native else (-1, 0)
        while True:
            if not self._up:
                await self._returned(_patience(message))
            outlet = self.opened()
            try:
                headers = to_headers(message, self.clock)
                if more:
                    headers += more
                return await outlet.put(topic, None if empty else body, key or None, headers, partition, timestamp)
            except BufferError:
                await self.until(message.until, outlet.room(), Overloaded)
            except UnicodeEncodeError as error:
                raise InvalidMessage(f"{message!r} cannot be written as UTF-8: {error}") from None
            except self.bridge.KafkaException as raised:
                # what waits for a topic that goes away at this moment goes with it
                if no_topic(raised) or (purged(raised) and outlet is self._outlet):
                    self.topics.known.pop(message.channel.name, None)
                    if message.channel.temporary and not message.channel.fanout:
                        return None  # nobody holds it any more
                raise self.translated(raised, topic) from None

    async def keep(self, topic: str, copy: Message, key: str, *more: tuple[str, bytes]) -> None:
        """What is not our sender's own to wait for: in STORE seconds, or not. Raises CallError."""
        try:
            async with asyncio.timeout(STORE):
                await self.produce(topic, copy, key, *more)
        except TimeoutError:
            raise DeadlineExceeded(f"{topic} at {self.address}: not confirmed in {STORE:g} s") from None

    async def bury(self, copy: Message) -> None:
        """Puts a message among the dead letters. Raises CallError."""
        await self._letters.bury(copy)

    # serving

    async def serve(self, channel: Channel, receive: Receive, group: str, limit: int = 100) -> Serving:
        self.opened()
        place = await self.topics.place(channel, holder=True)
        assert place is not None  # noqa: S101
        if channel.temporary:
            serving = Serving(self, channel, receive, group, limit, None)
            places = [(place.name, number) for number in range(place.partitions)]
            offsets = await self.topics.ends(places) if channel.fanout and not place.new else dict.fromkeys(places, 0)
            if not channel.fanout:
                serving.own(place.name)
            await self._group("", place.name).read(serving, place.name, offsets)
        else:
            retry = (
                await self.topics.place(Channel(retry_channel(channel, group), durable=True))
                if channel.durable
                else None
            )
            serving = Serving(self, channel, receive, group, limit, retry)
            member = self._group(group_name(channel, group), place.name)
            start = native_of(channel.native, Topic, TOPIC).start or ("latest" if channel.fanout else "earliest")
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

    async def listen(self, channel: Channel, arrived: Callable[[Message], None]) -> Listening:
        self.opened()
        place = await self.topics.place(channel, holder=True)
        assert place is not None  # noqa: S101
        listening = Listening(self, channel, arrived)
        places = [(place.name, number) for number in range(place.partitions)]
        await self._group("", place.name).read(listening, place.name, dict.fromkeys(places, 0))
        self._servings.add(listening)
        return listening

    async def ready(self) -> None:
        await asyncio.gather(*(group.ready() for group in self._groups))

    def _group(self, name: str, topic: str) -> Group:
        """A member of the group that does not take this topic yet."""
        for group in self._groups:
            if group.name == name and topic not in group.feeds:
                return group
        group = Group(self, name)
        self._groups.append(group)
        return group

    def ended(self, serving: Serving | Listening | Tail) -> None:
        self._servings.discard(serving)

    def forget(self, group: Group) -> None:
        if group in self._groups:
            self._groups.remove(group)

    # librdkafka's answers and errors

    async def asked(self, answer: Any) -> Any:
        """Waits for what librdkafka was asked. Raises Unavailable or TransportError."""
        try:
            return await (answer if asyncio.isfuture(answer) else asyncio.wrap_future(answer))
        except self.bridge.KafkaException as error:
            raise self.translated(error, "") from None

    def translated(self, raised: Any, topic: str) -> CallError:
        """What a KafkaException means."""
        where = f"{topic} at {self.address}" if topic else str(self.address)
        return translated(raised, where, "" if self._up else self._reason or UNHEARD)

    # the connection

    def opened(self) -> Outlet:
        if self._outlet is None:
            raise Unavailable(f"{self.address} is not open: open it first, and send before it is closed")
        return self._outlet

    def _trouble(self, error: KafkaError) -> None:
        code = error.code()
        if code in (error._AUTHENTICATION, error.SASL_AUTHENTICATION_FAILED, error._SSL):
            if not self._refused.done():
                self._refused.set_result(told(error))
        elif error.fatal():
            if self._outlet is not None:  # this producer takes nothing any more: another does
                old, self._outlet = self._outlet, self.bridge.Outlet(producing(self.config), self._trouble)
                self._ending = asyncio.get_running_loop().create_task(old.close())
        elif code != error._ALL_BROKERS_DOWN:
            self._reason = told(error)
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
                await self.asked(self.admin.describe_cluster(request_timeout=max(every, 1.0)))
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
                await self.asked(self.admin.describe_cluster(request_timeout=1.0))
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
            self.opened()
            self._waiting = self._waiting or asyncio.get_running_loop().create_future()
            await self.until(until, asyncio.shield(self._waiting))

    async def until(self, until: float | None, awaitable: Awaitable[Any], kind: type[CallError] = Unavailable) -> Any:
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
        return await self._letters.dead(channel)

    async def replay(self, ids: Sequence[str]) -> int:
        return await self._letters.replay(ids)

    async def drop(self, ids: Sequence[str]) -> int:
        return await self._letters.drop(ids)

    def tail(self, channel: str) -> Tail:
        self.opened()
        tail = Tail(self, channel)
        self._servings.add(tail)
        return tail

    async def channels(self) -> Sequence[ChannelState]:
        return await channels(self)

    async def examine(self) -> Sequence[Finding]:
        return await examine(self)


def _where(message: Message) -> tuple[int, int]:
    """Its partition, -1 for the one of its key, and its time in milliseconds, 0 for now."""
    record = native_of(message.native, Record, RECORD)
    return record.partition, int(record.timestamp * 1000)


def _patience(message: Message) -> float | None:
    """How long it may wait to be sent."""
    return message.deadline if message.until is None else message.until


def _library(address: Address) -> Any:
    try:
        from quintet.transports.kafka import bridge
    except ImportError as error:
        raise ConfigurationError(
            f"{address}: Kafka needs the library confluent-kafka: pip install 'quintet[kafka]' ({error})"
        ) from None
    return bridge
