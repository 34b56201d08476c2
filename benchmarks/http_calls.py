"""Requests per second over HTTP, beside FastAPI with the usual clients and beside the same parsers used bare.

A request is one nested record of seven fields, decoded and encoded on both sides. The server is pinned to one core and
the client to another; the rounds take turns, and each cell is its best round, so that a busy machine is fair to all.
"""

# mypy: disable-error-code="empty-body"
from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import httptools
import msgspec
import uvloop
from msgspec import Struct

from benchmarks.figure import Figure, at_least
from quintet import Contract, Service, connect, request, serve
from quintet.message import Channel, Message, new_id
from quintet.transport import Done, Verdict, open_address

OUTSTANDING = (1, 16, 64)
MOST = OUTSTANDING[-1]
ROUNDS = 10
PEERS = {  # name: server, client
    "FastAPI on uvicorn + httpx": ("fastapi", "httpx"),
    "FastAPI on uvicorn + aiohttp": ("fastapi", "aiohttp"),
    "bare ASGI on uvicorn + pyreqwest": ("asgi", "pyreqwest"),
    "bare ASGI on uvicorn + bare httptools": ("asgi", "bare"),
    "bare httptools + bare httptools": ("bare", "bare"),
    "Quintet's transport alone": ("transport", "transport"),
    "Quintet": ("quintet", "quintet"),
}
BUDGETS = {  # of Quintet, 64 outstanding: at least so many times the peer
    "FastAPI on uvicorn + aiohttp": 2.5,
    "FastAPI on uvicorn + httpx": 20.0,
    "bare ASGI on uvicorn + bare httptools": 0.75,
}


class Place(Struct):
    lat: float
    lon: float


class Trip(Struct):
    id: str
    passenger: str
    pickup: Place
    destination: Place
    seats: int
    fare: float
    tags: list[str]


class Trips(Contract, name="trips", version="1.0"):
    @request(http="PUT /trips")
    async def put(self, trip: Trip) -> Trip: ...


TRIP = Trip("t-1", "p-1", Place(52.1, 4.3), Place(52.2, 4.4), 2, 17.5, ["early", "luggage"])
PATH = "/v1/trips"
CHANNEL = Channel("trips", route=f"PUT {PATH}")
encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Trip).decode

Stay = AsyncExitStack
Call = Callable[[], Awaitable[object]]


# Servers: each returns once it listens, and stays until the stack is closed.


async def serve_fastapi(port: int, stay: Stay) -> None:
    from fastapi import FastAPI
    from pydantic import create_model

    place = create_model("Place", lat=float, lon=float)
    fields: Any = {"id": str, "passenger": str, "pickup": place, "destination": place}
    trip: Any = create_model("Trip", **fields, seats=int, fare=float, tags=list[str])
    app = FastAPI()

    async def put(body: Any) -> Any:
        return body

    put.__annotations__ = {"body": trip, "return": trip}
    app.put(PATH)(put)
    await _uvicorn(app, port, stay)


async def serve_asgi(port: int, stay: Stay) -> None:
    async def app(_: Any, receive: Any, send: Any) -> None:
        event = await receive()
        body = event["body"]
        while event["more_body"]:
            event = await receive()
            body += event["body"]
        body = encode(decode(body))
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    await _uvicorn(app, port, stay)


async def _uvicorn(app: Any, port: int, stay: Stay) -> None:
    """As it is run, with the Date that every server must send (RFC 9110, section 6.6.1)."""
    import uvicorn

    config = uvicorn.Config(
        app, port=port, http="httptools", lifespan="off", ws="none", log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())

    async def end() -> None:
        server.should_exit = True
        await serving

    stay.push_async_callback(end)
    while not server.started:  # noqa: ASYNC110 - uvicorn offers nothing to wait for
        await asyncio.sleep(0.01)


class BareServer(asyncio.Protocol):
    def __init__(self) -> None:
        self.parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.body = b""

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name] = value

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.task = asyncio.get_running_loop().create_task(self.respond(self.body))

    async def respond(self, body: bytes) -> None:
        body = encode(decode(body))
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(head + body)


async def serve_bare(port: int, _: Stay) -> None:
    await asyncio.get_running_loop().create_server(BareServer, "127.0.0.1", port)


async def serve_transport(port: int, stay: Stay) -> None:
    transport = open_address(f"http://127.0.0.1:{port}")
    await transport.open()
    stay.push_async_callback(transport.close)

    async def receive(message: Message) -> Verdict:
        body = encode(decode(message.body))
        return Done(Message(channel=message.channel, body=body, media_type="application/json"))

    await transport.serve(CHANNEL, receive, "trips", 1000)
    await transport.ready()


async def serve_quintet(port: int, stay: Stay) -> None:
    service = Service(Trips)

    @service.handles(Trips.put)
    async def put(trip: Trip) -> Trip:
        return trip

    await stay.enter_async_context(serve(service, at=[f"http://127.0.0.1:{port}"]))


# Clients: each returns a function that makes one call.


async def call_httpx(port: int, outstanding: int, stay: Stay) -> Call:
    import httpx

    limits = httpx.Limits(max_connections=outstanding, max_keepalive_connections=outstanding)
    client = await stay.enter_async_context(httpx.AsyncClient(limits=limits, timeout=5))
    headers, url = {"content-type": "application/json"}, f"http://127.0.0.1:{port}{PATH}"

    async def call() -> object:
        return decode((await client.put(url, content=encode(TRIP), headers=headers)).content)

    return call


async def call_aiohttp(port: int, outstanding: int, stay: Stay) -> Call:
    import aiohttp

    connector = aiohttp.TCPConnector(limit=outstanding)
    client = await stay.enter_async_context(aiohttp.ClientSession(connector=connector))
    headers, url = {"content-type": "application/json"}, f"http://127.0.0.1:{port}{PATH}"

    async def call() -> object:
        async with client.put(url, data=encode(TRIP), headers=headers) as response:
            return decode(await response.read())

    return call


async def call_pyreqwest(port: int, outstanding: int, stay: Stay) -> Call:
    from pyreqwest.client import ClientBuilder

    client = await stay.enter_async_context(ClientBuilder().max_connections(outstanding).build())
    url = f"http://127.0.0.1:{port}{PATH}"

    async def call() -> object:
        request = client.put(url).header("content-type", "application/json").body_bytes(encode(TRIP)).build()
        return decode(bytes(await (await request.send()).bytes()))

    return call


class BareClient(asyncio.Protocol):
    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.body = b""

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name] = value

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.answer.set_result(self.body)

    def call(self, body: bytes) -> asyncio.Future[bytes]:
        self.answer: asyncio.Future[bytes] = self.loop.create_future()
        head = b"PUT /v1/trips HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(head % len(body) + body)
        return self.answer


async def call_bare(port: int, outstanding: int, stay: Stay) -> Call:
    loop = asyncio.get_running_loop()
    pool: deque[BareClient] = deque()
    for _ in range(outstanding):
        transport, client = await loop.create_connection(BareClient, "127.0.0.1", port)
        stay.callback(transport.close)
        pool.append(client)

    async def call() -> object:
        client = pool.pop()
        body = await client.call(encode(TRIP))
        pool.append(client)
        return decode(body)

    return call


async def call_transport(port: int, _: int, stay: Stay) -> Call:
    transport = open_address(f"http://127.0.0.1:{port}")
    await transport.open()
    stay.push_async_callback(transport.close)

    async def call() -> object:
        message = Message(
            channel=CHANNEL,
            body=encode(TRIP),
            id=new_id(),
            operation="put",
            sender="bench",
            version="1.0",
            media_type="application/json",
            deadline=transport.clock.now() + 1,
            headers={":method": "PUT", ":path": PATH},
        )
        reply = await transport.send(message)
        return decode(reply.body if reply else b"")

    return call


async def call_quintet(port: int, _: int, stay: Stay) -> Call:
    trips = await stay.enter_async_context(connect(Trips, f"http://127.0.0.1:{port}"))

    async def call() -> object:
        return await trips.put(TRIP)

    return call


# The measurement


async def _serve(kind: str, port: int) -> None:
    async with AsyncExitStack() as stay:
        await globals()[f"serve_{kind}"](port, stay)
        print("listening", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def _call(kind: str, port: int, outstanding: int, seconds: float) -> tuple[int, float]:
    """How many requests were answered in how many seconds."""
    async with AsyncExitStack() as stay:
        call: Call = await globals()[f"call_{kind}"](port, outstanding, stay)
        if await call() != TRIP:
            raise RuntimeError(f"{kind}: another trip came back")
        count, start = 0, time.perf_counter()

        async def caller() -> None:
            nonlocal count
            while time.perf_counter() < start + seconds:
                await call()
                count += 1

        await asyncio.gather(*(caller() for _ in range(outstanding)))
        return count, time.perf_counter() - start


class Peer:
    """A server and a client process, which wait until they are asked to measure."""

    def __init__(self, server: str, client: str, stay: ExitStack) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        self.server = self._start("serve", server, port, stay)
        if self._ask(self.server, "") != "listening":
            raise RuntimeError(f"the server {server!r} did not start")
        self.client = self._start("call", client, port, stay)

    def _start(self, what: str, kind: str, port: str, stay: ExitStack) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "benchmarks.http_calls", what, kind, port]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stay.callback(process.communicate)  # they end when their input does
        return process

    def _ask(self, process: subprocess.Popen[str], line: str) -> str:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("started without pipes")
        if line:
            print(line, file=process.stdin, flush=True)
        return process.stdout.readline().strip()

    def measure(self, outstanding: int, seconds: float) -> tuple[int, float, float, float]:
        """Requests answered, the seconds they took, and the seconds of work on the server's and the client's core."""
        before = self._work()
        count, took = self._ask(self.client, f"{outstanding} {seconds}").split()
        server, client = (after - start for after, start in zip(self._work(), before, strict=True))
        return int(count), float(took), server, client

    def _work(self) -> list[float]:
        stats = (Path(f"/proc/{process.pid}/stat").read_text().split() for process in (self.server, self.client))
        return [(int(stat[13]) + int(stat[14])) / os.sysconf("SC_CLK_TCK") for stat in stats]


def figures(seconds: float = 3.0) -> list[Figure]:
    """What Quintet is worth beside each peer, requests per second of all, and what one costs the server's and the
    client's core (which a busy machine blurs less). `seconds` for each number outstanding of each peer."""
    best = {name: dict.fromkeys(OUTSTANDING, 0.0) for name in PEERS}
    work = dict.fromkeys(PEERS, (0.0, 0.0, 0.0))  # with the most outstanding: requests, seconds there and here
    with ExitStack() as stay:
        peers = {name: Peer(server, client, stay) for name, (server, client) in PEERS.items()}
        for _ in range(ROUNDS):
            for outstanding in OUTSTANDING:
                for name, peer in peers.items():
                    count, took, there, here = peer.measure(outstanding, seconds / ROUNDS)
                    best[name][outstanding] = max(best[name][outstanding], count / took)
                    if outstanding == MOST:
                        requests, server, client = work[name]
                        work[name] = (requests + count, server + there, client + here)
    ours = best["Quintet"][MOST]
    found = [at_least(f"Quintet beside {name}", ours / best[name][MOST], "x", least) for name, least in BUDGETS.items()]
    for name, rates in best.items():
        found += [Figure(f"{name}, {outstanding} outstanding", rate, "1/s") for outstanding, rate in rates.items()]
        requests, server, client = work[name]
        found.append(Figure(f"{name}: work of the server", server / requests * 1e6, "us"))
        found.append(Figure(f"{name}: work of the client", client / requests * 1e6, "us"))
    return found


def main() -> None:
    match sys.argv[1:]:
        case ["serve", kind, port]:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            uvloop.run(_serve(kind, int(port)))
        case ["call", kind, port]:
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
            for line in sys.stdin:
                outstanding, seconds = line.split()
                print(*uvloop.run(_call(kind, int(port), int(outstanding), float(seconds))), flush=True)
        case [*given]:
            for figure in figures(*map(float, given)):
                print(f"{figure.name:60} {figure.value:12,.2f} {figure.unit:4} {figure.budget}")


if __name__ == "__main__":
    main()
