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
        self._asking: dict[str, asyncio.Future[Message]] = {}  # of requests, by their correlation
        self._waiting: dict[str, Callable[[Message], None]] = {}  # for any number of replies
        self._serving: Serving | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # to ask for the running one on each call costs more

    def __repr__(self) -> str:
        return f"<replies {self._channel.name}, {len(self._asking) + len(self._waiting)} waiting>"

    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._serving = await self._transport.listen(self._channel, self._arrived)

    async def close(self) -> None:
        if self._serving:
            await self._serving.stop()

    def _arrived(self, reply: Message) -> None:
        correlation = reply.correlation_id
        future = self._asking.pop(correlation, None)
        if future is not None:
            if not future.done():  # cancelled in this turn of the loop
                future.set_result(reply)
        elif correlation in self._waiting:
            self._waiting[correlation](reply)

    async def exchange(self, message: Message) -> Message:
        """Sends and waits for the one reply. How long is not decided here: the time-out filter cancels."""
        assert self._loop, "opened before the first exchange"  # noqa: S101
        future: asyncio.Future[Message] = self._loop.create_future()
        correlation = self._mark(message)
        self._asking[correlation] = future
        try:
            await self._transport.send(message)
            return await future
        finally:
            self._asking.pop(correlation, None)

    def expect(self, message: Message, arrived: Callable[[Message], None]) -> str:
        """Marks the message so that replies to it, however many, go to `arrived` until `forget`."""
        correlation = self._mark(message)
        self._waiting[correlation] = arrived
        return correlation

    def _mark(self, message: Message) -> str:
        message.reply_to = self._channel.name
        message.correlation_id = new_id()  # of its own per attempt: a retry keeps the message's id
        return message.correlation_id

    def forget(self, correlation: str) -> None:
        self._waiting.pop(correlation, None)
