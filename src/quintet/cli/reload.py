"""`quintet serve --reload`: the service as a child process that is started anew when a .py file changes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import typer

LOOK = 0.3  # seconds between two looks at the files


async def serve_and_reload(arguments: list[str]) -> None:
    """Runs `quintet ARGUMENTS` until a signal; after each change below this folder it drains and is started again."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    child: asyncio.subprocess.Process | None = None

    def hand_on(number: int) -> None:
        stop.set()
        if child is not None and child.returncode is None:
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, hand_on, number)
    code = 0
    seen = await asyncio.to_thread(_times)
    while not stop.is_set():
        # of its own session: a Ctrl-C in the terminal reaches it once, through us
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "quintet", *arguments, start_new_session=True
        )
        ended, told = asyncio.create_task(child.wait()), asyncio.create_task(stop.wait())
        while not told.done():
            await asyncio.wait([told], timeout=LOOK)
            times = await asyncio.to_thread(_times)
            if times != seen:
                names = sorted(str(path) for path, _ in set(times.items()) ^ set(seen.items()))
                print(f"changed: {', '.join(dict.fromkeys(names))}; restarting", file=sys.stderr)
                seen = times
                break
        if child.returncode is None and not stop.is_set():
            child.terminate()
        code = await ended
        told.cancel()
    raise typer.Exit(code if code >= 0 else 128 - code)


def _times() -> dict[Path, int]:
    """When each .py file below this folder was last written; hidden folders, environments and caches left out."""
    found: dict[Path, int] = {}
    for folder, folders, files in os.walk("."):
        folders[:] = [name for name in folders if not name.startswith((".", "__")) and name not in _FOREIGN]
        for name in files:
            if name.endswith(".py"):
                path = Path(folder, name)
                try:
                    found[path] = path.stat().st_mtime_ns
                except FileNotFoundError:  # gone while we looked: its absence is the change
                    continue
    return found


_FOREIGN = frozenset({"node_modules", "site-packages", "venv"})
