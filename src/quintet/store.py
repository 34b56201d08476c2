"""What outlives a call: the answers of async requests. (Placeholder: the sqlite author replaces this file; keep MemoryAnswers if it is good.)"""

from __future__ import annotations
import asyncio
from typing import Literal, Protocol
from msgspec import Struct
from quintet.clock import SYSTEM, Clock
from quintet.message import Message


class Kept(Struct):
    id: str
    state: Literal["pending", "answered", "cancelled"]
    reply: Message | None


class AnswerStore(Protocol):
    async def open(self) -> None: ...
    async def close(self) -> None: ...
    async def accept(self, id: str) -> None: ...
    async def answer(self, id: str, reply: Message) -> bool: ...
    async def cancel(self, id: str) -> bool: ...
    async def get(self, id: str, wait: float = 0.0) -> Kept | None: ...


def open_store(address: str, *, keep: float = 7 * 24 * 3600.0, clock: Clock = SYSTEM) -> AnswerStore:
    return MemoryAnswers(keep, clock)


class MemoryAnswers:
    def __init__(self, keep: float, clock: Clock) -> None:
        self._kept: dict[str, Kept] = {}
        self._settled: dict[str, asyncio.Event] = {}
        self._clock = clock

    async def open(self) -> None: ...
    async def close(self) -> None: ...

    async def accept(self, id: str) -> None:
        self._kept.setdefault(id, Kept(id, "pending", None))

    async def answer(self, id: str, reply: Message) -> bool:
        return self._settle(Kept(id, "answered", reply))

    async def cancel(self, id: str) -> bool:
        return self._settle(Kept(id, "cancelled", None))

    def _settle(self, kept: Kept) -> bool:
        now = self._kept.get(kept.id)
        if now is not None and now.state != "pending":
            return False
        self._kept[kept.id] = kept
        if kept.id in self._settled:
            self._settled.pop(kept.id).set()
        return True

    async def get(self, id: str, wait: float = 0.0) -> Kept | None:
        kept = self._kept.get(id)
        if kept is not None and kept.state == "pending" and wait > 0:
            event = self._settled.setdefault(id, asyncio.Event())
            timer = self._clock.call_at(self._clock.now() + wait, event.set)
            await event.wait()
            timer.cancel()
        return self._kept.get(id)
