"""Where services run and how they are reached: `quintet.toml`, read and checked."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, ValidationError, convert, structs

from quintet.contract import Contract
from quintet.errors import AddressError, ConfigurationError
from quintet.format import format_named
from quintet.policy import On, Policy, on
from quintet.resolver import resolver_of
from quintet.transport import open_address, parse_address

FILE = "quintet.toml"


class Guarding(Struct, frozen=True):
    """What a file says of the calls to one contract: `[service.NAME.policy.CONTRACT]`, and of single operations."""

    policy: Policy = Policy()
    operations: Mapping[str, Policy] = {}

    def policies(self, contract: type[Contract]) -> list[Policy | On]:
        """As `connect(..., policy=...)` takes them. Raises ConfigurationError for an operation that there is not."""
        known = contract.__quintet__.operations
        for name in self.operations:
            if name not in known:
                raise ConfigurationError(f"{contract.__name__} has no operation {name!r}; it has {', '.join(known)}")
        return [self.policy, *(on(known[name], **structs.asdict(policy)) for name, policy in self.operations.items())]


class Deployed(Struct, frozen=True, kw_only=True):
    """One service of a deployment: a table `[service.NAME]`.

    `app`: "module:service". `at`: where it is served. `connect`: where the contracts are that it uses or hears, by
    their names. `record`: the file that its deliveries are written to. `observe`: an HTTP address that shows the
    metrics of a service that has none in `at`. `env`: its environment, beside the inherited one. `instances`: how many
    processes. `policy`: of the calls to each contract that it uses, over what its code says.
    """

    app: str
    at: tuple[str, ...] = ()
    connect: Mapping[str, tuple[str, ...]] = {}
    format: str = "json"
    record: str = ""
    observe: str = ""
    env: Mapping[str, str] = {}
    instances: int = 1
    policy: Mapping[str, Guarding] = {}


class Deployment(Struct, frozen=True):
    """Services in the order in which they are started. Relative paths and modules are looked up in `folder`."""

    services: dict[str, Deployed]
    folder: Path = Path()
    file: Path | None = None


def read_deployment(path: str | Path = FILE, environment: Mapping[str, str] = os.environ) -> Deployment:
    """Reads a deployment file; ${NAME} and ${NAME:-default} in its strings come from the environment, $$ is a $.

    Raises ConfigurationError: one sentence that names file, table and key.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ConfigurationError(f"there is no {path}: name the deployment's file, or write one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from None
    return parse_deployment(text, path, environment)


def parse_deployment(text: str, path: Path, environment: Mapping[str, str] = os.environ) -> Deployment:
    """The same of a file's text. Raises ConfigurationError."""
    try:
        read = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is no TOML: {error}") from None
    tables = read.pop("service", {})
    if read:
        raise ConfigurationError(f"{path}: unknown key {next(iter(read))!r}; services stand in [service.NAME] tables")
    if not isinstance(tables, dict) or not tables or not all(isinstance(table, dict) for table in tables.values()):
        raise ConfigurationError(
            f"{path}: no service; each stands in a table [service.NAME] with app = 'module:service'"
        )
    services = {name: _Table(f"{path}: [service.{name}]", table, environment).read() for name, table in tables.items()}
    return Deployment(services, path.resolve().parent, path.resolve())


class _Table:
    """One table of the file. Every complaint begins with its place."""

    def __init__(self, place: str, table: dict[str, Any], environment: Mapping[str, str]) -> None:
        self._place, self._table, self._environment = place, table, environment

    def read(self) -> Deployed:
        known = Deployed.__struct_fields__
        for key in self._table:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                meant = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
                raise ConfigurationError(f"{self._place}: unknown key {key!r}; {meant}")
        if "app" not in self._table:
            raise ConfigurationError(f"{self._place}: app is missing; write app = 'module:service'")
        found = Deployed(
            app=self._app(),
            at=self._addresses("at", self._table.get("at", ())),
            connect={
                name: self._addresses(f"connect.{name}", value) for name, value in self._subtable("connect").items()
            },
            format=self._format(),
            record=self._string("record", self._table.get("record", "")),
            observe=self._observe(),
            env={name: self._string(f"env.{name}", value) for name, value in self._subtable("env").items()},
            instances=self._instances(),
            policy=self._policies(),
        )
        self._check_shared(found)
        return found

    def _string(self, key: str, value: Any) -> str:
        if not isinstance(value, str):
            raise ConfigurationError(f"{self._place}: {key} = {value!r} must be a string")
        return _REFERENCE.sub(lambda match: self._value_of(key, match), value)

    def _value_of(self, key: str, match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if name is None:
            return "$"
        found = self._environment.get(name) or default
        if found is None:
            raise ConfigurationError(
                f"{self._place}: {key} wants the environment variable {name}, which is not set;"
                f" set it or write ${{{name}:-default}}"
            )
        return found

    def _app(self) -> str:
        app = self._string("app", self._table["app"])
        module, colon, name = app.partition(":")
        if not (module and colon and name):
            raise ConfigurationError(
                f"{self._place}: app = {app!r} must read 'module:service', as 'rides.trips:service'"
            )
        return app

    def _addresses(self, key: str, value: Any) -> tuple[str, ...]:
        if not isinstance(value, str | list | tuple):
            raise ConfigurationError(f"{self._place}: {key} = {value!r} must be an address or a list of addresses")
        found = tuple(self._string(key, text) for text in ([value] if isinstance(value, str) else value))
        for text in found:
            try:
                if not resolver_of(text):
                    open_address(text)  # only taken apart and checked, not opened
                elif key == "at":
                    raise AddressError(f"{text} says where to look for a service to call: nothing is served there")  # noqa: TRY301
            except AddressError as error:
                raise ConfigurationError(f"{self._place}: {key}: {error}") from None
        return found

    def _subtable(self, key: str) -> dict[str, Any]:
        value = self._table.get(key, {})
        if not isinstance(value, dict):
            raise ConfigurationError(f"{self._place}: {key} = {value!r} must be a table, as {{ name = '...' }}")
        return value

    def _format(self) -> str:
        name = self._string("format", self._table.get("format", "json"))
        try:
            format_named(name)
        except ConfigurationError as error:
            raise ConfigurationError(f"{self._place}: format: {error}") from None
        return name

    def _observe(self) -> str:
        text = self._string("observe", self._table.get("observe", ""))
        return self._addresses("observe", text)[0] if text else ""

    def _instances(self) -> int:
        value = self._table.get("instances", 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigurationError(f"{self._place}: instances = {value!r} must be a whole number, 1 or more")
        return value

    def _policies(self) -> dict[str, Guarding]:
        tables: dict[str, Any] = {}
        for name, value in self._subtable("policy").items():
            contract, _, operation = name.partition(".")
            if operation:  # "recommendations.rate", quoted, for an operation that is named as a part of a policy is
                tables.setdefault(contract, {})[f".{operation}"] = value
            else:
                tables[name] = value | tables.get(name, {}) if isinstance(value, dict) else value
        return {name: self._guarding(f"policy.{name}", value) for name, value in tables.items()}

    def _guarding(self, key: str, value: Any) -> Guarding:
        if not isinstance(value, dict):
            raise ConfigurationError(f"{self._place}: {key} = {value!r} must be a table, as {{ timeout = 0.3 }}")
        settings = {name: one for name, one in value.items() if name in Policy.__struct_fields__}
        operations = {name.removeprefix("."): one for name, one in value.items() if name not in settings}
        for name, one in operations.items():
            if not isinstance(one, dict):
                known = ", ".join(Policy.__struct_fields__)
                raise ConfigurationError(
                    f"{self._place}: {key}: unknown key {name!r}; known are {known}, and operations"
                )
        return Guarding(
            self._policy(key, settings),
            {name: self._policy(f"{key}.{name}", one) for name, one in operations.items()},
        )

    def _policy(self, key: str, settings: dict[str, Any]) -> Policy:
        try:
            return convert(settings, Policy)
        except (ValidationError, ConfigurationError) as error:
            raise ConfigurationError(f"{self._place}: {key}: {error}") from None

    def _check_shared(self, found: Deployed) -> None:
        for text in filter(None, (*found.at, found.observe)) if found.instances > 1 else ():
            if parse_address(text).port:
                raise ConfigurationError(
                    f"{self._place}: {found.instances} instances cannot all listen at {text};"
                    " take port 0 or a queue, or one service table each"
                )


_REFERENCE = re.compile(r"\$\$|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")
