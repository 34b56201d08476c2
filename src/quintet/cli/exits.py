"""How a command ends: the table of exit codes, and a failure as one sentence on stderr."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from enum import IntEnum
from typing import Any, NoReturn

import typer

from quintet.contract import Fault
from quintet.errors import CallError, ConfigurationError, QuintetError, TransportError


class Exit(IntEnum):
    """The exit codes of every command; a signal that ends one at once makes it 128 + the signal's number."""

    DONE = 0
    BUG = 1
    CONFIGURATION = 2
    FAULT = 3
    NO_ANSWER = 4
    TRANSPORT = 5
    INTERRUPTED = 130


MEANING = {
    Exit.DONE: "done; a service or a deployment was stopped and has drained",
    Exit.BUG: "an unexpected error, with its traceback",
    Exit.CONFIGURATION: "wrong usage or configuration: option, file, contract, service, address",
    Exit.FAULT: "the service answered with a fault that its contract declares",
    Exit.NO_ANSWER: "no answer: nobody there, time up, refused, or the service failed",
    Exit.TRANSPORT: "a transport or its broker failed: port in use, corrupt file, full disk; not ready in time",
    Exit.INTERRUPTED: "interrupted with Ctrl-C (143 where a second SIGTERM ended it)",
}

# \b keeps click from re-wrapping the table
EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code.value:>3}  {meaning}" for code, meaning in MEANING.items())


def code_of(error: Exception) -> Exit:
    """The exit code that a failure ends a command with."""
    match error:
        case Fault():
            return Exit.FAULT
        case CallError():
            return Exit.NO_ANSWER
        case TransportError():
            return Exit.TRANSPORT
        case ConfigurationError():
            return Exit.CONFIGURATION
        case _:
            return Exit.BUG


def sentence(error: QuintetError) -> str:
    """A failure as one line: what it is, and what it says."""
    if isinstance(error, ConfigurationError | TransportError):
        return str(error)
    correlation = getattr(error, "correlation_id", "")
    return f"{type(error).__name__}: {error}" + (f" (its log has it under {correlation})" if correlation else "")


def fail(error: QuintetError) -> NoReturn:
    """Ends the command: the sentence on stderr, and the failure's exit code."""
    sys.stdout.flush()
    print(f"quintet: {sentence(error)}", file=sys.stderr)
    sys.exit(code_of(error))


USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]  # typer exports no name for it


def misused(error: Any) -> NoReturn:
    """Ends the command that was not used as its --help says: one sentence on stderr."""
    command = error.ctx.command_path if error.ctx else "quintet"
    print(f"quintet: {error.format_message().rstrip('.')}; see `{command} --help`", file=sys.stderr)
    sys.exit(Exit.CONFIGURATION)


def run(command: Coroutine[Any, Any, None]) -> None:
    """Runs a command's coroutine on the fastest loop there is; Ctrl-C ends it quietly."""
    try:
        with asyncio.Runner(loop_factory=_fastest_loop()) as runner:
            runner.run(command)
    except KeyboardInterrupt:
        raise typer.Exit(Exit.INTERRUPTED) from None


def _fastest_loop() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return asyncio.new_event_loop
    return uvloop.new_event_loop
