"""`make bench`: each module of this folder that offers `figures`, one after the other, as a table and in RESULTS.md.

A module's documentation stands above its table: its first line is the title, the rest tells how it was measured.
"""

from __future__ import annotations

import datetime
import importlib
import math
import os
import pkgutil
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import apsw
from msgspec import Struct
from rich.console import Console
from rich.table import Table

import benchmarks
from benchmarks.brokers import Missing, installed
from benchmarks.figure import Figure

VERSIONS = (
    *("quintet", "msgspec", "uvloop", "uvicorn", "httptools", "apsw", "confluent-kafka", "fastapi", "aiohttp", "httpx"),
    *("aio-pika", "faststream", "stompman", "aiokafka", "ansq"),
)
RESULTS = Path(__file__).with_name("RESULTS.md")


class Measured(Struct):
    """What a module found, or `missing`: what it would need."""

    title: str
    method: list[str]
    figures: list[Figure]
    missing: str = ""


def machine() -> str:
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    load = ", ".join(f"{figure:.1f}" for figure in os.getloadavg())
    return f"{os.cpu_count()} x {cpu}, {platform.system()} {platform.release()}, load before the run {load}"


def number(value: float) -> str:
    if math.isnan(value):
        return ""  # not measured; the figure's name says why
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.2f}".rstrip("0").rstrip(".")


def measure(name: str) -> Measured:
    module = importlib.import_module(f"benchmarks.{name}")
    print(f"measuring {name} ...", file=sys.stderr, flush=True)
    title, *method = (module.__doc__ or name).strip().splitlines()
    try:
        return Measured(title, method[1:], module.figures())
    except Missing as missing:
        return Measured(title, method[1:], [], str(missing))


def main() -> int:
    offered = [
        name
        for _, name, _ in pkgutil.iter_modules(benchmarks.__path__)
        if name not in ("__main__", "figure") and hasattr(importlib.import_module(f"benchmarks.{name}"), "figures")
    ]
    names = sys.argv[1:] or offered
    if unknown := set(names) - set(offered):
        print(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(offered)}", file=sys.stderr)
        return 2
    head = [
        f"Machine: {machine()}",
        f"Python {platform.python_version()}, SQLite {apsw.sqlite_lib_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in VERSIONS),
        f"Brokers: {installed()}",
        f"Measured on {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC; read ratios, not absolute figures.",
    ]
    results = [measure(name) for name in names]
    missing = [result.missing for result in results if result.missing]
    if missing:
        head.append(f"Not measured, for want of brokers: {'; '.join(missing)}")
    console, written = Console(), ["# Results", "", *(f"{line}  " for line in head), ""]
    console.print(*head, sep="\n")
    for result in results:
        written += [f"## {result.title}", ""]
        written += [*result.method, ""] if result.method else []
        if result.missing:
            written += [f"Not measured: {result.missing}", ""]
            continue
        table = Table("figure", "measured", "unit", "budget", "holds", title=result.title, title_justify="left")
        written += ["| figure | measured | unit | budget | holds |", "|---|---:|---|---|---|"]
        for figure in result.figures:
            holds = {True: "yes", False: "NO", None: ""}[figure.holds]
            row = (figure.name.replace("|", "/"), number(figure.value), figure.unit, figure.budget, holds)
            table.add_row(*row, style="red" if figure.holds is False else None)
            written.append(f"| {' | '.join(row)} |")
        console.print(table)
        written.append("")
    if names == offered:
        RESULTS.write_text("\n".join(written).rstrip() + "\n")
        console.print(
            f"written to {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
