"""Repeats of a message: each is handled once in effect, and answered from the store."""

from __future__ import annotations

import asyncio
import http.client
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import apsw
import pytest
from orders_contract import SCHEMA, Orders, Receipt, SoldOut

from quintet import (
    AddressError,
    ConfigurationError,
    Policy,
    QuintetError,
    Redelivery,
    RemoteError,
    Service,
    Store,
    connect,
    current,
    deadline,
    serve,
)
from quintet.call import Call, PendingCall
from quintet.message import Channel, Message
from quintet.server import Running
from quintet.store import Conflict, SeenStore, UnitOfWork, open_seen
from quintet.testing import FakeClock
from quintet.testing.harness import harness

Handle = Callable[[str, int], Awaitable[Receipt]]
REPLY = Message(channel=Channel("orders"), body=b"\x00\xff", headers={"x-city": "Zürich"})


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    address = "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/orders.db"
    return Store(address, schema=SCHEMA)


async def book(order_id: str, amount: int) -> Receipt:
    """Writes into the ledger, and answers what stands there."""
    ledger = current().store
    await ledger.execute("INSERT INTO ledger VALUES (?, ?)", order_id, amount)
    ((total,),) = await ledger.execute("SELECT sum(amount) FROM ledger")
    return Receipt(order_id, total)


async def balance() -> int:
    ((found,),) = await current().store.execute("SELECT coalesce(sum(amount), 0) FROM ledger")
    return int(found)


def orders(
    store: Store | str, handle: Handle = book, total: Callable[[], Awaitable[int]] = balance, **options: Any
) -> Service:
    """The service of the contract, which does the same in each style."""
    service = Service(Orders, answers="memory://", idempotent=store, **options)
    service.handles(Orders.total)(total)

    async def quietly(order_id: str, amount: int) -> None:
        await handle(order_id, amount)

    async def answering(order_id: str, amount: int) -> Receipt:
        return await handle(order_id, amount)

    for operation in (Orders.note, Orders.placed):
        service.handles(operation)(quietly)
    for other in (Orders.place, Orders.invoice, Orders.offers):
        service.handles(other)(answering)
    return service


async def say(call: Call[..., Any] | PendingCall[..., Any], message_id: str, *args: Any) -> Any:
    """A call whose message has this id."""
    return await call.using(id=message_id)(*args)


def running(service: Service) -> Running:
    assert service.running
    return service.running


async def opened(store: Store, clock: FakeClock | None = None) -> SeenStore:
    seen = open_seen(store, clock=clock or FakeClock())
    await seen.open()
    return seen


# the service


async def test_a_repeat_of_a_request_gets_the_first_reply_and_does_nothing(store: Store) -> None:
    async with serve(orders(store), at="memory://"), connect(Orders, "memory://") as client:
        replies = [await say(client.place, name, "o-1", 5) for name in ("a", "a", "b", "a")]
        assert [reply.total for reply in replies] == [5, 5, 10, 5]
        assert await client.total() == 10


async def test_a_repeat_of_a_notification_an_event_and_an_async_request_does_nothing(store: Store) -> None:
    service = orders(store)
    async with serve(service, at="memory://"), connect(Orders, "memory://") as client:
        for _ in range(3):
            await say(client.note, "n", "note", 1)
            outlet = running(service)._outlets[Orders.placed]
            event = outlet.prepare(("event", 10), {})
            event.id = "n"  # another operation: no repeat of the notification
            await outlet.send(event)
        while await client.total() < 11:
            await asyncio.sleep(0)
        for _ in range(2):
            assert (await (await say(client.invoice, "i", "invoice", 100))) == Receipt("invoice", 111)
        assert await client.total() == 111


async def test_a_question_that_comes_again_gets_the_same_answer(store: Store) -> None:
    service = orders(store)
    async with serve(service, at="memory://"), connect(Orders, "memory://") as client:
        for _ in range(2):
            question = service.ask(Orders.offers, "o-1", 5)
            question._message.id = "q"
            async with question.within(5.0, enough=1) as answers:
                assert [answer.value async for answer in answers] == [Receipt("o-1", 5)]
        assert await client.total() == 5


async def test_an_async_request_that_comes_again_after_its_answer_was_lost_is_answered_from_the_store(
    tmp_path: Path,
) -> None:
    store = Store(f"sqlite:///{tmp_path}/orders.db", schema=SCHEMA)
    for _ in range(2):  # the service's answers are in memory: the second time it knows of none
        async with serve(orders(store), at="memory://"), connect(Orders, "memory://") as client:
            assert await (await say(client.invoice, "i", "o-1", 5)) == Receipt("o-1", 5)
            assert await client.total() == 5


async def test_a_repeat_over_another_transport_and_to_another_instance_gets_the_first_reply(tmp_path: Path) -> None:
    store, broker = Store(f"sqlite:///{tmp_path}/orders.db", schema=SCHEMA), f"sqlite:///{tmp_path}/broker.db"
    one, other = orders(store), orders(store)

    def post(port: int) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        headers = {"Content-Type": "application/json", "Idempotency-Key": "m-1"}
        connection.request("POST", "/v1/orders/o-1", b'{"amount": 5}', headers)
        response = connection.getresponse()
        try:
            return response.status, response.read()
        finally:
            connection.close()

    async with (
        serve(one, at="http://127.0.0.1:0", connect={Orders: broker}) as (address,),
        serve(other, at=broker),
    ):
        port = int(address.rpartition(":")[2])
        answers = [await asyncio.to_thread(post, port) for _ in range(2)]
        assert answers[0] == answers[1]
        async with connect(Orders, broker) as client:
            assert await say(client.place, "m-1", "o-1", 5) == Receipt("o-1", 5)
            assert await client.total() == 5


async def test_who_comes_while_the_first_is_in_work_waits_and_gets_its_reply(store: Store) -> None:
    begun, go, calls = asyncio.Event(), asyncio.Event(), []

    async def handle(order_id: str, amount: int) -> Receipt:
        calls.append(order_id)
        begun.set()
        await go.wait()
        return await book(order_id, amount)

    service = orders(store, handle)
    async with serve(service, at="memory://"), connect(Orders, "memory://") as client:
        first = asyncio.create_task(say(client.place, "a", "o-1", 5))
        await begun.wait()
        second = asyncio.create_task(say(client.place, "a", "o-1", 5))
        seen = running(service)._seen
        assert seen
        while not seen._waiting:
            await asyncio.sleep(0)
        go.set()
        assert await first == await second == Receipt("o-1", 5)
    assert calls == ["o-1"]


async def test_a_failure_leaves_nothing_behind_and_the_repeat_is_handled_anew(store: Store) -> None:
    attempts = []

    async def handle(order_id: str, amount: int) -> Receipt:
        receipt = await book(order_id, amount)
        attempts.append(receipt.total)
        if len(attempts) == 1:
            raise SoldOut(left=0)
        if len(attempts) == 2:
            raise ConnectionError("the warehouse is away")
        return receipt

    async with serve(orders(store, handle), at="memory://"), connect(Orders, "memory://") as client:
        with pytest.raises(SoldOut):
            await say(client.place, "a", "o-1", 5)
        with pytest.raises(RemoteError):
            await say(client.place, "a", "o-1", 5)
        assert await client.total() == 0
        assert await say(client.place, "a", "o-1", 5) == Receipt("o-1", 5)
        assert await say(client.place, "a", "o-1", 5) == Receipt("o-1", 5)
    assert attempts == [5, 5, 5]


async def test_a_redelivered_notification_is_done_once(store: Store) -> None:
    clock, done = FakeClock(), asyncio.Event()

    async def handle(order_id: str, amount: int) -> Receipt:
        receipt = await book(order_id, amount)
        if current().attempt < 3:
            raise ConnectionError("the warehouse is away")
        done.set()
        return receipt

    service = orders(Store("memory://", schema=SCHEMA), handle, redelivery=Redelivery(attempts=5))
    async with serve(service, at="memory://", clock=clock), connect(Orders, "memory://", clock=clock) as client:
        await client.note("o-1", 5)
        await clock.advance(10)
        assert done.is_set()
        assert await client.total() == 5


async def test_a_handler_that_is_cancelled_leaves_nothing_and_the_repeat_need_not_wait(store: Store) -> None:
    begun, calls = asyncio.Event(), []

    async def handle(order_id: str, amount: int) -> Receipt:
        calls.append(order_id)
        receipt = await book(order_id, amount)
        if len(calls) == 1:
            begun.set()
            await asyncio.Event().wait()
        return receipt

    service = orders(store, handle)
    async with serve(service, at="memory://"), connect(Orders, "memory://") as client:
        pending = await say(client.invoice, "i", "o-1", 5)
        await begun.wait()
        await pending.cancel()
        assert await say(client.place, "a", "o-1", 5) == Receipt("o-1", 5)
        seen = running(service)._seen
        assert seen
        assert await seen.begin(f"orders/{Orders.invoice.channel.name}/i") is None


async def test_a_value_that_does_not_fit_the_contract_is_not_kept(store: Store) -> None:
    async def handle(order_id: str, amount: int) -> Receipt:
        await book(order_id, amount)
        return object()  # type: ignore[return-value]

    async with serve(orders(store, handle), at="memory://"), connect(Orders, "memory://") as client:
        with pytest.raises(RemoteError):
            await say(client.place, "a", "o-1", 5)
        assert await client.total() == 0


async def test_what_is_read_and_written_at_once_by_many_handlers_adds_up(store: Store) -> None:
    """Each reads what stands there and writes the next: who was overtaken begins anew."""

    async def handle(order_id: str, amount: int) -> Receipt:
        ((last,),) = await current().store.execute("SELECT coalesce(max(amount), 0) FROM ledger")
        await asyncio.sleep(0)
        await current().store.execute("INSERT INTO ledger VALUES (?, ?)", order_id, last + amount)
        return Receipt(order_id, last + amount)

    async with (
        serve(orders(store, handle), at="memory://"),
        connect(Orders, "memory://", policy=Policy(timeout=30)) as client,
    ):
        replies = await asyncio.gather(*(client.place(f"o-{n}", 1) for n in range(100)))
        assert sorted(reply.total for reply in replies) == list(range(1, 101))


async def test_a_get_reads_the_store_is_not_kept_and_changes_nothing(store: Store) -> None:
    async with serve(orders(store), at="memory://"), connect(Orders, "memory://") as client:
        assert await say(client.total, "a") == 0
        await client.place("o-1", 5)
        assert await say(client.total, "a") == 5


async def test_a_get_whose_tables_are_changed_while_it_reads_begins_anew(store: Store) -> None:
    reading, written = asyncio.Event(), asyncio.Event()
    totals: list[int] = []

    async def total() -> int:
        totals.append(await balance())
        reading.set()
        await written.wait()
        assert await balance() == totals[-1]
        return totals[-1]

    async with serve(orders(store, total=total), at="memory://"), connect(Orders, "memory://") as client:
        asked = asyncio.create_task(client.total())
        await reading.wait()
        await client.place("o-1", 5)
        written.set()
        assert await asked == 5
    assert totals == [0, 5]


async def test_a_get_that_writes_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    async def total() -> int:
        await current().store.execute("INSERT INTO ledger VALUES ('o-1', 5)")
        return 0

    service = orders(Store("memory://", schema=SCHEMA), total=total)
    async with serve(service, at="memory://"), connect(Orders, "memory://") as client:
        with pytest.raises(RemoteError):
            await client.total()
    assert "a GET changes nothing; let its operation have another verb" in caplog.text


async def test_the_store_is_there_while_the_handler_runs_also_below_a_deadline() -> None:
    kept: list[UnitOfWork] = []

    async def handle(order_id: str, amount: int) -> Receipt:
        with deadline(5):
            kept.append(current().store)
        return await book(order_id, amount)

    service = orders(Store("memory://", schema=SCHEMA), handle)
    async with serve(service, at="memory://"), connect(Orders, "memory://") as client:
        await client.place("o-1", 5)
        with pytest.raises(QuintetError, match="the handler has ended"):
            await kept[0].execute("SELECT 1")


async def test_a_service_without_a_store_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async with serve(orders(""), at="memory://"), connect(Orders, "memory://") as client:
        with pytest.raises(RemoteError):
            await client.place("o-1", 5)
    assert "current().store is there in the handlers of Service(..., idempotent='sqlite:///...')" in caplog.text


def test_a_store_that_cannot_be_is_refused() -> None:
    with pytest.raises(AddressError, match="handled messages are kept in"):
        open_seen("amqp://127.0.0.1")
    with pytest.raises(ConfigurationError, match=r"Store\(keep=-1"):
        Store("memory://", keep=-1)


async def test_in_a_harness_it_is_kept_in_memory(tmp_path: Path) -> None:
    service = orders(Store(f"sqlite:///{tmp_path}/orders.db", schema=SCHEMA))
    async with harness(service) as bench:
        client = bench.connect(Orders)
        assert [await say(client.place, "a", "o-1", 5) for _ in range(2)] == [Receipt("o-1", 5)] * 2
    assert list(tmp_path.iterdir()) == []
    assert service.idempotent == Store(f"sqlite:///{tmp_path}/orders.db", schema=SCHEMA)


# the unit of work


async def test_what_is_executed_is_seen_by_the_unit_alone_until_it_is_finished(store: Store) -> None:
    seen = await opened(store)
    mine, other = UnitOfWork(seen), UnitOfWork(seen)
    await mine.execute("INSERT INTO ledger VALUES ('o-1', 5)")
    assert await mine.execute("SELECT * FROM ledger") == [("o-1", 5)]
    assert await other.execute("SELECT * FROM ledger") == []
    assert await seen.finish("m", REPLY, mine.steps) is None
    assert await UnitOfWork(seen).execute("SELECT * FROM ledger") == [("o-1", 5)]
    await seen.close()


async def test_who_was_overtaken_in_what_it_read_conflicts_at_its_next_statement_or_at_the_end(store: Store) -> None:
    seen = await opened(store)
    late, later, first = UnitOfWork(seen), UnitOfWork(seen), UnitOfWork(seen)
    for unit in (late, later):
        await unit.execute("SELECT count(*) FROM ledger")
    await first.execute("INSERT INTO ledger VALUES ('o-1', 5)")
    await seen.finish("1", REPLY, first.steps)
    with pytest.raises(Conflict):
        await late.execute("INSERT INTO ledger VALUES ('o-2', 5)")
    with pytest.raises(Conflict):
        await seen.finish("2", REPLY, [*later.steps, *first.steps])
    assert await UnitOfWork(seen).execute("SELECT * FROM ledger") == [("o-1", 5)]
    assert await seen.begin("2") is None  # it is not marked as handled
    await seen.close()


async def test_a_statement_that_fails_is_the_handlers_to_deal_with_and_holds_only_while_it_fails(store: Store) -> None:
    seen = await opened(store)
    await UnitOfWork(seen).execute("SELECT 1")
    unit, other = UnitOfWork(seen), UnitOfWork(seen)
    with pytest.raises(apsw.ConstraintError):
        await unit.execute("INSERT INTO ledger VALUES ('o-1', -5)")
    with pytest.raises(apsw.SQLError, match="no such table"):
        await unit.execute("SELECT * FROM ledgers")
    with pytest.raises(TypeError):
        await unit.execute("INSERT INTO ledger VALUES (?, ?)", "o-1", object())
    await unit.execute("INSERT INTO ledger VALUES ('o-1', 5)")
    await other.execute("CREATE TABLE ledgers (x)")
    await seen.finish("other", REPLY, other.steps)
    with pytest.raises(Conflict):
        await seen.finish("m", REPLY, unit.steps)
    await seen.close()


@pytest.mark.parametrize("sql", ["COMMIT", "ROLLBACK", "SAVEPOINT x", "INSERT INTO ledger VALUES ('x', 1); COMMIT"])
async def test_a_statement_that_would_end_the_transaction_is_refused(store: Store, sql: str) -> None:
    seen = await opened(store)
    unit = UnitOfWork(seen)
    with pytest.raises(QuintetError, match="leave it out"):
        await unit.execute(sql)
    assert unit.steps == []
    assert await unit.execute("SELECT * FROM ledger") == []
    await seen.close()


# the marks


async def test_a_repeat_is_known_for_as_long_as_is_kept_and_no_longer(store: Store) -> None:
    clock = FakeClock()
    seen = await opened(store, clock)
    assert await seen.begin("m") is None
    assert await seen.finish("m", REPLY, []) is None
    await clock.advance(store.keep - 1)
    handled = await seen.begin("m")
    assert handled is not None
    assert handled.reply == REPLY
    await clock.advance(2)
    assert store.keep == 7 * 24 * 3600
    assert await seen.begin("m") is None
    await seen.close()


async def test_the_first_of_two_that_finish_wins_and_the_other_has_no_effect(store: Store) -> None:
    seen = await opened(store)
    one, other = UnitOfWork(seen), UnitOfWork(seen)
    for unit in (one, other):
        await unit.execute("INSERT INTO ledger VALUES ('o-1', 5)")
    assert await seen.finish("m", REPLY, one.steps) is None
    beaten = await seen.finish("m", Message(channel=Channel("orders"), body=b"other"), other.steps)
    assert beaten is not None
    assert beaten.reply == REPLY
    assert await UnitOfWork(seen).execute("SELECT count(*) FROM ledger") == [(1,)]
    await seen.close()


async def test_who_waits_has_its_turn_when_the_first_gives_up_and_no_longer_than_it_may(store: Store) -> None:
    clock = FakeClock()  # it stands still: only the wake-up can end the waiting
    seen = await opened(store, clock)
    assert await seen.begin("m") is None
    waiting = asyncio.create_task(seen.begin("m"))
    while not seen._waiting:
        await asyncio.sleep(0)
    seen.release("m")
    assert await waiting is None
    with pytest.raises(TimeoutError):
        await seen.begin("m", until=clock.now())
    await seen.close()
    assert not seen._waiting


# processes

SERVICE = """
import asyncio, os, signal, sys
from orders_contract import SCHEMA
from test_repeats import book, orders
from quintet import Store, repeats, serve
from quintet.store import SeenStore

folder, when = sys.argv[1:]
finish = SeenStore.finish

async def finish_and_die(self, key, reply, steps):
    if when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    found = await finish(self, key, reply, steps)
    if when == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    print("done" if found is None else "repeat", flush=True)
    return found

SeenStore.finish = finish_and_die

async def main():
    store = Store(f"sqlite:///{folder}/orders.db", schema=SCHEMA)
    async with serve(orders(store), at=f"sqlite:///{folder}/broker.db?lease=0.5"):
        print("ready", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_who_is_killed_before_or_after_the_commit_leaves_one_effect(tmp_path: Path, when: str) -> None:
    """Killed after the commit, the message was not acknowledged yet: it comes again, to another instance."""

    def start(when: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SERVICE, str(tmp_path), when]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        return process

    async def main() -> None:
        broker, store = f"sqlite:///{tmp_path}/broker.db", Store(f"sqlite:///{tmp_path}/orders.db", schema=SCHEMA)
        victim = start(when)
        with victim:
            async with connect(Orders, broker) as client:
                await client.note("o-1", 5)
                await asyncio.wait_for(asyncio.to_thread(victim.wait), 20)
        assert victim.returncode == -signal.SIGKILL
        handled = asyncio.Event()
        begin = SeenStore.begin

        async def begun(self: SeenStore, key: str, until: float) -> Any:
            found = await begin(self, key, until)
            assert (found is None) == (when == "before")
            handled.set()
            return found

        SeenStore.begin = begun  # type: ignore[method-assign, assignment]
        try:
            async with serve(orders(store), at=broker), connect(Orders, broker) as client:
                await asyncio.wait_for(handled.wait(), 20)
        finally:
            SeenStore.begin = begin  # type: ignore[method-assign]
        async with serve(orders(store), at="memory://"), connect(Orders, "memory://") as client:
            assert await client.total() == 5

    asyncio.run(main())


def test_what_a_dead_process_had_begun_is_free_for_the_next(tmp_path: Path) -> None:
    code = """
import asyncio, os, signal, sys
from quintet.store import open_seen

async def main():
    seen = open_seen(sys.argv[1])
    await seen.open()
    assert await seen.begin("m") is None
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
    address = f"sqlite:///{tmp_path}/orders.db"

    async def main() -> None:
        seen = await opened(Store(address))  # its clock stands still: it is not by looking again later
        command = [sys.executable, "-c", code, address]
        assert await asyncio.to_thread(subprocess.call, command) == -signal.SIGKILL
        assert await asyncio.wait_for(seen.begin("m"), 10) is None
        await seen.close()

    asyncio.run(main())
