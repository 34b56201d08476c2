"""A mock answers every operation with values that fit the contract, or with those that it was given."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict
from uuid import UUID

import msgspec
import pytest
from msgspec import Meta, Struct

from quintet import Contract, Declined, Fault, async_request, event, notification, request, survey
from quintet.errors import ConfigurationError
from quintet.mock import Case, made_up, mock, read_answers
from quintet.testing import harness

# mypy: disable-error-code="empty-body"


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Cash(Struct, tag="cash"):
    cents: Annotated[int, Meta(ge=1, le=500)]


class Card(Struct, tag="card", tag_field="kind"):
    number: Annotated[str, Meta(pattern=r"^\d{4}-(\d\d|[A-F]{2})[a-z_]?$")]


class Tree(Struct):
    name: str
    children: list[Tree]
    best: Tree | None


class Point(Struct, array_like=True):
    x: float
    y: float


class Pair(NamedTuple):
    left: int
    right: str


class Typed(TypedDict):
    name: str


@dataclass
class Data:
    when: datetime
    renamed: int = 7


class Renamed(Struct, rename="camel"):
    first_name: str
    last_seen: datetime


class Endless(Struct):
    again: Endless


IMPOSSIBLE = [Endless, Annotated[str, Meta(pattern="[^x]y")], Annotated[int, Meta(multiple_of=7, ge=1, le=3)]]
TYPES: list[Any] = [
    None, bool, int, float, str, bytes, Decimal, UUID, date, time, datetime, timedelta, Any,
    Colour, Literal["a", 3], Cash, Card, Tree, Point, Pair, Typed, Data, Renamed,
    int | None, str | int, list[int], set[str], frozenset[int], tuple[int, ...], tuple[int, str], dict[str, int],
    dict[int, Cash], Sequence[str],
    Annotated[int, Meta(gt=10, lt=12)], Annotated[int, Meta(ge=100, multiple_of=7)], Annotated[int, Meta(le=-5)],
    Annotated[int, Meta(ge=100_000)], Annotated[float, Meta(ge=-90, le=90)], Annotated[float, Meta(gt=0, lt=0.5)],
    Annotated[str, Meta(min_length=40)], Annotated[str, Meta(max_length=2)], Annotated[str, Meta(max_length=0)],
    Annotated[list[int], Meta(min_length=3)], Annotated[list[int], Meta(max_length=0)],
    Annotated[bytes, Meta(min_length=12)], Annotated[datetime, Meta(tz=True)], Annotated[datetime, Meta(tz=False)],
]  # fmt: skip


@pytest.mark.parametrize("type_", TYPES, ids=str)
def test_a_made_up_value_fits_its_type_and_is_the_same_for_the_same_seed(type_: Any) -> None:
    for seed in range(20):
        value = made_up(type_, random.Random(seed), "thing")
        assert made_up(type_, random.Random(seed), "thing") == value
        assert msgspec.json.decode(msgspec.json.encode(value), type=type_) == value


@pytest.mark.parametrize("type_", IMPOSSIBLE, ids=str)
def test_a_type_of_which_no_value_can_be_made_up_is_refused_in_a_sentence(type_: Any) -> None:
    with pytest.raises(ConfigurationError, match="made up"):
        made_up(type_, random.Random(0), "thing")


class Trip(Struct):
    id: str
    passenger_id: str
    price: int
    active: bool = True


class NoSuchTrip(Fault, status=404):
    trip_id: str


class Trips(Contract, name="mocktrips"):
    @request(faults=[NoSuchTrip])
    async def get(self, trip_id: str) -> Trip: ...

    @request
    async def create(self, passenger_id: str, note: str = "") -> Trip: ...

    @notification
    async def seen(self, trip_id: str) -> None: ...

    @async_request(faults=[NoSuchTrip])
    async def bill(self, trip_id: str) -> Trip: ...

    @event
    async def created(self, trip: Trip) -> None: ...

    @survey
    async def offers(self, trip_id: str) -> int: ...


async def test_a_mock_without_answers_answers_all_that_can_be_asked() -> None:
    service = mock(Trips)
    async with harness(service) as running:
        trips = running.connect(Trips)
        trip = await trips.create("p-1")
        assert trip.passenger_id == "p-1", "what the caller said is in the reply"
        assert trip.active, "a default is kept"
        assert trip == await trips.create("p-1")
        assert trip != await trips.create("p-2")
        await trips.seen("t-1")
        await running.handled(Trips.seen)
        assert isinstance(await (await trips.bill("t-1")), Trip)
        async with service.ask(Trips.offers, "t-1").within(5.0, enough=1) as answers:
            assert [type(answer.value) async for answer in answers] == [int]


async def test_another_seed_makes_other_answers_up() -> None:
    found = []
    for seed in (1, 2):
        async with harness(mock(Trips, seed=seed)) as running:
            found.append(await running.connect(Trips).get("t-1"))
    assert found[0] != found[1]


ANSWERS = """
[[get]]
when = { trip_id = "t-9" }
fault = { NoSuchTrip = { trip_id = "t-9" } }

[[get]]
when = { trip_id = "t-1" }
answer = { id = "t-1", passenger_id = "p-1", price = 12 }

[bill]
fault = { NoSuchTrip = { trip_id = "x" } }

[offers]
declined = true
"""


async def test_given_answers_are_given_where_their_parameters_fit(tmp_path: Path) -> None:
    file = tmp_path / "answers.toml"
    file.write_text(ANSWERS)
    service = mock(Trips, read_answers(file))
    async with harness(service) as running:
        trips = running.connect(Trips)
        assert await trips.get("t-1") == Trip("t-1", "p-1", 12)
        for _ in range(2):
            with pytest.raises(NoSuchTrip) as caught:
                await trips.get("t-9")
            assert caught.value == NoSuchTrip(trip_id="t-9")
        assert (await trips.get("t-5")).price >= 0, "what no case fits is made up"
        with pytest.raises(NoSuchTrip):
            await (await trips.bill("t-1"))
        with pytest.raises(Declined):
            await service.handlings[Trips.offers].function("t-1")


@pytest.mark.parametrize(
    ("answers", "complaint"),
    [
        ({"gett": Case()}, "answers for gett: Trips has only get, create"),
        ({"get": Case(answer={"id": "t-1"})}, "answer does not fit the contract: .*passenger_id"),
        ({"get": Case(when={"id": "t-1"})}, "when names id, no parameter of it"),
        ({"get": Case(when={"trip_id": 5})}, r"when\.trip_id does not fit"),
        ({"get": Case(fault={"Nope": {}})}, "declares no fault 'Nope'; it declares: NoSuchTrip"),
        ({"get": Case(fault={"NoSuchTrip": {}})}, "fault NoSuchTrip does not fit"),
        ({"get": Case(answer=1, declined=True)}, "one of answer, fault and declined"),
        ({"get": Case(declined=True)}, "only a survey can be declined"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused_at_start_up(answers: dict[str, Case], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        mock(Trips, answers)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.toml", "[get", "is no TOML"),
        ("a.json", "{", "is no JSON"),
        ("a.json", '{"get": {"anser": 1}}', "unknown field `anser`.*a case has when, answer"),
        ("a.toml", "get = 3", "a case has when, answer"),
    ],
)
def test_a_file_of_answers_that_cannot_be_read_is_named(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        read_answers(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_answers(tmp_path / "nowhere.toml")
