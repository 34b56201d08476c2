"""The limit on a rate: so many calls in any so many seconds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from quintet.contract import Style
from quintet.errors import CallError, LimitReached, Overloaded
from quintet.filter import Guarded
from quintet.message import Handler, Message
from quintet.policy import Rate

PLACE = 35  # above the breaker: a call that is held back must not take the place of a probe


class Allowance:
    """When the calls of the last `seconds` were let through, the oldest first. A change of the policy keeps them."""

    def __init__(self) -> None:
        self._taken: deque[float] = deque()

    def __repr__(self) -> str:
        return f"<allowance, {len(self._taken)} calls taken>"

    def take(self, settings: Rate, now: float) -> float:
        """Takes one call out: 0, or where there is none the seconds until there is."""
        taken, ended = self._taken, now - settings.seconds
        while taken and taken[0] <= ended:
            taken.popleft()
        if len(taken) < settings.calls:
            taken.append(now)
            return 0.0
        return taken[-settings.calls] - ended


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
    name, watch = guarded.operation.full_name, guarded.watch

    async def rate(message: Message) -> Message | None:
        if wait := allowance.take(settings, now()):
            error = over(settings, wait)
            watch.tell("refused", name, error)
            raise error
        return await handler(message)

    return rate
