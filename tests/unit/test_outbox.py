"""What is added to the outbox is sent if and only if its transaction commits, whoever dies, by one relay at a time."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import signal
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import apsw
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from outbox_service import TABLE, Mail, Shop

from quintet import (
    AddressError,
    ConfigurationError,
    QuintetError,
    RemoteError,
    Service,
    Store,
    TooLarge,
    TransportError,
    Unavailable,
    connect,
    current,
    serve,
)
from quintet.binding import bind
from quintet.errors import InvalidMessage
from quintet.message import Message, Native, new_id
from quintet.outbox import BATCH_BYTES, Settled, open_box
from quintet.outboxes import postgresql
from quintet.outboxes.sqlite import Keeper
from quintet.relay import LOOK_SECONDS
from quintet.testing import FakeClock
from quintet.testing.harness import harness
from quintet.transports.memory import Carrier
from quintet.watch import Occurrence
from quintet.wire.envelope import pack
from quintet.wire.outbox import INSERT, LEASE, SCHEMA

HERE = Path(__file__).parent
LEDGER = "CREATE TABLE IF NOT EXISTS ledger (order_id TEXT PRIMARY KEY, amount INTEGER)"
KINDS = ["sqlite", "sqlite3"]


class Heard:
    """A service that hears what a shop and its mails say, and what it has heard so far, in order."""

    def __init__(self, name: str = "ears", **options: Any) -> None:
        self.service = Service(name=name, **options)
        self.orders: list[tuple[str, int]] = []
        self.gossip: list[str] = []
        self.headers: list[dict[str, str]] = []
        self._changed = asyncio.Condition()
        self.service.handles(Shop.placed)(self._placed)
        self.service.handles(Shop.gossip)(self._gossip)

    async def _placed(self, order_id: str, amount: int) -> None:
        async with self._changed:
            self.orders.append((order_id, amount))
            self.headers.append(dict(current().headers))
            self._changed.notify_all()

    async def _gossip(self, text: str) -> None:
        async with self._changed:
            self.gossip.append(text)
            self._changed.notify_all()

    async def so_many(self, orders: int = 0, gossip: int = 0) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.orders) >= orders and len(self.gossip) >= gossip)


class Broker:
    """What stands before the memory transport: `refuses` says with which error."""

    def __init__(self) -> None:
        self.refuses: Callable[[Message], Exception | None] = lambda message: None
        self.sent: list[str] = []

    def refuse(self, error: Exception | None) -> None:
        self.refuses = lambda message: error if message.operation == "shop.placed" else None


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    gate, inner = Broker(), Carrier.send

    async def send(self: Carrier, message: Message) -> Message | None:
        if error := gate.refuses(message):
            raise error
        gate.sent.append(message.id)
        return await inner(self, message)

    monkeypatch.setattr(Carrier, "send", send)
    return gate


async def place(order_id: str, amount: int) -> int:
    return amount


async def look() -> int:
    return 0


def shop(outbox: str, handle: Callable[..., Any] = place, looks: Callable[..., Any] = look, **options: Any) -> Service:
    service = Service(Shop, outbox=outbox, **options)
    service.handles(Shop.place)(handle)
    service.handles(Shop.look)(looks)
    return service


def connection(kind: str, file: Path) -> Any:
    if kind == "sqlite":
        opened = apsw.Connection(str(file))
        opened.set_busy_timeout(5000)
        return closing(opened)
    return closing(sqlite3.connect(file, isolation_level=None, timeout=5.0, check_same_thread=False))


def rows(file: Path, sql: str = "SELECT channel, key, reason FROM quintet_outbox ORDER BY seq") -> list[Any]:
    with closing(apsw.Connection(str(file))) as opened:
        return opened.execute(sql).fetchall()


async def leads(service: Service) -> None:
    assert service.running
    assert service.running.relay
    while not service.running.relay._leads:
        await asyncio.sleep(0)


async def emptied(file: Path) -> None:
    while rows(file):
        await asyncio.sleep(0)


# sent if and only if


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_added_is_sent_when_the_transaction_commits_and_vanishes_when_it_is_rolled_back(
    kind: str, tmp_path: Path
) -> None:
    """The clock stands still: nothing is found by looking now and then."""
    service, heard, file = shop(f"{kind}:///{tmp_path}/shop.db"), Heard(), tmp_path / "shop.db"
    async with serve(service, heard.service, at="memory://", connect={Shop: "memory://"}, clock=FakeClock()):
        await leads(service)
        with connection(kind, file) as mine:
            for number in range(10):
                mine.execute("BEGIN")
                service.outbox.add(mine, Shop.placed, f"o-{number}", number)
                service.outbox.add(mine, Shop.gossip, f"{number}")
                mine.execute("COMMIT" if number % 2 else "ROLLBACK")
            await heard.so_many(5, 5)
            mine.execute("BEGIN")
            service.outbox.add(mine, Shop.placed, "o-10", 10)
            await asyncio.sleep(0)  # the relay is woken, and waits for the end of this transaction
            assert len(heard.orders) == 5
            mine.execute("COMMIT")
            await heard.so_many(6)
    assert heard.orders == [(f"o-{number}", number) for number in (1, 3, 5, 7, 9, 10)]
    assert sorted(heard.gossip) == ["1", "3", "5", "7", "9"]
    if kind == "sqlite":
        assert rows(file) == []


@pytest.mark.parametrize("kind", KINDS)
async def test_a_thread_that_holds_the_connection_may_add_to_the_outbox(kind: str, tmp_path: Path) -> None:
    service, heard, file = shop(f"{kind}:///{tmp_path}/shop.db"), Heard(), tmp_path / "shop.db"

    def work(number: int) -> None:
        with connection(kind, file) as mine:
            mine.execute("BEGIN IMMEDIATE")
            service.outbox.add(mine, Shop.placed, f"o-{number}", number)
            mine.execute("COMMIT")

    async with serve(service, heard.service, at="memory://", connect={Shop: "memory://"}):
        await asyncio.gather(*(asyncio.to_thread(work, number) for number in range(20)))
        await heard.so_many(20)
    assert sorted(amount for _, amount in heard.orders) == list(range(20))


async def test_a_handler_s_message_is_part_of_what_it_does_through_its_store(tmp_path: Path) -> None:
    """It fails at the first attempt, another overtakes it at the second, and it is repeated when it is done."""
    attempts = 0

    async def handle(order_id: str, amount: int) -> int:
        nonlocal attempts
        tables = current().store
        ((total,),) = await tables.execute("SELECT coalesce(sum(amount), 0) FROM ledger")
        await tables.execute("INSERT INTO ledger VALUES (?, ?)", order_id, amount)
        service.outbox.add(tables, Shop.placed, order_id, amount + total)
        await tables.execute("SELECT count(*) FROM ledger")  # what is tried again is tried with the row before it
        attempts += 1
        if attempts == 1:
            raise ConnectionError("the warehouse is away")
        if attempts == 2:
            await asyncio.to_thread(rows, file, "INSERT INTO ledger VALUES ('o-0', 10)")
        return total

    file = tmp_path / "shop.db"
    address = f"sqlite:///{file}"
    service, heard = shop(address, handle, idempotent=Store(address, schema=LEDGER)), Heard()
    async with (
        serve(service, heard.service, at="memory://", connect={Shop: "memory://"}),
        connect(Shop, "memory://") as client,
    ):
        with pytest.raises(QuintetError, match=r"shop\.place failed"):
            await client.place.using(id="m-1")("o-1", 1)
        for _ in range(2):
            assert await client.place.using(id="m-1")("o-1", 1) == 10
        assert attempts == 3
        await client.place("o-2", 2)
        await heard.so_many(2)
    assert heard.orders == [("o-1", 11), ("o-2", 13)]
    assert rows(file) == []


async def test_a_get_sends_nothing_and_a_handler_that_has_ended_neither(tmp_path: Path) -> None:
    left: list[Any] = []

    async def handle(order_id: str, amount: int) -> int:
        left.append(current().store)
        return amount

    async def looks() -> int:
        with pytest.raises(QuintetError, match="a GET changes nothing, and so it sends nothing"):
            service.outbox.add(current().store, Shop.gossip, "psst")
        return 0

    address = f"sqlite:///{tmp_path}/shop.db"
    service = shop(address, handle, looks, idempotent=address)
    async with serve(service, at="memory://"), connect(Shop, "memory://") as client:
        await client.look()
        await client.place("o-1", 1)
        with pytest.raises(QuintetError, match="the handler has ended"):
            service.outbox.add(left[0], Shop.gossip, "psst")


# what it takes


async def receiver(mails: list[tuple[str, str]], at: str) -> Service:
    service = Service(Mail, answers="memory://")

    @service.handles(Mail.send)
    async def send(to: str, text: str) -> None:
        mails.append((to, f"{text} {current().headers.get('x-city')} {current().id}"))

    @service.handles(Mail.letter)
    async def letter(to: str) -> str:
        return f"dear {to}"

    @service.handles(Mail.ask)
    async def ask(to: str) -> str:
        return to

    return service


@pytest.mark.parametrize("at", ["memory://", "http://127.0.0.1:0"])
async def test_notifications_and_async_requests_of_clients_wait_in_it_too_for_whatever_carries_them(
    at: str, tmp_path: Path
) -> None:
    mails: list[tuple[str, str]] = []
    service = shop(f"sqlite:///{tmp_path}/shop.db")
    mail = service.uses(Mail)
    async with (
        serve(await receiver(mails, at), at=at) as addresses,
        serve(service, at="memory://", connect={Mail: addresses}),
    ):
        with connection("sqlite", tmp_path / "shop.db") as mine:
            mine.execute("BEGIN")
            send = mail.send.using(id="m-1", headers={"x-city": "Zürich" if at == "memory://" else "Bern"})
            assert service.outbox.add(mine, send, "ann/bob", text="hello") == "m-1"
            pending = mail.letter.pending(service.outbox.add(mine, mail.letter, "ann"))
            mine.execute("COMMIT")
        await emptied(tmp_path / "shop.db")
        assert await pending.wait(5.0) == "dear ann"
    assert mails == [("ann/bob", f"hello {'Zürich' if at == 'memory://' else 'Bern'} m-1")]


async def test_what_somebody_waits_for_and_what_is_not_the_service_s_own_is_refused(tmp_path: Path) -> None:
    class Foreign(Shop, name="foreign"):
        pass

    mails: list[tuple[str, str]] = []
    service = shop(f"sqlite:///{tmp_path}/shop.db")
    mail = service.uses(Mail)
    with pytest.raises(ConfigurationError, match="shop is not running"):
        service.outbox.add(apsw.Connection(":memory:"), Shop.gossip, "psst")
    with pytest.raises(ConfigurationError, match="shop has no outbox"):
        shop("").outbox.add(apsw.Connection(":memory:"), Shop.gossip, "psst")
    async with serve(await receiver(mails, ""), service, at="memory://", connect={Mail: "memory://"}):
        with connection("sqlite", tmp_path / "shop.db") as mine:
            for what, arguments in ((mail.ask, ("ann",)), (Foreign.gossip, ("psst",))):
                with pytest.raises(ConfigurationError, match="cannot wait in an outbox"):
                    service.outbox.add(mine, what, *arguments)
            for using, named in ({"timeout": 5.0}, "timeout=5"), ({"native": [Native()]}, r"native=\[\.\.\.\]"):
                at_once = mail.send.using(**using)
                with pytest.raises(ConfigurationError, match=rf"mail\.send>: the outbox keeps no using\({named}\)"):
                    service.outbox.add(mine, at_once, "ann", "hello")
                with pytest.raises(ConfigurationError, match=rf"the outbox keeps no using\({named}\)"):
                    service.outbox.using(**using).add(mine, Shop.gossip, "psst")
            with pytest.raises(ConfigurationError, match="of the call or of the outbox"):
                service.outbox.using(id="1").add(mine, mail.send.using(id="2"), "ann", "hello")
            with pytest.raises(TypeError, match=r"Shop\.gossip"):
                service.outbox.add(mine, Shop.gossip)  # type: ignore[call-overload]
    assert rows(tmp_path / "shop.db") == []


async def test_using_gives_an_event_an_id_a_key_headers_and_an_end(broker: Broker, tmp_path: Path) -> None:
    clock, heard = FakeClock(), Heard()
    service = shop(f"sqlite:///{tmp_path}/shop.db")
    async with serve(service, heard.service, at="memory://", connect={Shop: "memory://"}, clock=clock):
        with connection("sqlite", tmp_path / "shop.db") as mine:
            mine.execute("BEGIN")
            late = service.outbox.using(expires=5.0)
            late.add(mine, Shop.gossip, "stale")
            using = service.outbox.using(id="m-1", key="k-1", headers={"x-city": "Zürich"})
            assert using.add(mine, Shop.placed, "o-1", 1) == "m-1"
            assert [key for _, key, _ in mine.execute("SELECT channel, key, reason FROM quintet_outbox")] == ["", "k-1"]
            mine.execute("UPDATE quintet_outbox SET expires = expires - 5")
            mine.execute("COMMIT")
        await heard.so_many(1)
        await emptied(tmp_path / "shop.db")
    assert heard.headers == [{"x-city": "Zürich"}]
    assert broker.sent == ["m-1"]


async def test_what_expires_by_its_contract_does_so_from_when_it_was_added(tmp_path: Path) -> None:
    clock, mails = FakeClock(), list[tuple[str, str]]()
    service = shop(f"sqlite:///{tmp_path}/shop.db")
    mail = service.uses(Mail)
    async with serve(await receiver(mails, ""), service, at="memory://", connect={Mail: "memory://"}, clock=clock):
        with connection("sqlite", tmp_path / "shop.db") as mine:
            mine.execute("BEGIN")
            service.outbox.add(mine, mail.send, "ann", "hello")
            assert mine.execute("SELECT expires - added FROM quintet_outbox").fetchall() == [(60.0,)]
            mine.execute("ROLLBACK")


# where it stands


@pytest.mark.parametrize("address", ["kafka://127.0.0.1", "nothing:///x.db", "sqlite://x.db"])
async def test_an_address_that_is_no_database_is_refused_at_start_up(address: str) -> None:
    with pytest.raises(AddressError):
        async with serve(shop(address), at="memory://"):
            pass


def test_the_docs_show_the_table_that_a_role_with_more_rights_has_to_make() -> None:
    assert postgresql.SCHEMA in (HERE.parents[1] / "docs" / "outbox.md").read_text()


async def test_a_transaction_in_another_database_is_refused(tmp_path: Path) -> None:
    async def handle(order_id: str, amount: int) -> int:
        with pytest.raises(ConfigurationError, match="are two: one commit needs one"):
            service.outbox.add(current().store, Shop.gossip, "psst")
        return amount

    service = shop(f"sqlite:///{tmp_path}/shop.db", handle, idempotent=f"sqlite:///{tmp_path}/other.db")
    async with serve(service, at="memory://"), connect(Shop, "memory://") as client:
        await client.place("o-1", 1)
        for wrong in (apsw.Connection(":memory:"), apsw.Connection(str(tmp_path / "other.db"))):
            with closing(wrong), pytest.raises(ConfigurationError, match="this is a connection to"):
                service.outbox.add(wrong, Shop.gossip, "psst")
        with pytest.raises(ConfigurationError, match=r"give it current\(\)\.store or an apsw\.Connection"):
            service.outbox.add(object(), Shop.gossip, "psst")  # type: ignore[call-overload]


async def test_two_sqlite_libraries_are_never_let_onto_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process they do not see each other's locks: what both have committed is lost."""
    file = tmp_path / "shop.db"
    service = shop(f"sqlite:///{file}")
    async with serve(service, at="memory://"):
        with connection("sqlite3", file) as mine, pytest.raises(ConfigurationError, match="another SQLite library"):
            service.outbox.add(mine, Shop.gossip, "psst")
    with pytest.raises(ConfigurationError, match="open in this process through apsw"):
        async with serve(shop(f"sqlite3:///{file}", idempotent=f"sqlite:///{file}"), at="memory://"):
            pass
    service = shop(f"sqlite3:///{tmp_path}/other.db")
    async with serve(service, at="memory://"):
        with pytest.raises(ConfigurationError, match="open in this process for an outbox at sqlite3://"):
            async with serve(Service(name="late", idempotent=f"sqlite:///{tmp_path}/other.db"), at="memory://"):
                pass
        with connection("sqlite", tmp_path / "third.db") as mine:
            with pytest.raises(ConfigurationError, match=r"give it a sqlite3\.Connection"):
                service.outbox.add(mine, Shop.gossip, "psst")
    async with serve(Service(name="later", idempotent=f"sqlite:///{tmp_path}/other.db"), at="memory://"):
        pass  # it is free again
    monkeypatch.setattr("quintet.outboxes.sqlite3.OLDEST_SAFE", (99,))
    with pytest.raises(ConfigurationError, match="is in WAL mode"):
        async with serve(shop(f"sqlite3:///{file}"), at="memory://"):
            pass


# the relay


def insert(file: Path, operation: Any, *args: Any, channel: str = "", message_id: str = "") -> None:
    """As if another process had added it: nobody is woken."""
    record = operation.record(*args)
    message = bind("body", operation).request(record)
    message.id = message_id or new_id()
    values = ("shop", channel or operation.channel.name, "", message.id, 0.0, None, pack(message))
    with connection("sqlite", file) as other:
        other.execute(INSERT, values)


def prepared(file: Path, *relays: tuple[str, str, float]) -> None:
    """The tables, and an instance that relays: holder, process, until."""
    with connection("sqlite", file) as other:
        for statement in SCHEMA:
            other.execute(statement)
        other.executemany("INSERT INTO quintet_relay VALUES ('shop', ?, ?, ?)", relays)


async def test_what_another_process_added_is_found_within_a_second(tmp_path: Path) -> None:
    clock, heard, file = FakeClock(), Heard(), tmp_path / "shop.db"
    service = shop(f"sqlite:///{file}")
    async with serve(service, heard.service, at="memory://", connect={Shop: "memory://"}, clock=clock):
        insert(file, Shop.gossip, "one")
        await clock.advance(LOOK_SECONDS)
        await heard.so_many(gossip=1)


async def test_what_comes_between_a_look_and_its_end_is_sent_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, heard = tmp_path / "shop.db", Heard()
    service = shop(f"sqlite:///{file}")
    turned, channel = Keeper.turn, Shop.gossip.channel.name

    async def turn(self: Keeper, name: str, settled: Settled, limit: int) -> object:
        found = await turned(self, name, settled, limit)
        if not found and not heard.gossip:
            insert(file, Shop.gossip, "meanwhile")
            assert service.running
            assert service.running.relay
            service.running.relay.wake(channel)
        return found

    monkeypatch.setattr(Keeper, "turn", turn)
    async with serve(service, heard.service, at="memory://", connect={Shop: "memory://"}, clock=FakeClock()):
        with connection("sqlite", file) as mine:
            mine.execute("BEGIN")
            service.outbox.add(mine, Shop.gossip, "taken back")
            mine.execute("ROLLBACK")
        await heard.so_many(gossip=1)


async def test_what_was_there_when_the_service_starts_is_sent(tmp_path: Path) -> None:
    heard, file = Heard(), tmp_path / "shop.db"
    prepared(file)
    for number in range(250):
        insert(file, Shop.gossip, f"{number}")
    async with serve(
        shop(f"sqlite:///{file}"), heard.service, at="memory://", connect={Shop: "memory://"}, clock=FakeClock()
    ):
        await heard.so_many(gossip=250)
        await emptied(file)
    assert sorted(heard.gossip, key=int) == [f"{number}" for number in range(250)]


@pytest.mark.parametrize("kind", KINDS)
async def test_of_two_instances_one_relays_and_the_other_takes_over_when_it_stops(kind: str, tmp_path: Path) -> None:
    heard, file, clock = Heard(), tmp_path / "shop.db", FakeClock()  # a lease ends by the clock, not by a busy machine
    first, second = shop(f"{kind}:///{file}"), shop(f"{kind}:///{file}")

    def add(service: Service, count: int) -> None:
        with connection(kind, file) as mine:
            for number in range(count):
                mine.execute("BEGIN IMMEDIATE")
                service.outbox.add(mine, Shop.placed, f"o-{number % 5}", number)
                mine.execute("COMMIT")

    async with serve(heard.service, at="memory://", connect={Shop: "memory://"}, clock=clock):
        relaying = serve(first, at="memory://", clock=clock)
        await relaying.__aenter__()
        await leads(first)
        async with serve(second, at="memory://", clock=clock):
            assert second.running
            assert second.running.relay
            await asyncio.gather(asyncio.to_thread(add, first, 150), asyncio.to_thread(add, second, 150))
            await asyncio.to_thread(add, first, 1)  # of what the other added it hears by looking
            await heard.so_many(301)
            assert not second.running.relay._leads
            await relaying.__aexit__(None, None, None)
            while not second.running.relay._leads:
                await clock.advance(LOOK_SECONDS)
            await asyncio.to_thread(add, second, 10)
            await heard.so_many(311)
    assert len(heard.orders) == 311  # the memory transport repeats nothing: no row was sent by both
    assert len(set(heard.orders)) == 150


@pytest.mark.parametrize(
    ("process", "ahead", "waits"),
    [("", 1.0, True), ("/gone/process.wake", 1.0, False), ("", -1.0, False), ("", 1000 * LEASE, False)],
    ids=["it lives", "it is dead", "it hangs", "the clock was set back"],
)
async def test_another_instance_relays_as_long_as_it_lives(
    process: str, ahead: float, waits: bool, tmp_path: Path
) -> None:
    clock, heard, file = FakeClock(), Heard(), tmp_path / "shop.db"
    prepared(file, ("other", process, clock.wall() + ahead))
    insert(file, Shop.gossip, "psst")
    async with serve(
        shop(f"sqlite:///{file}"), heard.service, at="memory://", connect={Shop: "memory://"}, clock=clock
    ):
        if waits:
            box = open_box(f"sqlite:///{file}", "shop", clock)
            await box.open(lambda _: None)
            assert await box.look() is None
            assert await box.turn(Shop.gossip.channel.name, Settled(), 10) == []
            await box.close()
            assert heard.gossip == []
            await clock.advance(ahead + LOOK_SECONDS)
        await heard.so_many(gossip=1)


def telling() -> Service:
    """A shop that says what it is told to, all of it in memory where a harness runs it."""

    async def handle(order_id: str, amount: int) -> int:
        for number in range(amount):
            service.outbox.add(current().store, Shop.placed, f"{order_id}-{number % 7}", number)
        service.outbox.add(current().store, Shop.gossip, order_id)
        return amount

    service = shop("sqlite:///shop.db", handle, idempotent=Store("sqlite:///shop.db"))
    return service


async def test_messages_of_one_key_are_sent_in_order_however_often_a_send_fails(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chance, failed = random.Random(7), 0

    def refuses(message: Message) -> Exception | None:
        nonlocal failed
        if message.operation != "shop.placed" or chance.random() > 0.1:
            return None
        failed += 1
        return Unavailable("refused by chance")

    broker.refuses = refuses
    heard, clock, service = Heard(), FakeClock(), telling()
    async with harness(service, heard.service, clock=clock) as bench:
        await bench.connect(Shop).place("o", 350)
        while len(heard.orders) < 350:
            await clock.advance(0.1)
        assert clock.now() - 1000.0 < 3.0, "where others get through, the waits stay short"
    assert failed > 10
    for key in range(7):
        assert [n for order_id, n in heard.orders if order_id == f"o-{key}"] == list(range(key, 350, 7))
    assert service.outbox.address == "sqlite:///shop.db"
    assert list(tmp_path.iterdir()) == [], "a harness keeps it in memory"


@pytest.mark.parametrize("error", [Unavailable("away"), RemoteError("its handler failed"), ConnectionError("away")])
async def test_what_cannot_be_sent_now_waits_and_holds_up_no_other_channel(
    error: Exception, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    """For as long as it takes, with waits that grow to 2 s; the log says so once."""
    heard, clock = Heard(), FakeClock()
    tried: list[float] = []

    def refuses(message: Message) -> Exception | None:
        if message.operation != "shop.placed":
            return None
        tried.append(clock.now())
        return error

    broker.refuses = refuses
    async with harness(telling(), heard.service, clock=clock) as bench:
        client = bench.connect(Shop)
        await client.place("o-1", 1)
        await client.place("o-2", 1)
        await heard.so_many(gossip=2)
        await clock.advance(600.0)
        assert heard.orders == []
        waits = [round(later - before, 2) for before, later in pairwise(tried) if later > before]
        assert 0.05 <= waits[0] <= 0.11
        assert 1.0 <= min(waits[-100:]) < max(waits[-100:]) <= 2.01
        broker.refuse(None)
        await clock.advance(2.0)
        await heard.so_many(2)
    assert heard.orders == [("o-1-0", 0), ("o-2-0", 0)]
    told = [record for record in caplog.records if record.name == "quintet.relay"]
    assert [record.levelno for record in told if record.levelno > logging.DEBUG] == [logging.WARNING]
    assert "waits in the outbox, and is tried again: " in told[0].message


@pytest.mark.parametrize("error", [TooLarge("4 MB are too many"), InvalidMessage("no such field")])
async def test_what_is_refused_for_good_is_set_aside_with_its_reason_and_told(
    error: Exception, broker: Broker, tmp_path: Path
) -> None:
    """Those behind it in order go on; with its reason taken away it is sent once more."""
    told: list[Occurrence] = []
    heard, file, clock = Heard(), tmp_path / "shop.db", FakeClock()
    service = shop(f"sqlite:///{file}")
    broker.refuses = lambda message: error if b"1001" in message.body else None
    async with serve(
        service, heard.service, at="memory://", connect={Shop: "memory://"}, listener=told.append, clock=clock
    ):
        with connection("sqlite", file) as mine:
            mine.execute("BEGIN")
            for amount in (1000, 1001, 1002):
                service.outbox.add(mine, Shop.placed, "o-1", amount)
            mine.execute("COMMIT")
        await heard.so_many(2)
        while len(rows(file)) > 1:
            await asyncio.sleep(0)
        with connection("sqlite", file) as mine:
            service.outbox.add(mine, Shop.placed, "o-1", 1003)
        await heard.so_many(3)
        assert heard.orders == [("o-1", 1000), ("o-1", 1002), ("o-1", 1003)]
        while len(rows(file)) > 1:
            await asyncio.sleep(0)
        assert rows(file) == [("shop.v1.placed", "o-1", f"{type(error).__name__}: {error}")]
        (dead,) = [one for one in told if one.kind == "dead-letter"]
        assert (dead.subject, dead.owner, dead.reason) == ("shop.placed", "shop", f"{type(error).__name__}: {error}")
        broker.refuse(None)
        rows(file, "UPDATE quintet_outbox SET reason = NULL")
        await clock.advance(LOOK_SECONDS)
        await heard.so_many(4)
        await emptied(file)


async def test_what_cannot_be_read_or_is_said_no_more_is_set_aside(tmp_path: Path) -> None:
    file, clock, heard = tmp_path / "shop.db", FakeClock(), Heard()
    prepared(file)
    insert(file, Shop.gossip, "psst", channel="shop.v0.gossip")
    insert(file, Shop.gossip, "psst")
    rows(file, "UPDATE quintet_outbox SET message = x'00ff' WHERE channel = 'shop.v1.gossip'")
    insert(file, Shop.gossip, "hello")
    async with serve(
        shop(f"sqlite:///{file}"), heard.service, at="memory://", connect={Shop: "memory://"}, clock=clock
    ):
        await heard.so_many(gossip=1)
        while not all(reason for *_, reason in rows(file)):
            await asyncio.sleep(0)
    (old, *_, changed), (unread, *_, why) = rows(file)
    assert (old, unread) == ("shop.v0.gossip", "shop.v1.gossip")
    assert changed == "shop says nothing in shop.v0.gossip any more: its contracts changed while this waited"
    assert "cannot be read" in why


async def test_a_service_that_stops_sends_what_its_last_handlers_added_and_waits_for_what_is_under_way(
    broker: Broker, tmp_path: Path
) -> None:
    heard, file = Heard(), tmp_path / "shop.db"
    service = shop(f"sqlite:///{file}")
    begun, go_on = asyncio.Event(), asyncio.Event()
    inner = Carrier.send

    async def slow(self: Carrier, message: Message) -> Message | None:
        begun.set()
        await go_on.wait()
        return await inner(self, message)

    async with serve(heard.service, at="memory://", connect={Shop: "memory://"}):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Carrier, "send", slow)
            serving = serve(service, at="memory://", clock=FakeClock())
            await serving.__aenter__()
            with connection("sqlite", file) as mine:
                service.outbox.add(mine, Shop.placed, "o-1", 1)
                await begun.wait()
                insert(file, Shop.gossip, "as it stops")
                stopping = asyncio.ensure_future(serving.__aexit__(None, None, None))
                await asyncio.sleep(0)
                go_on.set()
                await stopping
                with pytest.raises(ConfigurationError, match="is not running"):
                    service.outbox.add(mine, Shop.placed, "o-2", 2)
        await heard.so_many(1, 1)
    assert rows(file) == []


async def test_a_service_that_stops_does_not_wait_for_a_broker_that_is_away(broker: Broker, tmp_path: Path) -> None:
    file, tries = tmp_path / "shop.db", list[str]()

    def refuses(message: Message) -> Exception:
        tries.append(message.id)
        return Unavailable("away")

    broker.refuses = refuses
    service = shop(f"sqlite:///{file}")
    clock = FakeClock()  # of which nobody moves the hands
    async with serve(service, at="memory://", clock=clock):
        with connection("sqlite", file) as mine:
            service.outbox.add(mine, Shop.placed, "o-1", 1)
        while not any(when - clock.now() < 0.2 for when in clock.timers):  # it pauses
            await asyncio.sleep(0)
    assert len(rows(file)) == len(tries) == 1
    assert not [when for when in clock.timers if when < 1001], "it left a timer behind"


async def test_a_database_that_fails_is_told_once_and_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Occurrence] = []
    heard, file, clock = Heard(), tmp_path / "shop.db", FakeClock()
    service = shop(f"sqlite:///{file}")

    async def away(*_: object) -> None:
        raise TransportError("disk I/O error")

    async with serve(
        service, heard.service, at="memory://", connect={Shop: "memory://"}, listener=told.append, clock=clock
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("quintet.outboxes.sqlite.Keeper.turn", away)
            patch.setattr("quintet.outboxes.sqlite.Keeper.look", away)
            with connection("sqlite", file) as mine:
                service.outbox.add(mine, Shop.placed, "o-1", 1)
            await clock.advance(30.0)
        await clock.advance(2.0)
        await heard.so_many(1)
    address = f"sqlite:///{file}"
    assert [(one.kind, one.reason) for one in told if one.subject == address] == [
        ("broker-lost", "disk I/O error"),
        ("broker-back", ""),
    ]


async def test_what_waits_and_what_was_set_aside_is_shown(broker: Broker, tmp_path: Path) -> None:
    broker.refuses = lambda message: TooLarge("too large") if b"1001" in message.body else Unavailable("away")
    file = tmp_path / "shop.db"
    service = shop(f"sqlite:///{file}")
    async with serve(service, at=["memory://", "http://127.0.0.1:0"]) as (_, http):

        async def shown(path: str) -> str:
            return (await asyncio.to_thread(urllib.request.urlopen, http + path)).read().decode()  # type: ignore[no-any-return]

        with connection("sqlite", file) as mine:
            mine.execute("BEGIN")
            for amount in (1000, 1001, 1002):
                service.outbox.add(mine, Shop.placed, f"o-{amount}", amount)
            mine.execute("COMMIT")
        while [reason for *_, reason in rows(file)].count(None) != 2:
            await asyncio.sleep(0)
        page = await shown("/metrics")
        labels = f'channel="{Shop.placed.channel.name}",group="quintet.outbox"'
        counts = [
            float(found) for found in re.findall(rf"^quintet_channel_messages{{{labels},.*}} (.*)$", page, re.MULTILINE)
        ]
        assert sum(counts) == 3
        assert counts[-1] == 1
        assert '"ready"' in await shown("/health/ready")
        with pytest.MonkeyPatch.context() as patch:

            async def away(*_: object) -> None:
                raise TransportError("disk I/O error")

            patch.setattr("quintet.outboxes.sqlite.Keeper.turn", away)
            while service.running and service.running.relay and service.running.relay.connected:
                await asyncio.sleep(0.001)
            with pytest.raises(urllib.error.HTTPError) as unready:
                await shown("/health/ready")
            assert f"sqlite:///{file}" in unready.value.read().decode()
            unready.value.close()


async def test_large_messages_are_not_all_read_at_once(tmp_path: Path) -> None:
    for kind in KINDS:
        file = tmp_path / f"{kind}.db"
        prepared(file)
        for size in (BATCH_BYTES, 3, BATCH_BYTES // 2, BATCH_BYTES, 3):
            insert(file, Shop.gossip, "x" * size)
        box = open_box(f"{kind}:///{file}", "shop", FakeClock())
        await box.open(lambda _: None)
        settled, reads = Settled(), []
        while read := await box.turn(Shop.gossip.channel.name, settled, 100):
            reads.append(len(read))
            settled = Settled(sent=[row.seq for row in read])
        assert reads == [1, 3, 1]
        await box.close()


async def test_a_trace_goes_on_from_where_a_message_was_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", TracerProvider())
    heard, service = Heard(), shop(f"sqlite:///{tmp_path}/shop.db")
    async with serve(service, heard.service, at="memory://", connect={Shop: "memory://"}):
        with (
            trace.get_tracer("test").start_as_current_span("work") as span,
            connection("sqlite", tmp_path / "shop.db") as mine,
        ):
            service.outbox.add(mine, Shop.placed, "o-1", 1)
        await heard.so_many(1)
    assert heard.headers[0]["traceparent"].split("-")[1] == f"{span.get_span_context().trace_id:032x}"


# whoever is killed


async def start(outbox: str, broker: str, name: str, dies: str = "") -> subprocess.Popen[str]:
    program = [sys.executable, str(HERE / "outbox_service.py"), outbox, broker, name, dies]
    process = await asyncio.to_thread(subprocess.Popen, program, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    if not dies:
        assert await asyncio.to_thread(process.stdout.readline) == "at work\n"
    return process


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_service_killed_at_any_moment_loses_nothing_and_says_nothing_that_is_not_so(
    seed: int, tmp_path: Path
) -> None:
    chance, file, broker = random.Random(seed), tmp_path / "shop.db", f"sqlite:///{tmp_path}/broker.db"
    rows(file, TABLE)
    heard = Heard(idempotent=f"sqlite:///{tmp_path}/ears.db")
    async with serve(heard.service, at=broker, connect={Shop: broker}):
        for life in range(4):
            process = await start(f"sqlite:///{file}", broker, f"{seed}-{life}")
            await heard.so_many(len(heard.orders) + chance.randrange(1, 60))
            process.kill()
            process.communicate()
        async with serve(shop(f"sqlite:///{file}"), at=broker):
            await emptied(file)
        committed = [order_id for (order_id,) in rows(file, "SELECT id FROM orders")]
        await heard.so_many(len(committed))
    assert sorted(order_id for order_id, _ in heard.orders) == sorted(committed)


async def test_what_was_sent_when_the_process_died_is_sent_again_and_dropped_by_an_idempotent_receiver(
    tmp_path: Path,
) -> None:
    broker, file = f"sqlite:///{tmp_path}/broker.db", tmp_path / "shop.db"
    rows(file, TABLE)
    once, twice = Heard(idempotent=f"sqlite:///{tmp_path}/ears.db"), Heard("others")
    async with serve(once.service, twice.service, at=broker, connect={Shop: broker}):
        process = await start(f"sqlite:///{file}", broker, "1", dies="before it deletes")
        await asyncio.to_thread(process.communicate)
        assert process.returncode == -signal.SIGKILL
        committed = [order_id for (order_id,) in rows(file, "SELECT id FROM orders")]
        await twice.so_many(1)
        async with serve(shop(f"sqlite:///{file}"), at=broker):
            await emptied(file)
        await twice.so_many(len(committed) + 1)
        await once.so_many(len(committed))
    assert sorted(order_id for order_id, _ in once.orders) == sorted(committed)
    assert len(twice.orders) > len(committed)
    assert {order_id for order_id, _ in twice.orders} == set(committed)
