"""What a command line names as MODULE:NAME: services, contracts and their operations, imported from the folder."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from msgspec import structs

from quintet.contract import Contract, Operation, check
from quintet.errors import ConfigurationError, QuintetError
from quintet.server import Service


def load_service(target: str) -> Service:
    """The service behind "rides.trips:service". Raises ConfigurationError, with the names that there are."""
    return _attribute(target, "service", lambda thing: isinstance(thing, Service))  # type: ignore[no-any-return]


def load_contract(target: str) -> type[Contract]:
    """The contract behind "rides.contracts:Trips", checked. Raises ConfigurationError."""
    contract: type[Contract] = _attribute(target, "contract", _is_contract)
    check(contract)
    return contract


def load_operation(target: str) -> Operation[Any, Any, Any]:
    """The operation behind "rides.contracts:Trips.create". Raises ConfigurationError."""
    path, dot, name = target.rpartition(".")
    if not dot or ":" not in path:
        raise ConfigurationError(
            f"{target!r} names no operation: write MODULE:CONTRACT.OPERATION, as rides.contracts:Trips.create"
        )
    contract = load_contract(path)
    operations = contract.__quintet__.operations
    if name not in operations:
        raise ConfigurationError(
            f"{contract.__name__} has no operation {name!r}; it has: {', '.join(operations) or 'none'}"
        )
    return operations[name]


def only(contract: type[Contract], names: Iterable[str]) -> type[Contract]:
    """The contract with some of its operations: the others then need no handler, nor an address that carries them."""
    info = contract.__quintet__

    class Only(Contract, name=info.name, version=info.version, http_level=info.level):
        pass

    Only.__name__ = contract.__name__
    Only.__quintet__ = structs.replace(info, operations={name: info.operations[name] for name in names})
    return Only


def _is_contract(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, Contract) and thing is not Contract


_EXAMPLE = {"service": "rides.trips:service", "contract": "rides.contracts:Trips"}


def _attribute(target: str, wanted: str, fits: Callable[[Any], bool]) -> Any:
    module_name, colon, name = target.partition(":")
    if not colon or not module_name or not name:
        raise ConfigurationError(f"{target!r} names no {wanted}: write MODULE:{wanted.upper()}, as {_EXAMPLE[wanted]}")
    module = _import(module_name)
    found = getattr(module, name, None)
    if not fits(found):
        others = [other for other, value in vars(module).items() if fits(value) and not other.startswith("_")]
        what = f"has no {name!r}" if found is None else f"has a {name!r} which is no {wanted}: {found!r}"
        raise ConfigurationError(f"module {module_name} {what}; the {wanted}s there: {', '.join(others) or 'none'}")
    return found


def _import(name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except QuintetError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigurationError(
                f"there is no module {error.name!r} in {here} or among the installed ones"
            ) from None
        raise _broken(name, error) from None
    except Exception as error:
        raise _broken(name, error) from None


def _broken(name: str, error: Exception) -> ConfigurationError:
    if isinstance(error, SyntaxError):
        return ConfigurationError(f"cannot import {name}: {error.msg} ({error.filename}, line {error.lineno})")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    return ConfigurationError(f"cannot import {name}: {type(error).__name__}: {error}{place}")
