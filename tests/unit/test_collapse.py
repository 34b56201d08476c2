"""Request collapsing: one call of a batch operation out of many calls, and each caller for itself."""

from __future__ import annotations

import asyncio

import pytest
from callee import run

from quintet import (
    ConfigurationError,
    Contract,
    DeadlineExceeded,
    InvalidMessage,
    Service,
    collapse,
    connect,
    deadline,
    request,
    serve,
)
from quintet.context import CURRENT
from quintet.testing import FakeClock


class Batch:
    def __init__(self, most: int = 100) -> None:
        self.clock = FakeClock()
        self.sent: list[list[str]] = []
        self.deadlines: list[float | None] = []
        self.free = asyncio.Event()
        self.free.set()
        self.cancelled = 0
        self.answer = lambda names: [name.upper() for name in names]
        self.get = collapse(self.get_many, within=0.005, most=most, clock=self.clock)

    async def get_many(self, names: list[str]) -> list[str]:
        self.sent.append(names)
        self.deadlines.append(CURRENT.get().deadline)
        try:
            await self.free.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self.answer(names)

    def start(self, *names: str) -> list[asyncio.Task[str]]:
        return [asyncio.get_running_loop().create_task(self.get(name)) for name in names]


def test_calls_made_within_some_milliseconds_go_out_as_one() -> None:
    async def main() -> None:
        batch = Batch()
        calls = batch.start("ada", "bob")
        await batch.clock.advance(0.003)
        calls += batch.start("cid")
        await batch.clock.advance(0.001)
        assert batch.sent == []
        await batch.clock.advance(0.002)
        assert [await call for call in calls] == ["ADA", "BOB", "CID"]
        later = batch.start("dan")
        await batch.clock.advance(0.006)
        assert await later[0] == "DAN"
        assert batch.sent == [["ada", "bob", "cid"], ["dan"]]

    run(main)


def test_a_full_batch_goes_out_at_once() -> None:
    async def main() -> None:
        batch = Batch(most=2)
        calls = batch.start("ada", "bob", "cid")
        batch.free.clear()
        await batch.clock.settle()
        assert batch.sent == [["ada", "bob"]]
        await batch.clock.advance(0.006)
        assert batch.sent == [["ada", "bob"], ["cid"]]
        batch.free.set()
        assert [await call for call in calls] == ["ADA", "BOB", "CID"]

    run(main)


def test_a_caller_that_is_cancelled_leaves_the_others_alone() -> None:
    async def main() -> None:
        batch = Batch()
        batch.free.clear()
        early, late, stays = batch.start("ada", "bob", "cid")
        await batch.clock.settle()
        early.cancel()
        await batch.clock.advance(0.006)
        late.cancel()
        await batch.clock.settle()
        assert batch.sent == [["bob", "cid"]]
        assert batch.cancelled == 0
        batch.free.set()
        assert await stays == "CID"

    run(main)


def test_a_batch_for_which_nobody_waits_is_cancelled() -> None:
    async def main() -> None:
        batch = Batch()
        batch.free.clear()
        calls = batch.start("ada", "bob")
        await batch.clock.advance(0.006)
        for call in calls:
            call.cancel()
        await batch.clock.settle()
        assert batch.cancelled == 1
        assert len(asyncio.all_tasks()) == 2  # this one, and the one that ends it in time

    run(main)


def test_each_caller_has_its_own_deadline_and_the_batch_the_longest() -> None:
    async def main() -> None:
        batch = Batch()
        batch.free.clear()

        async def within(seconds: float) -> str:
            with deadline(seconds, clock=batch.clock):
                return await batch.get("ada")

        short, long = asyncio.ensure_future(within(0.1)), asyncio.ensure_future(within(0.5))
        await batch.clock.advance(0.11)
        assert isinstance(short.exception(), DeadlineExceeded)
        assert batch.cancelled == 0
        assert batch.deadlines == [pytest.approx(1000.5)]
        batch.free.set()
        await batch.clock.settle()
        assert await long == "ADA"
        assert batch.clock.timers == []
        with deadline(0.1, clock=batch.clock):
            await batch.clock.advance(0.2)
            with pytest.raises(DeadlineExceeded):
                await batch.get("ada")

    run(main)


def test_what_the_batch_raises_all_get() -> None:
    async def main() -> None:
        batch = Batch()

        def gone(names: list[str]) -> list[str]:
            raise OSError("gone")

        batch.answer = gone
        calls = batch.start("ada", "bob")
        await batch.clock.advance(0.006)
        assert [str(call.exception()) for call in calls] == ["gone", "gone"]
        batch.answer = lambda names: names[1:]
        calls = batch.start("ada", "bob")
        await batch.clock.advance(0.006)
        assert isinstance(calls[0].exception(), InvalidMessage)
        assert "answered 2 arguments with 1 values" in str(calls[1].exception())

    run(main)


class Passengers(Contract, name="passengers"):
    @request
    async def get_many(self, passenger_ids: list[str]) -> list[str]: ...


def test_it_collapses_the_calls_of_a_connected_client() -> None:
    async def main() -> None:
        service, asked = Service(Passengers), list[list[str]]()

        @service.handles(Passengers.get_many)
        async def get_many(passenger_ids: list[str]) -> list[str]:
            asked.append(passenger_ids)
            return [f"passenger {number}" for number in passenger_ids]

        async with serve(service, at="memory://"), connect(Passengers, "memory://") as passengers:
            get = collapse(passengers.get_many)
            assert await asyncio.gather(get("1"), get("2")) == ["passenger 1", "passenger 2"]
            assert asked == [["1", "2"]]

    run(main)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"collapse\(within=0, most=100\): seconds above 0"):
        collapse(Batch.get_many, within=0)
