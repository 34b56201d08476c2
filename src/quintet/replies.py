"""Correlation (law 3): one, late or many replies over transports that only send."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from quintet.message import Channel, Message, new_id
from quintet.transport import Serving, Transport


class Replies:
    """A reply channel of one process over one transport.

    Two replies to one id, late replies and replies for a caller that is gone are tolerated: whoever still waits gets
    the first, all others are dropped.
    """

    def __init__(self, transport: Transport, owner: str) -> None:
        self._transport = transport
        self._channel = Channel(f"replies.{owner}.{new_id()}", temporary=True, replies=True)
        self._waiting: dict[str, Callable[[Message], None]] = {}
        self._serving: Serving | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # to ask for the running one on each call costs more

    def __repr__(self) -> str:
        return f"<replies {self._channel.name}, {len(self._waiting)} waiting>"

    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._serving = await self._transport.listen(self._channel, self._arrived)

    async def close(self) -> None:
        if self._serving:
            await self._serving.stop()

    def _arrived(self, reply: Message) -> None:
        waiting = self._waiting.get(reply.correlation_id)
        if waiting:
            waiting(reply)

    async def exchange(self, message: Message) -> Message:
        """Sends and waits for the one reply. How long is not decided here: the time-out filter cancels."""
        assert self._loop, "opened before the first exchange"  # noqa: S101
        future: asyncio.Future[Message] = self._loop.create_future()
        correlation = self.expect(message, lambda reply: None if future.done() else future.set_result(reply))
        try:
            await self._transport.send(message)
            return await future
        finally:
            self.forget(correlation)

    def expect(self, message: Message, arrived: Callable[[Message], None]) -> str:
        """Marks the message so that replies to it, however many, go to `arrived` until `forget`."""
        message.reply_to = self._channel.name
        message.correlation_id = correlation = new_id()  # of its own per attempt: a retry keeps the message's id
        self._waiting[correlation] = arrived
        return correlation

    def forget(self, correlation: str) -> None:
        self._waiting.pop(correlation, None)
