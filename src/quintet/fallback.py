"""The typed chain above the codec: what is answered when a call fails, the first that can."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias, cast

from quintet.call import Reply
from quintet.errors import LimitReached
from quintet.filter import Guarded
from quintet.message import Message
from quintet.policy import Bulkhead, Policy, Stale

log = logging.getLogger("quintet.fallback")

CONCURRENT = 10  # runs of one fallback function at once, apart from the limit on the calls that it stands in for
KEPT = 1000  # last good replies of an operation, for as many different arguments; the one unused longest goes first

_Function: TypeAlias = Callable[..., Awaitable[Any]]


class _Kept(OrderedDict[bytes, tuple[float, Message]]):
    """Good replies and when they came, by what was asked; the one unused longest first."""


class Fallbacks:
    """The fallbacks of one operation, and the good replies that `stale` may need again.

    `read` makes a reply out of a message that was kept: each caller gets a value of its own.
    """

    def __init__(self, guarded: Guarded, chain: Sequence[Any], read: Callable[[Message, bool], Reply[Any]]) -> None:
        self._name = guarded.operation.full_name
        self._watch = guarded.watch
        self._totals = guarded.meter.fallbacks
        self._now = guarded.clock.now
        self._read = read
        self._kept = guarded.own.of(_Kept, _Kept)
        self.keeps = any(isinstance(one, Stale) for one in chain)
        # a fallback gets what remains of the caller's time, but no more than the call had
        guard = Policy(timeout=guarded.policy.timeout, bulkhead=Bulkhead(CONCURRENT), breaker=False)
        guards = guard.guards(clock=guarded.clock)
        self._chain = [guards(cast(_Function, one)) if callable(one) else one for one in chain]

    def __repr__(self) -> str:
        return f"<fallbacks of {self._name}, {len(self._kept)} replies kept>"

    def keep(self, key: bytes, reply: Message) -> None:
        """Remembers a good reply where a stale one may be wanted."""
        if self.keeps:
            self._kept[key] = (self._now(), reply)
            self._kept.move_to_end(key)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)

    async def answer(
        self, error: Exception, key: bytes, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Reply[Any] | None:
        """The first answer that the chain has. What its functions raise is noted on the call's own error."""
        for one in self._chain:
            if isinstance(one, Stale):
                when, reply = self._kept.get(key, (0.0, None))
                if reply is not None and self._now() - when <= one.max_age:
                    return self._told(error, self._read(reply, True))
            elif callable(one):
                try:
                    return self._told(error, Reply(await cast(_Function, one)(*args, **kwargs), {}))
                except Exception as failed:
                    self._totals["rejected" if isinstance(failed, LimitReached) else "failure"] += 1
                    error.add_note(f"its fallback failed too: {type(failed).__name__}: {failed}")
                    log.warning("%s: a fallback failed", self._name, exc_info=failed)
            else:
                return self._told(error, Reply(one, {}))
        self._totals["missing"] += 1
        return None

    def _told(self, error: Exception, reply: Reply[Any]) -> Reply[Any]:
        self._totals["success"] += 1
        self._watch.tell("fell-back", self._name, error)
        return reply
