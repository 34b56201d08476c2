"""The typed chain above the codec: what is answered when a call fails, the first that can."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeAlias, cast
from weakref import ReferenceType, ref

from quintet.call import Reply
from quintet.clock import Clock, Handle
from quintet.errors import LimitReached
from quintet.filter import Guarded
from quintet.message import Message
from quintet.policy import Bulkhead, Policy, Stale

log = logging.getLogger("quintet.fallback")

CONCURRENT = 10  # runs of one fallback function at once, apart from the limit on the calls that it stands in for
KEPT = 1000  # last good replies of an operation, for as many different arguments; the oldest goes first
KEPT_BYTES = 16 << 20  # of their bodies and headers together
LINGER = 1.0  # seconds that a reply may stay when it is too old, so that one timer a second is enough

_Function: TypeAlias = Callable[..., Awaitable[Any]]


class Kept:
    """Good replies by their cache keys, the oldest first: bounded in number, bytes and age."""

    def __init__(self, clock: Clock) -> None:
        self.bytes = 0
        self.max_age = 0.0
        self._replies: OrderedDict[bytes, tuple[float, int, Message]] = OrderedDict()
        self._clock = clock
        self._timer: Handle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # that the timer is one of

    def __repr__(self) -> str:
        return f"<{len(self._replies)} replies kept, {self.bytes} bytes>"

    def __len__(self) -> int:
        return len(self._replies)

    def keep(self, key: bytes, reply: Message) -> None:
        size = len(reply.body) + sum(len(name) + len(value) for name, value in reply.headers.items())
        if key in self._replies:
            self.bytes -= self._replies.pop(key)[1]
        if size > KEPT_BYTES:
            return  # all others would go for it
        self._replies[key] = (self._clock.now(), size, reply)
        self.bytes += size
        while len(self._replies) > KEPT or self.bytes > KEPT_BYTES:
            self._forget_oldest()
        loop = asyncio.get_running_loop()
        if self._timer is not None and self._loop is not loop:  # which has ended, and its timers with it
            self._timer.cancel()
            self._timer = None
        self._loop = loop
        self._set_timer()

    def newest(self, key: bytes, max_age: float) -> Message | None:
        """The reply where it is no older than so many seconds."""
        when, _, reply = self._replies.get(key, (0.0, 0, None))
        return reply if self._clock.now() - when <= max_age else None

    def _forget_oldest(self) -> None:
        _, (_, size, _) = self._replies.popitem(last=False)
        self.bytes -= size

    def _set_timer(self) -> None:
        if self._timer is None and self._replies:
            oldest, *_ = next(iter(self._replies.values()))
            # weak: the replies of a client that is gone go with it
            self._timer = self._clock.call_at(oldest + self.max_age + LINGER, partial(_free, ref(self)))

    def free(self) -> None:
        """Forgets what is too old."""
        self._timer = None
        last = self._clock.now() - self.max_age
        while self._replies and next(iter(self._replies.values()))[0] < last:
            self._forget_oldest()
        self._set_timer()


def _free(weak: ReferenceType[Kept]) -> None:
    kept = weak()
    if kept is not None:
        kept.free()


class Fallbacks:
    """The fallbacks of one operation, and the good replies that `stale` may need again.

    `read` makes a reply out of a message that was kept: each caller gets a value of its own.
    """

    def __init__(self, guarded: Guarded, chain: Sequence[Any], read: Callable[[Message, bool], Reply[Any]]) -> None:
        self._name = guarded.operation.full_name
        self._watch = guarded.watch
        self._totals = guarded.meter.fallbacks
        self._read = read
        self._kept = guarded.own.of(Kept, lambda: Kept(guarded.clock))
        ages = [one.max_age for one in chain if isinstance(one, Stale)]
        self.keeps = bool(ages)
        if ages:
            self._kept.max_age = max(ages)
        # a fallback gets what remains of the caller's time, but no more than the call had
        guard = Policy(timeout=guarded.policy.timeout, bulkhead=Bulkhead(CONCURRENT), breaker=False)
        guards = guard.guards(clock=guarded.clock)
        self._chain = [guards(cast(_Function, one)) if callable(one) else one for one in chain]

    def __repr__(self) -> str:
        return f"<fallbacks of {self._name}, {len(self._kept)} replies kept>"

    def keep(self, key: bytes, reply: Message) -> None:
        """Remembers a good reply where a stale one may be wanted."""
        if self.keeps:
            self._kept.keep(key, reply)

    async def answer(
        self, error: Exception, key: bytes, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Reply[Any] | None:
        """The first answer that the chain has. What its functions raise is noted on the call's own error."""
        for one in self._chain:
            if isinstance(one, Stale):
                reply = self._kept.newest(key, one.max_age)
                if reply is not None:
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
