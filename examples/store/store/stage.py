"""What both demonstrations stand on: services as processes, promises that are kept or not, an exit code at the end."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager, chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from msgspec import structs
from rich.console import Console

from quintet import ConfigurationError, QuintetError
from quintet.deployment import Deployment, read_deployment

HERE = Path(__file__).resolve().parents[1]
START_LIMIT = 60.0  # seconds until all services are ready

console = Console(highlight=False, soft_wrap=True)


class PromiseBroken(Exception):
    """One sentence about what did not hold."""


def promise(holds: bool, kept: str, broken: str) -> None:
    """Says what held. Raises PromiseBroken with the other sentence where it did not."""
    if not holds:
        raise PromiseBroken(broken)
    console.print(f"[green]✓[/] {kept}")


def tell(at: float, said: str) -> None:
    """Something that happened so many seconds after the start."""
    console.print(f"{at:5.1f} s  {said}")


def deployment(file: str) -> Deployment:
    """The services of a file of this example, with our modules, and the current folder for what they write.

    The shop is at a free port, the same for as long as the demonstration runs: it may be started again.
    """
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = str(held.getsockname()[1])
    found = read_deployment(HERE / file, {**os.environ, "SHOP_PORT": port}).services
    services = {name: structs.replace(one, env={**one.env, "PYTHONPATH": path}) for name, one in found.items()}
    return Deployment(services, Path.cwd())


@asynccontextmanager
async def meanwhile(work: Coroutine[Any, Any, None]) -> AsyncGenerator[None]:
    """Does the work beside what stands in the block, and waits for its end, unless the block fails."""
    task = asyncio.create_task(work)
    try:
        yield
        await task
    finally:
        task.cancel()


def play(name: str, show: Coroutine[Any, Any, None]) -> int:
    """Runs a demonstration in a folder of its own.

    Gives its exit code: 0 what is promised held, 1 it did not, 2 a service refused to start, 130 Ctrl-C.
    """
    try:
        with TemporaryDirectory(prefix="store-") as folder, chdir(folder):
            asyncio.run(_until_interrupted(show))
        return 0
    except asyncio.CancelledError:
        return 130
    except (PromiseBroken, QuintetError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError) else 1


async def _until_interrupted(show: Coroutine[Any, Any, None]) -> None:
    this, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert this is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, this.cancel)
    await show
