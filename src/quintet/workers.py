"""The tasks in which a transport's deliveries are handled: long-lived, at most `limit`, made as they are needed."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")

BURST = 64  # deliveries that one worker may finish without ever waiting before the loop gets its turn


class Workers(Generic[T]):
    """Runs `await work(delivery)` for what `take()` gives (None: nothing there), at most `limit` at a time.

    The transport calls `wake()` whenever there is something new to take; a `take` that leaves more behind calls it
    too. So a burst costs one wake-up as long as no handler waits, and one more worker for each that does; there is no
    task per message. `work` settles its delivery itself, also when it is cancelled. Workers run in copies of the
    context in which this object was made: context variables of a sender or of an earlier message reach no handler.
    """

    def __init__(self, take: Callable[[], T | None], work: Callable[[T], Awaitable[None]], limit: int) -> None:
        self.limit = limit
        self.busy = 0
        self._take = take
        self._work = work
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle: list[asyncio.Future[None]] = []
        self.waking = False  # a worker is about to look: whatever is there by then it will see
        self._stopped = False
        self._context = contextvars.copy_context()

    def __repr__(self) -> str:
        return f"<Workers {self.busy} busy of {self.limit}{', stopped' if self._stopped else ''}>"

    @property
    def stopped(self) -> bool:
        return self._stopped

    @property
    def free(self) -> int:
        """How many deliveries more could be in work now."""
        return 0 if self._stopped else self.limit - self.busy

    def wake(self) -> bool:
        """Has one more worker look for a delivery. False where all are busy: each looks again when it is done."""
        if self.waking:
            return True
        if self._stopped or self.busy >= self.limit:
            return False
        while self._idle:
            idle = self._idle.pop()
            if not idle.done():  # a worker that was cancelled while idle has left its future behind
                idle.set_result(None)
                self.waking = True
                return True
        if len(self._tasks) >= self.limit:
            return False
        task = asyncio.get_running_loop().create_task(self._run(), context=self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        self.waking = True
        return True

    async def _run(self) -> None:
        take, work, before = self._take, self._work, contextvars.copy_context()
        loop = asyncio.get_running_loop()
        burst = 0
        while True:
            self.waking = False
            while not self._stopped and (delivery := take()) is not None:
                self.busy += 1
                try:
                    await work(delivery)
                finally:
                    self.busy -= 1
                if _differs(before):
                    return  # a handler left a context variable behind: the next message gets a worker without it
                burst += 1
                if burst >= BURST:
                    burst = 0
                    await asyncio.sleep(0)
            if self._stopped:
                return
            burst = 0
            idle = loop.create_future()
            self._idle.append(idle)
            await idle

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            context = {"message": f"{self!r} could not settle a delivery", "exception": error, "task": task}
            task.get_loop().call_exception_handler(context)
        if not self._stopped:  # it was cancelled or failed: another takes its place
            self.waking = False
            self.wake()

    async def drain(self) -> None:
        """Takes no more and returns when the work in progress is settled; to cancel this wait cancels the work."""
        self._stopped = True
        for idle in self._idle:
            if not idle.done():
                idle.set_result(None)
        others = self._tasks - {asyncio.current_task()}  # a handler may stop its own service
        await asyncio.gather(*others, return_exceptions=True)

    async def cancel(self) -> None:
        """Takes no more and cancels the work in progress; returns when it is gone."""
        self._stopped = True
        others = self._tasks - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


def _differs(before: contextvars.Context) -> bool:
    try:
        return contextvars.copy_context() != before
    except Exception:  # values that refuse to be compared, as arrays do
        return True
