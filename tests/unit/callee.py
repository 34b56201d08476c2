"""A remote service that does what a test tells it to, behind the filters of a policy."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from quintet import Contract, Policy, RemoteError, request
from quintet.filter import Guarded, State, client_chain
from quintet.filters.breaker import Circuit
from quintet.filters.bulkhead import Outstanding
from quintet.message import Handler, Message, new_id
from quintet.outcome import OUTCOMES
from quintet.policy import DEFAULT
from quintet.testing import FakeClock

HANG = object()


class Passengers(Contract, name="passengers"):
    @request(idempotent=True)
    async def get(self, passenger_id: str) -> str: ...

    @request
    async def book(self, passenger_id: str) -> str: ...


class Callee:
    """An attempt ends with the next of `outcomes`, else with what its `call` was given, else with `always`: an error is
    raised, HANG waits for a result in `hanging`, anything else is a good reply."""

    def __init__(self, policy: Policy, clock: FakeClock, operation: Any = Passengers.get, shared: State | None = None):
        self.clock = clock
        self.begun = 0
        self.outcomes: list[object] = []
        self.always: object = None
        self.given: dict[str, object] = {}
        self.hanging: list[asyncio.Future[object]] = []
        self.guarded = Guarded(operation, policy.over(DEFAULT), clock, shared or State())
        self.send = client_chain(self.guarded, [self.exchange])

    async def exchange(self, message: Message) -> Message:
        self.begun += 1
        outcome = self.outcomes.pop(0) if self.outcomes else self.given.get(message.id, self.always)
        if outcome is HANG:
            future = asyncio.get_running_loop().create_future()
            self.hanging.append(future)
            outcome = await future
        if isinstance(outcome, BaseException):
            raise outcome
        return message

    async def call(self, outcome: object = None, send: Handler | None = None) -> BaseException | None:
        """One call that the service ends like this; the error that its caller gets."""
        message = Message(channel=Passengers.get.channel, id=new_id())
        if outcome is not None:
            self.given[message.id] = outcome
        try:
            await (send or self.send)(message)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            return error
        return None

    async def fail(self, times: int = 1) -> None:
        for _ in range(times):
            await self.call(RemoteError("failed"))

    async def succeed(self, times: int = 1) -> None:
        for _ in range(times):
            await self.call()

    def start(self) -> asyncio.Task[BaseException | None]:
        """A call that hangs until `hanging` says how it ends."""
        return asyncio.get_running_loop().create_task(self.call(HANG))

    @property
    def circuit(self) -> Circuit:
        return self.guarded.own.of(Circuit, _missing)

    @property
    def outstanding(self) -> Outstanding:
        return self.guarded.shared.of(Outstanding, _missing)

    def total(self, outcome: str) -> int:
        return self.circuit.totals[OUTCOMES.index(outcome)]


def _missing() -> Any:
    raise AssertionError("no such filter is in the chain")


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def within_time() -> None:
        await asyncio.wait_for(main(), 20)

    asyncio.run(within_time())
