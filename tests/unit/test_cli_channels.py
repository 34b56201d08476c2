"""`quintet dead` over many letters, `quintet doctor` where little is allowed, and no password on the screen."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from quintet.cli import channels
from quintet.cli.doctor import _round_trip
from quintet.clock import SYSTEM
from quintet.errors import ConfigurationError, TransportError, Unavailable
from quintet.message import Channel, Message
from quintet.transport import DeadLetter, Receive, Serving, parse_address
from quintet.transports.memory import Carrier

SECONDS = 30.0
SHOWN = 100


class Keeping(Carrier):
    """Keeps dead letters, shows the first hundred, and counts how often it is asked to take some."""

    def __init__(self, count: int) -> None:
        super().__init__(parse_address("memory://keeping"))
        self.letters = {f"d-{number}": _letter(f"d-{number}") for number in range(count)}
        self.asked: list[int] = []
        self.holds: set[str] = set()
        self.meanwhile: Callable[[], None] = lambda: None

    async def dead(self, channel: str | None = None) -> Sequence[DeadLetter]:
        return list(self.letters.values())[:SHOWN]

    async def drop(self, ids: Sequence[str]) -> int:
        self.asked.append(len(ids))
        self.meanwhile()
        taken = [id_ for id_ in ids if id_ in self.letters and id_ not in self.holds]
        for id_ in taken:
            del self.letters[id_]
        return len(taken)

    async def replay(self, ids: Sequence[str]) -> int:
        """Those that are replayed die again at once."""
        count = await self.drop(ids)
        for id_ in ids:
            self.letters.setdefault(id_, _letter(id_, SYSTEM.wall() + 1))
        return count


def _letter(id_: str, died_at: float = 1.0) -> DeadLetter:
    message = Message(channel=Channel("x"), id=id_)
    return DeadLetter(id=id_, channel="x", group="", reason="", attempts=1, died_at=died_at, message=message)


@pytest.fixture
def keeping(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Keeping]:
    def make(count: int) -> Keeping:
        made = Keeping(count)
        monkeypatch.setattr(channels, "open_address", lambda _: made)
        return made

    return make


async def settle(verb: str, ids: Sequence[str] = ()) -> None:
    await channels._settle(verb, "memory://keeping", list(ids), not ids, "", json=False)


async def test_all_that_is_shown_goes_in_one_call_and_then_what_is_behind_it(
    keeping: Callable[[int], Keeping], capsys: pytest.CaptureFixture[str]
) -> None:
    kept = keeping(250)
    await settle("drop")
    assert capsys.readouterr() == ("250 dropped\n", "")
    assert (kept.asked, kept.letters) == ([100, 100, 50], {})


async def test_what_dies_again_after_its_replay_is_not_replayed_for_ever(
    keeping: Callable[[int], Keeping], capsys: pytest.CaptureFixture[str]
) -> None:
    kept = keeping(70)
    await settle("replay")
    assert capsys.readouterr() == ("70 replayed\n", "")
    assert kept.asked == [70]


async def test_what_dies_while_all_are_dropped_is_left(keeping: Callable[[int], Keeping]) -> None:
    kept = keeping(3)
    kept.meanwhile = lambda: kept.letters.update(new=_letter("new", SYSTEM.wall() + 1))
    await settle("drop")
    assert (kept.asked, list(kept.letters)) == ([3], ["new"])


async def test_what_came_back_although_it_was_taken_is_dropped_once_more(keeping: Callable[[int], Keeping]) -> None:
    kept, back = keeping(10), [_letter("d-3")]
    drop = kept.drop

    async def lossy(ids: Sequence[str]) -> int:
        count = await drop(ids)
        kept.letters.update({letter.id: letter for letter in back})
        back.clear()
        return count

    kept.drop = lossy  # type: ignore[method-assign]
    await settle("drop")
    assert (kept.asked, kept.letters) == ([10, 1], {})


@pytest.mark.parametrize(
    ("verb", "reason"),
    [("replay", "the service that failed on them is known no more"), ("drop", "did not let go of them")],
)
async def test_what_is_left_is_said_to_be_there_or_to_be_gone(
    keeping: Callable[[int], Keeping], capsys: pytest.CaptureFixture[str], verb: str, reason: str
) -> None:
    kept = keeping(10)
    kept.holds = {"d-0", "d-1"}
    kept.meanwhile = lambda: kept.letters.pop("d-2", None) and None
    kept.replay = kept.drop  # type: ignore[method-assign]
    await settle(verb, [f"d-{number}" for number in range(5)])
    said, noted = capsys.readouterr()
    assert said.startswith("2 ")
    first, second = noted.splitlines()
    assert first.startswith("2 are left: ")
    assert reason in first
    assert second == "1 were there no more: another has taken them meanwhile"


# the doctor


class Forbidding(Carrier):
    """Lets nobody receive, or takes no message."""

    def __init__(self, *, serves: bool) -> None:
        super().__init__(parse_address("memory://forbidding"))
        self._serves = serves

    async def serve(self, channel: Channel, receive: Receive, group: str, limit: int = 100) -> Serving:
        if not self._serves:
            raise TransportError("access refused")
        return await super().serve(channel, receive, group, limit)

    async def send(self, message: Message) -> Message | None:
        raise Unavailable("takes no messages: low on memory")


@pytest.mark.parametrize(("serves", "reason"), [(False, "access refused"), (True, "low on memory")])
async def test_a_round_trip_that_is_not_possible_is_a_finding(serves: bool, reason: str) -> None:
    transport = Forbidding(serves=serves)
    await transport.open()
    found = await _round_trip(transport)
    await transport.close()
    assert (found.what, found.well) == ("round trip", False)
    assert reason in found.says


class Silent(Carrier):
    """Swallows the first message, and says why only at the second, as a broker in a memory alarm does."""

    sent = 0

    async def send(self, message: Message) -> Message | None:
        self.sent += 1
        if self.sent > 1:
            raise Unavailable("low on memory")
        return None


async def test_a_broker_that_swallows_the_first_message_is_asked_again_for_its_reason() -> None:
    transport = Silent(parse_address("memory://silent"))
    await transport.open()
    found = await _round_trip(transport)
    await transport.close()
    assert "low on memory" in found.says
    assert transport.sent == 2


# passwords


def quintet(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "quintet", *arguments]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["tail", "x", "--from", "http://me:s3cr3t@127.0.0.1:9"],
        ["dead", "list", "--at", "http://me:s3cr3t@127.0.0.1:9"],
        ["bridge", "http://me:s3cr3t@127.0.0.1:9", "sqlite:///a.db", "--channel", "x"],
        ["bridge", "sqlite:///a.db", "http://me:s3cr3t@127.0.0.1:9", "--channel", "x"],
        ["serve", "a:b", "--at", "sqlite:///a.db", "--connect", "http://me:s3cr3t@127.0.0.1:9"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_no_password_is_shown_in_what_a_command_refuses(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "a.py").write_text("from quintet import Service\nb = Service(name='b')\n")
    done = quintet(tmp_path, *arguments)
    assert done.returncode == 2, done.stderr
    assert "s3cr3t" not in done.stdout + done.stderr
    assert "me:***@127.0.0.1:9" in done.stderr


async def test_no_password_is_shown_by_a_tail(
    keeping: Callable[[int], Keeping], capsys: pytest.CaptureFixture[str]
) -> None:
    async def nothing(_: str) -> AsyncIterator[Message]:
        return
        yield

    kept = keeping(0)
    kept.address = parse_address("memory://me:s3cr3t@here")
    kept.tail = nothing  # type: ignore[method-assign, assignment]
    await channels._tail("x", kept.address.text, 0, json=False)
    assert "watching x at memory://me:***@here" in capsys.readouterr().err


def test_no_password_is_shown_by_the_question_before_all_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def confirm(question: str, *, abort: bool) -> None:
        asked.append(question)
        raise ConfigurationError("no")

    monkeypatch.setattr(channels.typer, "confirm", confirm)
    monkeypatch.setattr(channels.sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(ConfigurationError, match="no"):
        channels.drop_dead(at="amqp://me:s3cr3t@127.0.0.1:9", everything=True)
    assert asked == ["Delete all dead letters at amqp://me:***@127.0.0.1:9 for ever?"]


# numbers


@pytest.mark.parametrize(
    "arguments",
    [
        ["call", "a:B.c", "--timeout", "-1"],
        ["call", "a:B.c", "--timeout", "nan"],
        ["call", "a:B.c", "--within", "inf"],
        ["call", "a:B.c", "--enough", "0"],
        ["tail", "x", "--from", "sqlite:///a.db", "--count", "-1"],
        ["up", "--within", "0"],
        ["up", "--grace", "-1"],
        ["up", "--port", "70000"],
        ["dashboard", "--port", "-1"],
    ],
    ids=" ".join,
)
def test_a_number_that_makes_no_sense_is_refused_in_one_sentence(tmp_path: Path, arguments: list[str]) -> None:
    done = quintet(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    option = arguments[-2]
    assert done.stderr.startswith(f"quintet: Invalid value for '{option}': ")
    assert done.stderr.count("\n") == 1
