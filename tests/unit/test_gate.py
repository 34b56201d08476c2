"""gate.py: at most so many at once, first come first served, whoever gives up."""

from __future__ import annotations

import asyncio

from quintet.gate import Gate


async def test_who_comes_while_others_wait_overtakes_nobody() -> None:
    gate, order = Gate(1), []

    async def pass_through(name: str) -> None:
        await gate.enter()
        order.append(name)
        gate.leave()

    await gate.enter()
    waiting = asyncio.create_task(pass_through("first"))
    await asyncio.sleep(0)
    gate.leave()
    await pass_through("late")
    await waiting
    assert order == ["first", "late"]
    assert gate.busy == 0


async def test_a_place_that_is_given_to_someone_who_gives_up_is_passed_on() -> None:
    gate = Gate(1)
    await gate.enter()
    tasks = [asyncio.create_task(gate.enter()) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[0].cancel()  # while it waits
    gate.leave()
    tasks[1].cancel()  # its turn has come, and it does not know yet
    await tasks[2]
    await asyncio.gather(*tasks, return_exceptions=True)
    gate.leave()
    assert gate.busy == 0
