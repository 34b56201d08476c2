"""Services as processes: started together, waited for, restarted when they crash, stopped in reverse order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from enum import Enum
from pathlib import Path
from typing import TypeAlias

from quintet.deployment import Deployed, Deployment, read_deployment
from quintet.errors import ConfigurationError, TransportError

FIRST_DELAY, LONGEST_DELAY = 0.2, 10.0  # seconds until a crashed process is started again; doubled each time
STEADY_AFTER = 30.0  # seconds of being ready after which a crash counts as the first one again
GRACE = 35.0  # seconds that a process has to drain before it is killed: a little more than a service's own grace
PLACES = "QUINTET_PLACES"
"""The environment variable by which a process learns its addresses: their passwords are not for all who may list the
machine's processes and their arguments."""
CONFIGURATION_EXIT = 2  # what `quintet serve` ends with when starting it again would change nothing


class State(Enum):
    """Where a process stands."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    CRASHED = "crashed, will be started again"
    STOPPING = "stopping"
    REFUSED = "refused to start: its configuration is wrong"


Output: TypeAlias = Callable[[str, str], None]
"""Is called with a process's name and each line that it writes."""
Watch: TypeAlias = Callable[["Process"], None]
"""Is called when a process's state has changed."""
Prepare: TypeAlias = Callable[[str, Deployed], Deployed]
"""Is called with each process's name and service; may change what it is started with."""


class Process:
    """One instance of a service, kept running until it is told to stop."""

    def __init__(
        self, name: str, service: Deployed, folder: Path, output: Output, watch: Watch, policies: Sequence[str] = ()
    ) -> None:
        self.name = name
        self._policies = policies
        self.state = State.STOPPED
        self.addresses: list[str] = []
        self.pid: int | None = None
        self.exit_code: int | None = None
        self.crashes = 0
        self.delay = 0.0  # seconds until it is started again, where it has crashed
        self.last_words = ""
        self._service, self._folder, self._output, self._watch = service, folder, output, watch
        self._keeper: asyncio.Task[None] | None = None
        self._ready_since: float | None = None
        self._changed = asyncio.Condition()

    def __repr__(self) -> str:
        return f"<process {self.name}, {self.state.value}{f', pid {self.pid}' if self.pid else ''}>"

    def start(self) -> None:
        """Begins to keep it running; does nothing where it is kept running already."""
        if self._keeper is None or self._keeper.done():
            self.crashes, self.state = 0, State.STARTING
            self._keeper = asyncio.create_task(self._keep())

    async def ready(self, timeout: float = 60.0) -> list[str]:
        """Waits until it serves; gives the addresses that it is served at.

        Raises ConfigurationError where it cannot start, TransportError where it was stopped or the time is up.
        """
        try:
            async with asyncio.timeout(timeout), self._changed:
                await self._changed.wait_for(lambda: self.state in (State.READY, State.REFUSED, State.STOPPED))
        except TimeoutError:
            raise TransportError(f"{self.name} was not ready within {timeout:g} s: {self._why()}") from None
        if self.state is State.REFUSED:
            raise ConfigurationError(f"{self.name} cannot start: {self._why()}")
        if self.state is State.STOPPED:
            raise TransportError(f"{self.name} is not running: {self._why()}")
        return self.addresses

    async def stop(self, grace: float = GRACE) -> None:
        """Lets it drain and end; kills it after `grace` seconds. It is not started again."""
        keeper = self._keeper
        if keeper is None or keeper.done():
            return
        if self.pid is None:
            keeper.cancel()  # it waits to be started again
        else:
            await self._become(State.STOPPING)
            self._signal(signal.SIGTERM)
        done, _ = await asyncio.wait([keeper], timeout=grace)
        if not done:
            self._output(self.name, f"killed: it had not drained after {grace:g} s")
            self._signal(signal.SIGKILL)
            await asyncio.wait([keeper])
        await self._become(State.STOPPED)

    def kill(self) -> None:
        """Ends it at once, as a crash would (SIGKILL): it is started again."""
        self._signal(signal.SIGKILL)

    async def restart(self, timeout: float = 60.0) -> list[str]:
        """Stops it, starts it, and waits until it serves."""
        await self.stop()
        self.start()
        return await self.ready(timeout)

    def _why(self) -> str:
        return self.last_words or self.state.value

    def _signal(self, number: int) -> None:
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def _become(self, state: State) -> None:
        async with self._changed:
            self.state = state
            self._changed.notify_all()
        self._watch(self)

    async def _keep(self) -> None:
        """Starts it, and again when it crashes, with a delay that grows until it has been steady."""
        loop = asyncio.get_running_loop()
        in_row = 0
        while True:
            await self._once()
            if self.state is State.STOPPING or self.exit_code == 0:
                return await self._become(State.STOPPED)
            if self.exit_code == CONFIGURATION_EXIT:
                return await self._become(State.REFUSED)
            if self._ready_since is not None and loop.time() - self._ready_since > STEADY_AFTER:
                in_row = 0
            self.crashes += 1
            self.delay = min(LONGEST_DELAY, FIRST_DELAY * 2**in_row)
            in_row += 1
            await self._become(State.CRASHED)
            await asyncio.sleep(self.delay)

    async def _once(self) -> None:
        """One life of the process, from start to end."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._ready_since = None
        await self._become(State.STARTING)
        with ours:
            with theirs:
                try:
                    child = await self._spawn(theirs.fileno())
                except OSError as error:  # no such folder, no more processes
                    self.exit_code = 1
                    return self._say(f"cannot be started: {error}".encode())
            self.pid = child.pid
            assert child.stdout is not None, "stdout is a pipe"  # noqa: S101
            reading = asyncio.create_task(self._read(child.stdout))
            announced = asyncio.create_task(self._announced(ours))
            try:
                self.exit_code = await child.wait()
            except asyncio.CancelledError:
                self._signal(signal.SIGKILL)
                await child.wait()
                raise
            finally:
                self.pid, self.addresses = None, []
                announced.cancel()
                await asyncio.wait([reading, announced], timeout=1.0)  # a grandchild may hold the pipe open
                reading.cancel()

    async def _spawn(self, descriptor: int) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self._command(descriptor),
            cwd=self._folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self._service.env, PLACES: self._places()},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=[descriptor],
            start_new_session=True,  # a Ctrl-C in the terminal reaches us alone: we stop them in order
        )

    def _command(self, descriptor: int) -> Iterator[str]:
        service = self._service
        yield from (sys.executable, "-m", "quintet", "serve", service.app, "--supervisor", str(descriptor))
        yield f"--format={service.format}"
        if service.record:
            yield f"--record={service.record}"
        if service.observe:
            yield f"--observe={service.observe}"
        yield from self._policies

    def _places(self) -> str:
        service = self._service
        connect = [f"{name}={address}" for name, addresses in service.connect.items() for address in addresses]
        return json.dumps({"at": service.at, "connect": connect})

    async def _announced(self, ours: socket.socket) -> None:
        """Waits for the one thing that `quintet serve` tells its supervisor: that it is ready, and where."""
        loop = asyncio.get_running_loop()
        said = await loop.sock_recv(ours, 65536)
        if said and self.state is State.STARTING:
            self.addresses, self._ready_since = json.loads(said)["at"], loop.time()
            await self._become(State.READY)

    async def _read(self, stream: asyncio.StreamReader) -> None:
        rest = b""
        while chunk := await stream.read(65536):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._say(line)
        if rest:
            self._say(rest)

    def _say(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        self.last_words = text.removeprefix("quintet: ") or self.last_words
        self._output(self.name, text)


def _silent(*_: object) -> None:
    pass


class Processes:
    """The processes of a deployment, by name: "trips", or "trips.1", "trips.2" where it has several instances."""

    def __init__(
        self,
        deployment: Deployment,
        output: Output = _silent,
        watch: Watch = _silent,
        prepare: Prepare = lambda _, service: service,
    ) -> None:
        self._all: dict[str, Process] = {}
        for name, service in deployment.services.items():
            numbers = range(1, service.instances + 1)
            policies = [f"--policies={deployment.file}", f"--policies-of={name}"] if deployment.file else []
            for instance in [name] if service.instances == 1 else [f"{name}.{number}" for number in numbers]:
                prepared = prepare(instance, service)
                self._all[instance] = Process(instance, prepared, deployment.folder, output, watch, policies)

    def __repr__(self) -> str:
        return f"<processes {', '.join(f'{process.name}: {process.state.value}' for process in self)}>"

    def __iter__(self) -> Iterator[Process]:
        return iter(self._all.values())

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, name: str) -> Process:
        try:
            return self._all[name]
        except KeyError:
            raise ConfigurationError(f"there is no process {name!r}; there are: {', '.join(self._all)}") from None

    def start(self) -> None:
        """Starts all, in their order."""
        for process in self:
            process.start()

    async def ready(self, timeout: float = 60.0) -> None:
        """Waits until all serve. Raises the first failure, as Process.ready does."""
        waiting = [asyncio.create_task(process.ready(timeout)) for process in self]
        try:
            for first in asyncio.as_completed(waiting):
                await first
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def ended(self) -> None:
        """Waits until none is kept running any more."""
        while keepers := [process._keeper for process in self if process._keeper and not process._keeper.done()]:
            await asyncio.wait(keepers)

    async def stop(self, grace: float = GRACE) -> None:
        """Lets all drain and end, one after the other, the last that was started first."""
        for process in reversed(list(self)):
            await process.stop(grace)

    def kill(self) -> None:
        """Ends all at once, and lets none be started again."""
        for process in self:
            if process._keeper is not None:
                process._keeper.cancel()


@asynccontextmanager
async def running(
    deployment: Deployment | str | Path,
    *,
    timeout: float = 60.0,
    output: Output = _silent,
    watch: Watch = _silent,
) -> AsyncGenerator[Processes, None]:
    """Runs a deployment (or its file) as processes, all ready within `timeout` seconds, and stops them at the end.

    `output` gets each line that they write, `watch` each change of state. Raises ConfigurationError where a service
    refuses its configuration, TransportError where one is not ready in time.
    """
    found = deployment if isinstance(deployment, Deployment) else read_deployment(deployment)
    processes = Processes(found, output, watch)
    try:
        processes.start()
        await processes.ready(timeout)
        yield processes
    finally:
        await processes.stop()
