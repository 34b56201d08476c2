"""transports/http.py over real sockets: what a client and a server do to each other, well-behaved or not."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import struct
import subprocess
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from datetime import timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from random import Random
from typing import Any

import pytest
import uvloop

from quintet.clock import SYSTEM, Clock
from quintet.errors import AddressError, ConnectionLost, Safety, TooLarge, TransportError, Unavailable
from quintet.message import Channel, Message
from quintet.testing import FakeClock
from quintet.transport import Again, Dead, Done, Receive, Serving, Verdict, open_address
from quintet.transports.http import Carrier

Run = Callable[[Coroutine[Any, Any, None]], None]
ECHO = Channel("echo", route="POST /v1/echo/{name}")
GET = Channel("get", route="GET /v1/things")


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Runs a test in either loop, for at most 20 seconds."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if request.param == "uvloop" else None) as runner:
        yield lambda main: runner.run(asyncio.wait_for(main, 20))


def carrier(address: str, clock: Clock = SYSTEM) -> Carrier:
    made = open_address(address, clock)
    assert isinstance(made, Carrier)
    return made


async def until(condition: Callable[[], object]) -> None:
    """Gives the loop its turns until it holds; `run` bounds it."""
    while not condition():
        await asyncio.sleep(0)


class Echo:
    """Answers with what came; while `hold` is set it waits for `let_go`."""

    def __init__(self, *, hold: bool = False) -> None:
        self.seen: list[Message] = []
        self.begun = asyncio.Semaphore(0)
        self.let_go = asyncio.Event()
        if not hold:
            self.let_go.set()

    async def __call__(self, message: Message) -> Verdict:
        self.seen.append(message)
        self.begun.release()
        await self.let_go.wait()
        return Done(Message(channel=message.channel, body=message.body, media_type=message.media_type))


@asynccontextmanager
async def server(
    receive: Receive, *channels: Channel, options: str = "", clock: Clock = SYSTEM, limit: int = 100
) -> AsyncGenerator[Carrier]:
    served = carrier(f"http://127.0.0.1:0{options}", clock)
    await served.open()
    for channel in channels or (ECHO, GET):
        await served.serve(channel, receive, "group", limit)
    await served.ready()
    try:
        yield served
    finally:
        await served.close()


@asynccontextmanager
async def client(address: object) -> AsyncGenerator[Carrier]:
    made = carrier(str(address))
    await made.open()
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def scripted(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncGenerator[str]:
    """A server that does what the test says with each connection; its address."""
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def echo(body: bytes = b"", name: str = "a", **fields: Any) -> Message:
    headers = {":method": "POST", ":path": f"/v1/echo/{name}"} | fields.pop("headers", {})
    return Message(channel=ECHO, body=body, headers=headers, **fields)


async def raw(to: Carrier, data: bytes, *, end: bool = False) -> bytes:
    """All that the server sends on a fresh connection until it closes it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", to.address.port)
    writer.write(data)
    if end:
        writer.write_eof()
    try:
        return await reader.read()
    finally:
        writer.close()


def request(line: str = "POST /v1/echo/a", body: bytes = b"", *headers: str) -> bytes:
    lines = [f"{line} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


CLOSE = "Connection: close"


# A message and its reply


def test_a_message_arrives_and_its_reply_comes_back(run: Run) -> None:
    async def main() -> None:
        receive = Echo()
        async with server(receive) as served, client(served.address) as here:
            sent = echo(b"hi", "a%2Fb", sender="me", key="k", deadline=SYSTEM.now() + 5, media_type="text/plain")
            reply = await here.send(sent)
            assert reply is not None
            assert (reply.body, reply.media_type, reply.headers[":status"]) == (b"hi", "text/plain", "200")
            (seen,) = receive.seen
            assert seen.channel == ECHO
            assert (seen.sender, seen.key, seen.headers[":param-name"]) == ("me", "k", "a/b")
            assert (seen.headers[":method"], seen.headers[":path"]) == ("POST", "/v1/echo/a%2Fb")
            assert seen.deadline is not None
            assert 0 < seen.deadline - SYSTEM.now() <= 5

    run(main())


def test_an_address_with_a_path_serves_and_calls_below_it(run: Run) -> None:
    async def main() -> None:
        receive = Echo()
        served = carrier("http://127.0.0.1:0/a%20b/")
        await served.open()
        await served.serve(ECHO, receive, "group")
        await served.ready()
        async with client(served.address) as here:
            reply = await here.send(echo(b"1"))
            assert reply is not None
            assert reply.body == b"1"
            assert receive.seen[0].headers[":path"] == "/a%20b/v1/echo/a"
        await served.close()

    run(main())


def test_a_megabyte_goes_there_and_back(run: Run) -> None:
    async def main() -> None:
        async with server(Echo()) as served, client(served.address) as here:
            body = bytes(range(256)) * 4096
            replies = await asyncio.gather(*(here.send(echo(body)) for _ in range(3)))
            assert [reply.body == body for reply in replies if reply] == [True] * 3

    run(main())


def test_calls_one_after_the_other_share_a_connection_and_calls_at_once_do_not(run: Run) -> None:
    async def main() -> None:
        receive = Echo()
        async with server(receive) as served, client(served.address) as here:
            for _ in range(3):
                await here.send(echo())
            assert len(served._server.connections) == 1
            receive.let_go.clear()
            calls = [asyncio.create_task(here.send(echo(b"%d" % n))) for n in range(5)]
            for _ in range(8):
                await receive.begun.acquire()
            assert len(served._server.connections) == 5
            receive.let_go.set()
            assert [reply.body for reply in await asyncio.gather(*calls) if reply] == [b"%d" % n for n in range(5)]

    run(main())


def test_no_more_connections_are_opened_than_allowed_and_a_cancelled_call_gives_its_turn_away(run: Run) -> None:
    async def main() -> None:
        receive = Echo(hold=True)
        async with server(receive) as served, client(f"{served.address}?connections=2") as here:
            calls = [asyncio.create_task(here.send(echo(b"%d" % n))) for n in range(6)]
            for _ in range(2):
                await receive.begun.acquire()
            assert len(served._server.connections) == 2
            calls[2].cancel()
            calls[0].cancel()
            receive.let_go.set()
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes].count(asyncio.CancelledError) == 2
            assert {outcome.body for outcome in outcomes if isinstance(outcome, Message)} == {b"1", b"3", b"4", b"5"}
            assert here._pool._open <= 2

    run(main())


def test_a_call_that_is_cancelled_as_its_turn_comes_passes_it_on(run: Run) -> None:
    async def main() -> None:
        receive = Echo(hold=True)
        async with server(receive) as served, client(f"{served.address}?connections=1") as here:

            async def first() -> None:
                await here.send(echo())
                second.cancel()  # it has been given the connection by now, and not yet noticed

            before = asyncio.create_task(first())
            await receive.begun.acquire()
            second = asyncio.create_task(here.send(echo()))
            third = asyncio.create_task(here.send(echo(b"3")))
            await until(lambda: len(here._pool._waiting) == 2)
            receive.let_go.set()
            reply = await third
            assert reply is not None
            assert reply.body == b"3"
            await before
            assert second.cancelled()

    run(main())


def test_at_most_limit_requests_are_in_work_and_the_others_wait(run: Run) -> None:
    async def main() -> None:
        receive = Echo(hold=True)
        async with server(receive, limit=2) as served, client(served.address) as here:
            calls = [asyncio.create_task(here.send(echo())) for _ in range(5)]
            for _ in range(2):
                await receive.begun.acquire()
            await until(lambda: len(served._server.connections) >= 5)
            assert await raw(served, b"GET /health/live HTTP/1.1\r\nConnection: close\r\n\r\n")
            assert len(receive.seen) == 2
            receive.let_go.set()
            assert len(await asyncio.gather(*calls)) == len(receive.seen) == 5

    run(main())


def test_work_whose_caller_left_while_it_waited_is_not_begun(run: Run) -> None:
    async def main() -> None:
        receive = Echo(hold=True)
        async with server(receive, limit=1) as served, client(served.address) as here:
            first = asyncio.create_task(here.send(echo()))
            await receive.begun.acquire()
            with socket.create_connection(("127.0.0.1", served.address.port or 0)) as second:
                second.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes by a reset
                second.sendall(request(body=b"2"))
                await until(lambda: sum(len(route.requests) for route in served._server.routes) == 2)
            await until(lambda: len(served._server.connections) == 1)
            receive.let_go.set()
            assert await first
            assert await here.send(echo(b"3"))
            assert [message.body for message in receive.seen] == [b"", b"3"]

    run(main())


def test_more_requests_than_may_wait_are_refused_before_they_are_begun(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quintet.transports.http.WAITING", 2)

    async def main() -> None:
        receive = Echo(hold=True)
        async with server(receive, limit=1) as served, client(served.address) as here:
            calls = [asyncio.create_task(here.send(echo())) for _ in range(3)]
            await until(lambda: sum(len(route.requests) for route in served._server.routes) == 3)
            refused = await here.send(echo())
            assert refused is not None
            assert (refused.status, refused.headers[":status"]) == ("overloaded", "503")
            receive.let_go.set()
            assert len(await asyncio.gather(*calls)) == len(receive.seen) == 3
            assert await here.send(echo())

    run(main())


def test_context_variables_of_one_request_reach_no_other(run: Run) -> None:
    left: ContextVar[str] = ContextVar("left", default="nothing")
    seen: list[str] = []

    async def receive(message: Message) -> Verdict:
        seen.append(left.get())
        left.set("something")
        return Done()

    async def main() -> None:
        async with server(receive) as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.address.port)
            for _ in range(2):  # large enough for reading to be paused, and resumed by the one who answers
                writer.write(request(body=b"a" * 1_000_000))
                await reader.readuntil(b"\r\n\r\n")
            writer.write(request() * 3 + request("POST /v1/echo/a", b"", CLOSE))
            await reader.read()
            writer.close()
            assert seen == ["nothing"] * 6

    run(main())


def test_the_answer_to_a_cancelled_call_is_never_read_as_that_to_the_next(run: Run) -> None:
    async def main() -> None:
        receive = Echo(hold=True)
        async with server(receive) as served, client(served.address) as here:
            first = asyncio.create_task(here.send(echo(b"first")))
            await receive.begun.acquire()
            first.cancel()
            receive.let_go.set()
            reply = await here.send(echo(b"second"))
            assert reply is not None
            assert reply.body == b"second"
            with pytest.raises(asyncio.CancelledError):
                await first

    run(main())


def test_every_answer_is_dated(run: Run) -> None:
    async def main() -> None:
        clock = FakeClock()
        async with server(Echo(), clock=clock) as served, client(served.address) as here:
            dates = []
            for _ in range(2):
                reply = await here.send(echo())
                assert reply is not None
                dates.append(parsedate_to_datetime(reply.headers["date"]))
                await clock.advance(3)
            assert dates[1] - dates[0] == timedelta(seconds=3)

    run(main())


# What becomes of a delivery


@pytest.mark.parametrize(
    ("verdict", "status"),
    [
        (Done(), "204"),
        (Done(Message(channel=ECHO)), "204"),
        (Done(Message(channel=ECHO, headers={":status": "201", "location": "/x"})), "201"),
        (Done(Message(channel=ECHO, status="invalid", body=b"{}")), "422"),
        (Again(1.0, "secret"), "500"),
        (Dead("secret"), "500"),
    ],
)
def test_a_verdict_becomes_a_status(run: Run, verdict: Verdict, status: str) -> None:
    async def receive(message: Message) -> Verdict:
        return verdict

    async def main() -> None:
        async with server(receive) as served, client(served.address) as here:
            reply = await here.send(echo(id="m-1"))
            assert reply is not None
            assert reply.headers[":status"] == status
            assert b"secret" not in reply.body
            if status == "500":
                assert reply.status == "remote"
                assert json.loads(reply.body)["correlation_id"] == "m-1"

    run(main())


def test_a_reply_that_cannot_be_written_is_a_failure_and_the_loop_is_told(run: Run) -> None:
    async def receive(message: Message) -> Verdict:
        return Done(Message(channel=ECHO, body=b"1", headers={"x": "a\r\nb: c"}))

    async def main() -> None:
        told: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        async with server(receive) as served, client(served.address) as here:
            for _ in range(2):
                reply = await here.send(echo())
                assert reply is not None
                assert (reply.status, reply.headers[":status"]) == ("remote", "500")
        assert len(told) == 2
        assert "line break" in str(told[0]["exception"])

    run(main())


# Requests by hand


def test_requests_that_have_no_route_are_answered(run: Run) -> None:
    async def main() -> None:
        receive = Echo()
        operations = [Channel(name, route=f"POST /v1#{name}") for name in ("get", "create")]
        async with server(receive, ECHO, GET, *operations) as served:
            for sent, status, holds in [
                (request("GET /nope", b"", CLOSE), 404, b"nothing is served at '/nope'"),
                (request("PUT /v1/things", b"", CLOSE), 405, b"allow: GET, HEAD, OPTIONS\r\n"),
                (request("OPTIONS /v1/things", b"", CLOSE), 204, b"allow: GET, HEAD, OPTIONS\r\n"),
                (request("POST /v1", b"", CLOSE), 404, b"create, get"),
                (request("POST /v1", b"", CLOSE, "Quintet-Operation: no"), 404, b"create, get"),
                (request("POST /v1", b"1", CLOSE, "Quintet-Operation: get"), 200, b"1"),
                (request("GET /v1/things", b"", CLOSE), 204, b""),
                (request("GET http://x:1/v1/things?a=1", b"", CLOSE), 204, b""),
                (request("GET /health/live", b"", CLOSE), 200, b'{"status":"live"}'),
                (request("GET /health/ready", b"", CLOSE), 200, b'{"status":"ready"}'),
                (request("HEAD /health/ready", b"", CLOSE), 200, b"content-length: 18\r\n"),
                (request("POST /v1/echo/a", b"", CLOSE, "Quintet-Timeout: soon"), 400, b"Quintet-Timeout"),
                (request("GET /v1/echo/%ff", b"", CLOSE), 400, b"UTF-8"),
                (request("GET /" + "a" * 9000, b"", CLOSE), 414, b"8192"),
            ]:
                answer = await raw(served, sent)
                assert answer.startswith(b"HTTP/1.1 %d " % status), (sent, answer)
                assert holds in answer
                assert (b"application/problem+json" in answer) == (status >= 400)
            assert receive.seen[0].channel == operations[0]
            assert receive.seen[2].headers[":path"] == "/v1/things?a=1"

    run(main())


def test_head_gets_the_headers_of_get_and_no_body(run: Run) -> None:
    async def receive(message: Message) -> Verdict:
        return Done(Message(channel=GET, body=b"abc", media_type="text/plain"))

    async def main() -> None:
        async with server(receive) as served, client(served.address) as here:
            answer = await raw(served, request("HEAD /v1/things", b"", CLOSE))
            assert b"content-length: 3\r\n" in answer
            assert answer.endswith(b"\r\n\r\n")
            for _ in range(2):
                message = Message(channel=GET, headers={":method": "HEAD", ":path": "/v1/things"})
                reply = await here.send(message)
                assert reply is not None
                assert (reply.body, reply.headers["content-length"]) == (b"", "3")

    run(main())


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"POST /v1/echo/a HTTP/9.9\r\n\r\n",
        b"POST /v1/echo/a HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/echo/a HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST /v1/echo/a HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/echo/a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/echo/a HTTP/1.1\r\n:path: /x\r\n\r\n",
        b"POST /v1/echo/a HTTP/1.1\r\na b: 1\r\n\r\n",
        b"GET /v1/\xc3\xa9 HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"GET * HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"POST /v1/echo/a HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\nab",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x00" * 100,
    ],
)
def test_what_is_no_request_is_answered_with_a_problem_and_reaches_nobody(run: Run, data: bytes) -> None:
    async def main() -> None:
        receive = Echo()
        async with server(receive) as served, client(served.address) as here:
            answer = await raw(served, data)
            assert answer.split(b" ")[1] in {b"400", b"404"}, answer
            assert b"connection: close\r\n" in answer
            assert b"application/problem+json" in answer
            assert not receive.seen
            assert await here.send(echo())

    run(main())


@pytest.mark.parametrize("cut", [b"POST /v1/ec", b"POST /v1/echo/a HTTP/1.1\r\nHost: x\r\n", request(body=b"abc")[:-1]])
def test_a_request_that_is_cut_off_reaches_nobody(run: Run, cut: bytes) -> None:
    async def main() -> None:
        receive = Echo()
        async with server(receive) as served:
            await raw(served, cut, end=True)
            await until(lambda: not served._server.connections)
            assert not receive.seen

    run(main())


def test_a_request_arrives_whole_byte_by_byte_and_in_chunks(run: Run) -> None:
    async def main() -> None:
        receive = Echo()
        async with server(receive) as served:
            chunked = (
                b"POST /v1/echo/a HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
                b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
            )
            for data in (request("POST /v1/echo/a", b"abc", CLOSE), chunked):
                reader, writer = await asyncio.open_connection("127.0.0.1", served.address.port)
                for byte in data:
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0)
                assert (await reader.read()).endswith(b"\r\n\r\nabc")
                writer.close()
            assert [message.body for message in receive.seen] == [b"abc", b"abc"]

    run(main())


def test_pipelined_requests_are_answered_in_order_one_at_a_time(run: Run) -> None:
    async def main() -> None:
        receive = Echo(hold=True)
        async with server(receive) as served:
            many = b"".join(request("GET /nope" if n % 3 == 0 else "POST /v1/echo/a", b"<%d>" % n) for n in range(900))
            answering = asyncio.create_task(raw(served, many + request("POST /v1/echo/a", b"end", CLOSE)))
            await receive.begun.acquire()
            assert len(receive.seen) == 1
            receive.let_go.set()
            answer = await answering
            assert answer.count(b"HTTP/1.1 ") == 901
            assert answer.index(b"<1>") < answer.index(b"<2>") < answer.index(b"<898>") < answer.index(b"end")

    run(main())


def test_a_connection_goes_on_after_pipelined_requests(run: Run) -> None:
    async def main() -> None:
        async with server(Echo()) as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.address.port, limit=2**24)
            writer.write(request(body=b"first") + request("GET /nope") * 3000 + request(body=b"end"))
            await reader.readuntil(b"end")
            writer.write(request("POST /v1/echo/a", b"more", CLOSE))
            assert (await reader.read()).endswith(b"more")
            writer.close()

    run(main())


def test_a_good_request_is_answered_although_rubbish_follows_it(run: Run) -> None:
    async def main() -> None:
        receive = Echo(hold=True)
        async with server(receive) as served:
            answering = asyncio.create_task(raw(served, request(body=b"good") + b"rubbish\r\n\r\n"))
            await receive.begun.acquire()
            receive.let_go.set()
            answer = await answering
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert answer.endswith(b"good")

    run(main())


def test_a_client_that_closes_its_half_still_gets_its_answer(run: Run) -> None:
    async def main() -> None:
        receive = Echo(hold=True)
        async with server(receive) as served:
            answering = asyncio.create_task(raw(served, request(body=b"abc"), end=True))
            await receive.begun.acquire()
            for _ in range(10):
                await asyncio.sleep(0)
            receive.let_go.set()
            assert (await answering).endswith(b"abc")

    run(main())


def test_arbitrary_bytes_break_nothing(run: Run) -> None:
    async def main() -> None:
        told: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        chance = Random(1)
        good = request(body=b"abc") + (
            b"POST /v1/echo/a HTTP/1.1\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n1\r\na\r\n0\r\n\r\n"
        )
        async with server(Echo()) as served, client(served.address) as here:
            for _ in range(200):
                data = bytearray(good)
                for _ in range(chance.randrange(1, 6)):
                    at = chance.randrange(len(data))
                    data[at : at + chance.randrange(4)] = chance.randbytes(chance.randrange(4))
                await raw(served, bytes(data), end=True)
            assert await here.send(echo())
            await until(lambda: len(served._server.connections) == 1)
        assert told == []

    run(main())


# Limits of size


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request(body=b"a" * 1001), 413),
        (request(body=b"a" * 100_000), 413),
        (request("POST /v1/echo/a", b"a" * 1001, "Expect: 100-continue").partition(b"\r\n\r\n")[0] + b"\r\n\r\n", 413),
        (b"POST /v1/echo/a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2328\r\n" + b"a" * 9000, 413),
        (request("GET /v1/things", b"", "X: " + "a" * 40_000), 431),
        (request("GET /v1/things", b"", *(f"X-{n}: 1" for n in range(5000))), 431),
        (request("GET /" + "a" * 300_000), 414),
    ],
)
def test_what_is_too_large_is_refused_and_the_refusal_can_be_read(run: Run, data: bytes, status: int) -> None:
    async def main() -> None:
        receive = Echo()
        async with server(receive, options="?max_body=1000") as served:
            answer = await raw(served, data, end=True)
            assert answer.startswith(b"HTTP/1.1 %d " % status), answer
            assert b"too-large" in answer
            assert not receive.seen

    run(main())


def test_a_connection_goes_on_after_a_body_that_was_a_little_too_large(run: Run) -> None:
    async def main() -> None:
        async with server(Echo(), options="?max_body=1000") as served, client(served.address) as here:
            reply = await here.send(echo(b"a" * 1001))
            assert reply is not None
            assert reply.status == "too-large"
            reply = await here.send(echo(b"a" * 1000))
            assert reply is not None
            assert reply.body == b"a" * 1000
            assert len(served._server.connections) == 1

    run(main())


def test_who_goes_on_sending_what_was_refused_as_too_large_is_hung_up_on(run: Run) -> None:
    async def main() -> None:
        clock = FakeClock()
        async with server(Echo(), options="?max_body=1000&request_timeout=10", clock=clock) as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.address.port)
            writer.write(b"POST /v1/echo/a HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n" + b"a" * 2000)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413 ")
            writer.write(b"a" * 2000)
            await clock.advance(9)
            assert served._server.connections
            await clock.advance(10)
            assert b"HTTP/1.1" not in await reader.read()
            writer.close()

    run(main())


def test_who_expects_to_be_told_to_continue_is_told(run: Run) -> None:
    async def main() -> None:
        async with server(Echo()) as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.address.port)
            head, end, body = request("POST /v1/echo/a", b"abc", CLOSE, "Expect: 100-continue").partition(b"\r\n\r\n")
            writer.write(head + end)
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
            assert (await reader.read()).endswith(b"abc")
            writer.close()

    run(main())


def test_an_answer_over_the_callers_limit_is_an_error_that_names_the_option(run: Run) -> None:
    async def main() -> None:
        async with server(Echo()) as served, client(f"{served.address}?max_body=10") as here:
            with pytest.raises(TooLarge, match="max_body"):
                await here.send(echo(b"a" * 11))
            assert await here.send(echo(b"a" * 10))

    run(main())


def test_trailers_are_dropped_and_cannot_go_on_for_ever(run: Run) -> None:
    async def main() -> None:
        receive = Echo()
        head = b"POST /v1/echo/a HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        async with server(receive) as served:
            assert (await raw(served, head + b"1\r\na\r\n0\r\nQuintet-Sender: me\r\n\r\n")).endswith(b"a")
            assert receive.seen[0].sender == ""
            reader, writer = await asyncio.open_connection("127.0.0.1", served.address.port)
            writer.write(head + b"0\r\n")
            await until(lambda: any(c.cycle for c in served._server.connections))
            for _ in range(8):
                writer.write(b"X-More: " + b"a" * 8000 + b"\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
            writer.close()

    run(main())


# Limits of time, moved by hand


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"POST /v1/ec", b"HTTP/1.1 408 "),
        (request(body=b"abc")[:-1], b"HTTP/1.1 408 "),
        (request("GET /v1/things") + b"GET", b"HTTP/1.1 204 "),
    ],
)
def test_a_silent_or_slow_client_is_hung_up_on(run: Run, sent: bytes, answer: bytes) -> None:
    async def main() -> None:
        clock, receive = FakeClock(), Echo()
        async with server(receive, clock=clock, options="?request_timeout=10") as served:
            hearing = asyncio.create_task(raw(served, sent))
            await until(lambda: any(not sent or c.scope for c in served._server.connections))
            await clock.advance(9)
            assert served._server.connections
            await clock.advance(60)
            assert (await hearing).startswith(answer)

    run(main())


def test_a_connection_that_idles_is_closed_and_one_in_use_is_not(run: Run) -> None:
    async def main() -> None:
        receive = Echo(hold=True)
        async with server(receive, options="?keep_alive=0.05") as served:
            busy = asyncio.create_task(raw(served, request(body=b"abc")))
            await receive.begun.acquire()
            assert (await raw(served, request("GET /nope"))).startswith(b"HTTP/1.1 404 ")
            assert not busy.done()
            receive.let_go.set()
            assert (await busy).endswith(b"abc")

    run(main())


def test_a_client_that_does_not_read_its_answers_is_hung_up_on_and_holds_little(run: Run) -> None:
    async def receive(message: Message) -> Verdict:
        handled.append(message)
        return Done(Message(channel=GET, body=b"a" * 1_000_000))

    handled: list[Message] = []

    async def main() -> None:
        clock = FakeClock()
        async with server(receive, clock=clock) as served:
            with socket.create_connection(("127.0.0.1", served.address.port or 0)) as deaf:
                deaf.sendall(request("GET /v1/things") * 100)
                await until(lambda: any(c._writing_since for c in served._server.connections))
                await clock.advance(5)
                assert len(handled) < 20
                assert served._server.connections
                await clock.advance(60)
                await until(lambda: not served._server.connections)

    run(main())


def test_no_timer_stays_when_nobody_is_connected(run: Run) -> None:
    async def main() -> None:
        clock = FakeClock()
        async with server(Echo(), clock=clock) as served:
            await raw(served, request("GET /v1/things", b"", CLOSE))
            await until(lambda: not served._server.connections)
            await clock.advance(5)
            assert clock.timers == []

    run(main())


# A server that is gone, goes, or is none


def test_nobody_there_is_unavailable_and_nothing_was_sent(run: Run) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        for address in (f"http://127.0.0.1:{port}", "http://nobody.invalid:80"):
            async with client(address) as here:
                with pytest.raises(Unavailable, match=address) as caught:
                    await here.send(echo())
                assert caught.value.safety is Safety.NOT_SENT
                assert here._pool._open == 0

    run(main())


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"", "before it answered"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", "in the middle of its answer"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", "in the middle of its answer"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no HTTP/1.1"),
    ],
)
def test_a_connection_that_breaks_after_sending_leaves_it_unknown(run: Run, answer: bytes, sentence: str) -> None:
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)

    async def main() -> None:
        async with scripted(die) as address, client(address) as here:
            for _ in range(2):
                with pytest.raises(ConnectionLost, match=sentence) as caught:
                    await here.send(echo())
                assert caught.value.safety is Safety.UNKNOWN
            await until(lambda: here._pool._open == 0)

    run(main())


def test_a_body_that_ends_with_the_connection_is_read_whole(run: Run) -> None:
    async def old(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain; charset=x\r\n\r\nab")
        await writer.drain()
        writer.write(b"c")

    async def main() -> None:
        async with scripted(old) as address, client(address) as here:
            reply = await here.send(echo())
            assert reply is not None
            assert (reply.body, reply.media_type, reply.status) == (b"abc", "text/plain", "")

    run(main())


def test_a_connection_that_the_server_closed_while_idle_is_not_used_again(run: Run) -> None:
    calls = 0

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % calls)

    async def main() -> None:
        async with scripted(once) as address, client(address) as here:
            for number in (b"1", b"2"):
                reply = await here.send(echo())
                assert reply is not None
                assert reply.body == number
                await until(lambda: not here._pool._connections)

    run(main())


def test_bytes_that_nobody_asked_for_end_an_idle_connection(run: Run) -> None:
    async def talkative(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()
        await said.wait()
        writer.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 3\r\n\r\nbad")
        await reader.read()

    said = asyncio.Event()
    told: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        async with scripted(talkative) as address, client(address) as here:
            for _ in range(2):
                said.clear()
                reply = await here.send(echo())
                assert reply is not None
                assert reply.body == b"ok"
                said.set()
                await until(lambda: not here._pool._connections)
            assert told == []

    run(main())


def test_an_answer_before_the_request_was_sent_whole_is_read_and_ends_the_connection(run: Run) -> None:
    async def hasty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 No\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        await reader.read()

    async def main() -> None:
        async with scripted(hasty) as address, client(address) as here:
            reply = await here.send(echo(b"a" * 30_000_000))
            assert reply is not None
            assert reply.status == "too-large"
            assert not here._pool._idle

    run(main())


def test_a_closed_client_fails_its_calls_and_takes_no_more(run: Run) -> None:
    async def main() -> None:
        receive = Echo(hold=True)
        async with server(receive) as served, client(f"{served.address}?connections=1") as here:
            sent = asyncio.create_task(here.send(echo()))
            await receive.begun.acquire()
            waiting = asyncio.create_task(here.send(echo()))
            await asyncio.sleep(0)
            await here.close()
            with pytest.raises(ConnectionLost):
                await sent
            with pytest.raises(Unavailable):
                await waiting
            with pytest.raises(Unavailable):
                await here.send(echo())

    run(main())


def test_idle_connections_of_a_client_are_given_up(run: Run) -> None:
    async def main() -> None:
        clock = FakeClock()
        async with server(Echo()) as served:
            here = carrier(str(served.address), clock)
            await here.open()
            await asyncio.gather(*(here.send(echo()) for _ in range(5)))
            assert len(here._pool._idle) == 5
            await clock.advance(10)
            assert not here._pool._idle
            await until(lambda: not here._pool._connections)
            assert clock.timers == []
            await here.close()

    run(main())


# Stopping


async def _stopping(receive: Receive, *, clock: Clock = SYSTEM) -> tuple[Carrier, list[Serving]]:
    served = carrier("http://127.0.0.1:0", clock)
    await served.open()
    servings = [await served.serve(channel, receive, "group") for channel in (ECHO, GET)]
    await served.ready()
    return served, servings


def test_what_is_in_work_is_finished_and_answered_while_the_server_stops(run: Run) -> None:
    async def main() -> None:
        receive = Echo(hold=True)
        served, servings = await _stopping(receive)
        async with client(served.address) as here, client(served.address) as late:
            await here.send(Message(channel=GET, headers={":method": "GET", ":path": "/nope"}))  # idles from here on
            calls = [asyncio.create_task(here.send(echo(b"%d" % n))) for n in range(3)]
            for _ in calls:
                await receive.begun.acquire()
            stopping = asyncio.gather(*(serving.stop() for serving in servings))
            await until(lambda: served._server.draining)
            with pytest.raises(Unavailable):
                await late.send(echo())
            assert not stopping.done()
            receive.let_go.set()
            replies = await asyncio.gather(*calls)
            assert [reply.body for reply in replies if reply] == [b"0", b"1", b"2"]
            assert [reply.headers["connection"] for reply in replies if reply] == ["close"] * 3
            await stopping
            assert not served._server.connections
        await served.close()

    run(main())


@pytest.mark.parametrize("cut", [10, -2])
def test_a_request_that_is_half_there_when_the_server_stops_is_served(run: Run, cut: int) -> None:
    async def main() -> None:
        served, servings = await _stopping(Echo())
        reader, writer = await asyncio.open_connection("127.0.0.1", served.address.port)
        whole = request(body=b"abc")
        writer.write(whole[:cut])
        await until(lambda: any(c.scope for c in served._server.connections))
        stopping = asyncio.gather(*(serving.stop() for serving in servings))
        await until(lambda: served._server._drained)
        for _ in range(10):
            await asyncio.sleep(0)
        writer.write(whole[cut:])
        answer = await reader.read()
        assert answer.endswith(b"abc")
        assert b"connection: close\r\n" in answer
        await stopping
        writer.close()
        await served.close()

    run(main())


def test_a_request_that_stays_half_there_does_not_keep_the_server_from_stopping(run: Run) -> None:
    async def main() -> None:
        clock = FakeClock()
        served, servings = await _stopping(Echo(), clock=clock)
        hearing = asyncio.create_task(raw(served, b"POST /v1/ec"))
        await until(lambda: any(c.scope for c in served._server.connections))
        stopping = asyncio.gather(*(serving.stop() for serving in servings))
        for _ in range(10):
            await asyncio.sleep(0)
        await clock.advance(6)
        assert (await hearing).startswith(b"HTTP/1.1 408 ")
        await stopping
        await served.close()

    run(main())


def test_one_channel_stops_while_the_other_goes_on(run: Run) -> None:
    async def main() -> None:
        receive = Echo(hold=True)
        served, (first, _) = await _stopping(receive)
        async with client(served.address) as here:
            in_work = asyncio.create_task(here.send(echo(b"1")))
            await receive.begun.acquire()
            stopping = asyncio.create_task(first.stop())
            await asyncio.sleep(0)
            refused = await here.send(echo(b"2"))
            assert refused is not None
            assert refused.status == "unavailable"
            health = await raw(served, request("GET /health/ready", b"", CLOSE))
            assert health.startswith(b"HTTP/1.1 503 ")
            assert b"draining" in health
            assert (await raw(served, request("GET /health/live", b"", CLOSE))).startswith(b"HTTP/1.1 200 ")
            receive.let_go.set()
            assert await in_work
            await stopping
            gone = await here.send(echo())
            assert gone is not None
            assert gone.status == "unknown-operation"
            other = await here.send(Message(channel=GET))
            assert other is not None
            assert other.headers[":status"] == "204"
        await served.close()

    run(main())


def test_a_stop_that_is_cancelled_cuts_off_what_is_in_work(run: Run) -> None:
    async def main() -> None:
        receive = Echo(hold=True)
        served, servings = await _stopping(receive)
        async with client(served.address) as here:
            call = asyncio.create_task(here.send(echo()))
            await receive.begun.acquire()
            stopping = asyncio.gather(*(serving.stop() for serving in servings))
            await asyncio.sleep(0)
            stopping.cancel()
            with pytest.raises(ConnectionLost):
                await call
            with pytest.raises(asyncio.CancelledError):
                await stopping
        await served.close()
        assert not served._server.connections

    run(main())


def test_a_channel_whose_stop_is_cancelled_cuts_off_its_own_requests_only(run: Run) -> None:
    async def main() -> None:
        receive = Echo(hold=True)
        served, (first, _) = await _stopping(receive)
        async with client(served.address) as here:
            own = asyncio.create_task(here.send(echo()))
            other = asyncio.create_task(here.send(Message(channel=GET)))
            for _ in range(2):
                await receive.begun.acquire()
            stopping = asyncio.create_task(first.stop())
            await until(lambda: first.stopping)  # type: ignore[attr-defined]
            stopping.cancel()
            with pytest.raises(ConnectionLost):
                await own
            receive.let_go.set()
            assert await other
        await served.close()

    run(main())


def test_to_cut_off_what_is_in_work_is_no_error_of_the_server(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        receive = Echo(hold=True)
        served, _ = await _stopping(receive)
        async with client(served.address) as here:
            call = asyncio.create_task(here.send(echo()))
            half = asyncio.create_task(raw(served, request(body=b"abc")[:-1]))
            await receive.begun.acquire()
            await until(lambda: len(served._server.state.tasks) == 2)
            await served.close()
            assert not served._server.state.tasks
            with pytest.raises(ConnectionLost):
                await call
            await asyncio.gather(half, return_exceptions=True)

    run(main())
    assert not caplog.records


# Addresses


def test_a_port_in_use_is_named(run: Run) -> None:
    async def main() -> None:
        async with server(Echo()) as served:
            second = carrier(str(served.address))
            await second.open()
            await second.serve(ECHO, Echo(), "group")
            with pytest.raises(TransportError, match=f"{served.address}.*in use"):
                await second.ready()
            await second.close()

    run(main())


def test_a_free_port_is_found_and_shown(run: Run) -> None:
    async def main() -> None:
        async with server(Echo(), options="?max_body=10") as served:
            assert served.address.port
            assert str(served.address) == f"http://127.0.0.1:{served.address.port}?max_body=10"

    run(main())


def test_who_only_calls_does_not_listen(run: Run) -> None:
    async def main() -> None:
        async with client("http://127.0.0.1:1") as here:
            await here.ready()
            assert not here._server.listening

    run(main())


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("http:///x", "host"),
        ("http://127.0.0.1?max_body=big", "max_body"),
        ("http://127.0.0.1?nonsense=1", "nonsense"),
        ("http://127.0.0.1?connections=0", "connections"),
        ("https://127.0.0.1?ca=/nowhere.pem", "nowhere"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_at_once(run: Run, address: str, sentence: str) -> None:
    async def main() -> None:
        with pytest.raises(AddressError, match=sentence):
            await carrier(address).open()

    run(main())


def test_two_channels_on_one_route_are_refused(run: Run) -> None:
    async def main() -> None:
        async with server(Echo()) as served:
            with pytest.raises(AddressError, match="twice"):
                await served.serve(Channel("other", route=ECHO.route), Echo(), "group")

    run(main())


# TLS and curl, as others speak it


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command here")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=our own")
    openssl("req", *new, "-keyout", "key.pem", "-out", "request.pem", "-subj", "/CN=127.0.0.1")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    openssl("x509", "-req", "-in", "request.pem", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-extfile", "names", "-out", "cert.pem")  # fmt: skip
    return folder


def test_https_is_verified_and_a_private_authority_can_be_named(run: Run, certificates: Path) -> None:
    async def main() -> None:
        served = carrier(f"https://127.0.0.1:0?cert={certificates}/cert.pem&key={certificates}/key.pem")
        await served.open()
        await served.serve(ECHO, Echo(), "group")
        await served.ready()
        address = f"https://127.0.0.1:{served.address.port}"
        async with client(f"{address}?ca={certificates}/ca.pem") as here:
            for body in (b"hi", b"a" * 1_000_000):
                reply = await here.send(echo(body))
                assert reply is not None
                assert reply.body == body
            assert len(served._server.connections) == 1
        async with client(address) as distrustful:
            with pytest.raises(Unavailable, match=r"no secure connection.*certificate") as caught:
                await distrustful.send(echo())
            assert caught.value.safety is Safety.NOT_SENT
        async with client(f"http://127.0.0.1:{served.address.port}") as plain:
            with pytest.raises(ConnectionLost):
                await plain.send(echo())
        await served.close()

    run(main())


def test_https_without_a_certificate_is_refused_at_the_start(run: Run) -> None:
    async def main() -> None:
        served = carrier("https://127.0.0.1:0")
        await served.open()
        await served.serve(ECHO, Echo(), "group")
        with pytest.raises(AddressError, match="cert="):
            await served.ready()
        await served.close()

    run(main())


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl command here")
def test_curl_understands_it(run: Run) -> None:
    async def curl(*arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            "curl", "-s", "-m", "10", *arguments, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        return out.decode()

    async def main() -> None:
        async with server(Echo(), options="?max_body=5000") as served:
            base = f"http://127.0.0.1:{served.address.port}"
            assert await curl("-d", "hi", f"{base}/v1/echo/a") == "hi"
            assert await curl("-d", "a" * 4000, "-H", "Expect: 100-continue", f"{base}/v1/echo/a") == "a" * 4000
            assert await curl("-d", "hi", "-H", "Transfer-Encoding: chunked", f"{base}/v1/echo/a") == "hi"
            assert await curl("--http1.0", "-d", "hi", f"{base}/v1/echo/a") == "hi"
            assert await curl("--http2", "-d", "", f"{base}/health/live") != ""
            two = await curl("-w", "%{num_connects} ", f"{base}/health/live", f"{base}/health/ready")
            assert two == '{"status":"live"}1 {"status":"ready"}0 '
            assert "405" in await curl("-I", f"{base}/v1/echo/a")
            for size in (6000, 100_000):
                status = ("-o", "/dev/null", "-w", "%{http_code}")
                assert await curl("-d", "a" * size, *status, f"{base}/v1/echo/a") == "413"

    run(main())
