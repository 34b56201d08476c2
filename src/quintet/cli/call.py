"""`quintet call`: says one operation of a contract, in each of the five styles."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import msgspec
import typer
from msgspec import Struct, structs

from quintet.cli.exits import code_of, run, sentence
from quintet.cli.loading import load_operation, only
from quintet.cli.numbers import seconds
from quintet.client import connect
from quintet.contract import Fault, Operation, Style
from quintet.errors import CallError, ConfigurationError, InvalidMessage
from quintet.format import format_named
from quintet.policy import Policy
from quintet.server import Service, serve

EXAMPLES = """\b
Examples:
  quintet call rides.contracts:Passengers.get --to http://127.0.0.1:8001 '{"passenger_id": "p-1"}'
  quintet call rides.contracts:Trips.request_pickup --to sqlite:///rides.db @pickup.json
  quintet call rides.contracts:Billing.receipt --to sqlite:///rides.db --no-wait '{"trip_id": "t-1"}'
  quintet call rides.contracts:Billing.receipt --to sqlite:///rides.db --pending 5f1c-0
  quintet call rides.contracts:Dispatch.offers --to sqlite:///rides.db --within 2 --enough 3 '{"trip_id": "t-1"}'
"""

PATIENCE = 10.0  # seconds: a person waits longer than a program, which has 1 s by default
AnyOperation = Operation[Any, Any, Any]


class Asked(Struct, frozen=True):
    """What the command line asked for, beside operation and values."""

    to: list[str]
    timeout: float | None
    wait: bool
    pending: str
    within: float
    enough: int | None
    key: str
    format_name: str
    json: bool


def call(
    target: Annotated[
        str, typer.Argument(metavar="MODULE:CONTRACT.OPERATION", help="As rides.contracts:Trips.create.")
    ],
    values: Annotated[
        str, typer.Argument(metavar="JSON", help="Its parameters as an object; @FILE reads a file, - reads stdin.")
    ] = "{}",
    to: Annotated[
        list[str], typer.Option("--to", metavar="ADDRESS", help="Where its service is; may be repeated.")
    ] = [],  # noqa: B006 - typer copies it
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            callback=seconds,
            help="Seconds to wait for the reply or acceptance, 10 if not given; for an answer, as long as it takes.",
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Async request: wait for the answer, or not.")] = True,
    pending: Annotated[
        str, typer.Option("--pending", metavar="ID", help="Async request: an earlier one's answer.")
    ] = "",
    within: Annotated[
        float, typer.Option("--within", callback=seconds, help="Survey: seconds during which answers are taken.")
    ] = 2.0,
    enough: Annotated[
        int | None, typer.Option("--enough", min=1, help="Survey: the number of answers that ends it.")
    ] = None,
    key: Annotated[str, typer.Option("--key", help="Messages of one key are handled in order.")] = "",
    format: Annotated[str, typer.Option("--format", metavar="NAME", help="What messages are written in.")] = "json",  # noqa: A002
    json: Annotated[bool, typer.Option("--json", help="One line of JSON per result or failure, for programs.")] = False,
) -> None:
    """Calls one operation and prints what comes back.

    A request prints its reply, an async request its id and then its answer, a survey its answers as they come.
    Events are published, and surveys asked, as the contract's own service would.
    """
    operation = load_operation(target)
    if not to:
        raise ConfigurationError(f"say where the service of {operation!r} is: --to ADDRESS")
    asked = Asked(to, timeout, wait, pending, within, enough, key, format, json)
    _check_options(operation, asked)
    arguments = {} if pending else _arguments(operation, values)
    say = _SAY[operation.style]
    try:
        run(say(operation, arguments, asked))
    except (Fault, CallError) as error:
        if not json:
            raise
        _print_failure(error)
        raise typer.Exit(code_of(error)) from None


def _check_options(operation: AnyOperation, asked: Asked) -> None:
    if (asked.pending or not asked.wait) and operation.style is not Style.ASYNC_REQUEST:
        raise ConfigurationError(
            f"{operation!r} is a {operation.style.value}: --pending and --no-wait are for async requests"
        )
    if asked.enough is not None and operation.style is not Style.SURVEY:
        raise ConfigurationError(f"{operation!r} is a {operation.style.value}: --enough is for surveys")


def _arguments(operation: AnyOperation, text: str) -> dict[str, Any]:
    """The parameters, read as the contract says. Raises ConfigurationError that names the field."""
    try:
        if text == "-":
            body = sys.stdin.buffer.read()
        elif text.startswith("@"):
            with open(text[1:], "rb") as file:  # noqa: PTH123 - reads as the argument says
                body = file.read()
        else:
            body = text.encode()
        record = format_named("json").codec(operation.record).decode(body)
    except OSError as error:
        raise ConfigurationError(f"cannot read {text[1:]}: {error.strerror}") from None
    except InvalidMessage as error:
        wanted = ", ".join(operation.record.__struct_fields__) or "nothing: {}"
        raise ConfigurationError(f"the values do not fit {operation!r}: {error} (it takes {wanted})") from None
    return structs.asdict(record)


async def _request(operation: AnyOperation, arguments: dict[str, Any], asked: Asked) -> None:
    async with _client(operation, asked) as client:
        reply = await getattr(client, operation.name).using(key=asked.key)(**arguments)
    _print_value(operation, reply, asked)


async def _notification(operation: AnyOperation, arguments: dict[str, Any], asked: Asked) -> None:
    async with _client(operation, asked) as client:
        await getattr(client, operation.name).using(key=asked.key)(**arguments)
    _accepted(asked)


async def _async_request(operation: AnyOperation, arguments: dict[str, Any], asked: Asked) -> None:
    async with _client(operation, asked) as client:
        line = getattr(client, operation.name)
        if asked.pending:
            pending = line.pending(asked.pending)
        else:
            pending = await line.using(key=asked.key)(**arguments)
            print(_line({"id": pending.id}) if asked.json else f"accepted: {pending.id}", flush=True)
        if asked.wait:
            _print_value(operation, await pending.wait(asked.timeout), asked)


async def _event(operation: AnyOperation, arguments: dict[str, Any], asked: Asked) -> None:
    async with _outlet(operation, asked) as service:
        await service.publish(operation, **arguments)
    _accepted(asked)


async def _survey(operation: AnyOperation, arguments: dict[str, Any], asked: Asked) -> None:
    encode, count = _encoder(operation), 0
    async with _outlet(operation, asked) as service:
        async with service.ask(operation, **arguments).within(asked.within, enough=asked.enough) as answers:
            async for answer in answers:
                count += 1
                value = msgspec.Raw(encode(answer.value))
                if asked.json:
                    print(_line({"answer": value, "sender": answer.sender}), flush=True)
                else:
                    print(f"{answer.sender}: {bytes(value).decode()}", flush=True)
    if not asked.json:
        print(f"{count} answer{'' if count == 1 else 's'}", file=sys.stderr)


_SAY = {
    Style.REQUEST: _request,
    Style.NOTIFICATION: _notification,
    Style.ASYNC_REQUEST: _async_request,
    Style.EVENT: _event,
    Style.SURVEY: _survey,
}


def _client(operation: AnyOperation, asked: Asked) -> connect[Any]:
    policy = Policy(timeout=PATIENCE if asked.timeout is None else asked.timeout)
    return connect(
        only(operation.contract, [operation.name]),
        asked.to,
        policy=policy,
        name="quintet-call",
        format=asked.format_name,
    )


@asynccontextmanager
async def _outlet(operation: AnyOperation, asked: Asked) -> AsyncGenerator[Service, None]:
    """The contract's own service without its handlers: what publishes and asks."""
    service = Service(only(operation.contract, [operation.name]))
    async with serve(service, at=asked.to, format=asked.format_name):
        yield service


def _encoder(operation: AnyOperation) -> Any:
    return format_named("json").codec(operation.result).encode


def _print_value(operation: AnyOperation, value: Any, asked: Asked) -> None:
    encoded = _encoder(operation)(value)
    indented = sys.stdout.isatty() and not asked.json
    print((msgspec.json.format(encoded, indent=2) if indented else encoded).decode())


def _accepted(asked: Asked) -> None:
    print(_line({"accepted": True}) if asked.json else "accepted")


def _print_failure(error: Fault | CallError) -> None:
    if isinstance(error, Fault):
        print(_line({"fault": type(error).__name__, "fields": error.to_record()}))
    else:
        print(_line({"error": error.code, "message": sentence(error), "safety": error.safety.value}))


def _line(value: Any) -> str:
    return msgspec.json.encode(value).decode()
