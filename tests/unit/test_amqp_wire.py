"""AMQP as bytes: any split gives the same events, garbage is refused, and what is written is read."""

from __future__ import annotations

import contextlib
import datetime
import tracemalloc
from decimal import Decimal
from typing import Any

import pytest
from costs import grows_in_proportion
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import astuple
from pamqp import commands, frame, header  # the frames of aio-pika: what others make of ours

from quintet.clock import SYSTEM
from quintet.errors import InvalidMessage, ProtocolError
from quintet.message import Channel, Message
from quintet.wire import amqp
from quintet.wire.amqp import HEARTBEAT, METHODS, Confirm, Content, Parser
from quintet.wire.amqp_message import properties, properties_of, read

CHANNEL = Channel("trips.v1.create", durable=True)


def delivery(body: bytes, message: Message | None = None, *, channel: int = 1, tag: int = 1, most: int = 4096) -> bytes:
    place = {"exchange": "quintet", "routing_key": CHANNEL.name}
    start = amqp.method(channel, "basic.deliver", consumer_tag="q-1", delivery_tag=tag, redelivered=True, **place)
    return amqp.content(start, channel, properties(message or Message(channel=CHANNEL), durable=True), body, most)


def begin(channel: int = 1) -> bytes:
    """A delivery of which the content is still to come."""
    return amqp.method(channel, "basic.deliver", consumer_tag="q-1", delivery_tag=1)


def seen(events: list[amqp.Event]) -> list[tuple[Any, ...]]:
    return [(type(event).__name__, *astuple(event)) for event in events]


def message_of(message: Message, **options: Any) -> Message:
    """The message as it comes out at the other end."""
    (content,) = Parser().feed(
        amqp.content(
            amqp.publishing(1, "quintet", "x").replace(b"\x00\x3c\x00\x28\x00\x00", b"\x00\x3c\x00\x32\x00\x00", 1),
            1,
            properties(message, durable=True, **options),
            message.body,
            4096,
        )
    )
    assert isinstance(content, Content)
    return read(content, CHANNEL, SYSTEM)


# frames

BODIES = st.binary(max_size=20) | st.integers(0, 12_000).map(lambda size: bytes(range(250)) * (size // 250))
STREAMS = st.lists(
    st.one_of(
        BODIES.map(delivery),
        st.tuples(BODIES, st.integers(1, 3)).map(lambda both: delivery(both[0], channel=both[1])),
        st.just(HEARTBEAT),
        st.integers(0, 2**64 - 1).map(lambda tag: amqp.settle(3, tag, "basic.ack", 1)),
        st.just(amqp.settle(1, 7, "basic.nack")),
        st.just(amqp.method(1, "queue.declare-ok", queue="q", message_count=3, consumer_count=1)),
        st.just(amqp.method(0, "connection.start", server_properties={"version": "3.10.8"}, mechanisms=b"PLAIN")),
    ),
    max_size=6,
).map(b"".join)


@given(STREAMS, st.data())
def test_any_split_of_the_stream_gives_the_same_events(stream: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=30)))
    parser, events = Parser(), list[amqp.Event]()
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        events += parser.feed(stream[start:end])
    assert seen(events) == seen(Parser().feed(stream))


def test_byte_by_byte_is_a_split_like_any_other() -> None:
    stream = delivery(b"x" * 9000) + HEARTBEAT + delivery(b"") + amqp.settle(1, 9)
    parser, events = Parser(), list[amqp.Event]()
    for position in range(len(stream)):
        events += parser.feed(stream[position : position + 1])
    assert [event.body for event in events if isinstance(event, Content)] == [b"x" * 9000, b""]
    assert seen(events) == seen(Parser().feed(stream))


def drain(parser: Parser, data: bytes) -> None:
    """Takes all apart that came; ProtocolError is all that it may raise."""
    with contextlib.suppress(ProtocolError):
        for event in parser.feed(data):
            if isinstance(event, Content):
                _ = event.fields
                _ = properties_of(event)
                read(event, CHANNEL, SYSTEM)


@given(st.binary(max_size=200))
def test_garbage_is_refused_and_nothing_else_happens(data: bytes) -> None:
    drain(Parser(), data)


@given(STREAMS, st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=5))
def test_a_stream_with_wrong_bytes_in_it_is_read_or_refused(stream: bytes, faults: list[tuple[int, int]]) -> None:
    spoilt = bytearray(stream)
    for position, byte in faults:
        if spoilt:
            spoilt[position % len(spoilt)] = byte
    drain(Parser(), bytes(spoilt))


@given(st.sampled_from([1, 2]), st.sampled_from(sorted(METHODS)), st.binary(max_size=60))
def test_garbage_in_a_well_formed_frame_is_refused_too(kind: int, name: str, payload: bytes) -> None:
    class_, number, _ = METHODS[name]
    start = (class_ << 16 | number).to_bytes(4, "big") if kind == 1 else b"\0\x3c\0\0\0\0\0\0\0\0\0\1"
    body = start + payload
    before = begin() if kind == 2 else b""
    drain(Parser(), before + bytes((kind,)) + b"\0\1" + len(body).to_bytes(4, "big") + body + b"\xce")


@pytest.mark.parametrize(
    "stream",
    [
        b"\x01\x00\x01\xff\xff\xff\xff",  # a frame of 4 GB
        b"\x03\x00\x01\x00\x02\x00\x00",  # one a little too large
        begin() + b"\x02\0\1\0\0\0\x0e\0\x3c\0\0" + b"\x7f" + b"\xff" * 7 + b"\0\0\xce",  # a body of 8 EB
    ],
)
def test_a_huge_length_is_refused_before_it_comes(stream: bytes) -> None:
    with pytest.raises(ProtocolError):
        Parser().feed(stream + b"\0")


def test_a_large_body_takes_no_memory_before_it_comes() -> None:
    stream = begin() + b"\x02\0\1\0\0\0\x0e\0\x3c\0\0" + (500 << 20).to_bytes(8, "big") + b"\0\0\xce"
    parser = Parser()
    tracemalloc.start()
    try:
        assert parser.feed(stream) == []
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_a_large_body_in_small_pieces_is_not_copied_for_each_of_them() -> None:
    def read(size: int) -> None:
        body = bytes(250) * (size // 250)
        stream = delivery(body, most=131_072)
        parser = Parser()
        events = [event for at in range(0, len(stream), 64) for event in parser.feed(stream[at : at + 64])]
        assert events[0].body == body

    assert grows_in_proportion(read, 125_000)


def test_tables_within_tables_without_end_are_refused() -> None:
    inner = b""
    for _ in range(5000):
        inner = b"A" + len(inner).to_bytes(4, "big") + inner
    entries = b"\x01x" + inner
    payload = b"\0\x0a\0\x0a\0\x09" + len(entries).to_bytes(4, "big") + entries + b"\0\0\0\0\0\0\0\0"
    with pytest.raises(ProtocolError, match="deep"):
        Parser().feed(b"\x01\0\0" + len(payload).to_bytes(4, "big") + payload + b"\xce")


def test_another_protocol_is_named() -> None:
    with pytest.raises(ProtocolError, match=r"speaks AMQP 1\.0\.0, .* RabbitMQ is needed"):
        Parser().feed(b"AMQP\x00\x01\x00\x00")
    with pytest.raises(ProtocolError, match="no AMQP"):
        Parser().feed(b"HTTP/1.1 400 Bad Request\r\n")


def test_content_that_breaks_the_grammar_is_refused() -> None:
    whole = delivery(b"abc")
    start = whole[: whole.index(b"\xce\x02") + 1]
    content_header, body = whole[len(start) : -11], whole[-11:]
    for stream in (
        content_header,  # that no method announced
        body,
        start + start,
        start + body,
        start + content_header + content_header,
        start + content_header + body[:3] + b"\0\0\0\x04abcd\xce",  # more than was declared
    ):
        with pytest.raises(ProtocolError):
            Parser().feed(stream)


def test_messages_of_several_channels_may_interleave() -> None:
    one, two = delivery(b"1" * 5000, channel=1), delivery(b"2" * 5000, channel=2)
    frames = []
    for stream in (one, two):
        at, mine = 0, []
        while at < len(stream):
            length = int.from_bytes(stream[at + 3 : at + 7], "big") + 8
            mine.append(stream[at : at + length])
            at += length
        frames.append(mine)
    mixed = b"".join(a + b for a, b in zip(*frames, strict=True))
    assert [event.body for event in Parser().feed(mixed) if isinstance(event, Content)] == [b"1" * 5000, b"2" * 5000]


# methods


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_is_read_as_it_was_written(name: str) -> None:
    values: dict[str, Any] = {"S": "näme", "L": b"\0bytes", "T": {"x-max-length": 5}, "b": True}
    arguments = [(entry[0], entry[2:]) for entry in METHODS[name][2].split() if entry != "-"]
    given_ = {argument: values.get(kind, 7) for kind, argument in arguments}
    written = amqp.method(3, name, **given_)
    event = Parser().feed(written + (b"" if name not in CONTENT else EMPTY))[0]
    if isinstance(event, Confirm):
        assert (event.channel, event.tag, event.multiple) == (3, 7, True)
    else:
        assert event.channel == 3
        assert event.fields == given_
        assert isinstance(event, Content) or event.name == name


CONTENT = {"basic.deliver", "basic.return", "basic.get-ok"}
EMPTY = b"\x02\x00\x03\x00\x00\x00\x0e\x00\x3c\x00\x00" + bytes(8) + b"\x00\x00\xce"


@pytest.mark.parametrize("name", ["queue.declare", "exchange.declare", "basic.consume", "basic.publish", "basic.nack"])
def test_another_library_reads_our_methods(name: str) -> None:
    class_, number, layout = METHODS[name]
    arguments = [(entry[0], entry[2:]) for entry in layout.split() if entry != "-"]
    values: dict[str, Any] = {"S": "name", "T": {"x-queue-type": "quorum", "x-expires": 60_000}, "q": 77}
    given_ = {argument: values.get(kind, True) for kind, argument in arguments}
    read_, channel, theirs = frame.unmarshal(amqp.method(5, name, **given_))
    assert (read_, channel, theirs.frame_id) == (len(amqp.method(5, name, **given_)), 5, number)
    assert theirs.index == class_ << 16 | number
    aliases = {"type": "exchange_type", "no_wait": "nowait"}
    for argument, value in given_.items():
        assert getattr(theirs, aliases.get(argument, argument)) == value


def test_another_library_reads_our_messages_and_we_read_its() -> None:
    message = Message(
        channel=CHANNEL,
        id="m-1",
        operation="trips.create",
        sender="phone",
        media_type="application/json",
        reply_to="amq.rabbitmq.reply-to",
        correlation_id="c-1",
        key="k",
        headers={"x-city": "Zürich"},
    )
    header_ = properties(
        message, durable=True, deadline=1_700_000_001.5, timestamp=1_700_000_000, expires=True, priority=4
    )
    written = amqp.content(b"", 1, header_, b"", 4096)
    theirs = frame.unmarshal(written)[2]
    assert isinstance(theirs, header.ContentHeader)
    found = theirs.properties
    assert (found.message_id, found.message_type, found.app_id) == ("m-1", "trips.create", "phone")
    assert (found.delivery_mode, found.priority, found.expiration) == (2, 4, "1500")
    assert found.headers == {"quintet-key": "k", "x-city": "Zürich"}
    mine = commands.Basic.Properties(
        content_type="application/json", headers={"n": 5, "quintet-key": "k"}, app_id="pika"
    )
    (event,) = Parser().feed(begin() + frame.marshal(header.ContentHeader(0, 0, mine), 1))
    assert isinstance(event, Content)
    got = read(event, CHANNEL, SYSTEM)
    assert (got.media_type, got.sender, got.key, got.headers) == ("application/json", "pika", "k", {"n": "5"})


def test_arguments_that_do_not_fit_are_refused_with_their_name() -> None:
    with pytest.raises(InvalidMessage, match="255"):
        amqp.method(1, "queue.declare", queue="q" * 256)
    with pytest.raises(InvalidMessage, match="prefetch_count=70000"):
        amqp.method(1, "basic.qos", prefetch_count=70_000)
    with pytest.raises(TypeError, match=r"queue\.declare has no argument quue"):
        amqp.method(1, "queue.declare", quue="q")
    with pytest.raises(InvalidMessage, match="cannot stand in an AMQP table"):
        amqp.table({"x": object()})
    with pytest.raises(InvalidMessage, match="cannot stand in an AMQP table"):
        amqp.table({"x": 2**63})


# tables

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
    | st.binary(max_size=30)
    | st.datetimes(datetime.datetime(1970, 1, 2), datetime.datetime(9000, 1, 1)).map(
        lambda when: when.replace(microsecond=0, tzinfo=datetime.UTC)
    )
    | st.tuples(st.integers(-(2**31), 2**31 - 1), st.integers(0, 20)).map(lambda d: Decimal(d[0]).scaleb(-d[1])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc-", max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), VALUES, max_size=6))
def test_a_table_is_read_as_it_was_written(fields: dict[str, Any]) -> None:
    written = amqp.table(fields)
    assert amqp.read_table(written, 0, len(written)) == (fields, len(written))


def test_every_type_that_a_broker_may_write_is_read() -> None:
    written = (
        b"\x01aB\xff\x01bb\xff\x01cs\xff\xfe\x01du\xff\xfe\x01ei\xff\xff\xff\xff\x01fL\xff\xff\xff\xff\xff\xff\xff\xff"
        b"\x01gf\x3f\x80\x00\x00\x01hU\xff\xfe\x01iT\xff\xff\xff\xff\xff\xff\xff\xff"
    )
    fields = dict(amqp.read_entries(written))
    assert fields == {
        "a": 255,
        "b": -1,
        "c": -2,
        "d": 65534,
        "e": 2**32 - 1,
        "f": 2**64 - 1,
        "g": 1.0,
        "h": -2,
        "i": 2**64 - 1,
    }


# a Message

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
NAMES = st.text(st.characters(exclude_categories=["Cs"], codec="ascii"), min_size=1, max_size=40).filter(
    lambda name: name not in ("CC", "BCC") and not name.startswith(("quintet-", "x-"))
)


@given(
    st.builds(
        Message,
        channel=st.just(CHANNEL),
        body=st.binary(max_size=50),
        id=TEXT.filter(bool),
        operation=TEXT,
        sender=TEXT,
        media_type=st.text("abc/+;=", max_size=40),
        version=TEXT,
        key=TEXT,
        reply_to=TEXT,
        correlation_id=TEXT,
        status=TEXT,
        attempt=st.integers(1, 2**31 - 1),
        headers=st.dictionaries(NAMES, TEXT, max_size=4),
    )
)
def test_a_message_is_read_as_it_was_written_however_long_its_fields_are(message: Message) -> None:
    got = message_of(message)
    for field in Message.__struct_fields__:
        assert getattr(got, field) == getattr(message, field), field


@pytest.mark.parametrize("expires", [False, True])
@pytest.mark.parametrize("seconds", [0.25, 30, 5_000_000])  # of the last RabbitMQ would refuse the milliseconds
def test_a_deadline_travels_as_wall_clock_time(seconds: float, expires: bool) -> None:
    deadline, sent = SYSTEM.now() + seconds, int(SYSTEM.wall())
    got = message_of(Message(channel=CHANNEL), deadline=SYSTEM.to_wall(deadline), timestamp=sent, expires=expires)
    assert got.deadline == pytest.approx(deadline, abs=0.1)


@pytest.mark.parametrize(("sent", "left"), [(1, "soon"), (1, "-5"), (1, ""), (None, "500"), (1, None)])
def test_an_expiration_that_says_no_time_is_no_deadline(sent: int | None, left: str | None) -> None:
    foreign = commands.Basic.Properties(
        timestamp=sent and datetime.datetime.fromtimestamp(sent, datetime.UTC), expiration=left
    )
    (event,) = Parser().feed(begin() + frame.marshal(header.ContentHeader(0, 0, foreign), 1))
    assert isinstance(event, Content)
    assert read(event, CHANNEL, SYSTEM).deadline is None


@pytest.mark.parametrize("endless", [float("nan"), float("inf"), float("-inf"), "nan", "-inf", "1e999"])
def test_a_deadline_that_is_no_time_is_passed_over(endless: float | str) -> None:
    foreign = commands.Basic.Properties(headers={"quintet-deadline": endless})
    (event,) = Parser().feed(begin() + frame.marshal(header.ContentHeader(0, 0, foreign), 1))
    assert isinstance(event, Content)
    assert read(event, CHANNEL, SYSTEM).deadline is None


@pytest.mark.parametrize("endless", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_erlang_cannot_read_is_never_written(endless: float) -> None:
    message = Message(channel=CHANNEL)
    for expires in (False, True):
        assert properties(message, durable=True, deadline=endless, expires=expires) == properties(message, durable=True)
    with pytest.raises(InvalidMessage, match="cannot stand in an AMQP table"):
        amqp.table({"x": endless})


def test_deliveries_that_broke_off_count_as_attempts() -> None:
    sent = Message(channel=CHANNEL, attempt=2)
    once = Parser().feed(delivery(b"", sent))[0]  # redelivered, by a queue that does not count
    assert isinstance(once, Content)
    assert (read(once, CHANNEL, SYSTEM).attempt, once.crashes) == (3, 1)
    counted = amqp.content(
        amqp.method(1, "basic.deliver", consumer_tag="c", delivery_tag=1, redelivered=True),
        1,
        b"\x20\x00" + amqp.table({"x-delivery-count": 4, "quintet-attempt": 2}),
        b"",
        4096,
    )
    often = Parser().feed(counted)[0]
    assert isinstance(often, Content)
    assert (read(often, CHANNEL, SYSTEM).attempt, often.crashes) == (6, 4)


def test_what_a_foreign_sender_writes_is_a_message_and_nonsense_is_passed_over() -> None:
    headers = {
        "quintet-attempt": "many",
        "quintet-deadline": None,
        "quintet-key": 7,
        "x-death": [{"queue": "q"}],
        "count": 5,
        "yes": True,
        "nothing": None,
        "raw": b"\xff",
        "list": [1, {"a": None}],
        "when": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    }
    event = Parser().feed(amqp.content(begin(), 1, b"\x20\x00" + amqp.table(headers), b"{}", 4096))[0]
    assert isinstance(event, Content)
    got = read(event, CHANNEL, SYSTEM)
    assert (got.attempt, got.deadline, got.key, got.media_type, got.body) == (1, None, "7", "", b"{}")
    assert got.headers == {
        "count": "5",
        "yes": "true",
        "nothing": "",
        "raw": "\N{REPLACEMENT CHARACTER}",
        "list": '[1, {"a": null}]',
        "when": "2026-01-02T00:00:00+00:00",
    }
    assert got.id, "it was given no id"
    assert read(event, CHANNEL, SYSTEM).id == got.id, "each reading gave it another id"


def test_a_header_by_which_rabbitmq_sends_copies_is_refused() -> None:
    with pytest.raises(InvalidMessage, match="'CC'"):
        properties(Message(channel=CHANNEL, headers={"CC": "x"}), durable=False)


def test_what_a_broker_wrote_for_another_delivery_does_not_travel_on() -> None:
    message = Message(channel=CHANNEL, id="1", headers={"x-death": "x", "quintet-attempt": "9", "x-own": "1"})
    assert message_of(message).headers == {"x-own": "1"}
