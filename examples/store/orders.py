"""Whoever is killed while orders come in: all are accepted, none is lost, and each is fulfilled once.

The shop and Fulfilment are processes, with a SQLite file between them. Fulfilment is killed (kill -9) twice: once it
stays away for a while, and once it is in the middle of what had piled up. Then the shop is: its customers try again.
Exit codes: 0 what is promised held, 1 it did not, 2 a service refused to start, 130 Ctrl-C.
"""

import argparse
import asyncio
import sys
import time
from contextlib import suppress

from store.contracts import Fulfilment, Shop, Warehouse
from store.stage import START_LIMIT, console, deployment, meanwhile, play, promise, tell

from quintet import CallError, DeadlineExceeded, Policy, Unavailable, connect
from quintet.record import read
from quintet.supervisor import Process, State, running

RATE = 20  # orders a second
EVERY = 5  # how many customers it takes to find one who clicks twice
CALM, AWAY, AFTER, LAST = 2, 4, 3, 3  # seconds: Fulfilment is there, is away, is back; and the shop has been killed
PRODUCT, PIECES = "b-1", 2  # what everybody orders
PATIENCE = 20.0  # seconds that a customer tries to order, with all that a loaded machine does meanwhile
AGAIN = 0.2  # seconds until a customer tries again, without knowing whether the order was accepted
LATEST = 30.0  # seconds after the last order in which all must be worked off


class Till:
    """What the customers know: which orders were accepted, and how long that took."""

    def __init__(self, shop: Shop) -> None:
        self.accepted: set[str] = set()
        self.twice = 0  # customers who clicked twice
        self.again = 0  # times that somebody tried again, since the shop was dead
        self.refused: list[str] = []
        self.slowest = 0.0  # seconds, since it was looked at
        self._shop = shop

    async def order(self, order_id: str) -> None:
        began = time.monotonic()
        while order_id not in self.accepted:
            try:
                await self._shop.order(order_id, PRODUCT, PIECES)
            except CallError as error:
                if time.monotonic() - began > PATIENCE:
                    self.refused.append(f"{order_id}: {error}")
                    break
                self.again += 1
                await asyncio.sleep(AGAIN)
            else:
                self.accepted.add(order_id)
        self.slowest = max(self.slowest, time.monotonic() - began)


class Yard:
    """What can be seen of Fulfilment: its parcels, as it said last."""

    def __init__(self, process: Process, fulfilment: Fulfilment) -> None:
        self.process = process
        self.seen = Warehouse([], 0)
        self._fulfilment = fulfilment

    async def look(self) -> Warehouse:
        if self.process.state is State.READY:
            with suppress(DeadlineExceeded, Unavailable):  # it may die just now
                self.seen = await self._fulfilment.warehouse(PRODUCT)
        return self.seen


class Day:
    """A day at the store: customers, and what is told of them second by second."""

    def __init__(self, till: Till, yard: Yard) -> None:
        self.till, self.yard = till, yard
        self._start = time.monotonic()

    def now(self) -> float:
        return time.monotonic() - self._start

    async def customers(self, seconds: int) -> None:
        async with asyncio.TaskGroup() as orders:
            for number in range(RATE * seconds):
                await asyncio.sleep(number / RATE - self.now())
                twice = number % EVERY == 0
                self.till.twice += twice
                for _ in range(1 + twice):
                    orders.create_task(self.till.order(f"o-{number + 1}"))

    async def follow(self, until: int) -> None:
        for second in range(int(self.now()) + 1, until + 1):
            await asyncio.sleep(second - self.now())
            await self.row()

    async def row(self) -> None:
        till, parcels = self.till, len((await self.yard.look()).parcels)
        waiting = max(0, len(till.accepted) - parcels)  # one may be fulfilled before its customer knows
        there = "there" if self.yard.process.state is State.READY else "away"
        tell(self.now(), f"{len(till.accepted):8}{till.slowest * 1000:8.0f} ms{parcels:9}{waiting:9}  {there}")
        till.slowest = 0.0


def check(till: Till, before: Warehouse, after: Warehouse, again: int) -> None:
    """Tells what held. Raises PromiseBroken with the first sentence that did not."""
    accepted, parcels = till.accepted, after.parcels
    promise(
        not till.refused,
        f"all {len(accepted)} orders were accepted; {till.again} times somebody tried again, as the shop was dead",
        f"{len(till.refused)} orders were refused, first {till.refused[:1]}",
    )
    lost = sorted(accepted - set(parcels))
    promise(not lost, "none was lost", f"{len(lost)} accepted orders have no parcel: {', '.join(lost[:5])} ...")
    double = sorted({order_id for order_id in parcels if parcels.count(order_id) > 1})
    promise(
        not double,
        f"each has one parcel: {again} that came again since they were in work when it was killed,"
        f" {till.twice} that were ordered twice",
        f"{len(double)} orders were fulfilled more than once: {', '.join(double[:5])} ...",
    )
    taken = before.left - after.left
    promise(
        taken == PIECES * len(parcels),
        f"{taken} pieces were taken from the shelf for {len(parcels)} orders of {PIECES}",
        f"{taken} pieces were taken from the shelf for {len(parcels)} orders of {PIECES}: that does not fit",
    )


async def show() -> None:
    deployed = deployment("orders.toml")
    console.print(f"Starting {len(deployed.services)} services, each its own process ...")
    async with (
        running(deployed, timeout=START_LIMIT) as processes,
        connect(Shop, processes["shop"].addresses, policy=Policy(timeout=5.0, breaker=False)) as shop,
        connect(Fulfilment, processes["fulfilment"].addresses) as fulfilment,
    ):
        process = processes["fulfilment"]
        day = Day(Till(shop), Yard(process, fulfilment))
        before = await day.yard.look()
        console.print(f"{RATE} customers order every second; each {EVERY}th clicks twice.\n")
        console.print(f"{'':9}accepted  slowest  parcels  waiting  Fulfilment", style="dim")
        async with meanwhile(day.customers(CALM + AWAY + AFTER + LAST)):
            await day.follow(CALM)
            process.kill()
            await process.stop()  # it would be started again
            tell(day.now(), "[bold red]Fulfilment is killed (kill -9)[/]")
            await day.follow(CALM + AWAY)
            process.start()
            await process.ready(START_LIMIT)
            tell(day.now(), "[bold green]Fulfilment is back[/]")
            await day.row()
            await asyncio.sleep(0.2)
            process.kill()
            tell(day.now(), "[bold red]It is killed again, in the middle of what had piled up[/]")
            await day.follow(CALM + AWAY + AFTER)
            processes["shop"].kill()
            tell(day.now(), "[bold red]The shop is killed, too; it is started again, and its customers try again[/]")
            await day.follow(CALM + AWAY + AFTER + LAST)
        await worked_off(day)
    console.print()
    again = sum(exchange.attempt > 1 for exchange in read("record.jsonl") if exchange.operation == "fulfilment.fulfil")
    check(day.till, before, day.yard.seen, again)


async def worked_off(day: Day) -> None:
    """Looks on until nothing waits any more, or the time is up: then the check says what is missing."""
    for _ in range(int(LATEST * 10)):
        if len((await day.yard.look()).parcels) >= len(day.till.accepted):
            return
        await asyncio.sleep(0.1)


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    sys.exit(play("orders", show()))
