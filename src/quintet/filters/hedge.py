"""Hedging: a second attempt beside one that is slower than usual; whichever answers first is the answer."""

from __future__ import annotations

import asyncio

from msgspec import structs

from quintet.budget import Budget
from quintet.contract import Fault
from quintet.filter import Guarded
from quintet.message import Handler, Message
from quintet.policy import Hedge

PLACE = 33  # above the rate limit: each of the attempts is one more request


class Hedges(Budget):
    """The budget of hedged attempts, apart from that of retries."""


def client(guarded: Guarded, handler: Handler) -> Handler:
    settings, clock, meter = guarded.policy.hedge, guarded.clock, guarded.meter
    name, watch = guarded.operation.full_name, guarded.watch
    if not isinstance(settings, Hedge) or not guarded.operation.idempotent:
        return handler
    budget = guarded.shared.of(Hedges, Hedges)
    ending: set[asyncio.Task[Message | None]] = set()  # who lost, until it has really ended

    def ended(task: asyncio.Task[Message | None]) -> None:
        ending.discard(task)
        if not task.cancelled():
            task.exception()  # looked at: nobody else will

    async def attempt(message: Message) -> Message | None:
        return await handler(message)

    async def hedge(message: Message) -> Message | None:
        loop, moved = asyncio.get_running_loop(), asyncio.Event()
        running: list[asyncio.Task[Message | None]] = []

        def start(one: Message) -> None:
            running.append(loop.create_task(attempt(one)))
            running[-1].add_done_callback(lambda _: moved.set())

        budget.call(clock.now())
        start(message)
        more = settings.times
        try:
            while True:
                timer = clock.call_at(clock.now() + settings.after, moved.set) if more else None
                try:
                    await moved.wait()
                finally:
                    if timer is not None:
                        timer.cancel()
                moved.clear()
                done = [task for task in running if task.done()]
                for task in done:
                    error = task.exception()
                    if error is None or isinstance(error, Fault) or len(running) == 1:
                        return task.result()  # the first answer, or the last failure
                    running.remove(task)
                if not done:
                    more -= 1
                    if budget.spend(settings.budget, clock.now()):
                        meter.extra["hedge"] += 1
                        watch.tell("hedged", name)
                        # correlation is of each its own
                        start(structs.replace(message, headers=dict(message.headers), begun=clock.now()))
        finally:
            for task in running:
                ending.add(task)
                task.add_done_callback(ended)
                task.cancel()

    return hedge
