"""What happens to calls and deliveries, told to a listener, to the log and to the span in work."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from msgspec import Struct

from quintet.clock import SYSTEM, Clock
from quintet.errors import ConfigurationError

log = logging.getLogger("quintet.watch")

Kind: TypeAlias = Literal[
    "circuit-opened",
    "circuit-half-open",
    "circuit-closed",
    "refused",
    "timed-out",
    "retried",
    "hedged",
    "fell-back",
    "dead-letter",
    "connected",
    "disconnected",
    "broker-lost",
    "broker-back",
    "draining",
]

KINDS: dict[Kind, tuple[int, str]] = {
    "circuit-opened": (logging.WARNING, "a circuit breaker refuses calls from now on"),
    "circuit-half-open": (logging.INFO, "it lets a few through, to try"),
    "circuit-closed": (logging.INFO, "they went well: all calls go through again"),
    # once per call, and so at debug: what refuses must stay cheap, and says so once, where the circuit opens
    "refused": (logging.DEBUG, "by an open circuit, a limit or a rate, or because no time was left"),
    "timed-out": (logging.DEBUG, "nobody answered within the time-out"),
    "retried": (logging.DEBUG, "another attempt is made after one that failed"),
    "hedged": (logging.DEBUG, "another attempt is made beside one that is slow"),
    "fell-back": (logging.DEBUG, "a fallback answered instead"),
    "dead-letter": (logging.ERROR, "a message was given up"),
    "connected": (logging.DEBUG, "a transport was opened"),
    "disconnected": (logging.DEBUG, "a transport was closed"),
    "broker-lost": (logging.WARNING, "a broker, or an outbox's database, went away: what is sent waits"),
    "broker-back": (logging.WARNING, "it is back: what waited is sent, and channels are served again"),
    "draining": (logging.INFO, "a service takes no more, and ends what it has in work"),
}
"""What can happen: how loud its line in the log is, and what it means."""


class Occurrence(Struct, frozen=True, kw_only=True):
    """What a listener is told.

    `subject`: the operation, or the service whose circuit it is, or the address, or the service that drains. `owner`:
    the service or client that it happened in. `reason`: the error, as a sentence. `attempt`: which one it was, or 0.
    `at`: wall-clock seconds.
    """

    kind: Kind
    subject: str
    owner: str
    at: float
    reason: str = ""
    attempt: int = 0


Listener: TypeAlias = Callable[[Occurrence], None]


class Watch:
    """Tells what happens in one client or service. A listener that raises touches nothing but the log."""

    def __init__(self, owner: str = "", listener: Listener | None = None, clock: Clock = SYSTEM) -> None:
        if inspect.iscoroutinefunction(listener):
            raise ConfigurationError(f"listener={listener!r} must be a plain function: it is called and not awaited")
        self.owner = owner
        self.listener = listener
        self.ended = False  # what it watched is closed, and shown no longer
        self._clock = clock

    def __repr__(self) -> str:
        return f"<watch of {self.owner or '?'}{', heard' if self.listener else ''}>"

    def tell(self, kind: Kind, subject: str, reason: object = "", attempt: int = 0) -> None:
        level, _ = KINDS[kind]
        if log.isEnabledFor(level):
            fields = {"kind": kind, "subject": subject, "owner": self.owner, "reason": str(reason), "attempt": attempt}
            log.log(level, "%s: %s", kind, reason or subject, extra={"quintet": fields})
        if self.listener is not None:
            try:
                self.listener(
                    Occurrence(
                        kind=kind,
                        subject=subject,
                        owner=self.owner,
                        at=self._clock.wall(),
                        reason=str(reason),
                        attempt=attempt,
                    )
                )
            except Exception:
                log.exception("the listener failed on %s: %s", kind, subject)
        tracing: Any = sys.modules.get("opentelemetry.trace")
        if tracing is not None:  # else nobody can have configured a tracer
            span = tracing.get_current_span()
            if span.is_recording():
                span.add_event(f"quintet.{kind}", {"quintet.subject": subject, "quintet.reason": str(reason)})
