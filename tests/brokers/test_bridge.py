"""`quintet bridge` between real brokers, killed with -9 in the midst: nothing is lost on the way."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import quintet, start

from quintet.message import Channel, Message, new_id
from quintet.transport import DONE, Again, Verdict, open_address
from quintet.transports.amqp import Queue

MESSAGES = 2_000
KILLED_AFTER = 300  # that have arrived
WITHIN = 40.0
WAYS = [  # from each, and to each
    ("sqlite", "kafka"),
    ("rabbitmq", "kafka"),
    ("kafka", "activemq"),
    ("activemq", "nsq"),
    ("nsq", "rabbitmq"),
]


@pytest.mark.parametrize(("source", "target"), WAYS, ids=lambda name: name)
async def test_a_bridge_that_is_killed_and_run_again_loses_nothing(
    source: str, target: str, tmp_path: Path, broker: Callable[[str], Any]
) -> None:
    at = {
        name: f"sqlite:///{tmp_path}/rides.db" if name == "sqlite" else broker(name)["address"]
        for name in (source, target)
    }
    channel = Channel(f"bridge{new_id()}.v1.moved", durable=True)
    here, there = open_address(at[source]), open_address(at[target])
    await here.open()
    await there.open()
    arrived: dict[str, bytes] = {}
    more = asyncio.Event()

    async def receive(message: Message) -> Verdict:
        arrived[message.id] = message.body
        more.set()
        return DONE

    async def until(count: int) -> None:
        async with asyncio.timeout(WITHIN):
            while len(arrived) < count:
                more.clear()
                await more.wait()

    wanted = {f"{channel.name}-{number}": f'{{"number":{number}}}'.encode() for number in range(MESSAGES)}
    serving = await there.serve(channel, receive, "")
    await there.ready()
    words = ("bridge", at[source], at[target], "--channel", channel.name)
    try:
        sent = [
            Message(channel=channel, id=identity, body=body, media_type="application/json")
            for identity, body in wanted.items()
        ]
        await asyncio.gather(*(here.send(message) for message in sent))
        first = start(*words, folder=tmp_path, name="first")
        try:
            await until(KILLED_AFTER)
        finally:
            first.kill()
            first.wait()
        moved_before = len(arrived)
        second = start(*words, folder=tmp_path, name="second")
        try:
            await until(MESSAGES)
            second.send_signal(signal.SIGINT)
            code = await asyncio.to_thread(second.wait, 20)
        finally:
            second.kill()
            second.wait()
    finally:
        await serving.stop()
        await here.close()
        await there.close()
    assert arrived == wanted
    assert moved_before < MESSAGES, "it was killed in the midst"
    said = (tmp_path / "second.log").read_text()
    assert code == 130, said
    assert " moved\n" in said


async def put(address: str, channel: Channel, *messages: Message) -> None:
    """Serves the channel for a moment, so that it is there, and then sends to it."""

    async def receive(_: Message) -> Verdict:
        return Again(0.0)

    transport = open_address(address)
    await transport.open()
    try:
        await (await transport.serve(channel, receive, "")).stop()
        for message in messages:
            await transport.send(message)
    finally:
        await transport.close()


async def test_what_rabbitmq_cannot_hold_is_a_dead_letter_at_kafka_and_the_rest_goes_over(
    broker: Callable[[str], Any],
) -> None:
    kafka, rabbitmq = broker("kafka")["address"], broker("rabbitmq")["address"]
    channel = Channel(f"bridge{new_id()}.v1.moved", durable=True)
    bad = [Message(channel=channel, id=f"{new_id()}", headers={"CC": "x"}) for _ in range(3)]
    await put(kafka, channel, *bad, Message(channel=channel, id="good"))
    done = await asyncio.to_thread(quintet, "bridge", kafka, rabbitmq, "--channel", channel.name, "--idle", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 moved, 3 dead letters at ")
    assert len(re.findall("InvalidMessage: a header cannot be named 'CC'", done.stderr)) == 1, done.stderr
    listed = await asyncio.to_thread(quintet, "dead", "list", "--at", kafka, "--channel", channel.name)
    assert listed.stdout.count("a header cannot be named 'CC'") == 3


async def test_a_queue_that_is_another_than_the_options_say_is_refused_with_what_to_say(
    broker: Callable[[str], Any], tmp_path: Path
) -> None:
    rabbitmq, there = broker("rabbitmq")["address"], f"sqlite:///{tmp_path}/new.db"
    keyed = Channel(f"bridge{new_id()}.v1.keyed", durable=True, keyed=True)
    await put(rabbitmq, keyed, Message(channel=keyed, id="m-1", key="k"))
    words = ("bridge", rabbitmq, there, "--channel", keyed.name, "--idle", "1")
    wrong = await asyncio.to_thread(quintet, *words)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert ": say --keyed, or name its operation as MODULE:CONTRACT.OPERATION\n" in wrong.stderr
    assert "delete" not in wrong.stderr
    right = await asyncio.to_thread(quintet, *words, "--keyed")
    assert (right.returncode, right.stdout) == (0, "1 moved\n"), right.stderr


async def test_a_queue_whose_handler_has_options_of_its_own_is_taken_as_it_is(
    broker: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rabbitmq, there, name = broker("rabbitmq")["address"], f"sqlite:///{tmp_path}/new.db", f"bridge{new_id()}"
    (tmp_path / "moved.py").write_text(
        f"from quintet import Contract, notification\n\nclass Moved(Contract, name={name!r}):\n"
        "    @notification\n    async def seen(self) -> None: ...\n"
    )
    channel = Channel(f"{name}.v1.seen", durable=True, native=(Queue(max_priority=9),))
    await put(rabbitmq, channel, Message(channel=channel, id="m-1"))
    monkeypatch.chdir(tmp_path)
    done = await asyncio.to_thread(quintet, "bridge", rabbitmq, there, "--channel", "moved:Moved.seen", "--idle", "1")
    assert (done.returncode, done.stdout) == (0, "1 moved\n"), done.stderr


@pytest.mark.parametrize(
    ("name", "number", "code"),
    [("rabbitmq", signal.SIGTERM, 0), ("nsq", signal.SIGINT, 130)],
    ids=["rabbitmq-SIGTERM", "nsq-SIGINT"],
)
async def test_a_bridge_whose_other_side_is_away_ends_soon_and_loses_nothing(
    name: str, number: signal.Signals, code: int, tmp_path: Path, private_broker: Callable[[str], Any]
) -> None:
    here, channel = f"sqlite:///{tmp_path}/old.db", Channel(f"bridge{new_id()}.v1.moved", durable=True)
    there = await asyncio.to_thread(private_broker, name)
    bridge = start("bridge", here, there.address, "--channel", channel.name, folder=tmp_path, name="bridge")
    try:
        async with asyncio.timeout(WITHIN):
            while "moving" not in (tmp_path / "bridge.log").read_text():
                await asyncio.sleep(0.05)  # another process: no event reaches across
        await asyncio.to_thread(there.kill)
        source = open_address(here)
        await source.open()
        far = source.clock.now() + 600
        for identity in ("m-1", "m-2"):
            await source.send(Message(channel=channel, id=identity, deadline=far))
        async with asyncio.timeout(WITHIN):
            while not any(state.in_work for state in await source.channels()):  # type: ignore[attr-defined]
                await asyncio.sleep(0.05)  # likewise
        bridge.send_signal(number)
        assert await asyncio.to_thread(bridge.wait, WITHIN) == code
        left = await source.channels()  # type: ignore[attr-defined]
        await source.close()
    finally:
        bridge.kill()
        bridge.wait()
    assert sum(state.waiting + state.in_work for state in left) == 2
    assert (tmp_path / "bridge.log").read_text().endswith("0 moved\n")
