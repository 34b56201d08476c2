"""How an attempt ended, as breakers, balancers and metrics count it."""

from __future__ import annotations

from quintet.contract import Fault
from quintet.errors import CALLERS_MISTAKES, Cancelled, CircuitOpen, DeadlineExceeded, LimitReached, RemoteError
from quintet.message import Message

SUCCESS, SLOW, FAILURE, TIMEOUT, ANSWERED, REFUSED, CANCELLED, SHORT_CIRCUITED = range(8)
OUTCOMES = ("success", "slow", "failure", "timeout", "answered", "refused", "cancelled", "short-circuited")
"""Up to TIMEOUT they count in an error rate. ANSWERED: with a fault, or with what is wrong in the request.
REFUSED: by our own limit. CANCELLED: by the caller, or because it had less time than our own time-out."""

_ANSWERS = (Fault, Cancelled, *CALLERS_MISTAKES)


def outcome_of(error: BaseException, message: Message) -> int:
    """How an attempt to send the message ended that raised this."""
    if not isinstance(error, Exception):
        return CANCELLED
    if isinstance(error, _ANSWERS):
        return ANSWERED
    if isinstance(error, CircuitOpen | LimitReached):
        return REFUSED
    if isinstance(error, DeadlineExceeded):
        hurried, until = (
            message.hurried,
            message.until,
        )  # an attempt's own time-out, where it is shorter, is the policy's
        return CANCELLED if hurried is not None and until is not None and until >= hurried else TIMEOUT
    return ANSWERED if isinstance(error, RemoteError) and error.answered else FAILURE
