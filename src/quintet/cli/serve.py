"""`quintet serve`: one service in this process, until a signal asks it to drain."""

from __future__ import annotations

import asyncio
import json as standard_json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated

import typer

from quintet.cli.exits import run
from quintet.cli.loading import load_service
from quintet.contract import Contract
from quintet.errors import ConfigurationError
from quintet.policy_file import PolicyFile
from quintet.server import Connections, Service
from quintet.server import serve as serve_service
from quintet.supervisor import PLACES
from quintet.transport import parse_address

log = logging.getLogger("quintet.serve")

ONE_PRESS = 0.2  # seconds within which the same signal is the same Ctrl-C, handed on by a parent (make, timeout ...)

EXAMPLES = """\b
Examples:
  quintet serve rides.passengers:service --at http://127.0.0.1:8001
  quintet serve rides.trips:service --at http://127.0.0.1:8002 --at sqlite:///rides.db \\
      --connect passengers=http://127.0.0.1:8001
  quintet serve rides.trips:service --at http://127.0.0.1:0 --reload     (a free port; restarts on changes)
"""

At = Annotated[list[str], typer.Option("--at", metavar="ADDRESS", help="Where it is served; may be repeated.")]
Connect = Annotated[
    list[str],
    typer.Option("--connect", metavar="NAME=ADDRESS", help="Where a contract that it uses or hears is; repeatable."),
]
Format = Annotated[str, typer.Option("--format", metavar="NAME", help="What its messages are written in.")]
PoliciesFile = Annotated[
    str,
    typer.Option("--policies", metavar="FILE", help="A quintet.toml with the policies of its calls; it is watched."),
]
PoliciesOf = Annotated[
    str, typer.Option("--policies-of", metavar="NAME", help="Its [service.NAME] there, where that is not its own name.")
]
Record = Annotated[str, typer.Option("--record", metavar="FILE", help="Writes each delivery to this file, as a line.")]
Observe = Annotated[
    str,
    typer.Option(
        "--observe", metavar="ADDRESS", help="Shows /metrics, /hystrix.stream and /health there, if no --at is http."
    ),
]
LogLevel = Annotated[str, typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")]
Json = Annotated[bool, typer.Option("--json", help="Writes its lines as JSON, for programs.")]


def serve(
    app: Annotated[str, typer.Argument(metavar="MODULE:SERVICE", help="The service, as rides.trips:service.")],
    at: At = [],  # noqa: B006 - typer copies it
    connect: Connect = [],  # noqa: B006
    format: Format = "json",  # noqa: A002 - the word users know
    record: Record = "",
    observe: Observe = "",
    policies: PoliciesFile = "",
    policies_of: PoliciesOf = "",
    reload: Annotated[bool, typer.Option("--reload", help="Restarts it when a .py file below here changes.")] = False,
    log_level: LogLevel = "info",
    json: Json = False,
    supervisor: Annotated[int, typer.Option("--supervisor", hidden=True)] = -1,
) -> None:
    """Serves one service in this process. SIGTERM or Ctrl-C drains it; a second one ends it at once."""
    configure_logging(log_level, json)
    if reload:
        from quintet.cli.reload import serve_and_reload

        run(serve_and_reload([argument for argument in sys.argv[1:] if argument != "--reload"]))
        return
    if supervisor >= 0:
        places = standard_json.loads(os.environ.pop(PLACES))  # not for what the service may start
        at, connect = places["at"], places["connect"]
    service = load_service(app)
    file = PolicyFile(service, policies, policies_of) if policies else None
    run(
        until_stopped(
            service, at, connections(connect), format, record, file, observe, json=json, supervisor=supervisor
        )
    )


def connections(given: list[str]) -> Connections:
    """What --connect said, by contract name; a name that is repeated has several addresses. ConfigurationError."""
    found: dict[type[Contract] | str, list[str]] = {}
    for text in given:
        name, equals, address = text.partition("=")
        if not equals or "://" in name or not name:
            shown = str(parse_address(text)) if "://" in name else repr(text)  # without its password
            raise ConfigurationError(f"--connect {shown}: write NAME=ADDRESS, as passengers=http://127.0.0.1:8001")
        found.setdefault(name, []).append(address)
    return found


async def until_stopped(
    service: Service,
    at: list[str],
    connect: Connections,
    format_name: str = "json",
    record: str = "",
    policies: PolicyFile | None = None,
    observe: str = "",
    *,
    json: bool = False,
    supervisor: int = -1,
) -> None:
    """Serves, says where, and drains at the first signal or when its supervisor (a socket's descriptor) is gone."""
    ready = False
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None, "a coroutine runs in a task"  # noqa: S101

    def begin() -> None:
        if not ready:
            task.cancel()

    def end(number: int) -> None:
        log.warning("ended at once: what was in work is cut off")
        os._exit(128 + number)

    stop = stop_signals(begin, end)
    channel = socket.socket(fileno=supervisor) if supervisor >= 0 else None

    def orphaned(channel: socket.socket) -> None:
        """A supervisor says nothing, so what can be read is its end: nobody else would stop this process."""
        loop.remove_reader(channel)
        if not stop.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    if channel is not None:
        channel.setblocking(False)
        loop.add_reader(channel, orphaned, channel)
    try:
        async with serve_service(
            service, at=at, connect=connect, format=format_name, record=record, observe=observe
        ) as addresses:
            ready = True
            said = standard_json.dumps({"service": service.name, "at": addresses})
            print(said if json else f"serving {service.name} at {', '.join(addresses) or 'its channels'}", flush=True)
            if channel is not None:
                channel.send(said.encode())
            watching = asyncio.create_task(policies.watch()) if policies else None
            await stop.wait()
            if watching:
                watching.cancel()
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
    finally:
        if channel is not None:
            loop.remove_reader(channel)
            channel.close()


def stop_signals(begin: Callable[[], None], end: Callable[[int], None]) -> asyncio.Event:
    """What the first SIGINT or SIGTERM sets, after it called `begin`; a second one calls `end` with its number."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    first = (0, 0.0)

    def handle(number: int) -> None:
        nonlocal first
        if not stop.is_set():
            first = (number, loop.time())
            stop.set()
            begin()
        elif number != first[0] or loop.time() - first[1] > ONE_PRESS:
            end(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, handle, number)
    return stop


class _Readable(logging.Formatter):
    default_time_format = "%H:%M:%S"
    default_msec_format = "%s.%03d"

    def __init__(self) -> None:
        super().__init__("{asctime} {levelname:<7} {name}: {message}", style="{")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "quintet", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return standard_json.dumps(line)


def configure_logging(level: str, json: bool) -> None:
    """One line per record on stderr. Raises ConfigurationError for an unknown level."""
    if level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ConfigurationError(f"--log-level {level!r}: it is one of debug, info, warning, error")
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if json else _Readable())
    logging.basicConfig(level=level.upper(), handlers=[handler])
