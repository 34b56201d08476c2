"""`quintet policy`: shows and changes the policies in a quintet.toml; services that run take them in by themselves."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from msgspec import json as msgspec_json
from msgspec import structs, to_builtins

from quintet.deployment import FILE, Deployment, parse_deployment, read_deployment
from quintet.errors import ConfigurationError
from quintet.policy import Policy

EXAMPLES = """\b
Examples:
  quintet policy show
  quintet policy set trips.passengers timeout=0.5 'bulkhead={limit = 20}'
  quintet policy set trips.passengers.get retry=false --file demo/quintet.toml
"""

Target = tuple[str, str, str]
"""The service that calls, the contract that it calls, and the operation, empty for all."""

policy = typer.Typer(
    help=f"Shows and changes how the services of a deployment guard their calls.\n\n{EXAMPLES}", no_args_is_help=True
)

File = Annotated[str, typer.Option("--file", metavar="FILE", help="The deployment.")]


@policy.command()
def show(
    file: File = FILE, json: Annotated[bool, typer.Option("--json", help="Writes lines of JSON, for programs.")] = False
) -> None:
    """Prints what the file says, a line for each contract or operation; the rest is as the code says, or as default."""
    for (service, contract, operation), found in _all(read_deployment(file)).items():
        settings = _settings(found)
        if json:
            line = {"service": service, "contract": contract, "operation": operation, "policy": settings}
            print(msgspec_json.encode(line).decode())
        else:
            said = "  ".join(f"{name}={_toml(value)}" for name, value in settings.items())
            print(f"{'.'.join(filter(None, (service, contract, operation)))}  {said}")


@policy.command(name="set")
def set_(
    target: Annotated[str, typer.Argument(metavar="SERVICE.CONTRACT[.OPERATION]", help="Who calls, and what.")],
    settings: Annotated[list[str], typer.Argument(metavar="NAME=VALUE", help="As the file has them: timeout=0.5")],
    file: File = FILE,
) -> None:
    """Writes settings into the file. What is wrong is refused, and the file stays as it was."""
    service, contract, operation = _target(target)
    given = _given(settings)
    path = Path(file)
    before = read_deployment(path)
    if service not in before.services:
        raise ConfigurationError(f"{file}: there is no [service.{service}]; there is {', '.join(before.services)}")
    text = path.read_text()
    changed = _changed(text, _header(service, contract, operation), given)
    try:
        tomllib.loads(changed)
    except tomllib.TOMLDecodeError:
        raise ConfigurationError(_BY_HAND.format(file, target)) from None
    after = parse_deployment(changed, path)
    wanted = _settings(_all(before).get((service, contract, operation), Policy())) | given
    if _settings(_all(after).get((service, contract, operation), Policy())) != _settings(_read(wanted)):
        raise ConfigurationError(_BY_HAND.format(file, target))
    written = path.with_name(f".{path.name}.{os.getpid()}")
    written.write_text(changed)
    written.replace(path)  # at once: who watches the file never sees half of it
    print(f"{target}: {', '.join(settings)} in {file}; services that run take it in by themselves")


_BY_HAND = "{}: {} is written there in a way that cannot be changed by this command: edit it by hand"


def _target(text: str) -> Target:
    parts = text.split(".")
    if len(parts) not in (2, 3) or not all(parts):
        raise ConfigurationError(f"{text!r}: write SERVICE.CONTRACT or SERVICE.CONTRACT.OPERATION, as trips.passengers")
    return parts[0], parts[1], parts[2] if len(parts) == 3 else ""


def _given(settings: list[str]) -> dict[str, Any]:
    try:
        found = tomllib.loads("\n".join(settings))
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(
            f"{' '.join(settings)}: write NAME=VALUE as in TOML, as timeout=0.5: {error}"
        ) from None
    if unknown := [name for name in found if name not in Policy.__struct_fields__]:
        known = ", ".join(Policy.__struct_fields__)
        raise ConfigurationError(f"{unknown[0]!r} is no part of a policy; known are {known}")
    return found


def _header(service: str, contract: str, operation: str) -> str:
    name = f'"{contract}.{operation}"' if operation in Policy.__struct_fields__ else f"{contract}.{operation}"
    return f"[service.{service}.policy.{name if operation else contract}]"


def _changed(text: str, header: str, given: Mapping[str, Any]) -> str:
    """The text with these settings in the table of that header, its comments and all else as they were."""
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.partition("#")[0].strip() == header), None)
    if start is None:
        lines += ["", header]
        start = len(lines) - 1
    end = next(
        (number for number in range(start + 1, len(lines)) if lines[number].lstrip().startswith("[")), len(lines)
    )
    for name, value in given.items():
        line = f"{name} = {_toml(value)}"
        same = [n for n in range(start + 1, end) if re.match(rf"\s*{name}\s*=", lines[n])]
        if same:
            lines[same[0]] = line
        else:
            lines.insert(start + 1, line)
            end += 1
    return "\n".join(lines) + "\n"


def _all(deployment: Deployment) -> dict[Target, Policy]:
    found: dict[Target, Policy] = {}
    for service, deployed in deployment.services.items():
        for contract, guarding in deployed.policy.items():
            found |= {(service, contract, ""): guarding.policy} if _settings(guarding.policy) else {}
            found |= {(service, contract, name): one for name, one in guarding.operations.items()}
    return found


def _settings(found: Policy) -> dict[str, Any]:
    return {name: to_builtins(value) for name, value in structs.asdict(found).items() if value is not None}


def _read(settings: dict[str, Any]) -> Policy:
    text = "".join(f"{name} = {_toml(value)}\n" for name, value in settings.items())
    read = parse_deployment(f'[service.a]\napp = "a:b"\n[service.a.policy.b]\n{text}', Path(FILE))
    return read.services["a"].policy["b"].policy


def _toml(value: Any) -> str:
    """A setting as TOML writes it, on one line."""
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{name} = {_toml(one)}' for name, one in value.items() if one is not None)} }}"
    return msgspec_json.encode(value).decode()
