"""The embedded broker: one producer and two consumer processes on one file, durable; then an idle receiver is woken."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.figure import Figure, at_least, at_most
from quintet.message import Channel, Message, new_id
from quintet.transport import DONE, Verdict, open_address

WORK = Channel("bench.work", durable=True)
ECHO = Channel("bench.echo")
SENDERS = 64
BODY = bytes(100)
IDLE_SECONDS = 5.0
WAKE_UPS = 200


async def produce(address: str, seconds: float) -> dict[str, float]:
    """Sends one by one from 64 tasks; returns when each message is on disk."""
    transport = open_address(address)
    await transport.open()
    begun = time.monotonic()

    async def sender() -> int:
        sent = 0
        while time.monotonic() - begun < seconds:
            await transport.send(Message(channel=WORK, body=BODY, id=new_id(), operation="bench.work", sender="bench"))
            sent += 1
        return sent

    sent = sum(await asyncio.gather(*(sender() for _ in range(SENDERS))))
    took = time.monotonic() - begun
    await transport.close()
    return {"sent": sent, "begun": begun, "seconds": took, "cpu": time.process_time()}


async def consume(address: str) -> dict[str, float]:
    """Handles until a line comes on standard input."""
    transport = open_address(address)
    await transport.open()
    times: list[float] = []

    async def receive(_: Message) -> Verdict:
        times.append(time.monotonic())
        return DONE

    serving = await transport.serve(WORK, receive, "bench")
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await serving.stop()
    await transport.close()
    return {"handled": len(times), "last": times[-1] if times else 0.0, "cpu": time.process_time()}


async def idle(address: str) -> dict[str, object]:
    """Is idle, and then says how long each message took since it was sent (a clock of the machine)."""
    transport = open_address(address)
    await transport.open()
    waits: list[float] = []
    enough = asyncio.Event()

    async def receive(message: Message) -> Verdict:
        waits.append(time.clock_gettime(time.CLOCK_MONOTONIC) - float(message.body))
        if len(waits) == WAKE_UPS:
            enough.set()
        return DONE

    await transport.serve(ECHO, receive, "bench")
    before = time.process_time()
    await asyncio.sleep(IDLE_SECONDS)
    share = (time.process_time() - before) / IDLE_SECONDS
    print("ready", flush=True)
    await asyncio.wait_for(enough.wait(), 30)
    await transport.close()
    return {"waits": waits, "idle_cpu": share}


async def ping(address: str) -> dict[str, float]:
    """Sends now and then to a receiver that is idle."""
    transport = open_address(address)
    await transport.open()
    for _ in range(WAKE_UPS):
        await asyncio.sleep(0.01)
        body = repr(time.clock_gettime(time.CLOCK_MONOTONIC)).encode()
        await transport.send(Message(channel=ECHO, body=body, id=new_id()))
    await transport.close()
    return {}


def start(role: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.sqlite_queue", role, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> dict[str, float]:
    out, _ = process.communicate("\n", timeout=120)
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


def awaited(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    process.stdout.readline()


def run(seconds: float = 3.0) -> dict[str, object]:
    """Messages per second from the first send to the last handled, each consumer's share, wake-up and idle figures."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        address = f"sqlite:///{folder}/bench.db"
        consumers = [stack.enter_context(start("consume", address)) for _ in range(2)]
        for consumer in consumers:
            awaited(consumer)
        produced = result(start("produce", address, str(seconds)))
        time.sleep(0.5)
        size = sum(path.stat().st_size for path in Path(folder).glob("bench.db*")) / 1e6
        consumed = [result(consumer) for consumer in consumers]
        handled = sum(one["handled"] for one in consumed)
        lasted = max(one["last"] for one in consumed) - produced["begun"]

        waiting = stack.enter_context(start("idle", address))
        awaited(waiting)
        result(start("ping", address))
        woken = result(waiting)
        waits = sorted(woken["waits"])  # type: ignore[call-overload]
        return {
            "sent_per_s": round(produced["sent"] / produced["seconds"]),
            "handled_per_s": round(handled / lasted),
            "lost_or_left": produced["sent"] - handled,
            "shares": [round(one["handled"] / handled, 3) for one in consumed],
            "cpu_us_per_message": [round(one["cpu"] / handled * 1e6, 1) for one in [produced, *consumed]],
            "file_mb": round(size, 1),
            "wake_p50_ms": round(statistics.median(waits) * 1e3, 2),
            "wake_p99_ms": round(waits[int(len(waits) * 0.99)] * 1e3, 2),
            "idle_cpu_percent": round(woken["idle_cpu"] * 100, 3),
        }


def figures(rounds: int = 3) -> list[Figure]:
    """The median of some rounds: a disk that is busy with something else blurs each of them."""
    runs: list[Any] = [run() for _ in range(rounds)]

    def median(name: str) -> float:
        return statistics.median(float(one[name]) for one in runs)

    share = statistics.median(min(one["shares"]) for one in runs)
    return [
        at_least("sent one by one by 64 senders, on disk (FULL)", median("sent_per_s"), "1/s", 20_000),
        at_least("handled and acknowledged by two processes", median("handled_per_s"), "1/s", 20_000),
        at_least("the smaller consumer's share (half is fair)", share * 100, "%", 35),
        at_most("lost or left over", max(float(one["lost_or_left"]) for one in runs), "messages", 0),
        at_most("to an idle receiver in another process, median", median("wake_p50_ms"), "ms", 2),
        Figure("to an idle receiver in another process, 99 of 100", median("wake_p99_ms"), "ms"),
        at_most("processor time of an idle receiver", median("idle_cpu_percent"), "%", 0.5),
    ]


ROLES = {"produce": produce, "consume": consume, "idle": idle, "ping": ping}

if __name__ == "__main__":
    if len(sys.argv) > 1:
        role, address, *rest = sys.argv[1:]
        print(json.dumps(uvloop.run(ROLES[role](address, *map(float, rest)))))  # type: ignore[operator]
        sys.stdout.flush()
        os._exit(0)
    print(json.dumps(run(), indent=2))
