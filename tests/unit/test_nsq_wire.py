"""wire/nsq.py: frames, commands, names and the envelope, without a socket."""

from __future__ import annotations

import contextlib
import itertools
import re
import struct
import tracemalloc
import zlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quintet.errors import ProtocolError
from quintet.message import Channel, Message
from quintet.wire import nsq, nsq_http
from quintet.wire.nsq import Arrived, Deflate, Failure, Frames, Response, Snappy, pack, unpack
from quintet.wire.nsq_topology import fit

CHANNEL = Channel("trips.v1.arrived", fanout=True, durable=True)
ID = b"0a1b2c3d4e5f6071"


def frame(kind: int, body: bytes) -> bytes:
    return struct.pack(">Ii", len(body) + 4, kind) + body


def message_frame(body: bytes, attempts: int = 1, timestamp: int = 7, message: bytes = ID) -> bytes:
    return frame(2, struct.pack(">qH16s", timestamp, attempts, message) + body)


def arrived(body: bytes, attempts: int = 1) -> Arrived:
    return Arrived(7, attempts, ID, body)


def read(pieces: list[bytes]) -> list[Any]:
    frames = Frames(Arrived)
    return [event for piece in pieces for event in frames.feed(piece)]


def split(data: bytes, places: list[int]) -> list[bytes]:
    ends = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(ends)]


STREAM = b"".join(
    [
        frame(0, b"OK"),
        message_frame(b""),
        frame(0, b"_heartbeat_"),
        message_frame(b"x" * 300, attempts=65535, timestamp=2**62),
        frame(1, b"E_FIN_FAILED FIN 0a1b2c3d4e5f6071 failed ID not in flight"),
        frame(0, b""),
        message_frame(b"\0\0\0\6\0\0\0\0OK"),
        frame(1, b"E_INVALID"),
    ]
)
EVENTS = [
    Response(b"OK"),
    Arrived(7, 1, ID, b""),
    Response(b"_heartbeat_"),
    Arrived(2**62, 65535, ID, b"x" * 300),
    Failure("E_FIN_FAILED", "FIN 0a1b2c3d4e5f6071 failed ID not in flight"),
    Response(b""),
    Arrived(7, 1, ID, b"\0\0\0\6\0\0\0\0OK"),
    Failure("E_INVALID", ""),
]


# Frames


def test_frames_become_events() -> None:
    assert read([STREAM]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM))))
def test_however_a_stream_is_split_its_events_are_the_same(places: list[int]) -> None:
    assert read(split(STREAM, places)) == EVENTS


def test_a_stream_may_come_byte_by_byte() -> None:
    assert read([bytes([byte]) for byte in STREAM]) == EVENTS


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_garbage_raises_nothing_but_a_protocol_error(data: bytes, places: list[int]) -> None:
    frames = Frames(Arrived)
    try:
        for piece in split(data, places):
            frames.feed(piece)
    except ProtocolError as error:
        with pytest.raises(ProtocolError, match=re.escape(str(error))):
            frames.feed(frame(0, b"OK"))


def test_what_came_before_garbage_is_not_lost() -> None:
    frames = Frames(Arrived)
    assert frames.feed(frame(0, b"OK") + b"HTTP/1.1 400 Bad Request\r\n") == [Response(b"OK")]
    with pytest.raises(ProtocolError):
        frames.feed(b"")


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (struct.pack(">Ii", 2**31, 2), "2147483648 bytes"),
        (struct.pack(">Ii", 2**32 - 1, 0), "4294967295 bytes"),
        (struct.pack(">Ii", 3, 0), "3 bytes"),
        (struct.pack(">Ii", 29, 2), "29 bytes"),
        (struct.pack(">Ii", 10, 3), "kind 3"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is there an nsqd"),
    ],
)
def test_a_head_that_cannot_be_is_refused_before_its_body_comes(head: bytes, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        Frames(Arrived).feed(head)


def test_a_declared_size_takes_no_memory() -> None:
    many = [Frames(Arrived) for _ in range(50)]
    tracemalloc.start()
    try:
        for frames in many:
            assert frames.feed(struct.pack(">Ii", nsq.LARGEST_FRAME, 2)) == []
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_a_large_body_in_small_pieces_is_not_copied_over_and_over() -> None:
    body = bytes(8 << 20)
    data, frames, copied = message_frame(body), Frames(Arrived), 0
    tracemalloc.start()
    try:
        for start in range(0, len(data), 1 << 16):
            events = frames.feed(data[start : start + (1 << 16)])
        copied = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [event.body for event in events if isinstance(event, Arrived)] == [body]
    assert copied < 4 * len(body)


def test_only_failures_of_what_is_never_answered_are_unasked() -> None:
    assert Failure("E_FIN_FAILED", "").unasked
    assert Failure("E_REQ_FAILED", "").unasked
    assert Failure("E_TOUCH_FAILED", "").unasked
    assert not Failure("E_BAD_TOPIC", "").unasked


# Commands


def test_commands_are_written_as_nsqd_reads_them() -> None:
    assert nsq.sub("t", "c#ephemeral") == b"SUB t c#ephemeral\n"
    assert nsq.rdy(2500) == b"RDY 2500\n"
    assert nsq.fin(ID) == b"FIN 0a1b2c3d4e5f6071\n"
    assert nsq.req(ID, 1500) == b"REQ 0a1b2c3d4e5f6071 1500\n"
    assert nsq.touch(ID) == b"TOUCH 0a1b2c3d4e5f6071\n"
    assert nsq.pub("t", b"body") == b"PUB t\n\0\0\0\4body"
    assert nsq.dpub("t", 20, b"body") == b"DPUB t 20\n\0\0\0\4body"
    assert nsq.mpub("t", [b"a", b"bc"]) == b"MPUB t\n\0\0\0\x0f\0\0\0\2\0\0\0\1a\0\0\0\2bc"
    assert nsq.auth("secret") == b"AUTH\n\0\0\0\6secret"
    said = nsq.identify({"feature_negotiation": True})
    assert (said[:9], said[9:13], said[13:]) == (b"IDENTIFY\n", b"\0\0\0\x1c", b'{"feature_negotiation":true}')


# Names


@given(st.text(), st.sampled_from(["", ".temporary", "#ephemeral"]))
def test_every_name_becomes_one_that_nsq_takes(name: str, suffix: str) -> None:
    fitted = fit(name, suffix)
    assert len(fitted) <= 64
    assert re.fullmatch(r"[.a-zA-Z0-9_-]+(#ephemeral)?", fitted)
    assert fitted.endswith(suffix)


def test_a_name_that_nsq_takes_is_its_own_topic() -> None:
    assert fit("trips.v1.arrived") == "trips.v1.arrived"
    assert fit("x" * 64) == "x" * 64
    assert fit("replies.phone.1", ".temporary") == "replies.phone.1.temporary"


def test_names_that_are_cut_stay_apart() -> None:
    assert fit("x" * 64 + "a") != fit("x" * 64 + "b")
    assert fit("a/b") != fit("a:b")
    assert fit("Zürich") == "Z_rich.4251685e06cab635"


# Compression


LAYERS = [Deflate, Snappy]


@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_compressed_comes_out_as_it_went_in(layer: type[Deflate] | type[Snappy]) -> None:
    if layer is Snappy:
        pytest.importorskip("snappy")
    out, back = layer(), layer()
    said = [STREAM, b"x" * 3_000_000, b"", b"RDY 1\n"]
    packed = b"".join(map(out.pack, said))
    pieces = [piece for start in range(0, len(packed), 1000) for piece in back.unpack(packed[start : start + 1000])]
    assert b"".join(pieces) == b"".join(said)


def test_what_inflates_without_end_comes_in_bounded_pieces() -> None:
    bomb = Deflate(level=9).pack(bytes(50 << 20))
    assert len(bomb) < 100_000
    sizes = [len(piece) for piece in Deflate().unpack(bomb)]
    assert (sum(sizes), max(sizes)) == (50 << 20, nsq.PIECE)


@pytest.mark.parametrize("layer", LAYERS)
@given(data=st.binary(min_size=1, max_size=200))
def test_compressed_garbage_raises_nothing_but_a_protocol_error(
    layer: type[Deflate] | type[Snappy], data: bytes
) -> None:
    if layer is Snappy:
        pytest.importorskip("snappy")
    with contextlib.suppress(ProtocolError):
        list(layer().unpack(data))


def test_the_end_of_a_deflate_stream_is_the_end_of_the_connection() -> None:
    whole = zlib.compressobj(wbits=-15)
    with pytest.raises(ProtocolError, match="ended"):
        list(Deflate().unpack(whole.compress(b"x") + whole.flush()))


# The envelope

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
HEADERS = st.dictionaries(st.text("abcdefghijklmnopqrstuvwxyz-:"), TEXT, max_size=4)


@given(
    st.builds(
        Message,
        channel=st.just(CHANNEL),
        body=st.binary(),
        id=TEXT.filter(bool),
        operation=TEXT,
        sender=TEXT,
        media_type=TEXT,
        version=TEXT,
        key=TEXT,
        reply_to=TEXT,
        correlation_id=TEXT,
        status=TEXT,
        attempt=st.integers(1, 10**6),
        headers=HEADERS.map(lambda headers: {f"x-{name}": value for name, value in headers.items()}),
    ),
    st.none() | st.integers(0, 10**11).map(lambda thousandths: thousandths / 1000),
)
def test_a_message_comes_out_of_its_envelope_as_it_went_in(message: Message, deadline: float | None) -> None:
    back, until = unpack(arrived(pack(message, deadline)), CHANNEL)
    assert back == message
    assert until == pytest.approx(deadline, abs=0.001)


@given(st.binary())
def test_whatever_a_foreign_sender_wrote_is_a_message(body: bytes) -> None:
    for whole in (body, nsq.ENVELOPE + body, nsq.ENVELOPE + b"{" + body + b"}\n"):
        message, _ = unpack(arrived(whole), CHANNEL)
        assert whole.endswith(message.body)


def test_a_bare_body_is_a_message_with_the_id_of_nsq() -> None:
    body = b'{"trip_id": "t-1", "driver": "viktor"}'
    message, deadline = unpack(arrived(body, attempts=3), CHANNEL)
    assert (message.body, message.id, message.attempt, deadline) == (body, ID.decode(), 3, None)
    assert (message.media_type, message.headers) == ("", {})


def test_two_messages_share_no_headers() -> None:
    first, second = unpack(arrived(b"a"), CHANNEL)[0], unpack(arrived(b"b"), CHANNEL)[0]
    first.headers["x-mark"] = "mine"
    assert second.headers == {}


def test_attempts_of_an_earlier_message_and_of_nsq_are_added_up() -> None:
    body = pack(Message(channel=CHANNEL, id="m", attempt=3))
    assert unpack(arrived(body, attempts=2), CHANNEL)[0].attempt == 4


@pytest.mark.parametrize(
    "line",
    [
        '{"quintet-attempt": 3, "quintet-deadline": 1800000000.5, "x-flag": true, "x-list": [1], "x-null": null}',
        '{"quintet-attempt": "3", "quintet-deadline": "1800000000.5", "x-flag": "True"}',
    ],
)
def test_headers_that_are_no_texts_are_read_as_far_as_they_make_sense(line: str) -> None:
    message, deadline = unpack(arrived(f"quintet/1 {line}\nbody".encode()), CHANNEL)
    assert (message.attempt, deadline, message.headers) == (3, 1800000000.5, {"x-flag": "True"})


@pytest.mark.parametrize("nonsense", ["", "soon", "-5", "nan", "inf", "9" * 5000, "1e999"])
def test_headers_that_make_no_sense_are_passed_over(nonsense: str) -> None:
    line = msgspec.json.encode({"quintet-attempt": nonsense, "quintet-deadline": nonsense}).decode()
    message, deadline = unpack(arrived(f"quintet/1 {line}\nbody".encode()), CHANNEL)
    assert (message.attempt, deadline, message.body) == (1, None, b"body")


def test_a_repeat_is_the_next_attempt_and_else_the_same() -> None:
    message = Message(channel=CHANNEL, id="m", headers={"a": "b"}, body=b"body\n", attempt=2)
    back, deadline = unpack(arrived(nsq.repeat(pack(message, 1_800_000_000.5))), CHANNEL)
    message.attempt = 3
    assert (back, deadline) == (message, 1_800_000_000.5)
    assert nsq.repeat(pack(message, not_before=5.0)).startswith(nsq.DEFERRED)


def test_the_envelope_of_a_deferred_message_is_known_by_its_beginning() -> None:
    message = Message(channel=CHANNEL, id="m", headers={"a": "b"}, body=b"body")
    deferred = pack(message, not_before=1_800_000_000.25)
    assert deferred.startswith(nsq.DEFERRED)
    assert nsq.not_before(deferred) == 1_800_000_000.25
    assert not pack(message).startswith(nsq.DEFERRED)
    assert nsq.not_before(pack(message)) is None


# HTTP

GOOD = b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n"


def test_a_question_to_nsqd_is_asked_in_http_1_0() -> None:
    url = nsq_http.stats_url("http://nsqd:4151", topic="trips.v1.arrived")
    head, *headers = nsq_http.request(url).decode().split("\r\n")
    assert head == "GET /stats?format=json&include_clients=false&include_mem=false&topic=trips.v1.arrived HTTP/1.0"
    assert headers == ["Host: nsqd:4151", "Content-Length: 0", "", ""]


def test_an_answer_is_read_though_go_writes_null_for_an_empty_list() -> None:
    body = nsq_http.body_of(GOOD + b'{"topics": [{"topic_name": "t", "depth": 3, "channels": null}]}', "http://nsqd")
    (topic,) = nsq_http.read(body, nsq_http.Stats, "http://nsqd").topics or ()
    assert (topic.topic_name, topic.depth, topic.abandoned) == ("t", 3, True)
    assert nsq_http.read(b'{"topics": null}', nsq_http.Stats, "").topics is None


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.0 404 Not Found\r\n\r\n", b"SSH-2.0\r\n", b"HTTP/1.0 2000 OK\r\n\r\n"]
)
def test_an_answer_that_is_not_good_is_told(answer: bytes) -> None:
    with pytest.raises(ProtocolError, match="http://nsqd answered"):
        nsq_http.body_of(answer, "http://nsqd")


@given(st.binary())
def test_answers_that_are_garbage_raise_nothing_but_a_protocol_error(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        nsq_http.read(nsq_http.body_of(GOOD + data, "url"), nsq_http.Producers, "url")
    with contextlib.suppress(ProtocolError):
        nsq_http.body_of(data, "url")
