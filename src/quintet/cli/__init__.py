"""The command line: one file per command or group of commands."""

from __future__ import annotations

import sys

import typer

from quintet.cli import bridge, call, channels, dashboard, describe, doctor, exits, mock, new, policy, serve, up
from quintet.errors import QuintetError

app = typer.Typer(
    name="quintet",
    help="Services that talk in five styles from one contract: run them, call them, look into their channels.",
    epilog=exits.EPILOG,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for command, summary, examples in (
    (serve.serve, "Serve one service in this process.", serve.EXAMPLES),
    (up.up, "Run all services of a quintet.toml, each its own process.", up.EXAMPLES),
    (dashboard.dashboard, "Show all services on one page, as they run.", dashboard.EXAMPLES),
    (call.call, "Call an operation, in whichever of the five styles.", call.EXAMPLES),
    (channels.tail, "Watch a channel without taking from it.", channels.TAIL_EXAMPLES),
    (bridge.bridge, "Move channels from one transport to another.", bridge.EXAMPLES),
    (doctor.doctor, "Say whether an address works, and what would not.", doctor.EXAMPLES),
    (describe.describe, "Show a contract: operations, styles, types, carriers.", describe.EXAMPLES),
    (mock.mock, "Serve a contract that nobody has implemented yet.", mock.EXAMPLES),
    (new.new, "Write a project that runs and whose tests pass.", new.EXAMPLES),
):
    app.command(short_help=summary, epilog=f"{examples}\nExit codes: `quintet --help` lists them.")(command)
app.add_typer(policy.policy, name="policy", short_help="Show or change how a deployment's calls are guarded.")
app.add_typer(channels.dead, name="dead", short_help="List, show, replay or drop what could not be handled.")


def main() -> None:
    """Runs the command that was asked for; a failure becomes one sentence and an exit code (exits.py)."""
    arguments = sys.argv[1:] or ["--help"]
    try:
        code = app(arguments, prog_name="quintet", standalone_mode=False)
    except QuintetError as error:
        exits.fail(error)
    except exits.USAGE_ERROR as error:
        exits.misused(error)
    except typer.Abort:  # "no" to a question, or Ctrl-C at it
        code = exits.Exit.INTERRUPTED
    sys.exit(code)
