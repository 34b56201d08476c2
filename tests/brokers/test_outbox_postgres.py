"""The outbox in a real PostgreSQL: within users' transactions, by one instance at a time, whoever is killed."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from outbox_service import Shop
from proxy import Proxy
from running import Broker as Server
from running import Entry

from quintet import ConfigurationError, Service, TooLarge, TransportError, connect, current, serve
from quintet.message import Message
from quintet.outbox import open_box
from quintet.testing import FakeClock
from quintet.transports.memory import Carrier
from quintet.watch import Occurrence

psycopg = pytest.importorskip("psycopg")
from quintet.outboxes import postgresql  # noqa: E402 - where psycopg is there

PROGRAM = Path(__file__).parents[1] / "unit" / "outbox_service.py"
TABLE = "CREATE TABLE orders (id text PRIMARY KEY)"


class Heard:
    """A service that hears of a shop's orders, and what it has heard so far."""

    def __init__(self, **options: Any) -> None:
        self.service = Service(name="ears", **options)
        self.orders: list[tuple[str, int]] = []
        self._changed = asyncio.Condition()
        self.service.handles(Shop.placed)(self._placed)

    async def _placed(self, order_id: str, amount: int) -> None:
        async with self._changed:
            self.orders.append((order_id, amount))
            self._changed.notify_all()

    async def so_many(self, orders: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.orders) >= orders)

    async def each_of(self, order_ids: set[str]) -> None:
        """Some may come twice."""
        async with self._changed:
            await self._changed.wait_for(lambda: order_ids <= {order_id for order_id, _ in self.orders})


def shop(outbox: str) -> Service:
    service = Service(Shop, outbox=outbox)

    @service.handles(Shop.place)
    async def place(order_id: str, amount: int) -> int:
        return amount

    @service.handles(Shop.look)
    async def look() -> int:
        return 0

    return service


@asynccontextmanager
async def running(service: Service, heard: Heard, **options: Any) -> AsyncGenerator[None]:
    async with serve(service, heard.service, at="memory://", connect={Shop: "memory://"}, **options):
        yield


@pytest.fixture
def database(broker: Callable[[str], Entry]) -> Iterator[str]:
    """A database of one's own in the shared server."""
    yield from _database(broker("postgresql")["address"])


def _database(server: str) -> Iterator[str]:
    name = f"outbox_{random.getrandbits(64):x}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
        yield server.rpartition("/")[0] + f"/{name}"
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def run(database: str, sql: str, *values: Any) -> list[Any]:
    with psycopg.connect(database, autocommit=True) as connection:
        cursor = connection.execute(sql, values)
        return cursor.fetchall() if cursor.description else []


async def emptied(database: str) -> None:
    while await asyncio.to_thread(run, database, "SELECT seq FROM quintet_outbox"):
        await asyncio.sleep(0)


async def test_what_is_added_is_sent_at_once_when_the_transaction_commits_and_vanishes_when_it_is_rolled_back(
    database: str,
) -> None:
    """The clock stands still: nothing is found by looking now and then."""
    heard, service = Heard(), shop(database)
    async with running(service, heard, clock=FakeClock()), await psycopg.AsyncConnection.connect(database) as mine:
        for number in range(10):
            await service.outbox.add(mine, Shop.placed, f"o-{number}", number)
            if number % 2:
                await mine.commit()
                await heard.so_many(number // 2 + 1)
            else:
                await mine.rollback()
        with suppress(ZeroDivisionError):
            async with mine.transaction():
                await service.outbox.add(mine, Shop.placed, "o-10", 10)
                raise ZeroDivisionError
        async with mine.transaction():
            await service.outbox.add(mine, Shop.placed, "o-11", 11)
        await heard.so_many(6)
    assert [amount for _, amount in heard.orders] == [1, 3, 5, 7, 9, 11]
    assert run(database, "SELECT * FROM quintet_outbox") == []


async def test_threads_may_add_through_connections_that_block(database: str) -> None:
    heard, service = Heard(), shop(database)

    def work(number: int) -> None:
        with psycopg.connect(database) as mine:
            service.outbox.add(mine, Shop.placed, f"o-{number}", number)

    async with running(service, heard, clock=FakeClock()):
        await asyncio.gather(*(asyncio.to_thread(work, number) for number in range(10)))
        await heard.so_many(10)
    assert sorted(amount for _, amount in heard.orders) == list(range(10))


async def test_a_transaction_that_lasts_holds_up_no_other(database: str) -> None:
    heard, service = Heard(), shop(database)
    async with (
        running(service, heard, clock=FakeClock()),
        await psycopg.AsyncConnection.connect(database) as slow,
        await psycopg.AsyncConnection.connect(database) as quick,
    ):
        await service.outbox.add(slow, Shop.placed, "o-1", 1)
        await service.outbox.add(quick, Shop.placed, "o-2", 2)
        await quick.commit()
        await heard.so_many(1)
        await slow.commit()
        await heard.so_many(2)
    assert [amount for _, amount in heard.orders] == [2, 1]


async def test_a_handler_s_store_and_a_foreign_connection_are_refused(database: str, tmp_path: Path) -> None:
    service = Service(Shop, outbox=database, idempotent=f"sqlite:///{tmp_path}/shop.db")

    @service.handles(Shop.place)
    async def place(order_id: str, amount: int) -> int:
        with pytest.raises(ConfigurationError, match=r"give it a psycopg\.AsyncConnection"):
            service.outbox.add(current().store, Shop.placed, order_id, amount)
        return amount

    @service.handles(Shop.look)
    async def look() -> int:
        return 0

    async with serve(service, at="memory://"), connect(Shop, "memory://") as client:
        assert await client.place("o-1", 1) == 1


async def test_messages_of_one_key_are_sent_in_order_by_one_of_two_instances_each_once(database: str) -> None:
    heard, one, other = Heard(), shop(database), shop(database)

    async def add(service: Service, keys: range) -> None:
        async with await psycopg.AsyncConnection.connect(database) as mine:
            for number in range(200):
                await service.outbox.add(mine, Shop.placed, f"o-{random.choice(keys)}", number)
                await mine.commit()

    async with running(one, heard), serve(other, at="memory://"):
        await asyncio.gather(add(one, range(3)), add(other, range(3, 6)))
        await heard.so_many(400)
        await emptied(database)
    assert len(heard.orders) == 400
    for key in range(6):
        mine = [number for order_id, number in heard.orders if order_id == f"o-{key}"]
        assert mine == sorted(mine)


async def test_a_service_that_stops_while_its_relay_connects_leaves_no_connection_open(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections: list[psycopg.AsyncConnection[Any]] = []
    connecting, execute = asyncio.Event(), psycopg.AsyncConnection.execute

    async def never(self: psycopg.AsyncConnection[Any], query: Any, *values: Any, **options: Any) -> Any:
        if query.startswith("SET synchronous_commit"):
            connections.append(self)
            if len(connections) == 2:  # the one that listens
                connecting.set()
                await asyncio.Event().wait()
        return await execute(self, query, *values, **options)

    monkeypatch.setattr(psycopg.AsyncConnection, "execute", never)
    box = open_box(database, "shop", FakeClock())
    await box.open(lambda _: None)
    await connecting.wait()
    await box.close()
    assert [connection.closed for connection in connections] == [True, True]


async def test_another_instance_takes_over_when_the_session_of_the_one_that_relays_ends(database: str) -> None:
    told: list[Occurrence] = []
    heard, one, other = Heard(), shop(database), shop(database)
    async with running(one, heard, listener=told.append):
        async with serve(other, at="memory://"):
            for number in range(20):
                run(
                    database,
                    "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted"
                    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
                )
                async with await psycopg.AsyncConnection.connect(database) as mine:
                    await other.outbox.add(mine, Shop.placed, f"o-{number}", number)
        await heard.each_of({f"o-{number}" for number in range(20)})
        await emptied(database)
    left = "SELECT pid FROM pg_stat_activity WHERE application_name = 'quintet outbox of shop'"
    while await asyncio.to_thread(run, database, left):
        await asyncio.sleep(0.01)


async def test_another_instance_takes_over_from_one_that_hangs(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that relays looks once a second; the server ends the session of one that does not."""
    monkeypatch.setattr(postgresql, "IDLE", "1s")
    hangs, other = (open_box(database, "shop", FakeClock()) for _ in range(2))
    for box in (hangs, other):
        await box.open(lambda _: None)
    assert await hangs.look() == []
    while await other.look() is None:
        await asyncio.sleep(0.01)
    with pytest.raises(TransportError, match="idle"):
        await hangs.look()
    assert await hangs.look() is None
    for box in (hangs, other):
        await box.close()


async def test_what_is_refused_for_good_is_set_aside_and_counted(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = Carrier.send

    async def send(self: Carrier, message: Message) -> Message | None:
        if message.operation == "shop.placed" and b"1001" in message.body:
            raise TooLarge("4 MB are too many")
        return await inner(self, message)

    monkeypatch.setattr(Carrier, "send", send)
    heard, service = Heard(), shop(database)
    async with running(service, heard), await psycopg.AsyncConnection.connect(database) as mine:
        for amount in (1000, 1001, 1002):
            await service.outbox.add(mine, Shop.placed, "o-1", amount)
        await mine.commit()
        await heard.so_many(2)
        while run(database, "SELECT count(*) FROM quintet_outbox") != [(1,)]:
            await asyncio.sleep(0)
        assert run(database, "SELECT reason FROM quintet_outbox") == [("TooLarge: 4 MB are too many",)]
        assert service.running
        assert service.running.relay
        (state,) = await service.running.relay.channels()
        assert (state.channel, state.waiting, state.dead, state.oldest) == ("shop.v1.placed", 0, 1, None)


async def test_a_role_that_may_not_make_the_table_is_told_how_and_uses_one_that_is_there(database: str) -> None:
    role = f"clerk_{random.getrandbits(64):x}"
    run(database, f"CREATE ROLE {role} LOGIN")
    address = database.replace("postgres@", f"{role}@")
    try:
        run(database, "REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        with pytest.raises(ConfigurationError, match=f"user {role} may not make it") as refused:
            async with running(shop(address), Heard()):
                pass
        assert postgresql.SCHEMA in str(refused.value)
        run(database, postgresql.SCHEMA)
        run(database, f"GRANT SELECT, INSERT, UPDATE, DELETE ON quintet_outbox TO {role}")
        heard, service = Heard(), shop(address)
        async with running(service, heard), await psycopg.AsyncConnection.connect(address) as mine:
            await service.outbox.add(mine, Shop.placed, "o-1", 1)
            await mine.commit()
            await heard.so_many(1)
    finally:
        run(database, f"DROP OWNED BY {role}")
        run(database, f"DROP ROLE {role}")


async def test_instances_that_start_at_once_make_one_table(database: str) -> None:
    boxes = [open_box(database, "shop", FakeClock()) for _ in range(8)]
    await asyncio.gather(*(box.open(lambda _: None) for box in boxes))
    assert [await box.look() for box in boxes] == [[], *[None] * 7]
    await asyncio.gather(*(box.close() for box in boxes))


@pytest.mark.parametrize(
    ("address", "error"),
    [
        ("postgresql://postgres@127.0.0.1:1/x", TransportError),
        ("postgresql://postgres@127.0.0.1/x?nonsense=1", ConfigurationError),
    ],
)
async def test_a_database_that_cannot_be_reached_is_one_sentence_at_start_up(
    address: str, error: type[Exception]
) -> None:
    with pytest.raises(error, match="postgresql://"):
        async with running(shop(address), Heard()):
            pass


async def test_without_psycopg_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'quintet\[outbox-postgres\]'"):
        open_box("postgresql://127.0.0.1/x", "shop", FakeClock())


async def test_a_network_that_falls_silent_is_noticed_and_what_waits_is_sent_when_it_is_back(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql, "PATIENCE", 0.5)
    told: list[Occurrence] = []
    host = database.rpartition("@")[2].partition("/")[0]
    async with Proxy(host) as proxy:
        heard, service = Heard(), shop(database.replace(host, proxy.address))
        async with running(service, heard, listener=told.append):
            for mode in ("silent", "reset", "half-close"):
                proxy.switch(mode)  # type: ignore[arg-type]
                async with await psycopg.AsyncConnection.connect(database) as mine:
                    for number in range(10):
                        await service.outbox.add(mine, Shop.placed, f"{mode}-{number}", number)
                while not told or told[-1].kind != "broker-lost":
                    await asyncio.sleep(0.01)
                proxy.switch("pass")
                await heard.each_of({f"{mode}-{number}" for number in range(10)})
                while told[-1].kind != "broker-back":
                    await asyncio.sleep(0.01)


async def test_a_server_that_is_killed_and_restarted_loses_nothing_that_was_committed(
    private_broker: Callable[[str], Server],
) -> None:
    server = await asyncio.to_thread(private_broker, "postgresql")
    heard, service = Heard(), shop(server.address)
    committed: list[str] = []

    async def order(life: int) -> None:
        while True:
            try:
                async with await psycopg.AsyncConnection.connect(server.address) as mine:
                    order_id = f"{life}-{len(committed)}"
                    await service.outbox.add(mine, Shop.placed, order_id, life)
                    await mine.commit()
                    committed.append(order_id)
            except psycopg.OperationalError:
                return

    async with running(service, heard):
        for life in range(3):
            working = asyncio.create_task(order(life))
            await heard.so_many(len(set(heard.orders)) + 50)
            await asyncio.to_thread(server.kill)
            await working
            await asyncio.to_thread(private_broker, "postgresql")
        await heard.each_of(set(committed))
        await emptied(server.address)
    assert len(committed) > 100


@pytest.mark.parametrize("seed", [1])
async def test_a_service_killed_at_any_moment_loses_nothing_and_says_nothing_that_is_not_so(
    seed: int, database: str, tmp_path: Path
) -> None:
    chance, bus = random.Random(seed), f"sqlite:///{tmp_path}/broker.db"
    run(database, TABLE)
    heard = Heard(idempotent=f"sqlite:///{tmp_path}/ears.db")
    async with serve(heard.service, at=bus, connect={Shop: bus}):
        for life in range(4):
            program = [sys.executable, str(PROGRAM), database, bus, f"{seed}-{life}", ""]
            process = await asyncio.to_thread(subprocess.Popen, program, stdout=subprocess.PIPE, text=True)
            assert process.stdout
            assert await asyncio.to_thread(process.stdout.readline) == "at work\n"
            await heard.so_many(len(heard.orders) + chance.randrange(1, 100))
            process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(process.communicate)
        async with serve(shop(database), at=bus):
            await emptied(database)
        committed = [order_id for (order_id,) in run(database, "SELECT id FROM orders")]
        await heard.so_many(len(committed))
    assert sorted(order_id for order_id, _ in heard.orders) == sorted(committed)
