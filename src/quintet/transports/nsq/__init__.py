"""NSQ: a topic for each channel, one of NSQ's channels for each group, on all nsqds that an address leads to.

`nsq://host:4150,host2:4150` names the nsqds, `nsq+lookup://host:4161` the lookup daemons that know them. What is sent
goes to one nsqd, what is served is taken from all of them. docs/nsq.md has the names, so that any program takes part.

Here is what the core sees. Below it, each on those before: `discovery`, `publishing`, `serving`, `inspection`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ClassVar, Final

from quintet.clock import SYSTEM, Clock
from quintet.connection import TLS_OPTIONS
from quintet.errors import Unavailable
from quintet.intake import Intake
from quintet.message import Channel, Message, new_id
from quintet.transport import Address, ChannelState, DeadLetter, Finding, Receive, Trait, Transport
from quintet.transports.nsq.discovery import OPTIONS, Nsqds
from quintet.transports.nsq.inspection import Letters, Tail, count, examine
from quintet.transports.nsq.publishing import Publish, Publisher
from quintet.transports.nsq.serving import Ear, Serving, Subscription
from quintet.wire.nsq_session import NSQ
from quintet.wire.nsq_topology import EPHEMERAL, TEMPORARY, fit

__all__ = ["Carrier", "Publish", "Subscription"]

REPLIES_IN_FLIGHT: Final = 1000


class Carrier(Transport):
    """`nsq://[:secret@]host:4150[,host2]?http=host:4151`, `nsq+lookup://host:4161[,host2]`; `nsqs` for TLS."""

    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.FANOUT, Trait.DURABLE, Trait.REDELIVERS, Trait.DELAYS})
    options: ClassVar[frozenset[str]] = TLS_OPTIONS | OPTIONS | {"largest"}
    variants: ClassVar[frozenset[str]] = frozenset({"lookup"})

    def __init__(self, address: Address, clock: Clock = SYSTEM) -> None:
        super().__init__(address, clock)
        self._nsqds = Nsqds(address, clock, lambda kind, subject, reason="": self.tell(kind, subject, reason))
        self._publisher = Publisher(self._nsqds)
        self._letters = Letters(self._nsqds, self._publisher)
        self._servings: set[Serving] = set()
        self._tails: set[Tail] = set()
        self._closing = False

    async def open(self) -> None:
        await self._nsqds.find()
        await self._publisher.open()
        self._nsqds.follow(self._changed)

    def _changed(self) -> None:
        """There are other nsqds now."""
        hosts = self._nsqds.hosts
        self._publisher.opened().aim(hosts)
        for serving in self._servings:
            serving.reconcile(hosts)

    async def close(self) -> None:
        if self._closing or self._publisher.connection is None:
            return
        self._closing = True
        await self._nsqds.close()
        for tail in list(self._tails):
            await tail.aclose()
        try:
            await asyncio.gather(*(serving.abort() for serving in list(self._servings)))
        finally:
            await self._publisher.close()

    @property
    def connected(self) -> bool:
        return self._publisher.session is not None and all(serving.connected for serving in self._servings)

    @property
    def native(self) -> NSQ:
        """The connection that is published by, as it is now. Raises Unavailable while there is none."""
        connection = self._publisher.connection
        if connection is None or connection.session is None:
            raise Unavailable(f"{self!r} is not connected")
        return connection.session

    def send(self, message: Message) -> Coroutine[Any, Any, None]:
        return self._publisher.send(message)

    # Serving

    async def serve(self, channel: Channel, receive: Receive, group: str, limit: int = 100) -> Serving:
        own = await self._own_channel(group) if channel.temporary and channel.fanout else ""
        serving = self._serving(channel, group, limit, own)
        serving.intake = Intake(serving, receive, group, limit, self.clock)
        return await self._begin(serving)

    async def listen(self, channel: Channel, arrived: Callable[[Message], None]) -> Serving:
        serving = self._serving(channel, "", REPLIES_IN_FLIGHT)
        serving.intake = Ear(serving, arrived)
        return await self._begin(serving)

    async def _own_channel(self, group: str) -> str:
        """The channel of a group that belongs to this process. Ephemeral ones go by themselves, but lose messages where
        nsqd keeps none in memory; so they are taken only where nobody could remove another."""
        base = await self._nsqds.http_of(self._publisher.opened().host)
        return fit(f"{group}.{new_id()}", TEMPORARY if base else EPHEMERAL)

    def _serving(self, channel: Channel, group: str, limit: int, own: str = "") -> Serving:
        self._publisher.opened()
        return Serving(self._nsqds, self._publisher, self._servings, channel, group, limit, own)

    async def _begin(self, serving: Serving) -> Serving:
        if serving.channel.temporary:
            self._nsqds.sweep()
        try:
            await serving.open()
        except BaseException:
            await serving.abort()
            raise
        return serving

    # What looks in

    async def dead(self, channel: str | None = None) -> Sequence[DeadLetter]:
        return await self._letters.dead(channel)

    async def replay(self, ids: Sequence[str]) -> int:
        return await self._letters.replay(ids)

    async def drop(self, ids: Sequence[str]) -> int:
        return await self._letters.drop(ids)

    async def channels(self) -> Sequence[ChannelState]:
        """Raises TransportError where nsqd's HTTP is not known."""
        return await count(self._nsqds, self._letters)

    def tail(self, channel: str) -> Tail:
        return Tail(self._nsqds, channel, self._tails)

    async def examine(self) -> Sequence[Finding]:
        return await examine(self._nsqds, self.native)
