"""Workers: no more than the limit at once, none forgotten, no task per message."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque

import pytest

from quintet.workers import Workers


class Line:
    """A queue in front of workers, as a transport has one."""

    def __init__(self, limit: int, *, gated: bool = False) -> None:
        self.waiting = deque[int]()
        self.done: list[int] = []
        self.cancelled: list[int] = []
        self.peak = 0
        self.tasks = set[object]()
        self.gate = asyncio.Event()
        if not gated:
            self.gate.set()
        self.workers = Workers(self.take, self.work, limit)

    def put(self, *items: int) -> None:
        for item in items:
            self.waiting.append(item)
            self.workers.wake()

    def take(self) -> int | None:
        if not self.waiting:
            return None
        item = self.waiting.popleft()
        if self.waiting:
            self.workers.wake()
        return item

    async def work(self, item: int) -> None:
        self.peak = max(self.peak, self.workers.busy)
        self.tasks.add(asyncio.current_task())
        try:
            if not self.gate.is_set():
                await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(item)
            raise
        if item < 0:
            raise RuntimeError(f"no work with {item}")
        self.done.append(item)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_no_more_than_the_limit_are_in_work_and_the_rest_follow() -> None:
    line = Line(3, gated=True)
    line.put(*range(10))
    await settle()
    assert (line.peak, line.workers.busy, line.workers.free) == (3, 3, 0)
    line.gate.set()
    await line.workers.drain()
    assert sorted(line.done) == [0, 1, 2]  # a drain takes no more
    assert list(line.waiting) == list(range(3, 10))


async def test_what_never_waits_is_done_by_one_or_two_workers() -> None:
    line = Line(100)
    line.put(*range(50))
    await settle()
    assert line.done == list(range(50))
    assert len(line.tasks) == 1
    line.put(50)
    await settle()
    assert line.done[-1] == 50
    await line.workers.drain()
    assert len(asyncio.all_tasks()) == 1


async def test_a_long_burst_lets_the_loop_have_its_turn() -> None:
    line = Line(1)
    line.put(*range(1000))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert 0 < len(line.done) < 1000
    while line.waiting:
        await asyncio.sleep(0)
    await line.workers.drain()
    assert line.done == list(range(1000))


async def test_a_worker_that_fails_is_replaced_and_reported() -> None:
    reported: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(str(context["exception"])))
    line = Line(1)
    line.put(-1, 2)
    await settle()
    assert line.done == [2]
    assert reported == ["no work with -1"]
    await line.workers.drain()


async def test_cancelling_the_drain_cancels_the_work() -> None:
    line = Line(2, gated=True)
    line.put(1, 2)
    await settle()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(line.workers.drain(), 0.01)
    assert sorted(line.cancelled) == [1, 2]
    assert line.workers.busy == 0


async def test_cancel_ends_all_and_nothing_is_taken_after() -> None:
    line = Line(2, gated=True)
    line.put(1, 2, 3)
    await settle()
    await line.workers.cancel()
    line.put(4)
    await settle()
    assert sorted(line.cancelled) == [1, 2]
    assert list(line.waiting) == [3, 4]


async def test_a_handler_may_drain_its_own_workers() -> None:
    items = deque([1])
    ended = asyncio.Event()

    async def work(_: int) -> None:
        await workers.drain()
        ended.set()

    workers = Workers(lambda: items.popleft() if items else None, work, 1)
    workers.wake()
    await asyncio.wait_for(ended.wait(), 5)


async def test_context_variables_that_a_handler_leaves_behind_do_not_reach_the_next_message() -> None:
    variable: contextvars.ContextVar[object] = contextvars.ContextVar("variable", default="start")
    items, seen = deque([1, 2, 3, 4]), list[object]()

    class Refuses:
        def __eq__(self, other: object) -> bool:
            raise ValueError("not to be compared")

    async def work(item: int) -> None:
        seen.append(variable.get())
        if item < 3:
            variable.set(Refuses() if item == 2 else "left behind")

    workers = Workers(lambda: items.popleft() if items else None, work, 1)
    workers.wake()
    await settle()
    assert seen == ["start"] * 4
    await workers.drain()


async def test_context_variables_of_a_sender_do_not_reach_a_worker() -> None:
    variable = contextvars.ContextVar("variable", default="start")
    items, seen = deque([1]), list[str]()

    async def work(_: int) -> None:
        seen.append(variable.get())

    workers = Workers(lambda: items.popleft() if items else None, work, 1)
    variable.set("sender")
    workers.wake()
    await settle()
    assert seen == ["start"]
    await workers.drain()
