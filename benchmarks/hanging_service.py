"""Ten thousand guarded calls outstanding to a service that hangs: what a healthy service's callers notice of it."""

from __future__ import annotations

import asyncio
import tracemalloc
from time import perf_counter

import uvloop

from benchmarks.figure import Figure, at_most
from quintet import Bulkhead, Contract, Policy, request
from quintet.clock import SYSTEM
from quintet.filter import Guarded, client_chain
from quintet.message import Handler, Message
from quintet.policy import DEFAULT

HANGING = 10_000
CALLS = 5_000


class Hangs(Contract, name="hangs"):
    @request
    async def call(self) -> None: ...


class Healthy(Contract, name="healthy"):
    @request
    async def call(self) -> None: ...


async def hang(message: Message) -> Message:
    await asyncio.get_running_loop().create_future()
    return message


async def answer(message: Message) -> Message:
    await asyncio.sleep(0)
    return message


async def p99(send: Handler) -> float:
    """Microseconds that 99 % of the calls of 50 callers stay below, in the best of thirty rounds."""

    async def caller(took: list[float]) -> None:
        for _ in range(CALLS // 50):
            begun = perf_counter()
            await send(Message(channel=Healthy.call.channel))
            took.append(perf_counter() - begun)

    found = []
    for _ in range(30):
        took: list[float] = []
        await asyncio.gather(*(caller(took) for _ in range(50)))
        found.append(sorted(took)[int(len(took) * 0.99)] * 1e6)
    return min(found)


async def measure() -> tuple[float, float, float]:
    """p99 of the healthy service alone and beside the hanging one; bytes that a hanging call holds."""
    policy = Policy(timeout=60, bulkhead=Bulkhead(HANGING)).over(DEFAULT)
    hanging = client_chain(Guarded(Hangs.call, policy, SYSTEM), [hang])
    healthy = client_chain(Guarded(Healthy.call, DEFAULT, SYSTEM), [answer])

    async def caller() -> None:
        await hanging(Message(channel=Hangs.call.channel))

    alone = await p99(healthy)
    tracemalloc.start()
    calls = [asyncio.ensure_future(caller()) for _ in range(HANGING)]
    await asyncio.sleep(0)
    held = tracemalloc.get_traced_memory()[0] / HANGING
    tracemalloc.stop()
    beside = await p99(healthy)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    return alone, beside, held


def figures() -> list[Figure]:
    alone, beside, held = uvloop.run(measure())
    return [
        Figure("p99 of a healthy service's calls, alone", alone, "us"),
        Figure("p99 beside 10,000 calls that hang", beside, "us"),
        at_most("beside / alone", beside / alone, "", 1.5),
        at_most("a hanging call holds, its task and message included", held / 1024, "kB", 6),
    ]


if __name__ == "__main__":
    for figure in figures():
        print(f"{figure.name:60} {figure.value:12,.2f} {figure.unit:4} {figure.budget}")
