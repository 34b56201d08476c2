"""The neutral model that a contract compiles into: every IDL is read into it and written from it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from msgspec import UNSET, Meta, Struct

from quintet.contract import Style

T = TypeVar("T")
Facets: TypeAlias = dict[str, dict[str, Any]]
"""What only one format or IDL knows about a thing, by its name: {"protobuf": {"packed": True}}."""


class Presence(enum.Enum):
    """Whether a field may be left out of a message."""

    REQUIRED = "required"  # refused where it is missing
    DEFAULTED = "defaulted"  # the reader fills the default in
    OPTIONAL = "optional"  # absent means absent: None or UNSET


# Types: how a field refers to what it holds.


class Scalar(Struct, frozen=True, tag="scalar", tag_field="is", omit_defaults=True):
    """One value. `width` is what binary formats write it in ("int32", "float64"); empty where the format chooses."""

    kind: Literal[
        "bool", "int", "float", "str", "bytes", "datetime", "date", "time", "timedelta", "uuid", "decimal", "none"
    ]
    width: str = ""
    constraints: dict[str, Any] = {}  # as in JSON Schema validation: ge, le, pattern, max_length ...

    def __str__(self) -> str:
        return self.width or self.kind


class LiteralOf(Struct, frozen=True, tag="literal", tag_field="is"):
    """One of a few values that have no names of their own."""

    values: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"literal[{', '.join(map(repr, self.values))}]"


class ListOf(Struct, frozen=True, tag="list", tag_field="is", omit_defaults=True):
    item: TypeRef
    constraints: dict[str, Any] = {}

    def __str__(self) -> str:
        return f"list[{self.item}]"


class SetOf(Struct, frozen=True, tag="set", tag_field="is", omit_defaults=True):
    item: TypeRef
    constraints: dict[str, Any] = {}

    def __str__(self) -> str:
        return f"set[{self.item}]"


class TupleOf(Struct, frozen=True, tag="tuple", tag_field="is"):
    """A fixed number of items; a tuple of any length is a ListOf."""

    items: tuple[TypeRef, ...]

    def __str__(self) -> str:
        return f"tuple[{', '.join(map(str, self.items))}]"


class MapOf(Struct, frozen=True, tag="map", tag_field="is", omit_defaults=True):
    key: TypeRef
    value: TypeRef
    constraints: dict[str, Any] = {}

    def __str__(self) -> str:
        return f"map[{self.key}, {self.value}]"


class OptionalOf(Struct, frozen=True, tag="optional", tag_field="is"):
    """The item or None."""

    item: TypeRef

    def __str__(self) -> str:
        return f"{self.item} or none"


class Ref(Struct, frozen=True, tag="ref", tag_field="is"):
    """A record, enum or union of the same model, by name."""

    name: str

    def __str__(self) -> str:
        return self.name


class Anything(Struct, frozen=True, tag="any", tag_field="is"):
    """Whatever the format can carry."""

    def __str__(self) -> str:
        return "any"


TypeRef: TypeAlias = Scalar | LiteralOf | ListOf | SetOf | TupleOf | MapOf | OptionalOf | Ref | Anything


# What has a name.


class Field(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One field of a record. `name` is the one on the wire.

    `dealt`: the number was not written by anyone; it is dealt in declaration order and must be locked to be stable.
    `default`: as JSON would carry it; UNSET where the field is DEFAULTED by code (a factory) or has no default.
    """

    name: str
    type: TypeRef
    number: int
    dealt: bool = False
    presence: Presence = Presence.REQUIRED
    default: Any = UNSET
    aliases: tuple[str, ...] = ()
    deprecated: str = ""
    doc: str = ""
    facets: Facets = {}


class Record(Struct, frozen=True, kw_only=True, tag="record", tag_field="is", omit_defaults=True):
    """Named fields. `tag` in `tag_field` is what tells a union's member from the others."""

    name: str
    fields: tuple[Field, ...] = ()
    reserved_numbers: tuple[tuple[int, int], ...] = ()  # from and to, both included
    reserved_names: tuple[str, ...] = ()
    tag_field: str = ""
    tag: str | int | None = None
    aliases: tuple[str, ...] = ()
    deprecated: str = ""
    doc: str = ""
    facets: Facets = {}


class EnumValue(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`value` is what text formats write, `number` what binary ones do (the same for an enum of integers)."""

    name: str
    value: str | int
    number: int
    dealt: bool = False
    aliases: tuple[str, ...] = ()
    deprecated: str = ""
    doc: str = ""
    facets: Facets = {}


class Enum(Struct, frozen=True, kw_only=True, tag="enum", tag_field="is", omit_defaults=True):
    name: str
    values: tuple[EnumValue, ...] = ()
    reserved_numbers: tuple[tuple[int, int], ...] = ()
    reserved_names: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    deprecated: str = ""
    doc: str = ""
    facets: Facets = {}


class Member(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One alternative of a union."""

    type: TypeRef
    number: int
    dealt: bool = False


class Union(Struct, frozen=True, kw_only=True, tag="union", tag_field="is", omit_defaults=True):
    """One of several types. `tag_field` is the records' field that says which; empty where their kinds say it."""

    name: str
    members: tuple[Member, ...] = ()
    tag_field: str = ""
    aliases: tuple[str, ...] = ()
    deprecated: str = ""
    doc: str = ""
    facets: Facets = {}


class OperationModel(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`faults` are records of the model, by name; `expires` is in seconds."""

    name: str
    style: Style
    parameters: Record
    result: TypeRef = Scalar("none")
    faults: tuple[str, ...] = ()
    idempotent: bool = False
    key: str = ""
    expires: float | None = None
    aliases: tuple[str, ...] = ()
    deprecated: str = ""
    doc: str = ""
    facets: Facets = {}


class ContractModel(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A whole contract, apart from any programming language. Survives JSON unchanged, for lock files and evolution."""

    name: str
    version: str
    operations: dict[str, OperationModel] = {}
    types: dict[str, Record | Enum | Union] = {}
    reserved_names: tuple[str, ...] = ()  # operations that there were
    aliases: tuple[str, ...] = ()
    deprecated: str = ""
    doc: str = ""
    facets: Facets = {}


# Marks: what the user writes beside a type.


class Mark:
    """Written into a field's type, Annotated[T, mark], and what is a ClassMark also above a class or operation."""

    where: ClassVar[str] = "on a field or parameter"


class ClassMark(Mark):
    where = "on a field, or above a class or an operation"

    def __call__(self, thing: T) -> T:
        thing.__quintet_marks__ = (self, *vars(thing).get("__quintet_marks__", ()))  # type: ignore[attr-defined]
        return thing


@dataclasses.dataclass(frozen=True)
class Number(Mark):
    """The stable number of a field, parameter or union member: Thrift's field id, the tag of Protocol Buffers."""

    number: int


@dataclasses.dataclass(frozen=True)
class Alias(ClassMark):
    """A name that the field, type or operation had in earlier versions."""

    name: str


@dataclasses.dataclass(frozen=True)
class Deprecated(ClassMark):
    """Not to be used by new code, and why. (An operation says it in its decorator: deprecated="...")"""

    why: str


class Reserved(ClassMark):
    """Numbers and names that were used and never may be again: @Reserved(numbers=[3, range(7, 10)], names=["x"])."""

    where = "above a class or an operation"

    def __init__(self, numbers: Iterable[int | range] = (), names: Iterable[str] = ()) -> None:
        self.numbers = tuple((n, n) if isinstance(n, int) else (n.start, n.stop - 1) for n in numbers)
        self.names = tuple(names)

    def __repr__(self) -> str:
        return f"Reserved(numbers={list(self.numbers)}, names={list(self.names)})"


class Facet(ClassMark):
    """What one format or IDL alone is told: Facet("protobuf", packed=True). The options must be JSON values."""

    def __init__(self, format_name: str, /, **options: Any) -> None:
        self.format_name = format_name
        self.options = options

    def __repr__(self) -> str:
        return f"Facet({self.format_name!r}, **{self.options!r})"


@dataclasses.dataclass(frozen=True)
class Width:
    """What a binary format writes a number in; Int8 to UInt64, Float32 and Float64 carry it."""

    name: str


Int8 = Annotated[int, Meta(ge=-(2**7), le=2**7 - 1), Width("int8")]
Int16 = Annotated[int, Meta(ge=-(2**15), le=2**15 - 1), Width("int16")]
Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1), Width("int32")]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1), Width("int64")]
UInt8 = Annotated[int, Meta(ge=0, le=2**8 - 1), Width("uint8")]
UInt16 = Annotated[int, Meta(ge=0, le=2**16 - 1), Width("uint16")]
UInt32 = Annotated[int, Meta(ge=0, le=2**32 - 1), Width("uint32")]
UInt64 = Annotated[int, Meta(ge=0), Width("uint64")]  # msgspec takes no bound beyond int64
Float32 = Annotated[float, Width("float32")]
Float64 = Annotated[float, Width("float64")]
