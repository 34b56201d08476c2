"""The taxi application keeps its promises: the story comes to its end, whoever dies in the middle of it."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import tomllib
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4
from xml.etree import ElementTree

import pytest
from apsw import Connection

from quintet import ConnectionLost, Contract, Policy, Unavailable, connect, serve
from quintet.outbox import Outbox
from quintet.record import read
from quintet.supervisor import running

TAXI = Path(__file__).parents[2] / "examples" / "taxi"
SERVICES = ["phone", "trips", "passengers", "dispatch", "maria", "viktor", "olga", "notification", "billing"]
AT_THE_END = "Receipt: Maria to Opera, 14.50 EUR"
PATIENT = Policy(timeout=10.0, breaker=False)


class Demo:
    """`make demo` as a process, with a folder of its own for what it writes."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.mark = f"TAXI_TEST={uuid4()}"
        self.folder = folder
        self.svg = folder / "ride.svg"
        name, _, value = self.mark.partition("=")
        environment = {**os.environ, name: value, "TMPDIR": str(folder), "COLUMNS": "100", "NO_COLOR": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(TAXI / "demo.py"), "--svg", str(self.svg), *options],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[int, str, str]:
        """Its exit code, and what it wrote. It must leave neither a process nor a file behind."""
        try:
            out, err = self.process.communicate(timeout=120)
        finally:
            self.process.kill()
        assert not list(self.folder.glob("taxi-*")), "the temporary folder is still there"
        left = [
            int(found.parent.name)
            for found in Path("/proc").glob("[0-9]*/environ")
            if self.mark.encode() in _contents(found)
        ]
        assert not left, f"processes are still there: {left}"
        return self.process.returncode, out, err


def _contents(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # it has just ended, or is another user's
        return b""


def plain(out: str) -> set[str]:
    """The lines, without what differs from run to run."""
    return {re.sub(r"[\d.]+ m?s\b *", "0 s ", line).strip() for line in out.splitlines()}


def test_the_story_is_told_as_expected_and_drawn_from_what_was_exchanged(tmp_path: Path) -> None:
    demo = Demo(tmp_path)
    code, out, err = demo.end()
    assert (code, err) == (0, "")
    expected = plain((TAXI / "expected.txt").read_text().replace(".quintet/ride.svg", str(demo.svg)))
    assert expected <= plain(out), sorted(expected - plain(out))
    drawn = ElementTree.parse(demo.svg).getroot()
    names = {element.text for element in drawn.findall(".//{*}text") if element.get("class") == "name"}
    assert names == set(SERVICES)


@pytest.mark.parametrize(
    "kills",
    [
        ["passengers@trips.pickup_requested", "dispatch@dispatch.offers", "billing@trips.get"],
        ["olga@trips.pickup_requested", "trips@passengers.get", "maria@trips.created"],
        ["viktor@trips.create", "notification@dispatch.offers", "phone@dispatch.driver_proposed"],
    ],
    ids=lambda kills: "+".join(kill.partition("@")[0] for kill in kills),
)
def test_the_story_goes_on_when_a_service_is_killed_in_it(kills: list[str], tmp_path: Path) -> None:
    """Three of them in one run, each in work on something or just before its part."""
    code, out, err = Demo(tmp_path, *(f"--kill={kill}" for kill in kills)).end()
    assert (code, err) == (0, ""), out
    assert AT_THE_END in out
    for kill in kills:
        assert f"{kill.partition('@')[0]} died" in out
    for accepted in (
        "Trip Management was told: a pickup is requested",
        "Passenger Notification heard who drives",
        "Passenger Notification heard that the trip is completed",
        "Trip Management heard who drives",
        "Maria picks you up in 4 minutes",
        "You are there: Opera",
    ):
        assert accepted in out


def test_the_same_code_runs_over_other_transports_with_another_deployment_file(tmp_path: Path) -> None:
    file = TAXI / "sqlite-only.toml"
    code, out, err = Demo(tmp_path, f"--deployment={file}").end()
    assert (code, err) == (0, "")
    assert AT_THE_END in out
    addresses = [
        address
        for service in tomllib.loads(file.read_text())["service"].values()
        for address in (service.get("at", ""), *service.get("connect", {}).values())
    ]
    assert not [address for address in addresses if address.startswith("http")]


def test_no_service_names_a_transport() -> None:
    for file in (TAXI / "taxi").glob("*.py"):
        addresses = re.findall(r"\w+://\S*", file.read_text())
        own_database = ['sqlite:///{self._file}"'] if file.name == "records.py" else []
        assert addresses == own_database, f"{file.name} holds an address"


def test_a_story_that_stops_ends_with_one_sentence_about_where(tmp_path: Path) -> None:
    without_maria = re.sub(r"\[service.maria\].*?(?=\[)", "", (TAXI / "quintet.toml").read_text(), flags=re.DOTALL)
    file = tmp_path / "quintet.toml"
    file.write_text(without_maria)
    code, _, err = Demo(tmp_path, f"--deployment={file}", "--within=3").end()
    assert code == 1
    assert re.fullmatch(
        r"demo: the story stopped after 'Trip Management created .*': .*no answer yet after 3 s.*\n", err
    )


def test_a_deployment_that_is_wrong_is_refused_with_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "quintet.toml"
    file.write_text((TAXI / "quintet.toml").read_text().replace("taxi.billing:service", "taxi.billing:nothing"))
    code, _, err = Demo(tmp_path, f"--deployment={file}").end()
    assert code == 2
    assert err.startswith("demo: billing cannot start: module taxi.billing has no 'nothing'")
    assert err.count("\n") == 1


def test_keep_leaves_it_running_until_ctrl_c(tmp_path: Path) -> None:
    demo = Demo(tmp_path, "--keep")
    assert demo.process.stdout
    told = ""
    while "/v1/rides" not in told:
        line = demo.process.stdout.readline()
        assert line, f"it ended: {told}"
        told += line
    assert re.search(r"^  trips +http://127.0.0.1:\d+$", told, re.MULTILINE)
    demo.process.send_signal(signal.SIGINT)
    code, _, err = demo.end()
    assert (code, err) == (130, "")


RIDES, KILLS = 5, 6


@pytest.mark.parametrize("seed", [1, 2])
async def test_whoever_is_killed_at_whatever_moment_no_trip_is_lost_or_made_twice(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(TAXI))
    monkeypatch.delitem(sys.modules, "demo", raising=False)
    from demo import deployment
    from taxi.contracts import Phone, Progress, Proposal, Trip
    from taxi.records import Records

    chance, deployed = random.Random(seed), deployment(TAXI / "quintet.toml")
    ids = [f"ride-{number}" for number in range(RIDES)]
    killed: list[str] = []

    async with running(deployed) as processes, connect(Phone, deployed.services["phone"].at, policy=PATIENT) as phone:

        async def ride(ride_id: str) -> object:
            await asyncio.sleep(chance.uniform(0, 2))
            while True:
                try:
                    return await (await phone.ride.using(id=ride_id)("p-1", "Station", "Opera")).wait(50.0)
                except (Unavailable, ConnectionLost):  # the phone may be dead just now
                    await asyncio.sleep(0.1)

        async def kill() -> None:
            for _ in range(KILLS):
                await asyncio.sleep(chance.uniform(0.1, 0.9))
                killed.append(chance.choice(SERVICES))
                processes[killed[-1]].kill()

        receipts = (await asyncio.gather(*map(ride, ids), kill()))[:-1]
        trips, proposals = await Records("trips", Trip).all(), await Records("proposals", Proposal).all()
        shown = await Records("screen", str).all()
    assert [getattr(receipt, "trip_id", receipt) for receipt in receipts] == ids, killed
    assert sorted((trip.id, trip.progress) for trip in trips) == [(ride_id, Progress.COMPLETED) for ride_id in ids]
    assert sorted(proposal.trip_id for proposal in proposals) == ids
    assert len(shown) == 2 * RIDES
    with closing(Connection(str(tmp_path / ".quintet" / "billing.db"))) as answers:
        made = answers.execute("SELECT id, state FROM quintet_answer ORDER BY id").fetchall()
    assert made == [(f"receipt-{ride_id}", "answered") for ride_id in ids]
    for name in ("trips", "proposals"):
        with closing(Connection(str(tmp_path / "state" / f"{name}.db"))) as database:
            assert database.execute("SELECT channel, reason FROM quintet_outbox").fetchall() == []


async def test_nothing_is_lost_where_a_service_fails_between_writing_and_telling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it had died there: the first attempt to tell of each change fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(TAXI))
    from taxi import billing, contracts, dispatch, driver, notification, passengers, phone, trips

    failed: list[str] = []
    add = Outbox.add

    def add_at_the_second_attempt(self: Outbox, transaction: Connection, event: Any, *args: object) -> str:
        if repr(event) not in failed:
            failed.append(repr(event))
            raise ConnectionError("died before it was told")
        return add(self, transaction, event, *args)

    monkeypatch.setattr(Outbox, "add", add_at_the_second_attempt)
    services = [part.service for part in (passengers, trips, dispatch, notification, billing, phone)]
    services += [driver.maria, driver.viktor, driver.olga]
    at = "memory://taxi"
    used: list[type[Contract]] = [
        contracts.Passengers, contracts.Trips, contracts.Dispatch, contracts.Billing, contracts.Phone
    ]  # fmt: skip
    async with (
        serve(*services, at=at, connect=dict.fromkeys(used, at), record="record.jsonl"),
        connect(contracts.Phone, at) as client,
    ):
        pending = await client.ride("p-1", "Station", "Opera")
        receipt = await pending.wait(30.0)
        with pytest.raises(contracts.PassengerInactive):
            await (await client.ride("p-2", "Station", "Opera")).wait(5.0)
    assert (receipt.driver, receipt.destination) == ("maria", "Opera")
    assert failed == ["Trips.created", "Dispatch.driver_proposed", "Trips.completed"]
    late = [exchange.receiver for exchange in read("record.jsonl") if exchange.outcome == "late"]
    assert set(late) == {"viktor"}
