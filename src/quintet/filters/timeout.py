"""The attempt time-out: the one timer that fires."""

from __future__ import annotations

import asyncio
from typing import Any

from msgspec import Struct

from quintet.clock import Wheel
from quintet.errors import DeadlineExceeded
from quintet.filter import Guarded
from quintet.message import Handler, Message

PLACE = 90  # below the breaker, which must see a time-out as a failure and not as a cancellation


class _Timer(Struct, eq=False):
    task: asyncio.Task[Any]
    cancelling: int  # requests to cancel the task that were there before ours
    fired: bool = False

    def fire(self) -> None:
        self.fired = True
        self.task.cancel()


def client(guarded: Guarded, handler: Handler) -> Handler:
    name, clock, watch = guarded.operation.full_name, guarded.clock, guarded.watch
    operation = guarded.operation  # its channel names the version, which may be what nobody serves there
    where = f" at {guarded.where} (channel {operation.channel.name})" if guarded.where else ""
    get_running_loop, current_task = asyncio.get_running_loop, asyncio.current_task

    latest: tuple[asyncio.AbstractEventLoop | None, Wheel] = (None, Wheel(clock))

    def too_late(message: Message, until: float) -> DeadlineExceeded:
        error = DeadlineExceeded(f"{name} did not answer within {until - message.begun:.3g} s{where}")
        watch.tell("timed-out", name, error)
        return error

    async def timeout(message: Message) -> Message | None:
        nonlocal latest
        until = message.until
        loop = get_running_loop()
        task = current_task(loop)
        if until is None or task is None:
            return await handler(message)
        known, wheel = latest  # read once: another thread may run another loop
        if loop is not known:
            wheel = clock.wheel(loop)
            latest = loop, wheel
        timer = _Timer(task, task.cancelling())
        timers = wheel.set(until, timer)
        try:
            reply = await handler(message)
        except BaseException as error:
            timers.discard(timer)
            if not timer.fired or (task.uncancel() > timer.cancelling and isinstance(error, asyncio.CancelledError)):
                raise  # a cancellation by the caller in the same tick wins: its request to cancel is left over
            raise too_late(message, until) from None
        timers.discard(timer)
        if timer.fired:  # the work ignored its cancellation: what it brought is too late
            task.uncancel()
            raise too_late(message, until)
        return reply

    return timeout
