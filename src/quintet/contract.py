"""What one service promises: operations in five styles, their types, their declared faults, a version."""

from __future__ import annotations

import copy
import inspect
import operator
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from enum import Enum
from functools import cache, cached_property
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Concatenate,
    Generic,
    Literal,
    ParamSpec,
    TypeAlias,
    TypeVar,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

import msgspec
from msgspec import NODEFAULT, Struct

from quintet.call import Call, PendingCall
from quintet.errors import ContractError, QuintetError
from quintet.message import Channel
from quintet.transport import Trait

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")


class Style(Enum):
    """The five interaction styles."""

    REQUEST = "request/response"
    NOTIFICATION = "notification"
    ASYNC_REQUEST = "request/async response"
    EVENT = "publish/subscribe"
    SURVEY = "publish/async responses"


Request: TypeAlias = Literal[Style.REQUEST]
Notification: TypeAlias = Literal[Style.NOTIFICATION]
AsyncRequest: TypeAlias = Literal[Style.ASYNC_REQUEST]
Event: TypeAlias = Literal[Style.EVENT]
Survey: TypeAlias = Literal[Style.SURVEY]

NEEDS: dict[Style, frozenset[Trait]] = {
    Style.REQUEST: frozenset(),
    Style.NOTIFICATION: frozenset(),
    Style.ASYNC_REQUEST: frozenset(),
    Style.EVENT: frozenset({Trait.FANOUT}),
    Style.SURVEY: frozenset({Trait.FANOUT}),
}
"""What a transport must be able to do to carry a style; all the rest the core does for it."""

FANOUT = frozenset({Style.EVENT, Style.SURVEY})
DURABLE = frozenset({Style.NOTIFICATION, Style.ASYNC_REQUEST, Style.EVENT})  # nobody waits for it, so it must be kept

LONGEST_WAIT = 20.0  # seconds that one request for a pending answer may stay with the service; then it is asked again


_TAKEN = frozenset(dir(Exception)) | {"record", "status", "code"}


@dataclass_transform(kw_only_default=True)
class Fault(QuintetError):
    """A failure that the contract declares, with fields: an answer, not a breakdown.

    `class NoSuchPassenger(Fault, status=404): passenger_id: str`; `status` is the HTTP status that REST answers with.
    """

    status: ClassVar[int] = 400
    record: ClassVar[type[Struct]] = Struct  # the twin that travels: a class cannot be a Struct and an exception
    code: ClassVar[str] = "fault:Fault"

    def __init_subclass__(cls, *, status: int | None = None) -> None:
        super().__init_subclass__()
        if status is not None:
            cls.status = status
        if not 400 <= cls.status <= 599:
            raise ContractError(f"fault {cls.__name__}: status={cls.status} is no HTTP error status (400 to 599)")
        cls.code = f"fault:{cls.__name__}"
        for name in inspect.get_annotations(cls):
            if name in _TAKEN:
                raise ContractError(f"fault {cls.__name__}: a field cannot be named {name!r}, exceptions use that name")
        hints = _hints(cls, f"fault {cls.__name__}")
        fields = [
            (name, kind, getattr(cls, name)) if hasattr(cls, name) else (name, kind)
            for name, kind in hints.items()
            if name not in ("status", "record", "code")
        ]
        cls.record = msgspec.defstruct(cls.__name__, fields, kw_only=True, module=cls.__module__)

    def __init__(self, **fields: Any) -> None:
        """Raise TypeError for a field that does not fit its type: here, where the mistake is, and not on its way."""
        twin = self.record(**fields)
        try:
            _decoder_of(self.record).decode(_encode(twin))
        except UnicodeEncodeError:
            raise TypeError(f"{type(self).__name__}: a text in it holds half a surrogate pair") from None
        except (msgspec.MsgspecError, TypeError, OverflowError, RecursionError) as error:
            raise TypeError(f"{type(self).__name__}: {error}") from None
        self._hold(twin)

    def _hold(self, twin: Struct) -> None:
        super().__init__(*(getattr(twin, name) for name in twin.__struct_fields__))
        for name in twin.__struct_fields__:
            setattr(self, name, getattr(twin, name))

    def to_record(self) -> Struct:
        """The fields as the record that travels."""
        return self.record(**{name: getattr(self, name) for name in self.record.__struct_fields__})

    @classmethod
    def from_record(cls, record: Struct) -> Fault:
        """The fault of a record that was read, and so checked."""
        made = cls.__new__(cls)
        made._hold(record)
        return made

    def among(self, declared: Sequence[type[Fault]]) -> Fault | None:
        """The fault as the nearest of its classes that is declared, with the fields of that; None where none is."""
        kinds: Sequence[type[Any]] = type(self).__mro__
        for kind in kinds:
            if kind in declared:
                if kind is type(self):
                    return self
                fields = {name: getattr(self, name) for name in kind.record.__struct_fields__}
                nearest: Fault = kind.from_record(kind.record(**fields))
                return nearest
        return None

    def __str__(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.record.__struct_fields__)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, Fault) and other.args == self.args

    __hash__ = QuintetError.__hash__

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), {name: getattr(self, name) for name in self.record.__struct_fields__}))


_encode = msgspec.msgpack.Encoder().encode


@cache
def _decoder_of(record: type[Struct]) -> msgspec.msgpack.Decoder[Struct]:
    return msgspec.msgpack.Decoder(record)


def _rebuild(kind: type[Fault], fields: dict[str, Any]) -> Fault:
    return kind(**fields)


class Link(Struct, frozen=True):
    """An operation that may follow from a reply: allowed where `when(reply)` holds (always, if None).

    Its parameters are filled from the reply's fields of the same name, or as `fill` says: {"trip_id": "id"}.
    """

    operation: str
    when: Callable[[Any], bool] | None = None
    fill: Mapping[str, str] = {}


class Http(Struct, frozen=True):
    """How an operation looks over REST.

    `route` is "VERB /path/{parameter}"; `status` what success answers (201 where `location` is given, 204 where nothing
    is returned, else 200); `location` a path template filled from the reply's fields; `cache` a Cache-Control value.
    """

    route: str
    status: int | None = None
    location: str = ""
    cache: str = ""


_ROUTE = re.compile(r"(GET|POST|PUT|PATCH|DELETE) (/[^\s?#]*)")
_NAME = re.compile(r"[a-z][a-z0-9_-]*", re.IGNORECASE)
_VERSION = re.compile(r"(\d+)\.(\d+)")


class Operation(Generic[P, R, S]):
    """One thing that can be said, in exactly one style.

    On the contract's class it is this object; on a connected client, a typed call.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        style: Style,
        *,
        http: str | Http = "",
        faults: Sequence[type[Fault]] = (),
        links: Mapping[str, str | Link] | None = None,
        key: str = "",
        expires: float | None = None,
        idempotent: bool | None = None,
        deprecated: str = "",
    ) -> None:
        self.function = function
        self.style = style
        self.http = Http(http) if isinstance(http, str) else http
        self.faults = tuple(faults)
        self.links = {name: Link(to) if isinstance(to, str) else to for name, to in (links or {}).items()}
        self.key = key
        self.expires = expires
        self.deprecated = deprecated
        self.name: str = function.__name__
        self.contract: type[Contract] = Contract
        self.doc = inspect.getdoc(function) or ""
        verb = self.http.route.partition(" ")[0]
        self.parent: Any = None  # of a companion: the async request that it belongs to
        self.idempotent = idempotent if idempotent is not None else verb in ("GET", "PUT", "DELETE")

    def _owned_by(self, contract: type[Contract]) -> Operation[P, R, S]:
        mine: Operation[P, R, S] = copy.copy(self)
        for compiled in ("channel", "record", "companions", "result"):  # what carries the contract's name
            mine.__dict__.pop(compiled, None)
        mine.contract = contract
        return mine

    def __set_name__(self, owner: type[Contract], name: str) -> None:
        self.contract, self.name = owner, name

    @overload
    def __get__(self: Operation[P, R, Request], instance: None, owner: type[Any]) -> _OrCall[P, R, Request]: ...
    @overload
    def __get__(
        self: Operation[P, R, Notification], instance: None, owner: type[Any]
    ) -> _OrCall[P, R, Notification]: ...
    @overload
    def __get__(self: Operation[P, R, AsyncRequest], instance: None, owner: type[Any]) -> _OrPendingCall[P, R]: ...
    @overload
    def __get__(self, instance: None, owner: type[Any]) -> Operation[P, R, S]: ...
    @overload
    def __get__(self: Operation[P, R, Request], instance: Contract, owner: type[Any]) -> Call[P, R]: ...
    @overload
    def __get__(self: Operation[P, R, Notification], instance: Contract, owner: type[Any]) -> Call[P, R]: ...
    @overload
    def __get__(self: Operation[P, R, AsyncRequest], instance: Contract, owner: type[Any]) -> PendingCall[P, R]: ...
    @overload
    def __get__(self, instance: object, owner: type[Any]) -> Operation[P, R, S]: ...
    def __get__(self, instance: object, owner: type[Any]) -> Any:
        if not isinstance(instance, Contract):
            return self
        # a connected client holds its calls in its own __dict__, which comes first: this one is not connected
        raise AttributeError(
            f"{self} is sent by its own service (service.publish or service.ask), not called by a client"
            if self.style in FANOUT
            else f"{self}: this client is not connected yet (async with connect(...), or a service that is running)"
        )

    if not TYPE_CHECKING:  # a type checker takes it for a blocking client's call, see _OrCall

        def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
            raise TypeError(f"{self!r} is an operation: it is called on a connected client, not on its contract")

    def __repr__(self) -> str:
        return f"{self.contract.__name__}.{self.name}"

    @property
    def full_name(self) -> str:
        """As it stands in messages and logs: "passengers.get"."""
        return f"{self.contract.__quintet__.name}.{self.name}"

    @cached_property
    def channel(self) -> Channel:
        """Where its messages go; the major version is part of the name."""
        info = self.contract.__quintet__
        return Channel(
            f"{info.name}.v{info.major}.{self.name}",
            fanout=self.style in FANOUT,
            durable=self.style in DURABLE,
            keyed=bool(self.key_of) and self.style in DURABLE,
        )

    @cached_property
    def _hints(self) -> dict[str, Any]:
        return _hints(self.function, f"{self!r}")

    @cached_property
    def record(self) -> type[Struct]:
        """The parameters as one record, in their order. Raises ContractError."""
        positional: list[Any] = []
        keyword: list[Any] = []
        parameters = list(inspect.signature(self.function).parameters.values())
        if not parameters or parameters[0].name != "self":
            raise ContractError(f"{self!r}: an operation is a method, its first parameter must be self")
        for parameter in parameters[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
                raise ContractError(f"{self!r}: parameter {parameter} must be a plain named parameter")
            if parameter.name not in self._hints:
                raise ContractError(f"{self!r}: parameter {parameter.name!r} needs a type annotation")
            field: tuple[Any, ...] = (parameter.name, self._hints[parameter.name])
            if parameter.default is not parameter.empty:
                field = (*field, parameter.default)
            (keyword if parameter.kind is parameter.KEYWORD_ONLY else positional).append(field)
        name = f"{self.contract.__name__}_{self.name}"
        built = msgspec.defstruct(name, positional, module=self.contract.__module__)
        if keyword:
            built = msgspec.defstruct(name, keyword, bases=(built,), kw_only=True, module=self.contract.__module__)
        return built

    @cached_property
    def result(self) -> Any:
        """The type of the reply or answer; NoneType where there is none."""
        found = self._hints.get("return", NODEFAULT)
        if found is NODEFAULT:
            raise ContractError(f"{self!r}: the return type must be annotated (-> None where nothing comes back)")
        return found

    @cached_property
    def key_of(self) -> Callable[[Struct], str] | None:
        """Reads the ordering key out of the parameters, as `key="trip.id"` says."""
        if not self.key:
            return None
        read = operator.attrgetter(self.key)
        return lambda record: str(read(record))

    @cached_property
    def companions(self) -> tuple[Operation[Any, R, Request], Operation[Any, None, Request]]:
        """The two requests that an async request compiles into beside its submission: `result` (id, wait in seconds)
        fetches the answer, `cancel` (id) gives it up."""

        async def result(self: Any, id: str, wait: float = 0.0) -> Any: ...  # noqa: A002 - the name on the wire
        async def cancel(self: Any, id: str) -> None: ...  # noqa: A002 - the name on the wire

        return self._derive(result, self.result), self._derive(cancel, type(None))

    def _derive(self, function: Callable[..., Any], result: Any) -> Operation[Any, Any, Request]:
        derived: Operation[Any, Any, Request] = Operation(
            function, Style.REQUEST, faults=self.faults, idempotent=True, deprecated=self.deprecated
        )
        derived.contract, derived.name = self.contract, f"{self.name}.{function.__name__}"
        derived.__dict__["result"] = result
        derived.parent = self
        return derived

    def check(self) -> None:
        """Compiles it all and raises ContractError for what contradicts itself."""
        if not inspect.iscoroutinefunction(self.function):
            raise ContractError(f"{self!r}: write `async def {self.name}`")
        record, fields = self.record, {}
        _ = self.result
        for field in msgspec.structs.fields(record):
            fields[field.name] = field.type
        if self.style in (Style.NOTIFICATION, Style.EVENT) and self.result is not type(None):
            raise ContractError(f"{self!r}: nothing comes back from a {self.style.value}, write -> None")
        if self.http.route:
            self._check_route(fields)
        if self.key:
            self._check_key(fields)
        for fault in self.faults:
            if not (isinstance(fault, type) and issubclass(fault, Fault)):
                raise ContractError(f"{self!r}: faults= takes subclasses of Fault, not {fault!r}")
        for name, link in self.links.items():
            if link.operation not in self.contract.__quintet__.operations:
                raise ContractError(f"{self!r}: link {name!r} names the operation {link.operation!r}, there is none")
        if self.style is Style.ASYNC_REQUEST:
            for companion in self.companions:
                companion.check()

    def _check_route(self, fields: dict[str, Any]) -> None:
        if not _ROUTE.fullmatch(self.http.route):
            raise ContractError(
                f"{self!r}: http={self.http.route!r} must read 'VERB /path', as 'GET /trips/{{trip_id}}'"
            )
        for parameter in re.findall(r"{([^}]*)}", self.http.route):
            if parameter not in fields:
                raise ContractError(f"{self!r}: {{{parameter}}} in the path is no parameter of the operation")

    def _check_key(self, fields: dict[str, Any]) -> None:
        first, *rest = self.key.split(".")
        kind = fields.get(first, NODEFAULT)
        for step in rest:
            while get_origin(kind) is Annotated:
                kind = get_args(kind)[0]
            kind = _hints(kind, f"{self!r}").get(step, NODEFAULT) if isinstance(kind, type) else NODEFAULT
        if kind is NODEFAULT:
            raise ContractError(f"{self!r}: key={self.key!r} names no field of its parameters")


if TYPE_CHECKING:
    import quintet.blocking_call as blocking

    # A blocking client is typed as its contract's class (blocking.py), so what stands on the class is typed as the
    # operation and as the call that blocks. In truth it is the one on the class, the other on such a client.
    class _OrCall(Operation[P, R, S], blocking.Call[P, R]): ...

    class _OrPendingCall(Operation[P, R, AsyncRequest], blocking.PendingCall[P, R]): ...


class ContractInfo(Struct, frozen=True):
    """What a contract's class was declared with."""

    name: str
    version: str
    major: int
    level: int
    operations: dict[str, Operation[Any, Any, Any]]


class Contract:
    """Derive from it, with the operations as decorated methods without bodies.

    `class Trips(Contract, name="trips", version="1.0"): ...`; `http_level` is the level of Richardson's maturity model
    that REST serves it at: 0 (one address), 1 (resources), 2 (verbs, the default), 3 (links).
    """

    __quintet__: ClassVar[ContractInfo] = ContractInfo("contract", "0.0", 0, 2, {})

    def __init_subclass__(cls, *, name: str = "", version: str = "1.0", http_level: int = 2) -> None:
        super().__init_subclass__()
        name = name or cls.__name__.lower()
        where = f"contract {cls.__name__}"
        if not _NAME.fullmatch(name):
            raise ContractError(f"{where}: name={name!r} must be letters, digits, - and _, a letter first")
        matched = _VERSION.fullmatch(version)
        if not matched:
            raise ContractError(f"{where}: version={version!r} must read 'major.minor', as '1.0'")
        if http_level not in (0, 1, 2, 3):
            raise ContractError(f"{where}: http_level={http_level!r} must be 0, 1, 2 or 3")
        operations = _operations(cls, where)
        for attribute, operation in operations.items():
            if operation.contract is not cls:  # an extended contract speaks for itself, on channels of its own
                operations[attribute] = operation._owned_by(cls)
                setattr(cls, attribute, operations[attribute])
        cls.__quintet__ = ContractInfo(name, version, int(matched[1]), http_level, operations)

    def __init__(self) -> None:
        self.__dict__.clear()  # a client: connect() puts its calls here

    def __repr__(self) -> str:
        state = "connected" if self.__dict__ else "not connected"
        return f"<{type(self).__name__} client, {state}>"


def _operations(contract: type[Contract], where: str) -> dict[str, Operation[Any, Any, Any]]:
    """The operations of a class and its parents. Raises ContractError for what only looks like one."""
    held: dict[str, Any] = {}
    inherited: dict[str, Operation[Any, Any, Any]] = {}
    for parent in reversed(contract.__mro__):
        held |= vars(parent)
        inherited |= {name: value for name, value in vars(parent).items() if isinstance(value, Operation)}
    for name, value in held.items():
        if isinstance(value, Operation):
            continue
        if name in inherited:
            raise ContractError(
                f"{where}: {name} replaces the operation {inherited[name]!r}, which a contract cannot take back;"
                " decorate it, or do not extend that contract"
            )
        if not name.startswith("_") and inspect.isfunction(getattr(value, "__func__", value)):
            raise ContractError(
                f"{where}: {name} has no decorator; write @request or another style above it, or call it _{name}"
            )
    return {name: held[name] for name in inherited}


def check(contract: type[Contract]) -> ContractInfo:
    """Compiles all operations; raises ContractError for the first thing that contradicts itself."""
    info = contract.__quintet__
    routes: dict[str, Operation[Any, Any, Any]] = {}
    for operation in info.operations.values():
        operation.check()
        route = re.sub(r"{[^}]*}", "{}", operation.http.route)
        if route and routes.setdefault(route, operation) is not operation:
            raise ContractError(f"{operation!r} and {routes[route]!r} both answer {operation.http.route!r}")
    return info


def _hints(thing: Any, where: str) -> dict[str, Any]:
    try:
        return get_type_hints(thing, include_extras=True)
    except NameError as error:
        raise ContractError(f"{where}: the type {error.name!r} is not known when the contract is read") from None


# The decorators. Each comes bare (@request) and with options (@request(...)).

_Method: TypeAlias = Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]


@overload
def request(function: _Method[P, R], /) -> Operation[P, R, Request]: ...
@overload
def request(
    *,
    http: str | Http = "",
    faults: Sequence[type[Fault]] = (),
    links: Mapping[str, str | Link] | None = None,
    idempotent: bool | None = None,
    deprecated: str = "",
) -> Callable[[_Method[P, R]], Operation[P, R, Request]]: ...
def request(function: Any = None, /, **options: Any) -> Any:
    """Request/response: the client waits for the reply, or has the fault raised."""
    return _decorate(Style.REQUEST, function, options)


@overload
def notification(function: _Method[P, None], /) -> Operation[P, None, Notification]: ...
@overload
def notification(
    *, http: str | Http = "", key: str = "", expires: float | None = None, deprecated: str = ""
) -> Callable[[_Method[P, None]], Operation[P, None, Notification]]: ...
def notification(function: Any = None, /, **options: Any) -> Any:
    """Notification (one-way): the client goes on once the message is accepted."""
    return _decorate(Style.NOTIFICATION, function, options)


@overload
def async_request(function: _Method[P, R], /) -> Operation[P, R, AsyncRequest]: ...
@overload
def async_request(
    *,
    http: str | Http = "",
    faults: Sequence[type[Fault]] = (),
    key: str = "",
    expires: float | None = None,
    deprecated: str = "",
) -> Callable[[_Method[P, R]], Operation[P, R, AsyncRequest]]: ...
def async_request(function: Any = None, /, **options: Any) -> Any:
    """Request/async response: the client gets a Pending at once and the answer later."""
    return _decorate(Style.ASYNC_REQUEST, function, options)


@overload
def event(function: _Method[P, None], /) -> Operation[P, None, Event]: ...
@overload
def event(
    *, key: str = "", expires: float | None = None, deprecated: str = ""
) -> Callable[[_Method[P, None]], Operation[P, None, Event]]: ...
def event(function: Any = None, /, **options: Any) -> Any:
    """Publish/subscribe: the contract's service publishes, any group may hear."""
    return _decorate(Style.EVENT, function, options)


@overload
def survey(function: _Method[P, R], /) -> Operation[P, R, Survey]: ...
@overload
def survey(*, deprecated: str = "") -> Callable[[_Method[P, R]], Operation[P, R, Survey]]: ...
def survey(function: Any = None, /, **options: Any) -> Any:
    """Publish/async responses: the contract's service asks, any group may answer in time."""
    return _decorate(Style.SURVEY, function, options)


def _decorate(style: Style, function: Callable[..., Any] | None, options: dict[str, Any]) -> Any:
    if function is not None:
        return Operation(function, style)
    return lambda function: Operation(function, style, **options)
