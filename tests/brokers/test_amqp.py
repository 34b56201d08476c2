"""RabbitMQ: the conformance suite on the real broker, and what only RabbitMQ can get wrong."""

# mypy: disable-error-code="empty-body"
from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from urllib.parse import quote, urlsplit

import aio_pika
import pytest
from commands import quintet
from running import Broker, Entry

from quintet import Contract, Policy, Redelivery, Service, connect, current, event, notification, request, serve
from quintet.connection import Refused
from quintet.dead_letters import bury
from quintet.errors import ChannelFull, ConnectionLost, InvalidMessage, TransportError, Unavailable
from quintet.message import Channel, Message, new_id
from quintet.replies import Replies
from quintet.testing import CHECKS, Bench, Check, skips
from quintet.testing.bench import Receiver
from quintet.transport import DONE, Again, Dead, Verdict, open_address
from quintet.transports.amqp import Carrier, Publish, Queue
from quintet.wire.amqp_topology import place_of

Brokers = Callable[[str], Entry]

EXCUSES = {"REPLIES", "Counting", "?capacity="}
"""What RabbitMQ may lack: replies are the core's, it tells of no message that is in work, and a length is an argument
of the queue, `Queue(max_length=)`, which cannot be changed once that is there."""

WITHIN = 45.0  # seconds: more than a busy machine takes, less than a test may


def management(broker: Brokers, method: str, path: str, body: object = None) -> Any:
    """The management plugin's HTTP API: what an operator does."""
    parts = urlsplit(broker("rabbitmq")["management"])
    opener = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    opener.add_password(None, f"http://{parts.hostname}:{parts.port}", parts.username or "", parts.password or "")
    call = urllib.request.Request(f"http://{parts.hostname}:{parts.port}/api/{path}", method=method)
    if body is not None:
        call.data = json.dumps(body).encode()
        call.add_header("content-type", "application/json")
    with urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(opener)).open(call) as answer:
        said = answer.read()
    return json.loads(said) if said else None


@pytest.fixture(scope="module", autouse=True)
def swept(broker: Brokers) -> Iterator[None]:
    """Leaves no queue and no dead letter of ours behind."""
    yield
    run = new_id().partition("-")[0]  # of this process: all names of its benches have it
    names = [queue["name"] for queue in management(broker, "GET", "queues/%2F?columns=name")]
    ours = [name for name in names if run in name or name.startswith("check-orders.")]
    for name in ours:
        management(broker, "DELETE", f"queues/%2F/{quote(name, safe='')}")
    asyncio.run(drop_letters(str(broker("rabbitmq")["address"]), run))


async def drop_letters(address: str, run: str) -> None:
    async with bench_at(address) as bench:
        carrier = await opened(bench)
        await carrier.drop([letter.id for letter in await carrier.dead() if run in letter.channel])


@pytest.fixture
def address(broker: Brokers) -> str:
    return str(broker("rabbitmq")["address"])


@asynccontextmanager
async def bench_at(address: str) -> AsyncIterator[Bench]:
    bench = Bench(address)
    try:
        async with asyncio.timeout(WITHIN):
            yield bench
    finally:
        await bench.close()


async def opened(bench: Bench) -> Carrier:
    carrier = await bench.open()
    assert isinstance(carrier, Carrier)
    return carrier


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WITHIN):
        while not await holds():
            await asyncio.sleep(0.01)


# The specification


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
async def test_rabbitmq(address: str, check: Check) -> None:
    if missing := check.missing(Carrier):
        pytest.skip(f"RabbitMQ lacks {missing}")
    await check.run(Bench(address))


def test_rabbitmq_is_excused_only_for_what_was_reviewed() -> None:
    assert {missing for sentence in skips(Carrier).values() for missing in sentence.split(", ")} == EXCUSES


# Connections


async def test_a_connection_that_an_operator_closes_comes_back_and_what_was_in_work_is_marked(
    broker: Brokers, address: str
) -> None:
    async with bench_at(address) as bench:
        carrier, channel, receiver = await opened(bench), bench.channel(durable=True), Receiver(hold=True)
        told: list[str] = []
        carrier.tell = lambda kind, subject, reason="": told.append(kind)
        await bench.serve(carrier, channel, receiver)
        await bench.send(carrier, channel, b"1")
        await bench.got(receiver, 1)
        for connection in await asyncio.to_thread(own_connections, broker):
            await asyncio.to_thread(management, broker, "DELETE", f"connections/{quote(connection, safe='')}")
        await bench.got(receiver, 2)
        assert [message.attempt for message in receiver.messages] == [1, 2]
        receiver.release()
        await bench.send(carrier, channel, b"2")
        await bench.got(receiver, 3)
        assert told == ["broker-lost", "broker-back"]
        assert carrier.connected
        await eventually(lambda: empty(carrier, channel.name))


def own_connections(broker: Brokers) -> list[str]:
    """The connections of this process; the broker shows them some seconds after they were made."""
    give_up = time.monotonic() + WITHIN
    while time.monotonic() < give_up:
        all_of_them = management(broker, "GET", "connections?columns=name,client_properties.connection_name")
        own = [
            one["name"]
            for one in all_of_them
            if f"process {os.getpid()} " in one.get("client_properties", {}).get("connection_name", "")
        ]
        if len(own) >= 2:
            return own
        time.sleep(0.1)
    raise AssertionError("the broker does not show our connections")


async def empty(carrier: Carrier, queue: str) -> bool:
    answer = await carrier.native.call("queue.declare", queue=queue, passive=True)
    return int(answer["message_count"]) == 0


async def test_a_wrong_password_and_a_wrong_virtual_host_are_refused_with_the_brokers_words(
    address: str,
) -> None:
    with pytest.raises(Refused, match=r"^amqp://guest:\*\*\*@.*Login was refused.*PLAIN.*; check user and password"):
        await open_address(address.replace("guest:guest@", "guest:wrong@")).open()
    with pytest.raises(
        Refused, match=r"^amqp://.*/nowhere: .*vhost nowhere not found; name a virtual host that is there"
    ):
        await open_address(f"{address}/nowhere").open()


async def test_amqps_verifies_the_brokers_certificate(broker: Brokers) -> None:
    entry = broker("rabbitmq")
    carrier = open_address(f"{entry['tls']}?ca={entry['ca']}")
    await carrier.open()
    assert carrier.connected
    await carrier.close()
    with pytest.raises(Refused, match="certificate is not trusted"):
        await open_address(entry["tls"]).open()


async def test_a_broker_that_takes_no_messages_makes_a_send_wait_until_its_time_is_up(
    private_broker: Callable[[str], Broker],
) -> None:
    own = await asyncio.to_thread(private_broker, "rabbitmq")

    def alarm(watermark: str) -> None:
        command = [own.entry["rabbitmqctl"], "set_vm_memory_high_watermark", watermark]
        subprocess.run(
            command, env=own.entry["environment"] | {"PATH": "/usr/bin:/bin"}, check=True, capture_output=True
        )

    async with bench_at(own.address) as bench:
        carrier, channel, receiver = await opened(bench), bench.channel(durable=True), Receiver()
        await bench.serve(await opened(bench), channel, receiver)
        await bench.send(carrier, channel, b"before")
        await asyncio.to_thread(alarm, "0.0000001")
        first = bench.start(carrier.send(bench.message(channel, b"the first finds out")))
        await bench.until(lambda: bool(carrier.native.blocked), lambda: "the broker never said that it is blocked")
        until = bench.clock.now() + 0.1
        with pytest.raises(Unavailable, match="not sent, the broker takes no messages: low on memory"):
            await carrier.send(bench.message(channel, b"given up", until=until))
        assert bench.clock.now() < until, "its sender's own time-out came first, and said that it does not know"
        waiting = bench.start(carrier.send(bench.message(channel, b"waits", until=bench.clock.now() + 30)))
        doctor = await asyncio.to_thread(quintet, "doctor", "--at", own.address)
        assert (doctor.returncode, doctor.stderr) == (0, "")
        assert re.search(r"^! round trip: .* takes no messages: low on memory$", doctor.stdout, re.MULTILINE)
        assert "! takes messages: low on memory" in doctor.stdout
        await asyncio.to_thread(alarm, "0.8")
        await asyncio.gather(first, waiting)
        await bench.got(receiver, 3)
        assert b"given up" not in receiver.bodies


# What cannot be delivered


async def test_a_queue_that_is_deleted_is_declared_again_by_who_sends_to_it(address: str) -> None:
    async with bench_at(address) as bench:
        carrier, channel, receiver = await opened(bench), bench.channel(durable=True), Receiver()
        await bench.send(carrier, channel, b"lost with its queue")
        await carrier.native.call("queue.delete", queue=channel.name)
        await bench.send(carrier, channel, b"kept")
        await bench.serve(await opened(bench), channel, receiver)
        assert [message.body for message in await bench.got(receiver, 1)] == [b"kept"]


async def test_a_request_whose_queue_is_gone_fails_at_once_and_the_next_declares_it(address: str) -> None:
    async with bench_at(address) as bench:
        carrier, channel = await opened(bench), bench.channel()
        replies = Replies(carrier, "test")
        await replies.open()

        async def answer(message: Message) -> Verdict:
            reply = Message(channel=Channel(message.reply_to, temporary=True), correlation_id=message.correlation_id)
            reply.body = message.body * 2
            await carrier.send(reply)
            return DONE

        asked = bench.start(replies.exchange(bench.message(channel, b"1")))  # declares the queue, and waits in it
        await eventually(lambda: there(carrier, channel.name))
        await carrier.native.call("queue.delete", queue=channel.name)
        refused = await replies.exchange(bench.message(channel, b"2"))
        assert (refused.status, b"nobody serves it" in refused.body, b"not sent" in refused.body) == (
            "unavailable",
            True,
            True,
        )
        third = bench.start(replies.exchange(bench.message(channel, b"3")))
        await bench.serve(carrier, channel, answer)
        assert (await third).body == b"33"
        asked.cancel()
        await replies.close()


async def there(carrier: Carrier, queue: str) -> bool:
    try:
        await carrier.native.call("queue.declare", queue=queue, passive=True)
    except TransportError:
        return False
    return True


async def test_a_reply_to_a_caller_that_is_gone_is_dropped_without_harm(address: str) -> None:
    async with bench_at(address) as bench:
        carrier, channel, receiver = await opened(bench), bench.channel(durable=True), Receiver()
        before = carrier.native
        for gone in ("amq.rabbitmq.reply-to.g1h2AA5yZXBseUA1MDQwMzY4MAAAAAAAAAAAAAAAAA==", "replies.gone", ""):
            await carrier.send(bench.message(Channel(gone, temporary=True), b"late", correlation_id="c"))
        await bench.send(carrier, channel, b"1")
        await bench.serve(carrier, channel, receiver)
        await bench.got(receiver, 1)
        assert carrier.native is before, "the connection was given up over it"


async def test_who_waits_for_a_reply_learns_that_the_connection_broke(broker: Brokers, address: str) -> None:
    async with bench_at(address) as bench:
        carrier, channel = await opened(bench), bench.channel()
        replies = Replies(carrier, "test")
        await replies.open()
        asked = bench.start(replies.exchange(bench.message(channel, b"1")))
        await eventually(lambda: there(carrier, channel.name))
        sent = bench.start(carrier.send(bench.message(bench.channel(durable=True), b"2")))
        await sent
        carrier.native.link.drop(ConnectionResetError("cut"))
        failed = await asked
        assert (failed.status, b"unknown" in failed.body) == ("connection-lost", True)
        answer = bench.start(replies.exchange(bench.message(channel, b"3")))  # the new connection listens, too
        receiver = Receiver()
        await bench.serve(await opened(bench), channel, receiver)
        request_ = (await bench.got(receiver, 2))[1]
        await carrier.send(
            Message(
                channel=Channel(request_.reply_to, temporary=True),
                body=b"well",
                correlation_id=request_.correlation_id,
            )
        )
        assert (await answer).body == b"well"
        await replies.close()


async def test_what_was_sent_and_not_confirmed_when_the_connection_breaks_is_unknown(address: str) -> None:
    async with bench_at(address) as bench:
        carrier, channel = await opened(bench), bench.channel(durable=True)
        await bench.send(carrier, channel, b"1")
        sending = bench.start(carrier.send(bench.message(channel, b"2")))
        await asyncio.sleep(0)  # it is written
        carrier.native.link.drop(ConnectionResetError("cut"))
        with pytest.raises(ConnectionLost, match="sent, but not confirmed: cut"):
            await sending


# Consumers


async def test_a_consumer_that_the_broker_cancels_serves_on(address: str) -> None:
    async with bench_at(address) as bench:
        carrier, channel, receiver = await opened(bench), bench.channel(durable=True), Receiver()
        await bench.serve(carrier, channel, receiver)
        await carrier.native.call("queue.delete", queue=channel.name)

        async def served() -> bool:
            try:
                answer = await carrier.native.call("queue.declare", queue=channel.name, passive=True)
            except TransportError:
                return False
            return bool(answer["consumer_count"])

        await eventually(served)
        await bench.send(await opened(bench), channel, b"1")
        await bench.got(receiver, 1)


@pytest.mark.parametrize("keyed", [False, True], ids=["", "keyed"])
async def test_a_queue_that_is_deleted_and_declared_again_at_once_is_served_again_although_the_broker_says_nothing(
    address: str, monkeypatch: pytest.MonkeyPatch, keyed: bool
) -> None:
    monkeypatch.setattr("quintet.transports.amqp.serving.IDLE", 0.1)
    async with bench_at(address) as bench:
        carrier, name, receiver = await opened(bench), bench.name(), Receiver()
        channel = Channel(name, durable=True, keyed=keyed)
        serving = await bench.serve(await opened(bench), channel, receiver)
        await bench.send(carrier, channel, b"1")
        await bench.got(receiver, 1)
        place = place_of(channel, "", lasting=True)
        line = await carrier.native.line()
        await asyncio.gather(
            line.call("queue.delete", queue=name),
            line.call("queue.declare", queue=name, durable=True, arguments=place.arguments),
        )
        await line.close()
        await bench.send(carrier, channel, b"2", b"3")
        await bench.got(receiver, 3)
        assert sorted(receiver.bodies) == [b"1", b"2", b"3"]
        await serving.stop()
        assert await carrier.native.call("queue.delete", queue=name) == {"message_count": 0}


async def test_who_sends_to_a_deleted_queue_gives_its_receivers_the_time_to_hear_of_that(address: str) -> None:
    async with bench_at(address) as bench:
        carrier, channel, receiver = await opened(bench), bench.channel(durable=True), Receiver()
        await bench.serve(carrier, channel, receiver)
        await bench.serve(await opened(bench), channel, receiver)
        await bench.send(carrier, channel, b"1")
        await bench.got(receiver, 1)
        for number in range(2, 7):
            await carrier.native.call("queue.delete", queue=channel.name)
            await bench.send(carrier, channel, b"%d" % number)
            await bench.got(receiver, number)


async def test_a_subscription_that_is_renewed_all_the_time_loses_nothing_and_handles_nothing_twice(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quintet.transports.amqp.serving.IDLE", 0.002)
    async with bench_at(address) as bench:
        carrier, channel, receiver = await opened(bench), bench.channel(durable=True), Receiver()
        serving = await bench.serve(carrier, channel, receiver)
        for number in range(100):
            await bench.send(carrier, channel, b"%d" % number)
        await bench.got(receiver, 100)
        assert sorted(map(int, receiver.bodies)) == list(range(100))
        await serving.stop()
        assert await empty(carrier, channel.name)


async def test_an_amqp_channel_that_the_broker_closes_is_opened_again_and_no_other_suffers(address: str) -> None:
    async with bench_at(address) as bench:
        carrier, bad, other = (
            await opened(bench),
            bench.channel("bad", durable=True),
            bench.channel("other", durable=True),
        )
        first, second = Receiver(hold=True), Receiver(hold=True)
        serving = await carrier.serve(bad, first, "")
        await carrier.serve(other, second, "")
        reports: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context["message"]))
        await bench.send(carrier, bad, b"1")
        await bench.send(carrier, other, b"2")
        await bench.got(first, 1)
        await bench.got(second, 1)
        assert serving.subscription
        serving.subscription.line.tell(
            "basic.ack", delivery_tag=99
        )  # as the broker sees it after its consumer time-out
        await bench.got(first, 2)
        assert [message.attempt for message in first.messages] == [1, 2]
        assert len(second.messages) == 1
        assert len(reports) == 1
        assert "unknown delivery tag 99; it is served again" in reports[0]
        first.release()
        second.release()
        await eventually(lambda: empty(carrier, bad.name))
        await eventually(lambda: empty(carrier, other.name))


async def test_a_queue_that_is_there_with_other_arguments_is_told_in_one_sentence_and_may_be_taken_as_it_is(
    address: str,
) -> None:
    async with bench_at(address) as bench:
        carrier, channel, other, receiver = (
            await opened(bench),
            bench.channel(durable=True),
            bench.channel(durable=True),
            Receiver(),
        )
        await carrier.native.call("queue.declare", queue=channel.name, durable=True, arguments={"x-max-length": 7})
        await carrier.serve(other, Receiver(), "")
        with pytest.raises(TransportError, match=r"inequivalent arg.*other arguments: delete it, or take it as it is"):
            await carrier.serve(channel, receiver, "")
        await bench.send(carrier, other, b"goes on")
        unwritable = Channel(bench.name(), durable=True, native=(Queue(arguments={"x-expires": timedelta(1)}),))
        with pytest.raises(TransportError, match=f"{unwritable.name} at amqp://.* cannot stand in an AMQP table"):
            await carrier.serve(unwritable, receiver, "")
        taken = Channel(channel.name, durable=True, native=(Queue(declare=False),))
        await carrier.serve(taken, receiver, "")
        await bench.send(await opened(bench), channel, b"1")
        await bench.got(receiver, 1)


async def test_what_is_handled_in_any_order_is_acknowledged_all(address: str) -> None:
    async with bench_at(address) as bench:
        carrier, channel = await opened(bench), bench.channel(durable=True)
        count = 0

        async def receive(message: Message) -> Verdict:
            nonlocal count
            for _ in range(int(message.body) % 7):
                await asyncio.sleep(0)
            count += 1
            return DONE

        serving = await carrier.serve(channel, receive, "", 30)
        await asyncio.gather(*(carrier.send(bench.message(channel, b"%d" % number)) for number in range(500)))
        await bench.until(lambda: count == 500, lambda: f"{count} of 500 came")
        await serving.stop()
        assert await empty(carrier, channel.name), "some were given back"
        assert count == 500


async def test_short_waits_are_not_held_up_by_long_ones(address: str) -> None:
    async with bench_at(address) as bench:
        carrier, channel = await opened(bench), bench.channel(durable=True)
        order: list[tuple[bytes, int]] = []

        async def receive(message: Message) -> Verdict:
            order.append((message.body, message.attempt))
            if message.attempt == 1:
                return Again(1.5 if message.body == b"long" else 0.05)
            return DONE

        await bench.serve(carrier, channel, receive)
        await bench.send(carrier, channel, b"long", b"short")
        await bench.until(lambda: len(order) == 4, lambda: f"four deliveries were due: {order}")
        assert order[2:] == [(b"short", 2), (b"long", 2)]


async def test_what_waits_while_its_queue_is_deleted_is_a_dead_letter(address: str) -> None:
    async with bench_at(address) as bench:
        carrier, channel, receiver = await opened(bench), bench.channel(durable=True), Receiver(Again(0.8))
        serving = await bench.serve(carrier, channel, receiver)
        await bench.send(carrier, channel, b"1")
        await bench.got(receiver, 1)
        await serving.stop()
        await carrier.native.call("queue.delete", queue=channel.name)
        async with asyncio.timeout(WITHIN):
            while not (letters := await carrier.dead(channel.name)):
                await asyncio.sleep(0.05)
        assert (letters[0].reason, letters[0].attempts, letters[0].message.body) == ("its queue is gone", 2, b"1")
        assert await carrier.drop([letters[0].id]) == 1


async def bury_many(carrier: Carrier, name: str, count: int) -> list[str]:
    """Puts so many dead letters of one channel where they belong, and gives their ids."""
    dead = [
        bury(Message(channel=Channel(name, durable=True), id=f"{name}-{number}"), "", "broken", carrier.clock)
        for number in range(count)
    ]
    await carrier.store("", "quintet.dead", dead[0], lambda: True)
    for start in range(1, count, 500):
        stored = (carrier.store("", "quintet.dead", one, lambda: True) for one in dead[start : start + 500])
        assert all(await asyncio.gather(*stored))
    return [f"{name}-{number}@{name}" for number in range(count)]


async def test_of_very_many_dead_letters_those_that_are_named_are_dropped_and_the_others_stay(address: str) -> None:
    async with bench_at(address) as bench:
        carrier, gone, kept = await opened(bench), bench.name(), bench.name()
        ids = (
            await bury_many(carrier, gone, 1000)
            + await bury_many(carrier, kept, 30)
            + await bury_many(carrier, gone + "-too", 1000)
        )
        dropped = [id_ for id_ in ids if not id_.endswith(f"@{kept}")]
        assert await carrier.drop(dropped) == 2000
        assert [len(await carrier.dead(name)) for name in (gone, kept, gone + "-too")] == [0, 30, 0]
        assert await carrier.drop(ids) == 30
        assert await carrier.drop(ids) == 0


async def test_very_many_dead_letters_are_replayed_each_once(address: str) -> None:
    async with bench_at(address) as bench:
        carrier, channel = await opened(bench), bench.channel(durable=True)
        ids = await bury_many(carrier, channel.name, 1500)
        await (await carrier.serve(channel, Receiver(), "")).stop()
        assert await carrier.replay(ids) == 1500
        assert await carrier.dead(channel.name) == []
        answer = await carrier.native.call("queue.declare", queue=channel.name, passive=True)
        assert answer["message_count"] == 1500


async def test_two_who_look_at_the_dead_letters_at_the_same_time_both_see_them_all(address: str) -> None:
    async with bench_at(address) as bench:
        one, two, channel = await opened(bench), await opened(bench), bench.channel(durable=True)
        ids = await bury_many(one, channel.name, 200)
        looks = await asyncio.gather(*(carrier.dead(channel.name) for carrier in (one, two, one, two)))
        assert [len(look) for look in looks] == [200] * 4
        drops = await asyncio.gather(one.drop(ids), two.drop(ids))
        assert sorted(drops) == [0, 200]


async def test_who_goes_on_looking_at_the_dead_letters_is_told_to_the_next(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench_at(address) as bench:
        one, two = await opened(bench), await opened(bench)
        monkeypatch.setattr("quintet.transports.amqp.letters.LETTERS_SECONDS", 0.1)
        await one.native.call("queue.declare", queue="quintet.dead.looking", exclusive=True)
        with pytest.raises(TransportError, match="another looks at the dead letters, try again later"):
            await two.dead()


# What RabbitMQ alone can do


async def test_priorities_go_first(address: str) -> None:
    async with bench_at(address) as bench:
        carrier, name, receiver = await opened(bench), bench.name(), Receiver()
        channel = Channel(name, durable=True, native=(Queue(max_priority=9),))
        await (await carrier.serve(channel, Receiver(), "")).stop()
        for priority in (0, 5, 9, 5):
            message = bench.message(Channel(name, durable=True), b"%d" % priority)
            message.native = (Publish(priority=priority),)
            await carrier.send(message)
        await bench.serve(carrier, channel, receiver, limit=1)
        assert [message.body for message in await bench.got(receiver, 4)] == [b"9", b"5", b"5", b"0"]


async def test_of_receivers_of_an_exclusive_queue_one_gets_all_until_it_goes(address: str) -> None:
    async with bench_at(address) as bench:
        here, one, two = await opened(bench), await opened(bench), await opened(bench)
        channel, first, second = bench.channel(durable=True), Receiver(), Receiver()
        exclusive = Channel(channel.name, durable=True, native=(Queue(exclusive=True),))
        serving = await bench.serve(one, exclusive, first)
        await bench.serve(two, exclusive, second)
        await bench.send(here, channel, b"1", b"2", b"3")
        await bench.got(first, 3)
        await serving.stop()
        await bench.send(here, channel, b"4")
        await bench.got(second, 1)
        assert second.bodies == [b"4"]


async def test_a_stream_is_read_from_where_one_says_and_stays(address: str) -> None:
    async with bench_at(address) as bench:
        carrier, name = await opened(bench), bench.name()
        stream = Channel(name, fanout=True, durable=True, native=(Queue(type="stream", stream_offset="first"),))
        await (await carrier.serve(stream, Receiver(), "history")).stop()
        await bench.send(carrier, Channel(name, fanout=True, durable=True), b"1", b"2", b"3")
        for _ in range(2):
            receiver = Receiver(Again(0.05))
            serving = await carrier.serve(stream, receiver, "history", 10)
            await bench.got(receiver, 4)
            assert sorted(receiver.bodies) == [b"1", b"1", b"2", b"3"], "one was handled again"
            await serving.stop()
        later = Channel(name, fanout=True, durable=True, native=(Queue(type="stream", stream_offset=2),))
        receiver = Receiver()
        await carrier.serve(later, receiver, "history", 10)
        assert [message.body for message in await bench.got(receiver, 1)] == [b"3"]


async def test_a_full_queue_refuses_and_of_a_full_group_the_oldest_is_a_dead_letter(address: str) -> None:
    async with bench_at(address) as bench:
        carrier, name, event_ = await opened(bench), bench.name(), bench.name()
        bounded = (Queue(max_length=3),)
        await (await carrier.serve(Channel(name, durable=True, native=bounded), Receiver(), "")).stop()
        channel = Channel(name, durable=True)
        with pytest.raises(ChannelFull, match=f"{name} at .* its queue is full"):
            await bench.send(carrier, channel, *[b"%d" % number for number in range(10)])
        group = Channel(event_, fanout=True, durable=True, native=bounded)
        await (await carrier.serve(group, Receiver(), "lagging")).stop()
        await bench.send(carrier, Channel(event_, fanout=True, durable=True), b"0", b"1", b"2", b"3")
        async with asyncio.timeout(WITHIN):
            while not (letters := await carrier.dead(event_)):
                await asyncio.sleep(0.05)
        letter = letters[0]
        assert (letter.group, letter.message.body, letter.attempts) == ("lagging", b"0", 1)
        assert letter.reason == "its queue was full, and it was the oldest"
        receiver = Receiver()
        serving = await carrier.serve(group, receiver, "lagging")
        await bench.got(receiver, 3)
        assert await carrier.replay([letter.id]) == 1
        assert (await bench.got(receiver, 4))[3].body == b"0"
        await serving.stop()


async def test_a_message_that_the_broker_refuses_disturbs_neither_the_connection_nor_what_is_sent_next(
    address: str,
) -> None:
    async with bench_at(address) as bench:
        carrier, channel, receiver, asked = (
            await opened(bench),
            bench.channel(durable=True),
            Receiver(),
            bench.channel(),
        )
        replies = Replies(carrier, "test")
        await replies.open()

        async def answer(message: Message) -> Verdict:
            reply = Message(channel=Channel(message.reply_to, temporary=True), correlation_id=message.correlation_id)
            await carrier.send(reply)
            return DONE

        await bench.serve(carrier, channel, receiver)
        serving = await bench.serve(carrier, asked, Receiver(hold=True), limit=1)
        await bench.send(carrier, channel, b"1")
        before = carrier.native
        waiting = bench.start(replies.exchange(bench.message(asked, b"1")))
        await bench.until(lambda: serving.intake.size == 1, lambda: "the request never came")
        for line in (before.outlet, before.plain):  # as one that is too large, or to an exchange that is gone
            line.publish("nowhere", "", bench.message(channel, b"refused"))
        refused = bench.start(carrier.send(bench.message(channel, b"2")))
        await asyncio.gather(refused, return_exceptions=True)
        assert isinstance(refused.exception(), ConnectionLost), "it stood behind one that was refused"
        assert (await waiting).status == "connection-lost", "its reply would have come to a channel that is gone"
        await bench.send(carrier, channel, b"3")
        await bench.until(lambda: b"3" in receiver.bodies, lambda: f"only {receiver.bodies} came")
        await serving.abort()
        await bench.serve(carrier, asked, answer)
        assert not (await replies.exchange(bench.message(asked, b"2"))).status
        assert (carrier.native is before, before.error) == (True, None)
        await replies.close()


async def test_the_native_connection_does_what_amqp_can_and_says_what_the_broker_says(address: str) -> None:
    async with bench_at(address) as bench:
        carrier, name = await opened(bench), bench.name()
        await carrier.native.call("queue.declare", queue=name, durable=True)
        line = await carrier.native.line()
        line.publish("", name, Message(channel=Channel(name, durable=True), body=b"by hand"))
        got = await line.call("basic.get", queue=name)
        assert (got.body, got.fields["message_count"]) == (b"by hand", 0)
        await line.close()
        await eventually(lambda: purged(carrier, name))
        with pytest.raises(TransportError, match="NOT_FOUND - no queue 'nowhere'"):
            await carrier.native.call("queue.purge", queue="nowhere")
        assert await carrier.native.call("queue.delete", queue=name) == {"message_count": 0}


async def purged(carrier: Carrier, queue: str) -> bool:
    """Whether the queue could be freed of one message, which its reader did not acknowledge."""
    return await carrier.native.call("queue.purge", queue=queue) == {"message_count": 1}


async def test_a_user_with_few_rights_sends_and_is_told_which_right_is_missing(broker: Brokers, address: str) -> None:
    name = f"few-rights-{new_id()}"
    management(broker, "PUT", f"users/{name}", {"password": "x", "tags": ""})
    try:
        async with bench_at(address) as bench:
            channel, receiver = bench.channel(durable=True), Receiver()
            rights = {"configure": "^$", "write": r"^quintet$", "read": "^$"}
            management(broker, "PUT", f"permissions/%2F/{name}", rights)
            await bench.serve(await opened(bench), channel, receiver)
            async with bench_at(address.replace("guest:guest@", f"{name}:x@")) as theirs:
                carrier = await opened(theirs)
                await theirs.send(carrier, channel, b"1")
                await bench.got(receiver, 1)
                with pytest.raises(TransportError, match=r"ACCESS_REFUSED .*give the user the right"):
                    await carrier.serve(bench.channel(durable=True), Receiver(), "")
            management(broker, "PUT", f"permissions/%2F/{name}", rights | {"write": "^$"})
            async with bench_at(address.replace("guest:guest@", f"{name}:x@")) as theirs:
                carrier, request_ = await opened(theirs), bench.channel()
                await bench.serve(await opened(bench), request_, Receiver())
                before, told = carrier.native, list[str]()
                carrier.tell = lambda kind, subject, reason="": told.append(kind)
                for refused, exchange in ((channel, "quintet"), (request_, "amq.default")) * 2:
                    with pytest.raises(Unavailable, match=f"not sent, ACCESS_REFUSED.*right to write to {exchange}$"):
                        await carrier.send(theirs.message(refused, b"2"))
                assert (carrier.native is before, before.error, told) == (True, None, [])
            every = r"^(quintet|check\.|amq\.default$)"
            management(broker, "PUT", f"permissions/%2F/{name}", {"configure": every, "write": every, "read": every})
            async with bench_at(address.replace("guest:guest@", f"{name}:x@")) as theirs:
                carrier, own, failing = (
                    await opened(theirs),
                    theirs.channel(durable=True),
                    Receiver(Again(0.02), Again(0)),
                )
                await theirs.serve(carrier, own, failing)
                await theirs.send(carrier, own, b"1")
                await theirs.got(failing, 3)
                await carrier.send(theirs.message(Channel("nobody", temporary=True), b"a reply"))
                await theirs.send(carrier, own, b"2")
    finally:
        management(broker, "DELETE", f"users/{name}")


# Others take part


class Orders(Contract, name="check-orders"):
    @notification
    async def place(self, item: str, count: int = 1) -> None: ...

    @request
    async def price(self, item: str) -> int: ...

    @event
    async def placed(self, item: str) -> None: ...


async def test_a_foreign_client_takes_part_by_the_documented_names(address: str) -> None:
    orders = Service(Orders)
    handled: asyncio.Queue[tuple[str, int, str, int]] = asyncio.Queue()

    @orders.handles(Orders.place)
    async def place(item: str, count: int) -> None:
        handled.put_nowait((item, count, current().sender, current().attempt))
        await orders.publish(Orders.placed, item)

    @orders.handles(Orders.price)
    async def price(item: str) -> int:
        return len(item)

    async with serve(orders, at=address), await aio_pika.connect(address) as connection, asyncio.timeout(WITHIN):
        channel = await connection.channel()
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind("quintet", "check-orders.v1.placed")
        exchange = channel.default_exchange
        await exchange.publish(aio_pika.Message(b'{"item": "taxi"}'), "check-orders.v1.place")
        assert await handled.get() == ("taxi", 1, "", 1)
        named = aio_pika.Message(b'{"item": "bus", "count": 2}', content_type="application/json", app_id="shop")
        await exchange.publish(named, "check-orders.v1.place")
        assert await handled.get() == ("bus", 2, "shop", 1)
        async with queue.iterator() as events:
            published = await anext(events)
        assert (published.body, published.content_type) == (b'{"item":"taxi"}', "application/json")
        assert (published.type, published.app_id) == ("check-orders.placed", "check-orders")
        assert published.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
        assert published.headers["quintet-version"] == "1.0"
        assert published.message_id
        replies = await channel.get_queue("amq.rabbitmq.reply-to", ensure=False)
        answers: asyncio.Queue[aio_pika.abc.AbstractIncomingMessage] = asyncio.Queue()
        await replies.consume(answers.put, no_ack=True)
        question = aio_pika.Message(b'{"item": "taxi"}', correlation_id="q-1", reply_to="amq.rabbitmq.reply-to")
        await exchange.publish(question, "check-orders.v1.price")
        answer = await answers.get()
        assert (answer.body, answer.correlation_id) == (b"4", "q-1")


async def test_a_poison_message_is_dead_after_its_attempts_with_their_times_and_comes_back_by_replay(
    address: str,
) -> None:
    orders = Service(Orders, redelivery=Redelivery(attempts=3, first=0.02))
    attempts: list[int] = []
    well = asyncio.Event()

    @orders.handles(Orders.place)
    async def place(item: str, count: int) -> None:
        attempts.append(current().attempt)
        if len(attempts) <= 3:
            raise RuntimeError("the kitchen is on fire")
        well.set()

    @orders.handles(Orders.price)
    async def price(item: str) -> int:
        return 0

    begun = time.time()
    async with serve(orders, at=address), connect(Orders, address, policy=Policy(timeout=5)) as client:
        await client.place("soup", 2)
        carrier = open_address(address)
        assert isinstance(carrier, Carrier)
        await carrier.open()
        async with asyncio.timeout(WITHIN):
            while not (letters := await carrier.dead("check-orders.v1.place")):
                await asyncio.sleep(0.05)
        letter = letters[0]
        assert attempts == [1, 2, 3]
        assert letter.reason == "RuntimeError: the kitchen is on fire (attempt 3 of 3)"
        assert (letter.attempts, letter.message.body) == (3, b'{"item":"soup","count":2}')
        assert len(letter.times) == 3
        assert begun - 1 <= letter.times[0] <= letter.times[1] <= letter.times[2] <= letter.died_at + 0.01
        assert await carrier.replay([letter.id]) == 1
        async with asyncio.timeout(WITHIN):
            await well.wait()
        assert attempts == [1, 2, 3, 1]
        assert await carrier.dead("check-orders.v1.place") == []
        await carrier.close()


async def test_what_does_not_last_may_wait_too(address: str) -> None:
    async with bench_at(address) as bench:
        carrier, channel, receiver = await opened(bench), bench.channel(), Receiver(Again(0.05))
        await bench.serve(carrier, channel, receiver)
        await bench.send(await opened(bench), channel, b"1")
        await bench.got(receiver, 2)
        assert [message.attempt for message in receiver.messages] == [1, 2]


async def test_a_dead_letter_whose_reason_or_headers_cannot_be_written_is_kept_without_them(address: str) -> None:
    async with bench_at(address) as bench:
        carrier, channel, receiver = await opened(bench), bench.channel(durable=True), Receiver(Dead("no \udcff file"))
        await bench.serve(carrier, channel, receiver)
        await bench.send(carrier, channel, b"1", headers={"x-large": "x" * 130_700})
        async with asyncio.timeout(WITHIN):
            while not (letters := await carrier.dead(channel.name)):
                await asyncio.sleep(0.05)
        assert (letters[0].reason, letters[0].message.body, letters[0].message.headers.get("x-large")) == (
            "no ? file",
            b"1",
            None,
        )
        assert await carrier.drop([letters[0].id]) == 1
        with pytest.raises(InvalidMessage, match="headers have 140"):
            await bench.send(carrier, channel, b"2", headers={"x-large": "x" * 140_000})
        await bench.send(carrier, channel, b"3")
        await bench.got(receiver, 2)


async def test_replies_may_be_listened_to_again(address: str) -> None:
    async with bench_at(address) as bench:
        carrier = await opened(bench)
        before = carrier.native
        for _ in range(2):
            replies = Replies(carrier, "test")
            await replies.open()
            await replies.close()
        await bench.send(carrier, bench.channel(durable=True), b"1")
        assert carrier.native is before


async def test_requests_are_seen_by_who_tails_them(address: str) -> None:
    async with bench_at(address) as bench:
        asking, watching, channel, receiver = await opened(bench), await opened(bench), bench.channel(), Receiver()
        await bench.serve(watching, channel, receiver)
        replies = Replies(asking, "test")
        await replies.open()
        asked = [bench.start(replies.exchange(bench.message(channel, b"unseen")))]
        await bench.got(receiver, 1)
        tail = watching.tail("check.*")
        seen = bench.start(anext(tail))
        while not seen.done():  # its clients hear of it
            asked.append(bench.start(replies.exchange(bench.message(channel, b"seen"))))
            await asyncio.sleep(0.02)
        assert (await seen).body == b"seen"
        assert (await seen).channel.name == channel.name
        for one in asked:
            one.cancel()
        await replies.close()
