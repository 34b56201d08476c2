"""The request cache: one question once, within the work on one message and no longer."""

from __future__ import annotations

import asyncio
from enum import Enum

import pytest
from callee import run
from msgspec import Struct

from quintet import (
    ConfigurationError,
    Contract,
    DeadlineExceeded,
    Policy,
    Service,
    async_request,
    connect,
    deadline,
    on,
    request,
    serve,
)
from quintet.filter import _innermost_first
from quintet.filters import cache, trace


class Class(Enum):
    SECOND = "2"
    FIRST = "1"


class Seat(Struct, frozen=True):
    number: int
    near: frozenset[int] = frozenset()


class Passengers(Contract, name="passengers"):
    @request(idempotent=True)
    async def get(self, passenger_id: str) -> list[str]: ...

    @request(idempotent=True)
    async def find(
        self, where: dict[str, dict[int, str]], seats: list[Seat], classes: set[Class | None]
    ) -> list[str]: ...

    @async_request
    async def check(self, passenger_id: str) -> str: ...

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
        self.checked = asyncio.Event()

        @passengers.handles(Passengers.get)
        async def get(passenger_id: str) -> list[str]:
            self.questions.append(passenger_id)
            if self.failing:
                raise RuntimeError("the database is gone")
            return [passenger_id]

        @passengers.handles(Passengers.find)
        async def find(where: dict[str, dict[int, str]], seats: list[Seat], classes: set[Class | None]) -> list[str]:
            self.questions.append("find")
            return []

        @passengers.handles(Passengers.check)
        async def check(passenger_id: str) -> str:
            self.questions.append(passenger_id)
            await self.checked.wait()
            return passenger_id

        @passengers.handles(Passengers.book)
        async def book(passenger_id: str) -> int:
            self.questions.append(passenger_id)
            return len(self.questions)

    def serve(self) -> serve:
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


@pytest.mark.parametrize("at", ["memory://", "http://127.0.0.1:0"])
def test_the_order_of_dicts_and_sets_makes_no_other_question(at: str) -> None:
    async def main() -> None:
        asked = Asked()

        @asked.desk.handles(Desk.welcome)
        async def welcome(passenger_id: str) -> list[str]:
            find, none = asked.passengers.find, dict[str, dict[int, str]]()
            await find({"a": {1: "x", 2: "y"}, "b": {}}, [Seat(1, frozenset([0, 8]))], {Class.FIRST, None})
            await find({"b": {}, "a": {2: "y", 1: "x"}}, [Seat(1, frozenset([8, 0]))], {None, Class.FIRST})
            assert asked.questions == ["find"]
            for seats in ([Seat(1), Seat(2)], [Seat(2), Seat(1)]):  # a list has an order
                await find(none, seats, set())
            await find(none, [], {None})
            await find(none, [], {Class.SECOND})
            return []

        desk, passengers = asked.services
        async with (
            serve(passengers, at=at) as addresses,
            serve(desk, at="memory://", connect={Passengers: addresses}),
            connect(Desk, "memory://") as client,
        ):
            await client.welcome("p-1")
            assert asked.questions == ["find"] * 5

    assert list(frozenset([0, 8])) != list(frozenset([8, 0]))
    run(main)


def test_a_guarded_function_is_called_with_each_of_its_arguments() -> None:
    async def main() -> None:
        asked = Asked()

        @Policy(cache=True).guards(idempotent=True)
        async def price(passenger_id: str) -> str:
            return f"the price for {passenger_id}"

        @asked.desk.handles(Desk.welcome)
        async def welcome(passenger_id: str) -> list[str]:
            return [await price("p-1"), await price("p-2")]

        async with asked.serve(), connect(Desk, "memory://") as desk:
            assert await desk.welcome("p-1") == ["the price for p-1", "the price for p-2"]

    run(main)


def test_that_there_is_no_answer_yet_is_not_kept() -> None:
    async def main() -> None:
        asked = Asked()

        @asked.desk.handles(Desk.welcome)
        async def welcome(passenger_id: str) -> list[str]:
            pending = await asked.passengers.check(passenger_id)
            with pytest.raises(DeadlineExceeded, match="no answer yet"):
                await pending.wait(0)
            asked.checked.set()
            return [await pending, await pending.wait(0)]

        async with asked.serve(), connect(Desk, "memory://") as desk:
            assert await desk.welcome("p-1") == ["p-1", "p-1"]

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
