"""What a format is: it turns values of a type into bytes and back, compiled per type at start-up."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import msgspec
from msgspec import Struct

from quintet.errors import ConfigurationError, ContractError, InvalidMessage, UnsupportedMediaType
from quintet.hash_flooding import HARMLESS, Decoders, search_of

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


def by_media_type(operation: str, media_type: str) -> str:
    """The name of the format that reads a media type. Raises UnsupportedMediaType with the ones there are."""
    found = _media_types().get(media_type)
    if found is None:
        raise UnsupportedMediaType(
            f"{operation}: cannot read {media_type or 'a body of no media type'!r}; send {' or '.join(_media_types())}"
        )
    return found


@cache
def _media_types() -> dict[str, str]:
    return {format_.media_type: name for name, format_ in installed().items()}


def decodable(type_: T) -> T:
    """The type itself. Raises ContractError where it holds an exception: msgspec 0.22 crashes the interpreter when it
    decodes into a dataclass that is one."""
    waiting: list[Any] = [msgspec.inspect.type_info(type_)]
    seen: set[int] = set()
    while waiting:
        found = waiting.pop()
        if isinstance(found, tuple):
            waiting += found
        elif isinstance(found, msgspec.inspect.Type | msgspec.inspect.Field) and id(found) not in seen:
            seen.add(id(found))
            kind = getattr(found, "cls", None)
            if isinstance(kind, type) and issubclass(kind, BaseException):
                raise ContractError(f"{kind.__name__} is an exception, it cannot be carried; write a Struct instead")
            waiting += (getattr(found, name) for name in found.__struct_fields__)
    return type_


_PLACE = re.compile(r" - at `(?:key` in `)?\$(?P<path>[^`]*)`$")
_MISSING = re.compile(r"missing required field `(?P<field>[^`]+)`")


def strict(type_: Any, decoders: Decoders) -> Callable[[bytes], Any]:
    """A decoder of the type whose complaints are InvalidMessage, naming the path of the field, as "pickup.lat".

    `decoders`: msgspec's own decoder of a type, in the format. Raises ContractError where none can be made.
    """
    decode = decoders(decodable(type_))
    search = search_of(type_, decoders)

    def decode_or_name_the_field(body: bytes) -> Any:
        try:
            if search is not None and len(body) > HARMLESS:
                search(body)
            return decode(body)
        except RecursionError:
            raise InvalidMessage("the body is nested too deep") from None
        except (msgspec.MsgspecError, ValueError, TypeError) as error:
            raise _invalid(str(error)) from None

    return decode_or_name_the_field


def _invalid(complaint: str) -> InvalidMessage:
    place = _PLACE.search(complaint)
    path = place["path"].lstrip(".") if place else ""
    said = complaint[: place.start()] if place else complaint
    missing = _MISSING.search(said)
    if missing:
        path = f"{path}.{missing['field']}" if path else missing["field"]
        said = "missing required field"
    return InvalidMessage(f"{path}: {said}" if path else said, path=path)
