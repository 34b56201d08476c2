"""`make bench`: each module of this folder that offers `figures`, one after the other, as a table and in RESULTS.md."""

from __future__ import annotations

import datetime
import importlib
import os
import pkgutil
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import apsw
from rich.console import Console
from rich.table import Table

import benchmarks
from benchmarks.figure import Figure

VERSIONS = ("quintet", "msgspec", "uvloop", "uvicorn", "httptools", "apsw", "fastapi", "aiohttp", "httpx")
RESULTS = Path(__file__).with_name("RESULTS.md")


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
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.2f}".rstrip("0").rstrip(".")


def measure(names: list[str]) -> dict[str, list[Figure]]:
    found = {}
    for name in names:
        module = importlib.import_module(f"benchmarks.{name}")
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        found[module.__doc__.partition("\n")[0]] = module.figures()
    return found


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
        f"Measured on {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC; read ratios, not absolute figures.",
    ]
    results = measure(names)
    console, written = Console(), ["# Results", "", *(f"{line}  " for line in head), ""]
    console.print(*head, sep="\n")
    for title, figures in results.items():
        table = Table("figure", "measured", "unit", "budget", "holds", title=title, title_justify="left")
        written += [f"## {title}", "", "| figure | measured | unit | budget | holds |", "|---|---:|---|---|---|"]
        for figure in figures:
            holds = {True: "yes", False: "NO", None: ""}[figure.holds]
            row = (figure.name, number(figure.value), figure.unit, figure.budget, holds)
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
