"""One service behind the product page hangs: who goes on, and who goes down with it?

The page is composed from four services, each its own process. Three callers get the same visitors: naive threads, and
guarded ones, in asyncio and in threads. Exit codes: 0 what is promised held, 1 it did not, 2 a service refused to
start, 130 Ctrl-C.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

from store.chart import Panel, svg
from store.front import RATE, THREADS, Front, in_threads, visitors
from store.page import PATIENCE, Addresses, guarded, guarded_threads, naive
from store.stage import START_LIMIT, console, deployment, meanwhile, play, promise, tell

from quintet.supervisor import Process, running

CALM, HUNG, AFTER = 4, 6, 5  # seconds that the service is well, hangs, and is well again


@contextmanager
def hanging(process: Process) -> Generator[None]:
    """Stops a process as it is: who connects is let in by the system, and waits."""
    pid = process.pid
    assert pid, "it is ready, so it runs"
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# --- what is seen


def heading(fronts: Sequence[Front]) -> None:
    naive_, *others = fronts
    guarded_ = "".join(f"   {front.name:<38}" for front in others)
    console.print(f"{'':9}{naive_.name:<24}{guarded_}".rstrip(), style="bold")
    columns = "   served  slowest   fresh stale  none" * len(others)
    console.print(f"{'':9}served   held  waiting{columns}", style="dim")


def row(fronts: Sequence[Front], second: int) -> None:
    """What was served in the second that has just ended."""
    naive_, *others = fronts
    cells = f"{len(naive_.served(second - 1, second)):6}{min(naive_.waiting, THREADS):3} of {THREADS:<2}"
    cells += f"{max(0, naive_.waiting - THREADS):6}"
    for front in others:
        served = front.served(second - 1, second)
        slowest = max((visit.ended - visit.began for visit in served), default=0.0)
        kinds = Counter(visit.kind for visit in served)
        cells += f"   {len(served):6}{slowest * 1000:6.0f} ms"
        cells += f"  {kinds['fresh']:6}{kinds['stale']:6}{kinds['none']:6}"
    tell(second, cells)


async def follow(fronts: Sequence[Front], seconds: range) -> None:
    for second in seconds:
        await asyncio.sleep(second - fronts[0].now())
        row(fronts, second)


# --- what is promised


def check(fronts: Sequence[Front], hangs: float, back: float) -> None:
    """Tells what held. Raises PromiseBroken with the first sentence that did not."""
    naive_, *others = fronts
    held = sum(visit.began < back <= visit.ended for visit in naive_.visits)
    served = len(naive_.served((hangs + back) / 2, back))
    promise(
        held >= THREADS and not served,
        f"{naive_.name}: all {THREADS} threads were held and nothing was served; {naive_.lost()} visitors were gone",
        f"{naive_.name}: {min(held, THREADS)} of {THREADS} threads were held, {served} pages were served",
    )
    for front in others:
        promise(
            not front.lost(),
            f"{front.name}: everybody was served, after {front.slowest():.2f} s at most",
            f"{front.name}: {front.lost()} of {len(front.visits)} visitors had no page within {PATIENCE:g} s",
        )
        kinds = Counter(visit.kind for visit in front.served((hangs + back) / 2, back))
        promise(
            kinds["stale"] > 0 < kinds["none"] and not kinds["fresh"],
            f"{front.name}: meanwhile, {kinds['stale']} pages had stale recommendations and {kinds['none']} had none",
            f"{front.name}: meanwhile, recommendations were {dict(kinds)}, and not some stale and some empty",
        )
        opened, closed = front.opened or back, front.closed or hangs
        after, again = f"{opened - hangs:.1f} s", f"{closed - back:.1f} s"
        promise(
            hangs < opened < back < closed,
            f"{front.name}: its circuit opened {after} after the hang began, and closed {again} after it had ended",
            f"{front.name}: its circuit opened at {front.opened} s and closed at {front.closed} s",
        )
        fresh = sum(visit.kind == "fresh" for visit in front.served(closed, CALM + HUNG + AFTER))
        promise(
            fresh > 0,
            f"{front.name}: {fresh} pages had fresh ones after that",
            f"{front.name}: no page had fresh ones after that",
        )


def draw(fronts: Sequence[Front], hangs: float, back: float, drawing: Path) -> None:
    naive_, *others = fronts
    panels = [
        Panel(
            title=naive_.name,
            served=[(visit.ended, visit.kind) for visit in naive_.visits if visit.served],
            remarks=(f"{naive_.lost()} visitors were gone", f"all its {THREADS} threads were held"),
            failed=True,
        )
    ]
    panels += [
        Panel(
            title=front.name,
            served=[(visit.ended, visit.kind) for visit in front.visits if visit.served],
            remarks=("everybody was served", f"after {front.slowest():.2f} s at most"),
            open=(front.opened or 0.0, front.closed or 0.0),
        )
        for front in others
    ]
    title = "One service behind the product page hangs"
    picture = svg(panels, title=title, rate=RATE, seconds=CALM + HUNG + AFTER, hangs=hangs, back=back)
    drawing.parent.mkdir(parents=True, exist_ok=True)
    drawing.write_text(picture)
    console.print(f"The same as a picture: {drawing}")


# --- how it goes


async def show(drawing: Path) -> None:
    deployed = deployment("details.toml")
    console.print(f"Starting {len(deployed.services)} services, each its own process ...")
    async with running(deployed, timeout=START_LIMIT) as processes, AsyncExitStack() as stack:
        at: Addresses = {process.name: process.addresses[0] for process in processes}
        fronts = [Front("naive threads"), Front("guarded, asyncio"), Front("guarded, threads")]
        composing = [
            in_threads(naive(at)),
            guarded(at, fronts[1].hear),
            in_threads(guarded_threads(at, fronts[2].hear)),
        ]
        composed = [await stack.enter_async_context(one) for one in composing]
        start = time.monotonic()
        for front, compose in zip(fronts, composed, strict=True):
            front.open(compose, start)
        console.print(f"{RATE} visitors come to each every second, and wait for {PATIENCE:g} s at most.\n")
        heading(fronts)
        async with meanwhile(visitors(fronts, CALM + HUNG + AFTER)):
            await follow(fronts, range(1, CALM + 1))
            with hanging(processes["recommendation"]):
                hangs = fronts[0].now()
                tell(hangs, "[bold red]Recommendation hangs[/]")
                await follow(fronts, range(CALM + 1, CALM + HUNG + 1))
                back = fronts[0].now()
                tell(back, "[bold green]Recommendation is back[/]")
            await follow(fronts, range(CALM + HUNG + 1, CALM + HUNG + AFTER + 1))
    console.print()
    check(fronts, hangs, back)
    draw(fronts, hangs, back, drawing)


if __name__ == "__main__":
    logging.getLogger("quintet").addHandler(logging.NullHandler())  # what it would say is told here
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--svg", type=Path, default=Path(".quintet/details.svg"), help="where the chart is written")
    sys.exit(play("details", show(parser.parse_args().svg.resolve())))
