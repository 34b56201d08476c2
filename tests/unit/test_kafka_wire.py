"""Kafka's wire: names, records, and what is done of a partition."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quintet.clock import SYSTEM
from quintet.message import Channel, Message
from quintet.wire.kafka import (
    DUE,
    LONGEST_NOTE,
    VERSIONS_ASKED,
    Progress,
    due,
    from_record,
    group_name,
    in_work,
    key_of,
    retry_channel,
    retry_group,
    to_headers,
    topic_name,
    version,
)

CHANNEL = Channel("trips.v1.created", fanout=True, durable=True)


class Record:
    """What confluent-kafka gives."""

    def __init__(self, value: bytes | None = b"{}", key: bytes | None = None, headers: Any = None) -> None:
        self._fields = value, key, headers

    def topic(self) -> str:
        return "trips.v1.created"

    def partition(self) -> int:
        return 2

    def offset(self) -> int:
        return 41

    def value(self) -> Any:
        return self._fields[0]

    def key(self) -> Any:
        return self._fields[1]

    def headers(self) -> Any:
        return self._fields[2]


def sent(message: Message) -> Record:
    headers = [(n, v.encode() if isinstance(v, str) else v) for n, v in to_headers(message, SYSTEM)]
    return Record(message.body, message.key.encode() or None, headers)


# names


def test_a_channel_is_the_topic_of_its_name_where_kafka_allows_that() -> None:
    assert topic_name("trips.v1.request_pickup") == "trips.v1.request_pickup"


@given(st.text(min_size=1, max_size=400))
def test_any_channel_has_a_topic_that_kafka_allows_and_it_is_its_own_topic(channel: str) -> None:
    name = topic_name(channel)
    assert 0 < len(name) <= 249
    assert name not in (".", "..")
    assert all(char.isascii() and (char.isalnum() or char in "._-") for char in name)
    assert topic_name(name) == name


def test_channels_that_are_alike_have_topics_of_their_own() -> None:
    names = ["a+b", "a b", "a-b", "a.b", "x" * 249, "x" * 250, "x" * 251]
    assert len({topic_name(name) for name in names}) == len(names)
    assert topic_name("a_b", collides=True) not in ("a_b", "a.b")
    assert "_" not in topic_name("a_b", collides=True)


def test_a_point_to_point_channel_has_one_group_and_a_fan_out_channel_each_of_its_own() -> None:
    create = Channel("trips.v1.create")
    assert group_name(create, "trips") == group_name(create, "other") == "trips.v1.create"
    assert group_name(CHANNEL, "billing") == "billing.trips.v1.created"
    assert retry_channel(CHANNEL, "billing") == "quintet.retry.trips.v1.created--billing"
    assert retry_channel(create, "trips") == "quintet.retry.trips.v1.create"
    assert retry_group(CHANNEL, "billing") == "quintet.retry.billing"
    assert retry_group(create, "trips") == "quintet.retry.trips.v1"
    assert retry_group(Channel("jobs"), "any") == "quintet.retry.jobs"


# records


def test_a_message_comes_back_from_its_record() -> None:
    message = Message(
        channel=CHANNEL,
        body=b"\0\xff",
        id="i",
        operation="trips.created",
        sender="trips",
        media_type="application/json",
        version="1.2",
        key="Zürich",
        reply_to="replies.trips.1",
        correlation_id="c",
        status="remote",
        attempt=4,
        headers={"traceparent": "00-1-2-01", "x-city": "東京", "x-empty": ""},
    )
    assert from_record(sent(message), CHANNEL, SYSTEM) == message


def test_a_deadline_travels_as_time_of_the_wall_clock() -> None:
    arrived = from_record(sent(Message(channel=CHANNEL, id="i", deadline=SYSTEM.now() + 30)), CHANNEL, SYSTEM)
    assert arrived.deadline is not None
    assert abs(arrived.deadline - SYSTEM.now() - 30) < 0.1


def test_a_record_without_any_header_of_ours_is_known_by_its_place() -> None:
    message = from_record(Record(b'{"trip": 1}', b"7"), CHANNEL, SYSTEM)
    assert (message.id, message.key, message.body, message.attempt) == ("trips.v1.created-2-41", "7", b'{"trip": 1}', 1)
    assert (message.media_type, message.headers) == ("", {})


@pytest.mark.parametrize(
    "headers",
    [
        [("quintet-attempt", b"many"), ("quintet-deadline", b"soon"), ("quintet-due", b"now")],
        [("quintet-attempt", b"-3"), ("quintet-attempt", "\N{SUPERSCRIPT TWO}".encode())],
        [("quintet-attempt", b"9" * 5000), ("quintet-deadline", b"nan"), ("quintet-due", b"inf")],
        [("quintet-deadline", b"-inf"), ("quintet-due", b"nan")],
        [("quintet-id", None), ("x", None), ("", b"\xff\xfe")],
    ],
)
def test_what_makes_no_sense_in_a_foreign_record_is_passed_over(headers: list[tuple[str, bytes | None]]) -> None:
    record = Record(None, b"\xff", headers)
    message = from_record(record, CHANNEL, SYSTEM)
    assert (message.attempt, message.deadline, message.body, message.id) == (1, None, b"", "trips.v1.created-2-41")
    assert due(record) == 0.0
    assert key_of(record) == message.key == "\N{REPLACEMENT CHARACTER}"


def test_an_attempt_is_no_more_than_other_transports_carry() -> None:
    assert from_record(Record(headers=[("quintet-attempt", b"9" * 20)]), CHANNEL, SYSTEM).attempt == 2**31 - 1


def test_text_goes_through_whole_where_it_holds_a_nul_and_half_a_surrogate_pair_is_refused() -> None:
    message = Message(channel=CHANNEL, id="a\0b", correlation_id="c\0d", headers={"x": "e\0f"})
    assert from_record(sent(message), CHANNEL, SYSTEM) == message
    for wrong in ({"id": "\ud800"}, {"headers": {"x": "\ud800"}}, {"headers": {"\ud800": "x"}}):
        with pytest.raises(UnicodeEncodeError):
            to_headers(Message(channel=CHANNEL, **wrong), SYSTEM)  # type: ignore[arg-type]


def test_the_key_of_a_dead_letter_is_in_a_header_beside_the_records_own() -> None:
    assert from_record(Record(b"", b"i@trips", [("quintet-key", b"7")]), CHANNEL, SYSTEM).key == "7"


def test_a_record_in_a_retry_topic_says_when_it_is_due() -> None:
    assert due(Record(b"", None, [("x", b"1"), (DUE, b"1700000000.250")])) == 1700000000.25


def test_the_reply_topic_is_written_by_its_own_name() -> None:
    channel = "replies.trips+billing.1"
    assert dict(to_headers(Message(channel=CHANNEL, reply_to=channel), SYSTEM)) == {
        "quintet-reply-to": topic_name(channel).encode()
    }


# what is done


def test_the_position_is_the_first_that_is_not_done() -> None:
    progress = Progress(10)
    assert progress.position() == 10
    for offset in (10, 11, 14):  # 12 and 13 may be marks of a transaction
        assert progress.take(offset)
    progress.done(11)
    assert progress.position() == 10
    progress.done(10)
    assert progress.position() == 14
    progress.done(14)
    assert (progress.position(), progress.note()) == (15, "")


def test_what_is_done_beyond_the_position_is_noted_and_not_taken_again() -> None:
    progress = Progress(10)
    for offset in range(10, 20):
        progress.take(offset)
    for offset in (11, 12, 15):
        progress.done(offset)
    assert progress.note(3) == "quintet 3 6:0,3,4"
    after = Progress(progress.position(), progress.note(3))
    assert [offset for offset in range(10, 20) if after.take(offset)] == [10, 13, 14, 16, 17, 18, 19]


def test_what_was_noted_holds_until_it_has_come_again() -> None:
    after = Progress(10, "quintet 0 6:0,3,4")
    assert after.take(10)
    after.done(10)
    assert (after.position(), after.note()) == (11, "quintet 0 5:2,3")
    again = Progress(after.position(), after.note())
    assert [offset for offset in range(11, 17) if again.take(offset)] == [13, 14, 16]


@pytest.mark.parametrize(
    "note", ["", "theirs", "quintet", "quintet x y:z", "quintet 1 5:a,b", "quintet 1 x:1", "quintet 1 0: x", "a b c d"]
)
def test_the_metadata_of_others_says_nothing(note: str) -> None:
    assert all(Progress(10, note).take(offset) for offset in (10, 11, 12))
    assert in_work(note) in (0, 1)


def test_a_note_tells_how_many_are_in_work() -> None:
    progress = Progress(0)
    progress.take(0)
    assert in_work(progress.note(7)) == 7
    progress.take(1)
    progress.done(1)
    assert in_work(progress.note(7)) == 7


def test_a_note_tells_how_many_went_away_with_the_first_in_work() -> None:
    progress, note = Progress(10), ""
    for crashes in range(3):
        progress = Progress(10, note)
        assert (progress.crashes, progress.note()) == (crashes, note)  # who takes nothing changes nothing
        progress.begin()
        for offset in (10, 11, 12):
            progress.take(offset)
        note = progress.note()
    progress.done(11)
    assert progress.note(1) == "quintet 1 2:0 3"
    progress.leave()  # given to another member
    assert progress.note() == "quintet 0 2:0 2"
    progress.done(10)  # another is the first now
    assert (progress.position(), progress.note()) == (12, "")


def test_a_count_that_makes_no_sense_counts_nothing() -> None:
    assert Progress(10, "quintet 1 0: -7").crashes == 0


def test_a_note_that_grows_too_long_says_less_and_nothing_wrong() -> None:
    progress = Progress(0)
    for offset in range(5000):
        progress.take(offset)
    done = set(range(1, 5000, 2))
    for offset in done:
        progress.done(offset)
    note = progress.note()
    assert len(note) < LONGEST_NOTE + 50
    after = Progress(progress.position(), note)
    skipped = {offset for offset in range(5000) if not after.take(offset)}
    assert skipped
    assert skipped <= done


@given(st.randoms(use_true_random=False), st.integers(1, 60))
def test_nothing_is_lost_and_nothing_that_was_noted_is_repeated(chance: random.Random, count: int) -> None:
    """One member after another goes on where the one before has committed; each may end at any moment."""
    position, note = 0, ""
    noted_done: set[int] = set()
    handled: list[int] = []
    for _ in range(4):
        progress = Progress(position, note)
        taken = [offset for offset in range(position, chance.randint(position, count)) if progress.take(offset)]
        assert not noted_done.intersection(taken)
        chance.shuffle(taken)
        done = taken[: chance.randint(0, len(taken))]
        for offset in done:
            progress.done(offset)
        handled += done
        if chance.random() < 0.7:  # else it is killed before it commits
            position, note = progress.position(), progress.note(chance.randint(0, 3))
            noted_done |= set(done)
    last = Progress(position, note)
    handled += [offset for offset in range(position, count) if last.take(offset)]
    assert set(handled) >= set(range(count))


# versions


def test_the_release_is_read_of_what_the_brokers_can_do() -> None:
    assert len(VERSIONS_ASKED) == 4 + VERSIONS_ASKED[3]
    both = b"..\x11metadata.version\0\7\0\x1d\0..\x11metadata.version\0\x1b\0\x1b\0"
    assert version(both) == "4.1"
    assert version(b"\x11metadata.version\0\x10\0\1") == "3.7"
    assert version(b"") == version(b"\x11metadata.version\0") == version(b"HTTP/1.1 400") == ""
