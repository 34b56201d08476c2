"""The request cache: one question once, within the work on one message and no longer."""

from __future__ import annotations

import asyncio

import pytest
from callee import run

from quintet import ConfigurationError, Contract, Policy, Service, connect, deadline, on, request, serve
from quintet.filter import _innermost_first
from quintet.filters import cache, trace


class Passengers(Contract, name="passengers"):
    @request(idempotent=True)
    async def get(self, passenger_id: str) -> list[str]: ...

    @request
    async def book(self, passenger_id: str) -> int: ...


class Desk(Contract, name="desk"):
    @request
    async def welcome(self, passenger_id: str) -> list[str]: ...


class Asked:
    """Two services, the first of which asks the second what `work` asks."""

    def __init__(self) -> None:
        self.questions: list[str] = []
        self.desk, passengers = Service(Desk), Service(Passengers)
        self.passengers = self.desk.uses(Passengers, policy=Policy(cache=True))
        self.services = self.desk, passengers
        self.failing = False

        @passengers.handles(Passengers.get)
        async def get(passenger_id: str) -> list[str]:
            self.questions.append(passenger_id)
            if self.failing:
                raise RuntimeError("the database is gone")
            return [passenger_id]

        @passengers.handles(Passengers.book)
        async def book(passenger_id: str) -> int:
            self.questions.append(passenger_id)
            return len(self.questions)

    def serve(self) -> object:
        return serve(*self.services, at="memory://", connect={Passengers: "memory://"})


def test_within_one_message_the_same_question_is_asked_once() -> None:
    async def main() -> None:
        asked = Asked()

        @asked.desk.handles(Desk.welcome)
        async def welcome(passenger_id: str) -> list[str]:
            first = await asked.passengers.get(passenger_id)
            first.append("changed")
            with deadline(1.0):
                assert await asked.passengers.get(passenger_id) == [passenger_id]  # a value of its own
            await asked.passengers.get("another")
            await asked.passengers.get.using(headers={"language": "de"})(passenger_id)
            return first

        async with asked.serve(), connect(Desk, "memory://") as desk:
            assert await desk.welcome("p-1") == ["p-1", "changed"]
            assert asked.questions == ["p-1", "another", "p-1"]
            await desk.welcome("p-1")  # another message
            assert asked.questions == ["p-1", "another", "p-1"] * 2

    run(main)


def test_what_is_not_idempotent_and_what_failed_is_asked_again() -> None:
    async def main() -> None:
        asked = Asked()

        @asked.desk.handles(Desk.welcome)
        async def welcome(passenger_id: str) -> list[str]:
            await asked.passengers.book(passenger_id)
            await asked.passengers.book(passenger_id)
            asked.failing = True
            await asyncio.gather(asked.passengers.get(passenger_id), return_exceptions=True)
            asked.failing = False
            return await asked.passengers.get(passenger_id)

        async with asked.serve(), connect(Desk, "memory://") as desk:
            assert await desk.welcome("p-1") == ["p-1"]
            assert asked.questions == ["p-1"] * 4

    run(main)


def test_outside_of_a_handler_nothing_is_kept() -> None:
    async def main() -> None:
        asked = Asked()

        @asked.desk.handles(Desk.welcome)
        async def welcome(passenger_id: str) -> list[str]:
            return []

        async with asked.serve(), connect(Passengers, "memory://", policy=Policy(cache=True)) as passengers:
            await passengers.get("p-1")
            await passengers.get("p-1")
            assert asked.questions == ["p-1", "p-1"]

    run(main)
    with pytest.raises(ConfigurationError, match=r"on\(Passengers.book, cache=True\): it may do something"):
        on(Passengers.book, cache=True)


def test_each_filter_has_a_place_of_its_own_the_trace_too() -> None:
    places = [module.PLACE for module in _innermost_first()]
    assert len(set(places)) == len(places)
    assert cache.PLACE < trace.PLACE
