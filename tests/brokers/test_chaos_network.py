"""A network that breaks between services and their broker is noticed, nobody hangs, nothing confirmed is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from proxy import Mode, Proxy
from running import Broker
from subjects import SUBJECTS, address_of, broker_of

from quintet import CallError, Contract, Safety, Service, connect, current, notification, request, serve
from quintet.message import new_id
from quintet.watch import Occurrence

WITHIN = 40.0  # seconds: what takes so long never comes; how long it takes is printed
BEFORE, AFTER = 200, 200  # messages that are sent while the network is well


class Heard:
    """A listener that remembers, and can be waited for."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {"broker-lost": [], "broker-back": []}
        self._told = asyncio.Event()

    def __call__(self, occurrence: Occurrence) -> None:
        if occurrence.kind in self.times:
            self.times[occurrence.kind].append(time.monotonic())
            self._told.set()

    async def wait(self, kind: str, since: float, within: float) -> float:
        """When it happened first after `since`."""
        async with asyncio.timeout(within):
            while not (found := [at for at in self.times[kind] if at >= since]):
                self._told.clear()
                await self._told.wait()
        return found[0]


class Peers:
    """A service and its client, both behind the proxy."""

    def __init__(self, proxy: Proxy, address: str) -> None:
        self.proxy = proxy
        self.address = address
        self.handled: set[str] = set()
        self.confirmed: set[str] = set()
        self.slowest = 0.0
        self.outcomes: dict[str, int] = {}
        self.receiver, self.sender = Heard(), Heard()
        self.client: Any = None
        self._more = asyncio.Event()
        self._numbers = iter(range(1_000_000))

    @asynccontextmanager
    async def connected(self) -> AsyncGenerator[None]:
        class Ledger(Contract, name=f"ledger{new_id()}"):
            @notification
            async def entered(self, number: int) -> None: ...

            @request
            async def echo(self, number: int) -> int: ...

        ledger = Service(Ledger, grace=2.0)

        @ledger.handles(Ledger.entered)
        async def entered(number: int) -> None:
            self.handled.add(current().id)
            self._more.set()

        @ledger.handles(Ledger.echo)
        async def echo(number: int) -> int:
            return number

        async with (
            serve(ledger, at=self.address, listener=self.receiver),
            connect(Ledger, self.address, listener=self.sender) as self.client,
        ):
            yield

    async def send(self) -> None:
        """Sends one message until it is confirmed, under the same id."""
        number = next(self._numbers)
        identity = f"m-{number}"
        while True:
            begun = time.monotonic()
            try:
                await self.client.entered.using(id=identity)(number)
            except CallError as error:
                if error.safety is Safety.FAILED:
                    raise
                outcome = error.safety.value
            else:
                outcome = "confirmed"
                self.confirmed.add(identity)
            self.slowest = max(self.slowest, time.monotonic() - begun)
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
            if outcome == "confirmed":
                return
            await asyncio.sleep(0.02)

    async def keep_sending(self) -> None:
        while True:
            await self.send()

    async def all_handled(self) -> None:
        async with asyncio.timeout(WITHIN):
            while self.confirmed - self.handled:
                self._more.clear()
                await self._more.wait()

    async def answered(self) -> None:
        """A request is answered, by then or in one of its repeats."""
        async with asyncio.timeout(WITHIN):
            while True:
                try:
                    assert await self.client.echo(7) == 7
                except CallError:
                    await asyncio.sleep(0.02)
                else:
                    return


@pytest.fixture
def behind(private_broker: Callable[[str], Broker]) -> Callable[[str], Any]:
    """`async with behind("rabbitmq") as peers`: the proxy stands, what connects comes through it."""

    @asynccontextmanager
    async def stand(name: str) -> AsyncGenerator[Peers]:
        entry = private_broker(broker_of(name)).entry
        address = address_of(name, entry)
        where = address.rpartition("@")[2].rpartition("/")[2]
        to, at = (entry["proxied"]["to"], entry["proxied"]["listen"]) if name == "kafka" else (where, "127.0.0.1:0")
        async with Proxy(to, at=at) as proxy:
            yield Peers(proxy, f"{address.replace(where, proxy.address)}?heartbeat=1")

    return stand


@pytest.mark.parametrize("mode", ["silent", "reset", "trickle", "half-close"])
@pytest.mark.parametrize("name", SUBJECTS)
async def test_a_network_that_breaks_is_noticed_and_what_was_confirmed_is_handled(
    name: str, mode: Mode, behind: Callable[[str], Any]
) -> None:
    async with behind(name) as peers, peers.connected():
        await asyncio.gather(*(peers.send() for _ in range(BEFORE)))
        senders = [asyncio.create_task(peers.keep_sending()) for _ in range(8)]
        broken = time.monotonic()
        peers.proxy.switch(mode)
        lost = [await heard.wait("broker-lost", broken, WITHIN) - broken for heard in (peers.sender, peers.receiver)]
        well = time.monotonic()
        peers.proxy.switch("pass")
        back = [await heard.wait("broker-back", broken, WITHIN) - well for heard in (peers.sender, peers.receiver)]
        for task in senders:
            task.cancel()
        await asyncio.gather(*senders, return_exceptions=True)
        await asyncio.gather(*(peers.send() for _ in range(AFTER)))
        await peers.answered()
        flows = time.monotonic() - well
        await peers.all_handled()
    print(
        f"\n{name}, {mode}: the sender noticed after {lost[0]:.2f} s, the receiver after {lost[1]:.2f} s; back"
        f" {back[0]:.2f} and {back[1]:.2f} s after it was well, {AFTER} more confirmed and a request answered by"
        f" {flows:.2f} s; sends: {peers.outcomes}, the slowest {peers.slowest:.2f} s"
    )
    assert peers.slowest < WITHIN


@pytest.mark.parametrize("mode", ["silent", "trickle"])
@pytest.mark.parametrize("name", SUBJECTS)
async def test_a_service_stops_in_time_although_its_broker_says_nothing(
    name: str, mode: Mode, behind: Callable[[str], Any]
) -> None:
    async with behind(name) as peers:
        async with peers.connected():
            await asyncio.gather(*(peers.send() for _ in range(BEFORE)))
            await peers.all_handled()
            peers.proxy.switch(mode)
            stopping = time.monotonic()
        stopped = time.monotonic() - stopping
    print(f"\n{name}, {mode}: stopped after {stopped:.2f} s")
    assert stopped < WITHIN
