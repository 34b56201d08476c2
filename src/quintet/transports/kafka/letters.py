"""Dead letters: a compacted topic, of which the last record of each key counts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from quintet.dead_letters import DEAD_LETTERS, letter, revive
from quintet.message import Channel, Message
from quintet.transport import DeadLetter
from quintet.transports.kafka.settings import STORE
from quintet.wire.kafka import KEY, from_record, key_of, retry_channel
from quintet.wire.names import DEAD, DEAD_ID

if TYPE_CHECKING:
    from quintet.transports.kafka.carrier import Carrier


class Letters:
    """The dead letters of all channels."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self._reading = asyncio.Lock()

    async def bury(self, copy: Message) -> None:
        """Puts a message among the dead letters. Raises CallError."""
        place = await self._carrier.until(self._carrier.clock.now() + STORE, self._carrier.topics.place(DEAD_LETTERS))
        assert place is not None  # noqa: S101
        key = [(KEY, copy.key.encode())] if copy.key else []
        await self._carrier.keep(place.name, copy, copy.headers[DEAD_ID], *key)

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
            place = await self._carrier.topics.find(channel, make=False)
            if place is None:
                continue  # of a group that was there for a while only
            await self._carrier.produce(place.name, message, message.key)
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
        await self._carrier.produce(DEAD, Message(channel=DEAD_LETTERS), id_, empty=True)

    async def _dead(self) -> dict[str, Message]:
        self._carrier.opened()
        place = await self._carrier.topics.find(DEAD_LETTERS, make=False)
        if place is None:
            return {}
        bridge, config = self._carrier.bridge, self._carrier.consuming
        async with self._reading:
            records = await asyncio.to_thread(bridge.read_all, config, place.name, place.partitions)
        found: dict[str, Message] = {}
        for record in records:
            found.pop(key_of(record), None)
            if record.value() is not None:
                found[key_of(record)] = from_record(record, DEAD_LETTERS, self._carrier.clock)
        return found
