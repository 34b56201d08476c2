"""The STOMP transport before a broker that does what a test wants of it; real ones are in tests/brokers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from quintet.connection import Link, Refused
from quintet.errors import (
    AddressError,
    ChannelFull,
    ConfigurationError,
    ConnectionLost,
    InvalidMessage,
    ProtocolError,
    TransportError,
    Unavailable,
)
from quintet.message import Channel, Message
from quintet.transport import DONE, Again, Dead, Verdict, open_address
from quintet.transports.stomp import Carrier, Publish, Subscription
from quintet.wire.stomp import Frame, Parser, encode
from quintet.wire.stomp_message import DIALECTS, TAKEN, destination, headers_of, message_of, subscription, waiting_room
from quintet.wire.stomp_session import Session

WORK = Channel("work", durable=True)
ACTIVEMQ, RABBITMQ = DIALECTS["activemq"], DIALECTS["rabbitmq"]


class Broker:
    """Confirms all that asks for it, unless `answer` says otherwise: frame by frame, None for what it does anyway."""

    def __init__(self) -> None:
        self.greeting = {"version": "1.2", "server": "ActiveMQ/5.17.2", "heart-beat": "0,0"}
        self.frames: list[Frame] = []
        self.answer: Callable[[Frame], list[Frame] | None] = lambda frame: None
        self.connections: list[Connection] = []
        self.port = 0

    def address(self, options: str = "") -> str:
        return f"stomp://127.0.0.1:{self.port}{options}"

    def sent(self, command: str) -> list[Frame]:
        return [frame for frame in self.frames if frame.command == command]

    async def got(self, command: str, count: int = 1) -> list[Frame]:
        """The frames of a command, as soon as there are so many."""
        async with asyncio.timeout(45):
            while len(found := self.sent(command)) < count:
                await asyncio.sleep(0.001)
        return found

    def deliver(self, headers: dict[str, str], body: bytes = b"") -> None:
        """To the one receiver there is, over the connection that it is subscribed on."""
        connection, id_ = next((c, id_) for c in reversed(self.connections) for id_ in c.subscribed)
        number = str(len(self.frames))
        named = {"subscription": id_, "message-id": f"ID:{number}", "ack": f"ack:{number}", "destination": "/queue/x"}
        connection.write(Frame("MESSAGE", named | headers, body))


class Connection(asyncio.Protocol):
    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.parser = Parser()
        self.subscribed: list[str] = []
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.broker.connections.append(self)

    def write(self, frame: Frame) -> None:
        self.transport.write(encode(self.parser.version, frame.command, frame.headers, frame.body))

    def data_received(self, data: bytes) -> None:
        for frame in self.parser.feed(data):
            self.broker.frames.append(frame)
            if frame.command == "SUBSCRIBE":
                self.subscribed.append(frame.headers["id"])
            answers = self.broker.answer(frame)
            if answers is None and frame.command == "CONNECT":
                answers = [Frame("CONNECTED", self.broker.greeting)]
            elif answers is None:
                answers = (
                    [Frame("RECEIPT", {"receipt-id": frame.headers["receipt"]})] if "receipt" in frame.headers else []
                )
            for answer in answers:
                self.write(answer)
            if frame.command == "CONNECT":
                self.parser.version = self.broker.greeting.get("version", "1.0")


@asynccontextmanager
async def standing() -> AsyncGenerator[Broker]:
    broker = Broker()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(broker), "127.0.0.1", 0)
    broker.port = server.sockets[0].getsockname()[1]
    try:
        yield broker
    finally:
        server.close()
        for connection in broker.connections:
            connection.transport.abort()
        await server.wait_closed()


@asynccontextmanager
async def connected(broker: Broker, options: str = "") -> AsyncGenerator[Carrier]:
    carrier = open_address(broker.address(options))
    assert isinstance(carrier, Carrier)
    await carrier.open()
    try:
        yield carrier
    finally:
        await carrier.close()


def error(frame: Frame, message: str, body: str = "") -> list[Frame]:
    return [Frame("ERROR", {"message": message, "receipt-id": frame.headers.get("receipt", "")}, body.encode())]


# Sending


async def test_what_is_sent_in_one_turn_goes_into_one_transaction_and_is_confirmed_by_its_commit() -> None:
    async with standing() as broker, connected(broker) as carrier:
        await asyncio.gather(*(carrier.send(Message(channel=WORK, body=b"%d" % number)) for number in range(5)))
        assert [frame.command for frame in broker.frames[1:]] == ["BEGIN", *["SEND"] * 5, "COMMIT"]
        assert len({frame.headers["transaction"] for frame in broker.frames[1:]}) == 1
        assert [frame.body for frame in broker.sent("SEND")] == [b"0", b"1", b"2", b"3", b"4"]


async def test_a_socket_that_breaks_while_one_waits_for_room_fails_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    full = [True]

    async def room(link: Link) -> None:
        full.clear()
        raise ConnectionResetError("by peer")

    async with standing() as broker, connected(broker) as carrier:
        monkeypatch.setattr(Link, "full", property(lambda link: bool(full)))
        monkeypatch.setattr(Link, "room", room)
        await carrier.send(Message(channel=WORK, body=b"waits"))
        assert [frame.body for frame in broker.sent("SEND")] == [b"waits"]


async def test_one_message_alone_needs_no_transaction_and_waits_for_its_receipt() -> None:
    held: list[Frame] = []
    async with standing() as broker, connected(broker) as carrier:
        broker.answer = lambda frame: held.append(frame) or [] if frame.command == "SEND" else None  # type: ignore[func-returns-value]
        sending = asyncio.create_task(carrier.send(Message(channel=WORK)))
        await broker.got("SEND")
        await carrier.native.request("ABORT", {"transaction": "none"})
        assert not sending.done(), "send() returned before the broker confirmed it"
        broker.connections[0].write(Frame("RECEIPT", {"receipt-id": held[0].headers["receipt"]}))
        await sending
        assert held[0].headers["persistent"] == "true"
        assert not broker.sent("BEGIN")


async def test_while_transactions_are_under_way_what_comes_is_gathered_for_the_next() -> None:
    async with standing() as broker, connected(broker) as carrier:
        broker.answer = lambda frame: [] if frame.command == "SEND" else None
        sends = []
        for number in range(2):
            sends.append(asyncio.create_task(carrier.send(Message(channel=WORK))))
            await broker.got("SEND", number + 1)
        for _ in range(8):  # each in a turn of its own
            sends.append(asyncio.create_task(carrier.send(Message(channel=WORK))))
            await carrier.native.request("ABORT", {"transaction": "none"})
        broker.answer = lambda frame: None
        broker.connections[0].write(Frame("RECEIPT", {"receipt-id": broker.sent("SEND")[0].headers["receipt"]}))
        await broker.got("COMMIT")
        assert len({frame.headers["transaction"] for frame in broker.sent("SEND")[2:]}) == 1
        broker.connections[0].write(Frame("RECEIPT", {"receipt-id": broker.sent("SEND")[1].headers["receipt"]}))
        await asyncio.gather(*sends)
        assert len(broker.sent("SEND")) == 10


async def test_what_spoils_a_transaction_spoils_no_other_message() -> None:
    bad: list[str] = []

    def answer(frame: Frame) -> list[Frame] | None:
        if frame.command == "SEND" and frame.body == b"bad":
            bad.append(frame.headers.get("transaction", ""))
            return error(frame, "it is bad") if "receipt" in frame.headers else []
        if frame.command == "COMMIT" and frame.headers["transaction"] in bad:
            return error(frame, "COMMIT FAILED: Transaction marked rollback only")
        return None

    async with standing() as broker, connected(broker) as carrier:
        broker.answer = answer
        outcomes = await asyncio.gather(
            *(carrier.send(Message(channel=WORK, body=body)) for body in (b"1", b"bad", b"2")), return_exceptions=True
        )
    assert (outcomes[0], outcomes[2]) == (None, None)
    assert isinstance(outcomes[1], Unavailable)
    assert str(outcomes[1]) == "work: the broker refused it: it is bad"


async def test_a_full_broker_is_told_as_a_full_channel() -> None:
    async with standing() as broker, connected(broker) as carrier:
        broker.answer = lambda frame: (
            error(frame, "Usage Manager Memory Limit reached", "javax.jms.ResourceAllocationException: ...")
            if frame.command == "SEND"
            else None
        )
        with pytest.raises(ChannelFull, match=r"work: the broker has no room for it: Usage Manager"):
            await carrier.send(Message(channel=WORK))


async def test_what_was_sent_and_not_confirmed_is_unknown_when_the_connection_breaks() -> None:
    async with standing() as broker, connected(broker) as carrier:
        broker.answer = lambda frame: [] if frame.command == "SEND" else None
        sending = asyncio.create_task(carrier.send(Message(channel=WORK)))
        await broker.got("SEND")
        broker.connections[0].transport.abort()
        with pytest.raises(ConnectionLost, match="the connection broke before the broker confirmed it"):
            await sending


async def test_a_receipt_behind_an_error_confirms_nothing() -> None:
    def answer(frame: Frame) -> list[Frame] | None:
        if frame.command in ("SEND", "SUBSCRIBE"):  # RabbitMQ does that, and hangs up
            receipt = Frame("RECEIPT", {"receipt-id": frame.headers["receipt"]})
            return [Frame("ERROR", {"message": "not_found"}, b"NOT_FOUND - no exchange 'x'"), receipt]
        return None

    async def receive(message: Message) -> Verdict:
        return DONE

    async with standing() as broker:
        broker.greeting["server"] = "RabbitMQ/3.10.8"
        async with connected(broker) as carrier:
            broker.answer = answer
            with pytest.raises(ConnectionLost, match="not_found: NOT_FOUND - no exchange 'x'"):
                await carrier.send(Message(channel=WORK))
            with pytest.raises(TransportError, match="not_found: NOT_FOUND - no exchange 'x'"):
                await carrier.serve(WORK, receive, "")


async def test_what_waits_behind_transactions_under_way_goes_out_on_the_next_connection() -> None:
    async with standing() as broker, connected(broker) as carrier:
        broker.answer = lambda frame: [] if frame.command == "SEND" else None
        under_way = []
        for number in range(2):
            under_way.append(asyncio.create_task(carrier.send(Message(channel=WORK))))
            await broker.got("SEND", number + 1)
        waiting = [asyncio.create_task(carrier.send(Message(channel=WORK, body=b"%d" % number))) for number in range(3)]
        await carrier.native.request("ABORT", {"transaction": "none"})  # what was written before it has arrived
        assert len(broker.sent("SEND")) == 2
        broker.answer = lambda frame: None
        broker.connections[0].transport.abort()
        await asyncio.gather(*waiting)
        assert [frame.body for frame in broker.sent("SEND")[2:]] == [b"0", b"1", b"2"]
        lost = await asyncio.gather(*under_way, return_exceptions=True)
        assert [type(error) for error in lost] == [ConnectionLost, ConnectionLost]


async def test_who_waits_no_longer_sends_nothing() -> None:
    async with standing() as broker, connected(broker) as carrier:
        sending = asyncio.create_task(carrier.send(Message(channel=WORK, body=b"no")))
        await asyncio.sleep(0)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await carrier.send(Message(channel=WORK, body=b"yes"))
        assert [frame.body for frame in broker.sent("SEND")] == [b"yes"]


async def test_a_send_while_the_broker_is_away_waits_until_its_time_is_up_and_says_that_it_was_not_sent() -> None:
    async with standing() as broker, connected(broker) as carrier:
        broker.answer = lambda frame: [] if frame.command == "CONNECT" else None
        broker.connections[0].transport.abort()
        await broker.got("CONNECT", 2)
        assert not carrier.connected
        with pytest.raises(Unavailable, match="not sent, the broker is away"):
            await carrier.send(Message(channel=WORK, until=carrier.clock.now() + 0.1))
        assert not broker.sent("SEND")


async def test_requests_and_replies_ask_for_no_receipt() -> None:
    async with standing() as broker, connected(broker) as carrier:
        await carrier.send(Message(channel=Channel("ask"), reply_to="replies.x"))
        await carrier.send(Message(channel=Channel("/remote-temp-queue/ID:x:1", temporary=True)))
        request, reply = await broker.got("SEND", 2)
        assert (request.headers["destination"], request.headers["reply-to"]) == ("/queue/ask", "/topic/replies.x")
        assert reply.headers["destination"] == "/remote-temp-queue/ID:x:1"
        for frame in (request, reply):
            assert not {"receipt", "transaction", "persistent"} & frame.headers.keys()


async def test_the_options_of_a_message_go_before_those_of_its_channel() -> None:
    async with standing() as broker, connected(broker) as carrier:
        channel = Channel("work", durable=True, native=(Publish(priority=7, headers={"JMSXGroupID": "a"}),))
        await carrier.send(Message(channel=channel))
        await carrier.send(Message(channel=Channel("work"), native=(Publish(priority=0),)))
        first, second = await broker.got("SEND", 2)
        assert (first.headers["priority"], first.headers["JMSXGroupID"]) == ("7", "a")
        assert second.headers["priority"] == "0"


# Greeting


@pytest.mark.parametrize(
    ("server", "says"),
    [("apollo/1.7", "apollo/1.7"), ("ActiveMQ-Artemis/2", "ActiveMQ-Artemis/2"), ("", "a broker that")],
)
async def test_a_broker_that_is_not_known_is_refused_unless_the_address_says_what_it_resembles(
    server: str, says: str
) -> None:
    async with standing() as broker:
        broker.greeting["server"] = server
        with pytest.raises(Refused, match=f"{says}.* is none that Quintet knows: say \\?dialect=activemq"):
            await open_address(broker.address()).open()
        async with connected(broker, "?dialect=activemq") as carrier:
            await carrier.send(Message(channel=WORK))


async def test_a_refused_password_is_told_at_once() -> None:
    async with standing() as broker:
        broker.answer = lambda frame: error(frame, "", "User name [u] or password is invalid.\n\tat org.apache...")
        with pytest.raises(Refused, match=r"the broker refuses us: User name \[u\] or password is invalid\.$"):
            await open_address(broker.address()).open()


async def test_a_broker_that_speaks_another_protocol_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quintet.connection.FIRST_SECONDS", 0.0)

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    carrier = open_address(f"stomp://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    opening = asyncio.create_task(carrier.open())
    with pytest.raises(Unavailable, match="is no command of STOMP") as caught:
        await opening
    assert isinstance(caught.value.__cause__, ProtocolError)
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2"])
async def test_each_version_names_what_it_acknowledges_as_that_version_does(version: str) -> None:
    async with standing() as broker:
        broker.greeting["version"] = version
        if version == "1.0":
            del broker.greeting["version"]
        async with connected(broker) as carrier:

            async def receive(message: Message) -> Verdict:
                return DONE

            await carrier.serve(WORK, receive, "")
            broker.deliver({"message-id": "ID-7", "ack": "ack-7"})
            (ack,) = await broker.got("ACK")
        named = {
            "1.0": {"message-id": "ID-7"},
            "1.1": {"message-id": "ID-7", "subscription": "1"},
            "1.2": {"id": "ack-7"},
        }
        assert ack.headers == named[version]


async def test_1_0_refuses_a_header_that_it_cannot_write_and_buries_what_has_one() -> None:
    async with standing() as broker:
        broker.greeting["version"] = "1.0"
        async with connected(broker) as carrier:
            with pytest.raises(InvalidMessage, match=r"work: STOMP 1\.0 cannot carry a line break"):
                await carrier.send(Message(channel=WORK, headers={"note": "two\nlines"}))
            named = Channel("work", durable=True, native=(Publish(headers={"a:b": "c"}),))
            with pytest.raises(InvalidMessage, match=r"work: STOMP 1\.0 cannot carry a colon in the name of a header"):
                await carrier.send(Message(channel=named))

            async def receive(message: Message) -> Verdict:
                return Dead("two\nlines")

            await carrier.serve(WORK, receive, "")
            broker.deliver({})
            (buried,) = await broker.got("SEND")
            assert buried.headers["quintet-dead-reason"] == "two lines"


@pytest.mark.parametrize("verdict", [Again(0.0), Dead("hopeless")], ids=repr)
@pytest.mark.parametrize("server", ["ActiveMQ/5.17.2", "RabbitMQ/3.10.8"])
async def test_the_copy_of_what_has_too_long_headers_is_written_without_them(server: str, verdict: Verdict) -> None:
    async def receive(message: Message) -> Verdict:
        return verdict

    async with standing() as broker:
        broker.greeting["server"] = server
        async with connected(broker) as carrier:
            await carrier.serve(WORK, receive, "")
            long = {"quintet-id": "i" * 30_000, "quintet-key": ":" * 70_000, "note": "v" * 70_000, "short": "kept"}
            broker.deliver(long | {f"n{number}": "v" * 9000 for number in range(9)})
            await broker.got("ACK")
            (copy,) = broker.sent("SEND")
        assert copy.headers["short"] == "kept"
        assert "note" not in copy.headers
        assert copy.headers["quintet-id"] == "i" * 1500
        assert len(encode("1.2", "SEND", copy.headers)) < 60_500


async def test_a_dead_letter_of_a_temporary_channel_is_written_however_long_its_headers_are() -> None:
    async def receive(message: Message) -> Verdict:
        return Dead("hopeless")

    async with standing() as broker, connected(broker) as carrier:
        await carrier.serve(Channel("screen", fanout=True, temporary=True), receive, "group")
        broker.deliver({"note": "v" * 20_000, "short": "kept"})
        await broker.got("ACK")
        (letter,) = broker.sent("SEND")
        assert (letter.headers["short"], letter.headers["quintet-dead-reason"]) == ("kept", "hopeless")
        assert "note" not in letter.headers


async def test_a_silent_broker_is_given_up_and_another_connection_made() -> None:
    told: list[tuple[str, str]] = []
    async with standing() as broker:
        broker.greeting["heart-beat"] = "50,50"
        async with connected(broker, "?heartbeat=0.05") as carrier:
            carrier.tell = lambda kind, subject, reason="": told.append((kind, str(reason)))
            broker.answer = lambda frame: None if frame.command == "CONNECT" else []
            await broker.got("CONNECT", 2)
            async with asyncio.timeout(45):
                while len(told) < 2:
                    await asyncio.sleep(0.001)
    assert told[0] == ("broker-lost", "the broker was silent for 0.1 s")
    assert told[1] == ("broker-back", "")


async def test_heart_beats_alone_are_no_life() -> None:
    async with standing() as broker:
        broker.greeting["heart-beat"] = "20,20"
        async with connected(broker, "?heartbeat=0.05"):
            broker.answer = lambda frame: None if frame.command == "CONNECT" else []
            async with asyncio.timeout(45):
                while len(broker.sent("CONNECT")) < 2:
                    broker.connections[0].transport.write(b"\n")
                    await asyncio.sleep(0.005)


# Receiving


async def test_a_delivery_that_broke_off_before_is_counted_before_anyone_begins() -> None:
    seen: list[Message] = []

    async def receive(message: Message) -> Verdict:
        seen.append(message)
        return DONE

    async with standing() as broker, connected(broker) as carrier:
        await carrier.serve(WORK, receive, "")
        broker.deliver(
            {"redelivered": "true", "quintet-attempt": "2", "quintet-crashed": "1", "quintet-id": "m"}, b"body"
        )
        await broker.got("COMMIT")
        (copy,) = broker.sent("SEND")
        (ack,) = broker.sent("ACK")
        assert not seen
        assert copy.headers["transaction"] == ack.headers["transaction"]
        assert (copy.headers["destination"], copy.headers["persistent"], copy.body) == ("/queue/work", "true", b"body")
        assert (copy.headers["quintet-attempt"], copy.headers["quintet-crashed"]) == ("3", "2")
        copied = {name: value for name, value in copy.headers.items() if name.startswith("quintet-")}
        broker.deliver(copied, b"body")
        await broker.got("ACK", 2)
        assert [(message.id, message.attempt) for message in seen] == [("m", 3)]


async def test_what_kills_its_receivers_again_and_again_is_a_dead_letter() -> None:
    seen: list[Message] = []

    async def receive(message: Message) -> Verdict:
        seen.append(message)
        return DONE

    async with standing() as broker, connected(broker) as carrier:
        await carrier.serve(WORK, receive, "")
        broker.deliver({"quintet-attempt": "22", "quintet-crashed": "21", "quintet-id": "m"})
        (dead,) = await broker.got("SEND")
        assert dead.headers["destination"] == "/queue/quintet.dead"
        assert "its receivers went away 21 times" in dead.headers["quintet-dead-reason"]
        assert not seen


async def test_what_a_restarted_broker_brings_again_is_marked_although_the_broker_has_forgotten_it() -> None:
    begun, held = asyncio.Event(), asyncio.Event()

    async def receive(message: Message) -> Verdict:
        begun.set()
        await held.wait()
        return DONE

    async with standing() as broker, connected(broker) as carrier:
        await carrier.serve(WORK, receive, "")
        broker.deliver({"message-id": "ID:7"})
        await begun.wait()
        for connection in broker.connections:
            connection.transport.abort()
        await broker.got("SUBSCRIBE", 2)
        broker.deliver({"message-id": "ID:7"})
        (copy,) = await broker.got("SEND")
        assert copy.headers["quintet-attempt"] == "2"
        held.set()


async def test_a_copy_that_waits_is_confirmed_before_what_it_stands_for_is_acknowledged() -> None:
    async def receive(message: Message) -> Verdict:
        return Again(0.5)

    def answer(frame: Frame) -> list[Frame] | None:
        if "AMQ_SCHEDULED_DELAY" in frame.headers and frame.headers["destination"].startswith("/temp-"):
            return [Frame("MESSAGE", {"subscription": "probe", "message-id": "1", "scheduledJobId": "1"})]
        return None

    async with standing() as broker, connected(broker) as carrier:
        broker.answer = answer
        await carrier.serve(WORK, receive, "")
        broker.deliver({})
        await broker.got("ACK")
        order = [frame for frame in broker.frames if frame.command in ("SEND", "ACK", "BEGIN")]
        assert [frame.command for frame in order] == ["SEND", "SEND", "ACK"]
        assert order[1].headers["AMQ_SCHEDULED_DELAY"] == "500"
        assert "transaction" not in order[1].headers


async def test_without_a_scheduler_what_waits_is_kept_here_unacknowledged() -> None:
    verdicts: list[Verdict] = [Again(0.1), DONE]

    async def receive(message: Message) -> Verdict:
        return verdicts.pop(0)

    def answer(frame: Frame) -> list[Frame] | None:
        if "AMQ_SCHEDULED_DELAY" in frame.headers:
            return [Frame("MESSAGE", {"subscription": "probe", "message-id": "1"})]
        return None

    async with standing() as broker, connected(broker) as carrier:
        broker.answer = answer
        await carrier.serve(WORK, receive, "")
        begun = carrier.clock.now()
        broker.deliver({}, b"later")
        await broker.got("COMMIT")
        assert carrier.clock.now() - begun > 0.09
        assert [frame.body for frame in broker.sent("SEND")] == [b"", b"later"]
        finding = (await carrier.examine())[-1]
        assert not finding.well
        assert 'schedulerSupport="true"' in finding.says


async def test_who_stops_to_receive_over_a_line_that_was_lost_misses_it_no_more() -> None:
    told: asyncio.Queue[str] = asyncio.Queue()

    async def receive(message: Message) -> Verdict:
        return DONE

    async with standing() as broker, connected(broker, "?dialect=rabbitmq") as carrier:
        carrier.tell = lambda kind, subject, reason="": told.put_nowait(kind)
        serving = await carrier.serve(WORK, receive, "")
        broker.answer = lambda frame: [] if frame.command == "CONNECT" else None
        broker.connections[-1].transport.abort()
        async with asyncio.timeout(45):
            assert await told.get() == "broker-lost"
        assert not carrier.connected
        await serving.stop()
        assert carrier.connected
        assert told.get_nowait() == "broker-back"
        broker.connections[0].transport.abort()
        async with asyncio.timeout(45):
            assert await told.get() == "broker-lost"
    assert told.empty()  # its end is no return


async def test_a_copy_that_the_broker_refuses_is_sent_again_and_only_then_acknowledged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("quintet.transports.stomp.REFUSED_PAUSE", 0.01)

    async def receive(message: Message) -> Verdict:
        return Dead("hopeless")

    async with standing() as broker, connected(broker) as carrier:
        broker.answer = lambda frame: error(frame, "it is full") if frame.command == "SEND" else None
        await carrier.serve(WORK, receive, "")
        broker.deliver({})
        await broker.got("SEND", 3)
        assert not broker.sent("ACK")
        broker.answer = lambda frame: None
        await broker.got("COMMIT")
        assert len(broker.sent("ACK")) == 1
        assert len(broker.sent("ABORT")) >= 3


@pytest.mark.parametrize("verdict", [Again(0.0), Again(1.0), Dead("hopeless"), DONE], ids=repr)
async def test_a_verdict_on_what_a_lost_connection_brought_keeps_nobody(verdict: Verdict) -> None:
    begun, held = asyncio.Event(), asyncio.Event()

    async def receive(message: Message) -> Verdict:
        begun.set()
        await held.wait()
        return verdict

    async with standing() as broker, connected(broker) as carrier:
        serving = await carrier.serve(WORK, receive, "", limit=1)
        broker.deliver({"message-id": "1"})
        await begun.wait()
        broker.connections[-1].transport.abort()
        await broker.got("SUBSCRIBE", 2)
        held.set()
        async with asyncio.timeout(45):
            await serving.stop()
        assert not broker.sent("ACK")


# Options, and what is refused at start-up


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("stomp://h?dialect=artemis", "option dialect='artemis' must be activemq or rabbitmq"),
        ("stomp://h?heartbeat=-1", "option heartbeat must be a number of"),
        ("stomp://h?heartbeat=often", "option heartbeat='often' is not a number"),
        ("stomps://h?verify=maybe", "option verify='maybe' must be on or off"),
        ("stomp://h?prefetch=3", "unknown option prefetch"),
    ],
)
def test_an_address_that_makes_no_sense_is_refused(address: str, sentence: str) -> None:
    with pytest.raises(AddressError, match=sentence):
        open_address(address)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Publish(priority=10), "priority must be 0 to 9"),
        (lambda: Publish(headers={"receipt": "1"}), "the header receipt is not for you to write"),
        (lambda: Subscription(prefetch=-1), "prefetch must be 1 or more"),
        (lambda: Subscription(headers={"ack": "auto"}), "the header ack is not for you to write"),
    ],
)
def test_options_that_make_no_sense_are_refused(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (Subscription(selector="region = 'EU'"), "work at stomp://.*: rabbitmq's STOMP has no selectors"),
        (Subscription(exclusive=True), "rabbitmq's STOMP has no exclusive receivers"),
    ],
)
async def test_what_the_broker_has_not_is_refused_at_start_up(options: Subscription, sentence: str) -> None:
    async def receive(message: Message) -> Verdict:
        return DONE

    async with standing() as broker:
        broker.greeting["server"] = "RabbitMQ/3.10.8"
        async with connected(broker) as carrier:
            with pytest.raises(ConfigurationError, match=sentence):
                await carrier.serve(Channel("work", native=(options,)), receive, "")


async def test_a_subscription_that_is_refused_is_told_and_leaves_nothing_behind() -> None:
    async def receive(message: Message) -> Verdict:
        return DONE

    async with standing() as broker, connected(broker) as carrier:
        broker.answer = lambda frame: error(frame, "no such thing") if frame.command == "SUBSCRIBE" else None
        sentence = rf"^stomp://127\.0\.0\.1:{broker.port}: the broker does not let us receive work: no such thing$"
        with pytest.raises(TransportError, match=sentence):
            await carrier.serve(WORK, receive, "")
        broker.answer = lambda frame: None
        for connection in broker.connections:
            connection.transport.abort()
        await broker.got("CONNECT", 4)
        await carrier.send(Message(channel=WORK))
        assert len(broker.sent("SUBSCRIBE")) == 1


async def test_a_subscription_that_is_refused_after_a_reconnect_keeps_no_other_from_being_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("quintet.wire.stomp_session.REFUSED_PAUSE", 0.01)
    told: list[str] = []

    async def receive(message: Message) -> Verdict:
        return DONE

    async with standing() as broker, connected(broker) as carrier:
        await carrier.serve(WORK, receive, "")
        await carrier.serve(Channel("other"), receive, "")
        back = asyncio.Event()

        def tell(kind: str, subject: str, reason: object = "") -> None:
            told.append(f"{kind}: {reason}")
            if kind == "broker-back":
                back.set()

        carrier.tell = tell
        broker.answer = lambda frame: (
            error(frame, "no such thing")
            if frame.command == "SUBSCRIBE" and frame.headers["destination"] == "/queue/work"
            else None
        )
        broker.connections[1].transport.abort()
        await broker.got("SUBSCRIBE", 5)  # it is tried again and again
        assert broker.connections[-1].subscribed[:2] == ["1", "2"]
        broker.deliver({"subscription": "2", "ack": "served"})
        (ack,) = await broker.got("ACK")
        assert ack.headers["id"] == "served"
        assert not carrier.connected
        assert "broker-lost: the broker does not let us receive work: no such thing" in told
        back.clear()
        broker.answer = lambda frame: None
        async with asyncio.timeout(45):
            await back.wait()
        assert carrier.connected
        broker.deliver({"subscription": "1"})
        await broker.got("ACK", 2)


async def test_options_of_a_subscription_reach_the_broker() -> None:
    async def receive(message: Message) -> Verdict:
        return DONE

    options = Subscription(selector="a > 1", exclusive=True, prefetch=7, headers={"activemq.priority": "3"})
    async with standing() as broker, connected(broker) as carrier:
        await carrier.serve(Channel("work", native=(options,)), receive, "")
        headers = broker.sent("SUBSCRIBE")[0].headers
        assert headers["selector"] == "a > 1"
        assert headers["activemq.exclusive"] == "true"
        assert headers["activemq.prefetchSize"] == "7"
        assert headers["activemq.priority"] == "3"


async def test_the_native_session_has_the_broker_do_anything() -> None:
    async with standing() as broker, connected(broker) as carrier:
        native = carrier.native
        assert isinstance(native, Session)
        assert repr(native) == "<session with ActiveMQ/5.17.2, STOMP 1.2>"
        await native.request("SEND", {"destination": "/queue/a,b", "colour": "a:b"}, b"to both")
        frame = broker.sent("SEND")[0]
        assert (frame.headers["destination"], frame.headers["colour"], frame.body) == ("/queue/a,b", "a:b", b"to both")
    with pytest.raises(Unavailable):
        _ = carrier.native


# How it looks on the wire


@pytest.mark.parametrize(
    ("channel", "group", "activemq", "rabbitmq"),
    [
        (Channel("trips.v1.create"), "", "/queue/trips.v1.create", "/queue/trips.v1.create"),
        (Channel("a/b %*>"), "", "/queue/a%2Fb%20%25%2A%3E", "/queue/a%2Fb %25*>"),
        (Channel("e", fanout=True), "", "/topic/VirtualTopic.e", "/topic/e"),
        (Channel("e", fanout=True), "g.x", "/queue/Consumer.g%2Ex.VirtualTopic.e", "/amq/queue/e@g.x"),
        (Channel("r", temporary=True), "", "/topic/r", "/topic/r"),
        (Channel("/queue/own", temporary=True), "", "/queue/own", "/queue/own"),
        (Channel("quintet.dead", durable=True), "", "/queue/quintet.dead", "/queue/quintet.dead.stomp"),
    ],
)
def test_where_a_message_is_sent_to(channel: Channel, group: str, activemq: str, rabbitmq: str) -> None:
    assert destination(ACTIVEMQ, channel, group) == activemq
    assert destination(RABBITMQ, channel, group) == rabbitmq


def test_what_a_group_subscribes_to() -> None:
    events = Channel("e.x", fanout=True)
    assert subscription(ACTIVEMQ, events, "a.b") == {"destination": "/queue/Consumer.a%2Eb.VirtualTopic.e.x"}
    assert subscription(RABBITMQ, events, "a.b") == {
        "destination": "/topic/e.x",
        "durable": "true",
        "auto-delete": "false",
        "x-queue-name": "e.x@a.b",
    }
    temporary = Channel("e.x", fanout=True, temporary=True)
    assert subscription(ACTIVEMQ, temporary, "a") == {"destination": "/topic/VirtualTopic.e.x"}
    assert subscription(RABBITMQ, temporary, "a") == {"destination": "/topic/e.x"}


@pytest.mark.parametrize(
    ("after", "wait"), [(0.0, "10"), (0.011, "15"), (0.4, "500"), (60.0, "70000"), (1e9, "10000000")]
)
def test_a_delay_is_rounded_up_to_a_queue_that_there_may_be(after: float, wait: str) -> None:
    headers = waiting_room(RABBITMQ, Channel("e", fanout=True), "g", after)
    assert headers["destination"] == f"/queue/quintet.again.{wait}.e@g"
    assert (headers["x-message-ttl"], headers["x-dead-letter-routing-key"]) == (wait, "e@g")
    assert waiting_room(RABBITMQ, Channel("w"), "", after)["x-dead-letter-routing-key"] == "w"


class Standing:
    """A clock that stands."""

    def now(self) -> float:
        return 100.0

    def wall(self) -> float:
        return 1_700_000_000.0

    def from_wall(self, wall: float | None) -> float | None:
        return None if wall is None else 100.0 + wall - 1_700_000_000.0


CLOCK: Any = Standing()


@pytest.mark.parametrize("dialect", [ACTIVEMQ, RABBITMQ], ids=lambda dialect: dialect.name)
@pytest.mark.parametrize("durable", [True, False])
def test_a_message_comes_back_out_of_its_headers(dialect: Any, durable: bool) -> None:
    message = Message(
        channel=WORK,
        body=b"{}",
        id="m-1",
        operation="work.do",
        sender="shop",
        media_type="application/json",
        version="1.2",
        key="k",
        correlation_id="c",
        status="remote",
        deadline=130.25,
        attempt=4,
        headers={"x": "1", "priority": "u=1", "destination": "there", "quintet-key": "mine", ":path": "/"},
    )
    headers = headers_of(message, dialect, CLOCK, durable=durable, keyed=True)
    read = message_of(headers, b"{}", WORK, CLOCK)
    del message.headers[":path"]
    assert read == message
    assert headers["type"] == "work.do"
    assert headers.get("JMSXGroupID") == ("k" if dialect is ACTIVEMQ else None)
    assert headers.get("expires") == (None if durable or dialect is RABBITMQ else "1700000030250")
    assert headers.get("expiration") == ("30250" if dialect is RABBITMQ and not durable else None)


def test_what_a_foreign_client_sends_is_a_message_whatever_it_writes() -> None:
    headers = {
        "destination": "/queue/work",
        "message-id": "ID:host-1:1",
        "subscription": "1",
        "quintet-attempt": "many",
        "quintet-deadline": "tomorrow",
        "quintet-crashed": "nan",
        "expires": "0",
        "priority": "4",
        "reply-to": "/remote-temp-queue/ID:1",
        "colour": "red",
    }
    message = message_of(headers, b"{}", WORK, CLOCK)
    assert (message.id, message.attempt, message.deadline, message.media_type) == ("ID:host-1:1", 1, None, "")
    assert (message.reply_to, message.headers) == ("/remote-temp-queue/ID:1", {"colour": "red"})
    assert message_of({"quintet-attempt": "inf", "quintet-deadline": "nan"}, b"", WORK, CLOCK).attempt == 1


def test_no_header_of_a_user_means_anything_to_a_broker() -> None:
    message = Message(channel=WORK, headers=dict.fromkeys(TAKEN, "x"))
    headers = headers_of(message, ACTIVEMQ, CLOCK, durable=True, keyed=False)
    assert set(headers) == {f"quintet-header-{name}" for name in TAKEN}
    assert message_of(headers, b"", WORK, CLOCK).headers == message.headers


@pytest.mark.parametrize("dialect", [ACTIVEMQ, RABBITMQ], ids=lambda dialect: dialect.name)
def test_the_docs_tell_where_messages_are_sent(dialect: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "stomp.md").read_text()
    places = [dialect.queue, dialect.events, dialect.group, dialect.copy, dialect.dead, f"{dialect.replies}..."]
    headers = [f"`{name}:{value}`" for name, value in dialect.group_headers.items()]
    assert [place for place in (*(f"`{place}`" for place in places), *headers) if place not in page] == []
