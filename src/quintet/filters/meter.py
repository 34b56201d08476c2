"""What a service counts of what it handles: how it ended and how long it took (a caller's breaker counts its calls)."""

from __future__ import annotations

from quintet.contract import Fault
from quintet.errors import CallError, DeadlineExceeded, Declined, Overloaded, Safety
from quintet.filter import Guarded
from quintet.message import Handler, Message
from quintet.outcome import ANSWERED, CANCELLED, FAILURE, REFUSED, SUCCESS, outcome_of

PLACE = 5  # outermost: what the filters below refuse is counted too


def server(guarded: Guarded, handler: Handler) -> Handler:
    if guarded.operation.parent:
        return handler  # who waits for a pending answer: as long as it takes, which says nothing of the service
    now, totals, latencies = guarded.clock.now, guarded.meter.totals, guarded.meter.latencies

    async def meter(message: Message) -> Message | None:
        begun = now()
        try:
            reply = await handler(message)
        except BaseException as error:
            totals[_outcome_of(error, message)] += 1
            latencies.add(now() - begun)
            raise
        totals[SUCCESS] += 1
        latencies.add(now() - begun)
        return reply

    return meter


def _outcome_of(error: BaseException, message: Message) -> int:
    if not isinstance(error, Exception):
        return CANCELLED
    if isinstance(error, Fault | Declined):
        return ANSWERED
    if isinstance(error, Overloaded | DeadlineExceeded) and error.safety is Safety.NOT_SENT:
        return REFUSED  # before work was begun
    return outcome_of(error, message) if isinstance(error, CallError) else FAILURE
