"""`quintet bridge`: what it refuses, what becomes of what the other side cannot hold, and how it ends."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quintet.cli.bridge import REASONS_KEPT, _Mover
from quintet.errors import CallError, InvalidMessage, TooLarge, Unavailable, from_problem
from quintet.message import Channel, Message
from quintet.testing.bench import Bench, Receiver
from quintet.transport import DONE, Again, Dead, Transport, parse_address
from quintet.transports.memory import Carrier

SECONDS = 30.0
MOVED = Channel("trips.v1.arrived", durable=True)


def quintet(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "quintet", *arguments]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)


# what is refused


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--channel", "wild.v1.*"], "--channel 'wild.v1.*' names no channel"),
        (["--channel", "wild.#"], "--channel 'wild.#' names no channel"),
        (["--channel", ""], "--channel '' names no channel"),
        (["--channel", "x", "--limit", "0"], "Invalid value for '--limit'"),
        (["--channel", "x", "--limit", "-5"], "Invalid value for '--limit'"),
        (["--channel", "x", "--idle", "-1"], "seconds must be 0 or more"),
        (["--channel", "x", "--idle", "nan"], "seconds must be 0 or more"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_opened(
    tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    done = quintet(tmp_path, "bridge", "sqlite:///a.db", "sqlite:///b.db", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("amqp://127.0.0.1", "amqp://localhost"),
        ("amqp://guest:s3cr3t@localhost:5672/", "amqp://other:s3cr3t@127.0.0.1"),
        ("nsq://127.0.0.1:4150,127.0.0.1:4152", "nsq://localhost:4152"),
        ("stomp://[::1]", "stomp://127.0.0.1:61613"),
        ("sqlite:///a.db", "sqlite:///./a.db?lease=5"),
    ],
)
def test_from_and_to_that_are_one_by_two_names_are_refused(tmp_path: Path, source: str, target: str) -> None:
    done = quintet(tmp_path, "bridge", source, target, "--channel", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"quintet: FROM {parse_address(source)} and TO {parse_address(target)} are the same: there is nothing to move\n"
    )
    assert "s3cr3t" not in done.stderr


def test_nothing_is_said_to_be_moved_where_it_never_began(tmp_path: Path) -> None:
    done = quintet(tmp_path, "bridge", "http://127.0.0.1:9", "sqlite:///a.db", "--channel", "x")
    assert (done.returncode, done.stdout) == (2, "")


# what the other side cannot hold


class Picky(Carrier):
    """Takes no message whose body says why."""

    def __init__(self, taken: Callable[[Message], Message | None]) -> None:
        super().__init__(parse_address("memory://picky"))
        self.sent: list[Message] = []
        self._taken = taken

    async def send(self, message: Message) -> Message | None:
        self.sent.append(message)
        return self._taken(message)


def failing(error: type[CallError]) -> Callable[[Message], Message | None]:
    def taken(message: Message) -> Message | None:
        raise error(f"{message!r} has {len(message.body)} bytes, which is no good")

    return taken


def accepting(_: Message) -> None:
    return None


def mover(there: Picky, here: Picky | None = None) -> _Mover:
    return _Mover(here or Picky(accepting), there, there.send)


@pytest.mark.parametrize("error", [InvalidMessage, TooLarge])
async def test_what_to_cannot_hold_is_a_dead_letter_with_the_reason(
    error: type[CallError], capsys: pytest.CaptureFixture[str]
) -> None:
    moving = mover(Picky(failing(error)))
    verdicts = [await moving.receive(MOVED, Message(channel=MOVED, id=f"m-{n}", body=b"x" * n)) for n in range(200)]
    assert all(isinstance(verdict, Dead) for verdict in verdicts)
    assert verdicts[7] == Dead("<Message m-7 trips.v1.arrived from ?> has 7 bytes, which is no good")
    assert (moving.moved, moving.dead) == (0, 200)
    assert capsys.readouterr().err.count("\n") == 1, "one line for all that fail in the same way"


async def test_each_new_reason_why_nothing_goes_over_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    def taken(message: Message) -> Message | None:
        raise Unavailable("the broker is away" if message.id == "m-1" else "low on memory")

    moving = mover(Picky(taken))
    for number in (1, 1, 2, 1, 2):
        assert isinstance(await moving.receive(MOVED, Message(channel=MOVED, id=f"m-{number}")), Again)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "trips.v1.arrived: Unavailable: the broker is away; it is tried again",
        "trips.v1.arrived: Unavailable: low on memory; it is tried again",
    ]


async def test_reasons_that_differ_without_end_are_not_all_remembered(capsys: pytest.CaptureFixture[str]) -> None:
    def taken(message: Message) -> Message | None:
        raise Unavailable("x" * int(message.body))

    moving = mover(Picky(taken))
    for number in range(REASONS_KEPT + 10):
        await moving.receive(MOVED, Message(channel=MOVED, id="m", body=str(number).encode()))
    assert capsys.readouterr().err.count("\n") == REASONS_KEPT


async def test_who_waits_for_a_reply_is_told_that_the_request_cannot_go_over() -> None:
    here = Picky(accepting)
    asked = Message(channel=Channel("desk.v1.ask"), id="r-1", reply_to="replies.me", correlation_id="c-1")
    assert await mover(Picky(failing(TooLarge)), here).receive(asked.channel, asked) is DONE
    (reply,) = here.sent
    assert (reply.channel.name, reply.correlation_id, reply.status) == ("replies.me", "c-1", "too-large")
    assert isinstance(from_problem(reply.body), TooLarge)


async def test_a_request_that_is_never_answered_frees_its_place_when_its_time_is_up() -> None:
    async def never(_: Message) -> Message | None:
        await asyncio.Event().wait()
        raise AssertionError

    there: Transport = Picky(accepting)
    moving = _Mover(there, there, never)
    asked = Message(channel=Channel("desk.v1.ask"), reply_to="replies.me", deadline=there.clock.now() + 0.05)
    async with asyncio.timeout(SECONDS):
        assert await moving.receive(asked.channel, asked) is DONE
    assert moving.working == 0


# how it ends


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_a_signal_ends_it_and_what_was_moved_is_said(tmp_path: Path, number: signal.Signals, code: int) -> None:
    old, new = Bench(f"sqlite:///{tmp_path}/old.db"), Bench(f"sqlite:///{tmp_path}/new.db")
    sender = await old.open()
    words = [sys.executable, "-m", "quintet", "bridge", sender.address.text, f"sqlite:///{tmp_path}/new.db"]
    bridge = await asyncio.create_subprocess_exec(
        *words, "--channel", MOVED.name, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        async with asyncio.timeout(SECONDS):
            assert bridge.stderr is not None
            assert b"moving" in await bridge.stderr.readline()
            await sender.send(Message(channel=MOVED, id="m-1"))
            receiver = Receiver()
            await new.serve(await new.open(), MOVED, receiver)
            await new.got(receiver, 1)
            bridge.send_signal(number)
            said, errors = await bridge.communicate()
    finally:
        if bridge.returncode is None:
            bridge.kill()
            await bridge.wait()
        await old.close()
        await new.close()
    assert (said, errors, bridge.returncode) == (b"1 moved\n", b"", code)
