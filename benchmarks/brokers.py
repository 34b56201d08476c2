"""What the measurements beside brokers share: a broker of their own, and for each peer a process on either side of it.

A receiver and a sender wait until they are asked, so that the rounds of all peers can take turns. All that a peer says
of itself it says on standard output, one line of JSON for each line that it is asked.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import select
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import uvloop
from msgspec import Struct

from benchmarks.figure import Figure, at_least, at_most

CHECKOUT = Path(__file__).parents[1]
FOLDER = CHECKOUT / ".brokers" / "bench"  # on the disk where the tests' brokers have theirs, too
SAID = FOLDER / "said"  # what the sides wrote to standard error
OURS = "Quintet"
ALONE = "Quintet's transport alone"
MANY = 256  # outstanding, and what a receiver may have in hand
MEGABYTE = 1_000_000
PAUSE = 0.01  # seconds between messages that are to find everybody idle
PATIENCE = 30.0  # seconds that a side has for anything, beyond those that it is asked to work


class Sample(Struct):
    """About 100 bytes of JSON."""

    id: str
    passenger: str
    lat: float
    lon: float
    sent: float
    """When, by the machine's monotonic clock, which all processes share."""


class At(Struct, frozen=True):
    """Where a pair meets."""

    address: str
    name: str
    """Of its queue or topic: no two pairs have the same."""
    large: bool = False
    """Bodies are a megabyte of zeros instead of a Sample."""

    @property
    def host(self) -> str:
        return self.address.rpartition("@")[2].rpartition("//")[2].rpartition(":")[0]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def body(self) -> bytes:
        return LARGE if self.large else encode(sample())

    def sample(self, body: bytes) -> Sample:
        return NOTHING if self.large else decode(body)


encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Sample).decode
LARGE = bytes(MEGABYTE)
NOTHING = Sample("", "", 0.0, 0.0, 0.0)


def sample() -> Sample:
    return Sample("trip-2041", "Ada Lovelace", 52.0907, 5.1214, time.monotonic())


class Heard:
    """What a receiver has handled."""

    def __init__(self) -> None:
        self.count = 0
        self.last = 0.0
        self.waits: list[float] = []
        self._wanted = 0
        self._enough = asyncio.Event()

    def __call__(self, sample: Sample) -> None:
        self.count += 1
        self.last = now = time.monotonic()
        self.waits.append(now - sample.sent)
        if self.count == self._wanted:
            self._enough.set()

    async def until(self, wanted: int) -> None:
        self._wanted = wanted
        self._enough.clear()
        if self.count < wanted:
            await self._enough.wait()


Stay = AsyncExitStack
Call: TypeAlias = Callable[[], Awaitable[object]]
Receiver: TypeAlias = Callable[[At, Heard, Stay], Awaitable[None]]
"""Returns once it receives, and stays until the stack is closed."""
Sender: TypeAlias = Callable[[At, Stay], Awaitable[Call]]
"""Returns what sends one message (and brings the answer to a request)."""
Peers: TypeAlias = Mapping[str, tuple[Receiver, Sender]]


# A side: what each of the two processes does


class Lateness:
    """How late its thread comes to what was due after `PERIOD`, at worst.

    `blocked`: the same without the time that the thread was ready to run and had no core, which a machine with more to
    do than it has cores adds to anyone's. What it computes and what it waits for is in it.
    """

    PERIOD = 0.001  # seconds

    def __init__(self) -> None:
        self.late = self.blocked = 0.0
        self._statistics = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        self.begin()

    def begin(self) -> None:
        self._begun, self._queued = time.perf_counter(), self._without_core()

    def end(self) -> None:
        late = time.perf_counter() - self._begun - self.PERIOD
        self.late = max(self.late, late)
        self.blocked = max(self.blocked, late - (self._without_core() - self._queued))

    def _without_core(self) -> float:
        """Seconds in all that this thread was ready to run and did not, as Linux counts them."""
        return int(os.pread(self._statistics, 100, 0).split()[1]) / 1e9

    def close(self) -> None:
        os.close(self._statistics)


class Ticking(Lateness):
    """The same of the callbacks of a loop: one that is blocked runs none."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._next()

    def _next(self) -> None:
        self.begin()
        self._timer = self._loop.call_later(self.PERIOD, self._tick)

    def _tick(self) -> None:
        self.end()
        self._next()

    def stop(self) -> dict[str, float]:
        self._timer.cancel()
        self.close()
        return {"late": self.late, "blocked": self.blocked}


async def _send(call: Call, outstanding: int, seconds: float, pause: float) -> dict[str, Any]:
    """Each of so many tasks sends one message after the other; `pause` seconds of idleness between two."""
    count, took = 0, []
    begun = time.monotonic()
    until = begun + seconds

    async def sender() -> None:
        nonlocal count
        while time.monotonic() < until:
            if pause:
                await asyncio.sleep(pause)
                start = time.perf_counter()
                await call()
                took.append(time.perf_counter() - start)
            else:
                await call()
            count += 1

    await asyncio.gather(*(sender() for _ in range(outstanding)))
    return {"count": count, "begun": begun, "ended": time.monotonic(), "took": took}


async def _side(role: str, peer: tuple[Receiver, Sender], at: At) -> None:
    async with AsyncExitStack() as stay:
        heard, ticking = Heard(), None
        call: Call | None = None
        if role == "receive":
            await peer[0](at, heard, stay)
        else:
            call = await peer[1](at, stay)
        answer: Any = "ready"
        while True:
            print(json.dumps(answer), flush=True)
            match (await asyncio.to_thread(sys.stdin.readline)).split():
                case ["send", outstanding, seconds, pause] if call:
                    answer = await _send(call, int(outstanding), float(seconds), float(pause))
                case ["until", wanted]:
                    await heard.until(int(wanted))
                    answer, heard.waits = {"last": heard.last, "waits": heard.waits[-1000:]}, []
                case ["tick"]:
                    ticking, answer = Ticking(), None
                case ["tock"] if ticking:
                    answer = ticking.stop()
                case _:
                    return


def side(questions: Mapping[str, Peers]) -> None:
    """What `python -m benchmarks.brokers_... QUESTION PEER receive|send WHERE` does."""
    question, peer, role, where = sys.argv[1:]
    uvloop.run(_side(role, questions[question][peer], msgspec.json.decode(where, type=At)))
    sys.stdout.flush()
    os._exit(0)  # a peer may keep threads


# The driver's part


class Ended(Exception):
    """A side that ended, or that did not answer: which, and the last that it said."""


class Missing(Exception):
    """A broker that this machine does not have: what to do about it."""


class Process:
    """One side of a peer."""

    def __init__(self, module: str, question: str, peer: str, role: str, at: At, stay: ExitStack) -> None:
        self.name = f"{peer}, {question} {role}"
        where = msgspec.json.encode(at).decode()
        self._said = stay.enter_context((SAID / f"{question} {peer} {role}.log").open("w+"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, question, peer, role, where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            cwd=CHECKOUT,
        )
        stay.callback(self._end)

    def _end(self) -> None:
        try:
            self._process.communicate("\n", timeout=5)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()

    def say(self, line: str) -> None:
        assert self._process.stdin
        try:
            print(line, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._ended("ended") from None

    def heard(self, patience: float = PATIENCE) -> Any:
        """What it answers to the last that was said."""
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], patience)[0]:
            raise self._ended("did not answer")
        line = self._process.stdout.readline()
        if not line:
            raise self._ended("ended")
        return json.loads(line)

    def ask(self, line: str, patience: float = PATIENCE) -> Any:
        self.say(line)
        return self.heard(patience)

    def _ended(self, how: str) -> Ended:
        self._said.seek(0)
        lines = [line.strip() for line in self._said if line.strip()]
        return Ended(f"{self.name} {how}: {lines[-1] if lines else 'it said nothing'}")

    def work(self) -> float:
        return work(self._process.pid)


def work(pid: int) -> float:
    """Seconds of processor time that a process took, in all its threads."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


class Pair:
    """Both sides of a peer; `total` messages were sent so far."""

    def __init__(self, module: str, question: str, peer: str, at: At, stay: ExitStack) -> None:
        self.total = 0
        self.receiver = Process(module, question, peer, "receive", at, stay)
        self.receiver.heard()
        self.sender = Process(module, question, peer, "send", at, stay)
        self.sender.heard()

    def send(self, outstanding: int, seconds: float, pause: float = 0.0) -> dict[str, Any]:
        sent: dict[str, Any] = self.sender.ask(f"send {outstanding} {seconds} {pause}", seconds + PATIENCE)
        self.total += sent["count"]
        return sent

    def handled(self) -> dict[str, Any]:
        """Waits until all that was sent is handled; says when that was, and how long each was under way."""
        handled: dict[str, Any] = self.receiver.ask(f"until {self.total}")
        return handled


class Broker(Struct):
    """One that was started for a measurement."""

    entry: dict[str, Any]
    """Its addresses, version and process id, as scripts/brokers tells them."""

    def work(self) -> float:
        return work(self.entry["pid"])


def _script(command: str, *names: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "QUINTET_BROKERS": str(FOLDER)}
    words = [sys.executable, "scripts/brokers", command, *names]
    return subprocess.run(words, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)


def installed() -> str:
    """The brokers of this machine and their versions, and which of them it lacks."""
    status = _script("status", "rabbitmq", "activemq", "kafka", "nsq")
    found = [re.split(" {2,}", re.sub(" +", " ", line, count=1))[0] for line in status.stdout.splitlines()]
    return ", ".join(found) or f"none, {status.stderr.strip()}"


@contextmanager
def broker(name: str) -> Iterator[Broker]:
    """A fresh broker with a folder of its own: no other's queues, and no other's messages. Raises Missing."""
    with _alone():
        yield from _broker(name)


@contextmanager
def _alone() -> Iterator[None]:
    """Two measurements at a time would spoil each other."""
    SAID.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "measuring").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another measurement to end ...", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _broker(name: str) -> Iterator[Broker]:
    _script("down", name)  # of a measurement that was broken off
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    try:
        if (started := _script("up", name)).returncode:
            raise Missing(started.stderr.strip().partition("\n")[0])
        yield Broker(json.loads((FOLDER / "addresses.json").read_text())[name])
    finally:
        _script("down", name)
        shutil.rmtree(FOLDER / name, ignore_errors=True)


class Side(Struct):
    """What a message costs each process, in microseconds of its processor."""

    receiver: float = 0.0
    sender: float = 0.0
    broker: float = 0.0


class Rates(Struct):
    """What the peers of a question reached."""

    question: str
    rounds: dict[str, dict[int, list[float]]]
    """Per peer and number outstanding: messages per second, of each round."""
    work: dict[str, Side]
    failed: dict[str, str]

    def rate(self, peer: str, outstanding: int) -> float:
        rounds = self.rounds[peer][outstanding]
        return statistics.median(rounds) if rounds and peer not in self.failed else float("nan")

    def beside(self, peer: str, outstanding: int, budget: float) -> Figure:
        """How many times the peer's rate ours is."""
        name = f"{self.question}: {OURS} beside {peer}, {outstanding} outstanding"
        figure = at_least(name, self.rate(OURS, outstanding) / self.rate(peer, outstanding), "x", budget)
        return figure if peer not in self.failed else Figure(name, float("nan"), "x", figure.budget, None)

    def figures(self) -> list[Figure]:
        found = []
        for peer, levels in self.rounds.items():
            if peer in self.failed:
                found.append(Figure(f"{self.question}: {self.failed[peer]}", float("nan"), ""))
                continue
            name = f"{self.question}: {peer}"
            found += [Figure(f"{name}, {many} outstanding", self.rate(peer, many), "1/s") for many in levels]
            cost = self.work[peer]
            found.append(Figure(f"{name}: work of the sender", cost.sender, "us"))
            found.append(Figure(f"{name}: work of the receiver", cost.receiver, "us"))
            found.append(Figure(f"{name}: work of the broker", cost.broker, "us"))
        return found


def compare(
    module: str,
    question: str,
    peers: Peers,
    broker: Broker,
    *,
    title: str,
    levels: Sequence[int],
    seconds: float,
    rounds: int,
    handled: bool = False,
    warm: float = 0.2,
) -> Rates:
    """Messages per second of each peer; the peers take turns, round by round, and one that fails is left out.

    From the first send until the last is answered, or (`handled`) until the last handler's end. `warm`: seconds that
    each has before, which a broker in a virtual machine of Java needs as much as they do.
    """
    rates = Rates(title, {peer: {many: [] for many in levels} for peer in peers}, {}, {})
    costs = {peer: [0.0, 0.0, 0.0, 0.0] for peer in peers}  # messages, and seconds of each process
    with ExitStack() as stay:
        pairs: dict[str, Pair] = {}
        times: dict[str, float] = {}
        for peer in peers:
            at = At(broker.entry["address"], f"bench.{question}.{_word(peer)}")
            with _watched(rates, peer):
                pairs[peer] = pair = Pair(module, question, peer, at, stay)
                share = _share(pair, max(levels), 0.05) if handled else 1.0
                times[peer] = seconds * share
                pair.send(max(levels), warm * share)
                if handled:
                    pair.handled()
        for many in [many for _ in range(rounds) for many in levels]:
            for peer, pair in pairs.items():
                if peer in rates.failed:
                    continue
                with _watched(rates, peer):
                    before = [pair.receiver.work(), pair.sender.work(), broker.work()]
                    sent = pair.send(many, times[peer])
                    ended = pair.handled()["last"] if handled else sent["ended"]
                    after = [pair.receiver.work(), pair.sender.work(), broker.work()]
                    rates.rounds[peer][many].append(sent["count"] / (ended - sent["begun"]))
                    if many == max(levels):
                        used = [sent["count"], *(end - start for end, start in zip(after, before, strict=True))]
                        costs[peer] = [had + more for had, more in zip(costs[peer], used, strict=True)]
    for peer, (count, *spent) in costs.items():
        rates.work[peer] = Side(*(one / count * 1e6 for one in spent)) if count else Side()
    return rates


def _share(pair: Pair, outstanding: int, seconds: float) -> float:
    """What is slower to hear than to tell is told for so much of the time only, or a round would never end."""
    sent = pair.send(outstanding, seconds)
    return float(min(1.0, (sent["ended"] - sent["begun"]) / (pair.handled()["last"] - sent["begun"])))


@contextmanager
def _watched(rates: Rates, peer: str) -> Iterator[None]:
    try:
        yield
    except Ended as ended:
        rates.failed[peer] = str(ended)
        print(ended, file=sys.stderr)


def lone_figures(
    module: str,
    question: str,
    peers: Sequence[str],
    broker: Broker,
    *,
    confirmed: float | None = None,
    reaches: float | None = None,
    seconds: float = 1.5,
) -> list[Figure]:
    """Milliseconds that one message each 10 ms takes, between idle processes: until its sender is told that the broker
    has it, and until its handler begins. The budgets are ours, at the median."""
    found = []
    for peer in peers:
        try:
            with ExitStack() as stay:
                at = At(broker.entry["address"], f"bench.lone.{_word(peer)}")
                pair = Pair(module, question, peer, at, stay)
                pair.send(1, 0.3, PAUSE)
                pair.handled()
                took = pair.send(1, seconds, PAUSE)["took"]
                waits = pair.handled()["waits"]
        except Ended as ended:
            found.append(_failed(f"one message, {peer}", ended))
            continue
        for what, times, budget in (("confirmed", took, confirmed), ("reaches its handler", waits, reaches)):
            name, median = f"one message, {peer}: {what} after, median", statistics.median(times) * 1e3
            ours = budget is not None and peer == OURS
            found.append(at_most(name, median, "ms", budget or 0.0) if ours else Figure(name, median, "ms"))
            late = sorted(times)[int(len(times) * 0.99)] * 1e3
            found.append(Figure(f"one message, {peer}: {what} after, 99 of 100", late, "ms"))
    return found


def _failed(what: str, ended: Ended) -> Figure:
    """Where a figure cannot be had, its place says why."""
    print(ended, file=sys.stderr)
    return Figure(f"{what}: could not be measured, {ended}", float("nan"), "")


class Idle(threading.Thread):
    """The same of a thread of the driver, which has nothing to do meanwhile: what the machine alone does to anyone."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._go = True
        self.start()

    def run(self) -> None:
        self._lateness = lateness = Lateness()
        while self._go:
            lateness.begin()
            time.sleep(lateness.PERIOD)
            lateness.end()
        lateness.close()

    def stop(self) -> Lateness:
        self._go = False
        self.join()
        return self._lateness


class Blocked(Struct):
    """What messages of a megabyte do to the loops of both sides, in milliseconds at worst."""

    sender: float
    receiver: float
    idle: float
    """The same of a process that does nothing."""
    sender_late: float
    receiver_late: float
    """By how much their callbacks were late: as above, and waiting for a core."""
    idle_late: float
    rate: float


def large(module: str, question: str, peer: str, broker: Broker, name: str, *, seconds: float, rounds: int) -> Blocked:
    """Four tasks send a megabyte each, then pause, while both sides tick."""
    found, rates = [], []
    with ExitStack() as stay:
        pair = Pair(module, question, peer, At(broker.entry["address"], name, large=True), stay)
        pair.send(1, 0.1, PAUSE)
        pair.handled()
        for _ in range(rounds):
            for one in (pair.sender, pair.receiver):
                one.ask("tick")
            idle = Idle()
            sent = pair.send(4, seconds, 5 * PAUSE)
            ended = pair.handled()["last"]
            tocks = [one.ask("tock") for one in (pair.sender, pair.receiver)]
            rates.append(sent["count"] / (ended - sent["begun"]))
            still = idle.stop()
            blocked, late = ([tock[what] for tock in tocks] for what in ("blocked", "late"))
            found.append([*blocked, still.blocked, *late, still.late])
    return Blocked(*(1e3 * max(each) for each in zip(*found, strict=True)), statistics.median(rates))


BLOCKED = 5.0  # milliseconds that a megabyte may keep a loop


def large_figures(module: str, question: str, broker: Broker, beside: Sequence[str] = ()) -> list[Figure]:
    """How long the loops of our transport's two sides are blocked, and those of the peers beside it."""
    found = []
    for peer in (ALONE, *beside):
        name = f"1 MB messages, {peer}"
        try:
            rounds = 3 if peer == ALONE else 1
            name_there = f"bench.large.{_word(peer)}"
            blocked = large(module, question, peer, broker, name_there, seconds=0.4, rounds=rounds)
        except Ended as ended:
            found.append(_failed(name, ended))
            continue
        for side, milliseconds in (("sender", blocked.sender), ("receiver", blocked.receiver)):
            title = f"{name}: the {side}'s loop was blocked for, at worst"
            ours = at_most(title, milliseconds, "ms", BLOCKED)
            found.append(ours if peer == ALONE else Figure(title, milliseconds, "ms"))
        found.append(Figure(f"{name}: an idle process's meanwhile", blocked.idle, "ms"))
        found.append(Figure(f"{name}: the sender's callbacks were late by, at worst", blocked.sender_late, "ms"))
        found.append(Figure(f"{name}: the receiver's callbacks were late by, at worst", blocked.receiver_late, "ms"))
        found.append(Figure(f"{name}: an idle process's meanwhile were late by", blocked.idle_late, "ms"))
        found.append(Figure(f"{name}: handled", blocked.rate, "1/s"))
    return found


def _word(peer: str) -> str:
    """A name that every broker takes for a queue or topic."""
    return "".join(letter for letter in peer.lower() if letter.isalnum())
