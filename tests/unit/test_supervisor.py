"""A deployment's processes are waited for, restarted when they crash, and stopped in order."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from quintet.deployment import Deployed, Deployment
from quintet.errors import ConfigurationError, TransportError
from quintet.supervisor import Process, State, running

MODULE = """
import asyncio, contextlib, os, pathlib
from contextlib import asynccontextmanager
from quintet import Service

print(f"pid {os.getpid()}", flush=True)
name = os.environ.get("NAME", "one")

@asynccontextmanager
async def lifespan(service):
    yield
    print(f"{name} has drained", flush=True)

service = Service(name=name, lifespan=lifespan)

@asynccontextmanager
async def crash_once(service):
    marker = pathlib.Path("crashed")
    if not marker.exists():
        marker.touch()
        raise RuntimeError("the first start fails")
    yield

shaky = Service(name="shaky", lifespan=crash_once)

@asynccontextmanager
async def hang(service):
    try:
        yield
    finally:
        print("hangs", flush=True)
        await asyncio.Event().wait()

stuck = Service(name="stuck", lifespan=hang)

@asynccontextmanager
async def drain_at_the_gate(service):
    yield
    with contextlib.suppress(BrokenPipeError):  # who read it may be gone
        print("drains", flush=True)
    await asyncio.to_thread(lambda: open("gate").readline())
    pathlib.Path("drained").touch()

gated = Service(name="gated", lifespan=drain_at_the_gate)
"""


SHOP = """
import sys
from quintet import Contract, Service, request

print("started as", sys.orig_argv, flush=True)

class Wallet(Contract):
    @request
    async def pay(self, amount: int) -> None: ...

service = Service(name="shop")
wallet = service.uses(Wallet)
"""


class Watched:
    """What processes wrote and became, and a way to wait for it."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.states: list[tuple[str, State]] = []
        self._news = asyncio.Event()

    def output(self, name: str, line: str) -> None:
        self.lines.append((name, line))
        self._news.set()

    def watch(self, process: Process) -> None:
        self.states.append((process.name, process.state))
        self._news.set()

    async def has_line(self, text: str) -> None:
        while not any(text in line for _, line in self.lines):
            self._news.clear()
            await self._news.wait()

    async def has_been(self, name: str, state: State, times: int = 1) -> None:
        while self.states.count((name, state)) < times:
            self._news.clear()
            await self._news.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "services.py").write_text(MODULE)
    return tmp_path


def deployment(folder: Path, **apps: str) -> Deployment:
    return Deployment({name: Deployed(app=f"services:{app}", env={"NAME": name}) for name, app in apps.items()}, folder)


async def test_all_are_ready_inside_and_stopped_in_reverse_order_at_the_end(folder: Path) -> None:
    watched = Watched()
    wanted = deployment(folder, first="service", second="service", third="service")
    async with running(wanted, output=watched.output, watch=watched.watch) as processes:
        assert {process.state for process in processes} == {State.READY}
        assert len({process.pid for process in processes}) == 3
    drained = [line for _, line in watched.lines if "has drained" in line]
    assert drained == ["third has drained", "second has drained", "first has drained"]
    assert {(process.state, process.exit_code) for process in processes} == {(State.STOPPED, 0)}


async def test_a_process_that_is_killed_comes_back_and_the_others_stay(folder: Path) -> None:
    watched = Watched()
    wanted = deployment(folder, first="service", second="service")
    async with running(wanted, watch=watched.watch) as processes:
        before = processes["second"].pid
        processes["first"].kill()
        await watched.has_been("first", State.CRASHED)
        assert processes["first"].exit_code == -signal.SIGKILL
        await processes["first"].ready()
        assert processes["first"].crashes == 1
        assert processes["second"].pid == before


async def test_a_process_that_crashes_at_its_start_is_started_again(folder: Path) -> None:
    watched = Watched()
    async with running(deployment(folder, shaky="shaky"), output=watched.output, watch=watched.watch) as processes:
        assert processes["shaky"].crashes == 1
    assert ("shaky", "RuntimeError: the first start fails") in watched.lines


async def test_one_can_be_stopped_started_and_restarted_by_its_name(folder: Path) -> None:
    async with running(deployment(folder, first="service")) as processes:
        process = processes["first"]
        pid = process.pid
        await process.stop()
        assert (process.state, process.exit_code, process.pid) == (State.STOPPED, 0, None)
        with pytest.raises(TransportError, match="first is not running"):
            await process.ready()
        process.start()
        await process.ready()
        assert process.pid != pid
        pid = process.pid
        await process.restart()
        assert process.pid != pid
        with pytest.raises(ConfigurationError, match="there is no process 'frst'; there are: first"):
            processes["frst"]


async def test_a_service_that_refuses_its_configuration_ends_the_start_with_its_words(folder: Path) -> None:
    watched = Watched()
    wanted = deployment(folder, good="service", bad="nothing")
    with pytest.raises(ConfigurationError, match="bad cannot start: module services has no 'nothing'"):
        async with running(wanted, watch=watched.watch):
            pytest.fail("it must not begin")
    assert watched.states.count(("bad", State.STARTING)) == 1, "to start it again would change nothing"
    assert watched.states[-1] == ("good", State.STOPPED)


async def test_one_that_is_not_ready_in_time_is_named_with_its_last_words(folder: Path) -> None:
    blocker = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = blocker.sockets[0].getsockname()[1]
    (folder / "api.py").write_text(API)
    wanted = Deployment({"api": Deployed(app="api:service", at=(f"http://127.0.0.1:{port}",))}, folder)
    async with blocker:
        with pytest.raises(TransportError, match=rf"api was not ready within 2 s: .*:{port}: cannot listen there"):
            async with running(wanted, timeout=2.0):
                pytest.fail("it must not begin")


API = """
from quintet import Contract, Service, request

class Api(Contract, name="api"):
    @request
    async def get(self) -> int: ...

service = Service(Api)

@service.handles(Api.get)
async def get() -> int:
    return 1
"""


async def test_one_that_does_not_drain_in_time_is_killed(folder: Path) -> None:
    watched = Watched()
    async with running(deployment(folder, stuck="stuck"), output=watched.output) as processes:
        stopping = asyncio.create_task(processes["stuck"].stop(grace=0.5))
        await watched.has_line("hangs")
        await stopping
        assert processes["stuck"].exit_code == -signal.SIGKILL


async def test_instances_are_processes_of_their_own_with_free_ports(folder: Path) -> None:
    (folder / "api.py").write_text(API)
    wanted = Deployment({"api": Deployed(app="api:service", at=("http://127.0.0.1:0",), instances=2)}, folder)
    async with running(wanted) as processes:
        assert [process.name for process in processes] == ["api.1", "api.2"]
        ports = {address for process in processes for address in process.addresses}
        assert len(ports) == 2
        assert not any(address.endswith(":0") for address in ports)


async def test_no_password_of_an_address_is_among_the_arguments_that_all_may_list(folder: Path) -> None:
    (folder / "shop.py").write_text(SHOP)
    address = "http://user:secret@127.0.0.1:1"
    wanted = Deployment({"shop": Deployed(app="shop:service", connect={"wallet": (address,)})}, folder)
    watched = Watched()
    async with running(wanted, output=watched.output):
        await watched.has_line("started as")
    (said,) = (line for _, line in watched.lines if "started as" in line)
    assert "shop:service" in said
    assert "secret" not in said


LINUX = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for a process that is not its child")


@LINUX
@pytest.mark.parametrize("draining", [False, True], ids=["serving", "draining"])
def test_processes_whose_supervisor_was_killed_drain_and_end(folder: Path, draining: bool) -> None:
    (folder / "quintet.toml").write_text('[service.one]\napp = "services:gated"\n')
    os.mkfifo(folder / "gate")
    up = subprocess.Popen([sys.executable, "-m", "quintet", "up"], cwd=folder, stdout=subprocess.PIPE, text=True)
    assert up.stdout is not None
    with up.stdout as lines:
        pid = next(int(line.split()[-1]) for line in lines if "pid " in line)
        child, gate = os.pidfd_open(pid), os.open(folder / "gate", os.O_RDWR)
        try:
            next(line for line in lines if "all 1 ready" in line)
            if draining:
                up.terminate()
                next(line for line in lines if "drains" in line)
            up.kill()
            up.wait()
            os.write(gate, b"go on\n")
            assert select.select([child], [], [], 20.0)[0], "the service must notice and end"
            assert (folder / "drained").exists(), "and cut nothing off"
        finally:
            os.close(child)
            os.close(gate)


async def test_a_process_that_cannot_be_started_says_why(folder: Path) -> None:
    with pytest.raises(TransportError, match=r"one was not ready within 1 s: cannot be started: .*nowhere"):
        async with running(deployment(folder / "nowhere", one="service"), timeout=1.0):
            pytest.fail("it must not begin")
