"""A peer in another language takes part by the names that the docs tell: Node, with its usual client of each broker."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from running import CHECKOUT
from subjects import BROKERS

from quintet import Contract, Service, current, event, notification, serve
from quintet.message import new_id

HERE = Path(__file__).parent / "foreign"
SENT_TO = {"rabbitmq": "/{channel}", "activemq": "/queue/{channel}", "kafka": "{channel}", "nsq": "{channel}"}
"""Where what one receiver is to get is sent: at RabbitMQ to the exchange without a name, by the queue's."""
PUBLISHED_AT = {
    "rabbitmq": "quintet/{channel}",
    "activemq": "/topic/VirtualTopic.{channel}",
    "kafka": "{channel}",
    "nsq": "{channel}/foreign",
}
WITHIN = 45.0  # seconds: more than a busy machine takes, less than a test may


@pytest.fixture(scope="session")
def peer() -> Path:
    """The peer with its libraries, in a folder of its own that is made once."""
    if not (shutil.which("node") and shutil.which("npm")):
        missing = "a peer in another language needs node and npm: install nodejs and npm"
        if os.environ.get("CI"):
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    libraries = [HERE / "package.json", HERE / "package-lock.json"]
    key = sha256(b"".join(file.read_bytes() for file in libraries)).hexdigest()[:12]
    folder = CHECKOUT / ".brokers" / "software" / f"foreign-{key}"
    if not folder.exists():
        work = folder.with_name(f"{folder.name}.{os.getpid()}")
        work.mkdir(parents=True)
        for file in libraries:
            shutil.copy(file, work)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        work.rename(folder)
    shutil.copy(HERE / "peer.mjs", folder)
    return folder / "peer.mjs"


class Peer:
    """The peer as a process. Its output is read a line at a time."""

    def __init__(self, program: Path, name: str, verb: str, address: str, *words: str) -> None:
        where = address.rpartition("@")[2].rpartition("/")[2]
        self._command = ("node", str(program), name, verb, where, *words)

    async def __aenter__(self) -> Peer:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*self._command, stdout=pipe, stderr=pipe)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()

    async def says(self) -> str:
        assert self._process.stdout
        async with asyncio.timeout(WITHIN):
            return (await self._process.stdout.readline()).decode().strip()

    async def ends(self) -> tuple[str, str]:
        """What else it said, and its complaints."""
        out, err = await self._process.communicate()
        assert self._process.returncode == 0, err.decode()
        return out.decode(), err.decode()


@pytest.mark.parametrize("name", BROKERS)
async def test_a_peer_in_another_language_sends_to_a_service_and_hears_what_it_publishes(
    name: str, peer: Path, broker: Callable[[str], Any]
) -> None:
    address, run = broker(name)["address"], new_id()

    class Orders(Contract, name=f"orders{run}"):
        @notification
        async def placed(self, number: int, note: str = "") -> None: ...

        @event
        async def shipped(self, number: int, note: str) -> None: ...

    orders = Service(Orders)
    came: asyncio.Queue[tuple[int, str, int, str]] = asyncio.Queue()

    @orders.handles(Orders.placed)
    async def placed(number: int, note: str = "") -> None:
        came.put_nowait((number, note, current().attempt, current().id))

    async with serve(orders, at=address):
        to = SENT_TO[name].format(channel=f"orders{run}.v1.placed")
        for number in (1, 2):
            body = json.dumps({"number": number, "note": "Zürich → 東京"})
            async with Peer(peer, name, "send", address, to, body) as sender:
                await sender.ends()
            async with asyncio.timeout(WITHIN):
                *fields, identity = await came.get()
            assert fields == [number, "Zürich → 東京", 1]
            assert identity, "one is made up where it has none"

        at = PUBLISHED_AT[name].format(channel=f"orders{run}.v1.shipped")
        if name == "kafka":
            await orders.publish(Orders.shipped, 7, "Zürich")  # its topic is made by the first message
        async with Peer(peer, name, "receive", address, at) as receiver:
            assert await receiver.says() == "ready"
            if name != "kafka":
                await orders.publish(Orders.shipped, 7, "Zürich")
            said = await receiver.says()
            if name == "nsq":
                assert said.startswith("quintet/1 {"), "the envelope is one line; behind it is the body"
                said = await receiver.says()
            assert json.loads(said) == {"number": 7, "note": "Zürich"}
            await receiver.ends()
