"""The outbox in a SQLite file: what is the same through either of the two libraries that a service may use it by."""

from __future__ import annotations

import asyncio
import contextlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

from quintet.clock import Clock
from quintet.message import new_id
from quintet.outbox import BATCH_BYTES, Box, Count, Row, Settled
from quintet.transport import Address
from quintet.wire import outbox as sql

A = TypeVar("A")
R = TypeVar("R")


class FileBox(Box):
    """Its steps are those of wire/outbox.py; subclasses open the file, and do each step in a transaction."""

    def __init__(self, address: Address, service: str, clock: Clock) -> None:
        super().__init__(address, service, clock)
        self.process = ""
        """By which it is known whether this process lives, where its library tells."""
        self._holder = new_id()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: Callable[[str], None] = _nobody

    @abstractmethod
    async def do(self, step: Callable[[sql.Execute, A], R], argument: A) -> R:
        """Raises TransportError."""

    async def open(self, wake: Callable[[str], None]) -> None:
        self._loop, self._wake = asyncio.get_running_loop(), wake

    async def look(self) -> Sequence[str] | None:
        return await self.do(sql.look, self._asked())

    async def turn(self, channel: str, settled: Settled, limit: int) -> Sequence[Row]:
        wish = sql.Turn(self._asked(), channel, settled.sent, settled.refused, limit, BATCH_BYTES)
        return [Row(*row) for row in await self.do(sql.turn, wish)]

    async def count(self) -> Sequence[Count]:
        return [Count(*row) for row in await self.do(sql.count, self._asked())]

    def _asked(self) -> sql.Look:
        return sql.Look(self.service, self._holder, self.process, self.clock.wall())

    def _soon(self, channel: str) -> None:
        """Wakes the relay, from whichever thread: its look waits for the lock that the user's transaction holds by
        now, and so for its end."""
        assert self._loop is not None, "a running service has opened it"  # noqa: S101
        with contextlib.suppress(RuntimeError):  # that loop has ended: the next start sends it
            self._loop.call_soon_threadsafe(self._wake, channel)


def _nobody(channel: str) -> None:
    """Where it is not open yet."""
