"""The store's front under load: visitors come evenly, and how each one fared is written down."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager
from random import Random

from msgspec import Struct

from quintet import Occurrence, QuintetError
from store.page import PATIENCE, Compose, ComposeAsync
from store.stage import tell

RATE = 20  # visitors per second, for each of the callers
THREADS = 8  # of each caller that uses threads


class Visit(Struct, frozen=True):
    """A page composed for a visitor: when, in seconds since the start, and with which recommendations."""

    began: float
    ended: float
    kind: str

    @property
    def served(self) -> bool:
        return self.kind != "failed" and self.ended - self.began <= PATIENCE


class Front:
    """One of the callers, with its visitors, from `open` on."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.visits: list[Visit] = []
        self.waiting = 0
        self.opened: float | None = None  # its circuit, first
        self.closed: float | None = None  # and last

    def open(self, compose: ComposeAsync, start: float) -> None:
        self._compose, self._start = compose, start

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    async def visit(self, product_id: str) -> None:
        began, kind = self.now(), "failed"
        self.waiting += 1
        try:
            kind = (await self._compose(product_id)).freshness
        except (QuintetError, OSError) as error:
            tell(self.now(), f"[red]{self.name}: no page: {error}[/]")
        finally:
            self.waiting -= 1
        self.visits.append(Visit(began, self.now(), kind))

    def hear(self, what: Occurrence) -> None:
        """What happens to its calls of Recommendation."""
        if what.kind == "circuit-opened" and self.opened is None:
            self.opened = self.now()
            tell(self.opened, f"[red]{self.name}: the circuit is open, Recommendation is left alone[/]")
        elif what.kind == "circuit-closed":
            self.closed = self.now()
            tell(self.closed, f"[green]{self.name}: the circuit is closed again[/]")

    def served(self, start: float, end: float) -> list[Visit]:
        """The pages that were ready in this time, before their visitors were gone."""
        return [visit for visit in self.visits if start <= visit.ended < end and visit.served]

    def lost(self) -> int:
        return sum(not visit.served for visit in self.visits)

    def slowest(self) -> float:
        return max(visit.ended - visit.began for visit in self.visits)


@asynccontextmanager
async def in_threads(composing: AbstractContextManager[Compose]) -> AsyncGenerator[ComposeAsync]:
    """Composes in a pool of threads, as a web server does that knows no asyncio."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(THREADS) as pool:
        compose = await loop.run_in_executor(pool, composing.__enter__)
        try:
            yield lambda product_id: loop.run_in_executor(pool, compose, product_id)
        finally:
            await loop.run_in_executor(pool, composing.__exit__, None, None, None)


async def visitors(fronts: Sequence[Front], seconds: float) -> None:
    """Sends the same visitors to all, evenly, however long the pages take. A few products are looked at by many."""
    chance = Random(1)  # noqa: S311 - who looks at what, not secrets
    async with asyncio.TaskGroup() as visits:
        for number in range(int(RATE * seconds)):
            await asyncio.sleep(number / RATE - fronts[0].now())
            product_id = f"b-{int(chance.paretovariate(1.0))}"
            for front in fronts:
                visits.create_task(front.visit(product_id))
