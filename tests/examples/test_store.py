"""The store keeps its promises: a page without the service that hangs, and each accepted order fulfilled once."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4
from xml.etree import ElementTree

import pytest
from apsw import Connection

from quintet import CallError, Policy, connect
from quintet.supervisor import running

STORE = Path(__file__).parents[2] / "examples" / "store"
PAGE = Path(__file__).parents[2] / "docs" / "store.md"


class Demo:
    """One of the demonstrations as a process, with a folder of its own for what it writes."""

    def __init__(self, name: str, folder: Path, *options: str) -> None:
        self.folder = folder
        self.mark = f"STORE_TEST={uuid4()}"
        variable, _, value = self.mark.partition("=")
        environment = {**os.environ, variable: value, "TMPDIR": str(folder), "COLUMNS": "100", "NO_COLOR": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(STORE / f"{name}.py"), *options],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, words: str) -> None:
        assert self.process.stdout
        told = ""
        while words not in told:
            line = self.process.stdout.readline()
            assert line, f"it ended: {told}"
            told += line

    def end(self) -> tuple[int, str, str]:
        """Its exit code, and what it wrote. It must leave neither a process nor a file behind."""
        try:
            out, err = self.process.communicate(timeout=120)
        finally:
            self.process.kill()
        assert not list(self.folder.glob("store-*")), "the temporary folder is still there"
        left = [found.parent.name for found in Path("/proc").glob("[0-9]*/environ") if self.mark in _contents(found)]
        assert not left, f"processes are still there: {left}"
        return self.process.returncode, out, err


def _contents(file: Path) -> str:
    try:
        return file.read_bytes().decode(errors="replace")
    except OSError:  # it has just ended, or is another user's
        return ""


def plain(out: str) -> set[str]:
    """The lines, without what differs from run to run: their numbers, how often and in which order they come."""
    return {re.sub(r"\s+", " ", re.sub(r"\d+(\.\d+)?", "0", line)).strip() for line in out.splitlines()}


def test_the_page_is_served_without_the_service_that_hangs(tmp_path: Path) -> None:
    drawing = tmp_path / "chart.svg"
    code, out, err = Demo("details", tmp_path, f"--svg={drawing}").end()
    assert (code, err) == (0, ""), out
    expected = (STORE / "expected-details.txt").read_text().replace(".quintet/details.svg", str(drawing))
    assert plain(out) == plain(expected)
    drawn = ElementTree.parse(drawing).getroot()
    words = [element.text for element in drawn.findall(".//{*}text")]
    assert {"naive threads", "guarded, asyncio", "guarded, threads", "Recommendation hangs", "it is back"} <= {*words}
    assert words.count("everybody was served") == 2


def test_orders_are_accepted_while_fulfilment_is_dead_and_each_is_fulfilled_once(tmp_path: Path) -> None:
    code, out, err = Demo("orders", tmp_path).end()
    assert (code, err) == (0, ""), out
    assert plain(out) == plain((STORE / "expected-orders.txt").read_text())


@pytest.mark.parametrize(
    ("name", "moment"), [("details", "Recommendation hangs"), ("orders", "Fulfilment is killed")], ids=["hang", "kill"]
)
def test_ctrl_c_in_the_middle_leaves_nothing_behind(name: str, moment: str, tmp_path: Path) -> None:
    demo = Demo(name, tmp_path)
    demo.wait_for(moment)
    demo.process.send_signal(signal.SIGINT)
    code, _, err = demo.end()
    assert (code, err) == (130, "")


@pytest.fixture
def details(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    yield from imported("details", monkeypatch)


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    yield from imported("orders", monkeypatch)


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(STORE))
    yield import_module(name)
    for known in [known for known in sys.modules if known == name or known.partition(".")[0] == "store"]:
        del sys.modules[known]


ORDERS, KILLS = 80, 6


@pytest.mark.parametrize("seed", [1, 2])
async def test_whoever_is_killed_at_whatever_moment_no_order_is_lost_or_made_twice(
    seed: int, orders: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of the customers gives up when the shop dies: such an order was accepted, or it is not there at all."""
    monkeypatch.chdir(tmp_path)
    chance, killed = random.Random(seed), list[str]()
    policy = Policy(timeout=5.0, breaker=False)
    deployed = orders.deployment("orders.toml")
    async with (
        running(deployed) as processes,
        connect(orders.Shop, deployed.services["shop"].at, policy=policy) as shop,
        connect(orders.Fulfilment, deployed.services["fulfilment"].at, policy=policy) as fulfilment,
    ):
        till = orders.Till(shop)

        async def customer(number: int) -> None:
            await asyncio.sleep(number / 25)
            if number % 4:
                await till.order(f"o-{number}")
            else:
                with suppress(CallError):
                    await shop.order(f"o-{number}", orders.PRODUCT, orders.PIECES)
                    till.accepted.add(f"o-{number}")

        async def kill() -> None:
            for _ in range(KILLS):
                await asyncio.sleep(chance.uniform(0.2, 0.9))
                killed.append(chance.choice(["shop", "fulfilment"]))
                processes[killed[-1]].kill()

        await asyncio.gather(kill(), *map(customer, range(ORDERS)))
        wanted = {order_id for (order_id,) in rows("state/shop.db", "SELECT order_id FROM accepted")}
        seen = orders.Warehouse([], 1000)
        while len(set(seen.parcels)) < len(wanted):
            await asyncio.sleep(0.1)
            with suppress(CallError):  # it may be dead just now
                seen = await fulfilment.warehouse(orders.PRODUCT)
    assert not till.refused, killed
    assert till.accepted <= wanted, killed
    assert sorted(seen.parcels) == sorted(wanted), killed
    assert seen.left == 1000 - orders.PIECES * len(wanted)
    assert rows("state/shop.db", "SELECT id FROM quintet_outbox") == []


def rows(file: str, sql: str) -> list[Any]:
    with closing(Connection(file)) as database:
        return database.execute(sql).fetchall()


HANGS, BACK = 4.0, 10.0
HELD = [(5.0, 10.1, "fresh")] * 8
GOOD = [(5.0, 5.3, "stale"), (8.0, 8.1, "stale"), (9.0, 9.1, "none"), (12.0, 12.1, "fresh")]


@pytest.mark.parametrize(
    ("naive", "guarded", "circuit", "sentence"),
    [
        ([*HELD, (8.0, 8.1, "fresh")], GOOD, (5.0, 11.0), "naive: 8 of 8 threads were held, 1 pages were served"),
        (HELD[:7], GOOD, (5.0, 11.0), "naive: 7 of 8 threads were held, 0 pages were served"),
        (HELD, [*GOOD, (5.0, 7.5, "stale")], (5.0, 11.0), "guarded: 1 of 5 visitors had no page within 2 s"),
        (HELD, [*GOOD, (5.0, 5.1, "failed")], (5.0, 11.0), "guarded: 1 of 5 visitors had no page within 2 s"),
        (HELD, GOOD[:2] + GOOD[3:], (5.0, 11.0), "guarded: meanwhile, recommendations were {'stale': 1}"),
        (HELD, GOOD, (None, None), "guarded: its circuit opened at None s and closed at None s"),
        (HELD, GOOD, (5.0, None), "guarded: its circuit opened at 5.0 s and closed at None s"),
        (HELD, GOOD, (5.0, 9.0), "guarded: its circuit opened at 5.0 s and closed at 9.0 s"),
        (HELD, GOOD[:3], (5.0, 11.0), "guarded: no page had fresh ones after that"),
    ],
)
def test_a_promise_about_the_page_that_is_broken_is_one_sentence(
    details: ModuleType,
    naive: list[tuple[float, float, str]],
    guarded: list[tuple[float, float, str]],
    circuit: tuple[float | None, float | None],
    sentence: str,
) -> None:
    fronts = [details.Front("naive"), details.Front("guarded")]
    for front, visits in zip(fronts, (naive, guarded), strict=True):
        front.visits = [sys.modules["store.front"].Visit(*visit) for visit in visits]
    fronts[1].opened, fronts[1].closed = circuit
    with pytest.raises(Exception, match=f"^{re.escape(sentence)}"):
        details.check(fronts, HANGS, BACK)


@pytest.mark.parametrize(
    ("accepted", "refused", "parcels", "left", "sentence"),
    [
        (["o-1"], ["o-2: no"], ["o-1"], 8, "1 orders were refused, first ['o-2: no']"),
        (["o-1", "o-2"], [], ["o-1"], 8, "1 accepted orders have no parcel: o-2"),
        (["o-1"], [], ["o-1", "o-1"], 6, "1 orders were fulfilled more than once: o-1"),
        (["o-1"], [], ["o-1"], 6, "4 pieces were taken from the shelf for 1 orders of 2: that does not fit"),
    ],
)
def test_a_promise_about_the_orders_that_is_broken_is_one_sentence(
    orders: ModuleType, accepted: list[str], refused: list[str], parcels: list[str], left: int, sentence: str
) -> None:
    till = orders.Till(shop=None)
    till.accepted, till.refused = set(accepted), refused
    with pytest.raises(Exception, match=f"^{re.escape(sentence)}"):
        orders.check(till, orders.Warehouse([], 10), orders.Warehouse(parcels, left), again=0)


def test_the_docs_show_the_code_and_the_output_as_they_are() -> None:
    page = PAGE.read_text()
    code = "".join(file.read_text() for file in STORE.rglob("*.py"))
    shown = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert shown
    for block in shown:
        assert block in code
    printed = re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert printed == [(STORE / f"expected-{name}.txt").read_text() for name in ("details", "orders")]
