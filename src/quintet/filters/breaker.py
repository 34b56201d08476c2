"""The circuit breaker: a service that keeps failing is left alone for a while, then tried with a few calls."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Literal, TypeAlias

from msgspec import Struct

from quintet.clock import Clock
from quintet.errors import CircuitOpen
from quintet.filter import Guarded
from quintet.message import Handler, Message
from quintet.meter import Latencies
from quintet.outcome import ANSWERED, FAILURE, OUTCOMES, REFUSED, SHORT_CIRCUITED, SLOW, SUCCESS, TIMEOUT, outcome_of
from quintet.policy import Breaker
from quintet.watch import Kind
from quintet.window import Window

PLACE = 40  # above the bulkhead: an open circuit refuses before a place is taken

log = logging.getLogger("quintet.breaker")

CircuitState: TypeAlias = Literal["closed", "open", "half-open"]


class StateChange(Struct, frozen=True):
    """What a listener is told: the operation's (or service's) circuit, and its states before and after."""

    name: str
    before: CircuitState
    after: CircuitState


_GOOD, _TOO_SLOW, _BAD = range(3)  # in the window
_COUNTS_ONLY = Breaker(force_closed=True)  # where the policy has none: what is not counted cannot be seen
_TOLD: dict[CircuitState, Kind] = {
    "open": "circuit-opened",
    "half-open": "circuit-half-open",
    "closed": "circuit-closed",
}
_KINDS = {SUCCESS: _GOOD, SLOW: _TOO_SLOW, FAILURE: _BAD, TIMEOUT: _BAD}


class Circuit:
    """The state of one breaker.

    Each admission is stamped with the generation (`admit` returns it), and each change of state starts a new one: a
    result from an older generation is counted in `totals` and decides nothing. Nothing is awaited and no lock is held.
    """

    def __init__(self, name: str, clock: Clock, settings: Breaker) -> None:
        self.name = name
        self.state: CircuitState = "closed"
        self.generation = 0
        self.free = True  # admits without being asked: closed, or forced so
        self.totals = [0] * len(OUTCOMES)
        """How many attempts ended in which way (OUTCOMES) since the start, for metrics."""
        self.latencies = Latencies()
        """How long those took that were sent."""
        self.listeners: list[Callable[[StateChange], None]] = []
        self._now = clock.now
        self._random = clock.random
        self._until = 0.0  # open: when it is tried again; half-open: when probes that have not ended are given up
        self._reopened = 0  # times in a row, which make it wait longer
        self._probing = 0
        self._probed = [0, 0, 0]  # good, slow and failed ones
        self._settings = settings
        self.window = Window(settings.window, 3)
        self.settings = settings

    def __repr__(self) -> str:
        good, slow, bad = self.counts
        return f"<circuit {self.name} {self.state}: {good} good, {slow} slow, {bad} bad in {self._settings.window:g} s>"

    @property
    def counts(self) -> list[int]:
        """Good, slow and failed calls of the window."""
        return self.window.at(self._now())

    @property
    def settings(self) -> Breaker:
        return self._settings

    @settings.setter
    def settings(self, settings: Breaker) -> None:
        """Changes them while calls are under way, and judges by the new ones what was counted under the old.

        The window is kept where it is as long as before. An open circuit waits no longer than the new `open_for`.
        """
        if settings.window != self._settings.window:
            self.window = Window(settings.window, 3)
        if (settings.force_open, settings.force_closed) != (self._settings.force_open, self._settings.force_closed):
            self._begin()
        changed, self._settings = settings != self._settings, settings
        self._min_calls = settings.min_calls
        counted = _KINDS | {REFUSED: _BAD} if settings.count_refusals else _KINDS
        self._kinds = [counted.get(outcome) for outcome in range(len(OUTCOMES))]
        # compared exactly: 3 of 30 are 10 %, which floats deny
        self._error_rate = Fraction(str(settings.error_rate)).as_integer_ratio()
        self._slow_rate = Fraction(str(settings.slow_rate)).as_integer_ratio()
        self._set_free()
        if changed:
            self._judge_again()

    def _judge_again(self) -> None:
        now = self._now()
        if self.state == "closed":
            self.window.at(now)
            self.judge()
        elif self.state == "open":
            self._until = min(
                self._until, now + (self._settings.longest if self._reopened else self._settings.open_for)
            )
        elif sum(self._probed) >= self._settings.probes:
            self._decide()

    def admit(self, until: float | None = None) -> int:
        """A permit for one attempt, to be handed back once by `settle`. Raises CircuitOpen.

        A probe that has not ended is given up after `open_for`, and not before `until`, when its own time is up.
        """
        if self.free:
            return self.generation
        now, settings, how, wait = self._now(), self._settings, "forced open", None
        if not settings.force_open:
            if self.state == "open" and now >= self._until:
                self._change("half-open")
            if self.state == "half-open":
                if self._probing + sum(self._probed) >= settings.probes and now >= self._until:
                    self._begin()  # probes that have not ended are given up, and others sent
                if self._probing + sum(self._probed) < settings.probes:
                    self._probing += 1
                    self._until = max(self._until, now + settings.open_for, until or 0.0)
                    return self.generation
            how, wait = self.state, self._until - now
        self.totals[SHORT_CIRCUITED] += 1
        raise CircuitOpen(f"{self.name}: not sent, its circuit is {how}", retry_after=wait)

    def settle(self, permit: int, outcome: int, now: float | None = None) -> None:
        """Takes a permit back, with how its attempt ended (and the time, where it is known already)."""
        self.totals[outcome] += 1
        if permit != self.generation:
            return
        kind = self._kinds[outcome]
        if not self.free:
            self._probing -= 1
            if kind is not None or outcome == ANSWERED:  # a declared fault proves that it works
                self._judge_probe(kind or _GOOD)
        elif kind is not None:
            self.window.add(kind, self._now() if now is None else now)
            self.judge()

    def try_now(self) -> None:
        """What made calls fail may be over: an open circuit lets its probes through with the next call, and a closed
        one forgets what failed until now, and what is under way: it may fail for having waited so long."""
        if self.state == "open":
            self._until, self._reopened = self._now(), 0
        elif self.state == "closed":
            self._begin()
            self.window.clear()

    def judge(self) -> None:
        """Opens the closed circuit where too many calls of the window were bad."""
        good, slow, bad = self.window.counts
        if (bad or slow) and good + slow + bad >= self._min_calls and self._too_many(good, slow, bad):
            self._open()

    def _too_many(self, good: int, slow: int, bad: int) -> bool:
        calls = good + slow + bad
        of_bad, of_calls = self._error_rate
        of_slow, of_all = self._slow_rate
        return bad * of_calls >= of_bad * calls or slow * of_all >= of_slow * calls

    def _judge_probe(self, kind: int) -> None:
        self._probed[kind] += 1
        if sum(self._probed) >= self._settings.probes:
            self._decide()

    def _decide(self) -> None:
        if self._too_many(*self._probed):
            self._reopened += 1
            self._open()
        else:
            self._reopened = 0
            self._change("closed")

    def _open(self) -> None:
        if self._settings.force_closed:
            return
        settings, seconds = self._settings, self._settings.open_for
        if self._reopened:  # between half and all of the doubled time, so that callers do not return together
            full = min(settings.longest, seconds * 2.0 ** min(self._reopened, 64))
            seconds = max(seconds, full * (0.5 + self._random.random() / 2))
        self._until = self._now() + seconds
        self._change("open")

    def _change(self, state: CircuitState) -> None:
        before, self.state = self.state, state
        self._begin()
        self._probed = [0, 0, 0]
        self.window.clear()
        self._set_free()
        for listener in self.listeners:
            try:
                listener(StateChange(self.name, before, state))
            except Exception:
                log.exception("%s: a listener failed on circuit %s", self.name, state)

    def _begin(self) -> None:
        self.generation += 1
        self._probing = 0

    def _set_free(self) -> None:
        settings = self._settings
        self.free = not settings.force_open and (settings.force_closed or self.state == "closed")


def client(guarded: Guarded, handler: Handler) -> Handler:
    settings, now, watch = guarded.policy.breaker, guarded.clock.now, guarded.watch
    if not isinstance(settings, Breaker):
        settings = _COUNTS_ONLY
    operation = guarded.operation
    name = operation.contract.__quintet__.name if settings.per == "service" else operation.full_name

    def make() -> Circuit:
        made = Circuit(name, guarded.clock, settings)
        made.listeners.append(lambda change: watch.tell(_TOLD[change.after], change.name))
        return made

    circuit = guarded.state(settings.per).of(Circuit, make)
    circuit.settings = settings
    guarded.meter.circuit = circuit
    slow_call = math.inf if settings.slow_call is None else settings.slow_call
    totals, latencies, later = circuit.totals, circuit.latencies, circuit.latencies.unfolded.append

    def admit(until: float | None) -> int:
        try:
            return circuit.admit(until)
        except CircuitOpen as error:
            watch.tell("refused", operation.full_name, error)
            raise

    async def breaker(message: Message) -> Message | None:
        permit = circuit.generation if circuit.free else admit(message.until)
        try:
            reply = await handler(message)
        except BaseException as error:
            outcome, ended = outcome_of(error, message), now()
            if outcome < REFUSED:
                latencies.add(ended - message.begun)
            circuit.settle(permit, outcome, ended)
            raise
        ended = now()
        seconds = ended - message.begun
        if permit != circuit.generation or not circuit.free or seconds > slow_call:
            latencies.add(seconds)
            circuit.settle(permit, SUCCESS if seconds <= slow_call else SLOW, ended)
            return reply
        # `settle` of a success while closed, in place: its calls would be a tenth of the whole chain
        totals[SUCCESS] += 1
        window = circuit.window
        if ended >= window.ends:
            window.roll(ended)
            latencies.fold()
        later(seconds)
        window.latest[_GOOD] += 1
        counts = window.counts
        counts[_GOOD] += 1
        if counts[_BAD] or counts[_TOO_SLOW]:
            circuit.judge()
        return reply

    return breaker
