"""An AMQP connection without a broker: its greeting, channels and confirmations; and the queues that it wants."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quintet.connection import Lost, Refused
from quintet.errors import (
    AddressError,
    ConfigurationError,
    ConnectionLost,
    InvalidMessage,
    Overloaded,
    ProtocolError,
    TransportError,
)
from quintet.message import Channel, Message
from quintet.testing import FakeClock
from quintet.transport import open_address
from quintet.transports.amqp import Publish, Queue
from quintet.wire import amqp, amqp_message, amqp_topology
from quintet.wire.amqp import Confirm, Method, Parser
from quintet.wire.amqp_message import properties
from quintet.wire.amqp_session import Closed, Line, Outlet, Unroutable, Wire
from quintet.wire.amqp_topology import WAITS, place_of, wait


class Broker:
    """The other end of a link: answers what it is asked, as a table says, and remembers it."""

    full = False

    def __init__(self) -> None:
        self.asked: list[Method] = []
        self.dropped: Exception | None = None
        self.beats: list[float] = []
        self.session: Wire | None = None
        self.answers: dict[str, tuple[str, dict[str, Any]]] = {
            "connection.start-ok": ("connection.tune", {"channel_max": 2047, "frame_max": 131072, "heartbeat": 60}),
            "connection.open": ("connection.open-ok", {}),
            "channel.open": ("channel.open-ok", {}),
            "channel.close": ("channel.close-ok", {}),
            "confirm.select": ("confirm.select-ok", {}),
            "basic.qos": ("basic.qos-ok", {}),
        }
        self.start = {"server_properties": {"version": "3.10.8"}, "mechanisms": b"PLAIN AMQPLAIN"}

    def write(self, data: bytes) -> None:
        if data == amqp.PROTOCOL_HEADER:
            self.say(0, "connection.start", **self.start)
            return
        for event in Parser().feed(data.partition(b"\x02")[0] if data[7:11] == b"\0\x3c\0\x28" else data):
            if isinstance(event, Method):
                self.asked.append(event)
                if answer := self.answers.get(event.name):
                    self.say(event.channel, answer[0], **answer[1])

    def say(self, channel: int, name: str, **fields: Any) -> None:
        assert self.session
        asyncio.get_running_loop().call_soon(self.session.received, amqp.method(channel, name, **fields))

    def drop(self, error: Exception) -> None:
        assert self.session
        if self.dropped is None:
            self.dropped = error
            asyncio.get_running_loop().call_soon(self.session.lost, error)

    def beat(self, every: float, data: bytes) -> None:
        self.beats.append(every)

    def expect(self, within: float) -> None:
        self.beats.append(within)


def wire_at(broker: Broker, beat: int = 10, *, external: bool = False) -> Wire:
    options: dict[str, Any] = {"name": "test", "vhost": "/", "beat": beat, "external": external}
    wire = broker.session = Wire(broker, FakeClock(), "amqp://there", "guest", "guest", **options)  # type: ignore[arg-type]
    return wire


async def greeted(broker: Broker | None = None) -> Wire:
    wire = wire_at(broker or Broker())
    await wire.greet()
    return wire


# The greeting


async def test_it_says_who_it_is_and_agrees_to_the_smaller_frame_and_the_own_heart_beat() -> None:
    broker = Broker()
    broker.answers["connection.start-ok"] = ("connection.tune", {"channel_max": 8, "frame_max": 8192, "heartbeat": 60})
    wire = await greeted(broker)
    start, tune, opened = broker.asked
    assert start.fields["response"] == b"\0guest\0guest"
    assert start.fields["client_properties"]["capabilities"]["connection.blocked"] is True
    assert tune.fields == {"channel_max": 8, "frame_max": 8192, "heartbeat": 10}
    assert opened.fields["virtual_host"] == "/"
    assert (wire.frame_max, broker.beats) == (8192, [5, 10])


async def test_a_broker_that_names_no_limits_gets_ours_and_no_heart_beat_is_none() -> None:
    broker = Broker()
    broker.answers["connection.start-ok"] = ("connection.tune", {"channel_max": 0, "frame_max": 0, "heartbeat": 0})
    wire = wire_at(broker, beat=0)
    await wire.greet()
    assert (wire.frame_max, broker.beats) == (amqp.FRAME_MAX, [])


async def test_a_broker_without_our_way_to_log_in_is_refused() -> None:
    with pytest.raises(Refused, match=r"^amqp://there: .*does not know EXTERNAL, only PLAIN AMQPLAIN; change"):
        await wire_at(Broker(), external=True).greet()


async def test_a_password_that_the_broker_refuses_is_told_with_its_words() -> None:
    broker = Broker()
    broker.answers["connection.start-ok"] = (
        "connection.close",
        {"reply_code": 403, "reply_text": "ACCESS_REFUSED - no"},
    )
    with pytest.raises(Refused, match=r"^amqp://there: ACCESS_REFUSED - no; check user and password"):
        await wire_at(broker).greet()


# Its channels


async def test_a_channel_that_the_broker_closes_fails_what_was_asked_on_it_and_nothing_else() -> None:
    broker = Broker()
    wire = await greeted(broker)
    bad, good = await wire.line(), await wire.line()
    ended: list[Exception] = []
    bad.ended = ended.append
    asked = [bad.call("queue.declare", queue="a"), bad.call("queue.bind", queue="a")]
    other = good.call("queue.declare", queue="b")
    broker.say(bad.number, "channel.close", reply_code=406, reply_text="PRECONDITION_FAILED - inequivalent arg")
    broker.say(good.number, "queue.declare-ok", queue="b", message_count=3)
    for one in asked:
        with pytest.raises(Closed, match="inequivalent arg") as caught:
            await one
        assert caught.value.code == 406
    assert (await other).fields["message_count"] == 3
    assert len(ended) == 1
    assert broker.asked[-1].name == "channel.close-ok"
    with pytest.raises(Closed):
        await bad.call("queue.declare", queue="a")


async def test_answers_come_in_the_order_of_what_was_asked_also_where_the_asker_has_left() -> None:
    broker = Broker()
    wire = await greeted(broker)
    line = await wire.line()
    first, second = line.call("queue.declare", queue="a"), line.call("queue.declare", queue="b")
    first.cancel()
    broker.say(line.number, "queue.declare-ok", queue="a")
    broker.say(line.number, "queue.declare-ok", queue="b")
    assert (await second).fields["queue"] == "b"


async def test_what_cannot_be_written_is_refused_and_the_next_gets_its_own_answer() -> None:
    broker = Broker()
    wire = await greeted(broker)
    line = await wire.line()
    for wrong in (
        {"queue": "q" * 300},
        {"queue": "\udcff"},
        {"arguments": {"x-expires": datetime.timedelta(seconds=5)}},
        {"arguments": {"x-factor": float("nan")}},
    ):
        with pytest.raises(InvalidMessage):
            line.call("queue.declare", **wrong)
    with pytest.raises(TypeError):
        line.call("queue.declare", nonsense=True)
    asked = line.call("queue.declare", queue="a")
    broker.say(line.number, "queue.declare-ok", queue="a")
    assert (await asked).fields["queue"] == "a"
    await line.close()


async def test_a_channel_whose_opening_or_closing_nobody_waits_for_gives_its_number_back() -> None:
    broker = Broker()
    wire = await greeted(broker)
    opening = asyncio.ensure_future(wire.line())
    await asyncio.sleep(0)  # one turn: it has asked
    opening.cancel()
    line = await wire.line()
    closing = asyncio.ensure_future(line.close())
    await asyncio.sleep(0)  # one turn: it has asked
    closing.cancel()
    await line.close()
    await wire.call("basic.qos")  # answered after all that
    assert list(wire.lines) == [0]
    assert [method.name for method in broker.asked].count("channel.close") == 3, "each once"


async def test_an_answer_that_nobody_asked_for_is_no_amqp() -> None:
    wire = await greeted()
    line = await wire.line()
    with pytest.raises(ProtocolError, match=r"queue\.declare-ok that was not asked for"):
        wire.received(amqp.method(line.number, "queue.declare-ok"))
    with pytest.raises(ProtocolError, match="confirmation"):
        wire.received(amqp.settle(line.number, 1))


async def test_numbers_of_channels_are_used_again_and_there_are_no_more_than_agreed() -> None:
    broker = Broker()
    broker.answers["connection.start-ok"] = ("connection.tune", {"channel_max": 2, "frame_max": 0, "heartbeat": 0})
    wire = await greeted(broker)
    one, two = await wire.line(), await wire.line()
    with pytest.raises(TransportError, match="allows 2 AMQP channels"):
        await wire.line()
    await one.close()
    again = await wire.line()
    assert (one.number, two.number, again.number) == (1, 2, 1)


async def test_what_the_broker_says_of_being_blocked_is_known_and_waited_for() -> None:
    broker = Broker()
    wire = await greeted(broker)
    wire.received(amqp.method(0, "connection.blocked", reason="low on disk"))
    assert wire.blocked == "low on disk"
    waiting = asyncio.ensure_future(wire.unblocked())
    await asyncio.sleep(0)
    assert not waiting.done()
    wire.received(amqp.method(0, "connection.unblocked"))
    await waiting
    wire.received(amqp.method(0, "connection.blocked", reason="low on memory"))
    waiting = asyncio.ensure_future(wire.unblocked())
    await asyncio.sleep(0)
    wire.lost(Lost("gone"))
    with pytest.raises(Lost, match="gone"):
        await waiting


async def test_flow_control_is_answered_and_blocks() -> None:
    broker = Broker()
    wire = await greeted(broker)
    line = await wire.line()
    wire.received(amqp.method(line.number, "channel.flow", active=False))
    assert wire.blocked
    wire.received(amqp.method(line.number, "channel.flow", active=True))
    assert not wire.blocked
    assert [method.name for method in broker.asked[-2:]] == ["channel.flow-ok"] * 2


async def test_a_connection_that_the_broker_closes_is_given_up_with_its_words() -> None:
    broker = Broker()
    wire = await greeted(broker)
    line = await wire.line()
    asked = line.call("queue.declare", queue="a")
    wire.received(amqp.method(0, "connection.close", reply_code=320, reply_text="CONNECTION_FORCED - bye"))
    with pytest.raises(Lost, match="CONNECTION_FORCED - bye"):
        await asked
    with pytest.raises(Lost):
        await wire.line()


# Confirmations


async def outlet_of(broker: Broker) -> Outlet:
    wire = await greeted(broker)
    outlet = await wire.open(Outlet)
    await outlet.begin()
    return outlet


async def test_one_confirmation_may_stand_for_many_and_none_is_taken_twice() -> None:
    outlet = await outlet_of(Broker())
    sent = [outlet.send(b"", str(number)) for number in range(5)]
    outlet.confirm(Confirm(1, 2, False, True))
    assert [future.done() for future in sent] == [False, True, False, False, False]
    outlet.confirm(Confirm(1, 4, True, True))
    assert [future.done() for future in sent] == [True, True, True, True, False]
    outlet.confirm(Confirm(1, 0, True, False))  # "all so far"
    with pytest.raises(Overloaded, match="refused"):
        await sent[4]
    with pytest.raises(ProtocolError, match="what was not published"):
        outlet.confirm(Confirm(1, 4, False, True))


async def test_a_message_that_came_back_is_confirmed_as_unroutable_and_only_that() -> None:
    outlet = await outlet_of(Broker())
    routed, unroutable = outlet.send(b"", "m-1"), outlet.send(b"", "m-2")
    header = properties(Message(channel=Channel("x"), id="m-2"), durable=True)
    returned = amqp.method(outlet.number, "basic.return", reply_code=312, reply_text="NO_ROUTE", routing_key="x")
    outlet.session.received(amqp.content(returned, outlet.number, header, b"body", 4096))
    outlet.session.received(amqp.settle(outlet.number, 2, "basic.ack", 1))
    await routed
    with pytest.raises(Unroutable):
        await unroutable


async def test_what_was_not_confirmed_when_the_connection_broke_is_unknown() -> None:
    outlet = await outlet_of(Broker())
    sent, given_up = outlet.send(b"", "1"), outlet.send(b"", "2")
    given_up.cancel()
    outlet.session.lost(Lost("cut"))
    with pytest.raises(ConnectionLost, match="sent, but not confirmed: cut"):
        await sent


# The queues


def test_what_lasts_is_in_quorum_queues_and_the_rest_goes_when_it_is_unused() -> None:
    durable = place_of(Channel("a", durable=True), "", lasting=False)
    assert (durable.queue, durable.durable, durable.exclusive) == ("a", True, False)
    assert durable.arguments["x-queue-type"] == "quorum"
    assert durable.arguments["x-delivery-limit"] > 1000, "RabbitMQ 4 would drop it after 20 deliveries"
    transient = place_of(Channel("a"), "", lasting=False)
    assert (transient.durable, transient.arguments) == (False, {"x-queue-type": "classic", "x-expires": 600_000})
    assert place_of(Channel("a"), "", lasting=True).durable, "RabbitMQ 4 wants that of queues that are shared"
    group = place_of(Channel("a", fanout=True, durable=True, keyed=True), "g", lasting=False)
    assert (group.queue, group.arguments["x-single-active-consumer"]) == ("a@g", True)
    own = place_of(Channel("a", fanout=True, temporary=True), "g", lasting=False, suffix=".1")
    assert (own.queue, own.exclusive, own.durable) == ("a@g.1", True, False)


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        (Queue(max_priority=5), {"x-queue-type": "classic", "x-max-priority": 5}),
        (Queue(exclusive=True), {"x-queue-type": "quorum", "x-single-active-consumer": True}),
        (Queue(max_length=7), {"x-max-length": 7, "x-overflow": "drop-head"}),
        (Queue(max_bytes=7, overflow="drop-head"), {"x-max-length-bytes": 7, "x-overflow": "drop-head"}),
        (Queue(message_ttl=1.5), {"x-message-ttl": 1500}),
        (Queue(consumer_timeout=7200), {"x-consumer-timeout": 7_200_000}),
        (Queue(type="stream"), {"x-queue-type": "stream"}),
        (Queue(arguments={"x-queue-leader-locator": "balanced"}), {"x-queue-leader-locator": "balanced"}),
    ],
    ids=repr,
)
def test_an_option_is_an_argument_of_the_queue(option: Queue, arguments: dict[str, Any]) -> None:
    found = place_of(Channel("a", fanout=True, durable=True, native=(option,)), "g", lasting=False).arguments
    assert {name: found.get(name) for name in arguments} == arguments


def test_a_full_queue_of_one_receiver_refuses_what_comes() -> None:
    full = place_of(Channel("a", durable=True, native=(Queue(max_length=7),)), "", lasting=False)
    assert full.arguments["x-overflow"] == "reject-publish"


def test_a_stream_is_refused_where_each_message_is_for_one_receiver() -> None:
    with pytest.raises(ConfigurationError, match="trips: a stream is for events"):
        place_of(Channel("trips", durable=True, native=(Queue(type="stream"),)), "", lasting=False)


def test_options_of_consumers_are_arguments_of_theirs() -> None:
    native = (Queue(type="stream", stream_offset="first", consumer_priority=3),)
    place = place_of(Channel("a", fanout=True, durable=True, native=native), "g", lasting=False)
    assert place.consumer == {"x-priority": 3, "x-stream-offset": "first"}


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda: Queue(max_priority=256), "1 to 255"),
        (lambda: Queue(max_priority=5, type="quorum"), "only a classic queue has priorities"),
        (lambda: Queue(stream_offset="first"), "stream_offset is for type='stream'"),
        (lambda: Queue(type="stream", exclusive=True), "no stream can do that"),
        (lambda: Queue(max_length=-1), "a limit is negative"),
        (lambda: Publish(priority=256), "0 to 255"),
    ],
)
def test_options_that_contradict_themselves_are_refused_where_they_are_written(
    wrong: Callable[[], object], why: str
) -> None:
    with pytest.raises(ConfigurationError, match=why):
        wrong()


def test_a_wait_is_not_shorter_than_asked_and_at_most_half_as_long_again() -> None:
    for seconds in (0.001, 0.02, 0.1, 0.4, 0.41, 3.0, 60.0, 3600.0):
        assert 1000 * seconds <= wait(seconds) <= max(25, 1500 * seconds)
    assert wait(10**9) == WAITS[-1]


@pytest.mark.parametrize("options", ["heartbeat=x", "heartbeat=-1", "auth=kerberos", "verify=maybe", "prefetch=3"])
def test_an_option_of_the_address_that_makes_no_sense_is_refused(options: str) -> None:
    with pytest.raises(AddressError):
        open_address(f"amqps://localhost/?{options}")


def test_objects_show_themselves() -> None:
    async def look() -> None:
        wire = await greeted()
        line = await wire.line()
        assert repr(line) == "<AMQP channel 1>"
        assert repr(wire) == "<AMQP connection test, 1 channels, up>"
        line.end(Closed(404, "NOT_FOUND"))
        assert repr(line) == "<AMQP channel 1, closed: NOT_FOUND>"
        assert isinstance(line, Line)

    asyncio.run(look())


def test_the_docs_show_the_tables_as_they_are() -> None:
    page = (Path(__file__).parents[2] / "docs" / "amqp.md").read_text()
    for module in (amqp_topology, amqp_message):
        rows = [line for line in (module.__doc__ or "").splitlines() if line.startswith("|")]
        assert rows
        assert [row for row in rows if row not in page] == []
