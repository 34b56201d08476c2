"""`quintet bridge` between real brokers, killed with -9 in the midst: nothing is lost on the way."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import start

from quintet.message import Channel, Message, new_id
from quintet.transport import DONE, Verdict, open_address

MESSAGES = 2_000
KILLED_AFTER = 300  # that have arrived
WITHIN = 40.0
WAYS = [
    ("sqlite", "rabbitmq"),
    ("sqlite", "activemq"),
    ("sqlite", "kafka"),
    ("sqlite", "nsq"),
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
