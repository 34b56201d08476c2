"""One reconnecting socket: what sessions see of brokers that go away, stay silent, refuse or lag behind."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

import quintet.connection as connection
from quintet.clock import SYSTEM, Clock
from quintet.connection import Connection, Link, Lost, Refused, Session, credentials
from quintet.errors import AddressError, Safety, Unavailable
from quintet.transport import masked, open_address, parse_address


class Broker:
    """Says "hello" to whoever comes, and then echoes lines; its connections can be cut."""

    def __init__(self, *, silent: bool = False, greeting: bytes = b"hello\n") -> None:
        self.silent = silent
        self.greeting = greeting
        self.writers: list[asyncio.StreamWriter] = []
        self.came = asyncio.Event()
        self.port = 0
        self.server: asyncio.Server | None = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        self.came.set()
        try:
            if not self.silent:
                writer.write(self.greeting)
            while data := await reader.read(1 << 16):
                if not self.silent:
                    writer.write(data)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def up(self) -> None:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    async def down(self) -> None:
        if self.server is not None:
            self.server.close()
            for writer in self.writers:
                writer.transport.abort()
            await self.server.wait_closed()
        self.writers.clear()


class Echoed(Session):
    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self.greeted = asyncio.get_running_loop().create_future()
        self.heard = b""
        self.more = asyncio.Event()
        self.ended: Exception | None = None

    async def greet(self) -> None:
        await self.greeted

    def received(self, data: bytes) -> None:
        if data.startswith(b"garbage"):
            raise Lost("that is no hello")
        if data.startswith(b"no"):
            self.greeted.set_exception(Refused("we do not know you"))
        elif not self.greeted.done():
            self.greeted.set_result(None)
        else:
            self.heard += data
            self.more.set()

    def lost(self, error: Exception) -> None:
        self.ended = error


class Told:
    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.more = asyncio.Event()

    def __call__(self, kind: str, subject: str, reason: object = "") -> None:
        self.kinds.append(kind)
        self.more.set()

    async def until(self, count: int) -> None:
        while len(self.kinds) < count:
            self.more.clear()
            await self.more.wait()


@asynccontextmanager
async def connected(*brokers: Broker, told: Told | None = None) -> AsyncGenerator[Connection[Echoed]]:
    hosts = ",".join(f"127.0.0.1:{broker.port}" for broker in brokers)
    link = Connection(parse_address(f"amqp://{hosts}"), 5672, Echoed, SYSTEM, told or Told())
    try:
        await link.open()
        yield link
    finally:
        await link.close()
        for broker in brokers:
            await broker.down()


async def test_who_writes_alone_does_not_wait_for_the_end_of_the_turn_and_who_writes_with_others_does() -> None:
    sent = list[bytes]()

    class Socket(asyncio.Transport):
        def write(self, data: bytes | bytearray | memoryview) -> None:
            sent.append(bytes(data))

        def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    link = Link(SYSTEM)
    link.connection_made(Socket())

    async def turn(*data: bytes) -> tuple[list[bytes], list[bytes]]:
        """What has gone out at once, and what by the end of the turn."""
        sent.clear()
        for piece in data:
            link.write(piece)
        at_once = sent.copy()
        await asyncio.sleep(0)  # no waiting: exactly the one turn of the loop that is looked at
        return at_once, sent.copy()

    assert await turn(b"1") == ([], [b"1"])  # others may come
    assert await turn(b"2") == ([b"2"], [b"2"])  # but none did
    assert await turn(b"3", b"4", b"5") == ([b"3"], [b"3", b"45"])
    assert await turn(b"6", b"7") == ([], [b"67"])  # now they do
    assert await turn(b"8") == ([], [b"8"])
    assert await turn(b"9") == ([b"9"], [b"9"])


async def test_what_is_written_in_one_turn_arrives_together_and_in_order() -> None:
    broker = Broker()
    await broker.up()
    async with connected(broker) as link:
        session = await link.ready(None)
        for word in (b"one ", b"two ", b"three"):
            session.link.write(word)
        while len(session.heard) < 13:
            session.more.clear()
            await session.more.wait()
        assert session.heard == b"one two three"


async def test_a_broker_that_was_away_is_found_again_and_both_are_told() -> None:
    broker, told = Broker(), Told()
    await broker.up()
    async with connected(broker, told=told) as link:
        first = await link.ready(None)
        await broker.down()
        await told.until(1)
        assert (link.session, told.kinds) == (None, ["broker-lost"])
        assert isinstance(first.ended, Exception)
        waiting = asyncio.ensure_future(link.ready(None))
        await asyncio.sleep(0)
        assert not waiting.done()
        await broker.up()
        second = await waiting
        assert second is not first
        await told.until(2)
        assert told.kinds == ["broker-lost", "broker-back"]


async def test_who_waits_for_a_broker_that_is_away_learns_at_its_time_that_nothing_was_sent() -> None:
    broker, told = Broker(), Told()
    await broker.up()
    async with connected(broker, told=told) as link:
        await broker.down()
        await told.until(1)
        with pytest.raises(Unavailable, match="not sent, the broker is away") as caught:
            await link.ready(SYSTEM.now() + 0.05)
        assert caught.value.safety is Safety.NOT_SENT


async def test_the_next_of_several_hosts_is_tried() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        away = Broker()
        away.port = unused.getsockname()[1]
    there = Broker()
    await there.up()
    async with connected(away, there) as link:
        assert link.host == ("127.0.0.1", there.port)


async def test_a_broker_that_accepts_and_stays_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 0.05)
    silent, there = Broker(silent=True), Broker()
    await silent.up()
    await there.up()
    async with connected(silent, there) as link:
        assert link.host == ("127.0.0.1", there.port)


async def test_a_refusal_is_no_reason_to_try_again_and_says_why() -> None:
    broker = Broker(greeting=b"no\n")
    await broker.up()
    with pytest.raises(Refused, match="we do not know you"):
        async with connected(broker):
            pass


async def test_a_host_that_refuses_does_not_keep_the_next_one_from_being_tried() -> None:
    full, there = Broker(greeting=b"no\n"), Broker()
    await full.up()
    await there.up()
    async with connected(full, there) as link:
        assert link.host == ("127.0.0.1", there.port)


async def test_nobody_there_is_said_with_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FIRST_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        away = Broker()
        away.port = unused.getsockname()[1]
    with pytest.raises(Unavailable, match=rf"amqp://127.0.0.1:{away.port}: no broker answers there"):
        async with connected(away):
            pass


async def test_what_a_session_cannot_read_ends_its_link_with_that_reason() -> None:
    broker, told = Broker(), Told()
    await broker.up()
    async with connected(broker, told=told) as link:
        session = await link.ready(None)
        session.link.write(b"garbage")
        await told.until(2)
        assert str(session.ended) == "that is no hello"
        assert await link.ready(None) is not session


async def test_a_broker_that_welcomes_and_then_throws_out_is_not_stormed() -> None:
    broker, told = Broker(), Told()
    await broker.up()
    slept: list[float] = []

    class Watched(Clock):
        async def sleep(self, seconds: float) -> None:
            slept.append(seconds)
            await asyncio.sleep(0)

    link = Connection(parse_address(f"amqp://127.0.0.1:{broker.port}"), 5672, Echoed, Watched(seed=1), told)
    await link.open()
    for count in range(1, 7):
        (await link.ready(None)).link.write(b"garbage")
        await told.until(2 * count)
    await link.close()
    await broker.down()
    assert len(slept) == 6
    assert slept[-1] > 0.5
    assert slept[-1] > 8 * slept[0]


async def test_heart_beats_are_sent_when_idle_and_silence_is_noticed() -> None:
    broker, told = Broker(), Told()
    await broker.up()
    async with connected(broker, told=told) as link:
        session = await link.ready(None)
        session.link.beat(0.02, b"beat")
        while session.heard.count(b"beat") < 3:
            session.more.clear()
            await session.more.wait()
        broker.silent = True
        session.link.expect(0.1)
        await told.until(1)
        assert str(session.ended) == "the broker was silent for 0.1 s"


async def test_senders_wait_while_the_socket_lags_behind() -> None:
    broker = Broker()
    await broker.up()
    async with connected(broker) as link:
        session = await link.ready(None)
        broker.writers[0].transport.pause_reading()  # type: ignore[attr-defined]
        wrote = 0
        while not session.link.full:
            session.link.write(bytes(1 << 20))
            wrote += 1 << 20
            await asyncio.sleep(0)
        room = asyncio.ensure_future(session.link.room())
        await asyncio.sleep(0)
        assert not room.done()
        broker.writers[0].transport.resume_reading()  # type: ignore[attr-defined]
        await room


async def test_who_waits_for_room_when_the_socket_is_reset_hears_that_it_is_lost() -> None:
    broker = Broker()
    await broker.up()
    async with connected(broker) as link:
        session = await link.ready(None)
        broker.writers[0].transport.pause_reading()  # type: ignore[attr-defined]
        while not session.link.full:
            session.link.write(bytes(1 << 20))
            await asyncio.sleep(0)  # one turn, in which it is written
        room = asyncio.ensure_future(session.link.room())
        session.link.drop(ConnectionResetError("reset by peer"))
        with pytest.raises(Lost, match="reset by peer"):
            await room


async def test_an_opening_that_is_cancelled_at_its_end_leaves_no_socket() -> None:
    broker = Broker()
    await broker.up()
    link = Connection(parse_address(f"amqp://127.0.0.1:{broker.port}"), 5672, Echoed, SYSTEM, Told())
    opening = asyncio.ensure_future(link.open())
    while link._keeper is None:
        await asyncio.sleep(0)  # turn by turn, to cancel it in its very last
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert link.session is None
    await broker.down()


async def test_large_messages_take_turns_so_that_the_loop_is_not_kept() -> None:
    broker = Broker()
    await broker.up()
    async with connected(broker) as link:
        session = await link.ready(None)
        turns: list[int] = []

        async def send(number: int) -> None:
            while session.link.full:
                await session.link.room()
            session.link.write(bytes(1 << 20))
            turns.append(number)

        sending = [asyncio.ensure_future(send(number)) for number in range(3)]
        await asyncio.sleep(0)
        assert turns == [0]
        await asyncio.gather(*sending)
        assert sorted(turns) == [0, 1, 2]


async def test_a_closed_connection_refuses_and_leaves_no_task() -> None:
    broker = Broker()
    await broker.up()
    before = asyncio.all_tasks()
    async with connected(broker) as link:
        pass
    with pytest.raises(Unavailable, match="is not open"):
        await link.ready(None)
    await link.close()
    assert not {task for task in asyncio.all_tasks() - before if "_keep" in repr(task)}


def test_credentials_come_from_the_address_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUINTET_AMQP_USER", "ada")
    monkeypatch.setenv("QUINTET_AMQP_PASSWORD", "secret")
    assert credentials(parse_address("amqps://host/"), "guest", "guest") == ("ada", "secret")
    assert credentials(parse_address("amqp://u:p%40@host/"), "guest", "guest") == ("u", "p@")
    assert credentials(parse_address("stomp://host/"), "guest", "guest") == ("guest", "guest")


def test_an_address_may_name_several_hosts() -> None:
    address = parse_address("amqp://u:p@one:5671,two,[::1]:5673/vhost")
    assert address.hosts == (("one", 5671), ("two", None), ("::1", 5673))
    assert (address.host, address.port, address.path, address.user) == ("one", 5671, "/vhost", "u")
    assert str(address) == "amqp://u:***@one:5671,two,[::1]:5673/vhost"
    with pytest.raises(AddressError, match="the port must be a number"):
        parse_address("amqp://one:x,two/")
    assert open_address("memory://a").address.hosts == (("a", None),)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("amqp://u:gu%65st@h/x", "amqp://u:***@h/x"),
        ("amqp://u:se/cr@et@h", "amqp://u:***@h"),
        ("amqp://u:p@one,two:5671/v?ca=/x", "amqp://u:***@one,two:5671/v?ca=/x"),
        ("kafka://h?rdkafka.sasl.password=secret&tls=on", "kafka://h?rdkafka.sasl.password=***&tls=on"),
        ("http://h:80/a?x=a@b", "http://h:80/a?x=a@b"),
        ("sqlite:///a:b.db", "sqlite:///a:b.db"),
    ],
)
def test_no_password_is_shown_however_it_is_written(address: str, shown: str) -> None:
    assert masked(address) == shown


@pytest.mark.parametrize("password", ["secret", "se/cret", "se#cret", "se?cret"])
def test_a_wrong_port_is_told_without_the_password(password: str) -> None:
    with pytest.raises(AddressError, match="the port must be a number") as told:
        parse_address(f"amqp://guest:{password}@host:abc")
    assert "cret" not in str(told.value)


def test_user_and_password_stand_before_all_hosts() -> None:
    with pytest.raises(AddressError, match="before the first of the hosts"):
        parse_address("amqp://one:5671,user:secret@two")


@pytest.mark.parametrize("number", ["nan", "inf", "-1", "soon"])
def test_an_option_that_is_no_number_is_refused_in_one_sentence(number: str) -> None:
    address = parse_address(f"memory://?capacity={number}")
    with pytest.raises(AddressError, match="option capacity"):
        address.option("capacity", 1.0)
    with pytest.raises(AddressError, match="is not a whole number"):
        parse_address("memory://?capacity=1.5").count("capacity", 1)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("verify=maybe", "must be on or off"),
        ("ca=/no/such.pem", "is no file"),
        ("cert=/no/such.pem", "is no file"),
        ("certkey=/no/such.pem", "name that by cert="),
    ],
)
def test_tls_options_that_make_no_sense_are_refused_in_one_sentence(option: str, sentence: str) -> None:
    with pytest.raises(AddressError, match=sentence):
        connection.tls(parse_address(f"amqps://host/?{option}"))


@pytest.mark.parametrize("scheme", ["amqp", "nsq", "nsq+lookup"])
def test_who_says_how_tls_is_done_without_asking_for_it_is_told(scheme: str) -> None:
    with pytest.raises(AddressError, match=rf"option ca= is for TLS.*: {scheme.partition('+')[0]}s://"):
        open_address(f"{scheme}://host?ca=/etc/ca.pem")
