"""STOMP on the real brokers: ActiveMQ Classic, and RabbitMQ's plugin."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import stomp
from running import Entry

from quintet import Contract, Redelivery, Service, connect, current, event, notification, request, serve
from quintet.connection import Refused
from quintet.dead_letters import bury
from quintet.errors import InvalidMessage
from quintet.message import Channel, Message, new_id
from quintet.testing import CHECKS, Bench, Check, skips
from quintet.testing.bench import Receiver
from quintet.transport import Again, Dead, open_address
from quintet.transports.stomp import Carrier, Publish, Subscription

Brokers = Callable[[str], Entry]
WITHIN = 45.0  # seconds: more than a busy machine takes, less than a test may

ADDRESSES: dict[str, Callable[[Brokers], str]] = {
    "activemq": lambda broker: str(broker("activemq")["address"]),
    "rabbitmq": lambda broker: str(broker("rabbitmq")["stomp"]),
}
EXCUSES = {
    "activemq": {"REPLIES", "Tailing", "Counting", "?capacity="},
    "rabbitmq": {"REPLIES", "Tailing", "Counting", "?capacity=", "ORDERED"},
}
"""What it may lack on either broker: the reviewed list."""

each_broker = pytest.mark.parametrize("dialect", ADDRESSES)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
@each_broker
async def test_conformance(dialect: str, check: Check, broker: Brokers) -> None:
    missing = check.missing(open_address(f"stomp://?dialect={dialect}"))
    if missing:
        pytest.skip(f"{dialect}'s STOMP lacks {missing}")
    await check.run(Bench(ADDRESSES[dialect](broker)))


@each_broker
def test_it_is_excused_only_for_what_was_reviewed(dialect: str) -> None:
    subject = open_address(f"stomp://?dialect={dialect}")
    assert {missing for sentence in skips(subject).values() for missing in sentence.split(", ")} == EXCUSES[dialect]


@asynccontextmanager
async def bench_at(address: str) -> AsyncGenerator[Bench]:
    bench = Bench(address)
    try:
        yield bench
    finally:
        await bench.close()


class Came:
    """What handlers wrote down, and can be waited for."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self._more = asyncio.Event()

    def __call__(self, what: Any) -> None:
        self.all.append(what)
        self._more.set()

    async def until(self, count: int) -> list[Any]:
        async with asyncio.timeout(WITHIN):
            while len(self.all) < count:
                self._more.clear()
                await self._more.wait()
        return self.all


# Versions


@pytest.mark.parametrize("versions", [("1.0",), ("1.0", "1.1")], ids=["1.0", "1.1"])
@each_broker
async def test_older_versions_carry_requests_retries_events_and_dead_letters(
    dialect: str, versions: tuple[str, ...], broker: Brokers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quintet.wire.stomp_session.VERSIONS", versions)
    run = new_id()

    class Orders(Contract, name=f"orders{run}"):
        @request
        async def echo(self, text: str) -> str: ...

        @notification
        async def placed(self, text: str) -> None: ...

        @event
        async def shipped(self, text: str) -> None: ...

    orders, came = Service(Orders), Came()

    @orders.handles(Orders.echo)
    async def echo(text: str) -> str:
        return text

    @orders.handles(Orders.placed, redelivery=Redelivery(attempts=2, first=0.05))
    async def placed(text: str) -> None:
        came(("placed", text, current().attempt))
        raise ValueError("never\nmind")

    @orders.handles(Orders.shipped)
    async def shipped(text: str) -> None:
        came(("shipped", text, current().attempt))

    address, text = ADDRESSES[dialect](broker), 'Zürich: "\\n"'
    async with serve(orders, at=address), connect(Orders, address) as client:
        assert await client.echo(text) == text
        await orders.publish(Orders.shipped, text)
        await came.until(1)
        await client.placed(text)
        await came.until(3)
    assert came.all == [("shipped", text, 1), ("placed", text, 1), ("placed", text, 2)]
    async with bench_at(address) as bench:
        here = await bench.open()
        assert isinstance(here, Carrier)
        assert here.native.version == versions[-1]
        (letter,) = await until_letters(here, f"orders{run}.v1.placed", 1)
        assert letter.attempts == 2
        assert "never" in letter.reason  # in 1.0 without its line break
        assert await here.drop([letter.id]) == 1


async def until_letters(carrier: Carrier, channel: str, count: int) -> list[Any]:
    async with asyncio.timeout(WITHIN):
        while len(found := list(await carrier.dead(channel))) < count:
            await asyncio.sleep(0.02)
    return found


# What a broker takes


LONG = {
    "activemq": [
        ({"note": "v" * 20_000}, "its header 'note' takes 20005 bytes, and may take 10240"),
        ({"note": ":" * 6000}, "its header 'note' takes 12005 bytes, and may take 10240"),
        ({f"h{number}": "" for number in range(1000)}, "headers, and may have 990"),
        ({f"h{number}": "v" * 9000 for number in range(8)}, "its headers take .* bytes, and may take 60000"),
        ({"": "v"}, "a header cannot be named ''"),
    ],
    "rabbitmq": [
        ({"note": "v" * 70_000}, "its header 'note' takes 70005 bytes, and may take 60000"),
        ({f"h{number}": "v" * 9000 for number in range(8)}, "its headers take .* bytes, and may take 60000"),
        ({"CC": "other"}, "a header cannot be named 'CC': RabbitMQ sends copies by it; take another name"),
        ({"BCC": "other"}, "a header cannot be named 'BCC'"),
    ],
}
"""Headers that a broker hangs up over, or that nobody could read."""


@each_broker
async def test_headers_that_the_broker_would_hang_up_over_are_refused_and_others_are_not_disturbed(
    dialect: str, broker: Brokers
) -> None:
    async with bench_at(ADDRESSES[dialect](broker)) as bench:
        here, channel, receiver = await bench.open(), bench.channel(durable=True), Receiver()
        assert isinstance(here, Carrier)
        await bench.serve(here, channel, receiver)
        native = here.native
        for headers, sentence in LONG[dialect]:
            with pytest.raises(InvalidMessage, match=sentence):
                await here.send(bench.message(channel, b"bad", headers=headers))
        with pytest.raises(InvalidMessage, match=r"takes 700\d\d bytes"):
            await here.send(bench.message(channel, b"bad", key="k" * 70_000))
        most = {"note": "v" * 10_000, **{f"h{number}": "v" * 40 for number in range(900)}}
        await here.send(bench.message(channel, b"good", headers=most))
        (got,) = await bench.got(receiver, 1)
        assert got.headers == most
        assert here.native is native


@pytest.mark.parametrize(
    "headers", [{"quintet-id": "i" * 10_220}, {f"n{number}": "" for number in range(996)}], ids=["long", "many"]
)
async def test_what_fails_with_headers_that_are_as_long_as_they_may_be_comes_again_and_is_a_dead_letter(
    headers: dict[str, str], broker: Brokers
) -> None:
    address = ADDRESSES["activemq"](broker)
    async with bench_at(address) as bench:
        here, channel = await bench.open(), bench.channel(durable=True)
        assert isinstance(here, Carrier)
        receiver = Receiver(Again(0.0), Again(0.05), Dead("hopeless"))
        await bench.serve(here, channel, receiver)
        where = {"destination": f"/queue/{channel.name}", "persistent": "true"}
        await here.native.request("SEND", where | headers, b"1")
        (letter,) = await until_letters(here, channel.name, 1)
        assert [message.attempt for message in receiver.messages] == [1, 2, 3]
        assert (letter.message.body, letter.reason, letter.attempts) == (b"1", "hopeless", 3)
        assert await here.replay([letter.id]) == 1
        await bench.got(receiver, 4)


# Foreign clients


class Heard(stomp.ConnectionListener):  # type: ignore[misc]
    """What stomp.py received, for the loop to read."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.frames: asyncio.Queue[Any] = asyncio.Queue()

    def on_message(self, frame: Any) -> None:
        self.loop.call_soon_threadsafe(self.frames.put_nowait, frame)


@asynccontextmanager
async def foreign(address: str) -> AsyncGenerator[tuple[Any, Heard]]:
    """A connection of stomp.py, which knows nothing of us."""
    user, _, where = address.partition("//")[2].rpartition("@")
    name, _, password = user.partition(":")
    host, _, port = where.partition(":")
    connection, heard = stomp.Connection12([(host, int(port))], vhost="/"), Heard()
    connection.set_listener("", heard)
    await asyncio.to_thread(connection.connect, name, password, wait=True)
    try:
        yield connection, heard
    finally:
        await asyncio.to_thread(connection.disconnect)


EVENTS = {
    "activemq": ({"destination": "/queue/Consumer.foreign.VirtualTopic.{name}"}, "/topic/VirtualTopic.{name}"),
    "rabbitmq": (
        {"destination": "/topic/{name}", "durable": "true", "auto-delete": "false", "x-queue-name": "{name}@foreign"},
        "/topic/{name}",
    ),
}
"""What a foreign group subscribes to, and where a foreign owner of an event sends it."""


@each_broker
async def test_stomp_py_takes_part_by_the_documented_names(dialect: str, broker: Brokers) -> None:
    run = new_id()

    class Orders(Contract, name=f"orders{run}"):
        @request
        async def price(self, item: str) -> int: ...

        @notification
        async def placed(self, item: str) -> None: ...

        @event
        async def shipped(self, item: str) -> None: ...

    class Weather(Contract, name=f"weather{run}"):
        @event
        async def turned(self, to: str) -> None: ...

    orders, came = Service(Orders), Came()

    @orders.handles(Orders.price)
    async def price(item: str) -> int:
        return len(item)

    @orders.handles(Orders.placed)
    async def placed(item: str) -> None:
        came((item, current().headers.get("colour"), current().id != ""))

    @orders.handles(Weather.turned)
    async def turned(to: str) -> None:
        came(to)

    address = ADDRESSES[dialect](broker)
    subscribe, publish = EVENTS[dialect]
    async with serve(orders, at=address, connect={Weather: address}), foreign(address) as (client, heard):
        client.send(f"/queue/orders{run}.v1.placed", '{"item": "tea"}', headers={"colour": "red", "persistent": "true"})
        assert await came.until(1) == [("tea", "red", True)]
        client.send(publish.format(name=f"weather{run}.v1.turned"), '{"to": "rain"}', content_type="application/json")
        assert (await came.until(2))[1] == "rain"

        replies = "/temp-queue/replies"
        if dialect == "activemq":  # RabbitMQ subscribes by the SEND
            client.subscribe(replies, "replies")
        client.send(
            f"/queue/orders{run}.v1.price", '{"item": "tea"}', headers={"reply-to": replies, "correlation-id": "c-7"}
        )
        async with asyncio.timeout(WITHIN):
            reply = await heard.frames.get()
        assert (json.loads(reply.body), reply.headers["correlation-id"]) == (3, "c-7")

        headers = {key: value.format(name=f"orders{run}.v1.shipped") for key, value in subscribe.items()}
        client.subscribe(headers.pop("destination"), "events", "client-individual", headers | {"receipt": "s"})
        await orders.publish(Orders.shipped, "before or after the group is there")
        for number in range(100):
            await orders.publish(Orders.shipped, f"tea {number}")
            if not heard.frames.empty():
                break
        async with asyncio.timeout(WITHIN):
            told = await heard.frames.get()
        client.ack(told.headers["ack"])
        assert "item" in json.loads(told.body)
        assert (told.headers["content-type"], told.headers["type"]) == ("application/json", f"orders{run}.shipped")


# Delivery


@each_broker
async def test_a_message_whose_receiver_went_away_in_the_midst_of_it_comes_with_a_higher_attempt(
    dialect: str, broker: Brokers
) -> None:
    async with bench_at(ADDRESSES[dialect](broker)) as bench:
        here, channel = await bench.open(), bench.channel(durable=True)
        await bench.send(here, channel, b"1", headers={"x": "y"}, key="k")
        for attempt in (1, 2, 3):
            gone, receiver = await bench.open(), Receiver(hold=True)
            await bench.serve(gone, channel, receiver)
            await bench.until(  # RabbitMQ may bring beside it what it was copied from
                lambda attempt=attempt, receiver=receiver: attempt in {m.attempt for m in receiver.messages},  # type: ignore[misc]
                lambda receiver=receiver: f"attempt {attempt} was due: {receiver.messages}",  # type: ignore[misc]  # noqa: B023
            )
            for message in receiver.messages:
                assert (message.body, message.key, message.headers) == (b"1", "k", {"x": "y"})
            await gone.close()


@each_broker
async def test_groups_may_have_any_name(dialect: str, broker: Brokers) -> None:
    async with bench_at(ADDRESSES[dialect](broker)) as bench:
        here, channel = await bench.open(), bench.channel("Ereignis/ä", fanout=True, durable=True)
        groups = {name: Receiver(Again(0.0), Again(0.05)) for name in ("a", "a.b", "a.b.c", "A/b %*>", "größe")}
        for name, receiver in groups.items():
            await bench.serve(here, channel, receiver, name)
        await bench.send(here, channel, b"1")
        for receiver in groups.values():
            await bench.got(receiver, 3)
            assert [message.attempt for message in receiver.messages] == [1, 2, 3]


@each_broker
async def test_all_dead_letters_are_seen_however_many_there_are(dialect: str, broker: Brokers) -> None:
    many = 500  # ActiveMQ's browser shows 400
    async with bench_at(ADDRESSES[dialect](broker)) as bench:
        here, channel = await bench.open(), bench.channel(durable=True)
        assert isinstance(here, Carrier)
        receiver = Receiver(*[Dead("hopeless")] * many)
        await bench.serve(here, channel, receiver)
        await asyncio.gather(*(here.send(bench.message(channel, b"%d" % number)) for number in range(many)))
        letters = await until_letters(here, channel.name, many)
        assert sorted(int(letter.message.body) for letter in letters) == list(range(many))
        last = letters[-1].id
        assert await here.replay([last]) == 1
        await bench.got(receiver, many + 1)
        dropped = await here.drop([letter.id for letter in letters])
        assert dropped == many - 1
        assert await here.dead(channel.name) == []


@each_broker
async def test_dead_letters_that_nobody_looked_at_yet_are_all_seen_at_once(dialect: str, broker: Brokers) -> None:
    many = 2000  # ActiveMQ brings some hundreds, and then none until something happens
    async with bench_at(ADDRESSES[dialect](broker)) as bench:
        writer, reader, channel = await bench.open(), await bench.open(), bench.channel(durable=True)
        assert isinstance(reader, Carrier)
        fresh = [bury(bench.message(channel), "", "hopeless", writer.clock) for _ in range(many)]
        await asyncio.gather(*(writer.send(letter) for letter in fresh))
        letters = await reader.dead(channel.name)
        assert len(letters) == many
        assert await reader.drop([letter.id for letter in letters]) == many


@each_broker
async def test_two_that_look_at_the_dead_letters_see_them_all(dialect: str, broker: Brokers) -> None:
    async with bench_at(ADDRESSES[dialect](broker)) as bench:
        here, channel = await bench.open(), bench.channel(durable=True)
        assert isinstance(here, Carrier)
        await bench.serve(here, channel, Receiver(*[Dead("hopeless")] * 3))
        await bench.send(here, channel, b"1", b"2", b"3")
        letters = await until_letters(here, channel.name, 3)
        seen = await asyncio.gather(*(here.dead(channel.name) for _ in range(4)))
        assert [len(found) for found in seen] == [3, 3, 3, 3]
        await here.drop([letter.id for letter in letters])


@each_broker
async def test_a_dead_letter_of_a_group_that_is_gone_is_shown_and_dropped_but_not_replayed(
    dialect: str, broker: Brokers
) -> None:
    async with bench_at(ADDRESSES[dialect](broker)) as bench:
        here, channel = await bench.open(), bench.channel(fanout=True)
        assert isinstance(here, Carrier)
        gone = Channel(channel.name, fanout=True, temporary=True)
        await bench.serve(here, gone, Receiver(Dead("hopeless")), "screen-1")
        await bench.send(here, channel, b"1")
        (letter,) = await until_letters(here, channel.name, 1)
        assert await here.replay([letter.id]) == 0
        assert await here.drop([letter.id]) == 1


# What only ActiveMQ does


async def test_a_selector_takes_what_it_selects_and_leaves_the_rest(broker: Brokers) -> None:
    async with bench_at(ADDRESSES["activemq"](broker)) as bench:
        here, name = await bench.open(), bench.name()
        europe, rest = Receiver(), Receiver()
        selected = Channel(name, durable=True, native=(Subscription(selector="region = 'EU' AND JMSType = 'sold'"),))
        await bench.serve(here, selected, europe)
        for region in ("EU", "US", "EU"):
            message = bench.message(Channel(name, durable=True), region.encode(), headers={"region": region})
            message.operation = "sold"
            await here.send(message)
        await bench.got(europe, 2)
        await bench.serve(here, Channel(name, durable=True), rest)
        await bench.got(rest, 1)
        assert (europe.bodies, rest.bodies) == ([b"EU", b"EU"], [b"US"])


async def test_of_exclusive_receivers_one_gets_all(broker: Brokers) -> None:
    async with bench_at(ADDRESSES["activemq"](broker)) as bench:
        one, two, name = await bench.open(), await bench.open(), bench.name()
        channel = Channel(name, durable=True, native=(Subscription(exclusive=True),))
        first, second = Receiver(), Receiver()
        serving = await bench.serve(one, channel, first)
        await bench.serve(two, channel, second)
        await bench.send(two, channel, *[b"%d" % number for number in range(20)])
        await bench.got(first, 20)
        await serving.stop()
        await bench.send(two, channel, b"last")
        await bench.got(second, 1)
        assert second.bodies == [b"last"]


@each_broker
async def test_a_priority_arrives(dialect: str, broker: Brokers) -> None:
    address = ADDRESSES[dialect](broker)
    async with bench_at(address) as bench, foreign(address) as (client, heard):
        here, channel = await bench.open(), bench.channel(durable=True)
        client.subscribe(f"/queue/{channel.name}", "1")
        await here.send(bench.message(channel, b"1", native=(Publish(priority=8),)))
        async with asyncio.timeout(WITHIN):
            frame = await heard.frames.get()
        assert frame.headers["priority"] == "8"


# Connections


@each_broker
async def test_tls_is_verified_by_default(dialect: str, broker: Brokers, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = broker(dialect)
    address = entry["tls"] if dialect == "activemq" else entry["stomp_tls"]
    monkeypatch.setattr("quintet.connection.FIRST_SECONDS", 0.0)
    with pytest.raises(Refused, match="certificate is not trusted"):
        await open_address(address).open()
    async with bench_at(f"{address}?ca={entry['ca']}") as bench:
        here, channel, receiver = await bench.open(), bench.channel(durable=True), Receiver()
        await bench.serve(here, channel, receiver)
        await bench.send(here, channel, b"1")
        await bench.got(receiver, 1)


@each_broker
async def test_of_several_hosts_the_one_that_answers_is_used(dialect: str, broker: Brokers) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()[1]
    address = ADDRESSES[dialect](broker)
    async with bench_at(address.replace("@", f"@127.0.0.1:{nobody},")) as bench:
        here, channel = await bench.open(), bench.channel(durable=True)
        await bench.send(here, channel, b"1")


@each_broker
async def test_a_wrong_password_is_told_at_once(dialect: str, broker: Brokers) -> None:
    address = ADDRESSES[dialect](broker)
    user, _, where = address.partition("//")[2].rpartition("@")
    wrong: Awaitable[None] = open_address(f"stomp://{user.partition(':')[0]}:wrong@{where}").open()
    with pytest.raises(Exception, match="the broker refuses us: ") as caught:
        await wrong
    assert "wrong" not in str(caught.value)


async def test_a_caller_that_is_gone_costs_the_service_no_connection(broker: Brokers) -> None:
    address = ADDRESSES["activemq"](broker)
    async with bench_at(address) as bench:
        here, gone = await bench.open(), await bench.open()
        assert isinstance(here, Carrier)
        replies = Channel("replies", temporary=True, replies=True)
        await gone.serve(replies, Receiver(), "")
        channel, receiver = bench.channel(), Receiver()
        await bench.serve(here, channel, receiver)
        await gone.send(bench.message(channel, b"ask", reply_to="replies"))
        (asked,) = await bench.got(receiver, 1)
        await gone.close()
        native = here.native
        for _ in range(3):
            await here.send(Message(channel=Channel(asked.reply_to, temporary=True), body=b"late"))
        await bench.send(here, bench.channel(durable=True), b"still there")
        assert here.native is native


@each_broker
async def test_the_doctor_is_told_what_there_is(dialect: str, broker: Brokers) -> None:
    async with bench_at(ADDRESSES[dialect](broker)) as bench:
        findings = {finding.what: finding for finding in await (await bench.open()).examine()}
        assert all(finding.well for finding in findings.values())
        assert findings["broker"].says.lower().startswith(f"{dialect}/")
        assert findings["protocol"].says == "STOMP 1.2"
        assert "scheduler" in findings["delayed redelivery"].says or dialect == "rabbitmq"
