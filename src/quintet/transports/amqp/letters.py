"""Dead letters: one queue, which is read by taking what is in it, and putting back what is to stay."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final

from quintet.dead_letters import letter, revive
from quintet.errors import TransportError
from quintet.transport import DeadLetter
from quintet.transports.amqp.failures import AGAIN_FIRST, WITHIN, sentence
from quintet.wire.amqp import Content
from quintet.wire.amqp_message import read_dead
from quintet.wire.amqp_session import Closed, Line, Wire
from quintet.wire.names import DEAD

if TYPE_CHECKING:
    from quintet.transports.amqp.carrier import Carrier

LETTERS_SECONDS = 15.0  # that one who looks at the dead letters waits for another who does
LETTERS_SHOWN = 10_000  # dead letters at a time
LOOKING: Final = f"{DEAD}.looking"
"""The queue whose owner looks at the dead letters."""


class Letters:
    """The dead letters of all channels."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self._looking = asyncio.Lock()

    async def dead(self, channel: str | None = None) -> Sequence[DeadLetter]:
        """The first LETTERS_SHOWN of them."""
        found: list[DeadLetter] = []

        async def look(content: Content) -> bool:
            one = letter(read_dead(content, self._carrier.clock))
            if channel in (None, one.channel):
                found.append(one)
            return False

        await self._letters(look, lambda seen: seen == LETTERS_SHOWN)
        return sorted(found, key=lambda one: one.died_at)

    async def replay(self, ids: Sequence[str]) -> int:
        async def again(content: Content) -> bool:
            give_up = self._carrier.clock.now() + WITHIN
            message, group = revive(read_dead(content, self._carrier.clock))
            name = message.channel.name
            queue = f"{name}@{group}" if message.channel.fanout else name
            return await self._carrier.store("", queue, message, lambda: self._carrier.clock.now() < give_up)

        return await self._take(ids, again)

    async def drop(self, ids: Sequence[str]) -> int:
        async def nothing(_: Content) -> bool:
            return True

        return await self._take(ids, nothing)

    async def _take(self, ids: Iterable[str], act: Callable[[Content], Awaitable[bool]]) -> int:
        """Takes those dead letters out of their queue on which `act` succeeds, and returns how many those were."""
        wanted, taken = set(ids), 0

        async def look(content: Content) -> bool:
            nonlocal taken
            id_ = letter(read_dead(content, self._carrier.clock)).id
            if id_ not in wanted or not await act(content):
                return False
            wanted.discard(id_)
            taken += 1
            return True

        await self._letters(look, lambda _: not wanted)
        return taken

    async def _letters(self, take: Callable[[Content], Awaitable[bool]], enough: Callable[[int], bool]) -> None:
        """Shows each dead letter to `take`, until there are no more or `enough`, which is asked with how many were
        seen; deletes those that it took, and puts the others back."""
        wire = await (await self._carrier.consuming()).ready(self._carrier.clock.now() + WITHIN)
        try:
            await wire.lay_dead()
            async with self._looking, self._alone(wire):
                line, seen, left = await wire.line(), 0, 0
                try:
                    # One by one: each answer proves that the acknowledgement before it was carried out, where a burst
                    # of them with the channel's end behind it is forgotten in part.
                    while isinstance(content := await line.call("basic.get", queue=DEAD), Content):
                        if enough(seen):
                            left += 1
                            break
                        seen += 1
                        if await take(content):
                            line.tell("basic.ack", delivery_tag=content.tag)
                        else:
                            left += 1
                finally:
                    await line.close()
                await self._settled(wire, left)
        except Closed as error:
            raise TransportError(sentence(self._carrier.address, DEAD, error)) from error

    @contextlib.asynccontextmanager
    async def _alone(self, wire: Wire) -> AsyncGenerator[None]:
        """Lets one look at the dead letters at a time, as two would each see a part of them: a queue that belongs to
        one connection says who. Raises TransportError where another goes on and on."""
        give_up = self._carrier.clock.now() + LETTERS_SECONDS
        while True:
            try:
                await wire.call("queue.declare", queue=LOOKING, exclusive=True, arguments={"x-queue-type": "classic"})
                break
            except Closed as error:
                if error.code == 403:  # who may look, and not declare
                    yield
                    return
                if error.code != 405:
                    raise
                if self._carrier.clock.now() >= give_up:
                    raise TransportError(
                        f"{self._carrier.address}: another looks at the dead letters, try again later"
                    ) from None
            await self._carrier.clock.sleep(AGAIN_FIRST)
        try:
            yield
        finally:
            with contextlib.suppress(TransportError):
                await wire.call("queue.delete", queue=LOOKING)

    async def _settled(self, wire: Wire, count: int) -> None:
        """Waits until so many dead letters are back in their queue, for whoever looks next."""
        give_up = self._carrier.clock.now() + WITHIN
        line = await wire.line()
        while await _waiting(line) < count and self._carrier.clock.now() < give_up:
            await self._carrier.clock.sleep(0.005)
        await line.close()


async def _waiting(line: Line) -> int:
    """How many dead letters are in their queue, and in nobody's hand."""
    answer = await line.call("queue.declare", queue=DEAD, passive=True)
    count: int = answer.fields["message_count"]
    return count
