"""STOMP's frames: any split gives the same ones, each version round-trips, garbage is refused and allocates nothing."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import pytest
from costs import grows_in_proportion
from hypothesis import given
from hypothesis import strategies as st

from quintet.errors import ProtocolError
from quintet.wire.stomp import (
    COMMANDS,
    GREETINGS,
    MAX_BODY,
    MAX_HEAD,
    VERSIONS,
    WITH_BODY,
    Frame,
    Parser,
    agree_beats,
    encode,
    encode_rest,
)

text = st.text(st.characters(codec="utf-8"), max_size=12)
one_line = st.text(st.characters(codec="utf-8", exclude_characters="\r\n:"), max_size=12)


def parser(version: str, max_body: int = MAX_BODY) -> Parser:
    made = Parser(max_body)
    made.version = version
    return made


def events(parsed: Parser, *pieces: bytes) -> list[Frame | str]:
    """The frames, and behind them the sentence of the error where there is one."""
    found: list[Frame | str] = []
    try:
        for piece in pieces:
            found.extend(parsed.feed(piece))
    except ProtocolError as error:
        found.append(str(error))
    return found


def only(version: str, data: bytes) -> Frame:
    (frame,) = parser(version).feed(data)
    return frame


def frames(version: str) -> st.SearchStrategy[Frame]:
    part = one_line if version == "1.0" else text
    return st.builds(
        lambda command, headers, body: Frame(command, headers, body if command in WITH_BODY else b""),
        st.sampled_from(sorted(COMMANDS - GREETINGS)),
        st.dictionaries(part.filter(lambda name: name != "content-length"), part, max_size=5),
        st.binary(max_size=40),
    )


def stream(version: str, sent: list[Frame]) -> bytes:
    return b"\n".join(encode(version, frame.command, frame.headers, frame.body) for frame in sent)


@st.composite
def streams(draw: st.DrawFn) -> tuple[str, list[Frame], bytes]:
    version = draw(st.sampled_from(VERSIONS))
    sent = draw(st.lists(frames(version), max_size=4))
    return version, sent, stream(version, sent)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The bytes in pieces; some of them empty."""
    return [data[start:end] for start, end in pairwise([0, *sorted(place % (len(data) + 1) for place in places), None])]


def without_length(frame: Frame) -> Frame:
    return Frame(frame.command, {n: v for n, v in frame.headers.items() if n != "content-length"}, frame.body)


@given(streams())
def test_a_frame_comes_back_as_it_was_written_in_each_version(made: tuple[str, list[Frame], bytes]) -> None:
    version, sent, data = made
    assert [without_length(frame) for frame in parser(version).feed(data)] == sent


@given(streams(), st.lists(st.integers(0, 1000), max_size=8), st.binary(max_size=30))
def test_any_split_of_the_stream_gives_the_same_events(
    made: tuple[str, list[Frame], bytes], places: list[int], garbage: bytes
) -> None:
    version, _, data = made
    data += garbage
    whole = events(parser(version), data)
    assert events(parser(version), *cut(data, places)) == whole
    assert events(parser(version), *(data[place : place + 1] for place in range(len(data)))) == whole


@given(st.sampled_from(["", *VERSIONS]), st.lists(st.binary(max_size=60), max_size=5))
def test_garbage_raises_nothing_but_protocol_errors(version: str, pieces: list[bytes]) -> None:
    events(parser(version), *pieces)


@given(streams(), st.integers(0, 1000), st.binary(max_size=3), st.integers(0, 4))
def test_a_frame_that_was_damaged_raises_nothing_but_protocol_errors(
    made: tuple[str, list[Frame], bytes], place: int, instead: bytes, lost: int
) -> None:
    version, _, data = made
    place %= len(data) + 1
    events(parser(version), data[:place] + instead + data[place + lost :])


@given(st.lists(st.sampled_from([b"\n", b"\r\n", b"A", b":", b"\\", b"\0", b"SEND", b"content-length:", b"1"])))
def test_what_resembles_frames_raises_nothing_but_protocol_errors(tokens: list[bytes]) -> None:
    for version in VERSIONS:
        assert events(parser(version), *tokens) == events(parser(version), b"".join(tokens))


def test_the_examples_of_the_specification() -> None:
    parsed = parser("1.2")
    assert list(parsed.feed(b"MESSAGE\nsubscription:0\nmessage-id:007\n\nhello queue a\0\n\r\n\n")) == [
        Frame("MESSAGE", {"subscription": "0", "message-id": "007"}, b"hello queue a")
    ]
    assert list(parsed.feed(b"MESSAGE\nfoo:World\nfoo:Hello\n\n\0")) == [Frame("MESSAGE", {"foo": "World"})]
    assert list(parsed.feed(b"RECEIPT\r\nreceipt-id:a\\cb\\\\c\\r\\n\r\n\r\n\0")) == [
        Frame("RECEIPT", {"receipt-id": "a:b\\c\r\n"})
    ]
    assert list(parsed.feed(b"ERROR\ncontent-length:3\n\n\0\0\0\0")) == [
        Frame("ERROR", {"content-length": "3"}, b"\0\0\0")
    ]


def test_carriage_returns_end_lines_in_1_2_only() -> None:
    assert only("1.1", b"MESSAGE\nname:value\r\n\n\0").headers == {"name": "value\r"}
    assert only("1.2", b"MESSAGE\nname:value\r\n\n\0").headers == {"name": "value"}
    body = only("1.2", b"MESSAGE\r\na:b\r\n\r\n\nbody\n\n\0").body
    assert body == b"\nbody\n\n"


def test_a_colon_in_a_value_need_not_be_escaped_to_be_read() -> None:
    assert only("1.2", b"MESSAGE\nmessage-id:ID:host:1\n\n\0").headers == {"message-id": "ID:host:1"}


@pytest.mark.parametrize(
    ("version", "line"), [("1.1", b"a:\\r"), ("1.1", b"a:\\t"), ("1.2", b"a:\\t"), ("1.2", b"a:b\\"), ("1.2", b"\\x:b")]
)
def test_an_escape_that_stands_for_nothing_is_refused(version: str, line: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"stands for nothing in STOMP {version}"):
        list(parser(version).feed(b"MESSAGE\n" + line + b"\n\n\0"))


def test_1_0_escapes_nothing_and_reads_backslashes_as_they_are() -> None:
    assert only("1.0", b"MESSAGE\npath:C:\\new\n\n\0").headers == {"path": "C:\\new"}
    assert encode("1.0", "SEND", {"path": "C:\\new"}) == b"SEND\npath:C:\\new\ncontent-length:0\n\n\0"


@pytest.mark.parametrize("headers", [{"a": "two\nlines"}, {"two\nlines": "a"}, {"a:b": "c"}])
def test_what_1_0_cannot_write_is_refused_with_a_sentence(headers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"STOMP 1\.0 cannot carry"):
        encode("1.0", "SEND", headers)


def test_the_version_is_learned_from_the_greeting_and_holds_for_what_stands_behind_it() -> None:
    parsed = Parser()
    greeting = b"CONNECTED\nversion:1.1\nserver:a\\b\n\n\0\n"
    assert list(parsed.feed(greeting + b"RECEIPT\nreceipt-id:a\\cb\n\n\0")) == [
        Frame("CONNECTED", {"version": "1.1", "server": "a\\b"}),
        Frame("RECEIPT", {"receipt-id": "a:b"}),
    ]
    assert parsed.version == "1.1"
    old = Parser()
    list(old.feed(b"CONNECTED\nsession:1\n\n\0"))
    assert old.version == "1.0"


def test_a_version_that_was_not_offered_is_refused() -> None:
    with pytest.raises(ProtocolError, match=r"speaks STOMP '2\.0', we speak 1\.0, 1\.1, 1\.2"):
        list(Parser().feed(b"CONNECTED\nversion:2.0\n\n\0"))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "'HTTP/1.1 400 Bad Request' is no command of STOMP"),
        (b"MESSAGE\nno colon\n\n\0", "a header of a MESSAGE has no colon"),
        (b"MESSAGE\n\xff:1\n\n\0", "the head of a frame is not UTF-8"),
        (b"MESSAGE\ncontent-length:2\n\nabc\0", "no NUL stands behind the 2 bytes"),
        (b"MESSAGE\ncontent-length:-1\n\n\0", "content-length '-1' is no number of bytes"),
        (b"MESSAGE\ncontent-length: 1\n\na\0", "content-length ' 1' is no number of bytes"),
        (b"MESSAGE\ncontent-length:" + b"9" * 5000 + b"\n\n\0", "is no number of bytes"),
        (b"MESSAGE\ncontent-length:101\n\n", "a body of 101 bytes is declared, 100 are allowed"),
        (b"MESSAGE\n\n" + b"x" * 101, "the body of a frame has more than 100 bytes"),
        (b"x" * (MAX_HEAD + 3), f"the head of a frame has more than {MAX_HEAD} bytes"),
    ],
)
def test_what_is_no_frame_or_over_a_limit_is_refused_for_good(data: bytes, sentence: str) -> None:
    parsed = parser("1.2", max_body=100)
    assert list(parsed.feed(b"RECEIPT\nreceipt-id:1\n\n\0")) == [Frame("RECEIPT", {"receipt-id": "1"})]
    with pytest.raises(ProtocolError, match=sentence):
        list(parsed.feed(data))
    with pytest.raises(ProtocolError, match=sentence):
        list(parsed.feed(b"RECEIPT\nreceipt-id:2\n\n\0"))


def test_a_huge_declared_length_allocates_nothing() -> None:
    tracemalloc.start()
    try:
        assert list(parser("1.2", max_body=1 << 40).feed(b"MESSAGE\ncontent-length:999999999999\n\nabc")) == []
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", [b"content-length:", b""])
def test_a_large_body_in_small_pieces_is_not_copied_for_each_of_them(length: bytes) -> None:
    def read(size: int) -> None:
        data = b"MESSAGE\n" + (length and b"%s%d\n" % (length, size)) + b"\n" + b"x" * size + b"\0"
        parsed = parser("1.2")
        found = [frame for place in range(0, len(data), 64) for frame in parsed.feed(data[place : place + 64])]
        assert [len(frame.body) for frame in found] == [size]

    assert grows_in_proportion(read, 1 << 17)


def test_lines_that_are_written_already_stand_first() -> None:
    data = encode_rest("1.2", "SEND", {"a": "1:2"}, b"x", "destination:/queue/a\\cb\n")
    assert data == b"destination:/queue/a\\cb\na:1\\c2\ncontent-length:1\n\nx\0"


@pytest.mark.parametrize(
    ("ours", "theirs", "agreed"),
    [
        ((5.0, 5.0), "0,0", (0.0, 0.0)),
        ((5.0, 5.0), "", (0.0, 0.0)),
        ((5.0, 7.0), "2000,9000", (9.0, 7.0)),
        ((5.0, 7.0), "8000,0", (0.0, 8.0)),
        ((0.0, 0.0), "1000,1000", (0.0, 0.0)),
    ],
)
def test_heart_beats_are_as_seldom_as_either_side_wishes(
    ours: tuple[float, float], theirs: str, agreed: tuple[float, float]
) -> None:
    assert agree_beats(ours, theirs) == agreed


@pytest.mark.parametrize("theirs", ["1", "a,b", "1,2,3", "-1,0"])
def test_heart_beats_that_are_no_numbers_are_refused(theirs: str) -> None:
    with pytest.raises(ProtocolError, match="heart-beat"):
        agree_beats((1.0, 1.0), theirs)
