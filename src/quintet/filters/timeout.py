"""The attempt time-out: the one timer that fires."""

from __future__ import annotations

import asyncio

from quintet.errors import DeadlineExceeded
from quintet.filter import Filter, Guarded
from quintet.message import Handler, Message

PLACE = 90  # innermost: the breaker above must see a time-out as a failure, not as a cancellation


class _Timer:
    __slots__ = ("cancelling", "fired", "task")

    def __init__(self, task: asyncio.Task[object]) -> None:
        self.task = task
        self.cancelling = task.cancelling()
        self.fired = False

    def fire(self) -> None:
        self.fired = True
        self.task.cancel()


def client(guarded: Guarded) -> Filter:
    name, clock = guarded.operation.full_name, guarded.clock

    async def timeout(message: Message, handler: Handler) -> Message | None:
        until, task = message.until, asyncio.current_task()
        if until is None or task is None:
            return await handler(message)
        start, timer = clock.now(), _Timer(task)
        timers = clock.wheel().set(until, timer)
        try:
            return await handler(message)
        except asyncio.CancelledError:
            # a cancellation by the caller in the same tick wins: then one request to cancel is left over
            if timer.fired and task.uncancel() <= timer.cancelling:
                raise DeadlineExceeded(f"{name} did not answer within {until - start:.3g} s") from None
            raise
        finally:
            timers.discard(timer)

    return timeout
