"""Brokers and services are killed with -9 while 20,000 messages are on their way: what was confirmed is handled."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, closing
from itertools import pairwise
from pathlib import Path

import pytest
from msgspec import Struct
from running import Broker
from subjects import SUBJECTS, address_of, broker_of

from quintet.deployment import Deployed, Deployment
from quintet.supervisor import Process, State, running
from quintet.transport import parse_address

HERE = Path(__file__).parent
MESSAGES = 20_000
PATIENCE = 120.0  # seconds that each part may take at the very most
QUIET = 20.0  # seconds without another delivery after which none is expected any more

Kills = list[tuple[int, set[str]]]
KILLS: Kills = [
    (2_000, {"broker"}),
    (5_000, {"ledger.1"}),
    (8_000, {"broker"}),
    (11_000, {"audit", "ledger.2"}),
    (13_000, {"sender"}),
    (16_000, {"broker", "ledger.1", "audit"}),
]
"""Who is killed once so many messages are confirmed."""

KILLS_OF: dict[str, Kills] = {
    "sqlite": [(5_000, {"ledger.1"}), (11_000, {"audit", "ledger.2"}), (13_000, {"sender"})],
    # nsqd keeps what is in work in memory only: what a receiver had that died is lost if nsqd dies within 10 s of it
    "nsq": [
        (2_000, {"broker"}),
        (5_000, {"broker"}),
        (8_000, {"broker"}),
        (11_000, {"ledger.1"}),
        (13_000, {"audit", "ledger.2"}),
        (16_000, {"sender"}),
    ],
}
"""Those for whom it is otherwise."""

RECEIVERS = {"ledger.1", "ledger.2", "audit"}
FORGETS: dict[str, set[str]] = {
    "activemq": {"broker"},
    "nsq": {"broker"},
    "kafka": {"broker", *RECEIVERS},
}
"""Over whose kill a broker forgets that it delivered a message before: then only the message's id tells a repeat."""


class Line(Struct):
    """Of a journal: a number, what else was written of it, and when."""

    number: int
    words: list[str]
    at: float


class Kill(Struct):
    """When it began and was over, in seconds of the monotonic clock, and when a broker's port was open again."""

    victims: set[str]
    begun: float
    over: float = 0.0
    opened: float = 0.0


class Storm:
    """The processes, and what is known of how far they are."""

    def __init__(self, folder: Path, address: str, broker: Broker | None) -> None:
        self.folder = folder
        self.kind = address.partition(":")[0]
        self.address = address
        self.broker = broker
        self.kills: list[Kill] = []
        self.said: list[str] = []
        self.confirmed = 0
        self.done = False
        self.escaped = False  # an error that is none of ours came out of a send

    def hear(self, name: str, line: str) -> None:
        self.said.append(f"{name}: {line}")
        self.escaped |= "Traceback" in line
        if line == "all confirmed":
            self.done = True
        elif line.endswith(" confirmed"):
            self.confirmed = int(line.partition(" ")[0])

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                while not condition():
                    assert not self.escaped, "\n".join(self.said)
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"{what}: not within {PATIENCE:g} s; last said: {self.said[-20:]}") from None

    @asynccontextmanager
    async def processes(self) -> AsyncGenerator[dict[str, Process]]:
        """Runs the receivers, and once they are ready the sender."""
        environment = {"CHAOS_FOLDER": str(self.folder), "CHAOS_MESSAGES": str(MESSAGES), "CHAOS_KIND": self.kind}
        at = (self.address,)
        receivers = {
            "ledger": Deployed(app="chaos_services:ledger", at=at, env=environment, instances=2),
            "audit": Deployed(app="chaos_services:audit", connect={f"news{self.kind}": at}, env=environment),
        }
        sender = Deployed(app="chaos_services:sender", at=at, connect={f"ledger{self.kind}": at}, env=environment)
        async with (
            running(Deployment(receivers, HERE), output=self.hear) as there,
            running(Deployment({"sender": sender}, HERE), output=self.hear) as here,
        ):
            yield {process.name: process for group in (there, here) for process in group}

    async def kill(self, victims: set[str], processes: dict[str, Process]) -> None:
        """Kills them, all at the same time; returns when all is as it was, and messages flow."""
        lives = {victim: processes[victim].pid for victim in victims - {"broker"}}
        kill = Kill(victims, time.monotonic())
        self.kills.append(kill)
        for victim in victims - {"broker"}:
            processes[victim].kill()
        if "broker" in victims:
            assert self.broker is not None
            await asyncio.to_thread(self.broker.kill)
        kill.over = time.monotonic()
        if "broker" in victims:
            opening = asyncio.create_task(opened(self.address))
            await asyncio.to_thread(self.broker.start)  # type: ignore[union-attr]
            kill.opened = await opening
            await self.until(lambda: self.done or self.flowing_since(kill.opened), "messages flow again")
        killed = [(processes[victim], pid) for victim, pid in lives.items()]
        back = lambda: all(process.state is State.READY and process.pid != pid for process, pid in killed)  # noqa: E731
        await self.until(back, f"{victims} are back")

    def flowing_since(self, begun: float) -> bool:
        """A message was confirmed since then, and handled."""
        confirmed = {line.number for line in self.journal("confirmed") if line.at >= begun}
        return any(line.number in confirmed for line in self.journal("handled") if line.at >= begun)

    async def all_handled(self) -> None:
        """Waits until each confirmed number was handled and took effect, or nothing has come for some time."""
        wanted = {line.number for line in self.journal("confirmed")}
        events = {number for number in wanted if number % 2}
        file, size, changed = self.folder / "handled", -1, time.monotonic()
        while time.monotonic() < changed + QUIET and (
            wanted - {line.number for line in self.journal("handled")} or events - self.effects().keys()
        ):
            if file.stat().st_size != size:
                size, changed = file.stat().st_size, time.monotonic()
            await asyncio.sleep(0.1)

    def journal(self, name: str) -> list[Line]:
        lines = (self.folder / name).read_text().splitlines()
        return [Line(int(number), words, float(at)) for number, *words, at in map(str.split, lines)]

    def effects(self) -> Counter[int]:
        """How often each event took effect in the store of the service that is idempotent."""
        with closing(sqlite3.connect(self.folder / "audit.db")) as audit:
            return Counter(number for (number,) in audit.execute("SELECT number FROM seen"))

    def flows(self) -> list[tuple[float, float, float]]:
        """Of each return of the broker: seconds that it was away, and from the open port to the next message that was
        confirmed, and to the first of those that was handled."""
        confirmed, handled, found = self.journal("confirmed"), self.journal("handled"), []
        for kill in [kill for kill in self.kills if kill.opened]:
            later = {line.number: line.at for line in confirmed if line.at >= kill.opened}
            if not later:
                continue  # all had been confirmed before the kill
            came = min(line.at for line in handled if line.number in later and line.at >= kill.opened)
            found.append((kill.opened - kill.over, min(later.values()) - kill.opened, came - kill.opened))
        return found

    def unmarked(self) -> dict[int, tuple[list[float], int]]:
        """Of each number that came without a mark more often than it was sent: when, and how many times too often."""
        sent, came = Counter(line.number for line in self.journal("sent")), dict[int, list[float]]()
        for line in self.journal("handled"):
            if line.words[1] == "1":  # attempt
                came.setdefault(line.number, []).append(line.at)
        return {
            number: (times, len(times) - sent[number]) for number, times in came.items() if len(times) > sent[number]
        }


async def opened(address: str) -> float:
    """When the broker's port accepted a connection again."""
    parsed = parse_address(address)
    refused = False  # what is left of the killed one may still accept
    while True:
        try:
            socket.create_connection((parsed.host, parsed.port or 0), 0.2).close()
        except OSError:
            refused = True
        else:
            if refused:
                return time.monotonic()
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("name", ["sqlite", *SUBJECTS])
def test_nothing_confirmed_is_lost_whoever_is_killed(
    name: str, tmp_path: Path, private_broker: Callable[[str], Broker]
) -> None:
    broker = None if name == "sqlite" else private_broker(broker_of(name))
    storm = Storm(tmp_path, address_of(name, broker) if broker else f"sqlite:///{tmp_path}/chaos.db", broker)
    begun = time.monotonic()
    asyncio.run(run(storm, KILLS_OF.get(name, KILLS)))
    print(f"\n{name}: {MESSAGES} messages in {time.monotonic() - begun:.1f} s")

    confirmed = {line.number for line in storm.journal("confirmed")}
    handled = storm.journal("handled")
    numbers = {line.number for line in handled}
    unmarked = storm.unmarked()
    print(f"  came again: {len(handled) - len(numbers)}, of these without a mark: {len(unmarked)}")
    print(f"  sends that failed: {dict(Counter(' '.join(line.words) for line in storm.journal('failed')))}")
    for away, confirming, handling in storm.flows():
        print(f"  broker away for {away:.2f} s, confirms after {confirming:.2f} s, handled after {handling:.2f} s")
    asked = [line.split() for line in (storm.folder / "asked").read_text().splitlines()]
    slowest = max(float(took) for _, took, _ in asked)
    print(f"  requests: {dict(Counter(outcome for outcome, *_ in asked))}, the slowest took {slowest:.2f} s")

    assert confirmed == set(range(MESSAGES))
    lost = confirmed - numbers
    assert not lost, f"{len(lost)} confirmed messages were never handled, as {sorted(lost)[:10]}"
    assert {line.words[0] for line in handled} == {f"m-{number}" for number in range(MESSAGES)}, "under its own id"
    forgotten = [kill for kill in storm.kills if kill.victims & FORGETS.get(name, set())]
    for number, (times, more) in unmarked.items():
        over_kills = [
            (first, then)
            for first, then in pairwise(times)
            if any(first < kill.over + 0.5 and kill.begun < then for kill in forgotten)
        ]
        told = f"{number} came at {times}, {more} times more than it was sent, without a mark; kills: {storm.kills}"
        assert len(over_kills) >= more, told
    assert storm.effects() == Counter(range(1, MESSAGES, 2)), "once in effect"
    assert "answered" in {outcome for outcome, *_ in asked}
    assert "wrong" not in {outcome for outcome, *_ in asked}


async def run(storm: Storm, kills: Kills) -> None:
    async with storm.processes() as processes:
        for count, victims in kills:
            await storm.until(lambda count=count: storm.confirmed >= count, f"{count} confirmed")  # type: ignore[misc]
            await storm.kill(victims, processes)
        await storm.until(lambda: storm.done, "all confirmed")
        await storm.all_handled()
