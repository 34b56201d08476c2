"""The taxi company over each broker: the same story, told by the same code, whoever is killed in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from running import CHECKOUT, Broker
from subjects import BROKERS

TAXI = CHECKOUT / "examples" / "taxi"
KILLS = ["passengers@trips.pickup_requested", "trips@trips.created", "maria@dispatch.offers", "billing@trips.get"]


def demo(name: str, address: str, folder: Path, *options: str) -> str:
    """What `python demo.py --deployment NAME.toml` prints."""
    words = ["--deployment", str(TAXI / f"{name}.toml"), "--svg", str(folder / "ride.svg"), *options]
    done = subprocess.run(
        [sys.executable, str(TAXI / "demo.py"), *words],
        cwd=folder,
        env={**os.environ, name.upper(): address, "TMPDIR": str(folder), "COLUMNS": "100", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def told(out: str) -> set[str]:
    """The lines of the story and of the phone, without the times, which differ from run to run."""
    story = out.partition("What was exchanged")[0]
    return {re.sub(r"^ *[\d.]+ s +", "", line).strip() for line in story.splitlines()}


def exchanged(out: str) -> set[str]:
    """Who said what to whom: the rows of the diagram that name an operation, without their times."""
    return set(re.findall(r"^ *[\d.]+ s  (\w+\.\S.*)$", out, re.MULTILINE))


@pytest.mark.parametrize("name", BROKERS)
def test_the_story_is_the_same_over_each_broker(
    name: str, tmp_path: Path, private_broker: Callable[[str], Broker]
) -> None:
    out, expected = demo(name, private_broker(name).address, tmp_path), (TAXI / "expected.txt").read_text()
    assert told(out) == told(expected)
    assert exchanged(expected) <= exchanged(out)


@pytest.mark.parametrize("name", BROKERS)
def test_the_story_goes_on_over_each_broker_when_services_are_killed_in_it(
    name: str, tmp_path: Path, private_broker: Callable[[str], Broker]
) -> None:
    out = demo(name, private_broker(name).address, tmp_path, *(f"--kill={kill}" for kill in KILLS))
    for kill in KILLS:
        assert f"{kill.partition('@')[0]} died" in out
    assert "Receipt: Maria to Opera, 14.50 EUR" in out
    phone = [line.strip("│ ") for line in out.partition("the phone ─")[2].partition("╰")[0].splitlines()[1:]]
    assert phone == [
        "Maria picks you up in 4 minutes: look for a red Saab",
        "You are there: Opera",
        "Receipt: Maria to Opera, 14.50 EUR",
    ], "each line once"


@pytest.mark.parametrize("name", BROKERS)
def test_everything_goes_through_the_broker(name: str) -> None:
    services = tomllib.loads((TAXI / f"{name}.toml").read_text())["service"].values()
    addresses = {address for one in services for address in (one.get("at"), *one.get("connect", {}).values())}
    assert {address for address in addresses if address} == {next(iter(addresses - {None}))}
