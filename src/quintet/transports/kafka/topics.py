"""The topics of channels: found, made, deleted, and where they end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from quintet.errors import CallError, TransportError, Unavailable
from quintet.message import Channel, native_of
from quintet.transports.kafka.failures import no_topic
from quintet.transports.kafka.options import TOPIC, Topic
from quintet.transports.kafka.settings import ANSWER, LARGEST, START
from quintet.wire.kafka import topic_name
from quintet.wire.names import DEAD

if TYPE_CHECKING:
    from quintet.transports.kafka.bridge import Place
    from quintet.transports.kafka.carrier import Carrier

BRIEFLY = 10 * 60 * 1000  # milliseconds that a topic keeps what nobody can want later: requests, surveys, replies
KNOWN = 10_000  # topics that are remembered


class Found(Struct, frozen=True):
    """A topic that exists."""

    name: str
    partitions: int
    new: bool = False  # made just now: nothing is in it


class Topics:
    """Those that are known to exist, by channel, and those that are just asked for."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self.known: dict[str, Found] = {}
        self._asking: dict[str, asyncio.Task[Found | None]] = {}

    def __repr__(self) -> str:
        return f"<{len(self.known)} topics of {self._carrier.address}>"

    async def place(self, channel: Channel, *, holder: bool = False) -> Found | None:
        """The channel's topic, made where there is none; None of a temporary channel that nobody holds."""
        if found := self.known.get(channel.name):
            return found
        asking = self._asking.get(channel.name)
        if asking is None:
            asking = asyncio.get_running_loop().create_task(self.find(channel, holder or not channel.temporary))
            self._asking[channel.name] = asking
            asking.add_done_callback(lambda _: self._asking.pop(channel.name, None))
        return await asyncio.shield(asking)

    async def find(self, channel: Channel, make: bool) -> Found | None:
        found: Found | None = None
        for name in (topic_name(channel.name), topic_name(channel.name, collides=True)):
            found = await self._describe(name)
            if found is None and make:
                found = await self._make(name, channel)
            if found is not None or not make:
                break
        if found is not None:
            if len(self.known) >= KNOWN:
                self.known.clear()
            self.known[channel.name] = Found(found.name, found.partitions)
        return found

    async def _describe(self, name: str) -> Found | None:
        bridge = self._carrier.bridge
        answer = self._carrier.admin.describe_topics(bridge.TopicCollection([name]), request_timeout=ANSWER)[name]
        try:
            found = await asyncio.wrap_future(answer)
        except bridge.KafkaException as raised:
            if no_topic(raised):
                return None
            raise self._carrier.translated(raised, "") from None
        return Found(name, len(found.partitions))

    async def _make(self, name: str, channel: Channel) -> Found | None:
        """Makes the topic; None where Kafka takes its name for another topic's."""
        options = native_of(channel.native, Topic, TOPIC)
        partitions = options.partitions or self._carrier.partitions
        config = {"max.message.bytes": str(LARGEST)}
        if channel.name == DEAD:
            partitions = 1
            config = {"cleanup.policy": "compact", "max.message.bytes": str(2 * LARGEST)}
        elif channel.temporary and not channel.fanout:
            partitions = 1
        if not channel.durable and not (channel.temporary and channel.fanout):
            config |= {"retention.ms": str(BRIEFLY), "segment.ms": str(BRIEFLY)}
        topic = self._carrier.bridge.NewTopic(
            name, partitions, options.replication or self._carrier.replication, config=config | dict(options.config)
        )
        error: Any = None
        try:
            await asyncio.wrap_future(self._carrier.admin.create_topics([topic], operation_timeout=ANSWER)[name])
        except self._carrier.bridge.KafkaException as raised:
            error = raised.args[0]
            if error.code() == error.TOPIC_EXCEPTION and "collides" in error.str():
                return None
            if error.code() != error.TOPIC_ALREADY_EXISTS:
                raise self._carrier.translated(raised, name) from None
        give_up = self._carrier.clock.now() + START
        while (found := await self._describe(name)) is None:  # its broker may not have heard of it yet
            if self._carrier.clock.now() > give_up:
                raise Unavailable(f"topic {name} at {self._carrier.address} was made, and is not there yet")
            await self._carrier.clock.sleep(0.01)
        return Found(name, found.partitions, new=error is None)

    async def ends(self, places: Sequence[Place], spec: Any = None) -> dict[Place, int]:
        """The offsets at the ends of these partitions, or of the given OffsetSpec."""
        bridge = self._carrier.bridge
        found: dict[Place, int] = {}
        give_up = self._carrier.clock.now() + ANSWER
        while missing := [place for place in places if place not in found]:
            wanted = {bridge.TopicPartition(*place): spec or bridge.OffsetSpec.latest() for place in missing}
            answers = self._carrier.admin.list_offsets(wanted, request_timeout=ANSWER)
            for partition, answer in answers.items():
                try:
                    offset = (await self._carrier.asked(answer)).offset
                except (Unavailable, TransportError):  # right after it was made a partition may have no leader yet
                    if self._carrier.clock.now() > give_up:
                        raise
                else:
                    found[partition.topic, partition.partition] = offset
            if len(found) < len(places):
                await self._carrier.clock.sleep(0.02)
        return found

    async def delete(self, topic: str) -> None:
        """Deletes a topic of ours; one that cannot be deleted now is left, and keeps nothing for long."""
        for name in [name for name, place in self.known.items() if place.name == topic]:
            del self.known[name]
        if self._carrier.connected:
            with contextlib.suppress(TransportError, CallError):
                await self._carrier.asked(self._carrier.admin.delete_topics([topic], request_timeout=ANSWER)[topic])

    async def all(self) -> dict[str, int]:
        """All topics with the number of their partitions, but for Kafka's own."""
        found = await asyncio.to_thread(self._carrier.admin.list_topics, timeout=ANSWER)
        return {name: len(topic.partitions) for name, topic in found.topics.items() if not name.startswith("__")}
