# mypy: disable-error-code="empty-body"
"""Contracts: what contradicts itself is refused in one sentence; faults, parameters, keys, routes and companions."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Annotated, Any, cast

import pytest
from msgspec import Meta, Struct
from msgspec.structs import asdict

from quintet.contract import (
    Contract,
    Fault,
    Http,
    Link,
    Operation,
    Style,
    async_request,
    check,
    event,
    notification,
    request,
    survey,
)
from quintet.errors import ContractError, QuintetError
from quintet.model import Number


class Place(Struct):
    lat: float
    lon: float = 0.0


class Trip(Struct):
    id: str
    pickup: Place


class NoSuchTrip(Fault, status=404):
    trip_id: str
    hint: str = "look again"


class NoSuchLeg(NoSuchTrip):
    leg: int


class Busy(Fault):
    pass


class Trips(Contract, name="trips", version="2.1"):
    """What a passenger does with trips."""

    @request(http="GET /trips/{trip_id}", faults=[NoSuchTrip], links={"cancel": "cancel"})
    async def get(self, trip_id: str) -> Trip:
        """One trip."""
        raise NotImplementedError

    @request(http="POST /trips/{trip_id}/cancel")
    async def cancel(self, trip_id: str) -> None: ...

    @request
    async def search(self, near: Place, radius: float = 1.0, *, limit: int, state: str = "any") -> list[Trip]: ...

    @notification(key="trip_id")
    async def ping(self, trip_id: str) -> None: ...

    @async_request(faults=[NoSuchTrip])
    async def receipt(self, trip_id: str) -> Trip: ...

    @event(key="trip.pickup.lat")
    async def created(self, trip: Trip) -> None: ...

    @survey
    async def offers(self, trip: Trip) -> float: ...


# what a contract says of itself


def test_a_contract_that_is_right_passes_and_knows_its_operations_in_order() -> None:
    info = check(Trips)
    assert (info.name, info.version, info.major, info.level) == ("trips", "2.1", 2, 2)
    assert list(info.operations) == ["get", "cancel", "search", "ping", "receipt", "created", "offers"]
    assert [operation.style for operation in info.operations.values()] == [
        Style.REQUEST,
        Style.REQUEST,
        Style.REQUEST,
        Style.NOTIFICATION,
        Style.ASYNC_REQUEST,
        Style.EVENT,
        Style.SURVEY,
    ]


def test_an_operation_shows_its_names_its_docstring_and_its_channel() -> None:
    assert repr(Trips.get) == "Trips.get"
    assert Trips.get.full_name == "trips.get"
    assert Trips.get.doc == "One trip."
    channel = Trips.created.channel
    assert (channel.name, channel.fanout, channel.durable) == ("trips.v2.created", True, True)
    assert not Trips.get.channel.fanout
    assert not Trips.get.channel.durable
    assert Trips.ping.channel.durable


def test_a_contract_may_extend_another() -> None:
    class MoreTrips(Trips, name="more-trips"):
        @request
        async def merge(self, first: str, second: str) -> Trip: ...

    assert list(check(MoreTrips).operations)[-2:] == ["offers", "merge"]
    assert "merge" not in Trips.__quintet__.operations


def test_a_verb_of_http_says_whether_repeating_is_harmless_unless_the_contract_does() -> None:
    class Verbs(Contract):
        @request(http="GET /a")
        async def a(self) -> None: ...

        @request(http="POST /b")
        async def b(self) -> None: ...

        @request(http="DELETE /c", idempotent=False)
        async def c(self) -> None: ...

        @request(idempotent=True)
        async def d(self) -> None: ...

    check(Verbs)
    assert [operation.idempotent for operation in Verbs.__quintet__.operations.values()] == [True, False, False, True]
    assert Verbs.__quintet__.name == "verbs"


# parameters


def test_parameters_become_a_record_in_their_order_with_their_defaults() -> None:
    record = Trips.search.record(Place(1.0), limit=3)
    assert asdict(record) == {"near": Place(1.0), "radius": 1.0, "limit": 3, "state": "any"}
    assert asdict(Trips.search.record(Place(1.0), 2.0, limit=3))["radius"] == 2.0


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: Trips.search.record(Place(1.0)), "limit"),
        (lambda: Trips.search.record(limit=3), "near"),
        (lambda: Trips.search.record(Place(1.0), 2.0, 3), "positional"),
        (lambda: Trips.search.record(Place(1.0), limit=3, colour=1), "colour"),
    ],
)
def test_arguments_that_are_not_the_operations_are_refused(build: Callable[[], Any], complaint: str) -> None:
    with pytest.raises(TypeError, match=complaint):
        build()


def test_a_key_is_read_out_of_the_parameters_at_any_depth() -> None:
    assert Trips.created.key_of is not None
    assert Trips.created.key_of(Trips.created.record(Trip("t-1", Place(2.5)))) == "2.5"
    assert Trips.ping.key_of is not None
    assert Trips.ping.key_of(Trips.ping.record("t-1")) == "t-1"
    assert Trips.get.key_of is None


def test_a_key_may_lead_through_a_parameter_with_marks() -> None:
    class Marked(Contract):
        @event(key="trip.id")
        async def created(self, trip: Annotated[Trip, Number(3)]) -> None: ...

    check(Marked)


def test_an_async_request_has_two_companions_that_fetch_and_cancel() -> None:
    collect, cancel = Trips.receipt.companions
    assert (collect.full_name, cancel.full_name) == ("trips.receipt.result", "trips.receipt.cancel")
    assert (collect.channel.name, cancel.channel.name) == ("trips.v2.receipt.result", "trips.v2.receipt.cancel")
    assert (collect.result, cancel.result) == (Trip, type(None))
    assert asdict(collect.record("p-1")) == {"id": "p-1", "wait": 0.0}
    assert asdict(cancel.record("p-1")) == {"id": "p-1"}
    for companion in (collect, cancel):
        assert companion.style is Style.REQUEST
        assert companion.idempotent
        assert companion.faults == (NoSuchTrip,)
        assert companion.parent is Trips.receipt
    assert "receipt.result" not in Trips.__quintet__.operations


# a client that is not connected


def test_a_client_that_is_not_connected_says_so() -> None:
    client = Trips()
    assert repr(client) == "<Trips client, not connected>"
    with pytest.raises(AttributeError, match=r"Trips\.get: this client is not connected yet"):
        _ = client.get
    with pytest.raises(AttributeError, match=r"Trips\.created is sent by its own service \(service\.publish"):
        _ = client.created


# what contradicts itself: each makes a contract, and the sentence that it is refused with


def _name() -> type[Contract]:
    class C(Contract, name="two words"):
        pass

    return C


def _version() -> type[Contract]:
    class C(Contract, version="1"):
        pass

    return C


def _level() -> type[Contract]:
    class C(Contract, http_level=4):
        pass

    return C


def _no_self() -> type[Contract]:
    class C(Contract):
        @request
        async def op(trip_id: str) -> None: ...  # pyright: ignore[reportGeneralTypeIssues]

    return C


def _no_parameters() -> type[Contract]:
    class C(Contract):
        @request  # type: ignore[arg-type]
        async def op() -> None: ...

    return C


def _unannotated() -> type[Contract]:
    class C(Contract):
        @request
        async def op(self, trip) -> None: ...  # type: ignore[no-untyped-def]

    return C


def _no_result() -> type[Contract]:
    class C(Contract):
        @request
        async def op(self, trip_id: str): ...  # type: ignore[no-untyped-def]

    return C


def _star() -> type[Contract]:
    class C(Contract):
        @request
        async def op(self, *trips: str) -> None: ...

    return C


def _positional_only() -> type[Contract]:
    class C(Contract):
        @request
        async def op(self, trip_id: str, /) -> None: ...

    return C


def _plain() -> type[Contract]:
    class C(Contract):
        @request  # type: ignore[arg-type]
        def op(self) -> None: ...

    return C


def _answering_notification() -> type[Contract]:
    class C(Contract):
        @notification  # type: ignore[arg-type]
        async def op(self) -> int: ...

    return C


def _answering_event() -> type[Contract]:
    class C(Contract):
        @event  # type: ignore[arg-type]
        async def op(self) -> int: ...

    return C


def _route() -> type[Contract]:
    class C(Contract):
        @request(http="FETCH /trips")
        async def op(self) -> None: ...

    return C


def _route_with_query() -> type[Contract]:
    class C(Contract):
        @request(http=Http("GET /trips?near={near}"))
        async def op(self, near: str) -> None: ...

    return C


def _path_parameter() -> type[Contract]:
    class C(Contract):
        @request(http="GET /trips/{id}")
        async def op(self, trip_id: str) -> None: ...

    return C


def _key() -> type[Contract]:
    class C(Contract):
        @notification(key="trip_id")
        async def op(self, id: str) -> None: ...  # noqa: A002

    return C


def _deep_key() -> type[Contract]:
    class C(Contract):
        @event(key="trip.pickup.height")
        async def op(self, trip: Trip) -> None: ...

    return C


def _fault() -> type[Contract]:
    class C(Contract):
        @request(faults=[cast("Any", ValueError)])
        async def op(self) -> None: ...

    return C


def _link() -> type[Contract]:
    class C(Contract):
        @request(links={"next": Link("follow")})
        async def op(self) -> None: ...

    return C


def _same_route() -> type[Contract]:
    class C(Contract):
        @request(http="GET /trips/{trip_id}")
        async def one(self, trip_id: str) -> None: ...

        @request(http="GET /trips/{name}")
        async def two(self, name: str) -> None: ...

    return C


def _unknown_type() -> type[Contract]:
    class C(Contract):
        @request
        async def op(self, trip: Unknown) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    return C


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (_name, "contract C: name='two words' must be letters, digits, - and _, a letter first"),
        (_version, "contract C: version='1' must read 'major.minor', as '1.0'"),
        (_level, "contract C: http_level=4 must be 0, 1, 2 or 3"),
        (_no_self, "C.op: an operation is a method, its first parameter must be self"),
        (_no_parameters, "C.op: an operation is a method, its first parameter must be self"),
        (_unannotated, "C.op: parameter 'trip' needs a type annotation"),
        (_no_result, "C.op: the return type must be annotated (-> None where nothing comes back)"),
        (_star, "C.op: parameter *trips: 'str' must be a plain named parameter"),
        (_positional_only, "C.op: parameter trip_id: 'str' must be a plain named parameter"),
        (_plain, "C.op: write `async def op`"),
        (_answering_notification, "C.op: nothing comes back from a notification, write -> None"),
        (_answering_event, "C.op: nothing comes back from a publish/subscribe, write -> None"),
        (_route, "C.op: http='FETCH /trips' must read 'VERB /path', as 'GET /trips/{trip_id}'"),
        (_route_with_query, "C.op: http='GET /trips?near={near}' must read 'VERB /path', as 'GET /trips/{trip_id}'"),
        (_path_parameter, "C.op: {id} in the path is no parameter of the operation"),
        (_key, "C.op: key='trip_id' names no field of its parameters"),
        (_deep_key, "C.op: key='trip.pickup.height' names no field of its parameters"),
        (_fault, "C.op: faults= takes subclasses of Fault, not <class 'ValueError'>"),
        (_link, "C.op: link 'next' names the operation 'follow', there is none"),
        (_same_route, "C.two and C.one both answer 'GET /trips/{name}'"),
        (_unknown_type, "C.op: the type 'Unknown' is not known when the contract is read"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_a_contract_that_contradicts_itself_is_refused_in_one_sentence(
    build: Callable[[], type[Contract]], sentence: str
) -> None:
    with pytest.raises(ContractError) as refused:
        check(build())
    assert str(refused.value) == sentence


# faults


def test_a_fault_is_an_exception_with_fields() -> None:
    fault = NoSuchTrip(trip_id="t-1")
    assert isinstance(fault, QuintetError)
    assert (fault.trip_id, fault.hint) == ("t-1", "look again")
    assert fault.args == ("t-1", "look again")
    assert (NoSuchTrip.status, NoSuchTrip.code) == (404, "fault:NoSuchTrip")
    assert (Busy.status, Busy().args) == (400, ())


def test_a_fault_shows_its_fields() -> None:
    fault = NoSuchTrip(trip_id="t-1")
    assert str(fault) == "trip_id='t-1', hint='look again'"
    assert repr(fault) == "NoSuchTrip(trip_id='t-1', hint='look again')"
    assert repr(Busy()) == "Busy()"


def test_faults_of_one_kind_and_the_same_fields_are_equal() -> None:
    assert NoSuchTrip(trip_id="t-1") == NoSuchTrip(trip_id="t-1")
    assert NoSuchTrip(trip_id="t-1") != NoSuchTrip(trip_id="t-2")
    assert NoSuchTrip(trip_id="t-1") != NoSuchLeg(trip_id="t-1", leg=1)
    fault = NoSuchTrip(trip_id="t-1")
    assert len({fault, fault}) == 1  # pyright: ignore[reportUnhashable] - log handlers keep exceptions in sets


def test_a_fault_inherits_fields_defaults_and_status() -> None:
    fault = NoSuchLeg(trip_id="t-1", leg=2)
    assert (fault.trip_id, fault.hint, fault.leg) == ("t-1", "look again", 2)
    assert (NoSuchLeg.status, NoSuchLeg.code) == (404, "fault:NoSuchLeg")
    with pytest.raises(NoSuchTrip):
        raise fault


def test_a_fault_has_its_record_as_a_twin() -> None:
    fault = NoSuchLeg(trip_id="t-1", leg=2)
    assert asdict(fault.to_record()) == {"trip_id": "t-1", "hint": "look again", "leg": 2}
    assert NoSuchLeg.from_record(fault.to_record()) == fault


@pytest.mark.parametrize("clone", [lambda fault: pickle.loads(pickle.dumps(fault)), copy.copy, copy.deepcopy])
def test_a_fault_survives_pickling_and_copying(clone: Callable[[Fault], Fault]) -> None:
    fault = NoSuchLeg(trip_id="t-1", leg=2)
    assert clone(fault) == fault
    assert clone(fault) is not fault


def test_defaults_of_a_fault_are_not_shared() -> None:
    class Rejected(Fault):
        reasons: list[str] = []

    Rejected().reasons.append("late")
    assert Rejected().reasons == []


def test_a_fault_may_constrain_its_fields() -> None:
    class TooMany(Fault):
        limit: Annotated[int, Meta(ge=1)]

    assert TooMany(limit=3).limit == 3


@pytest.mark.parametrize(
    ("fields", "complaint"), [({}, "trip_id"), ({"trip_id": "t-1", "colour": "red"}, "colour")], ids=["lacking", "more"]
)
def test_a_fault_refuses_fields_that_are_not_its_own(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(TypeError, match=complaint):
        NoSuchTrip(**fields)


def test_a_fault_without_an_error_status_is_refused() -> None:
    with pytest.raises(ContractError) as refused:

        class Fine(Fault, status=200):  # pyright: ignore[reportUnusedClass]
            pass

    assert str(refused.value) == "fault Fine: status=200 is no HTTP error status (400 to 599)"


@pytest.mark.parametrize("name", ["args", "status", "code", "record", "add_note", "with_traceback"])
def test_a_fault_field_cannot_hide_what_exceptions_have(name: str) -> None:
    with pytest.raises(ContractError) as refused:
        type("Odd", (Fault,), {"__annotations__": {name: "str"}, "__module__": __name__})
    assert str(refused.value) == f"fault Odd: a field cannot be named {name!r}, exceptions use that name"


def test_a_fault_whose_type_is_unknown_is_refused() -> None:
    with pytest.raises(ContractError) as refused:

        class Odd(Fault):  # pyright: ignore[reportUnusedClass]
            trip: Unknown  # type: ignore[name-defined]  # noqa: F821

    assert str(refused.value) == "fault Odd: the type 'Unknown' is not known when the contract is read"


def test_an_operation_may_be_declared_in_each_way() -> None:
    async def get(self: Any, trip_id: str) -> None: ...

    bare, bracketed = request(get), request()(get)
    assert isinstance(bare, Operation)
    assert isinstance(bracketed, Operation)
    assert (bare.faults, bracketed.faults) == ((), ())


def test_a_contract_that_extends_another_speaks_on_channels_of_its_own() -> None:
    class More(Trips, name="more", version="3.0"):
        @request
        async def extra(self) -> None: ...

    assert More.get.full_name == "more.get"
    assert More.get.channel.name == "more.v3.get"
    assert More.get.record is not Trips.get.record
    assert Trips.get.channel.name == "trips.v2.get"
    assert "extra" in check(More).operations


class _Getting(Contract, name="getting"):
    @request
    async def get(self, trip_id: str) -> str: ...


def _without_a_decorator() -> Any:
    class Bare(Contract):
        async def get(self, trip_id: str) -> str: ...


def _without_async_either() -> Any:
    class Bare(Contract):
        def get(self, trip_id: str) -> str: ...


def _static_without_a_decorator() -> Any:
    class Bare(Contract):
        @staticmethod
        async def get(trip_id: str) -> str: ...


def _with_streams() -> Any:
    class Bare(Contract):
        async def watch(self) -> Any:
            yield 1


def _covered_by_a_method() -> Any:
    class Bare(_Getting):
        async def get(self, trip_id: str) -> str: ...  # type: ignore[override]


def _covered_by_none() -> Any:
    class Bare(_Getting):
        get = None  # type: ignore[assignment]


def _covered_by_a_mixin() -> Any:
    class Plain:
        async def get(self, trip_id: str) -> str: ...

    class Bare(Plain, _Getting):  # type: ignore[misc]
        pass


def _wrapped() -> Any:
    def logged(operation: Any) -> Any:
        @functools.wraps(operation.function)
        async def call(*args: Any) -> Any: ...

        return call

    class Bare(Contract):
        @logged
        @request
        async def get(self, trip_id: str) -> str: ...


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (
            _without_a_decorator,
            "contract Bare: get has no decorator; write @request or another style above it, or call it _get",
        ),
        (_without_async_either, "contract Bare: get has no decorator"),
        (_static_without_a_decorator, "contract Bare: get has no decorator"),
        (_with_streams, "contract Bare: watch has no decorator"),
        (_covered_by_a_method, "contract Bare: get replaces the operation _Getting.get"),
        (
            _covered_by_none,
            "contract Bare: get replaces the operation _Getting.get, which a contract cannot take back;",
        ),
        (_covered_by_a_mixin, "contract Bare: get replaces the operation _Getting.get"),
        (_wrapped, "contract Bare: get has no decorator"),
    ],
)
def test_what_looks_like_an_operation_and_is_none_is_refused_when_the_class_is_made(
    make: Callable[[], Any], complaint: str
) -> None:
    with pytest.raises(ContractError) as caught:
        make()
    assert str(caught.value).startswith(complaint)


def test_a_contract_may_hold_private_functions_types_and_constants() -> None:
    class Rich(_Getting, name="rich"):
        limit = 5

        class Place(Struct):
            lat: float

        @staticmethod
        def _round(value: float) -> float:
            return round(value, 2)

        @request
        async def get(self, trip_id: str) -> str: ...

    assert list(check(Rich).operations) == ["get"]
    assert Rich._round(1.234) == 1.23
