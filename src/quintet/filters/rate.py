"""The limit on a rate: so many calls in so many seconds, evenly filled up again."""

from __future__ import annotations

from collections.abc import Callable

from quintet.contract import Style
from quintet.errors import CallError, LimitReached, Overloaded
from quintet.filter import Guarded
from quintet.message import Handler, Message
from quintet.policy import Rate

PLACE = 35  # above the breaker: a call that is held back must not take the place of a probe


class Allowance:
    """What may still be sent: a bucket that holds `calls` and fills up in `seconds`."""

    def __init__(self) -> None:
        self.left = 0.0
        self._settings: Rate | None = None
        self._filled_at = 0.0

    def __repr__(self) -> str:
        return f"<allowance of {self.left:.1f} calls>"

    def configure(self, settings: Rate, now: float) -> None:
        """Changes the rate; what was used up stays used up."""
        used = 0.0 if self._settings is None else self._settings.calls - self.left
        self.left = max(0.0, settings.calls - used)
        self._settings, self._filled_at = settings, now

    def take(self, settings: Rate, now: float) -> float:
        """Takes one call out: 0, or where there is none the seconds until there is."""
        a_second = settings.calls / settings.seconds
        self.left = min(settings.calls, self.left + (now - self._filled_at) * a_second)
        self._filled_at = now
        if self.left < 1:
            return (1 - self.left) / a_second
        self.left -= 1
        return 0.0


def client(guarded: Guarded, handler: Handler) -> Handler:
    name = guarded.operation.full_name
    return _limit(
        guarded,
        handler,
        lambda settings, wait: LimitReached(f"{name}: not sent, {_said(settings)} are allowed", retry_after=wait),
    )


def server(guarded: Guarded, handler: Handler) -> Handler:
    name = guarded.operation.full_name
    if guarded.operation.style is not Style.REQUEST:
        return handler  # what is queued waits where it is
    return _limit(
        guarded,
        handler,
        lambda rate, wait: Overloaded(f"{name}: refused, {_said(rate)} are taken in", retry_after=wait),
    )


def _said(settings: Rate) -> str:
    return f"{settings.calls} calls in {settings.seconds:g} s"


def _limit(guarded: Guarded, handler: Handler, over: Callable[[Rate, float], CallError]) -> Handler:
    settings, now = guarded.policy.rate, guarded.clock.now
    if not isinstance(settings, Rate):
        return handler
    allowance = guarded.state(settings.per).of(Allowance, Allowance)
    allowance.configure(settings, now())
    name, watch = guarded.operation.full_name, guarded.watch

    async def rate(message: Message) -> Message | None:
        if wait := allowance.take(settings, now()):
            error = over(settings, wait)
            watch.tell("refused", name, error)
            raise error
        return await handler(message)

    return rate
