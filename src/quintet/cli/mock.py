"""`quintet mock`: serves a contract that nobody has implemented yet."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from quintet.cli.exits import run
from quintet.cli.loading import load_contract, only
from quintet.cli.serve import At, Format, Json, LogLevel, configure_logging, until_stopped
from quintet.contract import NEEDS, Contract
from quintet.errors import ConfigurationError
from quintet.transport import carrier, parse_address

log = logging.getLogger("quintet.mock")

EXAMPLES = """\b
Examples:
  quintet mock rides.contracts:Passengers --at http://127.0.0.1:8001
  quintet mock rides.contracts:Passengers --at http://127.0.0.1:8001 --answers answers.toml

Answers, by operation, the first that fits; what has none is made up:
  [[get]]
  when = { passenger_id = "p-9" }
  fault = { NoSuchPassenger = { passenger_id = "p-9" } }
  [[get]]
  answer = { id = "p-1", name = "Ada" }
  delay = 0.2
"""


def mock(
    target: Annotated[str, typer.Argument(metavar="MODULE:CONTRACT", help="As rides.contracts:Passengers.")],
    at: At,
    answers: Annotated[str, typer.Option("--answers", metavar="FILE", help="Given answers, TOML or JSON.")] = "",
    seed: Annotated[int, typer.Option("--seed", help="Another number makes other answers up.")] = 0,
    format: Format = "json",  # noqa: A002 - the word users know
    log_level: LogLevel = "info",
    json: Json = False,
) -> None:
    """Serves a contract without its service, with given or made-up answers, surveys of its own included.

    The same call gets the same answer. Its events are published with `quintet call`.
    """
    from quintet.mock import mock as mocked
    from quintet.mock import read_answers

    configure_logging(log_level, json)
    contract = _carried(load_contract(target), at)
    service = mocked(contract, read_answers(answers) if answers else {}, seed=seed)
    run(until_stopped(service, at, {}, format, json=json))


def _carried(contract: type[Contract], at: list[str]) -> type[Contract]:
    """The contract with what the addresses can carry: an API over HTTP alone is tried without its events."""
    traits = [carrier(parse_address(address)).traits for address in at]
    operations = contract.__quintet__.operations
    able = [name for name, operation in operations.items() if any(NEEDS[operation.style] <= has for has in traits)]
    for name in operations.keys() - set(able):
        log.warning("%s is left out: a %s needs another address", name, operations[name].style.value)
    if not able:
        given = ", ".join(str(parse_address(address)) for address in at)
        raise ConfigurationError(f"no address given can carry an operation of {contract.__name__}: {given}")
    return only(contract, able)
