# mypy: disable-error-code="empty-body"
"""The REST binding: what goes in comes out at every level, and a message that is wrong says where."""

from __future__ import annotations

import contextlib
import datetime as dt
import enum
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta, Struct

from quintet.binding import PENDING
from quintet.bindings.rest import Rest, bind, negotiate
from quintet.compiler import model_of
from quintet.contract import Contract, Fault, Http, Link, async_request, event, notification, request
from quintet.errors import (
    BY_CODE,
    CallError,
    ContractError,
    InvalidMessage,
    NotAcceptable,
    Overloaded,
    RemoteError,
    Safety,
    TooLarge,
    UnknownOperation,
    UnsupportedMediaType,
)
from quintet.message import Message
from quintet.outcome import ANSWERED, OUTCOMES, outcome_of
from quintet.wire.http import ATTEMPT, FIELDS, TIMEOUT, NotRouted, Response, Router, read_response

HAL, JSON, MSGPACK, PROBLEM = (f"application/{name}" for name in ("hal+json", "json", "msgpack", "problem+json"))


class State(enum.Enum):
    OPEN = "open"
    DONE = "done/with spaces & more"


class Seats(enum.IntEnum):
    TWO = 2
    FOUR = 4


class Place(Struct):
    lat: float
    lon: float


class Trip(Struct):
    id: str
    state: State = State.OPEN
    pickup: Place | None = None


@dataclass
class Note:
    text: str


class Made(Struct, omit_defaults=True):
    id: str = ""


class NoSuchTrip(Fault, status=404):
    trip_id: str


class TooFar(Fault, status=409):
    km: float
    nearest: Place | None = None


class Odd(Fault, status=418):
    title: str
    type: int
    fields: list[str] = []


def trips_at(level: int) -> type[Contract]:
    """The contract that most tests speak of, at a level of Richardson's model."""

    class Trips(Contract, name="trips", version="2.1", http_level=level):
        @request(
            http=Http("GET /trips/{trip_id}", cache="max-age=5"),
            faults=[NoSuchTrip, TooFar, Odd],
            links={
                "cancel": Link("cancel", when=lambda trip: trip.state is State.OPEN, fill={"trip_id": "id"}),
                "around": Link("around", fill={"trip": "id"}),
                "receipt": Link("receipt", fill={"trip_id": "id"}),
            },
        )
        async def get(self, trip_id: str) -> Trip: ...
        @request(http=Http("POST /trips", location="/trips/{id}"))
        async def create(self, trip: Trip) -> Trip: ...
        @request(http="PATCH /trips/{trip_id}")
        async def move(self, trip_id: str, pickup: Place, reason: str = "moved") -> Trip: ...
        @request(http="DELETE /trips/{trip_id}")
        async def cancel(self, trip_id: str, reason: str = "") -> None:
            """Give it up.

            For ever."""

        @request(http="GET /trips")
        async def around(
            self, trip: str = "", near: float | None = None, states: Sequence[State] = ()
        ) -> list[Trip]: ...
        @notification(http="POST /pickups/{passenger_id}")
        async def request_pickup(self, passenger_id: uuid.UUID) -> None: ...
        @async_request(http="POST /trips/{trip_id}/receipt")
        async def receipt(self, trip_id: str, copies: int = 1) -> Trip: ...
        @event
        async def created(self, trip: Trip) -> None: ...
        @request
        async def note(self, note: Note) -> dict[str, int]: ...
        @request
        async def ping(self) -> None: ...

    return Trips


TRIPS = {level: trips_at(level) for level in range(4)}


@cache
def bound(name: str, level: int = 2, format_name: str = "json") -> Rest:
    operations = TRIPS[level].__quintet__.operations
    operation_name, _, companion = name.partition(".")
    operation = operations[operation_name]
    if companion:
        operation = operation.companions[("result", "cancel").index(companion)]
    return bind(operation, format_name)


def arrive(binding: Rest, message: Message, **headers: str) -> Message:
    """The request as the service receives it: through the router of the http transport."""
    router: Router[Rest] = Router()
    router.add(binding.channel.route, binding)
    method, path = message.headers[":method"], message.headers[":path"]
    _, found = router.find(method, path.partition("?")[0], message.operation)
    return Message(
        channel=binding.channel,
        id=message.id,
        operation=message.operation,
        media_type=message.media_type,
        body=message.body,
        headers=message.headers | found | headers,
    )


def curl(binding: Rest, path: str, body: bytes = b"", media_type: str = JSON, **headers: str) -> Message:
    """A request that someone wrote by hand."""
    method = binding.channel.route.partition(" ")[0]
    written = {":method": method, ":path": path} | {name.replace("_", "-"): value for name, value in headers.items()}
    return arrive(
        binding,
        Message(
            channel=binding.channel,
            operation=binding.operation.full_name,
            body=body,
            media_type=media_type,
            headers=written,
        ),
    )


def answered(binding: Rest, value: Any, path: str = "/", **headers: str) -> Message:
    given = {":path": path} | {name.replace("_", "-"): text for name, text in headers.items()}
    return binding.reply(Message(channel=binding.channel, id="m-1", headers=given), value)


# --- routes

ROUTES = [
    # operation, level 0, level 1, levels 2 and 3
    ("get", "POST /v2/trips#trips.get", "POST /v2/trips/{trip_id}#trips.get", "GET /v2/trips/{trip_id}"),
    ("create", "POST /v2/trips#trips.create", "POST /v2/trips#trips.create", "POST /v2/trips"),
    ("move", "POST /v2/trips#trips.move", "POST /v2/trips/{trip_id}#trips.move", "PATCH /v2/trips/{trip_id}"),
    ("cancel", "POST /v2/trips#trips.cancel", "POST /v2/trips/{trip_id}#trips.cancel", "DELETE /v2/trips/{trip_id}"),
    ("note", "POST /v2/trips#trips.note", "POST /v2/trips/note", "POST /v2/trips/note"),
    ("receipt", "POST /v2/trips#trips.receipt", "POST /v2/trips/{trip_id}/receipt", "POST /v2/trips/{trip_id}/receipt"),
    (
        "receipt.result",
        "POST /v2/trips#trips.receipt.result",
        "POST /v2/trips/receipt/pending/{id}#trips.receipt.result",
        "GET /v2/trips/receipt/pending/{id}",
    ),
    (
        "receipt.cancel",
        "POST /v2/trips#trips.receipt.cancel",
        "POST /v2/trips/receipt/pending/{id}#trips.receipt.cancel",
        "DELETE /v2/trips/receipt/pending/{id}",
    ),
]


@pytest.mark.parametrize(("name", "zero", "one", "two"), ROUTES)
def test_each_level_has_its_routes(name: str, zero: str, one: str, two: str) -> None:
    assert [bound(name, level).channel.route for level in range(4)] == [zero, one, two, two]


@pytest.mark.parametrize("level", range(4))
def test_all_operations_of_a_contract_can_be_routed_together(level: int) -> None:
    router: Router[str] = Router()
    names = [name for name in TRIPS[level].__quintet__.operations if name != "created"]
    for name in [*names, "receipt.result", "receipt.cancel"]:
        router.add(bound(name, level).channel.route, name)


def test_literal_pieces_of_a_path_are_percent_encoded() -> None:
    class Boats(Contract):
        @request(http="GET /fähren/100%25/{name}")
        async def get(self, name: str) -> None: ...
        @request(http=Http("POST /fähren", location="/fähren/{id}"))
        async def build(self) -> Made: ...

    binding = bind(Boats.get, "json")
    message = binding.request(Boats.get.record("é"))
    assert message.headers[":path"] == "/v1/f%C3%A4hren/100%25/%C3%A9"
    assert binding.arguments(arrive(binding, message)) == Boats.get.record("é")
    assert answered(bind(Boats.build, "json"), Made("é")).headers["location"] == "/v1/f%C3%A4hren/%C3%A9"


# --- what cannot be served over REST


def refusals() -> list[tuple[str, Callable[..., Any], Any]]:
    async def record(self: Any, near: Place) -> None: ...
    async def either(self: Any, near: int | str) -> None: ...
    async def mixed(self: Any, near: Literal[1, "1"]) -> None: ...
    async def mapping(self: Any, near: dict[str, int]) -> None: ...
    async def pair(self: Any, near: tuple[int, str]) -> None: ...
    async def records(self: Any, near: list[Place]) -> None: ...
    async def unless(self: Any, near: str | None = "x") -> None: ...
    async def full(self: Any, near: tuple[int, ...] = (1,)) -> None: ...
    async def no_list(self: Any, near: list[int] | None = None) -> None: ...
    async def text(self: Any, near: str) -> None: ...
    async def trip(self: Any, near: str) -> Trip: ...

    stands, empty = "cannot stand in a query", "make its default the empty list"
    always = "is one value that is always there"
    return [
        (stands, record, "GET /x"),
        (stands, record, "DELETE /x"),
        ("cannot stand in a path", record, "POST /x/{near}"),
        (stands, either, "GET /x"),
        (stands, mixed, "GET /x"),
        (stands, mapping, "GET /x"),
        (stands, pair, "GET /x"),
        (stands, records, "GET /x"),
        ("make its default None", unless, "GET /x"),
        (empty, full, "GET /x"),
        (empty, no_list, "GET /x"),
        (always, unless, "GET /x/{near}"),
        (always, full, "GET /x/{near}"),
        ("takes a whole segment", text, "GET /x/{near}.json"),
        ("takes a whole segment", text, "GET /x/{near}/{near}"),
        ("status=204", trip, Http("GET /x", status=204)),
        ("status=404", text, Http("GET /x", status=404)),
        ("the reply has no trip_id", trip, Http("POST /x", location="/x/{trip_id}")),
        ("the reply has no id", text, Http("POST /x", location="/x/{id}")),
    ]


@pytest.mark.parametrize(("said", "function", "http"), refusals())
def test_what_rest_cannot_carry_is_refused_at_start_up(said: str, function: Callable[..., Any], http: Any) -> None:
    class Odd(Contract):
        operation = request(http=http)(function)

    with pytest.raises(ContractError, match=said) as raised:
        bind(Odd.operation, "json")
    assert "Odd.operation" in str(raised.value)


def test_an_event_is_no_business_of_rest() -> None:
    with pytest.raises(ContractError, match="publish/subscribe"):
        bound("created")


def test_links_need_a_reply_that_is_a_record() -> None:
    class Odd(Contract, http_level=3):
        @request(links={"next": "get"})
        async def get(self) -> list[int]: ...

    with pytest.raises(ContractError, match="links are carried by a reply that is a record"):
        bind(Odd.get, "json")


def test_level_one_wants_one_spelling_of_a_path() -> None:
    class Odd(Contract, http_level=1):
        @request(http="GET /x/{a}")
        async def get(self, a: str) -> None: ...
        @request(http="DELETE /x/{b}")
        async def drop(self, b: str) -> None: ...

    with pytest.raises(ContractError, match=r"written one way: /x/\{a\}, /x/\{b\}"):
        bind(Odd.get, "json")


# --- parameters in path, query and body

TEXTS = [
    "a/b",
    "%",
    "100%25",
    "?",
    "#",
    "..",
    ".",
    "...",
    "a b",
    "a+b",
    "&=;",
    "é",
    "日本",
    "\U0001f695",
    "\n\r\0",
    "~-_.",
    "null",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("level", [1, 2, 3])
def test_any_text_but_the_empty_one_stands_in_a_path(text: str, level: int) -> None:
    binding = bound("cancel", level)
    sent = binding.operation.record(text, text)
    message = binding.request(sent)
    assert message.headers[":path"].isascii()
    assert "/../" not in message.headers[":path"].partition("?")[0] + "/"
    assert binding.arguments(arrive(binding, message)) == sent


def test_an_empty_text_cannot_stand_in_a_path() -> None:
    with pytest.raises(InvalidMessage, match="trip_id") as raised:
        bound("get").request(bound("get").operation.record(""))
    assert raised.value.path == "trip_id"


@pytest.mark.parametrize("name", ["get", "cancel"])
def test_half_a_surrogate_pair_is_refused(name: str) -> None:
    with pytest.raises(InvalidMessage, match="half a surrogate pair"):
        bound(name).request(bound(name).operation.record("\ud800"))


def test_get_has_no_body_and_no_media_type() -> None:
    message = bound("get").request(bound("get").operation.record("t-1"))
    assert (message.body, message.media_type) == (b"", "")
    assert message.headers == {":method": "GET", ":path": "/v2/trips/t-1", "accept": JSON}


def test_a_list_is_a_repeated_key_and_what_is_none_is_left_out() -> None:
    binding = bound("around")
    message = binding.request(binding.operation.record(states=[State.OPEN, State.DONE]))
    assert message.headers[":path"] == "/v2/trips?trip=&states=open&states=done%2Fwith%20spaces%20%26%20more"


READ = [
    ("?near=1.5&trip=t%2F1", {"near": 1.5, "trip": "t/1"}),
    ("", {}),
    ("?", {}),
    ("?&&", {}),
    ("?unknown=1&near=2", {"near": 2.0}),
    ("?trip=a+b%2Bc", {"trip": "a b+c"}),
    ("?trip", {"trip": ""}),
    ("?trip=a=b", {"trip": "a=b"}),
    ("?tr%69p=x", {"trip": "x"}),
    ("?states=open&trip=x&states=open", {"trip": "x", "states": [State.OPEN, State.OPEN]}),
]


@pytest.mark.parametrize(("query", "meant"), READ)
def test_a_query_is_read_as_forms_write_it(query: str, meant: dict[str, Any]) -> None:
    binding = bound("around")
    assert binding.arguments(curl(binding, f"/v2/trips{query}")) == binding.operation.record(**meant)


UNFIT = [
    ("around", "/v2/trips?near=far", b"", "near", "near='far': Expected `float"),
    ("around", "/v2/trips?near=", b"", "near", "near='': Expected `float"),
    ("around", "/v2/trips?near=1&near=2", b"", "near", "near: given 2 times"),
    ("around", "/v2/trips?states=open&states=shut", b"", "states", "Invalid enum value 'shut'"),
    ("around", "/v2/trips?trip=%FF", b"", "", "not UTF-8"),
    ("around", "/v2/trips?%FF=1", b"", "", "not UTF-8"),
    ("request_pickup", "/v2/pickups/7", b"", "passenger_id", "Invalid UUID"),
    ("create", "/v2/trips", b'{"id":"t","pickup":{"lat":"x","lon":1}}', "pickup.lat", "Expected `float`"),
    ("create", "/v2/trips", b"{}", "id", "missing required field"),
    ("create", "/v2/trips", b"", "trip", "the request has no body"),
    ("move", "/v2/trips/t-1", b'{"lat":1}', "lon", "missing required field"),
    ("move", "/v2/trips/t-1", b"{}", "lat", "missing required field"),
    ("receipt", "/v2/trips/t-1/receipt", b'{"copies":"two"}', "copies", "Expected `int`"),
]


@pytest.mark.parametrize(("name", "path", "body", "where", "said"), UNFIT)
def test_what_does_not_fit_the_contract_names_the_field(
    name: str, path: str, body: bytes, where: str, said: str
) -> None:
    with pytest.raises(InvalidMessage) as raised:
        bound(name).arguments(curl(bound(name), path, body))
    assert raised.value.path == where
    assert said in str(raised.value)


def test_a_required_parameter_of_a_query_is_missed_by_name() -> None:
    class Fares(Contract):
        @request(http="GET /fares")
        async def fare(
            self, km: Annotated[int, Meta(ge=1)], tags: list[str], via: str | None, *, day: dt.date
        ) -> None: ...

    binding = bind(Fares.fare, "json")
    read = binding.arguments(curl(binding, "/v1/fares?km=3&day=2026-11-22"))
    assert read == Fares.fare.record(3, [], None, day=dt.date(2026, 11, 22))
    for query, path in [("day=2026-11-22", "km"), ("km=0&day=2026-11-22", "km"), ("km=3", "day")]:
        with pytest.raises(InvalidMessage) as raised:
            binding.arguments(curl(binding, f"/v1/fares?{query}"))
        assert raised.value.path == path


BODIES = [
    ("create", 2, (Trip("t"),), {"id": "t", "state": "open", "pickup": None}),  # the one record is the body
    ("create", 0, (Trip("t"),), {"trip": {"id": "t", "state": "open", "pickup": None}}),
    ("note", 2, (Note("hi"),), {"text": "hi"}),
    ("move", 2, ("t", Place(1, 2)), {"lat": 1, "lon": 2}),  # what has a default travels in the query
    ("move", 1, ("t", Place(1, 2)), {"lat": 1, "lon": 2}),
    ("move", 0, ("t", Place(1, 2)), {"trip_id": "t", "pickup": {"lat": 1, "lon": 2}, "reason": "moved"}),
    ("receipt", 2, ("t", 3), {"copies": 3}),
    ("get", 1, ("t",), None),
    ("get", 0, ("t",), {"trip_id": "t"}),
    ("around", 1, ("t", 1.5), {"trip": "t", "near": 1.5, "states": []}),
    ("request_pickup", 2, (uuid.UUID(int=1),), None),
    ("ping", 0, (), None),
]


@pytest.mark.parametrize(("name", "level", "arguments", "body"), BODIES)
def test_the_rest_of_the_parameters_is_the_body(name: str, level: int, arguments: Any, body: Any) -> None:
    binding = bound(name, level)
    message = binding.request(binding.operation.record(*arguments))
    assert (msgspec.json.decode(message.body) if message.body else None) == body
    assert message.media_type == (JSON if message.body else "")


def test_a_body_of_which_all_is_optional_may_be_left_out() -> None:
    binding = bound("receipt")
    assert binding.arguments(curl(binding, "/v2/trips/t-1/receipt", media_type="")) == binding.operation.record("t-1")


@pytest.mark.parametrize("media_type", [JSON, "application/vnd.trip+json", ""])
def test_json_is_read_by_all_its_names(media_type: str) -> None:
    read = bound("create").arguments(curl(bound("create"), "/v2/trips", b'{"id":"t","more":1}', media_type))
    assert read == bound("create").operation.record(Trip("t"))


def test_any_installed_format_is_read_and_others_are_refused_by_name() -> None:
    body = msgspec.msgpack.encode(Trip("t"))
    read = bound("create").arguments(curl(bound("create"), "/v2/trips", body, MSGPACK))
    assert read == bound("create").operation.record(Trip("t"))
    with pytest.raises(UnsupportedMediaType, match=f"'text/csv'; send one of {JSON}, {MSGPACK}"):
        bound("create").arguments(curl(bound("create"), "/v2/trips", b"t", "text/csv"))


class Placed(Contract, name="placed"):
    """Which parameters are the body: only those without a default decide."""

    @request
    async def one(self, trip: Trip) -> None: ...
    @request
    async def beside(self, trip: Trip, note: str = "", state: State = State.OPEN, tags: Sequence[str] = ()) -> None: ...
    @request
    async def two(self, trip: Trip, place: Place) -> None: ...
    @request
    async def value(self, text: str, place: Place | None = None) -> None: ...
    @request
    async def defaulted(self, trip: Trip | None = None) -> None: ...
    @request
    async def optional(self, trip: Trip | None) -> None: ...
    @request
    async def mapping(self, counts: dict[str, int], note: str = "") -> None: ...


T = {"id": "t", "state": "open", "pickup": None}


@pytest.mark.parametrize(
    ("name", "arguments", "query", "body"),
    [
        ("one", (Trip("t"),), "", T),
        ("beside", (Trip("t"),), "?note=&state=open", T),
        ("beside", (Trip("t"), "a&b", State.DONE, ["c", "d"]),
         "?note=a%26b&state=done%2Fwith%20spaces%20%26%20more&tags=c&tags=d", T),
        ("two", (Trip("t"), Place(1, 2)), "", {"trip": T, "place": {"lat": 1, "lon": 2}}),
        ("value", ("x", Place(1, 2)), "", {"text": "x", "place": {"lat": 1, "lon": 2}}),
        ("defaulted", (Trip("t"),), "", {"trip": T}),
        ("optional", (Trip("t"),), "", {"trip": T}),
        ("mapping", ({"a": 1}, "b"), "?note=b", {"a": 1}),
    ],
)  # fmt: skip
def test_only_parameters_without_a_default_decide_what_the_body_is(
    name: str, arguments: Any, query: str, body: Any
) -> None:
    binding = bind(getattr(Placed, name), "json")
    sent = binding.operation.record(*arguments)
    message = binding.request(sent)
    assert message.headers[":path"] == f"/v1/placed/{name}{query}"
    assert msgspec.json.decode(message.body) == body
    assert binding.arguments(arrive(binding, message)) == sent


def test_a_second_shape_of_a_body_is_not_read() -> None:
    binding = bind(Placed.beside, "json")
    with pytest.raises(InvalidMessage, match="id: missing required field"):
        binding.arguments(curl(binding, "/v1/placed/beside", b'{"trip":{"id":"t"},"note":"x"}'))


@pytest.mark.parametrize(
    ("added", "default", "why"),
    [
        (Place | None, None, "its type cannot stand in a query"),
        (dict[str, int], {}, "its type cannot stand in a query"),
        (list[int] | None, None, "in a query an empty list looks like none given"),
        (tuple[int, ...], (1,), "in a query an empty list looks like none given"),
        (str | None, "x", "in a query None looks like not given"),
    ],
)
@pytest.mark.parametrize("style", [request, notification, async_request])
@pytest.mark.parametrize("level", range(4))
def test_what_cannot_travel_beside_the_body_is_refused_when_the_contract_is_made(
    added: Any, default: Any, why: str, style: Any, level: int
) -> None:
    async def create(self: Any, trip: Trip, more: Any = default) -> None: ...

    create.__annotations__["more"] = added

    class Odd(Contract, http_level=level):
        operation = style(create)

    if level == 0:  # the body is the record of all
        assert model_of(Odd)
        return
    said = f"Odd.operation: parameter 'more': {why}: put it into the record 'trip', which is the body over HTTP"
    with pytest.raises(ContractError) as raised:
        model_of(Odd)
    assert str(raised.value) == said


def test_at_level_one_an_operation_of_a_later_version_is_not_taken_for_another() -> None:
    class Trips(Contract, name="trips", version="2.1", http_level=1):
        @request(http="GET /trips/{trip_id}")
        async def get(self, trip_id: str) -> Trip: ...

    class Later(Contract, name="trips", version="2.2", http_level=1):
        @request(http="GET /trips/{trip_id}")
        async def get(self, trip_id: str) -> Trip: ...
        @request(http="DELETE /trips/{trip_id}")
        async def cancel(self, trip_id: str) -> None: ...

    served = bind(Trips.get, "json")
    with pytest.raises(UnknownOperation, match=r"trips\.cancel is not served here, only trips\.get"):
        served.arguments(arrive(served, bind(Later.cancel, "json").request(Later.cancel.record("t"))))
    known = bind(Later.get, "json").request(Later.get.record("t"))
    assert served.arguments(arrive(served, known)) == Trips.get.record("t")


# --- replies

SUCCESS = [
    ("get", 2, Trip("t"), "200"),
    ("create", 2, Trip("t"), "201"),
    ("create", 1, Trip("t"), "201"),
    ("create", 0, Trip("t"), "200"),
    ("cancel", 2, None, "204"),
    ("cancel", 0, None, "204"),
    ("request_pickup", 2, None, "204"),
    ("note", 2, {"a": 1}, "200"),
    ("receipt.result", 2, Trip("t"), "200"),
    ("receipt.cancel", 2, None, "204"),
]


@pytest.mark.parametrize(("name", "level", "value", "status"), SUCCESS)
def test_success_has_its_status(name: str, level: int, value: Any, status: str) -> None:
    reply = answered(bound(name, level), value)
    assert reply.headers[":status"] == status
    assert bool(reply.body) is (status != "204")
    assert bound(name, level).failure(reply) is None
    assert bound(name, level).result(reply) == value


def test_a_status_of_the_contract_comes_first() -> None:
    class Jobs(Contract):
        @request(http=Http("POST /jobs", status=202))
        async def begin(self) -> None: ...

    assert answered(bind(Jobs.begin, "json"), None).headers == {":status": "202"}


@pytest.mark.parametrize(
    ("level", "location"), [(0, None), (1, "/v2/trips/a%2Fb"), (2, "/v2/trips/a%2Fb"), (3, "/v2/trips/a%2Fb")]
)
def test_what_was_created_has_its_location(level: int, location: str | None) -> None:
    assert answered(bound("create", level), Trip("a/b")).headers.get("location") == location


def test_get_is_cached_by_tag_and_others_are_not() -> None:
    binding = bound("get")
    first = answered(binding, Trip("t"))
    assert {name: first.headers[name] for name in ("cache-control", "vary")} == {
        "cache-control": "max-age=5",
        "vary": "accept",
    }
    assert first.headers["etag"] == answered(binding, Trip("t")).headers["etag"]
    assert first.headers["etag"] != answered(binding, Trip("u")).headers["etag"]
    assert first.headers["etag"] != answered(binding, Trip("t"), accept=MSGPACK).headers["etag"]
    assert "etag" not in answered(bound("create"), Trip("t")).headers


@pytest.mark.parametrize(
    ("known", "status"),
    [("{}", "304"), ("W/{}", "304"), ('"x", {}', "304"), ("*", "304"), ('"x"', "200"), ("", "200"), ("garbage", "200")],
)
def test_what_the_client_knows_already_is_not_sent_again(known: str, status: str) -> None:
    tag = answered(bound("get"), Trip("t")).headers["etag"]
    reply = answered(bound("get"), Trip("t"), if_none_match=known.format(tag))
    assert reply.headers[":status"] == status
    assert reply.headers["etag"] == tag
    assert bool(reply.body) is bool(reply.media_type) is (status == "200")


NEGOTIATED = [
    ("*/*", JSON),
    ("application/*", JSON),
    ("application/json", JSON),
    ("APPLICATION/MSGPACK", MSGPACK),
    ("application/msgpack, application/json;q=0.9", MSGPACK),
    ("application/msgpack;q=0.9, */*;q=0.8", MSGPACK),
    ("application/msgpack;q=0.5, application/json;q=0.6", JSON),
    ("application/json;q=0, */*", MSGPACK),
    ("text/html, application/xhtml+xml, */*;q=0.8", JSON),
    ("application/json; charset=utf-8; q=1.0", JSON),
    ("text/html", ""),
    ("application/*;q=0", ""),
    ("application/json;q=x", JSON),  # nothing in it can be read, so it says nothing
    ("", JSON),
    (",;,=", JSON),
]


@pytest.mark.parametrize(("accept", "chosen"), NEGOTIATED)
def test_accept_chooses_the_format(accept: str, chosen: str) -> None:
    assert negotiate(accept, (JSON, MSGPACK)) == chosen


def test_a_reply_is_written_as_was_asked() -> None:
    reply = answered(bound("get"), Trip("t"), accept=MSGPACK)
    assert (reply.media_type, msgspec.msgpack.decode(reply.body, type=Trip)) == (MSGPACK, Trip("t"))
    assert bound("get").result(reply) == Trip("t")
    assert answered(bound("get", 2, "msgpack"), Trip("t")).media_type == MSGPACK


def test_what_cannot_be_written_is_refused_before_the_work() -> None:
    binding = bound("create")
    message = curl(binding, "/v2/trips", b'{"id":"t"}', accept="text/html")
    for refused in (lambda: binding.arguments(message), lambda: binding.reply(message, Trip("t"))):
        with pytest.raises(NotAcceptable, match=f"cannot write text/html; there are {JSON}, {MSGPACK}"):
            refused()


@pytest.mark.parametrize("name", ["cancel", "receipt", "request_pickup"])
def test_where_nothing_is_written_anything_is_accepted(name: str) -> None:
    path = "/v2/pickups/00000000-0000-0000-0000-000000000001" if name == "request_pickup" else "/v2/trips/t"
    bound(name).arguments(curl(bound(name), path + "/receipt" * (name == "receipt"), accept="text/html"))


def test_a_reply_that_does_not_fit_names_the_field() -> None:
    reply = Message(channel=bound("get").channel, body=b'{"id":"t","pickup":{}}', headers={":status": "200"})
    with pytest.raises(
        InvalidMessage, match=r"the reply of trips\.get does not fit its contract: pickup\.lat"
    ) as raised:
        bound("get").result(reply)
    assert raised.value.path == "pickup.lat"


# --- failures


@pytest.mark.parametrize("kind", BY_CODE.values())
@pytest.mark.parametrize("level", [0, 2])
def test_every_failure_travels_as_a_problem(kind: type[CallError], level: int) -> None:
    binding = bound("get", level)
    sent = kind("no such luck", correlation_id="m-1", path="pickup.lat", retry_after=1.2, safety=Safety.UNKNOWN)
    reply = binding.refuse(Message(channel=binding.channel), sent)
    assert reply.media_type == PROBLEM
    assert reply.headers == {":status": str(kind.http_status), "retry-after": "2"}
    assert msgspec.json.decode(reply.body)["status"] == kind.http_status
    reply.status = ""  # what a proxy leaves of it
    got = binding.failure(reply)
    assert type(got) is kind
    assert vars(got) == vars(sent)
    assert str(got) == "no such luck"


FAULTS = [
    (NoSuchTrip(trip_id="é/"), 404, {"trip_id": "é/"}),
    (TooFar(km=1.5), 409, {"km": 1.5, "nearest": None}),
    (TooFar(km=1.5, nearest=Place(1, 2)), 409, {"km": 1.5, "nearest": {"lat": 1, "lon": 2}}),
    (Odd(title="t", type=3, fields=["a"]), 418, {"fields": {"title": "t", "type": 3, "fields": ["a"]}}),
]


@pytest.mark.parametrize(("fault", "status", "members"), FAULTS)
@pytest.mark.parametrize("level", range(4))
def test_a_fault_is_a_problem_with_its_fields_as_members(fault: Fault, status: int, members: Any, level: int) -> None:
    reply = bound("get", level).refuse(Message(channel=bound("get").channel), fault)
    name = type(fault).__name__
    problem = {"type": f"urn:quintet:fault:{name}", "title": name, "status": status}
    assert msgspec.json.decode(reply.body) == problem | members
    assert (reply.headers, reply.media_type) == ({":status": str(status)}, PROBLEM)
    reply.status = ""
    assert bound("get", level).failure(reply) == fault


FOREIGN = [
    (400, "InvalidMessage"), (401, "RemoteError"), (403, "RemoteError"), (404, "UnknownOperation"),
    (405, "RemoteError"), (406, "NotAcceptable"), (413, "TooLarge"), (415, "UnsupportedMediaType"),
    (422, "InvalidMessage"), (429, "Overloaded"), (500, "RemoteError"), (502, "ConnectionLost"),
    (503, "Overloaded"), (504, "DeadlineExceeded"), (599, "RemoteError"), (301, "RemoteError"), (304, "RemoteError"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "kind"), FOREIGN)
@pytest.mark.parametrize("body", [b"<h1>Oh no</h1>", b"", b'{"title":"Oh no","code":7}', b"\xff{", b'{"x":' * 5000])
@pytest.mark.parametrize("media_type", ["text/html", PROBLEM, JSON])
def test_a_foreign_failure_is_told_by_its_status(status: int, kind: str, body: bytes, media_type: str) -> None:
    asked = bound("get").request(bound("get").operation.record("t"))
    alone = Message(channel=asked.channel, body=body, media_type=media_type, headers={":status": str(status)})
    wired = read_response(Response(status, {"content-type": media_type}, body), asked)
    for reply in (alone, wired):
        failure = bound("get").failure(reply)
        assert type(failure).__name__ == kind
        assert f"trips.get: answered {status}" in str(failure)


def test_a_foreign_problem_says_why_and_when_to_come_again() -> None:
    body = b'{"type":"https://example.com/full","title":"Full","detail":"come back later"}'
    headers = {":status": "429", "retry-after": "30"}
    failure = bound("get").failure(
        Message(channel=bound("get").channel, body=body, media_type=PROBLEM, headers=headers)
    )
    assert isinstance(failure, Overloaded)
    assert str(failure) == "trips.get: answered 429 Too Many Requests: Full: come back later"
    assert failure.retry_after == 30.0


@pytest.mark.parametrize(
    ("after", "seconds"),
    [("0", 0.0), ("", None), ("soon", None), ("-1", None), ("²", None), ("٣", None), ("1.5", None)],
)
def test_retry_after_is_whole_seconds_or_unknown(after: str, seconds: float | None) -> None:
    reply = Message(channel=bound("get").channel, headers={":status": "503", "retry-after": after})
    failure = bound("get").failure(reply)
    assert isinstance(failure, Overloaded)
    assert failure.retry_after == seconds


@pytest.mark.parametrize(
    ("after", "date", "seconds"),
    [
        ("Mon, 30 Nov 2026 12:00:30 GMT", "Mon, 30 Nov 2026 12:00:00 GMT", 30.0),
        ("Mon, 30 Nov 2026 11:00:00 GMT", "Mon, 30 Nov 2026 12:00:00 GMT", 0.0),
        ("Mon, 30 Nov 2026 12:00:30 GMT", "", None),
        ("Mon, 99 Nov 2026 12:00:30 GMT", "Mon, 30 Nov 2026 12:00:00 GMT", None),
    ],
)
def test_retry_after_may_be_a_date(after: str, date: str, seconds: float | None) -> None:
    headers = {":status": "503", "retry-after": after, "date": date}
    failure = bound("get").failure(Message(channel=bound("get").channel, headers=headers))
    assert isinstance(failure, Overloaded)
    assert failure.retry_after == seconds


@pytest.mark.parametrize("status", [300, 401, 403, 405, 408, 409, 410, 429, 451, 500, 501, 502, 503, 504])
def test_only_a_status_that_says_that_the_service_is_ill_counts_as_its_failure(status: int) -> None:
    message = Message(channel=bound("get").channel, headers={":status": str(status)})
    failure = bound("get").failure(message)
    assert failure is not None
    ill = status >= 500 or status in (408, 429)
    assert OUTCOMES[outcome_of(failure, message)] in (("failure", "timeout") if ill else ("answered",))


def test_a_foreign_503_may_have_been_sent_in_the_middle_of_the_work() -> None:
    failure = bound("get").failure(Message(channel=bound("get").channel, headers={":status": "503"}))
    assert isinstance(failure, Overloaded)
    assert failure.safety is Safety.UNKNOWN


def test_a_fault_that_the_contract_does_not_declare_is_a_remote_error() -> None:
    reply = bound("get").refuse(Message(channel=bound("get").channel), NoSuchTrip(trip_id="t"))
    failure = bound("create").failure(reply)
    assert isinstance(failure, RemoteError)
    assert str(failure) == (
        "trips.create: answered with the fault 'NoSuchTrip', which the contract here does not declare"
    )
    assert outcome_of(failure, reply) == ANSWERED


def test_an_undeclared_fault_says_nothing_of_ours_by_its_fields_or_status() -> None:
    class Banned(Fault, status=503):
        title: str = "t"
        detail: str = "d"
        safety: str = "not sent"
        retry_after: float = 5.0
        correlation_id: str = "c"
        path: str = "p"

    class Later(Contract, name="trips", version="2.2"):
        @request(http="GET /trips/{trip_id}", faults=[Banned])
        async def get(self, trip_id: str) -> Trip: ...

    reply = bind(Later.get, "json").refuse(Message(channel=Later.get.channel), Banned())
    reply.headers["retry-after"] = "7"
    assert bind(Later.get, "json").failure(reply) == Banned()
    failure = bound("get").failure(reply)
    assert isinstance(failure, RemoteError)
    assert failure.answered
    assert (failure.safety, failure.retry_after, failure.correlation_id) == (Safety.FAILED, None, "")
    reply.body = b""  # a proxy took it away: its name is in a header too
    assert "'Banned'" in str(bound("get").failure(reply))


def test_a_field_that_a_fault_gets_moves_no_other() -> None:
    class TooFar(Fault, status=409):
        km: float
        nearest: Place | None = None
        detail: str = "none"
        fields: list[int] = []

    class Later(Contract, name="trips", version="2.2"):
        @request(http="GET /trips/{trip_id}", faults=[TooFar])
        async def get(self, trip_id: str) -> Trip: ...

    later, earlier = bind(Later.get, "json"), bound("get")
    new, old = TooFar(km=1.5, detail="d"), globals()["TooFar"](km=1.5)
    written = later.refuse(Message(channel=later.channel), new)
    assert msgspec.json.decode(written.body) == {
        "type": "urn:quintet:fault:TooFar", "title": "TooFar", "status": 409, "km": 1.5, "nearest": None,
        "fields": {"detail": "d", "fields": []},
    }  # fmt: skip
    assert later.failure(written) == new
    assert earlier.failure(written) == old
    assert later.failure(earlier.refuse(Message(channel=earlier.channel), old)) == TooFar(km=1.5)


def test_a_problem_with_odd_members_is_still_told_by_its_code() -> None:
    body = b'{"code":"too-large","retry-after":"soon"}'
    reply = Message(channel=bound("get").channel, body=body, media_type=PROBLEM, headers={":status": "413"})
    assert isinstance(bound("get").failure(reply), TooLarge)


def test_a_fault_that_does_not_fit_says_so() -> None:
    body = b'{"type":"urn:quintet:fault:TooFar","km":"far"}'
    reply = Message(channel=bound("get").channel, body=body, media_type=PROBLEM, headers={":status": "409"})
    failure = bound("get").failure(reply)
    assert isinstance(failure, InvalidMessage)
    assert failure.path == "km"


def test_the_page_on_http_names_every_failure_and_every_header() -> None:
    page = (Path(__file__).parents[2] / "docs" / "http.md").read_text()
    rows = {line[2:5]: line for line in page.splitlines() if line.startswith("| ")}
    missing = [kind.__name__ for kind in BY_CODE.values() if f"`{kind.__name__}`" not in rows[str(kind.http_status)]]
    missing += [name for name in (*FIELDS.values(), TIMEOUT, ATTEMPT) if f"| `{name.title()}` |" not in page]
    assert not missing


# --- notifications and pending answers


def test_a_notification_that_is_kept_is_accepted() -> None:
    reply = bound("request_pickup").accepted(Message(channel=bound("request_pickup").channel, id="m-1"))
    assert (reply.headers, reply.body) == ({":status": "202"}, b"")
    assert bound("request_pickup").failure(reply) is None
    assert reply.status == ""


@pytest.mark.parametrize(
    ("level", "location"), [(0, None), (1, "/v2/trips/receipt/pending/m%2F1"), (2, "/v2/trips/receipt/pending/m%2F1")]
)
def test_a_submission_names_its_pending_answer(level: int, location: str | None) -> None:
    reply = bound("receipt", level).accepted(Message(channel=bound("receipt").channel, id="m/1"))
    assert (reply.headers[":status"], reply.body, reply.media_type) == ("202", b'{"id":"m/1"}', JSON)
    assert reply.headers.get("location") == location
    if location and level == 2:
        binding = bound("receipt.result")
        assert binding.arguments(curl(binding, location)) == binding.operation.record("m/1")


@pytest.mark.parametrize(
    ("wait", "prefer"),
    [(0.0, None), (5.0, "wait=5"), (2.5, "wait=2.5"), (20.0, "wait=20"), (100, "wait=100"), (0.001, "wait=0.001")],
)
def test_the_wait_for_an_answer_is_a_preference(wait: float, prefer: str | None) -> None:
    binding = bound("receipt.result")
    message = binding.request(binding.operation.record("m-1", wait))
    assert message.headers[":path"] == "/v2/trips/receipt/pending/m-1"
    assert message.headers.get("prefer") == prefer
    assert binding.arguments(arrive(binding, message)) == binding.operation.record("m-1", wait)


@pytest.mark.parametrize(
    ("prefer", "wait"),
    [
        ("wait=5", 5.0), ("respond-async, wait=10", 10.0), ("Wait = 7; x=1", 7.0), ('wait="3"', 3.0), ("wait=-1", 0.0),
        ("wait=soon", 0.0), ("wait", 0.0), ("await=3", 0.0), ("", 0.0), ("wait=99999999999999", 0.0), ("wait=1e9", 1.0),
    ],
)  # fmt: skip
def test_prefer_is_read_leniently(prefer: str, wait: float) -> None:
    binding = bound("receipt.result")
    assert binding.arguments(curl(binding, "/v2/trips/receipt/pending/m", prefer=prefer)).wait == wait  # type: ignore[attr-defined]


def test_an_answer_that_is_not_there_yet_says_when_to_ask_again() -> None:
    binding = bound("receipt.result")
    message = curl(binding, "/v2/trips/receipt/pending/m", prefer="wait=5")
    reply = binding.pending(message)
    assert reply.headers == {
        ":status": "202", "retry-after": "1", "cache-control": "no-store", "preference-applied": "wait=5",
    }  # fmt: skip
    reply.status = ""
    assert binding.failure(reply) is None
    assert reply.status == PENDING
    answer = binding.reply(message, Trip("t"))
    assert (answer.headers["preference-applied"], answer.headers["cache-control"]) == ("wait=5", "no-store")
    assert "etag" not in answer.headers


@pytest.mark.parametrize("level", [0, 1])
def test_below_level_two_the_wait_stands_in_the_body(level: int) -> None:
    binding = bound("receipt.result", level)
    message = binding.request(binding.operation.record("m", 2.0))
    assert msgspec.json.decode(message.body)["wait"] == 2.0
    assert "prefer" not in message.headers
    assert binding.arguments(arrive(binding, message)) == binding.operation.record("m", 2.0)


# --- links

LINKS = {
    "self": {"href": "/v2/trips/a%2Fb"},
    "cancel": {"href": "/v2/trips/a%2Fb{?reason}", "templated": True, "title": "Give it up."},
    "around": {"href": "/v2/trips?trip=a%2Fb{&near,states*}", "templated": True},
    "receipt": {"href": "/v2/trips/a%2Fb/receipt"},
}


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [("*/*", HAL), (JSON, JSON), (HAL, HAL), (f"{HAL}, {JSON};q=0.9", HAL), (f"{JSON}, */*;q=0.1", JSON)],
)
def test_level_three_carries_links_in_json_of_either_name(accept: str, media_type: str) -> None:
    binding = bound("get", 3)
    reply = answered(binding, Trip("a/b"), "/v2/trips/a%2Fb", accept=accept)
    assert reply.media_type == media_type
    assert msgspec.json.decode(reply.body) == {"id": "a/b", "state": "open", "pickup": None, "_links": LINKS}
    assert binding.result(reply) == Trip("a/b")
    assert binding.links(reply) == {"cancel": "", "around": "", "receipt": "/v2/trips/a%2Fb/receipt"}


def test_a_client_sees_only_the_links_that_are_allowed() -> None:
    binding = bound("get", 3)
    assert set(binding.links(answered(binding, Trip("t", State.DONE)))) == {"around", "receipt"}


@pytest.mark.parametrize("format_name", ["json", "msgpack"])
def test_a_client_asks_for_links_whatever_it_writes(format_name: str) -> None:
    binding = bound("get", 3, format_name)
    asked = arrive(binding, binding.request(binding.operation.record("t")))
    reply = binding.reply(asked, Trip("t"))
    assert set(binding.links(reply)) == {"cancel", "around", "receipt"}
    assert msgspec.json.decode(reply.body)["_links"]["self"] == {"href": "/v2/trips/t"}


@pytest.mark.parametrize("level", [0, 1, 2])
def test_below_level_three_there_are_no_links(level: int) -> None:
    reply = answered(bound("get", level), Trip("t"))
    assert b"_links" not in reply.body
    assert bound("get", level).links(reply) == {}


@pytest.mark.parametrize(
    ("href", "said", "path"),
    [
        ("/x", {}, "/x"),
        ("/x?trip=a&token=1", {}, "/x?trip=a&token=1"),  # what the caller did not say is the server's
        ("/x?trip=a&token=1", {"trip": "b"}, "/x?token=1&trip=b"),
        ("/x", {"near": 1.5, "states": [State.OPEN]}, "/x?near=1.5&states=open"),
    ],
)
def test_a_link_is_followed_with_what_the_caller_says_beside_it(href: str, said: dict[str, Any], path: str) -> None:
    binding = bound("around", 3)
    message = binding.request(binding.operation.record(**said))
    binding.follow(message, href, said)
    assert message.headers[":path"] == path


def test_what_was_created_links_to_itself_and_an_empty_record_can_carry_links() -> None:
    class Things(Contract, http_level=3):
        @request(http=Http("POST /things", location="/things/{id}"), links={"drop": Link("drop", fill={"thing": "id"})})
        async def make(self) -> Made: ...
        @request(http="DELETE /things/{thing}")
        async def drop(self, thing: str) -> None: ...
        @request(links={"make": "make"})
        async def nothing(self) -> Made | None: ...

    def links(operation: Any, value: Any) -> Any:
        return msgspec.json.decode(answered(bind(operation, "json"), value).body)

    assert links(Things.make, Made("7"))["_links"] == {
        "self": {"href": "/v1/things/7"},
        "drop": {"href": "/v1/things/7"},
    }
    assert links(Things.make, Made()) == {"_links": {"drop": {"href": "/v1/things/{thing}", "templated": True}}}
    assert links(Things.nothing, Made()) == {"_links": {"make": {"href": "/v1/things"}}}
    assert links(Things.nothing, None) is None


@pytest.mark.parametrize(
    ("links", "found"),
    [
        (b'{"cancel":{"href":"/v2/trips/t"}}', {"cancel": "/v2/trips/t"}),
        (b'{"cancel":[{"href":"/v2/trips/t"},{"href":"/x"}],"receipt":[]}', {"cancel": "/v2/trips/t"}),
        (b'{"cancel":{"href":"//evil.example/x"}}', {"cancel": ""}),
        (b'{"cancel":{"href":"https://evil.example/x"}}', {"cancel": ""}),
        (b'{"rob":{"href":"/v2/bank"}}', {}),
        (b'{"cancel":{}}', {}),
        (b'"x"', {}),
    ],
)
def test_foreign_links_are_read_with_care(links: bytes, found: dict[str, str]) -> None:
    body = b'{"id":"t","_links":%b}' % links
    assert bound("get", 3).links(Message(channel=bound("get").channel, body=body, media_type=JSON)) == found


# --- what goes in comes out

TEXT = st.text(st.characters(codec="utf-8"))
INT = st.integers(-(2**63), 2**63 - 1)
ZONES = st.none() | st.integers(-1439, 1439).map(lambda minutes: dt.timezone(dt.timedelta(minutes=minutes)))
PATH = {
    "text": TEXT.filter(bool),
    "number": INT,
    "ident": st.uuids(),
    "day": st.dates(),
    "state": st.sampled_from(State),
    "flag": st.booleans(),
}
QUERY = {
    "q_text": TEXT,
    "q_number": INT,
    "q_real": st.floats(allow_nan=False, allow_infinity=False),
    "q_money": st.decimals(allow_nan=False, allow_infinity=False),
    "q_moment": st.datetimes(timezones=ZONES),
    "q_clock": st.times(timezones=ZONES),
    "q_span": st.timedeltas(dt.timedelta(days=-(10**6)), dt.timedelta(days=10**6)),
    "q_raw": st.binary(),
    "q_seats": st.sampled_from(Seats),
    "q_way": st.sampled_from(["up", "down"]),
    "q_texts": st.lists(TEXT),
    "q_numbers": st.lists(INT).map(tuple),
    "q_idents": st.frozensets(st.uuids()),
    "q_states": st.lists(st.sampled_from(State)),
    "q_maybe": st.none() | TEXT,
    "q_limit": st.none() | st.integers(1, 99),
    "q_when": st.none() | st.dates(),
    "q_yes": st.none() | st.booleans(),
}


async def everything(
    self: Any,
    text: str,
    number: int,
    ident: uuid.UUID,
    day: dt.date,
    state: State,
    flag: bool,
    q_text: str,
    q_number: int,
    q_real: float,
    q_money: Decimal,
    q_moment: dt.datetime,
    q_clock: dt.time,
    q_span: dt.timedelta,
    q_raw: bytes,
    q_seats: Seats,
    q_way: Literal["up", "down"],
    q_texts: list[str],
    q_numbers: tuple[int, ...] = (),
    *,
    q_idents: frozenset[uuid.UUID],
    q_states: Sequence[State],
    q_maybe: str | None,
    q_limit: Annotated[int, Meta(ge=1, le=99)] | None = None,
    q_when: dt.date | None = None,
    q_yes: bool | None = None,
) -> None: ...


def all_types_at(level: int, verb: str) -> Any:
    class Types(Contract, name="types", http_level=level):
        all = request(http=f"{verb} /all/" + "/".join(f"{{{name}}}" for name in PATH))(everything)

    return Types.all


EVERYTHING = [
    bind(all_types_at(level, verb), format_name)
    for level, verb in [(0, "GET"), (1, "GET"), (2, "GET"), (2, "DELETE"), (2, "PUT"), (3, "GET")]
    for format_name in ("json", "msgpack")
]


@settings(deadline=None)
@given(values=st.fixed_dictionaries(PATH | QUERY))
def test_parameters_of_every_type_come_out_as_they_went_in(values: dict[str, Any]) -> None:
    for binding in EVERYTHING:
        sent = binding.operation.record(**values)
        assert binding.arguments(arrive(binding, binding.request(sent))) == sent


@settings(deadline=None)
@given(
    trip=st.builds(
        Trip,
        TEXT,
        st.sampled_from(State),
        st.none() | st.builds(Place, st.floats(allow_nan=False, allow_infinity=False), st.just(0.0)),
    )
)
def test_records_come_out_as_they_went_in_at_every_level(trip: Trip) -> None:
    for level in range(4):
        binding = bound("create", level)
        sent = binding.operation.record(trip)
        assert binding.arguments(arrive(binding, binding.request(sent))) == sent
        assert bound("get", level).result(answered(bound("get", level), trip)) == trip


@settings(deadline=None)
@given(trip_id=TEXT, km=st.floats(allow_nan=False, allow_infinity=False), fields=st.lists(TEXT))
def test_faults_come_out_as_they_went_in(trip_id: str, km: float, fields: list[str]) -> None:
    binding = bound("get")
    for fault in (
        NoSuchTrip(trip_id=trip_id),
        TooFar(km=km, nearest=Place(km, km)),
        Odd(title=trip_id, type=1, fields=fields),
    ):
        reply = binding.refuse(Message(channel=binding.channel), fault)
        assert read_back(binding, reply) == fault


def read_back(binding: Rest, reply: Message) -> Any:
    response = Response(int(reply.headers[":status"]), {"content-type": reply.media_type}, reply.body)
    return binding.failure(read_response(response, Message(channel=binding.channel)))


# --- arbitrary bytes


JUNK = st.binary() | st.sampled_from(
    [b"", b"null", b"[]", b"{}", b'{"id":1}', b'{"x":' * 3000, b"\xff", b'{"type":[]}', b'{"_links":7}']
)
BINDINGS = [
    bound(name, level)
    for level in range(4)
    for name in ("get", "create", "move", "around", "note", "receipt", "receipt.result")
]
MEDIA_TYPES = ["", JSON, MSGPACK, HAL, PROBLEM, "text/html", "+json"]


@settings(max_examples=300, deadline=None)
@given(
    binding=st.sampled_from(BINDINGS),
    path=st.text(st.characters(min_codepoint=33, max_codepoint=126)),
    body=JUNK,
    media_type=st.sampled_from(MEDIA_TYPES),
    accept=TEXT,
    prefer=TEXT,
)
def test_an_arbitrary_request_is_read_or_refused_as_a_failure(
    binding: Rest, path: str, body: bytes, media_type: str, accept: str, prefer: str
) -> None:
    method, route = binding.channel.route.partition("#")[0].split(" ")
    for target in (
        f"{route}?{path}",
        f"{route.replace('{', '%').replace('}', '')}?near={path}&states={path}",
        f"/{path}",
    ):
        headers = {":method": method, ":path": target, "accept": accept, "prefer": prefer, "if-none-match": accept}
        message = Message(
            channel=binding.channel,
            operation=binding.operation.full_name,
            body=body,
            media_type=media_type,
            headers=headers,
        )
        try:
            binding.arguments(arrive(binding, message))
            if binding.operation.name == "get":
                binding.reply(message, Trip("t"))
        except (CallError, NotRouted):
            pass


@settings(max_examples=300, deadline=None)
@given(
    binding=st.sampled_from(BINDINGS),
    status=st.integers(100, 999),
    body=JUNK,
    media_type=st.sampled_from(MEDIA_TYPES),
    after=TEXT | st.integers().map(str),
)
def test_an_arbitrary_reply_is_read_or_a_failure(
    binding: Rest, status: int, body: bytes, media_type: str, after: str
) -> None:
    headers = {":status": str(status), "retry-after": after}
    reply = Message(channel=binding.channel, body=body, media_type=media_type, headers=headers)
    failure = binding.failure(reply)
    assert (failure is None) is (200 <= status < 300)
    binding.links(reply)
    with contextlib.suppress(CallError):
        binding.result(reply)
