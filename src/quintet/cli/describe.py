"""`quintet describe`: what a contract says, and what can carry it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
import typer

from quintet.cli.loading import load_contract
from quintet.contract import NEEDS, Contract, Operation
from quintet.errors import ContractError
from quintet.model import ContractModel, Enum, Field, OperationModel, Presence, Record, Union
from quintet.transport import carrier, parse_address, schemes

EXAMPLES = """\b
Examples:
  quintet describe rides.contracts:Passengers
  quintet describe rides.contracts:Passengers --json > passengers.json     (the neutral model, for programs)
"""


def describe(
    target: Annotated[str, typer.Argument(metavar="MODULE:CONTRACT", help="As rides.contracts:Passengers.")],
    json: Annotated[bool, typer.Option("--json", help="The contract's neutral model, as JSON.")] = False,
) -> None:
    """Prints a contract's operations, styles and types, its HTTP routes, and which transports can carry what."""
    contract = load_contract(target)
    from rich.console import Console  # these not at the top: `quintet --help` must be there at once
    from rich.markup import escape

    from quintet.compiler import model_of

    model = model_of(contract)
    if json:
        print(msgspec.json.format(msgspec.json.encode(model), indent=2).decode())
        return

    console = Console(highlight=False, soft_wrap=True)
    for style, line in _lines(contract, model):
        console.print(f"[{style}]{escape(line)}[/]" if style else escape(line))


def _lines(contract: type[Contract], model: ContractModel) -> Iterator[tuple[str, str]]:
    """Each line with the style that it is printed in."""
    yield "bold", f"{model.name} {model.version}{f'  {_first(model.doc)}' if model.doc else ''}"
    for name, operation in model.operations.items():
        yield "", ""
        yield "cyan", f"  {_signature(operation)}"
        yield "", f"      {operation.style.value}{f': {_first(operation.doc)}' if operation.doc else ''}"
        if operation.deprecated:
            yield "yellow", f"      deprecated: {operation.deprecated}"
        for fault in operation.faults:
            record = model.types[fault]
            assert isinstance(record, Record), "a fault is a record"  # noqa: S101
            yield "", f"      fault {fault}({_fields(record)})"
        original = contract.__quintet__.operations[name]
        for scheme in schemes():
            can, how = _carried(scheme, original)
            yield "green" if can else "dim", f"      {scheme}: {how}"
    faults = {fault for operation in model.operations.values() for fault in operation.faults}
    types = {name: kind for name, kind in model.types.items() if name not in faults}
    if types:
        yield "", ""
        yield "bold", "types"
    for name, kind in types.items():
        match kind:
            case Record():
                yield "", f"  {name}({_fields(kind)})"
            case Enum():
                yield "", f"  {name}: one of {', '.join(repr(value.value) for value in kind.values)}"
            case Union():
                yield "", f"  {name}: {' or '.join(str(member.type) for member in kind.members)}"


def _carried(scheme: str, operation: Operation[Any, Any, Any]) -> tuple[bool, str]:
    """Whether a transport can carry an operation, and as what or why not."""
    from quintet.binding import bind

    found = carrier(parse_address(f"{scheme}://x/x"))
    if missing := NEEDS[operation.style] - found.traits:
        return False, "cannot, " + " and ".join(f"lacks {trait.name} ({trait.value})" for trait in missing)
    try:
        channel = bind(found.binding, operation).channel
    except ContractError as error:
        return False, f"cannot, {error}"
    return True, channel.route or channel.name


def _signature(operation: OperationModel) -> str:
    result = str(operation.result)
    return f"{operation.name}({_fields(operation.parameters)})" + (f" -> {result}" if result != "none" else "")


def _fields(record: Record) -> str:
    return ", ".join(_field(field) for field in record.fields)


def _field(field: Field) -> str:
    text = f"{field.name}: {field.type}"
    if field.presence is Presence.REQUIRED:
        return text
    if field.presence is Presence.OPTIONAL or field.default is msgspec.UNSET:
        return f"{text} (optional)"
    return f"{text} = {msgspec.json.encode(field.default).decode()}"


def _first(doc: str) -> str:
    return doc.strip().partition("\n")[0]
