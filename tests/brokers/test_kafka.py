"""Kafka: the conformance suite on the real broker, and what only it can get wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer
from running import Entry

from quintet import Contract, Service, event, notification, serve
from quintet.connection import Refused
from quintet.errors import AddressError, ConfigurationError, InvalidMessage, TooLarge, Unavailable
from quintet.message import Channel, Message, new_id
from quintet.testing import CHECKS, Bench, Check, skips
from quintet.testing.bench import Receiver
from quintet.transport import DONE, Again, Dead, Verdict, open_address
from quintet.transports.kafka import Carrier, Record, Topic

Brokers = Callable[[str], Entry]

EXCUSES = {"REPLIES", "?capacity="}
"""What Kafka may lack: replies are the core's, and it does not count what waits before it takes more."""

ONE_BY_ONE = "receivers that compete share the work"
"""A partition has one member of a group at a time: what waits in it does not go to whoever is free. What holds instead
is `test_members_of_a_group_share_its_partitions`."""

WITHIN = 45.0  # seconds: more than a busy machine takes, less than a test may


def benched(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Gives the test a bench of its own, and closes that."""

    async def run(broker: Brokers) -> None:
        bench = Bench(broker("kafka")["address"])
        try:
            await test(bench)
        finally:
            await bench.close()

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WITHIN):
        while not holds():
            await asyncio.sleep(0.005)


# the specification


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
async def test_kafka(broker: Brokers, check: Check) -> None:
    if missing := check.missing(Carrier):
        pytest.skip(f"Kafka lacks {missing}")
    if check.name == ONE_BY_ONE:
        pytest.skip("Kafka gives each partition to one member, not each message to whoever is free")
    await check.run(Bench(broker("kafka")["address"]))


def test_kafka_is_excused_only_for_what_was_reviewed() -> None:
    assert {missing for sentence in skips(Carrier).values() for missing in sentence.split(", ")} == EXCUSES
    assert ONE_BY_ONE in {check.name for check in CHECKS}


# groups


@benched
async def test_members_of_a_group_share_its_partitions(bench: Bench) -> None:
    here, one, two, channel = await bench.open(), await bench.open(), await bench.open(), bench.channel(durable=True)
    first, second = Receiver(hold=True), Receiver(hold=True)
    await bench.serve(one, channel, first, limit=1)
    await bench.serve(two, channel, second, limit=1)
    for number in range(6):
        await here.send(bench.message(channel, b"%d" % number, native=(Record(partition=number),)))
    await bench.got(first, 1)
    await bench.got(second, 1)
    first.release()
    second.release()
    await bench.until(lambda: len(first.messages) + len(second.messages) == 6, lambda: f"{first} {second}")
    assert len(first.messages) == len(second.messages) == 3


@benched
async def test_a_rebalance_under_load_loses_nothing_and_repeats_nothing_that_was_done(bench: Bench) -> None:
    here, channel = await bench.open(), bench.channel(durable=True)
    handled, count = list[bytes](), 3000

    async def receive(message: Message) -> Verdict:
        await asyncio.sleep(0.001)
        handled.append(message.body)
        return DONE

    async def send() -> None:
        gate = asyncio.Semaphore(50)

        async def one(number: int) -> None:
            async with gate:
                await here.send(bench.message(channel, b"%d" % number, key=str(number % 7) if number % 2 else ""))

        await asyncio.gather(*(one(number) for number in range(count)))

    transports = [await bench.open() for _ in range(3)]
    await bench.serve(transports[0], channel, receive, limit=20)
    sending = bench.start(send())
    await until(lambda: len(handled) > 200)
    second = await bench.serve(transports[1], channel, receive, limit=20)  # comes in the middle of it
    await bench.serve(transports[2], channel, receive, limit=20)
    await second.stop()  # and goes
    await sending
    await until(lambda: len(set(handled)) == count)
    await bench.quiet()
    assert {body: times for body, times in Counter(handled).items() if times > 1} == {}


@benched
async def test_what_was_done_out_of_order_is_not_repeated_by_the_next_member(bench: Bench) -> None:
    here, there, channel = await bench.open(partitions=1), await bench.open(), bench.channel(durable=True)
    stuck, first, second = asyncio.Event(), Receiver(), Receiver()

    async def receive(message: Message) -> Verdict:
        if message.body == b"0":
            await stuck.wait()
        return await first(message)

    await bench.send(here, channel, *[b"%d" % number for number in range(10)])
    await bench.serve(there, channel, receive)
    await bench.got(first, 9)
    await there.close()  # cancels the one that is stuck
    await bench.serve(await bench.open(), channel, second)
    await bench.got(second, 1)
    await bench.quiet()
    assert second.bodies == [b"0"]


@benched
async def test_ten_channels_are_served_quickly(bench: Bench) -> None:
    there, base, receiver = await bench.open(), bench.name(), Receiver()
    channels = [Channel(f"{base}.{number}", durable=True) for number in range(10)]
    started = bench.clock.now()
    for channel in channels:
        await there.serve(channel, receiver, "group")
    await there.ready()
    assert bench.clock.now() - started < 5.0
    assert there.native.consumers.keys() == {f"quintet.retry.{base}", *(channel.name for channel in channels)}
    for channel in channels:
        await bench.send(there, channel, b"1")
    await bench.got(receiver, 10)


MEMBER = """
import asyncio, sys
from quintet.message import Channel
from quintet.transport import DONE, open_address

async def receive(message):
    print(message.body.decode(), flush=True)
    return DONE

async def main():
    transport = open_address(sys.argv[1])
    await transport.open()
    await transport.serve(Channel(sys.argv[2], durable=True), receive, "group")
    await transport.ready()
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@benched
async def test_who_is_started_in_the_stead_of_one_that_was_killed_goes_on_at_once(bench: Bench) -> None:
    here, channel = await bench.open(), bench.channel(durable=True)
    wanted = [b"%d" % number for number in range(6)]

    async def send() -> None:
        for number in range(6):
            await here.send(bench.message(channel, b"%d" % number, native=(Record(partition=number),)))

    async def member() -> asyncio.subprocess.Process:
        words = (sys.executable, "-c", MEMBER, bench.address, channel.name)
        return await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)

    async def lines(process: asyncio.subprocess.Process, count: int) -> list[bytes]:
        assert process.stdout
        return sorted([(await process.stdout.readline()).strip() for _ in range(count)])

    first = await member()
    try:
        assert await lines(first, 1) == [b"ready"]
        await send()
        assert await lines(first, 6) == wanted
        await asyncio.sleep(0.5)  # until it has committed
    finally:
        first.kill()
        await first.wait()
    second = await member()
    try:
        await send()
        async with asyncio.timeout(WITHIN):  # the group would wait for ten seconds until it takes the first for dead
            assert await lines(second, 7) == [*wanted, b"ready"]
    finally:
        second.kill()
        await second.wait()


@benched
async def test_a_new_group_hears_nothing_from_before_unless_it_asks_for_it(bench: Bench) -> None:
    here, there = await bench.open(), await bench.open()
    channel, late, early = bench.channel(fanout=True, durable=True), Receiver(), Receiver()
    await bench.send(here, channel, b"before")
    await bench.serve(there, channel, late, "late")
    from_start = Channel(channel.name, fanout=True, durable=True, native=(Topic(start="earliest"),))
    await bench.serve(there, from_start, early, "early")
    await bench.send(here, channel, b"after")
    await bench.got(early, 2)
    await bench.got(late, 1)
    assert (sorted(early.bodies), late.bodies) == ([b"after", b"before"], [b"after"])


# again, and dead


@benched
async def test_a_message_with_a_key_waits_here_and_one_without_in_the_retry_topic(bench: Bench) -> None:
    here, there, channel = await bench.open(), await bench.open(), bench.channel(durable=True)
    receiver = Receiver(Again(0.05), Again(0.05))
    await bench.serve(there, channel, receiver)
    await bench.send(here, channel, b"keyed", key="k")
    await bench.got(receiver, 3)
    await bench.send(here, channel, b"plain")
    other = Receiver(Again(0.05))
    plain = bench.channel(durable=True)
    await bench.serve(there, plain, other)
    await bench.send(here, plain, b"plain")
    await bench.got(other, 2)
    assert [message.attempt for message in other.messages] == [1, 2]
    ends = await there.topics.ends([(f"quintet.retry.{channel.name}", number) for number in range(6)])  # type: ignore[attr-defined]
    assert sum(ends.values()) == 0
    ends = await there.topics.ends([(f"quintet.retry.{plain.name}", number) for number in range(6)])  # type: ignore[attr-defined]
    assert sum(ends.values()) == 1


@benched
async def test_a_stuck_channel_is_paused_and_others_flow(bench: Bench) -> None:
    here, there, base = await bench.open(), await bench.open(), bench.name()
    stuck, flowing = Channel(f"{base}.stuck", durable=True), Channel(f"{base}.flowing", durable=True)
    holding, well = Receiver(hold=True), Receiver()
    await there.serve(stuck, holding, "group", 1)
    await there.serve(flowing, well, "group", 100)
    await there.ready()
    await asyncio.gather(*(here.send(bench.message(stuck, b"%d" % number)) for number in range(12_000)))
    (group,) = [group for group in there._groups if group.name == stuck.name]  # type: ignore[attr-defined]
    await until(lambda: group.feeds[stuck.name].size > 1000)
    await bench.send(here, flowing, *[b"%d" % number for number in range(20)])
    await bench.got(well, 20)
    await bench.quiet()
    assert group.feeds[stuck.name].size < 9000
    holding.release()
    await until(lambda: len(holding.messages) == 12_000)


@benched
async def test_the_reason_and_the_times_of_the_attempts_are_with_a_dead_letter(bench: Bench) -> None:
    here, channel = await bench.open(), bench.channel(durable=True)
    receiver = Receiver(Again(0.05), Dead("no car"))
    await bench.serve(await bench.open(), channel, receiver)
    await bench.send(here, channel, b"1", key="the key")
    await bench.got(receiver, 2)
    letters: list[Any] = []

    async def look() -> bool:
        letters[:] = await here.dead(channel.name)  # type: ignore[attr-defined]
        return bool(letters)

    async with asyncio.timeout(WITHIN):
        while not await look():
            pass
    assert (letters[0].reason, letters[0].attempts, letters[0].message.key) == ("no car", 2, "the key")
    assert len(letters[0].times) == 2
    assert letters[0].times[1] - letters[0].times[0] >= 0.045


BOMBED = """
import asyncio, os, sys
from quintet import intake
from quintet.message import Channel
from quintet.transport import DONE, open_address

intake.CRASHES = 2

async def receive(message):
    print(message.body.decode(), message.attempt, flush=True)
    if message.body == b"bomb":
        os._exit(9)
    return DONE

async def main():
    transport = open_address(sys.argv[1])
    await transport.open()
    await transport.serve(Channel(sys.argv[2], durable=True), receive, "group")
    await asyncio.Event().wait()

asyncio.run(main())
"""


@benched
async def test_a_message_that_ends_its_process_each_time_is_found_out_and_buried_and_no_other(bench: Bench) -> None:
    here, channel = await bench.open(), bench.channel(durable=True)
    for body in (b"before", b"bomb", b"after"):
        await here.send(bench.message(channel, body, native=(Record(partition=0),)))
    handled = list[str]()
    async with asyncio.timeout(60):
        while "after 1" not in handled:
            words = (sys.executable, "-c", BOMBED, bench.address, channel.name)
            member = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
            try:
                assert member.stdout
                while (line := (await member.stdout.readline()).decode().strip()) and line != "after 1":
                    handled.append(line)
                handled += [line] if line else []
            finally:
                with contextlib.suppress(ProcessLookupError):
                    member.kill()
                await member.wait()
        (letter,) = await here.dead(channel.name)  # type: ignore[attr-defined]
    assert (letter.message.body, letter.reason) == (
        b"bomb",
        "its receivers went away 3 times while they had it in work",
    )
    # the first of those in work is counted; as soon as two processes have ended they come one after the other
    begun = ["before 1", "bomb 1", "before 2", "bomb 1", "before 3", "bomb 1"]
    assert handled == [*begun, "bomb 1", "bomb 2", "bomb 3", "after 1"]


# foreign programs


async def test_a_program_that_knows_kafka_only_takes_part(broker: Brokers) -> None:
    address, run = broker("kafka")["address"], new_id()
    hosts = {"bootstrap.servers": address.removeprefix("kafka://")}

    class Own(Contract, name=f"orders{run}"):
        @notification
        async def placed(self, number: int) -> None: ...

        @event
        async def shipped(self, number: int) -> None: ...

    service, came = Service(Own), list[int]()

    @service.handles(Own.placed)
    async def placed(number: int) -> None:
        came.append(number)
        await service.publish(Own.shipped, number)

    def listen() -> tuple[str, dict[str, str]]:
        consumer = Consumer({**hosts, "group.id": f"foreign{run}", "auto.offset.reset": "earliest"})
        consumer.subscribe([f"orders{run}.v1.shipped"])
        while (record := consumer.poll(WITHIN)) is not None and record.error():
            pass  # there is no such topic until something is published
        assert record is not None
        headers = {name: bytes(value).decode() for name, value in record.headers()}
        consumer.close()
        return bytes(record.value()).decode(), headers

    async with serve(service, at=address):
        producer = Producer(hosts)
        producer.produce(f"orders{run}.v1.placed", b'{"number": 7}')
        await asyncio.to_thread(producer.flush)
        await until(lambda: came == [7])
        body, headers = await asyncio.to_thread(listen)
    assert json.loads(body) == {"number": 7}
    assert headers["quintet-operation"] == f"orders{run}.shipped"
    assert headers["quintet-sender"] == f"orders{run}"
    assert headers["content-type"] == "application/json"
    assert headers["quintet-id"]


# connections


async def test_sasl_and_tls_lead_to_the_same_broker(broker: Brokers, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = broker("kafka")
    bench = Bench(entry["address"])
    receiver, channel = Receiver(), bench.channel(durable=True)
    await bench.serve(await bench.open(), channel, receiver)
    by_environment = entry["sasl"].replace("quintet:quintet@", "")
    scram = [f"{entry['sasl']}?sasl=SCRAM-SHA-{bits}" for bits in (256, 512)]
    nobody_first = entry["sasl"].replace("@", "@127.0.0.1:1,")
    for address in (entry["sasl"], by_environment, nobody_first, *scram):
        with monkeypatch.context() as patch:
            if address is by_environment:
                patch.setenv("QUINTET_KAFKA_USER", "quintet")
                patch.setenv("QUINTET_KAFKA_PASSWORD", "quintet")
            transport = open_address(address)
        await transport.open()
        await transport.send(bench.message(channel, b"by sasl"))
        await transport.close()
    transport = open_address(f"{entry['tls']}?tls=on&ca={entry['ca']}")
    await transport.open()
    await transport.send(bench.message(channel, b"by tls"))
    await transport.close()
    await bench.got(receiver, 6)
    await bench.close()


async def test_what_is_wrong_with_an_address_is_said_before_anything_is_sent(broker: Brokers, tmp_path: Path) -> None:
    for wrong in ("sasl=GSSAPI", "tls=yes", f"tls=on&ca={tmp_path / 'none.pem'}", "tls=on&verify=no", "partitions=0"):
        with pytest.raises(AddressError, match=wrong.rpartition("&")[2].partition("=")[0]):
            open_address(f"kafka://u:p@127.0.0.1?{wrong}")
    for wrong in (
        "partitions=nan",
        "partitions=inf",
        "replication=0",
        "replication=-2",
        "heartbeat=-1",
        "heartbeat=nan",
    ):
        with pytest.raises(AddressError, match=wrong.partition("=")[0]):
            open_address(f"kafka://127.0.0.1?{wrong}")
    transport = open_address(f"{broker('kafka')['address']}?rdkafka.linger=5")
    with pytest.raises(AddressError, match=r'No such configuration property: "linger"'):
        await transport.open()


async def test_why_no_broker_answers_is_said_with_what_to_do(broker: Brokers) -> None:
    entry = broker("kafka")
    plain, sasl, tls = (entry[name].rpartition("@")[2].removeprefix("kafka://") for name in ("address", "sasl", "tls"))

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async def why(address: str) -> str:
        transport = open_address(address)
        with pytest.raises((Unavailable, Refused)) as raised:
            await transport.open()
        return str(raised.value)

    other = await asyncio.start_server(answer, "127.0.0.1", 0)
    closed = await asyncio.start_server(answer, "127.0.0.1", 0)
    http, port = other.sockets[0].getsockname()[1], closed.sockets[0].getsockname()[1]
    closed.close()
    causes = {
        f"kafka://127.0.0.1:{port}": f"127.0.0.1:{port}: .*Connection refused; is a broker running there?",
        "kafka://nowhere.invalid": "nowhere.invalid:9092.*; is the host's name right?",
        f"kafka://{plain}?tls=on&verify=off": "does that port speak TLS",
        f"kafka://{tls}": r"\?tls=on",
        f"kafka://{sasl}": "or a login",
        f"kafka://quintet:quintet@{plain}": "no login is wanted on that port",
        f"kafka://127.0.0.1:{http}": f"127.0.0.1:{http}: what answers there is not Kafka",
    }
    for cause, said in zip(causes.values(), await asyncio.gather(*map(why, causes)), strict=True):
        assert re.search(cause, said), said
        assert "\n" not in said
    other.close()


async def test_doctor_asks_the_host_that_is_there_for_its_version(broker: Brokers) -> None:
    alive = broker("kafka")["address"].removeprefix("kafka://")
    transport = open_address(f"kafka://127.0.0.1:1,{alive}")
    await transport.open()
    (found,) = [finding.says for finding in await transport.examine() if finding.what == "version"]
    await transport.close()
    assert re.fullmatch(r"Apache Kafka \d+\.\d+", found)


def test_options_are_checked_when_they_are_written() -> None:
    for wrong in ({"start": "foo"}, {"partitions": -1}, {"replication": -1}):
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            Topic(**wrong)  # type: ignore[arg-type]
    for odd in ({"partition": -7}, {"timestamp": 1e300}, {"timestamp": float("nan")}):
        with pytest.raises(ConfigurationError, match=next(iter(odd))):
            Record(**odd)  # type: ignore[arg-type]
    assert hash(Channel("c", native=(Topic(config={"retention.ms": "1"}),)))


@benched
async def test_any_setting_of_librdkafka_is_reached_and_so_are_its_clients(bench: Bench) -> None:
    here, channel = await bench.open(**{"rdkafka.client.id": "till-7", "rdkafka.linger.ms": "3"}), bench.channel()
    await bench.serve(here, channel, Receiver(), "group")
    clients = here.native
    assert channel.name in clients.producer.list_topics(timeout=WITHIN).topics
    assert await clients.consumers[channel.name](lambda consumer: consumer.memberid())
    groups = clients.admin.describe_consumer_groups([channel.name])
    (member,) = (await asyncio.wrap_future(groups[channel.name])).members
    assert member.client_id == "till-7"


@benched
async def test_a_topic_is_made_as_its_channel_says(bench: Bench) -> None:
    here = await bench.open()
    options = Topic(partitions=2, config={"retention.ms": "60000"})
    channel = Channel(bench.name(), durable=True, native=(options,))
    receiver = Receiver()
    await bench.serve(here, channel, receiver)
    assert len(here.native.producer.list_topics(channel.name, timeout=WITHIN).topics[channel.name].partitions) == 2
    await here.send(bench.message(channel, b"there", native=(Record(partition=1, timestamp=1_700_000_000.0),)))
    await bench.got(receiver, 1)
    assert receiver.messages[0].body == b"there"


@benched
async def test_what_is_too_large_or_for_no_partition_is_refused(bench: Bench) -> None:
    here, channel = await bench.open(), bench.channel(durable=True)
    with pytest.raises(TooLarge, match=r"max\.message\.bytes"):
        await here.send(bench.message(channel, bytes(9 * 1024 * 1024)))
    with pytest.raises(TooLarge):
        await here.send(bench.message(channel, bytes(17 * 1024 * 1024)))
    with pytest.raises(Unavailable, match="no such partition") as raised:
        await here.send(bench.message(channel, b"", native=(Record(partition=99),)))
    assert type(raised.value) is Unavailable
    receiver = Receiver()
    await bench.serve(await bench.open(), channel, receiver)
    await here.send(bench.message(channel, bytes(5 * 1024 * 1024)))
    await bench.got(receiver, 1)
    assert len(receiver.messages[0].body) == 5 * 1024 * 1024


@benched
async def test_a_queue_that_is_full_makes_senders_wait_and_loses_nothing(bench: Bench) -> None:
    here = await bench.open(**{"rdkafka.queue.buffering.max.messages": "10"})
    channel, receiver = bench.channel(durable=True), Receiver()
    await bench.serve(await bench.open(), channel, receiver)
    await asyncio.gather(*(here.send(bench.message(channel, b"%d" % number)) for number in range(500)))
    await bench.got(receiver, 500)


@benched
async def test_one_who_waits_no_longer_takes_nothing_back_and_disturbs_nobody(bench: Bench) -> None:
    here, channel = await bench.open(**{"rdkafka.linger.ms": "1000"}), bench.channel(durable=True)
    receiver = Receiver()
    await bench.serve(await bench.open(), channel, receiver)
    many = [bench.start(here.send(bench.message(channel, b"%d" % number))) for number in range(40)]
    await asyncio.sleep(0)  # they are under way: so many that librdkafka waits for more
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await here.send(bench.message(channel, b"last"))
    await asyncio.gather(*many)
    await bench.got(receiver, 41)


@benched
async def test_text_with_a_nul_arrives_whole_and_what_is_no_utf8_is_refused(bench: Bench) -> None:
    here, channel, receiver = await bench.open(), bench.channel(durable=True), Receiver()
    await bench.serve(await bench.open(), channel, receiver)
    sent = bench.message(channel, b"", key="k\0y", headers={"x": "v\0w"})
    sent.id = "a\0b"
    await here.send(sent)
    await bench.got(receiver, 1)
    came = receiver.messages[0]
    assert (came.id, came.key, came.headers["x"]) == ("a\0b", "k\0y", "v\0w")
    for half in ({"headers": {"x": "\ud800"}}, {"headers": {"\ud800": "x"}}, {"key": "\ud800"}):
        with pytest.raises(InvalidMessage, match="UTF-8"):
            await here.send(bench.message(channel, b"", **half))


@benched
async def test_a_record_whose_headers_make_no_sense_is_handled(bench: Bench) -> None:
    here, channel, receiver = await bench.open(), bench.channel(durable=True), Receiver(Again(0.05))
    await bench.serve(here, channel, receiver)
    headers = {"quintet-attempt": b"9" * 5000, "quintet-deadline": b"-inf", "quintet-due": b"inf"}
    here.native.producer.produce(channel.name, b"odd", headers=list(headers.items()))
    await bench.got(receiver, 2)
    assert [message.attempt for message in receiver.messages] == [1, 2]


async def test_no_thread_is_left(broker: Brokers) -> None:
    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    await asyncio.to_thread(int)  # the loop's own, for what blocks
    before = threads()
    bench = Bench(broker("kafka")["address"])
    transport, channel = await bench.open(), bench.channel(fanout=True, durable=True)
    await bench.serve(transport, channel, Receiver())
    await bench.serve(transport, bench.channel(temporary=True), Receiver())
    await bench.send(transport, channel, b"1")
    assert threads() > before + 5
    await bench.close()
    await until(lambda: threads() <= before + 2)  # those of the loop's executor


@benched
async def test_the_loop_is_not_held_up_by_large_messages(bench: Bench) -> None:
    here, there, channel, receiver = await bench.open(), await bench.open(), bench.channel(durable=True), Receiver()
    await bench.serve(there, channel, receiver)
    await bench.send(here, channel, b"first")
    gaps, going = list[float](), True

    async def watch() -> None:
        last = time.thread_time()  # of the loop's own work, however busy the machine is
        while going:
            await asyncio.sleep(0)
            now = time.thread_time()
            gaps.append(now - last)
            last = now

    watching, large = bench.start(watch()), bytes(1024 * 1024)
    await asyncio.gather(*(here.send(bench.message(channel, large)) for _ in range(20)))  # in one turn of the loop
    await bench.got(receiver, 21)
    going = False
    await watching
    assert max(gaps) < 0.005, sorted(gaps)[-5:]
