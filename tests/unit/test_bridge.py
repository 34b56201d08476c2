"""`quintet bridge` and `quintet doctor`, on transports that need no broker of their own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from quintet import Contract, Service, connect, notification, request, serve
from quintet.message import Channel, Message, new_id
from quintet.testing.bench import Bench, Receiver

SECONDS = 30.0


class Desk(Contract, name="desk", version="1.0"):
    @request
    async def ask(self, name: str) -> str: ...

    @notification
    async def note(self, name: str) -> None: ...


def quintet(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quintet", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


async def test_what_waits_is_moved_whole_and_in_the_order_of_its_keys(tmp_path: Path) -> None:
    old, new = Bench(f"sqlite:///{tmp_path}/old.db"), Bench(f"sqlite:///{tmp_path}/new.db")
    channel = Channel("trips.v1.arrived", durable=True, keyed=True)
    sender = await old.open()
    ids = [new_id() for _ in range(50)]
    for number, message_id in enumerate(ids):
        await sender.send(
            Message(channel=channel, id=message_id, body=b"%d" % number, key="t-1", headers={"x-user": "u"})
        )
    await old.close()
    done = quintet(
        tmp_path,
        "bridge",
        "sqlite:///old.db",
        "sqlite:///new.db",
        "--channel",
        channel.name,
        "--idle",
        "0.5",
        "--keyed",
    )
    assert (done.returncode, done.stdout) == (0, "50 moved\n"), done.stderr
    receiver = Receiver()
    await new.serve(await new.open(), channel, receiver)
    arrived = await new.got(receiver, 50)
    assert [message.id for message in arrived] == ids
    assert receiver.bodies == [b"%d" % number for number in range(50)]
    assert arrived[0].headers["x-user"] == "u"
    await new.close()
    left = Receiver()
    await old.serve(await old.open(), channel, left)
    await old.quiet()
    await old.close()
    assert left.messages == []


async def test_a_request_goes_over_and_its_reply_comes_back(tmp_path: Path) -> None:
    service = Service(Desk)

    @service.handles(Desk.ask)
    async def ask(name: str) -> str:
        return f"hello {name}"

    @service.handles(Desk.note)
    async def note(name: str) -> None: ...

    old, new = f"sqlite:///{tmp_path}/old.db", f"sqlite:///{tmp_path}/new.db"
    bridge = subprocess.Popen(
        [sys.executable, "-m", "quintet", "bridge", old, new, "--channel", "desk.v1.ask", "--idle", "20"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        async with serve(service, at=new), connect(Desk, old) as desk:
            assert await desk.ask.using(timeout=SECONDS)("Ada") == "hello Ada"
    finally:
        bridge.terminate()
        bridge.communicate()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sqlite:///a.db", "sqlite:///a.db", "--channel", "x"], "there is nothing to move"),
        (["http://127.0.0.1:1", "sqlite:///a.db", "--channel", "x"], "keeps no messages that could be moved"),
        (["sqlite:///a.db", "http://127.0.0.1:1", "--channel", "x"], "carries other messages"),
        (["sqlite:///a.db", "sqlite:///b.db"], "--channel"),
    ],
)
def test_a_bridge_of_no_use_is_refused_in_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    done = quintet(tmp_path, "bridge", *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr


def test_the_doctor_says_what_is_there_and_what_would_not_work(tmp_path: Path) -> None:
    done = quintet(tmp_path, "doctor", "--at", "sqlite:///a.db?synchronous=normal", "--json")
    found = {line["what"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, done.stderr
    assert found["round trip"]["well"]
    assert found["version"]["says"].startswith("SQLite 3.")
    assert not found["accepted"]["well"]
    assert "publish/async responses" in found["carries"]["says"]


def test_the_doctor_says_that_nobody_is_there(tmp_path: Path) -> None:
    done = quintet(tmp_path, "doctor", "--at", "http://127.0.0.1:9")
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1


async def test_the_doctor_shows_the_health_of_an_http_service(tmp_path: Path) -> None:
    service = Service(Desk)

    @service.handles(Desk.ask)
    async def ask(name: str) -> str:
        return name

    @service.handles(Desk.note)
    async def note(name: str) -> None: ...

    async with serve(service, at="http://127.0.0.1:0") as addresses:
        done = await asyncio.to_thread(quintet, tmp_path, "doctor", "--at", addresses[0])
    assert (done.returncode, "GET /health/ready answers 200" in done.stdout) == (0, True), done.stderr
    assert "! does not carry: publish/subscribe" in done.stdout
