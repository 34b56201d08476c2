"""What users configure for calls: `Policy(timeout=0.3)` for a contract, `on(operation, ...)` for one operation."""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar, Union, overload

import msgspec
from msgspec import Struct

from quintet.clock import SYSTEM, Clock
from quintet.contract import Contract, Operation, Style
from quintet.errors import BY_CODE, ConfigurationError

P = ParamSpec("P")
R = TypeVar("R")

Per: TypeAlias = Literal["service", "operation"]
Off: TypeAlias = Literal[False]


class Bulkhead(Struct, frozen=True, forbid_unknown_fields=True):
    """At most `limit` outstanding requests; `queue` more may wait for a place, first come first served.

    One for all operations of a service unless `per="operation"` (which `on` implies): what a dead service can hold of
    us is one amount, whichever way it is asked.
    """

    limit: int = 1000
    queue: int = 0
    per: Per = "service"

    def __post_init__(self) -> None:
        _demand(self, self.limit >= 1, f"limit={self.limit!r}: at least 1 request must be allowed")
        _demand(self, self.queue >= 0, f"queue={self.queue!r}: 0 (nobody waits) or more may wait")


class Breaker(Struct, frozen=True, forbid_unknown_fields=True):
    """Refuses calls for `open_for` seconds once, of at least `min_calls` calls in the last `window` seconds, a share of
    `error_rate` or more failed, or (with `slow_call` seconds) a share of `slow_rate` took longer than that.

    Then `probes` calls decide: it closes, or opens for twice as long, `longest` seconds at most. `count_refusals`: our
    own limit's refusals are errors too. `force_open` beats `force_closed`, which goes on counting.

    One for each operation, as Hystrix has it, unless `per="service"`: an operation that fails (its database is gone)
    must not take the healthy ones with it, and a dead service opens each of them soon enough.
    """

    error_rate: float = 0.5
    min_calls: int = 20
    window: float = 10.0
    open_for: float = 5.0
    longest: float = 300.0
    probes: int = 1
    slow_call: float | None = None
    slow_rate: float = 0.5
    count_refusals: bool = False
    force_open: bool = False
    force_closed: bool = False
    per: Per = "operation"

    def __post_init__(self) -> None:
        for name in ("error_rate", "slow_rate"):
            rate = getattr(self, name)
            _demand(self, 0 < rate <= 1, f"{name}={rate!r}: a share must be more than 0 and at most 1 (0.5 is 50 %)")
        for name in ("min_calls", "probes"):
            _demand(self, getattr(self, name) >= 1, f"{name}={getattr(self, name)!r}: must be 1 or more")
        for name in ("window", "open_for"):
            _demand_seconds(self, name)
        if self.slow_call is not None:
            _demand_seconds(self, "slow_call")
        _demand(self, self.longest >= self.open_for, f"longest={self.longest!r}: must be at least open_for")


class Retry(Struct, frozen=True, forbid_unknown_fields=True):
    """Up to `times` more attempts, where the operation is idempotent or the error says "not sent".

    All retries of a service together may be a share of `budget` of its calls, and 10 a second, over 10 seconds. The
    n-th wait is by chance from 0 to `first` * 2^(n-1) seconds, `longest` at most ("full jitter"), and never less than
    the error's `retry_after`; one that would pass the deadline is not begun. `attempt_timeout`: what each attempt gets
    of the whole time-out, in seconds; without it one that hangs leaves no time for another.
    """

    times: int = 2
    budget: float = 0.2
    first: float = 0.05
    longest: float = 2.0
    attempt_timeout: float | None = None

    def __post_init__(self) -> None:
        _demand(
            self, self.times >= 1, f"times={self.times!r}: must be 1 or more (leave retry out where none is wanted)"
        )
        _demand(self, 0 <= self.budget <= 1, f"budget={self.budget!r}: must be a share from 0 to 1")
        _demand(self, 0 <= self.first <= self.longest, f"first={self.first!r}: must be from 0 to longest")
        if self.attempt_timeout is not None:
            _demand_seconds(self, "attempt_timeout")


class Hedge(Struct, frozen=True, forbid_unknown_fields=True):
    """Where an idempotent operation has no answer `after` so many seconds, another attempt is sent beside the first, up
    to `times`; the first answer counts, the others are cancelled. They may be a share of `budget` of the calls, and 10
    a second, over 10 seconds. Set `after` to what 95 % of the calls take.
    """

    after: float
    times: int = 1
    budget: float = 0.1

    def __post_init__(self) -> None:
        _demand_seconds(self, "after")
        _demand(self, self.times >= 1, f"times={self.times!r}: must be 1 or more")
        _demand(self, 0 <= self.budget <= 1, f"budget={self.budget!r}: must be a share from 0 to 1")


class Rate(Struct, frozen=True, forbid_unknown_fields=True):
    """At most `calls` in any `seconds`; what is over is refused at once."""

    calls: int
    seconds: float = 1.0
    per: Per = "service"

    def __post_init__(self) -> None:
        _demand(self, self.calls >= 1, f"calls={self.calls!r}: must be 1 or more")
        _demand_seconds(self, "seconds")


class Injection(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Faults for tests and drills: a share of `rate` of the calls waits `latency` seconds, then fails with `error` (the
    code of a CallError, as "unavailable") where one is named.

    Works only where the environment says QUINTET_INJECT=on when the client connects.
    """

    rate: float = 1.0
    latency: float = 0.0
    error: str = ""

    def __post_init__(self) -> None:
        _demand(self, 0 < self.rate <= 1, f"rate={self.rate!r}: a share must be more than 0 and at most 1")
        _demand(self, 0 <= self.latency < math.inf, f"latency={self.latency!r}: seconds must be 0 or more")
        _demand(self, not self.error or self.error in BY_CODE, f"error={self.error!r}: known are {', '.join(BY_CODE)}")


def _demand(settings: Struct, holds: bool, sentence: str) -> None:
    if not holds:  # also where a comparison with NaN said no
        raise ConfigurationError(f"{type(settings).__name__}({sentence})")


def _demand_seconds(settings: Struct, name: str) -> None:
    seconds = getattr(settings, name)
    _demand(settings, 0 < seconds < math.inf, f"{name}={seconds!r}: seconds must be more than 0")


class Policy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How calls are guarded. What is None is not set here, and comes from the next wider policy, at last from DEFAULT;
    False switches a part off.

    `cache`: while a handler works on one message, what it asks an idempotent operation a second time with the same
    arguments is answered from the first reply. `timeout`: seconds that a caller waits, at most; nested calls inherit
    what remains. The other parts are explained in
    their classes. A service has a policy too: its `bulkhead` limits the requests in work and its `rate` what it takes
    in; what is over is refused at once, and says that it may be sent elsewhere.
    """

    cache: bool | None = None
    timeout: float | None = None
    retry: Retry | bool | None = None
    hedge: Hedge | bool | None = None
    rate: Rate | bool | None = None
    breaker: Breaker | bool | None = None
    bulkhead: Bulkhead | bool | None = None
    injection: Injection | bool | None = None

    def __post_init__(self) -> None:
        if self.timeout is not None:
            _demand_seconds(self, "timeout")
        for name in self.__struct_fields__:
            given, part = getattr(self, name), _PARTS.get(name)
            if part and not (given is None or given is False or isinstance(given, part)):
                raise ConfigurationError(f"Policy({name}={given!r}): give a {part.__name__}(...), or False for none")

    def over(self, wider: Policy) -> Policy:
        """This policy, with what it leaves open taken from a wider one."""
        mine = {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not None}
        return msgspec.structs.replace(wider, **mine)

    @overload
    def guards(self, function: Callable[P, Awaitable[R]], /) -> Callable[P, Coroutine[Any, Any, R]]: ...
    @overload
    def guards(
        self, /, *, name: str = "", idempotent: bool = False, clock: Clock = SYSTEM
    ) -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Coroutine[Any, Any, R]]]: ...
    def guards(self, function: Any = None, /, **options: Any) -> Any:
        """Decorates any async function, so that this policy holds for it as for an operation of its own.

        `name` stands in errors and logs; a function that is not `idempotent` is repeated only after an error that says
        "not sent". The function raises what it raises, and CircuitOpen, LimitReached and DeadlineExceeded.
        """
        from quintet.guards import guard  # the filters that it loads read this module

        if function is not None:
            return guard(self, function)
        return lambda later: guard(self, later, **options)


_PARTS: dict[str, type[Struct]] = {
    "retry": Retry,
    "hedge": Hedge,
    "rate": Rate,
    "breaker": Breaker,
    "bulkhead": Bulkhead,
    "injection": Injection,
}

DEFAULT = Policy(timeout=1.0, bulkhead=Bulkhead(), breaker=Breaker())


class Stale(Struct, frozen=True):
    """A fallback: the last good reply to the same arguments, made by `stale`."""

    max_age: float


def stale(*, max_age: float) -> Stale:
    """Falls back on the last good reply to the same arguments where it is no older than so many seconds."""
    if not 0 < max_age < math.inf:
        raise ConfigurationError(f"stale(max_age={max_age!r}): seconds must be more than 0")
    return Stale(max_age)


Fallback: TypeAlias = Union[Stale, Callable[P, Awaitable[R]], R]  # noqa: UP007 - the variables need the old form
"""What is answered when a call fails: a stale reply, what an async function of the same parameters returns, a value."""


class On(Struct, frozen=True):
    """A policy for one operation, made by `on`."""

    operation: Operation[Any, Any, Any]
    policy: Policy
    fallback: tuple[Fallback[..., Any], ...] = ()


def on(
    operation: Operation[P, R, Any],
    *,
    cache: bool | None = None,
    timeout: float | None = None,
    retry: Retry | Off | None = None,
    hedge: Hedge | Off | None = None,
    rate: Rate | Off | None = None,
    breaker: Breaker | Off | None = None,
    bulkhead: Bulkhead | Off | None = None,
    injection: Injection | Off | None = None,
    fallback: Sequence[Fallback[P, R]] = (),
) -> On:
    """What differs for one operation: `connect(..., policy=[Policy(timeout=0.3), on(Trips.create, timeout=2.0)])`.

    `fallback`: what is answered when a call fails, the first that can: `stale(max_age=60)`, a value, or an async
    function with the operation's parameters. A limit that is given here is this operation's own.
    """
    if fallback and operation.style is not Style.REQUEST:
        raise ConfigurationError(
            f"on({operation!r}, fallback=...): a {operation.style.value} has no reply to stand in for"
        )
    for one in fallback:
        if inspect.isfunction(one) and not inspect.iscoroutinefunction(one):
            raise ConfigurationError(f"on({operation!r}, fallback=...): {one.__qualname__} must be `async def`")
    if hedge and not operation.idempotent:
        raise ConfigurationError(f"on({operation!r}, hedge=...): it may be done twice, and is not declared idempotent")
    if cache and not operation.idempotent:
        raise ConfigurationError(f"on({operation!r}, cache=True): it may do something, and is not declared idempotent")
    policy = Policy(
        cache=cache,
        timeout=timeout,
        retry=retry,
        hedge=hedge,
        rate=_own(rate),
        breaker=_own(breaker),
        bulkhead=_own(bulkhead),
        injection=injection,
    )
    return On(operation, policy, tuple(fallback))


_Part = TypeVar("_Part", bound=Struct)


def _own(part: _Part | Off | None) -> _Part | Off | None:
    return msgspec.structs.replace(part, per="operation") if isinstance(part, Struct) else part


Policies: TypeAlias = Policy | On | Sequence[Policy | On]


def resolve(contract: type[Contract], policies: Policies) -> dict[str, On]:
    """What is in force for each operation, by name. Raises ConfigurationError for a foreign operation."""
    given = [policies] if isinstance(policies, Policy | On) else list(policies)
    wide = DEFAULT
    for policy in given:
        if isinstance(policy, Policy):
            wide = policy.over(wide)
    found = {name: On(operation, wide) for name, operation in contract.__quintet__.operations.items()}
    for policy in given:
        if isinstance(policy, On):
            if policy.operation not in contract.__quintet__.operations.values():
                raise ConfigurationError(f"on({policy.operation!r}, ...) does not belong to {contract.__name__}")
            before = found[policy.operation.name]
            found[policy.operation.name] = On(
                policy.operation, policy.policy.over(before.policy), policy.fallback or before.fallback
            )
    return found
