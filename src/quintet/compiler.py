"""Reads a contract's Python types into the neutral model, and refuses what no model can hold."""

from __future__ import annotations

import collections.abc as abc
import dataclasses
import enum
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeVar
from uuid import UUID

import msgspec
from msgspec import NODEFAULT, UNSET, Meta, Struct, UnsetType

from quintet import binding
from quintet.contract import Contract, Fault, Operation, check
from quintet.errors import ContractError
from quintet.model import (
    Alias,
    Anything,
    ContractModel,
    Deprecated,
    Enum,
    EnumValue,
    Facet,
    Facets,
    Field,
    Int8,
    Int16,
    Int32,
    Int64,
    ListOf,
    LiteralOf,
    MapOf,
    Mark,
    Member,
    Number,
    OperationModel,
    OptionalOf,
    Presence,
    Record,
    Ref,
    Reserved,
    Scalar,
    SetOf,
    TupleOf,
    TypeRef,
    UInt8,
    UInt16,
    UInt32,
    UInt64,
    Union,
    Width,
)

_SCALARS: dict[Any, Scalar] = {
    bool: Scalar("bool"),
    int: Scalar("int"),
    float: Scalar("float"),
    str: Scalar("str"),
    bytes: Scalar("bytes"),
    bytearray: Scalar("bytes"),
    datetime: Scalar("datetime"),
    date: Scalar("date"),
    time: Scalar("time"),
    timedelta: Scalar("timedelta"),
    UUID: Scalar("uuid"),
    Decimal: Scalar("decimal"),
    types.NoneType: Scalar("none"),
}
_LISTS = frozenset({list, abc.Sequence, abc.MutableSequence, abc.Collection})
_SETS = frozenset({set, frozenset, abc.Set, abc.MutableSet})
_MAPS = frozenset({dict, abc.Mapping, abc.MutableMapping})
_CONSTRAINTS = ("gt", "ge", "lt", "le", "multiple_of", "pattern", "min_length", "max_length", "tz")
_SUPPORTED = (
    "a Struct, dataclass, Enum, bool, int, float, str, bytes, datetime, date, time, timedelta, UUID, Decimal, "
    "a list, set, dict or tuple of these, a union or an optional"
)

LARGEST_NUMBER = 2**29 - 1
KEPT_BACK = range(19000, 20000)
"""Protocol Buffers keeps these field numbers for itself (language guide, "Assigning Field Numbers")."""


def model_of(contract: type[Contract]) -> ContractModel:
    """Checks the contract and compiles it. Raises ContractError for the first thing that contradicts itself."""
    info = check(contract)
    compiler = _Compiler()
    marks = _Marks(contract)
    operations = {name: compiler.operation(operation) for name, operation in info.operations.items()}
    for operation in info.operations.values():
        binding.check(operation)
    for name in operations:
        if name in marks.names:
            raise ContractError(f"contract {contract.__name__}: the operation name {name!r} is reserved; take another")
    return ContractModel(
        name=info.name,
        version=info.version,
        operations=operations,
        types=compiler.types,
        reserved_names=marks.names,
        aliases=marks.aliases,
        deprecated=marks.deprecated,
        doc=_doc(contract),
        facets=marks.facets({"http": {"level": info.level}}),
    )


class _Compiler:
    """Turns Python types into types of one model, each once, so that they may contain themselves."""

    def __init__(self) -> None:
        self.types: dict[str, Record | Enum | Union] = {}
        self._named: dict[str, Any] = {}  # the Python type that each name stands for

    def operation(self, operation: Operation[Any, Any, Any]) -> OperationModel:
        where = f"{operation!r}: "
        marks = _Marks(operation.function, operation)
        if marks.deprecated:
            raise ContractError(
                f"{where}write deprecated={marks.deprecated!r} in its decorator, not @Deprecated above it"
            )
        http: dict[str, Any] = {
            name: value for name in ("route", "status", "location", "cache") if (value := getattr(operation.http, name))
        }
        if operation.links:
            http["links"] = {
                name: {"operation": link.operation, "fill": dict(link.fill), "conditional": link.when is not None}
                for name, link in operation.links.items()
            }
        return OperationModel(
            name=operation.name,
            style=operation.style,
            parameters=Record(
                name=operation.record.__name__,
                fields=self._fields(where, operation.record, marks),
                reserved_numbers=marks.numbers,
                reserved_names=marks.names,
            ),
            result=self.ref(operation.result, f"{where}{_name(operation.result)}"),
            faults=tuple(self._fault(fault, where) for fault in operation.faults),
            idempotent=operation.idempotent,
            key=operation.key,
            expires=operation.expires,
            aliases=marks.aliases,
            deprecated=operation.deprecated,
            doc=operation.doc,
            facets=marks.facets({"http": http} if http else {}),
        )

    def _fault(self, fault: type[Fault], where: str) -> str:
        facets = {"http": {"status": fault.status}}
        return self._record(
            fault.record, f"{where}{fault.__name__}", fault.__name__, _Marks(fault), _doc(fault), facets
        )

    def ref(self, hint: Any, path: str) -> TypeRef:
        """A type as the model refers to it; `path` leads to it in messages. Raises ContractError."""
        bare, extras = _peel(hint)
        for mark in extras:
            if isinstance(mark, Mark):
                raise ContractError(f"{path}: {mark!r} has no place inside a type, write it {mark.where}")
        constraints = _constraints(extras)
        origin: Any = typing.get_origin(bare) or bare
        arguments = typing.get_args(bare)
        if getattr(type(origin), "__hash__", None) is None:  # a slip such as `stops: [Stop]`
            raise _unsupported(bare, path)
        if origin in _SCALARS:
            width = next((extra.name for extra in extras if isinstance(extra, Width)), "")
            return Scalar(_SCALARS[origin].kind, width, constraints)
        if origin is Any or isinstance(origin, TypeVar):
            bound = getattr(origin, "__bound__", None)
            return self.ref(bound, path) if bound else Anything()
        if origin is Literal:
            return _literal(arguments, path)
        if origin in (typing.Union, types.UnionType):
            return self._union(arguments, path)
        if origin in _LISTS or (origin is tuple and (not arguments or arguments[-1] is ...)):
            return ListOf(self.ref(arguments[0] if arguments else Any, f"{path}[...]"), constraints)
        if origin is tuple:
            return TupleOf(tuple(self.ref(item, f"{path}[{n}]") for n, item in enumerate(arguments)))
        if origin in _SETS:
            item = arguments[0] if arguments else Any
            if not _hashable(item):
                raise ContractError(
                    f"{path}: a set cannot hold {_name(item)}, it is not hashable; write frozen=True or a list"
                )
            return SetOf(self.ref(item, f"{path}[...]"), constraints)
        if origin in _MAPS:
            key, value = arguments or (Any, Any)
            return MapOf(self._key(key, path), self.ref(value, f"{path}[...]"), constraints)
        if isinstance(origin, type):
            return self._named_type(bare, origin, path)
        raise _unsupported(bare, path)

    def _named_type(self, bare: Any, origin: type, path: str) -> TypeRef:
        if issubclass(origin, BaseException):
            raise ContractError(
                f"{path}: {origin.__name__} is an exception, it cannot be carried; write a Struct instead"
            )
        if issubclass(origin, enum.Enum):
            return Ref(self._enum(origin, path))
        if issubclass(origin, Struct) or dataclasses.is_dataclass(origin):
            return Ref(self._record(bare, path, _name(bare), _Marks(origin), _doc(origin), {}))
        raise _unsupported(bare, path)

    def _key(self, hint: Any, path: str) -> TypeRef:
        key = self.ref(hint, f"{path}[key]")
        named = self.types.get(key.name) if isinstance(key, Ref) else None
        if isinstance(key, Scalar) and key.kind in ("bool", "none"):
            named = None
        elif isinstance(key, Scalar | LiteralOf | Anything) or isinstance(named, Enum):
            return key
        raise ContractError(f"{path}: the keys of a dict cannot be {_name(hint)}; write str, another scalar or an Enum")

    def _union(self, arguments: tuple[Any, ...], path: str) -> TypeRef:
        """None makes an OptionalOf, UNSET a matter of presence, and what is left over one if it is one."""
        others = [argument for argument in arguments if argument not in (types.NoneType, UnsetType)]
        optional = types.NoneType in arguments
        if len(others) == 1:
            inner = self.ref(others[0], path)
        elif all(typing.get_origin(other) is Literal for other in others):
            inner = _literal(tuple(v for other in others for v in typing.get_args(other)), path)
        else:
            inner = self._named_union(others, path)
        return OptionalOf(inner) if optional and not isinstance(inner, OptionalOf) else inner

    def _named_union(self, hints: Sequence[Any], path: str) -> Ref:
        written = [_take_marks(hint) for hint in hints]
        name = "Or".join(_name(_peel(hint)[0], capital=True) for hint, _ in written)
        if not self._claim(name, tuple(hint for hint, _ in written), path):
            return Ref(name)
        for _, marks in written:
            if any(not isinstance(mark, Number) for mark in marks):
                raise ContractError(f"{path}: a member of a union takes a Number, no other mark")
        numbers = _deal(
            f"union {name}", [(_name(_peel(hint)[0]), _written(marks)) for hint, marks in written], (), one_of="members"
        )
        members = tuple(
            Member(type=self.ref(hint, path), number=number, dealt=dealt)
            for (hint, _), (number, dealt) in zip(written, numbers, strict=True)
        )
        _compiles(typing.Union[tuple(hint for hint, _ in written)], path)  # noqa: UP007 - made of a list
        tags = [
            config.tag_field for hint, _ in written if (config := getattr(_peel(hint)[0], "__struct_config__", None))
        ]
        self.types[name] = Union(name=name, members=members, tag_field=(tags[0] or "") if tags else "")
        return Ref(name)

    def _enum(self, kind: type[enum.Enum], path: str) -> str:
        name = kind.__name__
        if not self._claim(name, kind, path):
            return name
        _compiles(kind, path)
        marks, where, members = _Marks(kind), f"enum {name}", list(kind)
        for member in members:
            if member.name in marks.names or member.value in marks.names:
                raise ContractError(f"{where}: the name {member.name!r} is reserved; take another")
        written = [member.value if isinstance(member.value, int) else None for member in members]
        numbers = _deal(where, [(m.name, n) for m, n in zip(members, written, strict=True)], marks.numbers, first=0)
        self.types[name] = Enum(
            name=name,
            values=tuple(
                EnumValue(name=member.name, value=member.value, number=number, dealt=dealt)
                for member, (number, dealt) in zip(members, numbers, strict=True)
            ),
            reserved_numbers=marks.numbers,
            reserved_names=marks.names,
            aliases=marks.aliases,
            deprecated=marks.deprecated,
            doc=_doc(kind),
            facets=marks.facets({}),
        )
        return name

    def _record(self, kind: Any, path: str, name: str, marks: _Marks, doc: str, facets: Facets) -> str:
        if not self._claim(name, kind, path):
            return name
        config = getattr(typing.get_origin(kind) or kind, "__struct_config__", None)
        if config and config.array_like:
            facets = {**facets, "python": {"array_like": True}}
        self.types[name] = Record(name=name)  # holds its place in the order while its fields are read
        self.types[name] = Record(
            name=name,
            fields=self._fields(f"{path}.", kind, marks),
            reserved_numbers=marks.numbers,
            reserved_names=marks.names,
            tag_field=(config.tag_field or "") if config else "",
            tag=config.tag if config else None,
            aliases=marks.aliases,
            deprecated=marks.deprecated,
            doc=doc,
            facets=marks.facets(facets),
        )
        return name

    def _claim(self, name: str, kind: Any, path: str) -> bool:
        """Whether the type is new. Raises ContractError where another one has its name."""
        known = self._named.setdefault(name, kind)
        if known is not kind and known != kind:
            raise ContractError(
                f"{path}: {_where(kind)} and {_where(known)} are both named {name!r}; rename one of them"
            )
        return name not in self.types

    def _fields(self, prefix: str, kind: Any, class_marks: _Marks) -> tuple[Field, ...]:
        raw = list(_raw_fields(kind, prefix))
        taken = [(field, *_take_marks(field.type)) for field in raw]
        where = prefix.rstrip(".: ")
        numbers = _deal(where, [(field.name, _written(marks)) for field, _, marks in taken], class_marks.numbers)
        fields: list[Field] = []
        for (field, hint, marks), (number, dealt) in zip(taken, numbers, strict=True):
            path = f"{prefix}{field.name}"
            if field.name in class_marks.names:
                raise ContractError(f"{path}: the name {field.name!r} is reserved; take another")
            for mark in marks:
                if isinstance(mark, Reserved):
                    raise ContractError(f"{path}: {mark!r} has no place on a field, write it {mark.where}")
            read = _Marks.of(marks)
            metas = [extra for extra in _peel(hint)[1] if isinstance(extra, Meta)]
            type_ = self.ref(hint, path)
            _compiles(hint, path)
            presence, default = _presence(field, hint, type_, path)
            fields.append(
                Field(
                    name=field.name,
                    type=type_,
                    number=number,
                    dealt=dealt,
                    presence=presence,
                    default=default,
                    aliases=read.aliases,
                    deprecated=read.deprecated,
                    doc=next((meta.description for meta in metas if meta.description), ""),
                    facets=read.facets(
                        {"python": {"name": field.python_name}} if field.python_name != field.name else {}
                    ),
                )
            )
        names = {field.name for field in fields}
        for made in fields:
            for alias in made.aliases:
                if alias in names:
                    raise ContractError(
                        f"{prefix}{made.name}: its alias {alias!r} is the name of another field or alias"
                    )
                names.add(alias)
        return tuple(fields)


class _RawField(Struct):
    """A field of a Struct or dataclass, before its type is read."""

    python_name: str
    name: str
    type: Any
    default: Any
    default_factory: Any


def _raw_fields(kind: Any, prefix: str) -> Iterator[_RawField]:
    origin = typing.get_origin(kind) or kind
    try:
        if issubclass(origin, Struct):
            for info in msgspec.structs.fields(kind):
                yield _RawField(info.name, info.encode_name, info.type, info.default, info.default_factory)
            return
        hints = typing.get_type_hints(origin, include_extras=True)
    except (NameError, TypeError, AttributeError) as error:
        raise ContractError(f"{prefix.rstrip('.: ')}: the types of its fields cannot be read: {error}") from None
    bound = dict(zip(getattr(origin, "__parameters__", ()), typing.get_args(kind), strict=False))
    for field in dataclasses.fields(origin):
        default, factory = (
            NODEFAULT if d is dataclasses.MISSING else d for d in (field.default, field.default_factory)
        )
        yield _RawField(field.name, field.name, _bind(hints[field.name], bound), default, factory)


def _bind(hint: Any, bound: dict[Any, Any]) -> Any:
    """A generic dataclass's field type with its type variables filled in."""
    if isinstance(hint, TypeVar):
        return bound.get(hint, hint)
    parameters = getattr(hint, "__parameters__", ()) if bound else ()
    return hint[tuple(bound.get(parameter, parameter) for parameter in parameters)] if parameters else hint


_CONSTANT_FACTORIES: tuple[Callable[[], Any], ...] = (list, dict, set, frozenset, tuple, bytearray)


def _presence(field: _RawField, hint: Any, type_: TypeRef, path: str) -> tuple[Presence, Any]:
    default = field.default
    if field.default_factory is not NODEFAULT:
        if field.default_factory not in _CONSTANT_FACTORIES:
            return Presence.DEFAULTED, UNSET  # made by code, anew for each message
        default = field.default_factory()
    if default is NODEFAULT:
        return Presence.REQUIRED, UNSET
    if default is UNSET or (default is None and isinstance(type_, OptionalOf | Anything)):
        return Presence.OPTIONAL, UNSET
    try:
        msgspec.convert(default, hint)
        return Presence.DEFAULTED, msgspec.json.decode(msgspec.json.encode(default, order="deterministic"))
    except (msgspec.MsgspecError, TypeError, ValueError) as error:
        raise ContractError(f"{path}: its default {default!r} does not fit its type: {error}") from None


def _literal(values: tuple[Any, ...], path: str) -> TypeRef:
    kept = tuple(value for value in values if value is not None)
    if not all(type(value) in (int, str) for value in kept):
        raise ContractError(f"{path}: a Literal holds strings and integers only; write an Enum instead")
    return OptionalOf(LiteralOf(kept)) if len(kept) < len(values) else LiteralOf(kept)


def _deal(
    where: str,
    written: Sequence[tuple[str, int | None]],
    reserved: Sequence[tuple[int, int]],
    *,
    first: int = 1,
    one_of: str = "",
) -> list[tuple[int, bool]]:
    """Each thing's number and whether it was dealt: written ones kept, the others in order around them."""
    taken: dict[int, str] = {}
    kind = one_of or ("fields" if first else "values")
    for name, number in written:
        if number is None:
            continue
        if first and not (isinstance(number, int) and 1 <= number <= LARGEST_NUMBER and number not in KEPT_BACK):
            raise ContractError(
                f"{where}: number {number!r} of {name!r} is out of range; write 1 to {LARGEST_NUMBER}, "
                f"but not {KEPT_BACK.start} to {KEPT_BACK.stop - 1}, which Protocol Buffers keeps for itself"
            )
        if any(low <= number <= high for low, high in reserved):
            raise ContractError(f"{where}: number {number!r} of {name!r} is reserved; take another")
        if number in taken:
            raise ContractError(f"{where}: the {kind} {taken[number]!r} and {name!r} both have the number {number}")
        taken[number] = name
    dealt: list[tuple[int, bool]] = []
    free = _free_numbers(first, taken, [*reserved, (KEPT_BACK.start, KEPT_BACK.stop - 1)])
    for _, number in written:
        dealt.append((next(free), True) if number is None else (number, False))
    return dealt


def _free_numbers(number: int, taken: abc.Container[int], reserved: Sequence[tuple[int, int]]) -> Iterator[int]:
    while True:
        inside = next((high for low, high in reserved if low <= number <= high), None)
        if inside is not None:
            number = inside + 1  # a reserved range may be as wide as "to max"
            continue
        if number not in taken:
            yield number
        number += 1


class _Marks:
    """The marks of one class, operation or field, sorted."""

    def __init__(self, *things: Any) -> None:
        own = [mark for thing in things for mark in vars(thing).get("__quintet_marks__", ())]
        parents = [parent for thing in things if isinstance(thing, type) for parent in thing.__mro__[1:]]
        inherited = [mark for parent in parents for mark in vars(parent).get("__quintet_marks__", ())]
        self._sort([*own, *(mark for mark in inherited if isinstance(mark, Reserved))])  # fields are inherited too

    @classmethod
    def of(cls, marks: Sequence[Mark]) -> _Marks:
        made = cls()
        made._sort(marks)
        return made

    def _sort(self, marks: Sequence[Mark]) -> None:
        self.numbers = tuple(n for mark in marks if isinstance(mark, Reserved) for n in mark.numbers)
        self.names = tuple(name for mark in marks if isinstance(mark, Reserved) for name in mark.names)
        self.aliases = tuple(mark.name for mark in marks if isinstance(mark, Alias))
        self.deprecated = next((mark.why for mark in marks if isinstance(mark, Deprecated)), "")
        self._facets = [mark for mark in marks if isinstance(mark, Facet)]

    def facets(self, ours: Facets) -> Facets:
        found = {name: dict(options) for name, options in ours.items()}
        for facet in self._facets:
            try:
                options = msgspec.json.decode(msgspec.json.encode(facet.options), type=dict[str, Any])
            except (TypeError, ValueError) as error:
                raise ContractError(f"{facet!r}: its options must be JSON values: {error}") from None
            found.setdefault(facet.format_name, {}).update(options)
        return found


def _take_marks(hint: Any) -> tuple[Any, list[Mark]]:
    """A field's type without its marks, and the marks: they may stand inside `Annotated[T, ...] | None` too."""
    bare, extras = _peel(hint)
    marks = [extra for extra in extras if isinstance(extra, Mark)]
    rest = tuple(extra for extra in extras if not isinstance(extra, Mark))
    if typing.get_origin(bare) in (typing.Union, types.UnionType):
        arguments = typing.get_args(bare)
        others = [argument for argument in arguments if argument not in (types.NoneType, UnsetType)]
        if len(others) == 1 and len(arguments) > 1:
            inner, inner_marks = _take_marks(others[0])
            if inner_marks:
                bare = typing.Union[(inner, *(a for a in arguments if a is not others[0]))]
                marks += inner_marks
    return (Annotated[(bare, *rest)] if rest else bare), marks


def _written(marks: Sequence[Mark]) -> int | None:
    return next((mark.number for mark in marks if isinstance(mark, Number)), None)


def _peel(hint: Any) -> tuple[Any, list[Any]]:
    """A type without Annotated, NewType and aliases, and what was annotated."""
    extras: list[Any] = []
    while True:
        if typing.get_origin(hint) is Annotated:
            extras = [*hint.__metadata__, *extras]
            hint = hint.__origin__
        elif isinstance(hint, typing.NewType):
            hint = hint.__supertype__
        elif type(hint).__name__ == "TypeAliasType":  # `type X = ...`, from Python 3.12
            hint = hint.__value__
        else:
            return (types.NoneType if hint is None else hint), extras


def _constraints(extras: Sequence[Any]) -> dict[str, Any]:
    """What Meta demands, without the bounds that a width already says."""
    width = next((extra for extra in extras if isinstance(extra, Width)), None)
    found: dict[str, Any] = {}
    for extra in extras:
        if isinstance(extra, Meta) and (extra, width) not in _BOUNDS:
            found |= {name: value for name in _CONSTRAINTS if (value := getattr(extra, name)) is not None}
    return found


_BOUNDS = [tuple(_peel(kind)[1]) for kind in (Int8, Int16, Int32, Int64, UInt8, UInt16, UInt32, UInt64)]


def _compiles(hint: Any, path: str) -> None:
    """Asks msgspec, which knows more rules (tags of unions, bounds on types). Raises ContractError."""
    try:
        msgspec.json.Decoder(hint)
    except (TypeError, ValueError) as error:
        raise ContractError(f"{path}: {error}") from None


def _hashable(hint: Any) -> bool:
    bare, _ = _peel(hint)
    origin = typing.get_origin(bare) or bare
    if isinstance(origin, type) and issubclass(origin, Struct):
        return bool(origin.__struct_config__.frozen) or not origin.__struct_config__.eq
    if origin in _LISTS or origin in _MAPS or origin in _SETS - {frozenset}:
        return False
    if origin in (tuple, frozenset, typing.Union, types.UnionType):
        return all(argument is ... or _hashable(argument) for argument in typing.get_args(bare))
    return getattr(origin, "__hash__", None) is not None


def _unsupported(hint: Any, path: str) -> ContractError:
    return ContractError(f"{path}: {_name(hint)} cannot be carried; write {_SUPPORTED}")


def _name(hint: Any, *, capital: bool = False) -> str:
    """What a type is called: Page_Trip for Page[Trip]."""
    bare, _ = _peel(hint)
    name = getattr(typing.get_origin(bare) or bare, "__name__", None) or str(bare)
    if name == "NoneType":
        name = "None"
    name = "_".join([re.sub(r"\W+", "_", name).strip("_"), *(_name(a) for a in typing.get_args(bare) if a is not ...)])
    return name[:1].upper() + name[1:] if capital else name


def _where(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)


def _doc(kind: type) -> str:
    """A class's own docstring: neither an inherited one nor the one that dataclass writes."""
    doc = vars(kind).get("__doc__") or ""
    return "" if dataclasses.is_dataclass(kind) and doc.startswith(f"{kind.__name__}(") else inspect.cleandoc(doc)
