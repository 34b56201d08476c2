"""The real command, as its users type it: what it prints, and what it exits with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import msgspec
import pytest

from quintet.model import ContractModel

QUINTET = [sys.executable, "-m", "quintet"]
SECONDS = 60.0  # after which a command that hangs is killed, and its test fails

CONTRACTS = '''# mypy: disable-error-code="empty-body"
from msgspec import Struct
from quintet import Contract, Fault, async_request, event, notification, request, survey


class Passenger(Struct):
    id: str
    name: str
    active: bool = True


class NoSuchPassenger(Fault, status=404):
    passenger_id: str


class Passengers(Contract, name="passengers", version="1.0"):
    """Who may ride."""

    @request(http="GET /passengers/{passenger_id}", faults=[NoSuchPassenger])
    async def get(self, passenger_id: str) -> Passenger: ...

    @notification
    async def seen(self, passenger_id: str) -> None: ...

    @async_request
    async def report(self, passenger_id: str) -> Passenger: ...


class Trips(Contract, name="trips", version="2.1"):
    @event
    async def created(self, passenger: Passenger) -> None: ...

    @survey
    async def offers(self, passenger: Passenger) -> int: ...
'''
SERVICE = """import asyncio
from quintet import Redelivery, Service
from contracts import *

service = Service(Passengers, redelivery=Redelivery(attempts=1))


@service.handles(Passengers.get)
async def get(passenger_id: str) -> Passenger:
    if passenger_id == "nobody":
        raise NoSuchPassenger(passenger_id=passenger_id)
    if passenger_id == "broken":
        raise ValueError("a secret")
    if passenger_id == "slow":
        print("in work", flush=True)
        await asyncio.sleep(0.3)
    if passenger_id == "endless":
        print("in work", flush=True)
        await asyncio.Event().wait()
    return Passenger(passenger_id, "Ada")


@service.handles(Passengers.seen)
async def seen(passenger_id: str) -> None:
    if passenger_id.startswith("bad"):
        print("refused", flush=True)
        raise ValueError("cannot be handled")
    print("seen", passenger_id, flush=True)


@service.handles(Passengers.report)
async def report(passenger_id: str) -> Passenger:
    if passenger_id == "late":
        await asyncio.sleep(5.0)
    return Passenger(passenger_id, "Ada")


@service.handles(Trips.created)
async def created(passenger: Passenger) -> None:
    print("heard of", passenger.name, flush=True)


@service.handles(Trips.offers)
async def offers(passenger: Passenger) -> int:
    return 7


another = Service(name="another")


@another.handles(Trips.offers)
async def offer(passenger: Passenger) -> int:
    return 8
"""


def quintet(folder: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """One command, to its end."""
    return subprocess.run(
        [*QUINTET, *arguments], cwd=folder, input=stdin, capture_output=True, text=True, timeout=SECONDS, check=False
    )


class Running:
    """A command that goes on: its lines as they come, stdout and stderr in one."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [*QUINTET, *arguments],
            cwd=folder,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self._stdout = self.process.stdout
        self.seen: list[str] = []

    def line(self, text: str) -> str:
        """Reads on until a line with this text."""
        with self._patience():
            for line in self._stdout:
                self.seen.append(line.rstrip())
                if text in line:
                    return line.rstrip()
        raise AssertionError(f"it ended with {self.process.wait()} and never wrote {text!r}, but: {self.seen}")

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Reads on to the end; the exit code."""
        with self._patience():
            self.seen += [line.rstrip() for line in self._stdout]
            return self.process.wait()

    @contextmanager
    def _patience(self) -> Iterator[None]:
        watchdog = threading.Timer(SECONDS, self.process.kill)
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()


@contextmanager
def running(folder: Path, *arguments: str, **environment: str) -> Iterator[Running]:
    command = Running(folder, *arguments, **environment)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            command.process.kill()
        command.process.wait()
        command._stdout.close()


SERVE = ["serve", "service:service", "--at", "http://127.0.0.1:0", "--at", "sqlite:///rides.db"]
SERVE += ["--connect", "trips=sqlite:///rides.db"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "contracts.py").write_text(CONTRACTS)
    (tmp_path / "service.py").write_text(SERVICE)
    return tmp_path


class Served(msgspec.Struct):
    folder: Path
    http: str
    service: Running

    @property
    def sqlite(self) -> str:
        return "sqlite:///rides.db"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The service of this file, served for all tests that only call it."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "contracts.py").write_text(CONTRACTS)
    (folder / "service.py").write_text(SERVICE)
    command = Running(folder, *SERVE)
    try:
        ready = command.line("serving")
        found = re.fullmatch(r"serving passengers at (http://127\.0\.0\.1:(\d+)), sqlite:///rides\.db", ready)
        assert found is not None, ready
        assert int(found[2]) > 0, "the real port"
        yield Served(folder, found[1], command)
    finally:
        command.send(signal.SIGTERM)
        code = command.end()
        command._stdout.close()
        assert code == 0, command.seen


def test_a_service_on_a_queue_shows_its_metrics_at_an_address_of_their_own(folder: Path) -> None:
    queue = ["--at", "sqlite:///rides.db", "--connect", "trips=sqlite:///rides.db"]
    with running(folder, "serve", "service:service", *queue, "--observe", "http://127.0.0.1:0") as service:
        shown = service.line("metrics are shown at").split()[-1]
        service.line("serving passengers at sqlite:///rides.db")
        with urlopen(shown, timeout=10) as page:
            assert b"process_cpu_seconds_total" in page.read()
        service.send(signal.SIGTERM)
        assert service.end() == 0


def sentence(ended: subprocess.CompletedProcess[str]) -> str:
    """The one sentence on stderr that a failed command leaves."""
    assert ended.returncode != 0, ended.stdout
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.startswith("quintet: ")
    return ended.stderr.removeprefix("quintet: ").rstrip()


# serve


def test_serve_drains_on_sigterm_and_cuts_off_nothing_in_flight(folder: Path) -> None:
    with running(folder, *SERVE) as service:
        address = service.line("serving").split()[3].rstrip(",")
        with running(folder, "call", "contracts:Passengers.get", "--to", address, '{"passenger_id": "slow"}') as call:
            service.line("in work")
            service.send(signal.SIGTERM)
            assert call.end() == 0, call.seen
            assert call.seen == ['{"id":"slow","name":"Ada","active":true}']
        assert service.end() == 0, service.seen


def test_a_second_signal_ends_serve_at_once(folder: Path) -> None:
    with running(folder, *SERVE) as service:
        address = service.line("serving").split()[3].rstrip(",")
        call = ["call", "contracts:Passengers.get", "--to", address, "--timeout", "50", '{"passenger_id": "endless"}']
        with running(folder, *call) as caller:
            service.line("in work")
            service.send(signal.SIGTERM)
            service.line("draining")
            service.send(signal.SIGINT)
            assert service.end() == 128 + signal.SIGINT
            assert caller.end() == 4
            assert caller.seen[0].startswith("quintet: ConnectionLost: ")


def test_serve_writes_json_lines_where_a_program_reads(folder: Path) -> None:
    with running(folder, *SERVE, "--json", "--record", "record.jsonl") as service:
        ready = json.loads(service.line("at"))
        assert ready["service"] == "passengers"
        assert ready["at"][1] == "sqlite:///rides.db"
        call = quintet(folder, "call", "contracts:Passengers.get", "--to", ready["at"][0], '{"passenger_id": "broken"}')
        assert call.returncode == 4
        logged = json.loads(service.line("failed"))
        assert logged["level"] == "error"
        assert "ValueError: a secret" in logged["exception"]
        service.send(signal.SIGINT)
        assert service.end() == 0
    recorded = json.loads((folder / "record.jsonl").read_text())
    assert (recorded["operation"], recorded["outcome"]) == ("passengers.get", "ValueError")


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["service"], 2, "'service' names no service: write MODULE:SERVICE, as rides.trips:service"),
        (["nowhere:service"], 2, "there is no module 'nowhere' in "),
        (["service:servce"], 2, "module service has no 'servce'; the services there: service, another"),
        (["service:asyncio"], 2, "module service has a 'asyncio' which is no service"),
        (["wrong:service"], 2, "cannot import wrong: NameError: name 'nothing' is not defined ("),
        (["invalid:service"], 2, "cannot import invalid: "),
        (["service:service"], 2, "service passengers: say where it is served"),
        (["service:service", "--at", "htp://x"], 2, "htp://x: unknown scheme 'htp'; known are"),
        (["service:service", "--at", "http://127.0.0.1:0", "--connect", "x"], 2, "--connect 'x': write NAME=ADDRESS"),
        (["service:service", "--at", "http://127.0.0.1:0"], 2, "Trips.created (publish/subscribe) cannot be carried"),
        (["service:service", "--at", "http://127.0.0.1:0", "--log-level", "loud"], 2, "--log-level 'loud': it is one"),
        (["service:service", "--at", "http://127.0.0.1:0", "--format", "jsn"], 2, "unknown format 'jsn'"),
    ],
)
def test_serve_refuses_in_one_sentence(folder: Path, arguments: list[str], code: int, complaint: str) -> None:
    (folder / "wrong.py").write_text("x = 1\nnothing\n")
    (folder / "invalid.py").write_text("def x(:\n")
    ended = quintet(folder, "serve", *arguments)
    assert complaint in sentence(ended)
    assert ended.returncode == code


def test_a_port_in_use_is_a_failure_of_the_transport(served: Served) -> None:
    arguments = ["--at", served.http, "--connect", "trips=sqlite:///rides.db"]
    ended = quintet(served.folder, "serve", "service:service", *arguments)
    assert f"{served.http}: cannot listen there" in sentence(ended)
    assert ended.returncode == 5


def test_serve_with_reload_starts_anew_when_a_file_changes(folder: Path) -> None:
    with running(folder, "serve", "service:another", "--at", "sqlite:///rides.db", "--reload") as service:
        assert service.line("serving") == "serving another at sqlite:///rides.db"
        (folder / "service.py").write_text("nonsense(")
        assert "service.py" in service.line("changed: ")
        service.line("quintet: cannot import service: ")
        (folder / "service.py").write_text(SERVICE.replace('name="another"', 'name="renamed"'))
        assert service.line("serving") == "serving renamed at sqlite:///rides.db"
        service.send(signal.SIGTERM)
        assert service.end() == 0, service.seen


# call


@pytest.mark.parametrize("over", ["http", "sqlite"])
def test_call_speaks_the_three_styles_of_a_client(served: Served, over: str) -> None:
    to = ["--to", getattr(served, over)]
    reply = quintet(served.folder, "call", "contracts:Passengers.get", *to, '{"passenger_id": "p-1"}')
    assert (reply.returncode, reply.stdout) == (0, '{"id":"p-1","name":"Ada","active":true}\n')

    told = quintet(served.folder, "call", "contracts:Passengers.seen", *to, f'{{"passenger_id": "{over}"}}')
    assert (told.returncode, told.stdout) == (0, "accepted\n")
    served.service.line(f"seen {over}")

    submitted = quintet(served.folder, "call", "contracts:Passengers.report", *to, "--no-wait", '{"passenger_id": "p"}')
    assert submitted.returncode == 0
    accepted, pending = submitted.stdout.split()
    assert accepted == "accepted:"
    answer = quintet(served.folder, "call", "contracts:Passengers.report", *to, "--pending", pending)
    assert (answer.returncode, answer.stdout) == (0, '{"id":"p","name":"Ada","active":true}\n')

    at_once = quintet(served.folder, "call", "contracts:Passengers.report", *to, "--json", '{"passenger_id": "p"}')
    first, second = at_once.stdout.splitlines()
    assert list(json.loads(first)) == ["id"]
    assert json.loads(second) == {"id": "p", "name": "Ada", "active": True}


PASSENGER = '{"passenger": {"id": "p-1", "name": "Ada"}}'


def test_call_publishes_an_event_as_its_service_would(served: Served) -> None:
    told = quintet(served.folder, "call", "contracts:Trips.created", "--to", served.sqlite, "--json", PASSENGER)
    assert (told.returncode, told.stdout) == (0, '{"accepted":true}\n')
    served.service.line("heard of Ada")


def test_call_asks_a_survey_and_prints_the_answers_as_they_come(served: Served) -> None:
    ask = ["call", "contracts:Trips.offers", "--to", served.sqlite, "--within", "30"]
    with running(served.folder, "serve", "service:another", "--connect", "trips=sqlite:///rides.db") as another:
        another.line("serving another")
        both = quintet(served.folder, *ask, "--enough", "2", "--json", PASSENGER)
        answers = {tuple(json.loads(line).values()) for line in both.stdout.splitlines()}
        assert answers == {(7, "passengers"), (8, "another")}
    one = quintet(served.folder, *ask, "--enough", "1", PASSENGER)
    assert (one.stdout, one.stderr) == ("passengers: 7\n", "1 answer\n")


@pytest.mark.parametrize("over", ["http", "sqlite"])
def test_a_call_that_fails_says_so_in_one_sentence_and_by_its_exit_code(served: Served, over: str) -> None:
    get = ["call", "contracts:Passengers.get", "--to", getattr(served, over)]
    fault = quintet(served.folder, *get, '{"passenger_id": "nobody"}')
    assert sentence(fault) == "NoSuchPassenger: passenger_id='nobody'"
    assert fault.returncode == 3
    broken = quintet(served.folder, *get, '{"passenger_id": "broken"}')
    assert sentence(broken).startswith("RemoteError: passengers.get failed in passengers (its log has it under ")
    assert "secret" not in broken.stderr
    assert broken.returncode == 4
    late = quintet(served.folder, *get, "--timeout", "0.2", '{"passenger_id": "slow"}')
    assert sentence(late).startswith("DeadlineExceeded: ")
    assert late.returncode == 4


def test_who_waits_no_longer_for_an_answer_still_has_its_id(served: Served) -> None:
    report = ["call", "contracts:Passengers.report", "--to", served.sqlite]
    late = quintet(served.folder, *report, "--timeout", "3", '{"passenger_id": "late"}')
    assert late.stdout.startswith("accepted: ")
    assert sentence(late).startswith("DeadlineExceeded: passengers.report: no answer yet after 3 s")
    assert late.returncode == 4


def test_a_failed_call_is_json_where_a_program_reads(served: Served) -> None:
    get = ["call", "contracts:Passengers.get", "--to", served.http, "--json"]
    fault = quintet(served.folder, *get, '{"passenger_id": "nobody"}')
    assert json.loads(fault.stdout) == {"fault": "NoSuchPassenger", "fields": {"passenger_id": "nobody"}}
    assert (fault.returncode, fault.stderr) == (3, "")
    broken = quintet(served.folder, *get, '{"passenger_id": "broken"}')
    assert json.loads(broken.stdout)["error"] == "remote"
    assert json.loads(broken.stdout)["safety"] == "failed"
    assert broken.returncode == 4


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["contracts:Passengers.get"], "say where the service of Passengers.get is: --to ADDRESS"),
        (["contracts:Passengers"], "'contracts:Passengers' names no operation: write MODULE:CONTRACT.OPERATION"),
        (["contracts:Passengers.gett", "--to", "X"], "Passengers has no operation 'gett'; it has: get, seen, report"),
        (["contracts:Nobody.get", "--to", "X"], "has no 'Nobody'; the contracts there: Passengers, Trips"),
        (
            ["contracts:Passengers.get", "--to", "X", "{}"],
            "passenger_id: missing required field (it takes passenger_id)",
        ),
        (["contracts:Passengers.get", "--to", "X", "{"], "the values do not fit Passengers.get"),
        (["contracts:Passengers.get", "--to", "X", "@nowhere"], "cannot read nowhere: No such file or directory"),
        (["contracts:Passengers.get", "--to", "X", "--pending", "1"], "--pending and --no-wait are for async requests"),
        (["contracts:Passengers.get", "--to", "X", "--enough", "1"], "--enough is for surveys"),
        (["contracts:Passengers.get", "--to", "X", "--timeout", "0"], "seconds must be more than 0"),
        (["contracts:Passengers.get", "--to", "ftp://x"], "ftp://x: unknown scheme 'ftp'"),
        (["contracts:Trips.created", "--to", "X", PASSENGER], "X lacks FANOUT"),
    ],
)
def test_call_refuses_what_is_wrong_before_it_sends(folder: Path, arguments: list[str], complaint: str) -> None:
    to = "http://127.0.0.1:9"  # nobody is there, and nobody is asked
    values = [] if any(text[0] in "{@" for text in arguments) else ['{"passenger_id": "p"}']
    ended = quintet(folder, "call", *(to if text == "X" else text for text in arguments), *values)
    assert complaint.replace("X", to) in sentence(ended)
    assert ended.returncode == 2


def test_values_come_from_a_file_or_from_standard_input(served: Served) -> None:
    (served.folder / "values.json").write_text('{"passenger_id": "p-2"}')
    get = ["call", "contracts:Passengers.get", "--to", served.http]
    assert '"p-2"' in quintet(served.folder, *get, "@values.json").stdout
    assert '"p-3"' in quintet(served.folder, *get, "-", stdin='{"passenger_id": "p-3"}').stdout


def test_nobody_there_is_no_answer(folder: Path) -> None:
    get = ["call", "contracts:Passengers.get", "--to", "http://127.0.0.1:9"]
    ended = quintet(folder, *get, '{"passenger_id": "p"}')
    assert sentence(ended).startswith("Unavailable: http://127.0.0.1:9: cannot connect")
    assert ended.returncode == 4


# tail and dead


def test_tail_shows_what_is_sent_and_takes_nothing(served: Served) -> None:
    watch = ["tail", "passengers.v1.*", "--from", served.sqlite, "--count", "2"]
    with running(served.folder, *watch, "--json") as program, running(served.folder, *watch) as person:
        program.line("watching")
        person.line("watching")
        for name in ("tail-1", "tail-2"):
            values = f'{{"passenger_id": "{name}"}}'
            quintet(served.folder, "call", "contracts:Passengers.seen", "--to", served.sqlite, "--key", "k", values)
            served.service.line(f"seen {name}")
        assert (program.end(), person.end()) == (0, 0)
    first = json.loads(program.seen[-2])
    assert first["channel"] == "passengers.v1.seen"
    assert first["sender"] == "quintet-call"
    assert first["key"] == "k"
    assert first["body"] == {"passenger_id": "tail-1"}
    assert re.search(
        r'passengers\.v1\.seen  from quintet-call  id=\S+  key=k  {"passenger_id":"tail-2"}', person.seen[-1]
    )


def test_tail_ends_quietly_with_ctrl_c(served: Served) -> None:
    with running(served.folder, "tail", "no.such", "--from", served.sqlite) as tail:
        assert "no channel no.such there yet; there are: " in tail.line("no channel")
        tail.line("watching")
        tail.send(signal.SIGINT)
        assert tail.end() == 130
        assert not [line for line in tail.seen if "Traceback" in line]


@pytest.mark.parametrize("command", [["tail", "x", "--from"], ["dead", "list", "--at"], ["dead", "drop", "1", "--at"]])
def test_a_transport_that_keeps_nothing_cannot_be_looked_into(folder: Path, command: list[str]) -> None:
    ended = quintet(folder, *command, "http://127.0.0.1:9")
    assert "keeps none that could be looked at; these do: " in sentence(ended)
    assert "sqlite" in ended.stderr
    assert ended.returncode == 2


def test_dead_letters_are_listed_shown_replayed_and_dropped(served: Served) -> None:
    at = ["--at", served.sqlite]

    def dead(*arguments: str) -> list[dict[str, Any]]:
        ended = quintet(served.folder, "dead", *arguments, *at, "--json")
        assert ended.returncode == 0, ended.stderr
        return [json.loads(line) for line in ended.stdout.splitlines()]

    for name in ("bad-1", "bad-2"):
        values = f'{{"passenger_id": "{name}"}}'
        quintet(served.folder, "call", "contracts:Passengers.seen", "--to", served.sqlite, values)
        served.service.line("refused")
        served.service.line("failed")
    wait_for_dead(served, 2)
    first, second = dead("list", "--channel", "passengers.v1.seen")
    assert dead("list", "--channel", "passengers.v1.other") == []
    assert first["body"] == {"passenger_id": "bad-1"}
    assert first["reason"] == "ValueError: cannot be handled (attempt 1 of 1)"
    person = quintet(served.folder, "dead", "list", *at)
    assert person.stdout.count("ValueError: cannot be handled") == 2
    assert person.stderr == "2 dead letters\n"
    shown = quintet(served.folder, "dead", "show", first["dead_letter"], *at)
    assert 'body: {"passenger_id":"bad-1"}' in shown.stdout

    assert dead("replay", first["dead_letter"]) == [{"replayed": 1}]
    served.service.line("refused")
    wait_for_dead(served, 2)
    assert dead("drop", second["dead_letter"]) == [{"dropped": 1}]
    unknown = quintet(served.folder, "dead", "drop", second["dead_letter"], *at)
    assert f"there is no dead letter {second['dead_letter']}" in sentence(unknown)
    unsure = quintet(served.folder, "dead", "drop", "--all", *at)
    assert "say --yes" in sentence(unsure)
    none = quintet(served.folder, "dead", "replay", *at)
    assert "name dead letters by their ids, or all of them with --all" in sentence(none)
    assert dead("drop", "--all", "--yes") == [{"dropped": 1}]


def wait_for_dead(served: Served, count: int) -> None:
    """The service logs a failure a moment before the file holds the letter: asks until it does."""
    for _ in range(20):
        if quintet(served.folder, "dead", "list", "--at", served.sqlite).stdout.count("\n") == count:
            return
    raise AssertionError(f"there never were {count} dead letters")


# describe, mock, new


def test_describe_shows_operations_types_routes_and_what_carries_them(folder: Path) -> None:
    shown = quintet(folder, "describe", "contracts:Passengers")
    for line in (
        "passengers 1.0  Who may ride.",
        "  get(passenger_id: str) -> Passenger",
        "      request/response",
        "      fault NoSuchPassenger(passenger_id: str)",
        "      http: GET /v1/passengers/{passenger_id}",
        "      sqlite: passengers.v1.get",
        "  Passenger(id: str, name: str, active: bool = true)",
    ):
        assert line in shown.stdout.splitlines()
    lacking = quintet(folder, "describe", "contracts:Trips").stdout
    assert "http: cannot, lacks FANOUT (gives every group its copy of a message)" in lacking
    assert "sqlite: trips.v2.created" in lacking


def test_describe_gives_programs_the_neutral_model(folder: Path) -> None:
    shown = quintet(folder, "describe", "contracts:Passengers", "--json")
    model = msgspec.json.decode(shown.stdout, type=ContractModel)
    assert list(model.operations) == ["get", "seen", "report"]


def test_mock_serves_a_contract_that_nobody_has_implemented(folder: Path) -> None:
    (folder / "answers.json").write_text(
        '{"get": {"when": {"passenger_id": "p-1"}, "answer": {"id": "p-1", "name": "Eve"}}}'
    )
    at = ["--at", "http://127.0.0.1:0", "--at", "sqlite:///mock.db"]
    with running(folder, "mock", "contracts:Passengers", *at, "--answers", "answers.json", "--seed", "3") as mock:
        address = mock.line("serving passengers").split()[3].rstrip(",")
        get = ["call", "contracts:Passengers.get", "--to"]
        given = quintet(folder, *get, address, '{"passenger_id": "p-1"}')
        assert given.stdout == '{"id":"p-1","name":"Eve","active":true}\n'
        made = [quintet(folder, *get, to, '{"passenger_id": "p-2"}').stdout for to in (address, "sqlite:///mock.db")]
        assert made[0] == made[1], "the same call gets the same answer"
        assert set(json.loads(made[0])) == {"id", "name", "active"}
        mock.send(signal.SIGTERM)
        assert mock.end() == 0, mock.seen


def test_mock_leaves_out_what_its_addresses_cannot_carry(folder: Path) -> None:
    ended = quintet(folder, "mock", "contracts:Trips", "--at", "http://127.0.0.1:0")
    assert ended.returncode == 2
    assert "no address given can carry an operation of Trips" in ended.stderr
    with running(folder, "mock", "contracts:Trips", "--at", "sqlite:///mock.db") as mock:
        mock.line("serving trips at sqlite:///mock.db")
        ask = ["call", "contracts:Trips.offers", "--to", "sqlite:///mock.db", "--within", "30", "--enough", "1"]
        assert quintet(folder, *ask, PASSENGER).stdout.startswith("trips: ")


def test_a_new_project_passes_its_tests_and_runs(tmp_path: Path) -> None:
    made = quintet(tmp_path, "new", "shop")
    assert made.returncode == 0, made.stderr
    project = tmp_path / "shop"
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error"],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert tests.returncode == 0, tests.stdout
    with running(project, "up", PORT="0") as up:
        address = re.search(r"http://127\.0\.0\.1:\d+", up.line("serving shop at"))
        assert address is not None
        up.line("all 2 ready")
        call = quintet(project, "call", "shop.contracts:Shop.greet", "--to", address[0], '{"name": "Ada"}')
        assert call.stdout == '{"name":"Ada","text":"Hello, Ada!"}\n'
        up.line("Hello, Ada!")
        up.send(signal.SIGINT)
        assert up.end() == 0, up.seen
    again = quintet(tmp_path, "new", "shop")
    assert sentence(again) == "shop exists already: take another name, or --in another folder"
    assert again.returncode == 2


@pytest.mark.parametrize("name", ["Shop", "my-shop", "9shop", "class", "", "asyncio", "quintet", "tests"])
def test_a_name_that_is_no_package_is_refused(tmp_path: Path, name: str) -> None:
    assert "take" in sentence(quintet(tmp_path, "new", name))
    assert list(tmp_path.iterdir()) == []


# up


DEPLOYMENT = """
[service.passengers]
app = "service:service"
at = ["http://127.0.0.1:0", "sqlite:///rides.db"]
connect.trips = "sqlite:///rides.db"

[service.another]
app = "${APP:-service:another}"
connect.trips = "sqlite:///rides.db"
"""


def test_up_brings_back_what_is_killed_and_stops_all_in_reverse_order(folder: Path) -> None:
    (folder / "quintet.toml").write_text(DEPLOYMENT)
    (folder / "service.py").write_text(SERVICE + "\nimport os\nprint('pid', os.getpid(), flush=True)\n")
    with running(folder, "up", "quintet.toml") as up:
        up.line("starting 2 services: passengers, another")
        pid = int(up.line("passengers | pid").split()[-1])
        up.line("all 2 ready; Ctrl-C stops them")
        os.kill(pid, signal.SIGKILL)
        up.line("passengers was killed by SIGKILL; starting it again in 0.2 s")
        up.line("passengers is ready (2 of 2)")
        os.killpg(up.process.pid, signal.SIGINT)  # as a Ctrl-C in the terminal, which all of its processes get
        assert up.end() == 0, up.seen
    ends = [line for line in up.seen if re.search(r"stopping (another|passengers)|draining: \w+|at once", line)]
    assert [" ".join(line.split()[-2:]) for line in ends] == [
        "stopping another",
        "draining: another",
        "stopping passengers",
        "draining: passengers",
    ]


def test_up_ends_with_2_when_a_service_refuses_its_configuration(folder: Path) -> None:
    (folder / "quintet.toml").write_text(DEPLOYMENT)
    with running(folder, "up", "--json", APP="service:nothing") as up:
        assert up.end() == 2, up.seen
    assert up.seen[-1] == (
        "quintet: another cannot start: module service has no 'nothing'; the services there: service, another"
    )
    assert json.loads(up.seen[0])["process"] == "quintet"


def test_up_refuses_a_file_that_is_wrong(folder: Path) -> None:
    ended = quintet(folder, "up")
    assert sentence(ended) == "there is no quintet.toml: name the deployment's file, or write one"
    assert ended.returncode == 2


# help


def test_help_comes_without_loading_what_only_the_commands_need() -> None:
    program = (
        "import sys, quintet.cli as cli\n"
        "try: cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(', '.join({'uvicorn', 'rich', 'uvloop', 'quintet.mock'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert not ended.stderr.strip(), f"loads {ended.stderr}"
    for command in ("serve", "up", "call", "tail", "dead", "describe", "mock", "new"):
        assert re.search(rf"^  {command} +\S", ended.stdout, re.MULTILINE), command
    assert "Exit codes:" in ended.stdout


@pytest.mark.parametrize("command", ["serve", "up", "call", "tail", "dead", "describe", "mock", "new"])
def test_each_command_shows_examples_that_start_with_its_name(tmp_path: Path, command: str) -> None:
    shown = quintet(tmp_path, command, "--help").stdout
    assert re.search(rf"Examples:\n +(\S+=\S+ )?quintet {command}", shown), shown
    assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["sevre"], "No such command 'sevre'"),
        (["dead"], "Missing command; see `quintet dead --help`"),
        (["serve"], "MODULE:SERVICE"),
        (["serve", "a:b", "--att", "x"], "--att"),
        (["call", "a:B.c", "--timeout", "soon"], "Invalid value for '--timeout'"),
    ],
)
def test_wrong_usage_is_one_sentence_too(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    ended = quintet(tmp_path, *arguments)
    assert complaint in sentence(ended)
    assert ended.returncode == 2
