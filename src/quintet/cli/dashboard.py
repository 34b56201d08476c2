"""`quintet dashboard`: one page that shows all services as they run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from quintet.cli.exits import run
from quintet.cli.serve import stop_signals
from quintet.deployment import FILE, read_deployment
from quintet.errors import ConfigurationError
from quintet.feed import TOKEN

EXAMPLES = """\b
Examples:
  quintet dashboard                                               the services of quintet.toml with `observe`
  quintet dashboard http://127.0.0.1:9001 http://127.0.0.1:9002   what these processes show
  quintet up --dashboard                                          a deployment and its dashboard
"""
PORT = 8600

Port = Annotated[
    int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="Where its page is; 0 for any that is free.")
]


def dashboard(
    addresses: Annotated[
        list[str] | None, typer.Argument(metavar="[ADDRESS]...", help="Where processes are observed (--observe).")
    ] = None,
    port: Port = PORT,
) -> None:
    """Shows who calls whom, how often, how fast and with what errors; circuits, limits, channels, the newest messages.

    The page is served to this machine alone. QUINTET_TOKEN in the environment is what services want to be shown that
    are observed at more than loopback.
    """
    from quintet.dashboard.collector import checked  # here and below: what `quintet --help` need not load

    found = addresses or _deployed()
    for address in found:
        checked(address)
    run(_dashboard(found, port))


def _deployed() -> list[str]:
    if not Path(FILE).exists():
        raise ConfigurationError(
            f"name the addresses that services are observed at (--observe), or run it where {FILE} is"
        )
    found = [service.observe for service in read_deployment().services.values() if service.observe]
    if not found:
        raise ConfigurationError(
            f"no service in {FILE} has an observe = 'http://127.0.0.1:9001'; write one, or `quintet up --dashboard`"
        )
    return found


async def _dashboard(addresses: list[str], port: int) -> None:
    from quintet.dashboard.collector import Collector
    from quintet.dashboard.site import serve_dashboard

    stop = stop_signals(lambda: None, lambda number: os._exit(128 + number))
    token = os.environ.get(TOKEN, "")
    async with Collector(addresses, token=token) as collector, serve_dashboard(collector, port) as page:
        print(f"the dashboard is at {page}; Ctrl-C ends it", flush=True)
        await stop.wait()
