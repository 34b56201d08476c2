"""Work that a handler starts and that outlives it: free of its deadline, and of what ends with it."""

from __future__ import annotations

import asyncio

import pytest
from callee import Callee, run

from quintet import (
    Contract,
    DeadlineExceeded,
    Policy,
    QuintetError,
    Safety,
    Service,
    connect,
    current,
    deadline,
    detached,
    request,
    serve,
)
from quintet.testing import FakeClock


class Passengers(Contract, name="passengers"):
    @request(idempotent=True)
    async def get(self, passenger_id: str) -> str: ...


class Desk(Contract, name="desk"):
    @request
    async def welcome(self, passenger_id: str) -> str: ...


def test_a_detached_task_calls_on_when_the_handlers_deadline_has_passed_and_sees_each_answer_anew() -> None:
    async def main() -> None:
        clock, asked, go = FakeClock(), list[str](), asyncio.Event()
        desk, passengers = Service(Desk), Service(Passengers)
        client = desk.uses(Passengers, policy=Policy(cache=True))

        @passengers.handles(Passengers.get)
        async def get(passenger_id: str) -> str:
            asked.append(passenger_id)
            return f"{passenger_id} {len(asked)}"

        async def later(*passenger_ids: str) -> list[str]:
            await go.wait()
            assert current().operation == "desk.welcome"
            return [await client.get(one) for one in passenger_ids]

        started: list[asyncio.Task[list[str]]] = []

        @desk.handles(Desk.welcome)
        async def welcome(passenger_id: str) -> str:
            await client.get(passenger_id)
            started.append(asyncio.create_task(later("p-2")))
            with detached():
                started.append(asyncio.create_task(later("p-1", "p-1")))
            return await client.get(passenger_id)

        async with (
            serve(desk, passengers, at="memory://", connect={Passengers: "memory://"}, clock=clock),
            connect(Desk, "memory://", clock=clock) as client_of_desk,
        ):
            assert await client_of_desk.welcome("p-1") == "p-1 1"  # asked once
            await clock.advance(2.0)
            go.set()
            attached, free = await asyncio.gather(*started, return_exceptions=True)
            assert isinstance(attached, DeadlineExceeded)
            assert free == ["p-1 2", "p-1 3"]

    run(main)


def test_detached_lifts_a_deadline_around_it_and_one_below_it_still_holds() -> None:
    async def main() -> None:
        service = Callee(Policy(), FakeClock())
        with deadline(0.3, clock=service.clock):
            await service.clock.advance(0.3)
            with detached():
                assert await service.call() is None
                with deadline(0.0, clock=service.clock):
                    late = await service.call()
            refused = await service.call()
        for error in (late, refused):
            assert isinstance(error, DeadlineExceeded)
            assert error.safety is Safety.NOT_SENT

    run(main)


def test_the_store_of_the_handler_is_not_there_when_detached(tmp_path: object) -> None:
    async def main() -> None:
        desk = Service(Desk, idempotent=f"sqlite:///{tmp_path}/store.db")

        @desk.handles(Desk.welcome)
        async def welcome(passenger_id: str) -> str:
            assert current().store
            with detached(), pytest.raises(QuintetError, match=r"and not under detached\(\)"):
                _ = current().store
            return "welcome"

        async with serve(desk, at="memory://"), connect(Desk, "memory://") as client:
            assert await client.welcome("p-1") == "welcome"

    run(main)
