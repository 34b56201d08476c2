"""The room of SQLite files: many callers share a transaction, each foreign error has one clear sentence."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from quintet import database as room
from quintet.database import Database, Transaction, close_database, file_of, one_by_one, open_database, refusal
from quintet.errors import AddressError, ChannelFull, Safety, TransportError, Unavailable
from quintet.store import open_store
from quintet.transport import open_address, parse_address


@contextlib.asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Database]:
    database = await open_database(path)
    try:
        yield database
    finally:
        await close_database(database)


@one_by_one
def create(transaction: Transaction, _: None) -> None:
    transaction.execute("CREATE TABLE IF NOT EXISTS word (word TEXT NOT NULL UNIQUE)")


@one_by_one
def add(transaction: Transaction, word: str | None) -> None:
    transaction.execute("INSERT INTO word VALUES (?)", word)


@one_by_one
def words(transaction: Transaction, _: None) -> list[str]:
    return [word for (word,) in transaction.execute("SELECT word FROM word ORDER BY rowid")]


def test_callers_of_one_turn_share_a_transaction_and_each_has_its_own_result(tmp_path: Path) -> None:
    batches: list[int] = []

    def double(transaction: Transaction, numbers: list[int]) -> list[int | Exception]:
        batches.append(len(numbers))
        return [ValueError("seven") if number == 7 else number * 2 for number in numbers]

    async def main() -> None:
        async with opened(tmp_path / "a.db") as database:
            futures = [database.submit(double, number) for number in range(10)]
            results = await asyncio.gather(*futures, return_exceptions=True)
            assert batches == [10]
            assert [result for result in results if isinstance(result, int)] == [0, 2, 4, 6, 8, 10, 12, 16, 18]
            assert isinstance(results[7], ValueError)

    asyncio.run(main())


def test_a_work_that_fails_takes_none_of_its_transaction_with_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "a.db") as database:
            await database.submit(create, None)
            outcomes = await asyncio.gather(
                *(database.submit(add, word) for word in ("one", "two", "two", None, "three")), return_exceptions=True
            )
            assert [type(outcome).__name__ for outcome in outcomes] == [
                "NoneType",
                "NoneType",
                "TransportError",
                "TransportError",
                "NoneType",
            ]
            assert str(tmp_path / "a.db") in str(outcomes[2])
            assert await database.submit(words, None) == ["one", "two", "three"]

    asyncio.run(main())


def test_one_process_has_one_database_per_file_whatever_the_path_and_the_loop(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    seen: list[Database] = []

    async def other_loop() -> None:
        async with opened(tmp_path / "a.db") as database:
            seen.append(database)
            await database.submit(add, "from another loop")

    async def main() -> None:
        async with opened(tmp_path / "a.db") as database, opened(tmp_path / "link" / ".." / tmp_path / "a.db") as same:
            assert same is database
            await database.submit(create, None)
            thread = threading.Thread(target=asyncio.run, args=[other_loop()])
            thread.start()
            await asyncio.to_thread(thread.join)
            assert seen == [database]
            assert await database.submit(words, None) == ["from another loop"]

    asyncio.run(main())


def test_a_closed_database_refuses_and_leaves_neither_threads_nor_files(tmp_path: Path) -> None:
    before = threading.active_count()

    async def main() -> Database:
        async with opened(tmp_path / "a.db") as database:
            await database.submit(create, None)
            last = database.submit(add, "handed over before the end")
        assert last.done()
        with pytest.raises(TransportError, match="is closed"):
            await database.submit(words, None)
        return database

    database = asyncio.run(main())
    workers = [thread for thread in threading.enumerate() if "a.db" in thread.name]
    assert (workers, threading.active_count() - before <= 1) == ([], True), "the loop's own executor may be left"
    assert [path.name for path in tmp_path.iterdir()] == ["a.db"]
    assert "closed" in repr(database)


def test_an_opening_that_is_cancelled_leaves_nothing_open(tmp_path: Path) -> None:
    async def main() -> None:
        opening = asyncio.create_task(open_database(tmp_path / "a.db"))
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening

    asyncio.run(main())
    assert [path for path in room._open if path.parent == tmp_path] == []
    assert not list(tmp_path.glob("*.wake"))


def test_a_note_calls_listeners_after_the_commit_and_no_others(tmp_path: Path) -> None:
    async def main() -> None:
        heard: asyncio.Queue[str] = asyncio.Queue()
        async with opened(tmp_path / "a.db") as database:
            await database.listen("words", heard.put_nowait)
            await database.listen("else", lambda payload: heard.put_nowait(f"else {payload}"))
            await database.submit(tell, "1")
            assert await asyncio.wait_for(heard.get(), 5) == "1"
            await database.unlisten("words", heard.put_nowait)
            await database.submit(tell, "2")
        assert heard.empty()

    asyncio.run(main())


def test_who_listens_anew_in_the_turn_in_which_another_ends_is_called_by_other_processes_too(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "a.db") as database:
            old, new = asyncio.Queue[str](), asyncio.Queue[str]()
            await database.listen("words", old.put_nowait)
            await asyncio.gather(
                database.listen("else", old.put_nowait),
                database.unlisten("words", old.put_nowait),
                database.listen("words", new.put_nowait),
            )
            await database.submit(tell, "1")
            assert await asyncio.wait_for(new.get(), 5) == "1"
            assert old.empty()

    asyncio.run(main())


def test_durable_work_is_synced_to_disk_and_other_work_is_not(tmp_path: Path) -> None:
    @one_by_one
    def synchronous(transaction: Transaction, _: None) -> int:
        return int(transaction.execute("PRAGMA synchronous")[0][0])

    async def main() -> None:
        async with opened(tmp_path / "a.db") as database:
            assert await database.submit(synchronous, None) == 1  # NORMAL
            assert await database.submit(synchronous, None, durable=True) == 2  # FULL
            shared = database.submit(synchronous, None), database.submit(create, None, durable=True)
            await asyncio.gather(*shared)
            assert shared[0].result() == 2

    asyncio.run(main())


LISTENER = """
import asyncio, sys
from pathlib import Path
from quintet.database import close_database, open_database

async def main(path):
    database = await open_database(Path(path))
    heard = asyncio.Queue()
    await database.listen("words", heard.put_nowait)
    print("ready", flush=True)
    while True:
        print(await heard.get(), flush=True)

asyncio.run(main(sys.argv[1]))
"""


@contextlib.contextmanager
def listener(path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", LISTENER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@one_by_one
def tell(transaction: Transaction, payload: str) -> None:
    transaction.notify("words", payload)


@one_by_one
def processes(transaction: Transaction, _: None) -> int:
    return int(transaction.execute("SELECT count(*) FROM quintet_process")[0][0])


def test_another_process_is_woken_and_one_that_was_killed_is_removed_at_the_next_wake_up(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "a.db") as database:
            with listener(tmp_path / "a.db") as other:
                assert other.stdout
                await database.submit(tell, "hello")
                assert await asyncio.to_thread(other.stdout.readline) == "hello\n"
                assert await database.submit(processes, None) == 2
                other.send_signal(signal.SIGKILL)
                await asyncio.to_thread(other.wait)
            noticed = asyncio.Event()
            await database.listen("anything", lambda _: noticed.set())  # all are told when one has died
            await database.submit(tell, "nobody there")
            await asyncio.wait_for(noticed.wait(), 5)
            assert await database.submit(processes, None) == 1
            assert len(list(tmp_path.glob("*.wake"))) == 1, "the socket of the dead process is left"

    asyncio.run(main())


def test_a_path_too_long_for_a_socket_is_woken_all_the_same(tmp_path: Path) -> None:
    folder = tmp_path / ("deep" * 30)
    folder.mkdir()

    async def main() -> None:
        async with opened(folder / "a.db") as database:
            with listener(folder / "a.db") as other:
                assert other.stdout
                await database.submit(tell, "hello")
                assert await asyncio.to_thread(other.stdout.readline) == "hello\n"
                other.send_signal(signal.SIGKILL)
                await asyncio.to_thread(other.wait)
            await database.bury()
            assert await database.submit(processes, None) == 1

    asyncio.run(main())


def test_after_a_fork_the_child_can_neither_use_nor_open_the_file_and_the_parent_goes_on(tmp_path: Path) -> None:
    async def in_child(database: Database) -> None:
        for attempt in (lambda: database.submit(words, None), lambda: open_database(tmp_path / "a.db")):
            with pytest.raises(TransportError):
                await attempt()
        async with opened(tmp_path / "b.db") as other:
            await other.submit(create, None)

    async def main() -> None:
        async with opened(tmp_path / "a.db") as database:
            await database.submit(create, None)
            child = os.fork()
            if child == 0:
                code = 1
                with contextlib.suppress(BaseException):
                    thread = threading.Thread(target=lambda: results.append(asyncio.run(in_child(database))))
                    results: list[None] = []
                    thread.start()
                    thread.join(10)
                    code = 0 if results == [None] else 2
                os._exit(code)
            _, status = await asyncio.to_thread(os.waitpid, child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            await database.submit(add, "the parent goes on")
            assert await database.submit(words, None) == ["the parent goes on"]

    asyncio.run(main())


# What is wrong with a file


async def failure(path: Path) -> TransportError:
    with pytest.raises(TransportError) as caught:
        await open_database(path)
    assert str(path) in str(caught.value)
    assert not list(path.parent.glob("*.wake"))
    return caught.value


def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    path.write_text("Dear diary, today I was taken for a database. " * 100)
    assert "is not a SQLite database: name another file" in str(asyncio.run(failure(path)))
    assert path.read_text().startswith("Dear diary")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.db"

    async def fill() -> None:
        async with opened(path) as database:
            await database.submit(create, None)
            await asyncio.gather(*(database.submit(add, f"{number:0200}") for number in range(2_000)))

    asyncio.run(fill())
    content = bytearray(path.read_bytes())
    content[100:8192] = bytes(8092)  # the schema
    path.write_bytes(content)
    assert "is damaged" in str(asyncio.run(failure(path)))


def test_damage_found_later_fails_the_call_and_not_the_process(tmp_path: Path) -> None:
    path = tmp_path / "a.db"

    async def main() -> None:
        async with opened(path) as database:
            await database.submit(create, None)
            await asyncio.gather(*(database.submit(add, f"{number:0200}") for number in range(2_000)))
        content = bytearray(path.read_bytes())
        content[100_000:] = b"\xaa" * (len(content) - 100_000)
        path.write_bytes(content)
        async with opened(path) as database:
            with pytest.raises(TransportError, match="is damaged") as caught:
                await database.submit(words, None)
            assert isinstance(refusal(caught.value), Unavailable)
            assert await database.submit(processes, None) == 1, "what is not damaged goes on"

    asyncio.run(main())


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Root may write everything: read-only is tried as another user."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "a.db"

    async def create_it() -> None:
        async with opened(path):
            pass

    asyncio.run(create_it())
    path.chmod(0o444)
    parents = [folder for folder in tmp_path.parents if folder.stat().st_uid == os.getuid() and folder != Path("/")]
    modes = {folder: folder.stat().st_mode for folder in parents}
    try:
        for folder, mode in modes.items():
            folder.chmod(mode | 0o111)
        tmp_path.chmod(0o777)
        with as_nobody():
            error = asyncio.run(failure(path))
            tmp_path_writable = str(error)
    finally:
        for folder, mode in modes.items():
            folder.chmod(mode)
    assert "is read-only for this process: make the file and its folder writable" in tmp_path_writable


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert "its folder must exist" in str(asyncio.run(failure(tmp_path / "no" / "such" / "a.db")))


def test_the_last_folder_is_made(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / ".quintet" / "a.db"):
            assert (tmp_path / ".quintet" / "a.db").exists()

    asyncio.run(main())


def test_a_full_disk_fails_what_does_not_fit_and_stores_the_rest(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "a.db") as database:
            await database.submit(create, None)

            @one_by_one
            def limit(transaction: Transaction, pages: int) -> None:
                transaction.execute(f"PRAGMA max_page_count = {pages}")

            await database.submit(limit, 1)  # SQLite makes that as many as there are
            big = database.submit(add, "x" * 100_000, durable=True)
            small = database.submit(add, "small", durable=True)
            with pytest.raises(TransportError, match=r"no room for .*a\.db: its disk or quota is full") as caught:
                await big
            await small
            assert isinstance(refusal(caught.value), ChannelFull)
            assert refusal(caught.value).safety is Safety.NOT_SENT
            await database.submit(limit, 1_000_000)
            await database.submit(add, "y" * 100_000)
            assert [word[:5] for word in await database.submit(words, None)] == ["small", "yyyyy"]

    asyncio.run(main())


def test_a_file_that_another_locks_for_too_long_fails_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "BUSY_SECONDS", 0.05)

    async def main() -> None:
        async with opened(tmp_path / "a.db") as database:
            await database.submit(create, None)
            other = apsw.Connection(str(tmp_path / "a.db"))
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(TransportError, match="was locked by another process") as caught:
                await database.submit(add, "one")
            assert refusal(caught.value).safety is Safety.NOT_SENT
            other.execute("ROLLBACK")
            other.close()
            await database.submit(add, "two")
            assert await database.submit(words, None) == ["two"]

    asyncio.run(main())


def test_a_file_that_others_just_create_is_opened_as_soon_as_they_have_done_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = 3

    class Busy(apsw.Connection):
        def execute(self, *arguments: Any, **options: Any) -> apsw.Cursor:
            nonlocal refusals
            if "journal_mode" in arguments[0] and refusals:
                refusals -= 1
                raise apsw.BusyError("database is locked")
            return super().execute(*arguments, **options)

    monkeypatch.setattr(apsw, "Connection", Busy)

    async def main() -> None:
        async with opened(tmp_path / "a.db") as database:
            assert await database.submit(processes, None) == 1
        assert refusals == 0

    asyncio.run(main())


def test_an_old_sqlite_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apsw, "sqlite_lib_version", lambda: "3.51.2")
    with pytest.raises(TransportError, match=r"SQLite 3\.51\.2 can damage a file.*install apsw 3\.51\.3 or later"):
        asyncio.run(open_database(tmp_path / "a.db"))
    assert list(tmp_path.iterdir()) == []


def test_addresses_name_files() -> None:
    assert file_of(parse_address("sqlite:///rides.db")) == Path("rides.db")
    assert file_of(parse_address("sqlite:////var/lib/my%20rides.db")) == Path("/var/lib/my rides.db")
    for text in ("sqlite://rides.db", "sqlite://", "sqlite:///"):
        with pytest.raises(AddressError, match=r"write sqlite:///rides\.db"):
            file_of(parse_address(text))


# Who may read it, and what a row may make us do


def permissions(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize(("option", "file", "folder"), [("", 0o600, 0o700), ("?mode=0660", 0o660, 0o770)])
@pytest.mark.parametrize("old_umask", [0o000, 0o077])
async def test_what_is_made_is_for_its_owner_alone_unless_the_address_says_otherwise(
    tmp_path: Path, option: str, file: int, folder: int, old_umask: int
) -> None:
    before = os.umask(old_umask)
    try:
        path = tmp_path / "new" / "a.db"
        carrier = open_address(f"sqlite:///{path}{option}")
        await carrier.open()
        try:
            assert permissions(path.parent) == folder
            assert {permissions(one) for one in path.parent.iterdir() if one.suffix != ".wake"} == {file}
            assert len(list(path.parent.iterdir())) == 4, "the database, its log and shared memory, and the socket"
        finally:
            await carrier.close()
        store = open_store(f"sqlite:///{tmp_path}/answers.db{option}")
        await store.open()
        await store.close()
        assert permissions(tmp_path / "answers.db") == file
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", ["0", "400", "888", "0607", "rw", ""])
def test_a_mode_that_makes_no_sense_is_refused(mode: str) -> None:
    with pytest.raises(AddressError, match=f"mode={mode} must be octal"):
        open_address(f"sqlite:///a.db?mode={mode}")


async def test_a_file_that_is_there_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    path.touch(mode=0o640)
    async with opened(path):
        assert permissions(path) == 0o640


async def test_a_row_of_a_stranger_removes_no_file_and_sends_nobody_anything(tmp_path: Path) -> None:
    path, victim = tmp_path / "a.db", tmp_path / "victim"
    victim.write_text("precious")
    lookalike = tmp_path / "a.db-0123456789ab.wake.txt"
    lookalike.write_text("precious too")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.bind(str(tmp_path / "notify"))
    listening.setblocking(False)
    with contextlib.closing(listening), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as gone:
        gone.bind(str(tmp_path / "gone"))
        gone.close()
        async with opened(path) as database:

            def forge(transaction: Transaction, _: list[None]) -> list[None]:
                for address in (victim, lookalike, tmp_path / "notify", tmp_path / "gone", "/dev/log", b"\0"):
                    said = address if isinstance(address, bytes) else str(address)
                    transaction.execute("INSERT INTO quintet_process VALUES (?, 1)", said)
                transaction.notify_everyone()
                return [None]

            await database.submit(forge, None)
            await database.bury()
            left = await database.submit(
                lambda transaction, _: [transaction.execute("SELECT * FROM quintet_process")], None
            )
            assert len(left) == 1
        assert victim.read_text() == "precious"
        assert lookalike.read_text() == "precious too"
        assert (tmp_path / "gone").is_socket()
        with pytest.raises(BlockingIOError):
            listening.recv(100)
