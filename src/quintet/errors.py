"""Every failure that Quintet raises, as one tree. Foreign errors are translated into it at one door each.

QuintetError
├── ConfigurationError            wrong before the first call: contract, service, address, policy
│   ├── ContractError             the contract contradicts itself (duplicate numbers, unknown types)
│   ├── AddressError              an unknown scheme, a malformed or unusable address
│   └── CannotCarry               no address given can carry an operation's style
├── CallError                     a call that brought no answer; `safety` says whether to repeat it
│   ├── Unavailable               nobody could be reached                              not sent
│   │   └── CircuitOpen           our own circuit breaker refused it                   not sent
│   ├── Overloaded                refused before work was begun                        not sent
│   │   ├── LimitReached          our own limit (bulkhead, rate) refused it            not sent
│   │   └── ChannelFull           the channel holds as many messages as it may         not sent
│   ├── DeadlineExceeded          the time was up (also a TimeoutError)                unknown
│   ├── ConnectionLost            sent, and then the connection broke                  unknown
│   ├── Cancelled                 the pending work was cancelled                       failed
│   ├── RemoteError               the service failed; the details are in its log       failed
│   ├── InvalidMessage            it does not fit the contract; `path` says where      failed
│   ├── TooLarge                  over the limit on size                               failed
│   ├── UnknownOperation          nobody there serves this operation or version        failed
│   ├── UnsupportedMediaType      the receiver does not read this format               failed
│   ├── NotAcceptable             the receiver does not write this format              failed
│   └── UnknownPending            no pending answer of that id                         failed
├── TransportError                a transport or its broker failed outside a call (corrupt file, disk full, port in use)
│   └── ProtocolError             the bytes that came are none of the wire's: the connection is given up
├── Declined                      a responder that does not answer a survey (raised by handlers)
└── Fault                         a failure that the contract declares: an answer (contract.py)
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar

import msgspec


class Safety(Enum):
    """Whether a failed call may be repeated."""

    NOT_SENT = "not sent"  # the receiver never saw it: repeat anywhere
    UNKNOWN = "unknown"  # it may have been done: repeat only what is idempotent
    FAILED = "failed"  # the receiver answered: repeating changes nothing by itself


class QuintetError(Exception):
    """The root: everything that Quintet raises on purpose."""


class ConfigurationError(QuintetError):
    """Found at start-up: says what is wrong, where, and what to write instead."""


class ContractError(ConfigurationError):
    """The contract contradicts itself."""


class AddressError(ConfigurationError):
    """An address that cannot be used."""


class CannotCarry(ConfigurationError):
    """A style that no given address can carry: names the operation, the transport and the missing trait."""


class TransportError(QuintetError):
    """A transport or its broker failed outside a call."""


class ProtocolError(TransportError):
    """What came from the other end is none of its wire's frames, or over a limit: the connection is given up."""


class Declined(QuintetError):
    """Raised by a handler of a survey: it has no answer, and that is no failure."""


class CallError(QuintetError):
    """A call that brought no answer.

    `code` names the class on the wire, `http_status` over REST. `correlation_id` finds the call in the service's log.
    `retry_after` (seconds) is what the receiver or a local limit asked for, where it said so. `path` is the field that
    did not fit, as "pickup.lat", where one is known.
    """

    code: ClassVar[str] = "failed"
    http_status: ClassVar[int] = 500
    default_safety: ClassVar[Safety] = Safety.FAILED

    def __init__(
        self,
        message: str,
        *,
        safety: Safety | None = None,
        correlation_id: str = "",
        retry_after: float | None = None,
        path: str = "",
    ) -> None:
        super().__init__(message)
        self.safety = safety or self.default_safety
        self.correlation_id = correlation_id
        self.retry_after = retry_after
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.args[0], self.__dict__))


def _rebuild(kind: type[CallError], message: str, state: dict[str, object]) -> CallError:
    error = kind(message)
    error.__dict__.update(state)
    return error


class Unavailable(CallError):
    """Nobody could be reached: the call was not sent."""

    code, http_status, default_safety = "unavailable", 503, Safety.NOT_SENT


class CircuitOpen(Unavailable):
    """Our own circuit breaker refused it; `retry_after` says when it will try again."""

    code, http_status = "circuit-open", 503


class Overloaded(CallError):
    """Refused before work was begun: safe to repeat elsewhere."""

    code, http_status, default_safety = "overloaded", 503, Safety.NOT_SENT


class LimitReached(Overloaded):
    """Our own limit on outstanding requests or on their rate refused it."""

    code, http_status = "limit-reached", 503


class ChannelFull(Overloaded):
    """The channel holds as many messages as it may: refused, nothing was stored."""

    code, http_status = "channel-full", 503


class DeadlineExceeded(CallError, TimeoutError):
    """The time was up. `safety` is NOT_SENT where it was up before sending."""

    code, http_status, default_safety = "deadline", 504, Safety.UNKNOWN


class ConnectionLost(CallError):
    """Sent, and then the connection broke before the answer came."""

    code, http_status, default_safety = "connection-lost", 502, Safety.UNKNOWN


class Cancelled(CallError):
    """The pending work was cancelled before it had an answer."""

    code, http_status = "cancelled", 410


class RemoteError(CallError):
    """The service failed. Its log holds the details under `correlation_id`; none of them travel.

    `answered`: it is well and said no, by a fault that our contract does not declare or a status such as 409. That is
    not counted as a failure of the service.
    """

    code, http_status = "remote", 500
    answered = False


class InvalidMessage(CallError):
    """What was sent does not fit the contract; `path` names the field, as "pickup.lat"."""

    code, http_status = "invalid", 422


class TooLarge(CallError):
    """Over the limit on size."""

    code, http_status = "too-large", 413


class UnknownOperation(CallError):
    """Nobody there serves this operation, or this version of it."""

    code, http_status = "unknown-operation", 404


class UnsupportedMediaType(CallError):
    """The receiver does not read this format."""

    code, http_status = "unsupported-media-type", 415


class NotAcceptable(CallError):
    """The receiver does not write any format that was asked for."""

    code, http_status = "not-acceptable", 406


class UnknownPending(CallError):
    """There is no pending answer of that id: never submitted, or kept no longer."""

    code, http_status = "unknown-pending", 404


CALLERS_MISTAKES = (InvalidMessage, TooLarge, UnknownOperation, UnknownPending, UnsupportedMediaType, NotAcceptable)
"""What the call itself did wrong: the service is well, and no fallback stands in."""


def _descend(kind: type[CallError]) -> list[type[CallError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _descend(child))]


BY_CODE: dict[str, type[CallError]] = {kind.code: kind for kind in _descend(CallError)}
"""Every failure that may travel, by its code on the wire."""


class Problem(msgspec.Struct, kw_only=True, omit_defaults=True, rename={"retry_after": "retry-after"}):
    """How a failure travels, on every transport: RFC 9457 problem details with our extension members."""

    type: str = "about:blank"
    title: str = ""
    status: int = 0
    detail: str = ""
    code: str = ""
    path: str = ""
    correlation_id: str = ""
    safety: str = ""
    retry_after: float | None = None


PROBLEM_MEDIA_TYPE = "application/problem+json"
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Problem).decode


def to_problem(error: CallError) -> bytes:
    """A failure as problem details (RFC 9457, section 3), JSON on every transport."""
    return _encode(
        Problem(
            title=type(error).__name__,
            status=error.http_status,
            detail=str(error),
            code=error.code,
            path=error.path,
            correlation_id=error.correlation_id,
            safety=error.safety.value,
            retry_after=error.retry_after,
        )
    )


def from_problem(body: bytes, code: str = "") -> CallError:
    """The failure that `to_problem` wrote; anything unreadable becomes a RemoteError that says so."""
    try:
        problem = _decode(body)
    except (msgspec.DecodeError, RecursionError):  # nested too deep
        problem = Problem(detail="the service failed and its error could not be read")
    kind = BY_CODE.get(problem.code or code, RemoteError)
    return kind(
        problem.detail or problem.title,
        safety=next((s for s in Safety if s.value == problem.safety), None),
        correlation_id=problem.correlation_id,
        retry_after=problem.retry_after,
        path=problem.path,
    )
