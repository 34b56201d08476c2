"""A message that nobody can handle ends as a dead letter, and `quintet dead` brings it back."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from commands import quintet
from subjects import SUBJECTS, address_of, broker_of

from quintet import Contract, Redelivery, Service, connect, current, event, notification, serve
from quintet.message import Channel, Message, new_id
from quintet.transport import Dead, Verdict, open_address

ATTEMPTS = 3
WAIT = 0.2  # seconds between two of them, at least
POISON = 13
WITHIN = 45.0  # seconds: more than a busy machine takes, less than a test may
MANY = 250


async def letters(address: str, channel: str, count: int) -> list[dict[str, Any]]:
    """The dead letters of a channel as soon as there are so many, by the command line."""
    async with asyncio.timeout(WITHIN):
        while True:
            listed = await asyncio.to_thread(quintet, "dead", "list", "--at", address, "--channel", channel, "--json")
            assert listed.returncode == 0, listed.stderr
            found = [json.loads(line) for line in listed.stdout.splitlines()]
            if len(found) == count:
                return found


@pytest.mark.parametrize("name", SUBJECTS)
async def test_a_poison_message_is_a_dead_letter_after_its_attempts_and_a_replay_brings_it_back(
    name: str, broker: Callable[[str], Any]
) -> None:
    address, run = address_of(name, broker(broker_of(name))), new_id()

    class Orders(Contract, name=f"orders{run}"):
        @notification
        async def placed(self, number: int) -> None: ...

        @event
        async def shipped(self, number: int) -> None: ...

    orders, store, board = Service(Orders), Service(name=f"store{run}"), Service(name=f"board{run}")
    redelivery = Redelivery(attempts=ATTEMPTS, first=2 * WAIT, factor=1.0)
    came: list[tuple[str, int, int, str]] = []
    broken, more = True, asyncio.Event()

    async def handle(where: str, number: int) -> None:
        came.append((where, number, current().attempt, current().id))
        more.set()
        if broken and number == POISON and where != "board":
            raise ValueError("poison")

    @orders.handles(Orders.placed, redelivery=redelivery)
    async def placed(number: int) -> None:
        await handle("orders", number)

    @store.handles(Orders.shipped, redelivery=redelivery)
    async def shipped(number: int) -> None:
        await handle("store", number)

    @board.handles(Orders.shipped)
    async def shown(number: int) -> None:
        await handle("board", number)

    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WITHIN):
            while not condition():
                more.clear()
                await more.wait()

    def of(where: str, number: int) -> list[tuple[int, str]]:
        return [(attempt, identity) for place, which, attempt, identity in came if (place, which) == (where, number)]

    async with (
        serve(orders, store, board, at=address, connect={Orders: address}),
        connect(Orders, address) as client,
    ):
        for number in range(20):
            await client.placed.using(id=f"{run}-{number}")(number)
            await orders.publish(Orders.shipped, number)
        await until(lambda: all(of(where, number) for where in ("orders", "store", "board") for number in range(20)))

        (placed_letter,) = await letters(address, f"orders{run}.v1.placed", 1)
        (shipped_letter,) = await letters(address, f"orders{run}.v1.shipped", 1)
        assert [attempt for attempt, _ in of("orders", POISON)] == [1, 2, 3]
        assert [attempt for attempt, _ in of("store", POISON)] == [1, 2, 3]
        assert placed_letter["id"] == f"{run}-{POISON}"
        assert placed_letter["body"] == {"number": POISON}
        assert (placed_letter["group"], shipped_letter["group"]) == ("", f"store{run}")
        for each in (placed_letter, shipped_letter):
            assert each["reason"] == "ValueError: poison (attempt 3 of 3)"
            assert each["attempts"] == ATTEMPTS
            times = each["times"]
            assert len(times) == ATTEMPTS
            assert all(later - earlier >= WAIT - 0.01 for earlier, later in pairwise(times)), times
            assert abs(each["died_at"] - times[-1]) < 1.0

        identity = placed_letter["dead_letter"]
        shown_letter = await asyncio.to_thread(quintet, "dead", "show", identity, "--at", address)
        assert "reason: ValueError: poison (attempt 3 of 3)" in shown_letter.stdout
        assert "attempts failed at: 2" in shown_letter.stdout

        broken = False
        for each in (placed_letter, shipped_letter):
            replayed = await asyncio.to_thread(quintet, "dead", "replay", each["dead_letter"], "--at", address)
            assert (replayed.stdout, replayed.returncode) == ("1 replayed\n", 0), replayed.stderr
        await until(lambda: len(of("orders", POISON)) == ATTEMPTS + 1 and len(of("store", POISON)) == ATTEMPTS + 1)
        assert of("orders", POISON)[-1] == (1, f"{run}-{POISON}")
        assert of("store", POISON)[-1][0] == 1
        await letters(address, f"orders{run}.v1.placed", 0)
        await letters(address, f"orders{run}.v1.shipped", 0)
    assert len(of("board", POISON)) == 1, "a replay goes to the group that failed, and to no other"


@pytest.mark.parametrize("name", SUBJECTS)
async def test_all_dead_letters_of_a_channel_are_replayed_and_dropped(name: str, broker: Callable[[str], Any]) -> None:
    address, channel = address_of(name, broker(broker_of(name))), Channel(f"many{new_id()}.v1.placed", durable=True)
    more, arrived = asyncio.Event(), 0

    async def refuse(_: Message) -> Verdict:
        nonlocal arrived
        arrived += 1
        more.set()
        return Dead("no good")

    transport = open_address(address)
    await transport.open()
    serving = await transport.serve(channel, refuse, "")
    await transport.ready()
    await asyncio.gather(*(transport.send(Message(channel=channel, id=f"{new_id()}")) for _ in range(MANY)))
    async with asyncio.timeout(WITHIN):
        while arrived < MANY:
            more.clear()
            await more.wait()
    await letters(address, channel.name, MANY)
    await serving.stop()
    await transport.close()
    words = ("--all", "--channel", channel.name, "--at", address)
    replayed = await asyncio.to_thread(quintet, "dead", "replay", *words)
    assert (replayed.stdout, replayed.stderr, replayed.returncode) == (f"{MANY} replayed\n", "", 0)

    again = open_address(address)
    await again.open()
    serving = await again.serve(channel, refuse, "")
    await again.ready()
    async with asyncio.timeout(WITHIN):
        while arrived < 2 * MANY:
            more.clear()
            await more.wait()
    await letters(address, channel.name, MANY)
    await serving.stop()
    await again.close()
    dropped = await asyncio.to_thread(quintet, "dead", "drop", "--yes", *words)
    assert (dropped.stdout, dropped.stderr, dropped.returncode) == (f"{MANY} dropped\n", "", 0)


@pytest.mark.parametrize("name", SUBJECTS)
async def test_what_dies_again_while_it_is_replayed_is_a_dead_letter_again(
    name: str, broker: Callable[[str], Any]
) -> None:
    address, channel = address_of(name, broker(broker_of(name))), Channel(f"again{new_id()}.v1.placed", durable=True)
    sent = {new_id() for _ in range(200)}
    handled: Counter[str] = Counter()
    more = asyncio.Event()

    async def refuse(message: Message) -> Verdict:
        handled[message.id] += 1
        more.set()
        return Dead("no good")

    transport = open_address(address)
    await transport.open()
    serving = await transport.serve(channel, refuse, "")
    await transport.ready()
    await asyncio.gather(*(transport.send(Message(channel=channel, id=identity)) for identity in sent))
    first = {letter["dead_letter"] for letter in await letters(address, channel.name, len(sent))}
    words = ("--all", "--channel", channel.name, "--at", address)
    replayed = await asyncio.to_thread(quintet, "dead", "replay", *words)
    assert replayed.stdout == f"{len(sent)} replayed\n", replayed.stderr
    async with asyncio.timeout(WITHIN):
        while min(handled.values()) < 2:
            more.clear()
            await more.wait()
    second = await letters(address, channel.name, len(sent))
    assert {letter["id"] for letter in second} == sent
    assert first.isdisjoint(letter["dead_letter"] for letter in second), "the second death is another letter"
    await serving.stop()
    await transport.close()
    await asyncio.to_thread(quintet, "dead", "drop", "--yes", *words)
