"""What a format is: it turns values of a type into bytes and back, compiled per type at start-up."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from msgspec import Struct

from quintet.errors import ConfigurationError

T = TypeVar("T")


class Codec(Struct, Generic[T], frozen=True):
    """Both ways for one type. `decode` raises InvalidMessage, naming the path of the field that does not fit."""

    encode: Callable[[T], bytes]
    decode: Callable[[bytes], T]


class Format(Protocol):
    """One per file in `formats/`, as the object `FORMAT`; the file's name is the format's name."""

    media_type: ClassVar[str]

    def codec(self, type_: Any) -> Codec[Any]:
        """Compiles the type. Raises ContractError where the format cannot carry it."""
        ...


@cache
def installed() -> dict[str, Format]:
    """The formats there are, by name, JSON first."""
    import quintet.formats as folder

    names = sorted((module.name for module in pkgutil.iter_modules(folder.__path__)), key=lambda n: (n != "json", n))
    return {name: importlib.import_module(f"quintet.formats.{name}").FORMAT for name in names}


def format_named(name: str) -> Format:
    """Raises ConfigurationError with the names there are."""
    found = installed().get(name)
    if found is None:
        raise ConfigurationError(f"unknown format {name!r}; installed are {', '.join(installed())}")
    return found
