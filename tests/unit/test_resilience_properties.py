"""Breaker and bulkhead against simple models, and a million random calls that leave nothing behind."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest
from callee import Passengers
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quintet import Breaker, Bulkhead, CircuitOpen, LimitReached, Policy, RemoteError
from quintet.filter import Guarded, client_chain
from quintet.filters.breaker import Circuit
from quintet.filters.bulkhead import Outstanding
from quintet.message import Message
from quintet.outcome import ANSWERED, CANCELLED, FAILURE, REFUSED, SUCCESS, TIMEOUT
from quintet.policy import DEFAULT
from quintet.testing import FakeClock

SETTINGS = Breaker(error_rate=0.5, min_calls=4, window=10.0, open_for=5.0, probes=2, longest=5.0)


class ModelCircuit:
    """What a breaker is to do, told with lists and no thought for speed."""

    def __init__(self) -> None:
        self.state = "closed"
        self.era = 0  # of state, and of probes given up
        self.calls: list[tuple[int, bool]] = []  # bucket (one second) and whether it failed
        self.until = 0.0
        self.out = 0
        self.probed: list[bool] = []

    def admit(self, now: float) -> int | None:
        if self.state == "open" and now >= self.until:
            self.enter("half-open")
        if self.state == "half-open":
            if self.out + len(self.probed) == 2 and now >= self.until:
                self.era, self.out = self.era + 1, 0
            if self.out + len(self.probed) == 2:
                return None
            self.out, self.until = self.out + 1, now + 5
        return None if self.state == "open" else self.era

    def settle(self, era: int, outcome: int, now: float) -> None:
        if era != self.era:
            return
        failed = outcome in (FAILURE, TIMEOUT)
        if self.state == "half-open":
            self.out -= 1
            if outcome in (SUCCESS, ANSWERED) or failed:
                self.probed.append(failed)
            if len(self.probed) == 2:
                self.decide(self.probed, now, "closed")
        elif outcome == SUCCESS or failed:
            self.calls.append((int(now), failed))
            self.calls = [call for call in self.calls if call[0] > int(now) - 10]
            if len(self.calls) >= 4:
                self.decide([failed for _, failed in self.calls], now, "")

    def decide(self, failures: list[bool], now: float, otherwise: str) -> None:
        if 2 * sum(failures) >= len(failures):
            self.enter("open")
            self.until = now + 5
        elif otherwise:
            self.enter(otherwise)

    def enter(self, state: str) -> None:
        self.state, self.era, self.calls, self.out, self.probed = state, self.era + 1, [], 0, []


class CircuitAgainstItsModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.circuit = Circuit("passengers.get", self.clock, SETTINGS)
        self.model = ModelCircuit()
        self.under_way: list[tuple[int, int]] = []
        self.changes: list[str] = []
        self.circuit.listeners.append(lambda change: self.changes.append(change.after))

    @rule()
    def call(self) -> None:
        expected = self.model.admit(self.clock.now())
        if expected is None:
            with pytest.raises(CircuitOpen) as refused:
                self.circuit.admit()
            assert refused.value.retry_after is not None
            assert 0 < refused.value.retry_after <= 5
        else:
            self.under_way.append((self.circuit.admit(), expected))

    @precondition(lambda self: self.under_way)
    @rule(
        which=st.integers(0, 1000),
        outcome=st.sampled_from([SUCCESS, SUCCESS, FAILURE, FAILURE, TIMEOUT, ANSWERED, REFUSED, CANCELLED]),
    )
    def end(self, which: int, outcome: int) -> None:
        permit, era = self.under_way.pop(which % len(self.under_way))
        self.circuit.settle(permit, outcome)
        self.model.settle(era, outcome, self.clock.now())

    @rule(failures=st.integers(1, 6))
    def fail_in_a_row(self, failures: int) -> None:
        for _ in range(failures):
            under_way = len(self.under_way)
            self.call()
            if len(self.under_way) > under_way:
                self.end(under_way, FAILURE)

    @rule(seconds=st.sampled_from([0.0, 0.25, 1.0, 2.5, 4.75, 5.0, 11.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock._now += seconds

    @rule(hours=st.sampled_from([-5.0, 3600.0]))
    def wall_clock_jumps(self, hours: float) -> None:
        self.clock._offset += hours

    @invariant()
    def agrees(self) -> None:
        assert self.circuit.state == self.model.state
        assert self.circuit.free == (self.model.state == "closed")
        assert all(one != other for one, other in itertools.pairwise(self.changes))


TestCircuitAgainstItsModel = CircuitAgainstItsModel.TestCase
TestCircuitAgainstItsModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


class BulkheadAgainstItsModel(RuleBasedStateMachine):
    """The model: a number under way and a list of those who wait."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = FakeClock()
        self.outstanding = Outstanding(self.clock)
        self.limit, self.queue = 3, 2
        self.outstanding.configure(Bulkhead(self.limit, self.queue))
        self.inside: set[int] = set()
        self.waiting: list[int] = []
        self.entered: set[int] = set()
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.ids = iter(range(10**9))

    def teardown(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.settle()
        self.loop.close()

    def settle(self) -> None:
        async def turns() -> None:
            for _ in range(6):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    async def stay(self, caller: int, free: asyncio.Event) -> None:
        await self.outstanding.enter(None, LimitReached("full"))
        self.entered.add(caller)
        try:
            await free.wait()
        finally:
            self.entered.discard(caller)
            self.outstanding.leave()

    @rule()
    def enter(self) -> None:
        caller, free = next(self.ids), asyncio.Event()
        task = self.loop.create_task(self.stay(caller, free))
        self.settle()
        if len(self.inside) < self.limit:
            self.inside.add(caller)
        elif len(self.waiting) < self.queue:
            self.waiting.append(caller)
        else:
            assert isinstance(task.exception(), LimitReached)
            return
        assert not task.done()
        self.tasks[caller] = task

    @precondition(lambda self: self.tasks)
    @rule(which=st.integers(0, 1000))
    def leave(self, which: int) -> None:
        caller = sorted(self.tasks)[which % len(self.tasks)]
        self.tasks.pop(caller).cancel()
        self.settle()
        self.inside.discard(caller)
        if caller in self.waiting:
            self.waiting.remove(caller)
        self.let_in()

    @rule(limit=st.integers(1, 5), queue=st.integers(0, 3))
    def change(self, limit: int, queue: int) -> None:
        self.limit, self.queue = limit, queue
        self.outstanding.configure(Bulkhead(limit, queue))
        self.settle()
        self.let_in()

    def let_in(self) -> None:
        while self.waiting and len(self.inside) < self.limit:
            self.inside.add(self.waiting.pop(0))

    @invariant()
    def agrees(self) -> None:
        assert self.entered == self.inside
        assert self.outstanding.busy == len(self.inside)


TestBulkheadAgainstItsModel = BulkheadAgainstItsModel.TestCase
TestBulkheadAgainstItsModel.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_a_million_random_calls_with_random_cancellations_leave_nothing_behind() -> None:
    calls, callers = 1_000_000, 200

    async def main() -> None:
        clock, chance = FakeClock(), random.Random(7)
        policy = Policy(
            timeout=0.3, bulkhead=Bulkhead(120, queue=20), breaker=Breaker(open_for=0.05, longest=0.05)
        ).over(DEFAULT)
        guarded = Guarded(Passengers.get, policy, clock)
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ended = 0

        async def exchange(message: Message) -> Message:
            end = chance.random()
            if end < 0.0005:
                await asyncio.shield(never)  # until its time is up, or its caller is cancelled
            if end < 0.02:
                await asyncio.sleep(0)
            if end < (0.6 if int(clock.now() * 10) % 5 == 0 else 0.1):
                raise RemoteError("failed")
            return message

        send = client_chain(guarded, [exchange])

        async def caller() -> None:
            nonlocal ended
            while ended < calls:
                ended += 1
                if ended % 8 == 0:
                    await asyncio.sleep(0)  # another's turn
                try:
                    await send(Message(channel=Passengers.get.channel))
                except (RemoteError, CircuitOpen, LimitReached, TimeoutError):
                    continue

        running = {asyncio.ensure_future(caller()) for _ in range(callers)}
        while ended < calls:
            await clock.advance(0.1)
            for task in chance.sample(sorted(running, key=id), 50):
                task.cancel()
            await asyncio.sleep(0)
            running = {task for task in running if not task.done()}
            running |= {asyncio.ensure_future(caller()) for _ in range(callers - len(running))}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        circuit = guarded.own.of(Circuit, lambda: Circuit("", clock, Breaker()))
        outstanding = guarded.shared.of(Outstanding, lambda: Outstanding(clock))
        wheel = clock.wheel(asyncio.get_running_loop())
        assert outstanding.busy == 0
        assert not outstanding.waiting
        assert not any(wheel._slots.values())
        assert len(asyncio.all_tasks()) == 1
        assert all(circuit.totals[outcome] > 20 for outcome in (SUCCESS, FAILURE, TIMEOUT, CANCELLED, REFUSED))
        never.cancel()
        await clock.advance(10)
        assert clock.timers == []
        assert not wheel._slots

    asyncio.run(main())
