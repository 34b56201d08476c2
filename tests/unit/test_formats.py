"""Formats: what goes in comes out, whatever the type; what does not fit is refused with the path of its field."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from types import GenericAlias
from typing import Annotated, Any, Literal, TypeAlias
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from msgspec import Meta, Struct

from quintet.compiler import model_of
from quintet.contract import Contract, request
from quintet.errors import ConfigurationError, ContractError, InvalidMessage, UnsupportedMediaType
from quintet.format import Format, by_media_type, format_named, installed
from quintet.model import Float64, Int8, Int16, Int32, Int64, UInt8, UInt16, UInt32, UInt64

FORMATS = installed()
each_format = pytest.mark.parametrize("format_", FORMATS.values(), ids=FORMATS.keys())

Shape: TypeAlias = tuple[Any, SearchStrategy[Any]]
"""A type and its values."""


# types and values of all kinds


class State(enum.Enum):
    WAITING = "waiting"
    DRIVING = "driving"


class Priority(enum.IntEnum):
    LOW = 1
    HIGH = 10


class Card(Struct, frozen=True, tag="card"):
    number: str
    limit: Decimal | None = None


class Cash(Struct, frozen=True, tag="cash"):
    pass


@dataclasses.dataclass(frozen=True)
class Place:
    lat: float
    lon: float = 0.0


def _integers(low: int, high: int) -> SearchStrategy[int]:
    return st.integers(low, high) | st.sampled_from([low, high])


finite = st.floats(allow_nan=False, allow_infinity=False)  # JSON has no others
zones = st.none() | st.just(UTC) | st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
# a day from either end, so that the time stays one in UTC too
times = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30)).flatmap(
    lambda t: zones.map(lambda z: t.replace(tzinfo=z))
)

HASHABLE: list[Shape] = [
    (int, _integers(-(2**63), 2**64 - 1)),
    (Int8, _integers(-(2**7), 2**7 - 1)),
    (Int16, _integers(-(2**15), 2**15 - 1)),
    (Int32, _integers(-(2**31), 2**31 - 1)),
    (Int64, _integers(-(2**63), 2**63 - 1)),
    (UInt8, _integers(0, 2**8 - 1)),
    (UInt16, _integers(0, 2**16 - 1)),
    (UInt32, _integers(0, 2**32 - 1)),
    (UInt64, _integers(0, 2**64 - 1)),
    (float, finite),
    (Float64, finite),
    (str, st.text()),
    (Annotated[str, Meta(max_length=3)], st.text(max_size=3)),
    (bytes, st.binary()),
    (datetime, times),
    (date, st.dates()),
    (time, st.times()),
    (timedelta, st.timedeltas()),
    (UUID, st.uuids()),
    (Decimal, st.decimals(allow_nan=False)),
    (State, st.sampled_from(State)),
    (Priority, st.sampled_from(Priority)),
    (Literal["a", "b"], st.sampled_from(["a", "b"])),
]
SINGLE: list[Shape] = [
    *HASHABLE,
    (bool, st.booleans()),
    (None, st.none()),
    (Place, st.builds(Place, finite, finite)),
    (Card | Cash, st.builds(Card, st.text(), st.none() | st.decimals(allow_nan=False)) | st.just(Cash())),
    (int | str, _integers(-(2**63), 2**63 - 1) | st.text()),
]


def _list(shape: Shape) -> Shape:
    return GenericAlias(list, shape[0]), st.lists(shape[1], max_size=3)


def _any_length(shape: Shape) -> Shape:
    return GenericAlias(tuple, (shape[0], ...)), st.lists(shape[1], max_size=3).map(tuple)


def _optional(shape: Shape) -> Shape:
    return shape[0] | None if shape[0] is not None else None, st.none() | shape[1]


def _pair(shapes: tuple[Shape, Shape]) -> Shape:
    return GenericAlias(tuple, (shapes[0][0], shapes[1][0])), st.tuples(shapes[0][1], shapes[1][1])


def _map(shapes: tuple[Shape, Shape]) -> Shape:
    return GenericAlias(dict, (shapes[0][0], shapes[1][0])), st.dictionaries(shapes[0][1], shapes[1][1], max_size=3)


def _set(shape: Shape) -> Shape:
    return GenericAlias(set, shape[0]), st.sets(shape[1], max_size=3)


def _record(shapes: list[Shape], *, as_dataclass: bool) -> Shape:
    fields = [(f"field_{n}", kind) for n, (kind, _) in enumerate(shapes)]
    made: Any = dataclasses.make_dataclass("Made", fields) if as_dataclass else msgspec.defstruct("Made", fields)
    return made, st.tuples(*(values for _, values in shapes)).map(lambda values: made(*values))


def _larger(inner: SearchStrategy[Shape]) -> SearchStrategy[Shape]:
    keys = st.sampled_from(HASHABLE)
    return st.one_of(
        inner.map(_list),
        inner.map(_any_length),
        inner.map(_optional),
        st.tuples(inner, inner).map(_pair),
        st.tuples(keys, inner).map(_map),
        keys.map(_set),
        st.builds(_record, st.lists(inner, max_size=4), as_dataclass=st.booleans()),
    )


shapes: SearchStrategy[Shape] = st.recursive(st.sampled_from(SINGLE), _larger, max_leaves=6)


@each_format
@pytest.mark.parametrize("shape", SINGLE, ids=lambda shape: str(shape[0]))
def test_a_value_of_each_single_type_comes_out_as_it_went_in(format_: Format, shape: Shape) -> None:
    codec = format_.codec(shape[0])

    @given(shape[1])
    @settings(max_examples=40, deadline=None)
    def check(value: Any) -> None:
        assert codec.decode(codec.encode(value)) == value

    check()


@each_format
@given(shapes.flatmap(lambda shape: st.tuples(st.just(shape[0]), shape[1])))
@settings(max_examples=150, deadline=None)
def test_a_value_of_any_made_up_type_comes_out_as_it_went_in(format_: Format, case: tuple[Any, Any]) -> None:
    kind, value = case
    codec = format_.codec(kind)
    assert codec.decode(codec.encode(value)) == value


@given(shapes)
@settings(max_examples=150, deadline=None)
def test_what_the_formats_carry_the_model_holds(shape: Shape) -> None:
    async def op(self: Any) -> None: ...

    operation = request(op)
    operation.__dict__["result"] = shape[0] if shape[0] is not None else type(None)
    # two made-up records have one name, which is refused; nothing else is
    try:
        model_of(type("C", (Contract,), {"op": operation}))
    except ContractError as error:
        assert "are both named 'Made'" in str(error)  # noqa: PT017


@each_format
@pytest.mark.parametrize("value", [None, True, 1, 1.5, "a", [1, ["a"]], {"a": {"b": None}}], ids=str)
def test_untyped_values_travel_as_they_are(format_: Format, value: Any) -> None:
    codec = format_.codec(Any)
    assert codec.decode(codec.encode(value)) == value


# what may differ between the two sides


class Stop(Struct):
    lat: float
    lon: float = 0.0


class Trip(Struct):
    id: str
    pickup: Stop
    stops: list[Stop] = []
    places: dict[str, Stop] = {}
    ends: tuple[Stop, Stop] | None = None
    pay: Card | Cash = Cash()
    tags: set[Any] = set()


def twin(kind: type[Struct], **changed: Any) -> Any:
    """The type as another version of the contract has it: fields of other types, new ones, or (None) left out."""
    kept: list[Any] = []
    for info in msgspec.structs.fields(kind):
        if info.name not in changed:
            default: Any = info.default
            if info.default_factory is not msgspec.NODEFAULT:
                default = msgspec.field(default_factory=info.default_factory)
            kept.append((info.name, info.type) if default is msgspec.NODEFAULT else (info.name, info.type, default))
    kept += [(name, type_) for name, type_ in changed.items() if type_ is not None]
    return msgspec.defstruct(kind.__name__, kept, kw_only=True)


Blind = twin(Stop, lat=None)
Talking = twin(Stop, lat=str)
Talkative = twin(Stop, colour=str, seats=list[Any])


@each_format
def test_an_unknown_field_is_ignored_at_every_depth(format_: Format) -> None:
    talkative = Talkative(lat=1.0, colour="red", seats=[1, {"a": [2]}])
    kind = twin(Trip, pickup=Talkative, stops=list[Any], more=dict[str, Any])
    sent = kind(id="t-1", pickup=talkative, stops=[talkative], more={"x": [1]})
    assert format_.codec(Trip).decode(format_.codec(kind).encode(sent)) == Trip("t-1", Stop(1.0), [Stop(1.0)])


@each_format
def test_a_missing_field_takes_its_default(format_: Format) -> None:
    class Short(Struct):
        id: str
        pickup: Stop

    assert format_.codec(Trip).decode(format_.codec(Short).encode(Short("t-1", Stop(1.0)))) == Trip("t-1", Stop(1.0))


@each_format
@pytest.mark.parametrize("stop", [Blind, Talking], ids=["missing", "wrong"])
@pytest.mark.parametrize(
    ("path", "build"),
    [
        ("pickup.lat", lambda stop: {"pickup": stop}),
        ("stops[1].lat", lambda stop: {"pickup": Stop(1.0), "stops": [Stop(1.0), stop]}),
        ("places[...].lat", lambda stop: {"pickup": Stop(1.0), "places": {"home": stop}}),
        ("ends[1].lat", lambda stop: {"pickup": Stop(1.0), "ends": (Stop(1.0), stop)}),
    ],
    ids=["in a record", "in a list", "in a dict", "in a tuple"],
)
def test_a_field_that_is_missing_or_wrong_is_refused_with_its_path(
    format_: Format, stop: Any, path: str, build: Callable[[Struct], dict[str, Any]]
) -> None:
    sent = stop() if stop is Blind else stop(lat="north")
    kind = twin(Trip, pickup=Any, stops=list[Any], places=dict[str, Any], ends=Any)
    record = kind(**{"id": "t-1", "stops": [], "places": {}, "ends": None, **build(sent)})
    with pytest.raises(InvalidMessage) as refused:
        format_.codec(Trip).decode(format_.codec(kind).encode(record))
    said = "missing required field" if stop is Blind else "Expected `float`, got `str`"
    assert (refused.value.path, str(refused.value)) == (path, f"{path}: {said}")


@each_format
@pytest.mark.parametrize(
    ("kind", "sent", "path", "said"),
    [
        (Trip, {"pickup": {"lat": 1.0}}, "id", "missing required field"),
        (Trip, [1], "", "Expected `object`, got `array`"),
        (Trip, {"id": 3, "pickup": {}}, "id", "Expected `str`, got `int`"),
        (Trip, {"id": "t", "pickup": None}, "pickup", "Expected `object`, got"),
        (Trip, {"id": "t", "pickup": {"lat": 1}, "pay": {"type": "gold"}}, "pay.type", "Invalid value 'gold'"),
        (Trip, {"id": "t", "pickup": {"lat": 1}, "pay": {"number": "1"}}, "pay.type", "missing required field"),
        (Trip, {"id": "t", "pickup": {"lat": 1}, "pay": {"type": "card"}}, "pay.number", "missing required field"),
        (Place, {}, "lat", "missing required field"),
        (list[Stop], [{"lat": 1}, {}], "[1].lat", "missing required field"),
        (dict[int, int], {1: "a"}, "[...]", "Expected `int`, got `str`"),
        (dict[str, dict[int, int]], {"a": {"b": 1}}, "[...]", "Expected `int`, got `str`"),
        (Int8, 128, "", "Expected `int` <= 127"),
        (State, "flying", "", "Invalid enum value 'flying'"),
        (datetime, "yesterday", "", "Invalid RFC3339 encoded datetime"),
        (UUID, "t-1", "", "Invalid UUID"),
        (Decimal, "one", "", "Invalid decimal string"),
        (tuple[int, int], [1], "", "Expected `array` of length 2"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    format_: Format, kind: Any, sent: Any, path: str, said: str
) -> None:
    with pytest.raises(InvalidMessage) as refused:
        format_.codec(kind).decode(format_.codec(Any).encode(sent))
    assert refused.value.path == path
    assert str(refused.value).startswith(f"{path}: {said}" if path else said)


class Picky(Struct):
    word: str

    def __post_init__(self) -> None:
        raise ValueError("no good - at `$.elsewhere`")


class Asking(Struct):
    picky: Picky


@each_format
def test_a_complaint_that_quotes_a_path_itself_does_not_mislead(format_: Format) -> None:
    with pytest.raises(InvalidMessage) as refused:
        format_.codec(Asking).decode(format_.codec(Any).encode({"picky": {"word": "x"}}))
    assert refused.value.path == "picky"


# bytes that nobody meant


class Everything(Struct):
    trip: Trip
    at: datetime | None = None
    wait: timedelta | None = None
    price: Decimal = Decimal(1)
    key: UUID | None = None
    body: bytes = b""
    anything: Any = None
    ids: set[Any] = set()
    table: dict[Any, Any] = {}
    numbers: dict[int, float] = {}
    state: State = State.WAITING
    again: Everything | None = None


SAMPLE = Everything(
    Trip("t-1", Stop(1.0), [Stop(2.0)], {"home": Stop(3.0)}, (Stop(1.0), Stop(2.0)), Card("1", Decimal("2.5"))),
    datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    timedelta(hours=1),
    key=UUID(int=7),
    body=b"\x00\xff",
    anything={"a": [1, None, "ü"]},
    ids={1, "a"},
    table={"a": 1},
    numbers={1: 2.0},
    again=Everything(Trip("t-2", Stop(4.0))),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def only_refuses(format_: Format, kind: Any, body: bytes) -> None:
    try:
        format_.codec(kind).decode(body)
    except InvalidMessage as error:
        assert str(error)  # noqa: PT017


@each_format
@pytest.mark.parametrize("kind", [Everything, Any, list[Stop], Decimal, timedelta, set[Any]], ids=str)
def test_arbitrary_bytes_are_refused_and_nothing_else_happens(format_: Format, kind: Any) -> None:
    @given(st.binary(max_size=64))
    @settings(max_examples=100, deadline=None)
    def check(body: bytes) -> None:
        only_refuses(format_, kind, body)

    check()


@each_format
@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_message_is_refused_or_read_and_nothing_else_happens(format_: Format, data: st.DataObject) -> None:
    body = bytearray(format_.codec(Everything).encode(SAMPLE))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, max(0, len(body) - 1)))
        how = data.draw(st.sampled_from(["change", "insert", "delete", "cut"]))
        if how == "change":
            body[place : place + 1] = data.draw(st.binary(min_size=1, max_size=1))  # the body may be empty by now
        elif how == "insert":
            body[place:place] = data.draw(st.binary(min_size=1, max_size=4))
        elif how == "delete":
            del body[place : place + 1]
        else:
            del body[max(1, place) :]
    only_refuses(format_, Everything, bytes(body))


@each_format
def test_every_truncated_message_is_refused(format_: Format) -> None:
    codec = format_.codec(Everything)
    body = codec.encode(SAMPLE)
    for length in range(len(body)):
        with pytest.raises(InvalidMessage):
            codec.decode(body[:length])


@given(json_values, st.sampled_from([Everything, Trip, Card | Cash, dict[State, Decimal], list[timedelta], set[Any]]))
@settings(max_examples=300, deadline=None)
def test_well_formed_json_of_another_shape_is_refused_and_nothing_else_happens(value: Any, kind: Any) -> None:
    only_refuses(FORMATS["json"], kind, json.dumps(value).encode())


@pytest.mark.parametrize(
    ("name", "opening", "closing"),
    [("json", b"[", b"]"), ("json", b'{"anything":', b"}"), ("msgpack", b"\x91", b""), ("msgpack", b"\x81\xa1a", b"")],
)
@pytest.mark.parametrize("kind", [Any, Stop, Everything], ids=str)
def test_a_message_that_is_nested_too_deep_is_refused(name: str, opening: bytes, closing: bytes, kind: Any) -> None:
    prefix = {"json": b'{"x":', "msgpack": b"\x81\xa1x"}[name]  # an unknown field must not be a way around
    for body in (opening * 100_000 + b"1" + closing * 100_000, prefix + opening * 100_000):
        with pytest.raises(InvalidMessage):
            FORMATS[name].codec(kind).decode(body)
    with pytest.raises(InvalidMessage, match="the body is nested too deep"):
        FORMATS[name].codec(kind).decode(prefix + opening * 100_000)


@pytest.mark.parametrize(("name", "body"), [("json", b'"\xff"'), ("msgpack", b"\xa1\xff")])
def test_text_that_is_not_utf_8_is_refused(name: str, body: bytes) -> None:
    with pytest.raises(InvalidMessage, match="UTF-8"):
        FORMATS[name].codec(str).decode(body)


@pytest.mark.parametrize("body", [b"", b"{", b'{"lat": 1.0}}', b"nul", b"{'lat': 1}", b'{"lat": NaN}', b'"\\ud800"'])
def test_malformed_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidMessage):
        FORMATS["json"].codec(Stop).decode(body)


def test_an_item_that_is_not_hashable_is_refused() -> None:
    with pytest.raises(InvalidMessage, match="hashable"):
        FORMATS["json"].codec(set[Any]).decode(b"[[1]]")


# types that must never be decoded into


@dataclasses.dataclass
class Broken(Exception):
    reason: str


class Holder(Struct):
    broken: dict[str, list[Broken | None]] = {}
    again: Holder | None = None


@each_format
@pytest.mark.parametrize("kind", [Broken, list[Broken], Holder, tuple[int, Holder], Holder | None], ids=str)
def test_a_dataclass_that_is_an_exception_is_refused_because_decoding_it_would_crash(
    format_: Format, kind: Any
) -> None:
    with pytest.raises(ContractError, match="Broken is an exception, it cannot be carried; write a Struct instead"):
        format_.codec(kind)


# the formats there are


def test_formats_are_found_by_name_and_media_type() -> None:
    assert next(iter(FORMATS)) == "json"
    assert {"json", "msgpack"} <= set(FORMATS)
    for name, format_ in FORMATS.items():
        assert format_named(name) is format_
        assert by_media_type("trips.get", format_.media_type) == name


def test_an_unknown_format_or_media_type_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigurationError, match="unknown format 'yaml'; installed are json, msgpack"):
        format_named("yaml")
    with pytest.raises(UnsupportedMediaType, match=r"trips\.get: cannot read 'text/csv'; send application/json or"):
        by_media_type("trips.get", "text/csv")
    with pytest.raises(UnsupportedMediaType, match="cannot read 'a body of no media type'"):
        by_media_type("trips.get", "")
