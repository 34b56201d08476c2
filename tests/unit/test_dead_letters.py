"""Dead letters: which one is which, and what a stranger may have written into one."""

from __future__ import annotations

from datetime import datetime

import pytest
from msgspec import structs

from quintet.dead_letters import MOST_REPLAYS, bury, letter, revive
from quintet.message import Channel, Message
from quintet.testing import FakeClock

CHANNEL = Channel("trips.v1.requested", durable=True)


def died(message: Message, clock: FakeClock) -> Message:
    return bury(message, "trips", "no car", clock)


def test_one_death_that_is_written_twice_is_one_letter_and_the_next_death_is_another() -> None:
    clock, message = FakeClock(), Message(channel=CHANNEL, id="m-1", headers={})
    ids = [letter(died(message, clock)).id, letter(died(message, clock)).id]
    assert ids == ["m-1@trips.v1.requested", "m-1@trips.v1.requested"]
    for _ in range(3):
        message, _ = revive(died(message, clock))
        ids.append(letter(died(message, clock)).id)
    assert ids[2:] == ["m-1@trips.v1.requested#1", "m-1@trips.v1.requested#2", "m-1@trips.v1.requested#3"]


@pytest.mark.parametrize("text", ["", "-1", "nan", "9" * 5000, "²", str(MOST_REPLAYS), str(MOST_REPLAYS - 1), "7"])
def test_whatever_a_stranger_wrote_as_the_count_of_replays_each_death_is_another_letter(text: str) -> None:
    clock, message = FakeClock(), Message(channel=CHANNEL, id="m-1", headers={"quintet-replayed": text})
    ids = []
    for _ in range(4):
        dead = died(message, clock)
        ids.append(letter(dead).id)
        message, _ = revive(dead)
    assert len(set(ids)) == 4
    assert max(map(len, ids)) < 40


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e300", "-5", "9" * 400, "yesterday"])
def test_a_time_that_is_none_is_shown_as_the_beginning_of_time(text: str) -> None:
    dead = died(Message(channel=CHANNEL, id="m-1", headers={}), FakeClock())
    dead = structs.replace(dead, headers=dead.headers | {"quintet-dead-at": text, "quintet-failed-at": text})
    shown = letter(dead)
    assert (shown.died_at, shown.times) == (0.0, [0.0])
    assert datetime.fromtimestamp(shown.died_at).astimezone().year in (1969, 1970)
