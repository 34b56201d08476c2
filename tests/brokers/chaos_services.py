"""What the chaos tests run as processes and kill: a sender that sends each number until it is confirmed, and receivers
that write down each number that they handle. What they write goes to the folder CHAOS_FOLDER, a line at a time, so that
a process that is killed has written all that it had done.
"""

from __future__ import annotations

import asyncio
import os
import time
import traceback
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

from quintet import CallError, Contract, Safety, Service, Store, current, event, notification, request

FOLDER = Path(os.environ["CHAOS_FOLDER"])
WANTED = int(os.environ.get("CHAOS_MESSAGES", "20000"))
KIND = os.environ.get("CHAOS_KIND", "")
"""Part of the contracts' names: RabbitMQ's queues of AMQP and of STOMP are not of one kind."""
OUTSTANDING = 64
"""Sends that wait for their confirmation at the same time, of each style."""
PATIENT = 5.0
"""Seconds that a send waits for its confirmation: longer than by default, as who wants its messages delivered would."""
PAUSE = 0.05
"""Seconds between two messages of each, so that all of them are not over before the last kill."""
STEP = 500
"""The sender says so each time that so many more are confirmed."""


class Journal:
    """A file that whole lines are appended to, by several processes."""

    def __init__(self, name: str) -> None:
        self._file = os.open(FOLDER / name, os.O_APPEND | os.O_CREAT | os.O_WRONLY)

    def write(self, *words: object) -> None:
        os.write(self._file, f"{' '.join(map(str, words))} {time.monotonic():.4f}\n".encode())


def read(name: str, folder: Path = FOLDER) -> list[list[str]]:
    """The lines that are whole, as words."""
    file = folder / name
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


class Ledger(Contract, name=f"ledger{KIND}"):
    @notification
    async def entered(self, number: int) -> None: ...

    @request
    async def echo(self, number: int) -> int: ...


class News(Contract, name=f"news{KIND}"):
    @event
    async def happened(self, number: int) -> None: ...


ledger = Service(Ledger)
handled = Journal("handled")


@ledger.handles(Ledger.entered)
async def entered(number: int) -> None:
    handled.write(number, current().id, current().attempt)


@ledger.handles(Ledger.echo)
async def echo(number: int) -> int:
    return number


# The file of its own says what became of each once in effect, the journal what really came.
audit = Service(
    name="audit",
    idempotent=Store(
        f"sqlite:///{FOLDER}/audit.db", schema="CREATE TABLE IF NOT EXISTS seen (number INTEGER NOT NULL)"
    ),
)


@audit.handles(News.happened)
async def happened(number: int) -> None:
    handled.write(number, current().id, current().attempt)
    await current().store.execute("INSERT INTO seen VALUES (?)", number)


@asynccontextmanager
async def sending(service: Service) -> AsyncGenerator[None]:
    work = asyncio.create_task(send_all())
    work.add_done_callback(escaped)
    try:
        yield
    finally:
        work.cancel()
        await asyncio.wait([work])


def escaped(work: asyncio.Task[None]) -> None:
    """An error that is none of ours came out of a send."""
    if not work.cancelled() and (error := work.exception()):
        traceback.print_exception(error)


sender = Service(News, lifespan=sending)
client = sender.uses(Ledger)


async def send_all() -> None:
    """Even numbers are notifications, odd ones events. One that was killed goes on where it was."""
    sent, confirmed, failed = Journal("sent"), Journal("confirmed"), Journal("failed")
    before = {int(number) for number, *_ in read("confirmed")}
    count = len(before)

    async def send(number: int) -> None:
        nonlocal count
        identity = f"m-{number}"
        while True:
            sent.write(number)
            try:
                if number % 2:
                    await sender.using(id=identity, timeout=PATIENT).publish(News.happened, number)
                else:
                    await client.entered.using(id=identity, timeout=PATIENT)(number)
            except CallError as error:
                failed.write(number, error.safety.name, type(error).__name__)
                if error.safety is Safety.FAILED:
                    raise
                await asyncio.sleep(0.02)
            else:
                break
        confirmed.write(number)
        count += 1
        if count % STEP == 0:
            print(count, "confirmed", flush=True)

    async def one_after_another(numbers: Iterator[int]) -> None:
        for number in numbers:
            await send(number)
            await asyncio.sleep(PAUSE)

    async def ask() -> None:
        """A request at a time: however the broker ends, each ends within its time-out."""
        asked = Journal("asked")
        while True:
            begun = time.monotonic()
            try:
                outcome = "answered" if await client.echo(7) == 7 else "wrong"
            except CallError as error:
                outcome = type(error).__name__
            asked.write(outcome, f"{time.monotonic() - begun:.4f}")
            await asyncio.sleep(0.02)

    asking = asyncio.create_task(ask())
    async with asyncio.TaskGroup() as all_of_them:
        for odd in (0, 1):
            numbers = iter([number for number in range(odd, WANTED, 2) if number not in before])
            for _ in range(OUTSTANDING):
                all_of_them.create_task(one_after_another(numbers))
    asking.cancel()
    print("all confirmed", flush=True)
