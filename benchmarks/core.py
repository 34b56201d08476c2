"""What the core itself costs: notifications and requests over the memory transport, and memory under load."""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import uvloop
from msgspec import Struct

from benchmarks.figure import Figure, at_least, at_most
from quintet import Bulkhead, Contract, Policy, Service, connect, notification, request, serve
from quintet.message import Channel, Message
from quintet.replies import Replies
from quintet.transport import DONE, Verdict, open_address

AT = "memory://bench"
DEADLINE_ONLY = Policy(bulkhead=False, breaker=False)


class Sample(Struct):
    id: str
    name: str
    active: bool = True


class Bench(Contract, name="bench"):
    @request
    async def get(self, sample: Sample) -> Sample: ...

    @notification
    async def tell(self, sample: Sample) -> None: ...

    @request
    async def hang(self, sample: Sample) -> Sample: ...


def service(heard: list[int], go: asyncio.Event, concurrency: int = 100) -> Service:
    service = Service(Bench, concurrency=concurrency, policy=Policy(bulkhead=Bulkhead(concurrency)))

    @service.handles(Bench.get)
    async def get(sample: Sample) -> Sample:
        return sample

    @service.handles(Bench.tell)
    async def tell(sample: Sample) -> None:  # noqa: ARG001
        heard[0] += 1
        if heard[0] == heard[1]:
            go.set()

    @service.handles(Bench.hang)
    async def hang(sample: Sample) -> Sample:
        heard[0] += 1
        await go.wait()
        return sample

    return service


async def notifications(count: int) -> float:
    """Notifications per second, from the client's call to the handler's end."""
    heard, go, sample = [0, count], asyncio.Event(), Sample("1", "Ada")
    async with serve(service(heard, go), at=AT), connect(Bench, AT) as bench:
        start = time.perf_counter()
        for _ in range(count):
            await bench.tell(sample)
        await go.wait()
        return count / (time.perf_counter() - start)


async def request_cost(count: int, outstanding: int, policy: Policy) -> float:
    """Microseconds of one request/response, client and service and memory transport together."""
    sample = Sample("1", "Ada")

    async def caller(bench: Bench) -> None:
        for _ in range(count // outstanding):
            await bench.get(sample)

    async with serve(service([0, 0], asyncio.Event()), at=AT), connect(Bench, AT, policy=policy) as bench:
        await caller(bench)
        start = time.perf_counter()
        await asyncio.gather(*(caller(bench) for _ in range(outstanding)))
        return (time.perf_counter() - start) / count * 1e6


async def bare_cost(count: int, outstanding: int) -> float:
    """Microseconds of the same exchange with neither client nor service: what the transport and correlation take."""
    transport = open_address(AT)
    await transport.open()
    replies, channel = Replies(transport, "bench"), Channel("bare")
    await replies.open()

    async def echo(message: Message) -> Verdict:
        reply = Message(channel=Channel(message.reply_to, temporary=True), correlation_id=message.correlation_id)
        await transport.send(reply)
        return DONE

    async def caller() -> None:
        for _ in range(count // outstanding):
            await replies.exchange(Message(channel=channel))

    await transport.serve(channel, echo, "")
    await caller()
    start = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(outstanding)))
    took = (time.perf_counter() - start) / count * 1e6
    await replies.close()
    await transport.close()
    return took


async def many_outstanding(count: int) -> None:
    """Runs in a process of its own, so that its peak is its own."""
    heard, go, sample = [0, 0], asyncio.Event(), Sample("1", "Ada")
    policy = Policy(timeout=60.0, bulkhead=Bulkhead(count))
    async with serve(service(heard, go, concurrency=count), at=AT), connect(Bench, AT, policy=policy) as bench:
        calls = [asyncio.ensure_future(bench.hang(sample)) for _ in range(count)]
        async with asyncio.timeout(60):
            while heard[0] < count:  # noqa: ASYNC110 - the handlers only count
                await asyncio.sleep(0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        go.set()
        await asyncio.gather(*calls)
        print(peak)


def best(measure: Any, *args: Any, most: bool) -> float:
    """The best of five: what else the machine does only ever makes it worse."""
    figures = [uvloop.run(measure(*args)) for _ in range(5)]
    return max(figures) if most else min(figures)


def figures() -> list[Figure]:
    command = [sys.executable, "-c", "from benchmarks import core; core.main_outstanding()"]
    peak = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True).stdout
    one, many = (best(request_cost, 20_480, outstanding, DEADLINE_ONLY, most=False) for outstanding in (1, 64))
    bare_one, bare_many = (best(bare_cost, 20_480, outstanding, most=False) for outstanding in (1, 64))
    guarded = best(request_cost, 20_480, 64, Policy(), most=False)
    return [
        at_least("notifications over memory", best(notifications, 50_000, most=True), "1/s", 100_000),
        at_most("the core's own cost of a request/response, 1 outstanding", one - bare_one, "us", 15),
        at_most("the core's own cost of a request/response, 64 outstanding", many - bare_many, "us", 15),
        Figure("with the memory transport, 1 outstanding", one, "us"),
        Figure("with the memory transport, 64 outstanding", many, "us"),
        Figure("with the memory transport and the default policies, 64 outstanding", guarded, "us"),
        Figure("the memory transport and correlation alone, 1 outstanding", bare_one, "us"),
        Figure("the memory transport and correlation alone, 64 outstanding", bare_many, "us"),
        at_most("a service with 10,000 requests outstanding", float(peak), "MB", 150),
    ]


def main_outstanding() -> None:
    uvloop.run(many_outstanding(10_000))


if __name__ == "__main__":
    for figure in figures():
        print(f"{figure.name:60} {figure.value:12,.1f} {figure.unit:4} {figure.budget}")
