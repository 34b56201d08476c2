"""A transport that misbehaves as networks do, by a seeded chance: for tests of what stands above it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

from quintet.errors import ConnectionLost, Unavailable
from quintet.message import Channel, Message
from quintet.transport import Receive, Serving, Trait, Transport


class FaultyTransport(Transport):
    """Another transport, some of whose messages are hit; it has that transport's traits and all else of it.

    Chances from 0 to 1 for each message sent: `fail` refuses it (Unavailable), `drop` accepts and loses it (where the
    transport has REPLIES: ConnectionLost, by chance before or after the receiver had it), `duplicate` sends it twice.
    `delay`: up to so many seconds on its way, each by chance, so that they overtake one another. `only` says which
    messages may be hit, as `FaultyTransport.replies`. `hits` lists what was done to whom.
    """

    def __init__(
        self,
        inner: Transport,
        *,
        seed: int = 0,
        fail: float = 0.0,
        drop: float = 0.0,
        duplicate: float = 0.0,
        delay: float = 0.0,
        only: Callable[[Message], bool] = lambda _: True,
    ) -> None:
        super().__init__(inner.address, inner.clock)
        vars(self).update(traits=inner.traits, binding=inner.binding, options=inner.options)
        self.inner = inner
        self.hits: list[tuple[str, Message]] = []
        self._random = random.Random(seed)  # noqa: S311 - chance for tests
        self._fail, self._drop, self._duplicate, self._delay = fail, drop, duplicate, delay
        self._only = only
        self._under_way: set[asyncio.Task[Any]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)  # tail, dead, replay ... where the transport has them

    @staticmethod
    def replies(message: Message) -> bool:
        """For `only=`: replies, and nothing else."""
        return message.channel.temporary

    async def open(self) -> None:
        await self.inner.open()

    async def ready(self) -> None:
        await self.inner.ready()

    async def close(self) -> None:
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        await self.inner.close()

    async def serve(self, channel: Channel, receive: Receive, group: str, limit: int = 100) -> Serving:
        return await self.inner.serve(channel, receive, group, limit)

    async def send(self, message: Message) -> Message | None:
        if not self._only(message):
            return await self.inner.send(message)
        if self._hit(self._fail, "refused", message):
            raise Unavailable(f"{self.address}: refused by chance")
        direct = Trait.REPLIES in self.traits
        if self._hit(self._drop, "lost", message):
            if direct:
                if self._random.random() < 0.5:
                    await self.inner.send(message)
                raise ConnectionLost(f"{self.address}: lost by chance")
            return None
        if self._hit(self._duplicate, "duplicated", message):
            if direct:
                await self.inner.send(message)
            else:
                self._later(message)
        if not self._delay:
            return await self.inner.send(message)
        if direct:
            await self.clock.sleep(self._random.uniform(0, self._delay))
            return await self.inner.send(message)
        self._later(message)
        return None

    def _hit(self, chance: float, what: str, message: Message) -> bool:
        hit = chance > 0 and self._random.random() < chance
        if hit:
            self.hits.append((what, message))
        return hit

    def _later(self, message: Message) -> None:
        async def arrive(seconds: float) -> None:
            await self.clock.sleep(seconds)
            await self.inner.send(message)

        task = asyncio.get_running_loop().create_task(arrive(self._random.uniform(0, self._delay)))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
