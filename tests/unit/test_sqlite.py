"""The embedded broker, beyond the conformance suite: processes that die, leases, bounds and disks that are full."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from quintet.clock import SYSTEM, Clock
from quintet.database import Transaction, one_by_one
from quintet.errors import AddressError, CallError, ChannelFull, InvalidMessage, Safety, TransportError, Unavailable
from quintet.message import Channel, Message
from quintet.testing import FakeClock, Receiver
from quintet.transport import DONE, Again, Dead, Verdict, open_address, parse_address
from quintet.transports.sqlite import UNFINISHED_AFTER, Carrier
from quintet.wire import sqlite as engine

WORK = Channel("work", durable=True)
EVENT = Channel("event", fanout=True, durable=True)


@contextlib.asynccontextmanager
async def opened(folder: Path, options: str = "", clock: Clock = SYSTEM) -> AsyncIterator[Carrier]:
    carrier = open_address(f"sqlite:///{folder}/broker.db{options}", clock)
    assert isinstance(carrier, Carrier)
    await carrier.open()
    try:
        yield carrier
    finally:
        await carrier.close()


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """A test that never comes to its end fails."""
    asyncio.run(asyncio.wait_for(main(), 55))


async def until(holds: Callable[[], bool], clock: Clock = SYSTEM) -> None:
    """Lets real time pass, and where the clock is a fake one its time too, until it holds."""
    end = time.monotonic() + 45
    while not holds():
        assert time.monotonic() < end, "it never came to hold"
        if isinstance(clock, FakeClock):
            await clock.advance(0.05)
        await asyncio.sleep(0.002)


@one_by_one
def select(transaction: Transaction, sql: str) -> list[Any]:
    return transaction.execute(sql)


def message(body: bytes, channel: Channel = WORK, key: str = "", **fields: Any) -> Message:
    return Message(channel=channel, body=body, id=f"id-{body.decode()}", key=key, **fields)


# Other processes

PROCESS = """
import asyncio, json, os, sys
from quintet.message import Channel, Message
from quintet.transport import DONE, open_address

async def say(**fields):
    print(json.dumps(fields), flush=True)

async def main(role, address, channel):
    carrier = open_address(address)
    await carrier.open()
    if role == "hold":      # begins every message and finishes none
        async def receive(message):
            await say(body=message.body.decode(), attempt=message.attempt)
            await asyncio.Event().wait()
        await carrier.serve(channel, receive, "held", limit=4)
        await say(ready=True)
        await asyncio.Event().wait()
    if role == "take":      # finishes all
        async def receive(message):
            await say(body=message.body.decode(), attempt=message.attempt)
            return DONE
        await carrier.serve(channel, receive, "taken")
        await say(ready=True)
        await asyncio.Event().wait()
    if role == "crash":     # dies of a message
        async def receive(message):
            if message.body == b"poison":
                os._exit(9)
            await say(body=message.body.decode(), attempt=message.attempt)
            return DONE
        await carrier.serve(channel, receive, "crashed")
        await say(ready=True)
        await asyncio.Event().wait()
    if role == "produce":   # says what was accepted
        number = 0
        async def produce():
            nonlocal number
            while True:
                number += 1
                body = str(number)
                await carrier.send(Message(channel=channel, body=body.encode(), id=body))
                await say(accepted=body)
        await asyncio.gather(*(produce() for _ in range(16)))

role, address, name, fanout, durable, temporary = sys.argv[1:]
flags = dict(fanout=fanout == "1", durable=durable == "1", temporary=temporary == "1")
asyncio.run(main(role, address, Channel(name, **flags)))
"""


class Process:
    """Another process at the same file; what it says are JSON lines."""

    def __init__(self, role: str, folder: Path, channel: Channel = WORK, options: str = "") -> None:
        flags = ["1" if flag else "0" for flag in (channel.fanout, channel.durable, channel.temporary)]
        address = f"sqlite:///{folder}/broker.db{options}"
        command = [sys.executable, "-c", PROCESS, role, address, channel.name, *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the process ended"
        found: dict[str, Any] = json.loads(line)
        return found

    async def says(self) -> dict[str, Any]:
        try:
            return await asyncio.wait_for(asyncio.to_thread(self._line), 45)
        except BaseException:
            self.process.kill()  # the thread that reads ends with it
            raise

    async def ready(self) -> None:
        assert await self.says() == {"ready": True}

    async def killed(self) -> list[dict[str, Any]]:
        """Kills it with -9; returns what it had said."""
        self.process.send_signal(signal.SIGKILL)
        out, _ = await asyncio.to_thread(self.process.communicate)
        return [json.loads(line) for line in out.splitlines() if line.endswith("}")]

    async def ended(self) -> int:
        return await asyncio.wait_for(asyncio.to_thread(self.process.wait), 45)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start_one(role: str, channel: Channel = WORK, options: str = "") -> Process:
        started.append(Process(role, tmp_path, channel, options))
        return started[-1]

    yield start_one
    for one in started:
        with one.process as process:
            if process.poll() is None:
                process.kill()


def test_what_a_killed_consumer_had_in_work_comes_again_and_nothing_is_lost(
    tmp_path: Path, start: Callable[..., Process]
) -> None:
    async def main() -> None:
        holder = start("hold")
        await holder.ready()
        clock = FakeClock(wall=time.time())
        async with opened(tmp_path, clock=clock) as carrier:
            await asyncio.gather(*(carrier.send(message(b"%02d" % number)) for number in range(10)))
            begun = [(await holder.says())["body"] for _ in range(4)]
            await holder.killed()
            receiver = Receiver()
            await carrier.serve(WORK, receiver, "")
            await until(lambda: len(receiver.messages) >= 6)
            await clock.advance(5.0)  # its lease of 30 s is not over: its socket tells that it is dead
            await until(lambda: len(receiver.messages) >= 10)
            assert sorted(receiver.bodies) == [b"%02d" % number for number in range(10)]
            attempts = {m.body.decode(): m.attempt for m in receiver.messages}
            assert {body for body, attempt in attempts.items() if attempt == 2} == set(begun)

    run(main)


def test_a_message_sent_to_a_receiver_that_has_just_been_killed_is_what_finds_it_dead(
    tmp_path: Path, start: Callable[..., Process]
) -> None:
    async def main() -> None:
        clock = FakeClock(wall=time.time())  # it stands still, so that no look at the file comes by itself
        async with opened(tmp_path, clock=clock) as carrier:
            holder = start("hold")
            await holder.ready()
            receiver = Receiver()
            await carrier.send(message(b"1"))
            await holder.says()
            await carrier.serve(WORK, receiver, "")
            await holder.killed()
            await carrier.send(message(b"2"))
            await until(lambda: len(receiver.messages) == 2)
            assert sorted(receiver.bodies) == [b"1", b"2"]

    run(main)


def test_what_a_killed_producer_had_accepted_is_there(tmp_path: Path, start: Callable[..., Process]) -> None:
    async def main() -> None:
        producer = start("produce")
        said = [await producer.says() for _ in range(100)]
        said += await producer.killed()
        accepted = {line["accepted"] for line in said}
        async with opened(tmp_path) as carrier:
            receiver = Receiver()
            await carrier.serve(WORK, receiver, "")
            await until(lambda: {body.decode() for body in receiver.bodies} >= accepted)
            assert len(set(receiver.bodies)) == len(receiver.bodies), "something was stored twice"

    run(main)


def test_processes_share_a_file_and_every_message_is_handled_once(
    tmp_path: Path, start: Callable[..., Process]
) -> None:
    async def main() -> None:
        takers = [start("take"), start("take")]
        for taker in takers:
            await taker.ready()
        async with opened(tmp_path) as carrier:
            bodies = [str(number) for number in range(500)]
            await asyncio.gather(*(carrier.send(message(body.encode())) for body in bodies))
            states = await carrier.channels()
            while states[0].waiting or states[0].in_work:
                states = await carrier.channels()
        said = [line for taker in takers for line in await taker.killed()]
        assert sorted(line["body"] for line in said) == sorted(bodies)
        assert {line["attempt"] for line in said} == {1}

    run(main)


def test_a_message_that_crashes_its_receivers_dies_and_takes_no_other_with_it(
    tmp_path: Path, start: Callable[..., Process]
) -> None:
    async def main() -> None:
        async with opened(tmp_path) as carrier:
            await carrier.send(message(b"poison"))
            for number in range(5):
                await carrier.send(message(str(number).encode()))
            crashes, crasher = 0, start("crash", options="?attempts=3")
            handled: list[str] = []
            while len(handled) < 5 or not await carrier.dead("work"):
                assert crashes <= 3, "it crashed its receivers more often than it may"
                if crasher.process.poll() is not None:
                    out, _ = crasher.process.communicate()
                    handled += [said["body"] for said in map(json.loads, out.splitlines()) if "body" in said]
                    crashes, crasher = crashes + 1, start("crash", options="?attempts=3")
                elif crashes == 3:
                    said = await crasher.says()
                    handled += [said["body"]] if "body" in said else []
                else:
                    await asyncio.sleep(0.01)
            (letter,) = await carrier.dead()
            assert letter.message.body == b"poison"
            assert (letter.reason, letter.attempts) == ("its receivers crashed 3 times with it in work", 3)
            assert sorted(handled) == ["0", "1", "2", "3", "4"]

    run(main)


def test_the_temporary_group_of_a_killed_process_is_removed_and_the_lasting_one_keeps_its_copies(
    tmp_path: Path, start: Callable[..., Process]
) -> None:
    async def main() -> None:
        temporary = start("hold", Channel("event", fanout=True, temporary=True))
        lasting = start("take", EVENT)
        await temporary.ready()
        await lasting.ready()
        async with opened(tmp_path) as carrier:
            assert [state.group for state in await carrier.channels()] == ["held", "taken"]
            await temporary.killed()
            await lasting.killed()
            await carrier.database.bury()
            await carrier.send(message(b"1", EVENT))
            assert [(state.group, state.waiting) for state in await carrier.channels()] == [("taken", 1)]

    run(main)


def test_a_temporary_channel_whose_holder_was_killed_drops_what_is_sent_there(
    tmp_path: Path, start: Callable[..., Process]
) -> None:
    async def main() -> None:
        replies = Channel("replies.1", temporary=True)
        holder = start("hold", replies)
        await holder.ready()
        async with opened(tmp_path) as carrier:
            await carrier.send(message(b"1", replies))
            assert (await holder.says())["body"] == "1"
            await holder.killed()
            await carrier.send(message(b"2", replies))
            await carrier.database.bury()
            await carrier.send(message(b"3", replies))
            assert list(await carrier.channels()) == []

    run(main)


# Leases


def test_the_lease_of_a_long_handler_is_renewed_and_ends_with_its_receiver(tmp_path: Path) -> None:
    async def main() -> None:
        alive, hung = FakeClock(), FakeClock()
        async with opened(tmp_path, "?lease=3", alive) as one, opened(tmp_path, "?lease=3", hung) as two:
            slow, other = Receiver(hold=True), Receiver()
            await one.serve(WORK, slow, "")
            await two.send(message(b"1"))
            await until(lambda: slow.in_work == 1)
            await two.serve(WORK, other, "")
            before = alive.now()
            while alive.now() < before + 30:  # ten leases, in which both give signs of life
                await asyncio.gather(alive.advance(0.5), hung.advance(0.5))
                await one.channels()  # their work in the file is done
            assert other.messages == [], "a message came again although its receiver lives"

            end = hung.now() + 6
            while hung.now() < end:  # the first gives no sign of life any more
                await hung.advance(0.5)
                await two.channels()
            await until(lambda: len(other.messages) == 1)
            assert other.messages[0].attempt == 2

            await two.send(message(b"2"))
            await alive.advance(6.5)
            slow.release()  # too late: the message has been handled elsewhere, and this verdict means nothing
            await until(lambda: len(slow.messages) + len(other.messages) >= 3, alive)
            assert (await two.channels())[0].in_work <= 1

    run(main)


def test_a_receiver_that_was_thought_dead_has_its_temporary_channel_again(tmp_path: Path) -> None:
    async def main() -> None:
        clock = FakeClock()
        replies = Channel("replies.1", temporary=True)
        async with opened(tmp_path, "?lease=3", clock) as carrier:
            receiver = Receiver()
            await carrier.serve(replies, receiver, "")
            await carrier.database.submit(select, "DELETE FROM quintet_process")  # as others do with the dead
            await carrier.send(message(b"lost", replies))
            assert list(await carrier.channels()) == []
            while not await carrier.channels():
                await clock.advance(0.5)
            await carrier.send(message(b"1", replies))
            await until(lambda: receiver.bodies == [b"1"], clock)

    run(main)


def test_a_tail_goes_on_after_its_process_was_thought_dead(tmp_path: Path) -> None:
    async def main() -> None:
        clock = FakeClock()
        async with opened(tmp_path, "?lease=3", clock) as carrier:
            tail = carrier.tail("wo*")
            await carrier.send(message(b"1"))
            assert (await asyncio.wait_for(anext(tail), 5)).body == b"1"
            await carrier.database.submit(select, "DELETE FROM quintet_process")
            while not await carrier.database.submit(select, "SELECT 1 FROM quintet_tail"):
                await clock.advance(0.5)
            await carrier.send(message(b"2"))
            assert (await asyncio.wait_for(anext(tail), 5)).body == b"2"
            last = asyncio.create_task(anext(tail, None))
            await tail.aclose()
            assert await asyncio.wait_for(last, 5) is None

    run(main)


def test_a_cancelled_receiver_gives_its_message_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as one, opened(tmp_path) as two:
            held, other = Receiver(hold=True), Receiver()
            await one.serve(WORK, held, "")
            await two.send(message(b"1"))
            await until(lambda: held.in_work == 1)
            await one.close()
            await two.serve(WORK, other, "")
            await until(lambda: len(other.messages) == 1)
            assert other.messages[0].attempt == 2

    run(main)


def test_a_receiver_that_raises_has_its_message_again_and_the_fault_is_reported(tmp_path: Path) -> None:
    async def main() -> None:
        reported: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        clock = FakeClock()
        async with opened(tmp_path, clock=clock) as carrier:
            receiver = Receiver(raises=RuntimeError("a fault in the core"))
            await carrier.serve(WORK, receiver, "")
            await carrier.send(message(b"1"))
            await until(lambda: len(receiver.messages) == 1)
            before = clock.now()
            await until(lambda: len(receiver.messages) == 2, clock)
            assert clock.now() - before >= UNFINISHED_AFTER - 0.1
            assert [str(context["exception"]) for context in reported] == ["a fault in the core"]

    run(main)


# Delays, order, bounds


def test_again_waits_as_long_as_it_says_and_no_longer(tmp_path: Path) -> None:
    async def main() -> None:
        clock = FakeClock()
        async with opened(tmp_path, clock=clock) as carrier:
            receiver = Receiver(Again(100.0), Again(100.0))
            await carrier.serve(WORK, receiver, "")
            await carrier.send(message(b"1"))
            for attempt in (1, 2):
                await until(lambda wanted=attempt: len(receiver.messages) == wanted)
                await clock.advance(99.0)
                await carrier.channels()  # a claim that came too early would be done by now
                assert len(receiver.messages) == attempt
                await clock.advance(1.1)
            await until(lambda: len(receiver.messages) == 3)
            assert [m.attempt for m in receiver.messages] == [1, 2, 3]

    run(main)


def test_a_failing_message_holds_back_its_key_only_and_for_all_processes(tmp_path: Path) -> None:
    async def main() -> None:
        clock = FakeClock()
        async with opened(tmp_path, clock=clock) as one, opened(tmp_path, clock=clock) as two:
            seen: list[tuple[bytes, int]] = []

            async def receive(m: Message) -> Verdict:
                seen.append((m.body, m.attempt))
                if m.body == b"a1":
                    return Again(50.0) if m.attempt < 3 else Dead("hopeless")
                return DONE

            for key in ("a", "b"):
                for number in (1, 2, 3):
                    await one.send(message(f"{key}{number}".encode(), key=key))
            await one.serve(WORK, receive, "")
            await two.serve(WORK, receive, "")
            await until(lambda: len(seen) == 4)  # the clock stands still: all of b, and the first of a
            assert [body for body, _ in seen if body != b"a1"] == [b"b1", b"b2", b"b3"]
            await clock.advance(50.1)
            await until(lambda: len(seen) == 5)
            await clock.advance(50.1)
            await until(lambda: len(seen) == 8)
            assert [entry for entry in seen if entry[0][:1] == b"a"] == [
                (b"a1", 1),
                (b"a1", 2),
                (b"a1", 3),
                (b"a2", 1),
                (b"a3", 1),
            ]

    run(main)


def test_messages_of_one_key_that_share_a_transaction_are_handled_one_at_a_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as carrier:
            receiver = Receiver(hold=True)
            bodies = [b"%02d" % number for number in range(10)]
            await asyncio.gather(*(carrier.send(message(body, key="a")) for body in bodies))
            await carrier.serve(WORK, receiver, "")
            await carrier.send(message(b"other", key="b"))
            await until(lambda: b"other" in receiver.bodies)
            assert receiver.bodies == [b"00", b"other"]
            receiver.release()
            await until(lambda: len(receiver.messages) == 11)
            assert [body for body in receiver.bodies if body != b"other"] == bodies

    run(main)


def test_what_came_is_in_order_also_where_a_receiver_gave_it_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as carrier:
            for number in range(20):
                await carrier.send(message(b"%02d" % number))
            held = Receiver(hold=True)
            serving = await carrier.serve(WORK, held, "", limit=5)
            await until(lambda: held.in_work == 5)
            await asyncio.gather(serving.abort(), asyncio.sleep(0))
            receiver = Receiver()
            await carrier.serve(WORK, receiver, "", limit=1)
            await until(lambda: len(receiver.messages) == 20)
            first = [m.body for m in receiver.messages if m.attempt == 1]
            assert first == sorted(first)

    run(main)


def test_the_copy_of_a_full_group_is_a_dead_letter_that_says_why(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path, "?capacity=2") as carrier:
            await (await carrier.serve(EVENT, Receiver(), "lagging")).stop()
            temporary = await carrier.serve(
                Channel("event", fanout=True, temporary=True), Receiver(hold=True), "screen", limit=1
            )
            for number in range(4):
                await carrier.send(message(b"%d" % number, EVENT))
            letters = await carrier.dead("event")
            assert [letter.message.body for letter in letters] == [b"2", b"3"]
            assert {letter.group for letter in letters} == {"lagging"}, "the temporary group's copies go for good"
            assert letters[0].reason == "group lagging had 2 messages waiting, as many as it may"
            await temporary.abort()

            receiver = Receiver()
            await carrier.serve(EVENT, receiver, "lagging")
            await until(lambda: len(receiver.messages) == 2)
            assert await carrier.replay([letter.id for letter in letters]) == 2
            await until(lambda: len(receiver.messages) == 4)
            assert receiver.bodies == [b"0", b"1", b"2", b"3"]

    run(main)


def test_room_in_a_channel_is_counted_right_whatever_becomes_of_its_messages(tmp_path: Path) -> None:
    async def main() -> None:
        clock = FakeClock()
        async with opened(tmp_path, "?capacity=5", clock) as carrier:
            receiver = Receiver(Dead("1"), DONE, Again(0.0), DONE)
            await carrier.send(message(b"expires", deadline=clock.now() + 1))
            await clock.advance(2)
            for number in range(4):
                await carrier.send(message(b"%d" % number))
            with pytest.raises(ChannelFull, match="channel work holds 5 messages"):
                await carrier.send(message(b"6"))
            serving = await carrier.serve(WORK, receiver, "")
            await until(lambda: len(receiver.messages) == 5)
            await serving.stop()
            assert await carrier.replay([letter.id for letter in await carrier.dead()]) == 1
            for number in range(4):
                await carrier.send(message(b"%d" % number))
            with pytest.raises(ChannelFull):
                await carrier.send(message(b"6"))

    run(main)


def test_what_has_expired_makes_room_also_where_nobody_serves(tmp_path: Path) -> None:
    async def main() -> None:
        clock = FakeClock()
        async with opened(tmp_path, "?capacity=3", clock) as carrier:
            await carrier.send(message(b"1", key="a", deadline=clock.now() + 1))
            await carrier.send(message(b"2", key="a"))
            await carrier.send(message(b"3", deadline=clock.now() + 1))
            with pytest.raises(ChannelFull):
                await carrier.send(message(b"4"))
            while (await carrier.channels())[0].waiting == 3:
                await clock.advance(1)
            await carrier.send(message(b"5"))
            await carrier.send(message(b"6"))
            with pytest.raises(ChannelFull):
                await carrier.send(message(b"7"))
            receiver = Receiver()
            await carrier.serve(WORK, receiver, "")
            await until(lambda: receiver.bodies == [b"2", b"5", b"6"])

    run(main)


def test_what_is_done_is_retained_as_long_as_asked_for(tmp_path: Path) -> None:
    async def main() -> None:
        clock = FakeClock()
        async with opened(tmp_path, "?retain=60", clock) as keeps, opened(tmp_path, clock=clock):
            serving = await keeps.serve(WORK, Receiver(), "")
            await keeps.send(message(b"1"))
            await until(lambda: not serving.workers.busy)
            while not (rows := await keeps.database.submit(select, "SELECT channel, message FROM quintet_done")):
                await asyncio.sleep(0)
            assert engine.unpack(rows[0][1], WORK).body == b"1"
            await clock.advance(30)
            assert await keeps.database.submit(select, "SELECT 1 FROM quintet_done"), "another's look removed it"
            while await keeps.database.submit(select, "SELECT 1 FROM quintet_done"):
                await clock.advance(1)
                assert clock.now() < 1_100, "it is retained for ever"

    run(main)


def test_two_receivers_that_are_never_done_with_all_have_their_share(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as one, opened(tmp_path) as two:
            first, second = Receiver(hold=True), Receiver(hold=True)
            for number in range(20):
                await one.send(message(b"%02d" % number))
            await one.serve(WORK, first, "", limit=10)
            await two.serve(WORK, second, "", limit=10)
            await until(lambda: first.in_work == 10 and second.in_work == 10)

    run(main)


def test_durable_sends_wait_for_the_disk_unless_told_otherwise_and_others_do_not(tmp_path: Path) -> None:
    async def synchronous(options: str, channel: Channel) -> str:
        async with opened(tmp_path, options) as carrier:
            await carrier.send(message(b"1", channel))
            return carrier.database._synchronous

    for options, channel, wanted in (
        ("", WORK, "FULL"),
        ("", Channel("request"), "NORMAL"),
        ("?synchronous=normal", WORK, "NORMAL"),
    ):
        assert asyncio.run(synchronous(options, channel)) == wanted, (options, channel)


# Failures


def test_a_full_disk_refuses_the_send_and_loses_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as carrier:
            receiver = Receiver()
            await carrier.send(message(b"before"))
            await carrier.database.submit(select, "PRAGMA max_page_count = 1")
            with pytest.raises(ChannelFull, match=r"no room for .*broker\.db") as caught:
                await carrier.send(message(b"x" * 1_000_000))
            assert caught.value.safety is Safety.NOT_SENT
            await carrier.database.submit(select, "PRAGMA max_page_count = 1000000")
            await carrier.send(message(b"after"))
            await carrier.serve(WORK, receiver, "")
            await until(lambda: len(receiver.messages) == 2)
            assert receiver.bodies == [b"before", b"after"]

    run(main)


def test_a_verdict_that_cannot_be_written_now_is_written_later(tmp_path: Path) -> None:
    async def main() -> None:
        reported: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["message"]))
        clock = FakeClock()
        async with opened(tmp_path, clock=clock) as carrier:
            receiver = Receiver(hold=True)
            await carrier.serve(WORK, receiver, "")
            await carrier.send(message(b"1"))
            await until(lambda: receiver.in_work == 1)
            trigger = "CREATE TRIGGER broken BEFORE DELETE ON quintet_delivery BEGIN SELECT RAISE(ABORT, 'disk'); END"
            await carrier.database.submit(select, trigger)
            receiver.release()
            await until(lambda: bool(reported))
            assert "broker.db" in reported[0]
            await carrier.database.submit(select, "DROP TRIGGER broken")
            while (await carrier.channels())[0].in_work:
                await clock.advance(1)
            assert len(receiver.messages) == 1

    run(main)


def test_an_error_text_with_half_a_surrogate_pair_is_the_reason_of_a_dead_letter_and_its_key_goes_on(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async def receive(one: Message) -> Verdict:
            handled.append(one.body)
            return Dead("bad name: \udcff") if one.body == b"0" else DONE

        handled: list[bytes] = []
        async with opened(tmp_path) as carrier:
            for number in range(6):
                await carrier.send(message(b"%d" % number, key="a" if number in (0, 5) else ""))
            await carrier.serve(WORK, receive, "")
            await until(lambda: b"5" in handled)
            while (await carrier.channels())[0].in_work:
                await asyncio.sleep(0)
            (letter,) = await carrier.dead()
            assert letter.reason == "bad name: ?"
            assert sorted(handled) == [b"%d" % number for number in range(6)], "the others are not handled again"

    run(main)


@pytest.mark.parametrize("fields", [{"key": "\ud800"}, {"headers": {"name": "\ud800"}}, {"sender": "\ud800"}])
def test_a_message_that_cannot_be_written_is_refused_as_invalid(tmp_path: Path, fields: dict[str, Any]) -> None:
    async def main() -> None:
        async with opened(tmp_path) as carrier:
            with pytest.raises(InvalidMessage, match="cannot be written as UTF-8"):
                await carrier.send(message(b"1", **fields))
            await carrier.send(message(b"2"))
            assert (await carrier.channels())[0].waiting == 1

    run(main)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_was_removed_or_replaced_refuses_what_is_sent_and_says_that_it_is_away(
    tmp_path: Path, replaced: bool
) -> None:
    async def main() -> None:
        async with opened(tmp_path) as carrier:
            await carrier.send(message(b"1"))
            assert carrier.connected
            path = tmp_path / "broker.db"
            path.rename(tmp_path / "old.db")
            if replaced:
                path.touch()
            for _ in range(2):
                with pytest.raises(Unavailable, match="was removed or replaced while it is open") as caught:
                    await carrier.send(message(b"2"))
                assert caught.value.safety is Safety.NOT_SENT
            assert not carrier.connected
            with pytest.raises(TransportError, match="was removed or replaced"):
                await carrier.channels()
            (tmp_path / "old.db").rename(path)
            await carrier.send(message(b"3"))
            assert carrier.connected

    run(main)


def test_a_row_that_cannot_be_read_is_a_dead_letter_and_the_next_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as carrier:
            await carrier.send(message(b"1"))
            await carrier.database.submit(select, "UPDATE quintet_delivery SET message = x'c1'")
            await carrier.send(message(b"2"))
            receiver = Receiver()
            await carrier.serve(WORK, receiver, "")
            await until(lambda: len(receiver.messages) == 1)
            rows: list[Any] = []
            while not rows:
                rows = await carrier.database.submit(select, "SELECT reason FROM quintet_dead")
            assert "cannot be read" in rows[0][0]
            assert receiver.bodies == [b"2"]
            (letter,) = await carrier.dead()
            assert "cannot be read" in letter.reason

    run(main)


def test_a_damaged_file_refuses_a_send_as_unavailable(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "broker.db"
        async with opened(tmp_path) as carrier:
            await carrier.send(message(b"1"))
        content = bytearray(path.read_bytes())
        schema = apsw.Connection(str(path))
        ((root,),) = schema.execute("SELECT rootpage FROM sqlite_master WHERE name = 'quintet_delivery'").fetchall()
        schema.close()
        content[(root - 1) * 4096 : root * 4096] = b"\xaa" * 4096
        path.write_bytes(content)
        carrier = open_address(f"sqlite:///{path}")
        with contextlib.suppress(TransportError):  # closing or opening may find it first
            await carrier.open()
            with pytest.raises(Unavailable, match="is damaged"):
                await carrier.send(message(b"2"))
            await carrier.close()

    run(main)


def test_wrong_options_are_refused_with_what_to_write() -> None:
    for options, sentence in (
        ("lease=0", "option lease must be a number of at least 0.1"),
        ("lease=soon", "option lease='soon' is not a number"),
        ("capacity=0", "option capacity must be a number of at least 1"),
        ("attempts=nan", "option attempts must be a number of at least 1"),
        ("synchronous=off", "option synchronous='off' must be full or normal"),
        ("speed=9", "unknown option speed; known are: attempts, capacity, lease, mode, retain, synchronous"),
    ):
        with pytest.raises(AddressError) as caught:
            open_address(f"sqlite:///rides.db?{options}")
        assert sentence in str(caught.value)


def test_sending_before_open_and_after_close_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        carrier = Carrier(parse_address(f"sqlite:///{tmp_path}/broker.db"))
        with pytest.raises(CallError, match="is not open"):
            await carrier.send(message(b"1"))
        await carrier.open()
        await asyncio.gather(carrier.close(), carrier.close())
        with pytest.raises(CallError, match="is not open"):
            await carrier.send(message(b"1"))
        await carrier.open()  # and it may be opened again
        await carrier.send(message(b"1"))
        await carrier.close()
        assert sorted(os.listdir(tmp_path)) == ["broker.db"]  # noqa: PTH208

    run(main)
