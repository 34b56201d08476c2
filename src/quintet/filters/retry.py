"""Retry: another attempt where that is safe, after a wait, within a budget and within the deadline."""

from __future__ import annotations

from quintet.budget import Budget
from quintet.contract import Fault
from quintet.errors import CallError, CircuitOpen, LimitReached, Safety
from quintet.filter import Guarded
from quintet.message import Handler, Message
from quintet.policy import Retry

PLACE = 30  # above the breaker: each attempt is admitted and counted by itself


def client(guarded: Guarded, handler: Handler) -> Handler:
    settings, clock, operation = guarded.policy.retry, guarded.clock, guarded.operation
    meter, watch = guarded.meter, guarded.watch
    if not isinstance(settings, Retry):
        return handler
    budget = guarded.shared.of(Budget, Budget)
    idempotent = operation.idempotent

    def worth_repeating(error: Exception) -> bool:
        if isinstance(error, (Fault, CircuitOpen, LimitReached)):
            return False  # an answer; or our own refusal, which would only come again
        safety = error.safety if isinstance(error, CallError) else Safety.UNKNOWN
        return safety is Safety.NOT_SENT or (safety is Safety.UNKNOWN and idempotent)

    async def retry(message: Message) -> Message | None:
        until, deadline = message.until, message.deadline
        budget.call(clock.now())
        for attempt in range(settings.times + 1):
            if settings.attempt_timeout is not None:
                cut = clock.now() + settings.attempt_timeout
                message.until = cut if until is None else min(until, cut)
                if deadline is not None and deadline == until:
                    message.deadline = message.until  # nobody waits for this attempt any longer
            try:
                return await handler(message)
            except Exception as error:
                if attempt == settings.times or not worth_repeating(error):
                    raise
                full = min(settings.longest, settings.first * 2.0 ** min(attempt, 64))
                asked = error.retry_after if isinstance(error, CallError) else None
                wait = max(full * clock.random.random(), asked or 0.0)
                now = clock.now()
                if (until is not None and now + wait >= until) or not budget.spend(settings.budget, now):
                    raise  # the last real error, at once
                meter.extra["retry"] += 1
                watch.tell("retried", operation.full_name, error, attempt + 1)
            await clock.sleep(wait)
            message.begun = clock.now()
        raise AssertionError("the last attempt returns or raises")

    return retry
