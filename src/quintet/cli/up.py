"""`quintet up`: every service of a deployment as a process, and one combined log."""

from __future__ import annotations

import asyncio
import contextlib
import json as standard_json
import os
import secrets
import signal
import socket
from typing import Annotated

import typer
from msgspec import structs

from quintet.cli.dashboard import PORT
from quintet.cli.exits import Exit, run
from quintet.cli.numbers import seconds, seconds_or_none
from quintet.cli.serve import stop_signals
from quintet.deployment import FILE, Deployed, read_deployment
from quintet.feed import TOKEN
from quintet.supervisor import GRACE, Process, Processes, State
from quintet.transport import parse_address

EXAMPLES = """\b
Examples:
  quintet up                       the services of quintet.toml in this folder
  quintet up demo/quintet.toml     their modules and relative paths are looked up in demo/
  quintet up --dashboard           and one page that shows them as they run
  TRIPS_PORT=8102 quintet up       where the file says at = "http://127.0.0.1:${TRIPS_PORT:-8002}"
"""

COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "bright_red", "bright_cyan", "bright_green", "bright_magenta")


def up(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The deployment.")] = FILE,
    within: Annotated[
        float, typer.Option("--within", callback=seconds, help="Seconds that all services have to become ready.")
    ] = 60.0,
    grace: Annotated[
        float,
        typer.Option("--grace", callback=seconds_or_none, help="Seconds that each has to drain before it is killed."),
    ] = GRACE,
    dashboard: Annotated[bool, typer.Option("--dashboard", help="Shows them on one page, as they run.")] = False,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Where the dashboard is; 0 for any that is free.")
    ] = PORT,
    json: Annotated[bool, typer.Option("--json", help="Writes the log as lines of JSON, for programs.")] = False,
) -> None:
    """Runs all services of a deployment, restarts what crashes, stops all in reverse order on Ctrl-C or SIGTERM.

    A service that refuses its configuration ends it all while it starts; later, that service stays down and the
    others go on. A second Ctrl-C ends all at once.
    """
    deployment = read_deployment(file)
    log = _Log(json)
    observed = _Observed() if dashboard else None
    processes = Processes(deployment, log.line, log.change, *([observed.prepare] if observed else []))
    log.open(processes)
    run(
        _with_dashboard(observed, port, processes, log, within, grace)
        if observed
        else _up(processes, log, within, grace)
    )


class _Observed:
    """Where the processes are observed: each at a port of its own, for who has the token."""

    def __init__(self) -> None:
        self.token = os.environ.get(TOKEN) or secrets.token_hex()
        self.addresses: list[str] = []
        self._held: list[socket.socket] = []

    def prepare(self, _name: str, service: Deployed) -> Deployed:
        """The service, observed: where its deployment says, else at a free port, the same after a crash."""
        observe = service.observe
        if not observe or parse_address(observe).port == 0:
            self._held.append(socket.create_server(("127.0.0.1", 0)))  # held until all have theirs
            observe = f"http://127.0.0.1:{self._held[-1].getsockname()[1]}"
        self.addresses.append(observe)
        return structs.replace(service, observe=observe, env={**service.env, TOKEN: self.token})

    def release(self) -> None:
        for held in self._held:
            held.close()


async def _with_dashboard(
    observed: _Observed, port: int, processes: Processes, log: _Log, within: float, grace: float
) -> None:
    from quintet.dashboard.collector import Collector  # here: what `quintet up` alone need not load
    from quintet.dashboard.site import serve_dashboard

    observed.release()
    async with Collector(observed.addresses, token=observed.token) as collector:
        async with serve_dashboard(collector, port) as page:
            log.note(f"the dashboard is at {page}")
            await _up(processes, log, within, grace)


async def _up(processes: Processes, log: _Log, within: float, grace: float) -> None:
    cut = 0

    def end(number: int) -> None:
        nonlocal cut
        cut = 128 + number
        processes.kill()

    stop = stop_signals(lambda: None, end)
    asked = asyncio.create_task(stop.wait())
    try:
        processes.start()
        ready = asyncio.create_task(processes.ready(within))
        await asyncio.wait([asked, ready], return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            await ready
            log.note(f"all {len(processes)} ready; Ctrl-C stops them")
        else:
            ready.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ready
        ended = asyncio.create_task(processes.ended())
        await asyncio.wait([asked, ended], return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
    finally:
        asked.cancel()
        log.note("stopping all")
        await processes.stop(grace)
    if cut:
        raise typer.Exit(cut)
    if any(process.state is State.REFUSED for process in processes):
        raise typer.Exit(Exit.CONFIGURATION)


class _Log:
    """What all processes write, each line behind its process's name in its own colour."""

    def __init__(self, json: bool) -> None:
        from rich.console import Console  # here and below: it takes longer to import than `quintet --help` may last

        self._json = json
        self._console = Console(highlight=False, soft_wrap=True)
        self._colours: dict[str, str] = {}
        self._width = len("quintet")
        self._processes: Processes | None = None

    def open(self, processes: Processes) -> None:
        self._processes = processes
        for number, process in enumerate(processes):
            self._colours[process.name] = COLOURS[number % len(COLOURS)]
            self._width = max(self._width, len(process.name))
        self.note(f"starting {len(processes)} services: {', '.join(process.name for process in processes)}")

    def line(self, name: str, text: str) -> None:
        if self._json:
            self._console.file.write(standard_json.dumps({"process": name, "line": text}) + "\n")
            self._console.file.flush()
            return
        from rich.text import Text

        name_and_bar = (f"{name:<{self._width}} | ", self._colours.get(name, "bold"))
        self._console.print(Text.assemble(name_and_bar, Text.from_ansi(text)))

    def note(self, text: str) -> None:
        self.line("quintet", text)

    def change(self, process: Process) -> None:
        match process.state:
            case State.READY:
                self.note(f"{process.name} is ready ({self._progress()})")
            case State.CRASHED:
                code = process.exit_code or 0
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                self.note(f"{process.name} {how}; starting it again in {process.delay:g} s")
            case State.REFUSED:
                self.note(f"{process.name} refused its configuration, and is not started again")
            case State.STOPPING:
                self.note(f"stopping {process.name}")
            case _:
                pass

    def _progress(self) -> str:
        everything = list(self._processes or ())
        waiting = [process.name for process in everything if process.state is not State.READY]
        return f"{len(everything) - len(waiting)} of {len(everything)}" + (
            f", waiting for {', '.join(waiting)}" if waiting else ""
        )
