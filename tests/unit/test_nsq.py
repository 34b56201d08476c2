"""nsq/publishing.py: what an nsqd may have lost when it was killed is sent once more, whatever else breaks."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from quintet.clock import SYSTEM
from quintet.errors import InvalidMessage, TransportError, Unavailable
from quintet.message import Channel, Message
from quintet.transport import parse_address
from quintet.transports.nsq.discovery import Nsqds
from quintet.transports.nsq.publishing import ACCEPTED_BYTES, Publisher
from quintet.wire import nsq

BODY = nsq.pack(Message(channel=Channel("work"), id="m-1", body=b"accepted"))


class Link:
    """A socket that lags behind, and breaks."""

    def __init__(self) -> None:
        self.full = False

    async def room(self) -> None:
        raise ConnectionResetError("by peer")


class Session:
    """One connection to an nsqd, which accepts all."""

    def __init__(self) -> None:
        self.link = Link()
        self.host = ("127.0.0.1", 4150)
        self.declared = {"work"}
        self.published = list[bytes]()

    async def publish(self, topic: str, body: bytes) -> bytes:
        self.published.append(body)
        return b"OK"


class Line:
    """A connection that always has that session."""

    host = ("127.0.0.1", 4150)

    def __init__(self, session: Session) -> None:
        self.session = session

    async def close(self) -> None:
        """Nothing is open."""

    async def ready(self, until: float | None) -> Session:
        return self.session


async def connected(publisher: Any) -> Session:
    session = Session()
    publisher.connection = Line(session)
    await publisher.begin(session)
    return session


@pytest.fixture
def nsqds() -> Any:
    found: Any = Nsqds(parse_address("nsq://127.0.0.1"), SYSTEM, lambda *_: None)

    async def setting(*_: object, **__: object) -> int:
        raise TransportError("no HTTP")

    found.setting = setting
    return found


async def turns() -> None:
    """As many turns of the loop as it takes until what was begun has sent what it will send: no time passes."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_what_was_accepted_is_sent_once_more_also_if_the_next_connection_breaks_at_once(nsqds: Any) -> None:
    publisher: Any = Publisher(nsqds)
    first = await connected(publisher)
    await publisher.put("work", "work", BODY)
    publisher.gone(first)

    asked = asyncio.Event()

    async def hangs(host: object) -> float | None:
        asked.set()
        await asyncio.Event().wait()
        return None

    nsqds.started = hangs
    connecting = asyncio.create_task(connected(publisher))
    await asked.wait()
    connecting.cancel()  # as it is when its link is lost
    with contextlib.suppress(asyncio.CancelledError):
        await connecting
    publisher.gone(publisher.session)

    async def long_before(host: object) -> float | None:
        return 1.0

    nsqds.started = long_before  # it was not restarted since the second loss; of the first this says nothing
    third = await connected(publisher)
    await turns()
    assert third.published == [nsq.repeat(BODY)]


async def test_an_nsqd_that_lived_on_is_sent_nothing_twice(nsqds: Any) -> None:
    publisher: Any = Publisher(nsqds)
    first = await connected(publisher)
    await publisher.put("work", "work", BODY)
    publisher.gone(first)

    async def long_before(host: object) -> float | None:
        return 1.0

    nsqds.started = long_before
    second = await connected(publisher)
    await turns()
    assert second.published == []


async def test_a_socket_that_breaks_while_one_waits_for_room_is_said_to_be_not_sent(nsqds: Any) -> None:
    publisher: Any = Publisher(nsqds)
    session = await connected(publisher)
    session.link.full = True
    with pytest.raises(Unavailable, match="not sent: by peer"):
        await publisher.send(Message(channel=Channel("work", durable=True), body=b"waits"))
    assert session.published == []


async def test_a_message_that_is_larger_than_all_that_is_kept_is_accepted_and_kept_alone(nsqds: Any) -> None:
    publisher: Any = Publisher(nsqds)
    first = await connected(publisher)
    publisher._largest = ACCEPTED_BYTES * 2
    large = Message(channel=Channel("work", durable=True), id="m-2", body=bytes(ACCEPTED_BYTES))
    await publisher.put("work", "work", BODY)
    await publisher.send(large)
    publisher.gone(first)
    second = await connected(publisher)
    await turns()
    assert second.published == [nsq.repeat(nsq.pack(large))]


async def test_a_topic_that_cannot_be_made_in_time_is_said_to_be_not_sent(nsqds: Any) -> None:
    publisher: Any = Publisher(nsqds)
    session = await connected(publisher)

    async def prepare(*_: object) -> None:
        await asyncio.Event().wait()

    publisher._prepare = prepare
    message = Message(channel=Channel("new"), until=SYSTEM.now() + 0.05)
    with pytest.raises(Unavailable, match="not sent: topic new could not be made in time"):
        async with asyncio.timeout(45):
            await publisher.send(message)
    assert session.published == []
    await publisher.close()


@pytest.mark.parametrize("fields", [{"headers": {"a": "\ud800"}}, {"key": "\ud800"}, {"id": "\ud800"}], ids=str)
async def test_what_is_no_text_is_refused_with_a_sentence(fields: dict[str, Any], nsqds: Any) -> None:
    publisher: Any = Publisher(nsqds)
    session = await connected(publisher)
    with pytest.raises(InvalidMessage, match="work: a header cannot be written as UTF-8"):
        await publisher.send(Message(channel=Channel("work"), **fields))
    assert session.published == []
