"""Policies from a deployment's file: over what the code says, changed while the service runs, refused where wrong."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from orders_contract import Orders

from quintet import Breaker, Bulkhead, ConfigurationError, Contract, Policy, Service, on, request, serve
from quintet.cli.policy import set_, show
from quintet.deployment import parse_deployment
from quintet.filters.breaker import Circuit
from quintet.policy import DEFAULT, resolve
from quintet.policy_file import LOOK_SECONDS, PolicyFile
from quintet.supervisor import running
from quintet.testing import FakeClock

HEAD = '# the shop\n[service.shop]\napp = "shop:service"\n'


class Desk(Contract, name="desk"):
    @request
    async def rate(self, stars: int) -> None: ...


def written(folder: Path, text: str) -> Path:
    path = folder / "quintet.toml"
    path.write_text(HEAD + text)
    return path


def shop() -> tuple[Service, Orders]:
    service = Service(name="shop")
    return service, service.uses(Orders, policy=[Policy(timeout=2.0), on(Orders.total, timeout=3.0)])


def in_force(client: Orders, operation: str = "place") -> Policy:
    found: Policy = getattr(client, operation)._line.sender._guarded.policy
    return found


async def test_what_the_file_says_goes_before_what_the_code_says(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "[service.shop.policy.orders]\ntimeout = 0.3\nbulkhead = { limit = 20 }\nbreaker = false\n"
        "[service.shop.policy.orders.total]\nbulkhead = { limit = 2 }\n",
    )
    service, client = shop()
    PolicyFile(service, path)
    async with serve(service, at="memory://", connect={Orders: "memory://"}):
        assert in_force(client) == Policy(timeout=0.3, bulkhead=Bulkhead(20), breaker=False)
        assert in_force(client, "total") == Policy(
            timeout=3.0, bulkhead=Bulkhead(2, per="operation"), breaker=False
        )  # an operation's own limit, and what the code says of it


async def test_a_change_of_the_file_is_taken_in_and_forgets_nothing(tmp_path: Path) -> None:
    path, clock = written(tmp_path, "[service.shop.policy.orders]\ntimeout = 0.3\n"), FakeClock()
    service, client = shop()
    file = PolicyFile(service, path)
    async with serve(service, at="memory://", connect={Orders: "memory://"}, clock=clock):
        circuit = client.place._line.sender._guarded.own._kept[Circuit]  # type: ignore[attr-defined]
        for _ in range(19):
            circuit.settle(circuit.admit(), 2)
        watching = asyncio.create_task(file.watch(clock))
        written(tmp_path, "[service.shop.policy.orders]\nbreaker = { min_calls = 30 }\n")
        async with asyncio.timeout(45):
            while in_force(client).breaker != Breaker(min_calls=30):
                await clock.advance(LOOK_SECONDS)
                await asyncio.sleep(0.001)
        assert in_force(client).timeout == 2.0  # what the file says no more
        assert client.place._line.sender._guarded.own._kept[Circuit] is circuit  # type: ignore[attr-defined]
        assert circuit.counts == [0, 0, 19]
        assert circuit.settings.min_calls == 30
        watching.cancel()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[service.shop.policy.orders]\ntimeout = -1\n", "policy.orders: Policy(timeout=-1.0: seconds must be more"),
        ("[service.shop.policy.orders]\nbreaker = { error_rate = 1.5 }\n", "error_rate=1.5: a share must be"),
        ("[service.shop.policy.orders]\nbreaker = { colour = 1 }\n", "unknown field `colour`"),
        ("[service.shop.policy.orders]\ncolour = 1\n", "unknown key 'colour'; known are cache, timeout"),
        ("[service.shop.policy.orders]\nretry = true\n", "Policy(retry=True): give a Retry(...)"),
        ("[service.shop.policy.orders.plaice]\ntimeout = 1\n", "Orders has no operation 'plaice'; it has place, total"),
        ("[service.shop.policy.orders.place]\ncache = true\n", "is not declared idempotent"),
        ("[service.shop.policy]\norders = 5\n", "policy.orders = 5 must be a table"),
        ("[service.shop.policy.ordesr]\ntimeout = 1\n", "it uses no such contract; it uses orders"),
        ("[service.shop\n", "is no TOML"),
    ],
)
async def test_what_is_wrong_is_refused_at_start_and_leaves_the_old_in_force_later(
    tmp_path: Path, text: str, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, text)
    service, client = shop()
    with pytest.raises(ConfigurationError) as caught:
        PolicyFile(service, path)
    assert sentence in str(caught.value)
    assert "quintet.toml" in str(caught.value)
    file = PolicyFile(service, written(tmp_path, "[service.shop.policy.orders]\ntimeout = 0.3\n"))
    async with serve(service, at="memory://", connect={Orders: "memory://"}):
        written(tmp_path, text)
        assert file.reload() is False
        assert in_force(client).timeout == 0.3
        (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert sentence in record.getMessage()
        assert record.getMessage().endswith("; the policies that were in force stay")


def test_the_file_may_name_the_service_otherwise(tmp_path: Path) -> None:
    path = written(tmp_path, "[service.shop.policy.orders]\ntimeout = 0.3\n")
    service = Service(name="kiosk")
    service.uses(Orders)
    PolicyFile(service, path, "shop")
    assert resolve(Orders, service.clients[0][1])["place"].policy == Policy(timeout=0.3).over(DEFAULT)
    with pytest.raises(ConfigurationError, match=r"there is no \[service\.kiosk\]; there is shop"):
        PolicyFile(service, path)


def test_an_operation_with_the_name_of_a_setting_is_written_in_quotes(tmp_path: Path) -> None:
    text = HEAD + '[service.shop.policy.desk]\nrate = { calls = 5 }\n[service.shop.policy."desk.rate"]\ntimeout = 0.1\n'
    guarding = parse_deployment(text, tmp_path / "quintet.toml").services["shop"].policy["desk"]
    assert guarding.policy.rate
    assert resolve(Desk, guarding.policies(Desk))["rate"].policy.timeout == 0.1


def test_set_changes_the_file_and_leaves_all_else_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, "\n[service.shop.policy.orders]  # all of them\ntimeout = 0.3  # seconds\n")
    set_("shop.orders", ["timeout=0.5", "bulkhead={limit=20}"], str(path))
    set_("shop.orders.total", ["retry=false"], str(path))
    set_("shop.desk.rate", ["timeout=1.5"], str(path))
    assert path.read_text() == HEAD + (
        "\n[service.shop.policy.orders]  # all of them\nbulkhead = { limit = 20 }\ntimeout = 0.5\n"
        "\n[service.shop.policy.orders.total]\nretry = false\n"
        '\n[service.shop.policy."desk.rate"]\ntimeout = 1.5\n'
    )
    capsys.readouterr()
    show(str(path))
    assert capsys.readouterr().out.splitlines() == [
        'shop.orders  timeout=0.5  bulkhead={ limit = 20, queue = 0, per = "service" }',
        "shop.orders.total  retry=false",
        "shop.desk.rate  timeout=1.5",
    ]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("target", "setting", "sentence"),
    [
        ("shop.orders", "timeout=-1", "seconds must be more than 0"),
        ("shop.orders", "colour=1", "'colour' is no part of a policy"),
        ("shop.orders", "timeout", "write NAME=VALUE as in TOML"),
        ("shop", "timeout=1", "write SERVICE.CONTRACT"),
        ("ship.orders", "timeout=1", r"there is no \[service\.ship\]"),
        ("shop.orders", "breaker={error_rate=2}", "a share must be"),
        ("shop.orders", "bulkhead=false", "edit it by hand"),
        ("shop.desk", "timeout=1", "edit it by hand"),
    ],
)
def test_set_refuses_what_is_wrong_and_leaves_the_file(
    tmp_path: Path, target: str, setting: str, sentence: str
) -> None:
    text = (
        'policy.desk = { timeout = 2 }\n[service.shop.policy.orders]\nbreaker = { min_calls = 5 }\n"bulkhead" = false\n'
    )
    path = written(tmp_path, text.replace("false", "{ limit = 5 }"))
    before = path.read_text()
    with pytest.raises(ConfigurationError, match=sentence):
        set_(target, [setting], str(path))
    assert path.read_text() == before


SHOP = """
from orders_contract import Orders
from quintet import Service
service = Service(name="kiosk")
orders = service.uses(Orders)
"""


async def test_the_services_of_a_deployment_take_in_what_set_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parent}")
    (tmp_path / "shop.py").write_text(SHOP)
    path = written(tmp_path, 'connect.orders = "memory://"\n')
    lines = asyncio.Queue[str]()
    async with running(path, output=lambda _, line: lines.put_nowait(line)), asyncio.timeout(45):
        set_("shop.orders", ["timeout=0.5"], str(path))
        while "are in force" not in await lines.get():
            pass


def test_a_service_that_runs_takes_in_what_set_has_written(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    path = written(tmp_path, "")
    unit = str(Path(__file__).parent)
    environment = {"PYTHONPATH": f"{tmp_path}:{unit}", "PATH": ""}
    command = [sys.executable, "-m", "quintet", "serve", "shop:service", "--at", "memory://"]
    command += ["--connect", "orders=memory://", "--policies", str(path), "--policies-of", "shop"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline().startswith("serving kiosk")
        try:
            written(tmp_path, "[service.shop.policy.orders]\ntimeout = -1\n")
            assert "the policies that were in force stay" in process.stderr.readline()
            written(tmp_path, "")
            assert "are in force" in process.stderr.readline()
            set_("shop.orders", ["timeout=0.5"], str(path))
            assert "are in force" in process.stderr.readline()
        finally:
            process.terminate()
            process.stderr.read()
    assert process.returncode == 0
