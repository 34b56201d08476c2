"""scripts/brokers: what it refuses, and that a broker comes back where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import running


def script(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "QUINTET_BROKERS": str(folder)}
    return subprocess.run([running.SCRIPT, *words], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["restart"], "Unknown command 'restart': scripts/brokers install|up|down|kill|status [NAME ...]\n"),
        (["up", "mosquitto"], "There is no broker mosquitto: rabbitmq, activemq, kafka, nsq, postgresql\n"),
        ([], "scripts/brokers install|up|down|kill|status [NAME ...]\n"),
    ],
    ids=["a command", "a name", "nothing"],
)
def test_what_it_does_not_know_is_refused_in_one_sentence(tmp_path: Path, words: list[str], sentence: str) -> None:
    done = script(tmp_path, *words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", sentence)
    assert not list(tmp_path.iterdir())


def test_its_status_names_every_broker_also_where_none_runs(tmp_path: Path) -> None:
    done = script(tmp_path, "status")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(running.NAMES)
    assert "answers" not in done.stdout


def test_to_stop_what_does_not_run_is_no_error(tmp_path: Path) -> None:
    assert (script(tmp_path, "down").returncode, script(tmp_path, "kill").returncode) == (0, 0)
    assert json.loads((tmp_path / "addresses.json").read_text()) == {}


def test_every_broker_is_installed_where_ci_runs(tmp_path: Path) -> None:
    missing = [line for line in script(tmp_path, "status").stdout.splitlines() if "not installed" in line]
    if not os.environ.get("CI"):
        pytest.skip("not in CI")
    assert not missing


PrivateBroker = Callable[[str], running.Broker]


def test_a_second_start_does_nothing(private_broker: PrivateBroker) -> None:
    nsq = private_broker("nsq")
    before = nsq.entry
    assert not nsq.start()
    assert nsq.entry == before


def test_a_killed_broker_comes_back_on_the_same_port(private_broker: PrivateBroker) -> None:
    nsq = private_broker("nsq")
    before = nsq.entry
    nsq.kill()
    assert nsq.start()
    assert {**nsq.entry, "pid": 0, "born": 0} == {**before, "pid": 0, "born": 0}
    assert nsq.entry["pid"] != before["pid"]


def test_a_broker_whose_process_was_killed_by_another_comes_back_too(private_broker: PrivateBroker) -> None:
    nsq = private_broker("nsq")
    os.kill(nsq.entry["pid"], signal.SIGKILL)
    assert nsq.start()


def test_addresses_tell_what_runs_and_nothing_else(private_broker: PrivateBroker) -> None:
    nsq = private_broker("nsq")
    addresses = nsq.folder / "addresses.json"
    assert json.loads(addresses.read_text()) == {"nsq": nsq.entry}
    nsq.stop()
    assert json.loads(addresses.read_text()) == {}
