"""The command line: one file per command or group of commands."""

from __future__ import annotations

import typer

from quintet.cli import call, exits, serve, up
from quintet.errors import QuintetError

app = typer.Typer(
    name="quintet",
    help="Services that talk in five styles from one contract: run them, call them, look into their channels.",
    epilog=exits.EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for command, module in ((serve.serve, serve), (up.up, up), (call.call, call)):
    app.command(epilog=module.EXAMPLES)(command)


def main() -> None:
    """Runs the command that was asked for; a failure becomes one sentence and an exit code (exits.py)."""
    try:
        app()
    except QuintetError as error:
        exits.fail(error)
