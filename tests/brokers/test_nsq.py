"""NSQ: the conformance suite on real nsqds, alone and behind a lookup daemon, and what only it can get wrong."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from commands import quintet
from running import Entry

from quintet import Contract, Redelivery, Service, connect, current, event, notification, request, serve
from quintet.connection import Refused
from quintet.errors import AddressError, ConfigurationError, ConnectionLost, TooLarge, TransportError, Unavailable
from quintet.message import Channel, Message, new_id
from quintet.testing import CHECKS, Bench, Check, skips
from quintet.testing.bench import Receiver
from quintet.transport import DONE, Again, Dead, Finding, Verdict, open_address
from quintet.transports.nsq import Carrier, Publish, Subscription, inspection
from quintet.wire.nsq import pub
from quintet.wire.nsq_session import NSQ, Delivery

Brokers = Callable[[str], Entry]

EXCUSES = {"REPLIES", "ORDERED", "?capacity="}
"""What NSQ may lack: replies are the core's, it knows no order, and a queue of its is as long as the disk allows."""

ADDRESSES = {
    "nsqd": "{address}?http={http}",
    "nsqlookupd": "{lookup}",
    "TLS and DEFLATE": "{address}?http={http}&tls=on&ca={ca}&deflate=on",
}


@pytest.mark.parametrize("address", ADDRESSES.values(), ids=ADDRESSES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
async def test_nsq(broker: Brokers, check: Check, address: str) -> None:
    if missing := check.missing(Carrier):
        pytest.skip(f"NSQ lacks {missing}")
    entry = broker("nsq")
    bench = Bench(address.format(**entry))
    run = bench.name().rpartition(".")[2]
    try:
        await check.run(bench)
    finally:
        for topic in topics(entry["http"]):
            if run in topic:  # nsqd keeps each until it is told
                post(f"{entry['http']}/topic/delete?topic={topic}")


def test_nsq_is_excused_only_for_what_was_reviewed() -> None:
    assert {missing for sentence in skips(Carrier).values() for missing in sentence.split(", ")} == EXCUSES


# Daemons of one's own


def get(url: str) -> Any:
    with urlopen(url, timeout=5) as answer:
        return json.load(answer)


def post(url: str, body: bytes = b"") -> None:
    with urlopen(url, data=body, timeout=5):
        pass


def topics(http: str, **wanted: str) -> dict[str, Any]:
    more = "".join(f"&{name}={value}" for name, value in wanted.items())
    found = get(f"{http}/stats?format=json&include_mem=false{more}")["topics"] or []
    return {topic["topic_name"]: topic for topic in found}


def channels(http: str, topic: str) -> dict[str, Any]:
    found = topics(http, topic=topic).get(topic, {}).get("channels") or []
    return {channel["channel_name"]: channel for channel in found}


async def until(holds: Callable[[], Any], what: str, within: float = 45.0) -> Any:
    """What `holds` gives, once that is something."""
    give_up = time.monotonic() + within
    while not (found := await asyncio.to_thread(holds)):
        assert time.monotonic() < give_up, what
        await asyncio.sleep(0.01)
    return found


async def synced(daemon: Daemon, queue: str) -> None:
    """Waits until nsqd has written down where a queue stands: of a new one a kill leaves nothing before that."""
    await until((daemon.folder / f"{queue}.diskqueue.meta.dat").exists, f"{queue} was never synced")


class Daemon:
    """One nsqd or nsqlookupd at ports of its own, its data in a folder; `apart`: its HTTP is not where one guesses."""

    def __init__(self, program: str, folder: Path, *, apart: bool = False, **options: object) -> None:
        self._program, self.folder = program, folder
        self.tcp, self.http_port = two_ports()
        if apart:
            self.http_port = two_ports()[0]
        self.http = f"http://127.0.0.1:{self.http_port}"
        self.address = f"nsq://127.0.0.1:{self.tcp}"
        self._options = {
            "tcp-address": f"127.0.0.1:{self.tcp}",
            "http-address": f"127.0.0.1:{self.http_port}",
            "broadcast-address": "127.0.0.1",
        }
        if program.endswith("nsqd"):
            folder.mkdir(parents=True, exist_ok=True)
            self._options |= {"data-path": str(folder), "mem-queue-size": "0", "sync-timeout": "50ms"}
            self._options |= {"https-address": "127.0.0.1:0"}  # with a certificate it would be all interfaces
        self._options |= {name.replace("_", "-"): str(value) for name, value in options.items()}
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        words = [f"--{name}={value}" for name, value in self._options.items()]
        with (self.folder.parent / f"{self.folder.name}.log").open("ab") as log:
            self._process = subprocess.Popen([self._program, *words], stdout=log, stderr=log)
        give_up = time.monotonic() + 10
        while True:
            try:
                get(f"{self.http}/info")
                return
            except OSError:
                assert time.monotonic() < give_up, f"{self._program} does not answer"
                time.sleep(0.01)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def two_ports() -> tuple[int, int]:
    """Two free ports side by side: where HTTP is guessed."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port: int = first.getsockname()[1]
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return port, port + 1
            except OSError:
                continue


@pytest.fixture
def daemon(broker: Brokers, tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """`daemon()`: an nsqd; `daemon("nsqlookupd")`; options are those of the command line."""
    programs, started = Path(broker("nsq")["programs"]), list[Daemon]()

    def start(program: str = "nsqd", **options: object) -> Daemon:
        started.append(Daemon(str(programs / program), tmp_path / f"{program}-{len(started)}", **options))
        return started[-1]

    yield start
    for each in started:
        each.kill()


@asynccontextmanager
async def opened(*addresses: str) -> AsyncGenerator[list[Carrier]]:
    transports = [open_address(address) for address in addresses]
    try:
        for transport in transports:
            await transport.open()
        yield [transport for transport in transports if isinstance(transport, Carrier)]
    finally:
        for transport in transports:
            await transport.close()


def message(channel: Channel, body: bytes = b"", **fields: Any) -> Message:
    return Message(channel=channel, body=body, id=fields.pop("id", new_id()), **fields)


def sends_by(transport: Carrier) -> NSQ | None:
    """The connection that is sent by, while there is one."""
    try:
        return transport.native
    except Unavailable:
        return None


async def came(receiver: Receiver, count: int, within: float = 45.0) -> list[bytes]:
    give_up = time.monotonic() + within
    while len(receiver.messages) < count:
        assert time.monotonic() < give_up, f"{count} were due: {receiver!r}"
        await asyncio.sleep(0.005)
    return receiver.bodies


QUEUE = Channel("trips.v1.request_pickup", durable=True)
EVENT = Channel("trips.v1.arrived", fanout=True, durable=True)


# Foreign programs


async def test_foreign_programs_send_and_receive_by_the_documented_names(daemon: Any, broker: Brokers) -> None:
    own, programs = daemon(), Path(broker("nsq")["programs"])

    class Trips(Contract, name="trips"):
        @notification
        async def request_pickup(self, trip_id: str, driver: str) -> None: ...

        @event
        async def arrived(self, trip_id: str) -> None: ...

    trips, handled = Service(Trips), asyncio.Queue[tuple[str, str, str]]()

    @trips.handles(Trips.request_pickup)
    async def request_pickup(trip_id: str, driver: str) -> None:
        await handled.put((trip_id, driver, current().id))

    async with serve(trips, at=own.address):
        send = await asyncio.create_subprocess_exec(
            programs / "to_nsq",
            "-topic=trips.v1.request_pickup",
            f"-nsqd-tcp-address=127.0.0.1:{own.tcp}",
            stdin=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        await send.communicate(b'{"trip_id": "t-1", "driver": "viktor"}\n')
        trip, driver, identity = await asyncio.wait_for(handled.get(), 10)
        assert (trip, driver) == ("t-1", "viktor")
        assert len(identity) == 16  # NSQ's own

        tail = await asyncio.create_subprocess_exec(
            programs / "nsq_tail",
            "-topic=trips.v1.arrived",
            "-channel=foreign",
            f"-nsqd-tcp-address=127.0.0.1:{own.tcp}",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            subscribed = lambda: channels(own.http, "trips.v1.arrived").get("foreign", {}).get("clients")  # noqa: E731
            await until(subscribed, "nsq_tail has not subscribed")
            await trips.publish(Trips.arrived, "t-1")
            assert tail.stdout is not None
            head = await asyncio.wait_for(tail.stdout.readline(), 10)
            body = await asyncio.wait_for(tail.stdout.readline(), 10)
        finally:
            tail.kill()
            await tail.wait()
        assert head.startswith(b"quintet/1 {")
        assert json.loads(head.removeprefix(b"quintet/1 "))["content-type"] == "application/json"
        assert json.loads(body) == {"trip_id": "t-1"}


# Lookup daemons


async def test_what_any_nsqd_holds_is_found_through_the_lookup_daemon(daemon: Any) -> None:
    lookup = daemon("nsqlookupd")
    one, two = (daemon(lookupd_tcp_address=f"127.0.0.1:{lookup.tcp}") for _ in range(2))
    await until(lambda: len(get(f"{lookup.http}/nodes")["producers"]) == 2, "the nsqds are not known")
    address, receiver = f"nsq+lookup://127.0.0.1:{lookup.http_port}?poll=0.1", Receiver()
    async with opened(address, address, one.address, two.address) as (there, here, at_one, at_two):
        await there.serve(QUEUE, receiver, "")
        await at_one.send(message(QUEUE, b"one"))
        await at_two.send(message(QUEUE, b"two"))
        await here.send(message(QUEUE, b"any"))
        assert sorted(await came(receiver, 3)) == [b"any", b"one", b"two"]

        three = daemon(lookupd_tcp_address=f"127.0.0.1:{lookup.tcp}")  # one that comes later
        async with opened(three.address) as (at_three,):
            await at_three.send(message(QUEUE, b"three"))
            assert (await came(receiver, 4))[3] == b"three"

        first = here.native
        next(each for each in (one, two) if each.tcp == first.host[1]).kill()  # the one that is sent to
        await until(lambda: sends_by(here) not in (first, None), "the sender goes nowhere else")
        await here.send(message(QUEUE, b"elsewhere"))
        await until(lambda: b"elsewhere" in receiver.bodies, "it went nowhere")  # others may come again before it


async def test_no_lookup_daemon_and_none_that_knows_an_nsqd_are_told_at_the_start(daemon: Any) -> None:
    lookup = daemon("nsqlookupd")
    with pytest.raises(Unavailable, match="know no nsqd"):
        await open_address(f"nsq+lookup://127.0.0.1:{lookup.http_port}").open()
    lookup.kill()
    with pytest.raises(Unavailable, match="no lookup daemon answers"):
        await open_address(f"nsq+lookup://127.0.0.1:{lookup.http_port}").open()


async def test_of_several_nsqds_all_are_received_from_and_one_that_answers_is_sent_to(daemon: Any) -> None:
    one, two = daemon(), daemon()
    both = f"nsq://127.0.0.1:{one.tcp},127.0.0.1:{two.tcp}"
    receiver = Receiver()
    async with opened(both, both, two.address) as (there, here, at_two):
        await there.serve(QUEUE, receiver, "")
        await at_two.send(message(QUEUE, b"second"))
        await here.send(message(QUEUE, b"first"))
        assert sorted(await came(receiver, 2)) == [b"first", b"second"]
        before = here.native
        one.kill()
        await until(lambda: sends_by(here) not in (before, None), "the sender goes nowhere else")
        await here.send(message(QUEUE, b"third"))
        await came(receiver, 3)
        one.start()
        async with opened(one.address) as (at_one,):
            await at_one.send(message(QUEUE, b"fourth"))
            await came(receiver, 4)


# Kills


async def test_what_is_in_work_when_nsqd_is_killed_is_handled_once(daemon: Any) -> None:
    own, receiver = daemon(), Receiver(hold=True)
    async with opened(own.address) as (here,):
        await here.serve(QUEUE, receiver, "", limit=3)
        for number in range(6):
            post(f"{own.http}/pub?topic={QUEUE.name}", b"%d" % number)
        await came(receiver, 3)
        await synced(own, QUEUE.name)
        await synced(own, f"{QUEUE.name}:work")
        before = here.native
        own.kill()
        own.start()
        await until(lambda: sends_by(here) not in (before, None) and here.connected, "not connected again")
        receiver.release()
        await came(receiver, 6)
        post(f"{own.http}/pub?topic={QUEUE.name}", b"after")
        assert sorted(await came(receiver, 7)) == [b"0", b"1", b"2", b"3", b"4", b"5", b"after"]


async def test_a_message_that_waits_for_its_next_attempt_comes_again_though_nsqd_is_killed(daemon: Any) -> None:
    own, receiver = daemon(), Receiver(Again(0.6, "not yet"))
    async with opened(own.address) as (here,):
        await here.serve(EVENT, receiver, "dispatch")
        post(f"{own.http}/pub?topic={EVENT.name}", b"patient")
        await came(receiver, 1)
        failed = time.monotonic()
        await synced(own, f"{EVENT.name}:dispatch")
        own.kill()
        own.start()
        await came(receiver, 2)
        assert time.monotonic() - failed >= 0.55
        assert [one.attempt for one in receiver.messages] == [1, 2]
        assert "quintet-failed-at" in receiver.messages[1].headers


async def test_what_is_sent_while_nsqd_is_away_waits_and_then_says_that_it_was_not_sent(daemon: Any) -> None:
    own = daemon()
    async with opened(own.address) as (here,):
        await here.send(message(QUEUE, b"before"))
        own.kill()
        await until(lambda: not here.connected, "the loss is not noticed")
        with pytest.raises(Unavailable, match="not sent"):
            await here.send(message(QUEUE, b"in vain", until=here.clock.now() + 0.1))
        with pytest.raises(Unavailable):
            _ = here.native
        sending = asyncio.create_task(here.send(message(QUEUE, b"waits")))
        own.start()
        await asyncio.wait_for(sending, 10)


async def test_what_was_accepted_right_before_a_kill_is_sent_once_more_as_a_repeat(daemon: Any) -> None:
    own, receiver = daemon(), Receiver()
    async with opened(own.address) as (here,):
        await here.send(message(QUEUE, b"first"))
        await synced(own, QUEUE.name)
        for number in range(5):
            await here.send(message(QUEUE, b"%d" % number, id=f"m-{number}"))
        own.kill()
        own.start()
        await here.serve(QUEUE, receiver, "")
        attempts = lambda: sorted(one.attempt for one in receiver.messages if one.id == "m-4")  # noqa: E731
        await until(lambda: attempts() and attempts()[-1] == 2, f"no repeat came: {receiver!r}")
        assert {f"m-{number}" for number in range(5)} <= {one.id for one in receiver.messages}


async def test_a_message_that_nsqd_has_twice_does_not_slow_it_down_for_ever(daemon: Any) -> None:
    own, held, receiver = daemon(), asyncio.Event(), list[bytes]()

    async def receive(one: Message) -> Verdict:
        receiver.append(one.body)
        await held.wait()
        return DONE

    async with opened(own.address) as (here,):
        serving = await here.serve(QUEUE, receive, "", limit=2)
        await here.send(message(QUEUE, b"twice"))
        await until(lambda: receiver, "it has not come")
        (tap,) = serving.taps.values()
        (delivery,) = tap.inflight.values()
        tap.arrived(Delivery(delivery.timestamp, 1, delivery.id, delivery.body))  # as nsqd does it after a kill
        await until(lambda: channels(own.http, QUEUE.name)["work"]["clients"][0]["ready_count"] == 3, "no more allowed")
        held.set()
        await here.send(message(QUEUE, b"next"))
        await until(lambda: receiver == [b"twice", b"next"], "what is already here came a second time")


# Leases


async def test_what_a_dead_receiver_had_goes_to_another_as_a_repeat(daemon: Any) -> None:
    own, receiver = daemon(), Receiver()
    async with opened(own.address) as (here,):
        await here.send(message(QUEUE, b"work"))
        reader, writer = await asyncio.open_connection("127.0.0.1", own.tcp)
        said = json.dumps({"msg_timeout": 1000}).encode()
        writer.write(b"  V2IDENTIFY\n" + len(said).to_bytes(4, "big") + said)
        writer.write(f"SUB {QUEUE.name} work\nRDY 1\n".encode())
        taken = await asyncio.wait_for(reader.readuntil(b"work"), 10)
        assert b"quintet/1" in taken
        writer.transport.abort()  # it dies in the midst of its work
        await here.serve(QUEUE, receiver, "")
        await came(receiver, 1)
        assert receiver.messages[0].attempt == 2


async def test_a_handler_that_takes_longer_than_the_lease_keeps_its_message(daemon: Any) -> None:
    own, first, second = daemon(), Receiver(hold=True), Receiver()
    channel = Channel(QUEUE.name, durable=True, native=(Subscription(msg_timeout=1),))
    async with opened(own.address, own.address) as (here, there):
        await here.serve(channel, first, "", limit=1)
        await here.send(message(QUEUE, b"long"))
        await came(first, 1)
        await there.serve(channel, second, "")
        begun = time.monotonic()
        await until(lambda: time.monotonic() - begun > 2.5, "time stands still")
        assert second.messages == []
        assert channels(own.http, QUEUE.name)["work"]["timeout_count"] == 0
        first.release()


# Native options and the way out


async def test_a_deferred_message_comes_when_it_is_due_and_others_pass(daemon: Any) -> None:
    own, receiver = daemon(), Receiver()
    async with opened(own.address) as (here,):
        await here.serve(QUEUE, receiver, "")
        sent = time.monotonic()
        for number in range(20):  # so fast that nsqd forgets to wait for some
            await here.send(message(QUEUE, b"later", native=(Publish(defer=0.5),)))
            await here.send(message(QUEUE, b"%02d" % number))
        await came(receiver, 40)
        assert sorted(receiver.bodies[:20]) == [b"%02d" % number for number in range(20)]
        assert receiver.times[20] - sent >= 0.45
        assert {one.attempt for one in receiver.messages} == {1}
        assert not any(name.startswith("quintet") for one in receiver.messages for name in one.headers)


async def test_what_is_tried_again_has_the_lease_that_was_asked_for(daemon: Any) -> None:
    channel = Channel(EVENT.name, fanout=True, durable=True, native=(Subscription(msg_timeout=30),))
    async with opened(daemon().address) as (here,):
        serving = await here.serve(channel, Receiver(), "dispatch")
        leases = {tap.topic: tap.session._profile.msg_timeout for tap in serving.taps.values()}
        assert leases == {"trips.v1.arrived": 30, "trips.v1.arrived.dispatch.again": 30}  # touched every 10 seconds


async def test_options_reach_nsqd(daemon: Any) -> None:
    own = daemon()
    options = Subscription(max_in_flight=7, msg_timeout=3, sample_rate=20)
    channel = Channel(EVENT.name, fanout=True, durable=True, native=(options,))
    async with opened(own.address) as (here,):
        await here.serve(channel, Receiver(), "dispatch")
        client = await until(
            lambda: next(
                (one for one in channels(own.http, EVENT.name)["dispatch"]["clients"] if one["ready_count"]), {}
            ),
            "nsqd was never told how many may be in flight",
        )
        assert (client["ready_count"], client["sample_rate"]) == (7, 20)
        again = channels(own.http, "trips.v1.arrived.dispatch.again")["work"]["clients"][0]
        assert (again["ready_count"], again["sample_rate"]) == (7, 0)  # what failed is not thrown away


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Subscription(msg_timeout=0.5), "at least 1 second"),
        (lambda: Subscription(max_in_flight=-1), "1 or more"),
        (lambda: Subscription(sample_rate=100), "1 to 99"),
        (lambda: Publish(defer=-1), "0 to 3600"),
        (lambda: Publish(defer=4000), "0 to 3600"),
    ],
)
def test_options_that_nsqd_would_refuse_are_refused_at_the_start(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        make()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("tls=yes", "must be on or off"),
        ("deflate=on&snappy=on", "exclude each other"),
        ("heartbeat=0.1", "at least 1"),
        ("poll=soon", "not a number"),
        ("http=a:1,b:2", "one host:port for each"),
        ("speed=10", "unknown option speed"),
    ],
)
def test_an_address_that_makes_no_sense_is_refused_at_the_start(options: str, says: str) -> None:
    with pytest.raises(AddressError, match=says):
        open_address(f"nsq://127.0.0.1?{options}")


async def test_the_native_connection_takes_commands_of_ones_own(daemon: Any) -> None:
    own, receiver = daemon(), Receiver()
    async with opened(own.address) as (here,):
        await here.serve(QUEUE, receiver, "")
        native = here.native
        assert isinstance(native, NSQ)
        assert native.limits.version == "1.3.0"
        assert await native.command(pub(QUEUE.name, b'{"bare": true}')) == b"OK"
        assert await came(receiver, 1) == [b'{"bare": true}']
        with pytest.raises(Unavailable, match="E_INVALID"):
            await native.command(b"NONSENSE\n")
        await until(
            lambda: sends_by(here) not in (native, None), "nsqd hangs up after that, and it is not called again"
        )
        await here.send(message(QUEUE, b"afterwards"))
        await came(receiver, 2)


# Refusals


async def test_a_message_over_the_limit_is_refused_and_the_others_pass(daemon: Any) -> None:
    own, receiver = daemon(max_msg_size=2_000_000), Receiver()
    async with opened(own.address, f"{own.address}?largest=1000") as (here, narrow):
        await here.serve(QUEUE, receiver, "")
        sends = [here.send(message(QUEUE, bytes(size))) for size in (10, 1_900_000, 2_000_000, 20)]
        outcomes = await asyncio.gather(*sends, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [type(None), type(None), TooLarge, type(None)]
        assert "2000000" in str(outcomes[2])
        await came(receiver, 3)
        with pytest.raises(TooLarge, match="takes 1000"):
            await narrow.send(message(QUEUE, bytes(1000)))


async def test_where_nsqd_says_that_it_is_too_large_others_are_told_that_they_were_not_sent(daemon: Any) -> None:
    own = daemon(max_msg_size=1000)
    async with opened(f"{own.address}?largest=100000") as (here,):
        session = here.native
        large, other = session.publish("a", bytes(5000)), session.publish("b", b"other")
        with pytest.raises((TooLarge, ConnectionLost)):
            await large
        with pytest.raises((Unavailable, ConnectionLost)):
            await other


async def test_tls_is_verified_and_may_be_demanded_on_either_side(daemon: Any, broker: Brokers) -> None:
    shared = broker("nsq")
    ca = shared["ca"]
    folder = Path(ca).parent
    strict, plain = daemon(tls_cert=folder / "cert.pem", tls_key=folder / "key.pem", tls_required="tcp-https"), daemon()
    channel, receiver = Channel(f"check.{new_id()}", durable=True), Receiver()
    async with opened(f"{strict.address.replace('nsq', 'nsqs')}?ca={ca}") as (here,):
        await here.serve(channel, receiver, "")
        await here.send(message(channel, b"secret"))
        await came(receiver, 1)
    with pytest.raises(Refused, match="certificate is not trusted"):
        await open_address(f"{strict.address}?tls=on").open()
    with pytest.raises(Refused, match="does not offer TLS"):
        await open_address(f"{plain.address}?tls=on").open()
    async with opened(strict.address) as (bare,):
        with pytest.raises(Unavailable, match="TLS required"):
            await bare.send(message(channel, b"open"))


@asynccontextmanager
async def judge(**topics: str) -> AsyncGenerator[str]:
    """A server that tells nsqd which topics a secret opens."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = (await reader.readuntil(b"\r\n\r\n")).decode()
        rights = [
            {"topic": topic, "channels": [".*"], "permissions": ["subscribe", "publish"]}
            for secret, topic in topics.items()
            if f"secret={secret}&" in asked
        ]
        body = json.dumps({"ttl": 60, "identity": "test", "authorizations": rights}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_secret_opens_the_door(daemon: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with judge(sesame=".*") as address:
        own = await asyncio.to_thread(daemon, auth_http_address=address)
        receiver, at = Receiver(), f"127.0.0.1:{own.tcp}"
        async with opened(f"nsq://:sesame@{at}") as (here,):
            await here.serve(QUEUE, receiver, "")
            await here.send(message(QUEUE, b"in"))
            await came(receiver, 1)
        monkeypatch.setenv("QUINTET_NSQ_PASSWORD", "sesame")
        async with opened(f"nsq://{at}") as (here,):
            await here.send(message(QUEUE, b"in, too"))
        monkeypatch.delenv("QUINTET_NSQ_PASSWORD")
        with pytest.raises(Refused, match="asks for a secret"):
            await open_address(f"nsq://{at}").open()
        with pytest.raises(Refused, match=r"^127\.0\.0\.1:\d+: nsqd refuses: [^:]*\(E_UNAUTHORIZED\)$"):
            await open_address(f"nsq://:guess@{at}").open()


async def test_a_letter_that_may_not_be_written_leaves_its_message_where_it_was(daemon: Any) -> None:
    async with judge(sesame=r"trips\..*") as address:
        own = await asyncio.to_thread(daemon, auth_http_address=address)
        receiver = Receiver(Dead("hopeless"))
        async with opened(f"nsq://:sesame@127.0.0.1:{own.tcp}") as (here,):
            await here.serve(QUEUE, receiver, "")
            await here.send(message(QUEUE, b"dies"))
            await came(receiver, 1)
            await until(lambda: channels(own.http, QUEUE.name)["work"]["deferred_count"] == 1, "it was not put back")
            with pytest.raises(Unavailable, match="may not be made"):
                await here.send(message(Channel("other.v1.thing", durable=True)))
            await here.send(message(QUEUE, b"lives"))
            await came(receiver, 2)


async def test_what_is_no_nsqd_is_told(broker: Brokers) -> None:
    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    async with server:
        with pytest.raises(Unavailable, match="is there an nsqd"):
            await open_address(f"nsq://127.0.0.1:{server.sockets[0].getsockname()[1]}").open()


# What is temporary


async def test_temporary_topics_and_channels_go_with_their_holder(daemon: Any) -> None:
    own = daemon()
    replies = Channel(f"replies.phone.{new_id()}", temporary=True, replies=True)
    screen = Channel(EVENT.name, fanout=True, temporary=True)
    async with opened(own.address) as (here,):
        one = await here.listen(replies, lambda _: None)
        two = await here.serve(screen, Receiver(), "screen")
        assert f"{replies.name}.temporary" in topics(own.http)
        assert any(name.startswith("screen.") for name in channels(own.http, EVENT.name))
        await one.stop()
        await two.stop()
        assert f"{replies.name}.temporary" not in topics(own.http)
        assert channels(own.http, EVENT.name) == {}


async def test_what_a_dead_holder_left_behind_is_swept_away(daemon: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = daemon()
    monkeypatch.setattr("quintet.transports.nsq.discovery.SWEEP", 0.1)
    for topic in ("replies.gone.1.temporary", EVENT.name, "trips.v1.other"):
        post(f"{own.http}/topic/create?topic={topic}")
    post(f"{own.http}/channel/create?topic={EVENT.name}&channel=screen.1.temporary")
    post(f"{own.http}/channel/create?topic={EVENT.name}&channel=billing")
    async with opened(own.address) as (here,):
        await here.listen(Channel(f"replies.here.{new_id()}", temporary=True, replies=True), lambda _: None)
        swept = lambda: "replies.gone.1.temporary" not in topics(own.http)  # noqa: E731
        await until(swept, "the topic is still there")
        await until(lambda: list(channels(own.http, EVENT.name)) == ["billing"], "the channel is still there")
        assert "trips.v1.other" in topics(own.http)
        assert any(name.startswith("replies.here") for name in topics(own.http))


# What is seen


async def test_dead_letters_are_read_however_many_there_are_and_none_is_lost(daemon: Any) -> None:
    own, count = daemon(), 700
    receiver = Receiver(*[Dead(f"hopeless {number}") for number in range(count)])
    async with opened(own.address, own.address) as (here, there):
        await there.serve(QUEUE, receiver, "")
        await asyncio.gather(*(here.send(message(QUEUE, b"%d" % number)) for number in range(count)))
        await came(receiver, count)
        await until(lambda: topics(own.http, topic="quintet.dead")["quintet.dead"]["message_count"] == count, "too few")
        letters = await here.dead()
        assert len(letters) == count
        assert await here.drop([one.id for one in letters[:100]]) == 100
        left = {one.id for one in letters[100:]}
        for _ in range(10):  # who looks right behind another may miss what that one had in hand
            found = {one.id for one in await there.dead()}
            (state,) = [one for one in await here.channels() if one.channel == QUEUE.name]
            if found == left and state.dead == 600:
                break
        assert found == left
        assert (state.waiting, state.in_work, state.dead) == (0, 0, 600)


async def test_a_foreign_message_may_die_and_be_replayed(daemon: Any) -> None:
    own, receiver = daemon(), Receiver(Dead("it is odd"))
    async with opened(own.address) as (here,):
        await here.serve(QUEUE, receiver, "")
        post(f"{own.http}/pub?topic={QUEUE.name}", b'{"odd": 1}')
        await came(receiver, 1)
        await until(lambda: "quintet.dead" in topics(own.http), "no letter")
        (one,) = await here.dead()
        assert (one.channel, one.reason, one.message.body) == (QUEUE.name, "it is odd", b'{"odd": 1}')
        listed = await asyncio.to_thread(quintet, "dead", "replay", one.id, "--at", own.address)
        assert listed.stdout == "1 replayed\n", listed.stderr
        await came(receiver, 2)
        assert (receiver.messages[1].id, receiver.messages[1].attempt) == (one.message.id, 1)


async def test_without_http_what_needs_it_says_so_and_the_rest_works(daemon: Any) -> None:
    own = daemon(apart=True)
    async with opened(own.address) as (here,):
        with pytest.raises(TransportError, match=r"write \?http=host:port"):
            await here.channels()
        with pytest.raises(TransportError, match=r"write \?http=host:port"):
            await anext(here.tail("trips.*"))
        receiver, screen = Receiver(), Channel(EVENT.name, fanout=True, temporary=True)
        await here.serve(screen, receiver, "screen")
        assert [name for name in channels(own.http, EVENT.name) if name.endswith("#ephemeral")]
        await here.send(message(EVENT, b"shown"))
        await came(receiver, 1)
        assert await here.dead() == []
        assert not findings(await here.examine())["nsqd's HTTP"].well
    async with opened(f"{own.address}?http=127.0.0.1:{own.http_port}") as (here,):
        await here.serve(QUEUE, Receiver(), "")
        assert QUEUE.name in {state.channel for state in await here.channels()}


async def test_http_that_is_behind_a_firewall_keeps_nobody(daemon: Any) -> None:
    own, asked = daemon(apart=True), list[asyncio.StreamWriter]()

    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(writer)

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with server, opened(f"{own.address}?http=127.0.0.1:{server.sockets[0].getsockname()[1]}") as (here,):
        receiver, other = Receiver(), Channel("trips.v1.other", durable=True)
        async with asyncio.timeout(1):  # as long as a call has by default
            await here.send(message(QUEUE, b"first"))
        for channel in (QUEUE, other):
            await here.send(message(channel, b"second"))
            await here.serve(channel, receiver, "")
        await came(receiver, 3)
        assert len(asked) == 1, "it was silent, and asked again at once"
        for writer in asked:
            writer.close()


async def test_a_dead_letter_larger_than_all_that_is_kept_is_written_once_and_found_however_slowly_it_comes(
    daemon: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "QUIET", 0.001)
    own = daemon(max_msg_size=8 << 20)
    async with opened(f"{own.address}?http={own.http.removeprefix('http://')}") as (here,):
        await here.serve(QUEUE, Receiver(Dead("hopeless")), "")
        await here.send(message(QUEUE, bytes(5 << 20)))
        buried = lambda: topics(own.http).get("quintet.dead", {}).get("message_count")  # noqa: E731
        await until(buried, "it is not buried")
        (letter,) = await here.dead()
        assert len(letter.message.body) == 5 << 20
        assert topics(own.http)["quintet.dead"]["message_count"] == 1


async def test_a_tail_outlives_its_nsqd(daemon: Any) -> None:
    own, receiver = daemon(), Receiver()
    async with opened(own.address, own.address) as (here, watching):
        await here.serve(EVENT, receiver, "dispatch")
        tail = watching.tail(EVENT.name)
        watched = lambda: any(name.startswith("tail.") for name in channels(own.http, EVENT.name))  # noqa: E731
        await until(watched, "nothing is watched")
        await here.send(message(EVENT, b"1"))
        assert (await asyncio.wait_for(anext(tail), 10)).body == b"1"
        before = here.native
        own.kill()
        own.start()
        await until(lambda: sends_by(here) not in (before, None) and watched(), "not connected again")
        await here.send(message(EVENT, b"2"))
        async with asyncio.timeout(10):
            while (await anext(tail)).body != b"2":
                pass
        await tail.aclose()
        assert not watched()


def findings(found: Any) -> dict[str, Finding]:
    return {one.what: one for one in found}


async def test_the_doctor_is_told_what_would_not_work(daemon: Any) -> None:
    well, ill = daemon(), daemon(mem_queue_size=100)
    async with opened(well.address, ill.address) as (here, there):
        good, bad = findings(await here.examine()), findings(await there.examine())
    assert good["version"].says == f"nsqd 1.3.0 at 127.0.0.1:{well.tcp}"
    assert good["largest message"].says.startswith("1048576 bytes")
    assert good["survives a kill"].well
    assert not bad["survives a kill"].well
    assert "up to 100 accepted messages" in bad["survives a kill"].says


async def test_a_transport_tells_once_that_its_broker_is_lost_and_that_it_is_back(daemon: Any) -> None:
    own, told = daemon(), list[tuple[str, str]]()
    async with opened(own.address) as (here,):
        here.tell = lambda kind, subject, reason="": told.append((kind, subject))
        for group in ("one", "two"):
            await here.serve(EVENT, Receiver(), group)
        own.kill()
        await until(lambda: not here.connected, "the loss is not noticed")
        own.start()
        await until(lambda: len(told) == 2, "its return is not told")
        assert told == [("broker-lost", own.address), ("broker-back", own.address)]
        assert here.connected


async def test_requests_are_answered_over_two_nsqds(daemon: Any) -> None:
    one, two = daemon(), daemon()

    class Echo(Contract, name="echo"):
        @request
        async def echo(self, text: str) -> str: ...

    service = Service(Echo)

    @service.handles(Echo.echo, redelivery=Redelivery(attempts=1))
    async def echo(text: str) -> str:
        return text * 2

    at, to = f"nsq://127.0.0.1:{one.tcp},127.0.0.1:{two.tcp}", f"nsq://127.0.0.1:{two.tcp},127.0.0.1:{one.tcp}"
    async with serve(service, at=at), connect(Echo, to) as client:
        answers = await asyncio.gather(*(client.echo(str(number)) for number in range(50)))
        assert answers == [str(number) * 2 for number in range(50)]
