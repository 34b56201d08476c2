"""Refuses bodies whose set members or map keys were chosen to have one hash: each would be compared with all others.

Python's hash of a text is keyed by chance, that of a number is not: numbers that differ by a multiple of 2**61 - 1 have
the same one, and UUIDs, decimals and tuples are hashed as numbers are. So such sets and maps are read as lists before
they are built, in bodies that are large enough to hurt. Where only some bits of the hashes agree, Python's probing ends
after a few steps.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias, Union

import msgspec
from msgspec import Raw, inspect

from quintet.errors import InvalidMessage

HARMLESS: Final = 4096
"""Bytes of a body in which no choice of keys costs more than a few milliseconds."""
ALIKE: Final = 16
"""Different keys of one collection that may have the same hash."""

Search: TypeAlias = Callable[[bytes | Raw], None]
"""Looks through an encoded value. Raises InvalidMessage; passes over what does not fit its type."""
Decoders: TypeAlias = Callable[[Any], Callable[[bytes | Raw], Any]]
"""The decoder of a type, as `lambda type_: msgspec.json.Decoder(type_).decode`."""

_KEYED_BY_CHANCE = (
    inspect.StrType, inspect.BytesType, inspect.BoolType, inspect.NoneType, inspect.EnumType, inspect.LiteralType,
    inspect.DateType, inspect.TimeType, inspect.DateTimeType,
)  # fmt: skip
_TYPES: Final[dict[type[inspect.Type], Any]] = {
    inspect.IntType: int,
    inspect.FloatType: float,
    inspect.DecimalType: decimal.Decimal,
    inspect.UUIDType: uuid.UUID,
    inspect.TimeDeltaType: datetime.timedelta,
    inspect.DateType: datetime.date,
    inspect.TimeType: datetime.time,
    inspect.DateTimeType: datetime.datetime,
    inspect.StrType: str,
    inspect.BytesType: bytes,
    inspect.BoolType: bool,
    inspect.NoneType: None,
}


def search_of(type_: Any, decoders: Decoders) -> Search | None:
    """What looks through a body of this type; None where it holds no collection that can be flooded."""
    kind = inspect.type_info(type_)
    return _Searches(decoders).of(kind) if _floodable(kind, set()) else None


class _Searches:
    """Compiles the search of each type that is reached, once."""

    def __init__(self, decoders: Decoders) -> None:
        self._decoders = decoders
        self._made: dict[int, list[Search]] = {}

    def of(self, kind: Any) -> Search:
        kind = _bare(kind)
        made = self._made.get(id(kind))
        if made is None:
            made = self._made[id(kind)] = []  # a type that holds itself meets this one
            made.append(_lenient(self._compile(kind)))
        return lambda data: made[0](data)

    def _compile(self, kind: Any) -> Search:
        if isinstance(kind, inspect.UnionType):
            return _all([self.of(one) for one in kind.types if _floodable(one, set())])
        if isinstance(kind, inspect.SetType | inspect.FrozenSetType) and not _safe(kind.item_type):
            members = self._decoders(list[_type(kind.item_type)])  # type: ignore[misc]
            return lambda data: refuse_flood(members(data))
        if isinstance(kind, inspect.DictType):
            return self._map(kind)
        if isinstance(kind, inspect.TupleType):
            return self._items(dict(enumerate(kind.item_types)))
        if isinstance(kind, inspect.CollectionType):
            items, each = self._decoders(list[Raw]), self.of(kind.item_type)
            return lambda data: _for_each(items(data), each)
        fields = getattr(kind, "fields", ())
        if getattr(kind, "array_like", False) or isinstance(kind, inspect.NamedTupleType):
            first = int(getattr(kind, "tag", None) is not None)
            return self._items({place: field.type for place, field in enumerate(fields, first)})
        return self._record({field.encode_name: field.type for field in fields})

    def _record(self, fields: dict[str, Any]) -> Search:
        within = {name: self.of(kind) for name, kind in fields.items() if _floodable(kind, set())}
        decode = self._decoders(dict[str, Raw])

        def search(data: bytes | Raw) -> None:
            found = decode(data)
            for name, look in within.items():
                if name in found:
                    look(found[name])

        return search

    def _items(self, kinds: dict[int, Any]) -> Search:
        within = {place: self.of(kind) for place, kind in kinds.items() if _floodable(kind, set())}
        decode = self._decoders(list[Raw])

        def search(data: bytes | Raw) -> None:
            found = decode(data)
            for place, look in within.items():
                if place < len(found):
                    look(found[place])

        return search

    def _map(self, kind: inspect.DictType) -> Search:
        decode, decode_binary = self._decoders(dict[str | int | float, Raw]), self._decoders(dict[bytes, Raw])
        keys = None if _safe(kind.key_type) else list[_type(kind.key_type)]  # type: ignore[misc]
        each = self.of(kind.value_type) if _floodable(kind.value_type, set()) else None

        def search(data: bytes | Raw) -> None:
            found: dict[Any, Raw]
            try:
                found = decode(data)
            except msgspec.ValidationError:
                try:
                    found = decode_binary(data)  # UUIDs in MessagePack
                except msgspec.ValidationError as error:
                    if "`key`" in str(error):
                        raise InvalidMessage("the keys of a map must be of one kind") from None
                    raise
            if keys is not None:
                refuse_flood(msgspec.convert(list(found), keys, strict=False))
            if each is not None:
                _for_each(found.values(), each)

        return search


def refuse_flood(keys: Sequence[Any]) -> None:
    """Raises InvalidMessage where more than ALIKE different keys have the same hash."""
    if len(keys) <= ALIKE:
        return
    hashes = sorted(map(hash, keys))
    crowded = {one for one, other in zip(hashes, hashes[ALIKE:], strict=False) if one == other}
    alike: dict[int, list[Any]] = {one: [] for one in crowded}
    for key in keys if crowded else ():
        found = alike.get(hash(key))
        if found is not None and key not in found:
            found.append(key)
            if len(found) > ALIKE:
                raise InvalidMessage(
                    f"more than {ALIKE} keys of a set or map have the same hash, as by chance no keys have: send a list"
                )


def _all(searches: Sequence[Search]) -> Search:
    def search(data: bytes | Raw) -> None:
        for one in searches:
            one(data)

    return search


def _for_each(values: Iterable[Raw], search: Search) -> None:
    for value in values:
        if len(value) > ALIKE:
            search(value)


def _lenient(search: Search) -> Search:
    """Leaves what does not fit to the decoder of the whole, which says where."""

    def search_what_fits(data: bytes | Raw) -> None:
        with contextlib.suppress(msgspec.MsgspecError, ArithmeticError, ValueError, TypeError, RecursionError):
            search(data)

    return search_what_fits


def _floodable(kind: Any, seen: set[int]) -> bool:
    kind = _bare(kind)
    if id(kind) in seen:
        return False
    seen.add(id(kind))
    if isinstance(kind, inspect.SetType | inspect.FrozenSetType):
        return not _safe(kind.item_type)
    if isinstance(kind, inspect.DictType) and not _safe(kind.key_type):
        return True
    return any(_floodable(part, seen) for part in _parts(kind))


def _parts(kind: Any) -> Iterable[Any]:
    if isinstance(kind, inspect.UnionType):
        return kind.types
    if isinstance(kind, inspect.TupleType):
        return kind.item_types
    if isinstance(kind, inspect.DictType):
        return (kind.value_type,)
    if isinstance(kind, inspect.CollectionType):
        return (kind.item_type,)
    return [field.type for field in getattr(kind, "fields", ())]


def _safe(kind: Any) -> bool:
    kind = _bare(kind)
    return all(map(_safe, kind.types)) if isinstance(kind, inspect.UnionType) else isinstance(kind, _KEYED_BY_CHANCE)


def _bare(kind: Any) -> Any:
    return _bare(kind.type) if isinstance(kind, inspect.Metadata) else kind


def _type(kind: Any) -> Any:
    """The Python type that a key is read as."""
    kind = _bare(kind)
    if isinstance(kind, inspect.UnionType):
        return Union[tuple(_type(one) for one in kind.types)]  # noqa: UP007 - made of a list
    if isinstance(kind, inspect.TupleType):
        return tuple[tuple(_type(one) for one in kind.item_types)]  # type: ignore[misc]
    if isinstance(kind, inspect.FrozenSetType):
        return frozenset[_type(kind.item_type)]  # type: ignore[misc]
    if isinstance(kind, inspect.CollectionType):
        return tuple[_type(kind.item_type), ...]  # type: ignore[misc]
    return getattr(kind, "cls", None) or _TYPES.get(type(kind), Any)
