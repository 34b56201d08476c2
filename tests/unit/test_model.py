# mypy: disable-error-code="empty-body"
"""The neutral model: what a contract's Python types become, and what they are refused for."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Annotated, Any, Generic, Literal, NewType, TypeVar
from uuid import UUID, uuid4

import msgspec
import pytest
from msgspec import UNSET, Meta, Struct, UnsetType

from quintet.compiler import model_of
from quintet.contract import Contract, Fault, Http, Link, Style, async_request, event, request
from quintet.errors import ContractError
from quintet.model import (
    Alias,
    Anything,
    ContractModel,
    Deprecated,
    Enum,
    Facet,
    Field,
    Float32,
    Float64,
    Int8,
    Int32,
    Int64,
    ListOf,
    LiteralOf,
    MapOf,
    Number,
    OptionalOf,
    Presence,
    Record,
    Ref,
    Reserved,
    Scalar,
    SetOf,
    TupleOf,
    UInt16,
    UInt64,
    Union,
    Width,
)

T = TypeVar("T")
TripId = NewType("TripId", str)


class State(enum.Enum):
    WAITING = "waiting"
    DRIVING = "driving"


class Priority(enum.IntEnum):
    LOW = 1
    HIGH = 10


class Place(Struct, frozen=True):
    lat: float
    lon: Float32 = 0.0


class Trip(Struct):
    """A ride from one place to another."""

    id: TripId
    pickup: Annotated[Place, Meta(description="where to wait")]
    stops: list[Place] = []
    before: Trip | None = None


@dataclasses.dataclass
class Page(Generic[T]):
    items: list[T]
    following: str | None = None


class Card(Struct, tag="card"):
    number: str


class Cash(Struct, tag="cash"):
    pass


class NoSuchTrip(Fault, status=404):
    """Nobody knows it."""

    trip_id: str
    hint: str = ""


def compiled(*, result: Any = None, **parameters: Any) -> ContractModel:
    """The model of a contract with one operation, of these parameters and this result."""

    async def op(self: Any) -> None: ...

    operation = request(op)
    operation.__dict__["record"] = msgspec.defstruct("C_op", list(parameters.items()), module=__name__)
    operation.__dict__["result"] = type(None) if result is None else result
    return model_of(type("C", (Contract,), {"op": operation}))


def field_of(hint: Any) -> Field:
    return compiled(x=hint).operations["op"].parameters.fields[0]


def record_of(kind: Any, name: str = "") -> Record:
    found = compiled(x=kind).types[name or kind.__name__]
    assert isinstance(found, Record)
    return found


def refusal(kind: Any) -> str:
    with pytest.raises(ContractError) as refused:
        compiled(x=kind)
    return str(refused.value)


# contracts and operations


@Facet("protobuf", package="rides")
@Reserved(names=["search"])
class Trips(Contract, name="trips", version="1.3", http_level=3):
    """What passengers do."""

    @request(
        http=Http("GET /trips/{trip_id}", cache="max-age=60"),
        faults=[NoSuchTrip],
        links={"cancel": Link("cancel", when=bool, fill={"trip_id": "id"})},
    )
    async def get(self, trip_id: str, *, deep: bool = False) -> Page[Trip]:
        """One trip and those before."""
        raise NotImplementedError

    @request(deprecated="let it expire")
    @Alias("abort")
    async def cancel(self, trip_id: str) -> None: ...

    @event(key="trip.id", expires=60.0)
    @Reserved(numbers=[1], names=["place"])
    async def created(self, trip: Trip) -> None: ...

    @async_request
    async def receipt(self, trip_id: Annotated[str, Number(7)]) -> bytes: ...


def test_a_contract_compiles_into_a_model_of_its_operations_and_types() -> None:
    model = model_of(Trips)
    assert (model.name, model.version, model.doc) == ("trips", "1.3", "What passengers do.")
    assert model.facets == {"http": {"level": 3}, "protobuf": {"package": "rides"}}
    assert model.reserved_names == ("search",)
    assert {name: operation.style for name, operation in model.operations.items()} == {
        "get": Style.REQUEST,
        "cancel": Style.REQUEST,
        "created": Style.EVENT,
        "receipt": Style.ASYNC_REQUEST,
    }
    assert list(model.types) == ["Page_Trip", "Trip", "Place", "NoSuchTrip"]


def test_an_operation_keeps_all_that_was_said_about_it() -> None:
    get, cancel, created, receipt = model_of(Trips).operations.values()
    assert get.parameters.fields == (
        Field(name="trip_id", type=Scalar("str"), number=1, dealt=True),
        Field(name="deep", type=Scalar("bool"), number=2, dealt=True, presence=Presence.DEFAULTED, default=False),
    )
    assert (get.result, get.faults, get.idempotent) == (Ref("Page_Trip"), ("NoSuchTrip",), True)
    assert get.doc == "One trip and those before."
    assert get.facets["http"] == {
        "route": "GET /trips/{trip_id}",
        "cache": "max-age=60",
        "links": {"cancel": {"operation": "cancel", "fill": {"trip_id": "id"}, "conditional": True}},
    }
    assert (cancel.deprecated, cancel.aliases, cancel.result) == ("let it expire", ("abort",), Scalar("none"))
    assert (created.key, created.expires) == ("trip.id", 60.0)
    assert created.parameters.fields[0].number == 2
    assert (created.parameters.reserved_numbers, created.parameters.reserved_names) == (((1, 1),), ("place",))
    assert receipt.parameters.fields[0].number == 7
    assert not receipt.parameters.fields[0].dealt


def test_a_model_survives_json_unchanged() -> None:
    model = model_of(Trips)
    assert msgspec.json.decode(msgspec.json.encode(model), type=ContractModel) == model
    assert model_of(Trips) == model


def test_a_fault_is_a_record_with_its_http_status() -> None:
    fault = model_of(Trips).types["NoSuchTrip"]
    assert isinstance(fault, Record)
    assert (fault.doc, fault.facets) == ("Nobody knows it.", {"http": {"status": 404}})
    assert [(field.name, field.presence) for field in fault.fields] == [
        ("trip_id", Presence.REQUIRED),
        ("hint", Presence.DEFAULTED),
    ]


# types


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        (bool, Scalar("bool")),
        (int, Scalar("int")),
        (float, Scalar("float")),
        (str, Scalar("str")),
        (bytes, Scalar("bytes")),
        (bytearray, Scalar("bytes")),
        (datetime, Scalar("datetime")),
        (date, Scalar("date")),
        (time, Scalar("time")),
        (timedelta, Scalar("timedelta")),
        (UUID, Scalar("uuid")),
        (Decimal, Scalar("decimal")),
        (None, Scalar("none")),
        (Any, Anything()),
        (TripId, Scalar("str")),
        (Int8, Scalar("int", "int8")),
        (UInt64, Scalar("int", "uint64")),
        (Float64, Scalar("float", "float64")),
        (Annotated[int, Width("int16"), Meta(ge=0)], Scalar("int", "int16", {"ge": 0})),
        (Annotated[str, Meta(min_length=1, pattern="^a")], Scalar("str", "", {"pattern": "^a", "min_length": 1})),
        (Annotated[list[int], Meta(max_length=3)], ListOf(Scalar("int"), {"max_length": 3})),
        (list[Int32], ListOf(Scalar("int", "int32"))),
        (list, ListOf(Anything())),
        (Sequence[str], ListOf(Scalar("str"))),
        (tuple[int, ...], ListOf(Scalar("int"))),
        (tuple[int, str], TupleOf((Scalar("int"), Scalar("str")))),
        (set[str], SetOf(Scalar("str"))),
        (frozenset[Place], SetOf(Ref("Place"))),
        (dict[str, int], MapOf(Scalar("str"), Scalar("int"))),
        (Mapping[State, list[int]], MapOf(Ref("State"), ListOf(Scalar("int")))),
        (int | None, OptionalOf(Scalar("int"))),
        (Literal["a", 1], LiteralOf(("a", 1))),
        (Literal["a", None], OptionalOf(LiteralOf(("a",)))),
        (Trip, Ref("Trip")),
        (Page[int], Ref("Page_int")),
        (Card | Cash, Ref("CardOrCash")),
        (Card | Cash | None, OptionalOf(Ref("CardOrCash"))),
        (int | str, Ref("IntOrStr")),
        (dict[str, list[tuple[int, Place]]], MapOf(Scalar("str"), ListOf(TupleOf((Scalar("int"), Ref("Place")))))),
    ],
    ids=str,
)
def test_each_python_type_becomes_a_type_of_the_model(hint: Any, expected: Any) -> None:
    assert field_of(hint).type == expected
    assert compiled(result=hint).operations["op"].result == expected


def test_a_record_keeps_its_docstring_its_fields_and_may_contain_itself() -> None:
    trip = record_of(Trip)
    assert trip.doc == "A ride from one place to another."
    assert [(f.name, f.number, str(f.type), f.presence) for f in trip.fields] == [
        ("id", 1, "str", Presence.REQUIRED),
        ("pickup", 2, "Place", Presence.REQUIRED),
        ("stops", 3, "list[Place]", Presence.DEFAULTED),
        ("before", 4, "Trip or none", Presence.OPTIONAL),
    ]
    assert trip.fields[1].doc == "where to wait"
    assert record_of(Place).doc == ""
    assert record_of(Page[int], "Page_int").doc == ""


def test_a_generic_type_is_one_record_per_argument() -> None:
    model = compiled(a=Page[int], b=Page[Trip], c=Page[int])
    assert list(model.types) == ["Page_int", "Page_Trip", "Trip", "Place"]
    page = model.types["Page_Trip"]
    assert isinstance(page, Record)
    assert page.fields[0].type == ListOf(Ref("Trip"))


def test_generic_structs_have_their_variables_filled_in() -> None:
    class Pair(Struct, Generic[T]):
        first: T
        rest: dict[str, T] = {}

    pair = record_of(Pair[State], "Pair_State")
    assert [field.type for field in pair.fields] == [Ref("State"), MapOf(Scalar("str"), Ref("State"))]


def test_a_field_is_named_as_on_the_wire_and_keeps_its_python_name() -> None:
    class Renamed(Struct, rename="camel"):
        pick_up: int
        id: str

    first, second = record_of(Renamed).fields
    assert (first.name, first.facets) == ("pickUp", {"python": {"name": "pick_up"}})
    assert (second.name, second.facets) == ("id", {})


def test_a_struct_that_travels_as_an_array_says_so() -> None:
    class Point(Struct, array_like=True):
        x: int

    assert record_of(Point).facets == {"python": {"array_like": True}}


def test_an_enum_of_integers_is_numbered_by_its_values_and_one_of_strings_in_order() -> None:
    model = compiled(a=State, b=Priority)
    state, priority = model.types["State"], model.types["Priority"]
    assert isinstance(state, Enum)
    assert isinstance(priority, Enum)
    assert [(v.name, v.value, v.number, v.dealt) for v in state.values] == [
        ("WAITING", "waiting", 0, True),
        ("DRIVING", "driving", 1, True),
    ]
    assert [(v.name, v.value, v.number, v.dealt) for v in priority.values] == [
        ("LOW", 1, 1, False),
        ("HIGH", 10, 10, False),
    ]


def test_a_tagged_union_knows_its_tag_field_and_numbers_its_members() -> None:
    model = compiled(x=Annotated[Card, Number(4)] | Cash)
    union, card = model.types["CardOrCash"], model.types["Card"]
    assert isinstance(union, Union)
    assert isinstance(card, Record)
    assert union.tag_field == "type"
    assert [(m.type, m.number, m.dealt) for m in union.members] == [(Ref("Card"), 4, False), (Ref("Cash"), 1, True)]
    assert (card.tag_field, card.tag) == ("type", "card")


def test_types_show_themselves_shortly() -> None:
    hint = dict[str, list[tuple[Int8, Place]]] | None
    assert str(field_of(hint).type) == "map[str, list[tuple[int8, Place]]] or none"
    assert str(field_of(set[Any]).type) == "set[any]"
    assert str(field_of(Literal["a", 2]).type) == "literal['a', 2]"


# presence and defaults


def test_presence_is_required_defaulted_or_optional() -> None:
    @dataclasses.dataclass
    class All:
        required: int
        nullable: int | None
        defaulted: int = 3
        nullable_default: int | None = 3
        empty: list[int] = dataclasses.field(default_factory=list)
        made: UUID = dataclasses.field(default_factory=uuid4)
        optional: int | None = None
        anything: Any = None

    assert [(f.name, f.presence, f.default) for f in record_of(All).fields] == [
        ("required", Presence.REQUIRED, UNSET),
        ("nullable", Presence.REQUIRED, UNSET),
        ("defaulted", Presence.DEFAULTED, 3),
        ("nullable_default", Presence.DEFAULTED, 3),
        ("empty", Presence.DEFAULTED, []),
        ("made", Presence.DEFAULTED, UNSET),
        ("optional", Presence.OPTIONAL, UNSET),
        ("anything", Presence.OPTIONAL, UNSET),
    ]


def test_a_field_that_may_be_unset_is_optional_without_being_nullable() -> None:
    class Patch(Struct):
        seats: int | UnsetType = UNSET
        note: str | UnsetType | None = UNSET

    seats, note = record_of(Patch).fields
    assert (seats.presence, seats.type) == (Presence.OPTIONAL, Scalar("int"))
    assert (note.presence, note.type) == (Presence.OPTIONAL, OptionalOf(Scalar("str")))


def test_defaults_are_kept_as_json_carries_them_and_always_the_same() -> None:
    class Defaults(Struct):
        state: State = State.DRIVING
        price: Decimal = Decimal("1.50")
        wait: timedelta = timedelta(minutes=5)
        place: Place = Place(1.0)
        body: bytes = b"hi"
        tags: frozenset[str] = frozenset("abc")

    assert [field.default for field in record_of(Defaults).fields] == [
        "driving",
        "1.50",
        "PT300S",
        {"lat": 1.0, "lon": 0.0},
        "aGk=",
        ["a", "b", "c"],
    ]


# marks


def test_marks_on_a_field_are_kept_wherever_they_stand() -> None:
    class Marked(Struct):
        a: Annotated[int, Number(5), Alias("x"), Alias("y"), Deprecated("use b"), Facet("protobuf", packed=True)]
        b: Annotated[str, Number(2)] | None = None
        c: Annotated[int | None, Number(9)] = None

    a, b, c = record_of(Marked).fields
    assert (a.number, a.aliases, a.deprecated, a.facets) == (5, ("x", "y"), "use b", {"protobuf": {"packed": True}})
    assert (b.number, b.type) == (2, OptionalOf(Scalar("str")))
    assert (c.number, c.type) == (9, OptionalOf(Scalar("int")))
    assert [field.dealt for field in (a, b, c)] == [False, False, False]


def test_marks_above_a_class_are_kept() -> None:
    @Reserved(numbers=[3, range(7, 10)], names=["colour"])
    @Deprecated("use Ride")
    @Alias("Journey")
    @Facet("avro", namespace="rides")
    class Marked(Struct):
        a: int

    marked = record_of(Marked)
    assert (marked.reserved_numbers, marked.reserved_names) == (((3, 3), (7, 9)), ("colour",))
    assert (marked.deprecated, marked.aliases) == ("use Ride", ("Journey",))
    assert marked.facets == {"avro": {"namespace": "rides"}}


def test_what_is_reserved_stays_reserved_in_a_subclass_and_the_other_marks_do_not() -> None:
    @Deprecated("old")
    @Reserved(numbers=[1])
    class Parent(Struct):
        a: int

    class Child(Parent):
        b: int

    child = record_of(Child)
    assert [field.number for field in child.fields] == [2, 3]
    assert child.deprecated == ""


def test_marks_above_and_below_the_decorator_of_an_operation_are_kept() -> None:
    class C(Contract):
        @Facet("thrift", oneway=True)
        @request
        @Facet("protobuf", stream=False)
        async def op(self) -> None: ...

    assert model_of(C).operations["op"].facets == {"protobuf": {"stream": False}, "thrift": {"oneway": True}}


def test_numbers_that_are_not_written_are_dealt_around_the_written_and_reserved_ones() -> None:
    @Reserved(numbers=[1, range(4, 6)])
    class Mixed(Struct):
        a: int
        b: Annotated[int, Number(3)]
        c: int
        d: Annotated[int, Number(2)]
        e: int

    assert [(f.name, f.number, f.dealt) for f in record_of(Mixed).fields] == [
        ("a", 6, True),
        ("b", 3, False),
        ("c", 7, True),
        ("d", 2, False),
        ("e", 8, True),
    ]


def test_dealing_passes_over_wide_reserved_ranges_and_what_protocol_buffers_keeps() -> None:
    @Reserved(numbers=[range(1, 2**28)])
    class Wide(Struct):
        a: int

    @Reserved(numbers=[range(1, 18999)])
    class Near(Struct):
        a: int
        b: int

    assert record_of(Wide).fields[0].number == 2**28
    assert [field.number for field in record_of(Near).fields] == [18999, 20000]


def test_a_string_enum_deals_its_numbers_around_the_reserved_ones() -> None:
    @Reserved(numbers=[1])
    class Colour(enum.Enum):
        RED = "red"
        BLUE = "blue"

    found = compiled(x=Colour).types["Colour"]
    assert isinstance(found, Enum)
    assert [value.number for value in found.values] == [0, 2]


# what is refused


class Lat(Struct):
    lat: complex


class Deep(Struct):
    pickup: list[dict[str, Lat]]


@dataclasses.dataclass
class Broken(Exception):
    reason: str


class Unknown(Struct):
    trip: Nowhere  # type: ignore[name-defined]  # noqa: F821


class Mutable(Struct):
    a: int


class OneTag(Struct, tag="same"):
    a: int


class SameTag(Struct, tag="same"):
    b: int


def _bad(**annotations: Any) -> type[Struct]:
    return msgspec.defstruct("Bad", list(annotations.items()), module=__name__)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (complex, "C.op: x: complex cannot be carried; write a Struct, dataclass, Enum, bool, int, float, str, bytes,"),
        (object, "C.op: x: object cannot be carried"),
        (Deep, "C.op: x.pickup[...][...].lat: complex cannot be carried"),
        (Broken, "C.op: x: Broken is an exception, it cannot be carried"),
        (NoSuchTrip, "C.op: x: NoSuchTrip is an exception, it cannot be carried; write a Struct instead"),
        (Unknown, "C.op: x: the types of its fields cannot be read: name 'Nowhere' is not defined"),
        (set[Mutable], "C.op: x: a set cannot hold Mutable, it is not hashable; write frozen=True or a list"),
        (set[list[int]], "C.op: x: a set cannot hold list_int, it is not hashable; write frozen=True or a list"),
        (dict[bool, int], "C.op: x: the keys of a dict cannot be bool; write str, another scalar or an Enum"),
        (dict[tuple[int, int], int], "C.op: x: the keys of a dict cannot be tuple_int_int; write str,"),
        (Literal[True], "C.op: x: a Literal holds strings and integers only; write an Enum instead"),
        (Mutable | Place, "C.op: x: If a type union contains multiple Struct types, all Struct types must be tagged"),
        (
            OneTag | SameTag,
            "C.op: x: If a type union contains multiple Struct types, all Struct types must have unique",
        ),
        (list[Annotated[int, Number(3)]], "C.op: x[...]: Number(number=3) has no place inside a type, write it on a"),
        (list[Annotated[int, Deprecated("x")]], "C.op: x[...]: Deprecated(why='x') has no place inside a type"),
        (
            Annotated[int, Reserved(numbers=[3])],
            "C.op: x: Reserved(numbers=[(3, 3)], names=[]) has no place on a field",
        ),
        (Annotated[Int8, Meta(ge=0)], "C.op: x: Multiple `Meta` annotations setting `ge` found"),
        (Annotated[str, Meta(ge=0)], "C.op: x: Can only set `ge` on a numeric type"),
        (
            _bad(a=Annotated[int, Number(3)], b=Annotated[int, Number(3)]),
            "C.op: x: the fields 'a' and 'b' both have the number 3",
        ),
        (
            _bad(a=Annotated[int, Number(0)]),
            "C.op: x: number 0 of 'a' is out of range; write 1 to 536870911, but not 19000 to 19999, which",
        ),
        (_bad(a=Annotated[int, Number(2**29)]), "C.op: x: number 536870912 of 'a' is out of range"),
        (_bad(a=Annotated[int, Number(19000)]), "C.op: x: number 19000 of 'a' is out of range"),
        (_bad(a=Annotated[int, Number("3")]), "C.op: x: number '3' of 'a' is out of range"),  # type: ignore[arg-type]
        (
            Reserved(numbers=[3])(_bad(a=Annotated[int, Number(3)])),
            "C.op: x: number 3 of 'a' is reserved; take another",
        ),
        (Reserved(names=["a"])(_bad(a=int)), "C.op: x.a: the name 'a' is reserved; take another"),
        (
            _bad(a=int, b=Annotated[int, Alias("a")]),
            "C.op: x.b: its alias 'a' is the name of another field or alias",
        ),
        (
            _bad(a=Annotated[int, Alias("c")], b=Annotated[int, Alias("c")]),
            "C.op: x.b: its alias 'c' is the name of another field or alias",
        ),
        (
            Annotated[Card, Number(2)] | Annotated[Cash, Number(2)],
            "union CardOrCash: the members 'Card' and 'Cash' both have the number 2",
        ),
        (Annotated[Card, Alias("x")] | Cash, "C.op: x: a member of a union takes a Number, no other mark"),
        (
            msgspec.defstruct("Bad", [("seats", int, "two")]),
            "C.op: x.seats: its default 'two' does not fit its type: Expected `int`, got `str`",
        ),
        (msgspec.defstruct("Bad", [("seats", int, None)]), "C.op: x.seats: its default None does not fit its type"),
        (
            _bad(a=Annotated[int, Facet("protobuf", bad=complex(1))]),
            "Facet('protobuf', **{'bad': (1+0j)}): its options",
        ),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_what_no_model_can_hold_is_refused_with_its_path(kind: Any, sentence: str) -> None:
    assert refusal(kind).startswith(sentence)


def test_an_enum_is_refused_for_values_of_two_kinds_and_for_what_it_reserved() -> None:
    class Two(enum.Enum):
        A = 1
        B = "b"

    @Reserved(numbers=[1])
    class Once(enum.Enum):
        A = 1

    @Reserved(names=["red"])
    class Red(enum.Enum):
        RED = "red"

    assert refusal(Two).startswith("C.op: x: Enums must contain either all str or all int values")
    assert refusal(Once) == "enum Once: number 1 of 'A' is reserved; take another"
    assert refusal(Red) == "enum Red: the name 'RED' is reserved; take another"


def test_two_types_of_one_name_are_refused() -> None:
    other = msgspec.defstruct("Trip", [("id", str)], module="elsewhere")
    with pytest.raises(ContractError) as refused:
        compiled(a=Trip, b=other)
    assert (
        str(refused.value) == f"C.op: b: elsewhere.Trip and {__name__}.Trip are both named 'Trip'; rename one of them"
    )


def test_a_reserved_operation_name_and_a_mark_that_the_decorator_says_are_refused() -> None:
    @Reserved(names=["op"])
    class Named(Contract):
        @request
        async def op(self) -> None: ...

    class Marked(Contract):
        @request
        @Deprecated("old")
        async def op(self) -> None: ...

    with pytest.raises(ContractError, match="contract Named: the operation name 'op' is reserved; take another"):
        model_of(Named)
    with pytest.raises(ContractError, match=r"Marked.op: write deprecated='old' in its decorator, not @Deprecated"):
        model_of(Marked)


def test_compiling_checks_the_contract_too() -> None:
    class Plain(Contract):
        @request
        async def op(self, trip_id): ...  # type: ignore[no-untyped-def]

    with pytest.raises(ContractError, match="needs a type annotation"):
        model_of(Plain)


@pytest.mark.parametrize(
    ("width", "lowest", "highest"),
    [(Int8, -128, 127), (Int64, -(2**63), 2**63 - 1), (UInt16, 0, 65535)],
    ids=["int8", "int64", "uint16"],
)
def test_a_width_bounds_what_is_read(width: Any, lowest: int, highest: int) -> None:
    decode = msgspec.json.Decoder(width).decode
    assert [decode(str(inside).encode()) for inside in (lowest, highest)] == [lowest, highest]
    for outside in (lowest - 1, highest + 1):
        with pytest.raises(msgspec.ValidationError):
            decode(str(outside).encode())
