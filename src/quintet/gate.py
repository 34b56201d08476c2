"""A limit on how many are inside at once; the others wait their turn."""

from __future__ import annotations

import asyncio
from collections import deque


class Gate:
    """At most `limit` pass at once, first come first served.

    It costs nothing as long as nobody must wait: `if gate.busy < gate.limit: gate.busy += 1`, else `await enter()`.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.busy = 0
        self._queue: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        if self.busy < self.limit:
            self.busy += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave()  # its turn had come
            raise

    def leave(self) -> None:
        """Hands the place on: who comes now overtakes nobody who waits."""
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.busy -= 1
