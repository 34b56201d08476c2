"""Request collapsing: calls made within some milliseconds go out as one call of a batch operation."""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections.abc import Awaitable, Callable
from typing import Generic, NamedTuple, TypeVar

from quintet.clock import SYSTEM, Clock
from quintet.context import CURRENT, Current
from quintet.errors import ConfigurationError, DeadlineExceeded, InvalidMessage, Safety

A = TypeVar("A")
R = TypeVar("R")


class _Waiting(NamedTuple, Generic[A, R]):
    """One caller of a batch."""

    argument: A
    answer: asyncio.Future[R]
    deadline: float | None


class _Gathering(Generic[A, R]):
    """The callers that will go out together, on one loop, in the context of the first of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.context = contextvars.copy_context()
        self.waiting: list[_Waiting[A, R]] = []


class collapse(Generic[A, R]):  # noqa: N801 - reads as a verb: get = collapse(passengers.get_many)
    """One call out of many: `get = collapse(passengers.get_many, within=0.005)`, then `await get("p-1")`.

    `batch` takes a list and returns a list as long, in the same order. A call waits at most `within` seconds for others
    to join it, and no longer once there are `most`. Each caller is cancelled and runs out of time by itself; the batch
    has the time of the one that has most, and is cancelled when nobody waits for it. What it raises, all get.
    """

    def __init__(
        self,
        batch: Callable[[list[A]], Awaitable[list[R]]],
        *,
        within: float = 0.005,
        most: int = 100,
        clock: Clock = SYSTEM,
    ) -> None:
        if not 0 < within < math.inf or most < 1:
            raise ConfigurationError(
                f"collapse(within={within!r}, most={most!r}): seconds above 0, and at least 1 call"
            )
        self._batch = batch
        self._within = within
        self._most = most
        self._clock = clock
        self._gathering: _Gathering[A, R] | None = None
        self._under_way: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        waiting = len(self._gathering.waiting) if self._gathering else 0
        return f"<collapse into {self._batch!r}, {waiting} waiting>"

    async def __call__(self, argument: A) -> R:
        loop, clock, deadline = asyncio.get_running_loop(), self._clock, CURRENT.get().deadline
        if deadline is not None and deadline <= clock.now():
            raise self._late(Safety.NOT_SENT)
        gathering = self._gathering
        if gathering is None or gathering.loop is not loop:
            gathering = self._gathering = _Gathering(loop)
            clock.call_at(clock.now() + self._within, lambda: self._send(gathering))
        answer: asyncio.Future[R] = loop.create_future()
        gathering.waiting.append(_Waiting(argument, answer, deadline))
        if len(gathering.waiting) >= self._most:
            self._send(gathering)
        timer = None if deadline is None else clock.call_at(deadline, lambda: self._expire(answer))
        try:
            return await answer
        finally:
            if timer is not None:
                timer.cancel()

    def _late(self, safety: Safety) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self._batch!r}, collapsed, did not answer in time", safety=safety)

    def _expire(self, answer: asyncio.Future[R]) -> None:
        if not answer.done():
            answer.set_exception(self._late(Safety.UNKNOWN))

    def _send(self, gathering: _Gathering[A, R]) -> None:
        if self._gathering is gathering:
            self._gathering = None
        waiting = [one for one in gathering.waiting if not one.answer.done()]
        gathering.waiting.clear()  # the timer comes a second time where `most` were there before
        if not waiting:
            return
        task = gathering.loop.create_task(self._run(waiting), context=gathering.context)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

        def gone(_: object) -> None:
            if all(one.answer.done() for one in waiting):
                task.cancel()

        for one in waiting:
            one.answer.add_done_callback(gone)

    async def _run(self, waiting: list[_Waiting[A, R]]) -> None:
        deadlines = [one.deadline for one in waiting if one.deadline is not None]
        longest = max(deadlines) if len(deadlines) == len(waiting) else None
        CURRENT.set(Current(CURRENT.get()._message, self._clock, longest))  # of this task alone
        try:
            values = await self._ask([one.argument for one in waiting])
        except Exception as error:
            for one in waiting:
                if not one.answer.done():
                    one.answer.set_exception(error)
        else:
            for one, value in zip(waiting, values, strict=True):
                if not one.answer.done():
                    one.answer.set_result(value)
        finally:
            for one in waiting:
                one.answer.cancel()  # only where the batch itself was cancelled

    async def _ask(self, arguments: list[A]) -> list[R]:
        values = await self._batch(arguments)
        if len(values) != len(arguments):
            raise InvalidMessage(f"{self._batch!r} answered {len(arguments)} arguments with {len(values)} values")
        return values
