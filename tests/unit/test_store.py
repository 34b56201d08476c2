"""Answer stores: the first answer wins, whoever waits is woken, nothing is kept for ever."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quintet.database import Database
from quintet.errors import AddressError, CallError
from quintet.message import Channel, Message
from quintet.store import LOOK_SECONDS, AnswerStore, Kept, open_store
from quintet.testing.clock import FakeClock

REPLY = Message(channel=Channel("billing.receipt"), body=b"\x00\xff", status="", headers={"x-city": "Zürich"})


@pytest.fixture(params=["memory", "sqlite"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/answers.db"


async def until_waiting(store: AnswerStore, count: int = 1) -> None:
    """Returns once so many `get` wait for their wake-up, after their look at the store."""
    while sum(len(waiting) for waiting in store._waiting.values()) < count:
        await asyncio.sleep(0)
    await store.get("a look that comes after theirs")


def test_an_answer_is_kept_as_it_was_given(address: str) -> None:
    async def main() -> None:
        store = open_store(address)
        await store.open()
        assert await store.get("1") is None
        await store.accept("1")
        assert await store.get("1") == Kept("1", "pending")
        assert await store.answer("1", REPLY) is True
        await store.accept("1")  # the submission comes again: that changes nothing
        assert await store.get("1", wait=60.0) == Kept("1", "answered", REPLY)
        await store.close()

    asyncio.run(main())


def test_the_first_of_two_answers_wins_and_cancel_comes_too_late_for_it(address: str) -> None:
    async def main() -> None:
        store = open_store(address)
        await store.open()
        other = Message(channel=REPLY.channel, body=b"second")
        assert [await store.answer("1", REPLY), await store.answer("1", other)] == [True, False]
        assert await store.cancel("1") is False
        assert await store.get("1") == Kept("1", "answered", REPLY)
        await store.close()

    asyncio.run(main())


def test_what_is_cancelled_takes_no_answer_also_where_it_was_not_known_yet(address: str) -> None:
    async def main() -> None:
        store = open_store(address)
        await store.open()
        await store.accept("known")
        for key in ("known", "unknown"):
            assert [await store.cancel(key), await store.cancel(key)] == [True, True]
            await store.accept(key)
            assert await store.answer(key, REPLY) is False
            assert await store.get(key, wait=60.0) == Kept(key, "cancelled")
        await store.close()

    asyncio.run(main())


def test_get_waits_for_the_answer_and_all_that_wait_have_it(address: str) -> None:
    async def main() -> None:
        clock = FakeClock()  # it stands still: only the wake-up can end the waiting
        store = open_store(address, clock=clock)
        await store.open()
        await store.accept("1")
        waiting = [asyncio.create_task(store.get("1", wait=60.0)) for _ in range(3)]
        await asyncio.wait_for(until_waiting(store, 3), 45)
        await store.answer("1", REPLY)
        assert await asyncio.wait_for(asyncio.gather(*waiting), 5) == [Kept("1", "answered", REPLY)] * 3
        assert clock.timers == [], "a timer was left behind"
        assert store._waiting == {}, "a waiter was left behind"
        await store.close()

    asyncio.run(main())


def test_get_says_pending_when_its_time_is_up(address: str) -> None:
    async def main() -> None:
        clock = FakeClock()
        store = open_store(address, clock=clock)
        await store.open()
        await store.accept("1")
        wait = LOOK_SECONDS * 2.5  # so that it also looks in between
        waiting = asyncio.create_task(store.get("1", wait=wait))
        before, end = clock.now(), time.monotonic() + 5
        while not waiting.done():
            assert time.monotonic() < end, "get() never came back"
            await clock.advance(0.1)
            await asyncio.sleep(0.001)  # its looks at the file take real time
        assert await waiting == Kept("1", "pending")
        assert clock.now() - before >= wait - 0.2
        await store.close()

    asyncio.run(main())


def test_a_closed_store_leaves_nobody_waiting(tmp_path: Path) -> None:
    async def main() -> None:
        store = open_store(f"sqlite:///{tmp_path}/answers.db", clock=FakeClock())
        await store.open()
        await store.accept("1")
        waiting = asyncio.create_task(store.get("1", wait=60.0))
        await asyncio.wait_for(until_waiting(store), 45)
        await store.close()
        with pytest.raises(CallError, match="not open"):
            await asyncio.wait_for(waiting, 45)

    asyncio.run(main())


def test_entries_go_after_their_time_and_pending_ones_stay_as_long_as_they_are_asked_for(address: str) -> None:
    async def main() -> None:
        clock = FakeClock()
        store = open_store(address, keep=100.0, clock=clock)
        await store.open()
        await store.accept("pending")
        await store.answer("answered", REPLY)
        await store.cancel("cancelled")
        await clock.advance(99.0)
        assert [bool(await store.get(key)) for key in ("pending", "answered", "cancelled")] == [True, True, True]
        await store.accept("pending")
        await clock.advance(2.0)
        assert [bool(await store.get(key)) for key in ("pending", "answered", "cancelled")] == [True, False, False]
        await clock.advance(100.0)
        assert await store.get("pending") is None
        assert await store.answer("answered", REPLY) is True, "what is forgotten is as if it had never been"
        await store.close()

    asyncio.run(main())


OTHER_PROCESS = """
import asyncio, sys
from quintet.message import Channel, Message
from quintet.store import open_store

async def main(address):
    store = open_store(address)
    await store.open()
    print("ready", flush=True)
    sys.stdin.readline()
    await store.answer("1", Message(channel=Channel("c"), body=b"from afar"))
    print(await store.get("1"), flush=True)
    sys.stdin.readline()
    await store.close()

asyncio.run(main(sys.argv[1]))
"""


def test_an_answer_of_another_process_wakes_who_waits_here(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path}/answers.db"

    async def main() -> None:
        store = open_store(address, clock=FakeClock())  # it stands still: the store cannot find it by looking again
        await store.open()
        await store.accept("1")
        command = [sys.executable, "-c", OTHER_PROCESS, address]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdin
            assert other.stdout
            await asyncio.to_thread(other.stdout.readline)
            waiting = asyncio.create_task(store.get("1", wait=60.0))
            await asyncio.wait_for(until_waiting(store), 45)
            other.stdin.write("go\n")
            other.stdin.flush()
            kept = await asyncio.wait_for(waiting, 45)
            other.communicate("end\n", timeout=10)
        assert kept is not None
        assert kept.reply is not None
        assert kept.reply.body == b"from afar"
        await store.close()

    asyncio.run(main())


def test_answers_of_many_share_transactions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transactions = 0
    commit = Database._commit

    def counted(*arguments: object) -> object:
        nonlocal transactions
        transactions += 1
        return commit(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Database, "_commit", counted)

    async def main() -> None:
        store = open_store(f"sqlite:///{tmp_path}/answers.db")
        await store.open()
        before = transactions
        assert all(await asyncio.gather(*(store.answer(str(number), REPLY) for number in range(100))))
        assert transactions - before == 1
        await store.close()

    asyncio.run(main())


def test_an_address_that_is_no_store_is_refused() -> None:
    with pytest.raises(AddressError, match=r"sqlite:///rides\.db or, for one process alone, in memory://"):
        open_store("amqp://127.0.0.1")
    with pytest.raises(AddressError, match=r"write sqlite:///rides\.db"):
        open_store("sqlite://rides.db")
