"""Processes: run to their end, started to stay, and ended with all that they started."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

STOP = 20.0
"""Seconds that a broker has to end by itself."""


class Trouble(Exception):
    """A sentence for whoever called this script."""

    code = 1


class NotInstalled(Trouble):
    code = 3


def is_root() -> bool:
    return os.geteuid() == 0


def run(
    command: list[str],
    failure: str,
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
    user: str | None = None,
) -> None:
    if not shutil.which(command[0]):
        raise Trouble(f"{failure}: {command[0]} is missing.")
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
        cwd=folder or "/",
        **_as(user),
    )
    if done.returncode:
        raise Trouble(f"{failure}: {command[0]} ended with {done.returncode}.\n{done.stdout.strip()}")


def launch(commands: list[list[str]], log: Path, environment: dict[str, str], user: str | None) -> int:
    """Starts them in a session of their own, so that no Ctrl-C reaches it, and returns the last one's process id."""
    *companions, main = commands
    # setpriv lets a companion be killed when the broker ends, however that comes
    script = "".join(f"setpriv --pdeathsig KILL -- {shlex.join(command)} & " for command in companions)
    with log.open("ab") as output:
        process = subprocess.Popen(
            ["/bin/sh", "-c", f"{script}exec {shlex.join(main)}"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd="/",
            env={"PATH": os.environ["PATH"], "HOME": "/", "LANG": "C.UTF-8", **environment},
            start_new_session=True,
            **_as(user),
        )
    return process.pid


def _as(user: str | None) -> dict[str, Any]:
    """Only root can be another user."""
    return {"user": user, "group": user, "extra_groups": []} if user and is_root() else {}


def end(pid: int, number: signal.Signals) -> None:
    """Ends a process, its session and all below it; those that do not go in time are killed."""
    family = descendants(pid)
    for member in family if number == signal.SIGKILL else [pid]:
        _send(member, number)
    deadline = time.monotonic() + STOP
    while left := [member for member, since in family.items() if born(member) == since]:
        if time.monotonic() > deadline:
            for member in left:
                _send(member, signal.SIGKILL)
        time.sleep(0.02)


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def born(pid: int) -> int | None:
    """When a process began, in the kernel's ticks: what tells it from a later one with its number. None: it is gone."""
    stat = _stat(pid)
    # a dead leader whose threads still end is there, and holds its ports
    return int(stat[19]) if stat and (stat[0] not in "ZX" or int(stat[17]) > 1) else None


def descendants(pid: int) -> dict[int, int]:
    """Itself, its session (the companions) and its children's children, each with when it began."""
    family: dict[int, int] = {}
    births = {int(path.name): born(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    for member, since in sorted(births.items(), key=lambda birth: birth[1] or 0):  # parents before their children
        stat = _stat(member)
        if since is not None and stat and (pid in (member, int(stat[3])) or int(stat[1]) in family):
            family[member] = since
    return family


def megabytes(pid: int) -> int:
    """What it takes with all below it."""
    pages = sum(int(stat[21]) for member in descendants(pid) if (stat := _stat(member)))
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on: [0] state, [1] parent, [3] session, [19] start, [21] pages."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
