"""Looking in: what waits in channels, copies of what is sent, and what `quintet doctor` says of a broker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from quintet.connection import tls
from quintet.errors import CallError, TransportError
from quintet.message import Channel, Message
from quintet.transport import ChannelState, Finding
from quintet.transports.kafka.settings import ANSWER, PORT
from quintet.wire.kafka import (
    VERSIONS_ASKED,
    from_record,
    in_work,
    retry_channel,
    retry_group,
    topic_name,
    version,
)

if TYPE_CHECKING:
    from quintet.transports.kafka.bridge import Place
    from quintet.transports.kafka.carrier import Carrier

TAIL_KEPT = 10_000  # messages that one tail may lag behind; the oldest goes first
TAIL_LOOKS = 0.5  # seconds between two looks for new topics
OURS = "quintet."

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


async def channels(carrier: Carrier) -> Sequence[ChannelState]:
    """What waits is what is not committed; what is in work is as of the last commit, a tenth of a second ago."""
    dead: dict[tuple[str, str], int] = {}
    for each in await carrier.dead():
        dead[each.channel, each.group] = dead.get((each.channel, each.group), 0) + 1
    offsets: dict[tuple[str, str], list[Any]] = {}
    groups = await carrier.asked(carrier.admin.list_consumer_groups(request_timeout=ANSWER))
    for group in (one.group_id for one in groups.valid):
        asked = [carrier.bridge.ConsumerGroupTopicPartitions(group)]
        answer = carrier.admin.list_consumer_group_offsets(asked, request_timeout=ANSWER)[group]
        for place in (await carrier.asked(answer)).topic_partitions:
            if place.error is None and place.offset >= 0:
                offsets.setdefault((place.topic, group), []).append(place)
    topics = set(await carrier.topics.all())
    known = {key: places for key, places in offsets.items() if key[0] in topics}
    wanted = list(dict.fromkeys(_at(one) for places in known.values() for one in places))
    ends = await carrier.topics.ends(wanted)
    firsts = await carrier.topics.ends(wanted, carrier.bridge.OffsetSpec.earliest())
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


def _at(partition: Any) -> Place:
    return (partition.topic, partition.partition)


async def examine(carrier: Carrier) -> Sequence[Finding]:
    cluster = await carrier.asked(carrier.admin.describe_cluster(request_timeout=ANSWER))
    settings = await _settings(carrier, cluster.nodes[0].id)
    brokers = ", ".join(f"{node.id} at {node.host}:{node.port}" for node in cluster.nodes)
    found = [
        Finding("version", f"Apache Kafka {await _version(carrier, settings)}"),
        Finding("cluster", f"{cluster.cluster_id}: {brokers}"),
        await _try_topic(carrier),
    ]
    for name, limit, otherwise in LIMITS:
        value = settings.get(name, "")
        if not value:
            found.append(Finding(name, "not told: users need the right to describe the cluster's configuration"))
            break
        well = limit is None or float(value) >= limit
        found.append(Finding(name, value if well else f"{value}: {otherwise}", well=well))
    return found


async def _settings(carrier: Carrier, broker: int) -> Mapping[str, str]:
    """The broker's configuration; empty where we may not know."""
    resource = carrier.bridge.ConfigResource(carrier.bridge.ConfigResource.Type.BROKER, str(broker))
    try:
        answer = carrier.admin.describe_configs([resource], request_timeout=ANSWER)[resource]
        return {name: entry.value or "" for name, entry in (await carrier.asked(answer)).items()}
    except (CallError, TransportError):
        return {}


async def _version(carrier: Carrier, settings: Mapping[str, str]) -> str:
    """What version its brokers work together as: no client is told which one each is."""
    if older := settings.get("inter.broker.protocol.version"):  # until Kafka 4
        return older
    context = tls(carrier.address) if "SSL" in carrier.config["security.protocol"] else None
    for host, port in carrier.address.hosts:
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


async def _try_topic(carrier: Carrier) -> Finding:
    """Whether topics can be made: asked, not tried."""
    topic = carrier.bridge.NewTopic(f"{OURS}doctor", carrier.partitions, carrier.replication)
    try:
        await carrier.asked(
            carrier.admin.create_topics([topic], validate_only=True, request_timeout=ANSWER)[topic.topic]
        )
    except (CallError, TransportError) as error:
        otherwise = "users need the right to create topics, or all topics must be there before (docs/kafka.md)"
        return Finding("makes topics", f"not possible: {error}; {otherwise}", well=False)
    return Finding("makes topics", f"yes, of {carrier.partitions} partitions")


class Tail:
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

    def __aiter__(self) -> Tail:
        return self

    async def __anext__(self) -> Message:
        message = await self._kept.get()
        if message is None:
            self._kept.put_nowait(None)
            raise StopAsyncIteration
        return message

    async def aclose(self) -> None:
        self._carrier.ended(self)
        self._watch.cancel()
        await asyncio.wait([self._watch])
        if self._inlet is not None:
            await self._inlet.close()
        self._put(None)

    abort = aclose

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
                topics = await carrier.topics.all()
                more = {topic: count for topic, count in topics.items() if self._matches(topic)}
                places = [
                    (topic, number)
                    for topic, count in more.items()
                    if topic not in self._known
                    for number in range(count)
                ]
                if places and first:
                    ends = await carrier.topics.ends(places)  # first these, so that nothing falls between the two
                    since = await carrier.topics.ends(places, bridge.OffsetSpec.for_timestamp(self._since))
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
