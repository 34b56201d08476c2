"""The testing tools themselves: the fake clock."""

from __future__ import annotations

import asyncio

import pytest

from quintet.testing import FakeClock


async def test_time_stands_still_until_it_is_advanced_and_the_wall_clock_moves_with_it() -> None:
    clock = FakeClock(now=5.0, wall=100.0)
    await asyncio.sleep(0)
    assert (clock.now(), clock.wall()) == (5.0, 100.0)
    await clock.advance(2.5)
    assert (clock.now(), clock.wall()) == (7.5, 102.5)
    assert clock.from_wall(clock.to_wall(9.0)) == 9.0


async def test_timers_run_in_order_each_at_its_own_time() -> None:
    clock, seen = FakeClock(now=0.0), list[tuple[str, float]]()
    clock.call_at(3.0, lambda: seen.append(("c", clock.now())))
    clock.call_at(1.0, lambda: seen.append(("a", clock.now())))
    clock.call_at(1.0, lambda: seen.append(("b", clock.now())))
    clock.call_at(2.0, lambda: seen.append(("never", clock.now()))).cancel()
    clock.call_at(9.0, lambda: seen.append(("later", clock.now())))
    await clock.advance(3.0)
    assert seen == [("a", 1.0), ("b", 1.0), ("c", 3.0)]
    assert clock.timers == [9.0]


async def test_a_sleeper_that_sleeps_again_is_woken_within_one_advance() -> None:
    clock, seen = FakeClock(now=0.0), list[float]()

    async def tick() -> None:
        while True:
            await clock.sleep(1.0)
            seen.append(clock.now())

    task = asyncio.create_task(tick())
    await clock.advance(3.5)
    assert seen == [1.0, 2.0, 3.0]
    task.cancel()
    await clock.settle()
    assert clock.timers == []  # a cancelled sleeper leaves no timer behind


async def test_a_timer_in_the_past_runs_on_the_next_turn_and_chance_is_the_same_each_time() -> None:
    clock, seen = FakeClock(now=10.0), list[int]()
    clock.call_at(3.0, lambda: seen.append(1))
    clock.call_at(3.0, lambda: seen.append(2)).cancel()
    await clock.settle()
    assert seen == [1]
    assert clock.now() == 10.0
    assert FakeClock(7).random.random() == FakeClock(7).random.random()
    with pytest.raises(ValueError, match="time cannot go back"):
        await clock.advance(-1)
