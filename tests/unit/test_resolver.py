"""Instances that come and go: found by a file, by DNS, by SRV records."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import dns.message
import dns.rrset
import pytest
from orders_contract import Orders, Receipt

from quintet import AddressError, CannotCarry, Service, Unavailable, connect, serve
from quintet.client import LINGER
from quintet.deployment import read_deployment
from quintet.errors import ConfigurationError
from quintet.filters.balancer import Balancer
from quintet.message import Message
from quintet.resolver import Resolver, resolver_of
from quintet.testing import FakeClock
from quintet.transport import parse_address


def found_by(text: str) -> Resolver:
    resolver = resolver_of(text)
    assert resolver is not None
    return resolver


def orders(name: str) -> Service:
    """An instance whose receipts say which one it was."""
    service = Service(Orders, name=name, answers="memory://")
    for operation in (Orders.note, Orders.invoice):

        async def unused(order_id: str, amount: int) -> Any: ...

        service.handles(operation)(unused)  # type: ignore[misc]

    @service.handles(Orders.place)
    async def place(order_id: str, amount: int) -> Receipt:
        return Receipt(name, amount)

    @service.handles(Orders.total)
    async def total() -> int:
        return 0

    return service


async def answering(client: Orders, count: int = 16) -> set[str]:
    """Which instances answer so many calls."""
    return {(await client.place("o-1", 1)).order_id for _ in range(count)}


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(45):
        while not await holds():
            await asyncio.sleep(0.001)


class Fleet:
    """Instances on the memory transport, and the file that tells where they are."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "orders.addresses"
        self.address = f"memory+file://{self.file}"
        self.clock = FakeClock()

    def tell(self, *names: str) -> None:
        self.file.write_text("# where they are\n" + "".join(f"memory://{name}  # one\n" for name in names))

    async def look(self, client: Orders, *names: str) -> None:
        """Lets the time of the next look come, and waits until the client knows these instances."""
        wanted = tuple(f"memory://{name}" for name in names)
        sender = client.place._line.sender  # type: ignore[attr-defined]

        async def known() -> bool:
            await self.clock.advance(1.0)
            return bool(sender.instances == wanted)

        await until(known)


@asynccontextmanager
async def fleet(folder: Path, *names: str) -> AsyncIterator[Fleet]:
    made = Fleet(folder)
    async with AsyncExitStack() as stack:
        for name in names:
            await stack.enter_async_context(serve(orders(name), at=f"memory://{name}", clock=made.clock))
        yield made


async def test_instances_that_come_are_called_and_those_that_leave_are_not(tmp_path: Path) -> None:
    async with fleet(tmp_path, "a", "b", "c") as here:
        here.tell("a")
        async with connect(Orders, here.address, clock=here.clock) as client:
            assert await answering(client) == {"a"}
            here.tell("a", "b", "c")
            await here.look(client, "a", "b", "c")
            assert await answering(client, 64) == {"a", "b", "c"}
            here.tell("c")
            await here.look(client, "c")
            assert await answering(client) == {"c"}


async def test_a_client_starts_before_there_is_an_instance(tmp_path: Path) -> None:
    async with fleet(tmp_path, "a") as here:
        here.tell()
        async with connect(Orders, here.address, clock=here.clock) as client:
            with pytest.raises(Unavailable, match=r"orders\.place: not sent, no instance of its service is known"):
                await client.place("o-1", 1)
            here.tell("a")
            await here.look(client, "a")
            assert await answering(client) == {"a"}


async def test_what_the_balancer_knows_of_those_that_stay_is_not_forgotten(tmp_path: Path) -> None:
    async with fleet(tmp_path, "a", "b", "c") as here:
        here.tell("a", "b")
        async with connect(Orders, here.address, clock=here.clock) as client:
            guarded = client.place._line.sender._guarded  # type: ignore[attr-defined]
            balancer = guarded.own.of(Balancer, lambda: Balancer(here.clock))
            before = dict(zip(("a", "b"), balancer.instances, strict=True))
            before["a"].back_at, before["a"].ejections = here.clock.now() + 1_000, 1
            here.tell("c", "a")
            await here.look(client, "c", "a")
            assert balancer.instances[1] is before["a"]
            assert await answering(client) == {"c"}
            here.tell("a")  # and where only it is left, it is tried all the same
            await here.look(client, "a")
            assert await answering(client) == {"a"}


async def test_those_that_were_not_ejected_may_leave(tmp_path: Path) -> None:
    async with fleet(tmp_path, "a", "b", "c") as here:
        here.tell("a", "b", "c")
        async with connect(Orders, here.address, clock=here.clock) as client:
            guarded = client.place._line.sender._guarded  # type: ignore[attr-defined]
            for instance in guarded.own.of(Balancer, lambda: Balancer(here.clock)).instances[:2]:
                instance.back_at, instance.ejections = here.clock.now() + 1_000, 1
            here.tell("a", "b")
            await here.look(client, "a", "b")
            assert await answering(client, 64) == {"a", "b"}


async def test_a_call_to_an_instance_that_leaves_ends_and_the_transport_is_closed_later(tmp_path: Path) -> None:
    async with fleet(tmp_path, "a", "b") as here:
        here.tell("a", "b")
        connecting = connect(Orders, here.address, clock=here.clock)
        async with connecting as client:
            carriers = connecting._carriers
            left = carriers._open["memory://a"]
            here.tell("b")
            await here.look(client, "b")
            message = Message(channel=Orders.note.channel, operation="orders.note", body=b'{"order_id":"o","amount":1}')
            await left.send(message)

            async def closed() -> bool:
                await here.clock.advance(1.0)
                return "memory://a" not in carriers._open

            before = here.clock.now()
            await until(closed)
            assert here.clock.now() - before >= LINGER - 2
            with pytest.raises(Unavailable):
                await left.send(message)


async def test_a_file_that_is_gone_takes_no_instance_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with fleet(tmp_path, "a") as here:
        here.tell("a")
        async with connect(Orders, here.address, clock=here.clock) as client:
            here.file.unlink()

            async def warned() -> bool:
                await here.clock.advance(1.0)
                return "cannot be read" in caplog.text

            await until(warned)
            assert await answering(client) == {"a"}
            assert "what was known stays: memory://a" in caplog.text


async def test_nothing_runs_on_after_the_client_is_closed(tmp_path: Path) -> None:
    async with fleet(tmp_path, "a") as here:
        here.tell("a")
        before = asyncio.all_tasks()
        async with connect(Orders, here.address, clock=here.clock) as client:
            await answering(client, 1)
        assert not [task for task in asyncio.all_tasks() - before if task.get_name().startswith("follow")]


class Names(asyncio.DatagramProtocol):
    """A name server that knows the SRV records of one name."""

    def __init__(self) -> None:
        self.records: list[str] = []
        self.asked = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, address: Any) -> None:
        self.asked += 1
        question = dns.message.from_wire(data)
        answer = dns.message.make_response(question)
        name = question.question[0].name
        if self.records and str(name) == "_orders._tcp.example.":
            answer.answer.append(dns.rrset.from_text(name, 1, "IN", "SRV", *self.records))
        else:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        self.transport.sendto(answer.to_wire(), address)


@asynccontextmanager
async def name_server() -> AsyncIterator[tuple[Names, str]]:
    transport, names = await asyncio.get_running_loop().create_datagram_endpoint(Names, ("127.0.0.1", 0))
    try:
        yield names, f"http+srv://_orders._tcp.example?server=127.0.0.1:{transport.get_extra_info('sockname')[1]}"
    finally:
        transport.close()


async def test_srv_records_of_a_name_server_tell_where_the_instances_are() -> None:
    clock = FakeClock()
    async with (
        name_server() as (names, address),
        serve(orders("a"), at="http://127.0.0.1:0", connect={Orders: "memory://"}) as (a,),
        serve(orders("b"), at="http://127.0.0.1:0", connect={Orders: "memory://"}) as (b,),
    ):
        here, there = (int(at.rpartition(":")[2]) for at in (a, b))
        names.records = [f"10 5 {here} localhost.", "20 5 9 backup.example."]
        async with connect(Orders, address, clock=clock) as client:
            assert await answering(client) == {"a"}
            names.records.append(f"10 5 {there} localhost.")

            async def both() -> bool:
                await clock.advance(1.0)
                return await answering(client) == {"a", "b"}

            await until(both)


async def test_a_name_that_the_name_server_does_not_know_has_no_instance_and_one_that_is_silent_tells_nothing() -> None:
    async with name_server() as (_, address):
        assert await found_by(address).look() == []
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
            silent.bind(("127.0.0.1", 0))
            port = silent.getsockname()[1]
            with pytest.raises(Unavailable, match="cannot be looked up"):
                await found_by(f"http+srv://_orders._tcp.example?server=127.0.0.1:{port}&every=0.05").look()


async def test_each_ip_address_of_a_name_is_an_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "127.0.0.1:8001" in await found_by("http+dns://localhost:8001").look()
    resolver = found_by("http+dns://orders.internal:8001/base?every=2")

    async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        assert (host, port) == ("orders.internal", 8001)
        return [(0, 0, 0, "", (ip, 8001)) for ip in ("10.0.0.2", "fd00::1", "10.0.0.1", "10.0.0.2")]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo, raising=False)
    instances = [resolver.instance(one) for one in await resolver.look()]
    assert instances == ["http://10.0.0.1:8001/base", "http://10.0.0.2:8001/base", "http://[fd00::1]:8001/base"]
    assert resolver.every == 2
    monkeypatch.undo()
    with pytest.raises(Unavailable, match=r"nowhere\.invalid has no address"):
        await found_by("http+dns://nowhere.invalid:8001").look()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("http+dns://orders.internal", r"write http\+dns://NAME:PORT"),
        ("https+dns://orders.internal:443", r"a certificate is for a name .* take https\+srv"),
        ("http+srv://_orders._tcp.example:80", "the records tell the port"),
        ("http+srv://_orders._tcp.example?server=127.0.0.1:x", "must be an IP address"),
        ("http+file://orders.addresses", "with the whole path"),
        ("http+file:///orders.addresses?every=0", "must be more than 0"),
        ("http+file:///orders.addresses?colour=red", "unknown option colour"),
        ("htttp+file:///orders.addresses", "unknown scheme"),
    ],
)
def test_an_address_that_cannot_be_looked_up_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(AddressError, match=sentence):
        resolver_of(text)


def test_an_address_without_a_resolver_is_an_instances_own() -> None:
    assert resolver_of("http://127.0.0.1:8001") is None
    assert resolver_of("memory://") is None
    assert parse_address("http+dns://a:1").scheme == "http+dns"


async def test_nothing_is_served_where_others_are_looked_up(tmp_path: Path) -> None:
    address = f"memory+file://{tmp_path}/orders.addresses"
    with pytest.raises(AddressError, match="nothing is served there"):
        async with serve(orders("a"), at=address, connect={Orders: "memory://"}):
            pass
    with pytest.raises(CannotCarry, match="finds instances to call, no channel"):
        async with serve(orders("a"), at="memory://", connect={Orders: address}):
            pass
    (tmp_path / "quintet.toml").write_text(f'[service.a]\napp = "a:b"\nconnect.orders = "{address}"\n')
    assert read_deployment(tmp_path / "quintet.toml").services["a"].connect == {"orders": (address,)}
    (tmp_path / "quintet.toml").write_text(f'[service.a]\napp = "a:b"\nat = "{address}"\n')
    with pytest.raises(ConfigurationError, match="nothing is served there"):
        read_deployment(tmp_path / "quintet.toml")


def test_the_log_says_what_was_found_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with fleet(tmp_path, "a") as here:
            here.tell("a")
            async with connect(Orders, here.address, clock=here.clock):
                for _ in range(5):
                    await here.clock.advance(1.0)

    with caplog.at_level(logging.INFO, "quintet.resolver"):
        asyncio.run(main())
    assert caplog.text.count("its instances are memory://a") == 1
