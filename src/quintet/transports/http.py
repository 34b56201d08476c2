"""HTTP/1.1: uvicorn's connections inside the service's own loop, and a pool of client connections on httptools.

uvicorn parses, writes and keeps alive; here stand the application that it calls, and what it does not bound: the size
of a head, the time of a slow client. At most `limit` requests of a channel are handed on at once, what the core makes
of a deadline bounds how long one is in work, and WAITING how many wait for that, each with at most `max_body` in hand.

Options of an address: `max_body` (bytes of a body, both ways), `request_timeout` (seconds a client may take to send a
request or to read its answer), `keep_alive` (seconds a served connection may idle), `connections` (how many a client
opens at most), `ca` (a file of certificates to trust), `cert` and `key` (what an https server shows).
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import aclosing
from email.utils import formatdate
from functools import partial
from typing import Any, Final, cast
from urllib.parse import quote

import httptools
import msgspec
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from quintet.clock import SYSTEM, Clock, Handle
from quintet.errors import (
    AddressError,
    CallError,
    ConnectionLost,
    InvalidMessage,
    Overloaded,
    RemoteError,
    TooLarge,
    TransportError,
    Unavailable,
)
from quintet.gate import Gate
from quintet.message import Channel, Message
from quintet.transport import (
    Address,
    Done,
    Finding,
    Page,
    Receive,
    Serving,
    Shown,
    Trait,
    Transport,
    parse_address,
)
from quintet.wire.http import (
    MalformedHTTP,
    NotRouted,
    Peer,
    Response,
    ResponseParser,
    ResponseParts,
    Router,
    declared_length,
    problem_parts,
    read_headers,
    read_request,
    read_response,
    request_bytes,
    response_parts,
    route_of,
    split_route,
)

MAX_BODY: Final = 4 * 1024 * 1024  # bytes; what gRPC allows too
MAX_HEAD: Final = 32 * 1024
MAX_PATH: Final = 8 * 1024
IDLE: Final = 4.0  # seconds; below the 5 after which most servers close an idle connection
SWEEP: Final = 1.0  # seconds between two looks at slow and idle clients
WAITING: Final = 10_000  # requests of a channel that wait for a place; more are refused
GRACE: Final = 5.0  # seconds that a request which is half read may still take when the server stops


class Carrier(Transport):
    """Carries messages as HTTP requests, and their replies as the responses."""

    traits = frozenset({Trait.REPLIES})
    binding = "rest"
    options = frozenset({"max_body", "request_timeout", "keep_alive", "connections", "ca", "cert", "key"})

    def __init__(self, address: Address, clock: Clock = SYSTEM) -> None:
        super().__init__(address, clock)
        if not address.host:
            raise AddressError(f"{address}: write a host, as {address.scheme}://127.0.0.1:8001")
        self.secure = address.scheme == "https"
        self.prefix = quote(address.path.rstrip("/"))
        for name in self.options - {"ca", "cert", "key"}:
            if not address.option(name, 1.0) > 0:
                raise AddressError(f"{address}: option {name} must be more than 0")
        self.max_body = address.count("max_body", MAX_BODY)
        self.pages: Mapping[str, Page] = {}
        self._pool = _Pool(self)
        self._server = _Server(self)

    async def open(self) -> None:
        self._pool.open()

    async def send(self, message: Message) -> Message | None:
        pool = self._pool
        request = request_bytes(message, pool.host, self.prefix, self.clock.now())
        connection = pool.take() or await pool.acquire()
        return read_response(await connection.exchange(request, message.headers.get(":method", "")), message)

    async def examine(self) -> Sequence[Finding]:
        """Asks for the health page. Raises Unavailable where nobody listens."""
        asked = Message(channel=Channel("health"), headers={":method": "GET", ":path": "/health/ready"})
        reply = await self.send(asked)
        status = reply.headers.get(":status", "") if reply is not None else ""
        says = f"GET /health/ready answers {status} {reply.body.decode(errors='replace')[:200] if reply else ''}"
        return [Finding("health", says, well=status == "200")]

    async def serve(self, channel: Channel, receive: Receive, group: str, limit: int = 100) -> Serving:  # noqa: ARG002
        return self._server.add(channel, receive, limit)

    async def ready(self) -> None:
        if (self._server.routes or self.pages) and not self._server.listening:
            port = await self._server.listen()
            if port != self.address.port:
                where = f":{self.address.port}" if self.address.port is not None else ""
                host = f"[{self.address.host}]" if ":" in self.address.host else self.address.host
                self.address = parse_address(self.address.text.replace(f"{host}{where}", f"{host}:{port}", 1))

    async def close(self) -> None:
        self._pool.close()
        await self._server.close()


# --- the client


class _Pool:
    """The connections to one server: as many as there are calls, up to `limit`; the others wait their turn."""

    def __init__(self, carrier: Carrier) -> None:
        address = carrier.address
        self._carrier = carrier
        self._port = address.port or (443 if carrier.secure else 80)
        bare = f"[{address.host}]" if ":" in address.host else address.host
        self.host = bare if address.port is None else f"{bare}:{address.port}"
        self.limit = address.count("connections", 1000)
        self.max_body = carrier.max_body
        self.now = carrier.clock.now
        self._ssl: ssl.SSLContext | None = None
        self._open = 0  # connections and attempts to connect
        self._connections: set[_Caller] = set()
        self._idle: dict[_Caller, None] = {}  # the one used last is taken first, so that the others may go
        self._waiting: deque[asyncio.Future[_Caller | None]] = deque()
        self._sweeping: Handle | None = None
        self._closed = False

    def __str__(self) -> str:
        return str(self._carrier.address)

    def open(self) -> None:
        if self._carrier.secure:
            ca = self._carrier.address.options.get("ca")
            try:
                self._ssl = ssl.create_default_context(cafile=ca)
            except OSError as error:
                raise AddressError(f"{self}: cannot read the certificates in ca={ca}: {error}") from None

    def take(self) -> _Caller | None:
        """An idle connection, if there is one that still stands."""
        while self._idle:
            connection, _ = self._idle.popitem()
            if not connection.is_closing():
                return connection
        return None

    async def acquire(self) -> _Caller:
        """A new connection, or one that is given back. Raises Unavailable."""
        while not self._closed:
            if self._open < self.limit:
                self._open += 1
                return await self._connect()
            turn: asyncio.Future[_Caller | None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                connection = await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self.pass_on(turn.result())
                raise
            if connection is None:
                return await self._connect()
            if not connection.is_closing():
                return connection
        raise Unavailable(f"{self}: this client is closed")

    async def _connect(self) -> _Caller:
        """In a place that `_open` counts already."""
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                lambda: _Caller(self, loop), self._carrier.address.host, self._port, ssl=self._ssl
            )
        except BaseException as error:
            self.pass_on(None)
            if isinstance(error, ssl.SSLError):
                raise Unavailable(f"{self}: no secure connection: {error}") from error
            if isinstance(error, OSError):
                raise Unavailable(f"{self}: cannot connect: {error}") from error
            raise
        if self._closed or connection.is_closing():
            connection.abort()
            self.pass_on(None)
            raise Unavailable(f"{self}: the connection was closed before anything was sent")
        self._connections.add(connection)
        return connection

    def pass_on(self, connection: _Caller | None) -> None:
        """Gives a connection, or the place of one that is gone, to whoever waits longest."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(connection)
                return
        if connection is None:
            self._open -= 1
        else:
            connection.idle_since = self.now()
            self._idle[connection] = None
            if self._sweeping is None:
                self._sweeping = self._carrier.clock.call_at(connection.idle_since + IDLE, self._sweep)

    def lost(self, connection: _Caller) -> None:
        if connection in self._connections:  # else it broke while connecting, and its place is passed on there
            self._connections.remove(connection)
            self._idle.pop(connection, None)
            self.pass_on(None)

    def _sweep(self) -> None:
        self._sweeping = None
        oldest = self.now() - IDLE
        for connection in list(self._idle):
            if connection.idle_since > oldest:
                self._sweeping = self._carrier.clock.call_at(connection.idle_since + IDLE, self._sweep)
                break
            del self._idle[connection]
            connection.abort()

    def close(self) -> None:
        self._closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
        for connection in list(self._connections):
            connection.abort()
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(Unavailable(f"{self}: this client was closed while the call waited"))


class _Caller(asyncio.Protocol):
    """One connection to a server, with one request on it at a time."""

    idle_since = 0.0

    def __init__(self, pool: _Pool, loop: asyncio.AbstractEventLoop) -> None:
        self._pool, self._loop = pool, loop
        self._parser = ResponseParser(pool.max_body)
        self._answer: asyncio.Future[Response] | None = None
        self._transport: asyncio.Transport

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def abort(self) -> None:
        self._transport.abort()

    async def exchange(self, request: bytes, method: str) -> Response:
        """The response to the request. A call that is cancelled takes the connection with it: nobody may read its
        answer as that to another. Raises ConnectionLost and TooLarge."""
        self._parser.expect(method)
        self._answer = answer = self._loop.create_future()
        self._transport.write(request)
        try:
            response: Response = await answer
            return response
        except asyncio.CancelledError:
            self.abort()
            raise

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None or answer.done():  # nobody asked: a time-out notice, or the answer to a call that is gone
            self.abort()
            return
        try:
            response = self._parser.feed(data)
        except MalformedHTTP as error:
            self._fail(ConnectionLost(f"{self._pool}: the answer is no HTTP/1.1: {error}"))
        except TooLarge as error:
            self._fail(TooLarge(f"{self._pool}: {error}; option max_body raises the limit"))
        else:
            if response is not None:
                self._complete(answer, response)

    def _complete(self, answer: asyncio.Future[Response], response: Response) -> None:
        self._answer = None
        answer.set_result(response)
        # an answer that overtook its request leaves the rest of that in the buffer
        if response.keep_alive and not self._transport.get_write_buffer_size():
            self._pool.pass_on(self)
        else:
            self.abort()

    def _fail(self, error: CallError) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_exception(error)
        self.abort()

    def eof_received(self) -> None:
        answer = self._answer
        response = self._parser.finish() if answer is not None and not answer.done() else None
        if answer is not None and response is not None:
            self._complete(answer, response)

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.lost(self)
        when = "in the middle of its answer" if self._parser.begun else "before it answered"
        why = f": {exc}" if exc else ""
        self._fail(ConnectionLost(f"{self._pool}: the connection broke {when}{why}"))


# --- the server

FAILED: Final = "the service failed; its log says why"
CLOSE: Final = (b"connection", b"close")
LOG: Final = logging.getLogger("quintet.http")
LOG.setLevel(logging.ERROR)  # uvicorn warns of every request that is none: whoever sends them would fill the log
LOG.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError)))

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[Any]]
_Send = Callable[[Any], Awaitable[None]]


class _Route:
    """One channel being served."""

    def __init__(self, server: _Server, channel: Channel, receive: Receive, limit: int, route: str) -> None:
        self.channel, self.receive, self.route = channel, receive, route
        self.stopping = False
        self.gate = Gate(limit)
        self.requests: dict[asyncio.Task[Any], _Connection] = {}  # in work and waiting for a place
        self._server = server

    def __repr__(self) -> str:
        return f"<serving {self.route}: {len(self.requests)} requests{', stopping' if self.stopping else ''}>"

    async def stop(self) -> None:
        """Ends listening, when all at this address stop. Where this is cancelled, what is in work is cut off."""
        self.stopping = True
        try:
            await asyncio.sleep(0)  # who stops a whole service stops its channels at once: they drain as one
            await self._server.drain_if_all_stop()
            while others := self.requests.keys() - {asyncio.current_task()}:  # a handler may stop its own service
                await asyncio.wait(others)
        except asyncio.CancelledError:
            await self.cancel()
            if self._server.draining:
                self._server.abort()
            raise
        self._server.remove(self)

    async def cancel(self) -> None:
        self._server.remove(self)
        for connection in self.requests.values():
            connection.transport.abort()
        await _cancel(self.requests)


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    others = set(tasks) - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class _Server:
    """All that is served at one address: an ASGI application, and the connections of uvicorn that call it."""

    def __init__(self, carrier: Carrier) -> None:
        address = carrier.address
        self.clock, self.max_body = carrier.clock, carrier.max_body
        self.routes: set[_Route] = set()
        self.listening = self.draining = False
        self.state = ServerState()
        self.context = contextvars.copy_context()
        self._request_timeout = address.option("request_timeout", 30.0)
        self._keep_alive = address.option("keep_alive", 60.0)
        self._carrier = carrier
        self._router: Router[_Route] = Router()
        self._listener: asyncio.Server | None = None
        self._drained: asyncio.Task[None] | None = None
        self._emptied = asyncio.Event()
        self._sweeping: Handle | None = None

    def add(self, channel: Channel, receive: Receive, limit: int) -> _Route:
        try:
            method, path, operation = split_route(route_of(channel))
            text = f"{method} {self._carrier.prefix}{path}" + (f"#{operation}" if operation else "")
            route = _Route(self, channel, receive, limit, text)
            self._router.add(text, route)
        except ValueError as error:
            raise AddressError(f"{self._carrier.address}: {channel.name}: {error}") from None
        self.routes.add(route)
        return route

    def remove(self, route: _Route) -> None:
        if route in self.routes:
            self.routes.remove(route)
            self._router.remove(route.route)

    async def listen(self) -> int:
        """Starts listening and returns the port. Raises TransportError and AddressError."""
        address, loop = self._carrier.address, asyncio.get_running_loop()
        port = address.port if address.port is not None else (443 if self._carrier.secure else 80)
        config = self._config()
        try:
            self._listener = await loop.create_server(
                lambda: _Connection(self, config, loop), address.host, port, ssl=config.ssl, backlog=config.backlog
            )
        except OSError as error:
            raise TransportError(f"{address}: cannot listen there: {error.strerror or error}") from error
        self.listening = True
        return int(self._listener.sockets[0].getsockname()[1])

    def _config(self) -> uvicorn.Config:
        address, files = self._carrier.address, {}
        if self._carrier.secure:
            if "cert" not in address.options:
                raise AddressError(f"{address}: to serve https, name the certificate's file: ?cert=...&key=...")
            files = {"ssl_certfile": address.options["cert"], "ssl_keyfile": address.options.get("key")}
        config = uvicorn.Config(
            self.respond,
            http=_Connection,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            proxy_headers=False,
            workers=1,
            timeout_keep_alive=self._keep_alive,  # type: ignore[arg-type]  # goes to call_later as it is
            **files,  # type: ignore[arg-type]
        )
        try:
            config.load()
        except OSError as error:
            raise AddressError(f"{address}: cannot use its certificate or key: {error}") from None
        return config

    # a request and its answer

    async def respond(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """The ASGI application."""
        headers = read_headers(scope["headers"])
        upgrade = "upgrade" in headers  # not offered: the parser stops behind this request
        try:
            parts = await self._answer(scope, headers, receive)
        except Exception as error:  # a reply that cannot be written: the client learns that, the loop why
            asyncio.get_running_loop().call_exception_handler({"message": "unusable reply", "exception": error})
            parts = problem_parts(RemoteError(FAILED))
        if parts is None:
            return
        if isinstance(parts, Shown):
            await self._show(parts, scope, send)
            return
        status, lines, body = parts
        if upgrade or self.draining:
            lines.append(CLOSE)
        transport: _Joined = scope["state"]["connection"].transport
        transport.hold()
        try:
            await send({"type": "http.response.start", "status": status, "headers": lines})
            await send({"type": "http.response.body", "body": body})
        finally:
            transport.release()

    async def _show(self, page: Shown, scope: _Scope, send: _Send) -> None:
        """A page, whole or in pieces as they come, for as long as the client is there."""
        lines = [(b"content-type", page.media_type.encode()), (b"cache-control", b"no-store")]
        whole = page.body if isinstance(page.body, bytes) else b""
        if isinstance(page.body, bytes):
            lines.append((b"content-length", str(len(whole)).encode()))
        if self.draining:
            lines.append(CLOSE)
        await send({"type": "http.response.start", "status": page.status, "headers": lines})
        if not isinstance(page.body, bytes):
            async with aclosing(page.body) as pieces:
                async for piece in pieces:
                    if scope["method"] == "HEAD" or scope["state"]["connection"].transport.is_closing():
                        break
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": whole})

    async def _answer(self, scope: _Scope, headers: dict[str, str], receive: _Receive) -> ResponseParts | Shown | None:
        """None where the client left before its request was whole, or before it was begun."""
        if declared_length(headers) > self.max_body:
            return self._too_large(headers)
        event = await receive()
        body: bytes = event.get("body", b"")
        if event.get("more_body"):
            whole = bytearray(body)
            while event.get("more_body") and len(whole) <= self.max_body:
                event = await receive()
                whole += event.get("body", b"")
            body = bytes(whole)
        if event["type"] != "http.request":
            return None
        if len(body) > self.max_body:
            return self._too_large(headers)
        if "upgrade" in headers and ("content-length" in headers or "transfer-encoding" in headers):
            return problem_parts(InvalidMessage("Upgrade is not offered here: send the request without it"), 400)
        method: str = scope["method"]
        path: str = scope["raw_path"].decode()
        query: bytes = scope["query_string"]
        target = f"{path}?{query.decode('latin-1')}" if query else path
        if len(target) > MAX_PATH:
            return problem_parts(TooLarge(f"the path and its query have more than {MAX_PATH} bytes"), 414)
        try:
            route, parameters = self._router.find(method, path, headers.get("quintet-operation", ""))
        except NotRouted as no:
            page = self._carrier.pages.get(path) if method in {"GET", "HEAD"} else None
            return self._unrouted(method, path, no) if page is None else await page(headers)
        if route.stopping and not self.draining:  # while all drains, what is half read still comes in
            return problem_parts(Unavailable(f"{path!r} is being stopped here; the request was not begun"))
        connection = scope["state"]["connection"]
        headers[":method"] = method
        headers[":path"] = target
        if parameters:
            headers.update(parameters)
        try:
            message = read_request(route.channel, headers, body, self.clock.now(), connection.peer)
        except InvalidMessage as error:
            return problem_parts(error, 400)
        gate, requests = route.gate, route.requests
        if len(requests) >= gate.limit + WAITING:
            return problem_parts(Overloaded(f"{WAITING} requests wait for {route.route}; this one was not begun"))
        task = asyncio.current_task(connection.loop)
        assert task is not None, "uvicorn runs each request in a task"  # noqa: S101
        requests[task] = connection
        try:
            if gate.busy < gate.limit:
                gate.busy += 1
            else:
                await gate.enter()
            try:
                if connection.transport.is_closing():  # nobody waits for it any more
                    return None
                verdict = await route.receive(message)
            finally:
                gate.leave()
        finally:
            del requests[task]
        if isinstance(verdict, Done):
            return response_parts(verdict.reply)
        return problem_parts(RemoteError(FAILED, correlation_id=message.id))

    def _too_large(self, headers: dict[str, str]) -> ResponseParts:
        """Answered at once, while uvicorn drops the rest of the body; who asked before sending one need not send it."""
        error = TooLarge(f"the body has more than the {self.max_body} bytes that are taken here")
        return problem_parts(error, 413, *([CLOSE] if "expect" in headers else []))

    def _unrouted(self, method: str, path: str, no: NotRouted) -> ResponseParts:
        if method in {"GET", "HEAD"} and path in {"/health/live", "/health/ready"}:
            draining = path == "/health/ready" and any(route.stopping for route in self.routes)
            body = msgspec.json.encode({"status": "draining" if draining else path.removeprefix("/health/")})
            headers = {":status": "503" if draining else "200"}
            return response_parts(
                Message(channel=Channel(path), body=body, media_type="application/json", headers=headers)
            )
        if method == "OPTIONS" and no.allow:
            return response_parts(Message(channel=Channel(path), headers={"allow": no.allow}))
        return problem_parts(no.error, no.status, *([(b"allow", no.allow.encode())] if no.allow else []))

    # the connections

    @property
    def connections(self) -> list[_Connection]:
        return [connection for connection in self.state.connections if isinstance(connection, _Connection)]

    def made(self) -> None:
        if self._sweeping is None:
            self._sweep()

    def lost(self) -> None:
        if not self.state.connections:
            self._emptied.set()

    def _sweep(self) -> None:
        """One timer for all connections, as long as there are any."""
        now = self.clock.now()
        self.state.default_headers = [(b"date", formatdate(self.clock.wall(), usegmt=True).encode())]
        for connection in self.connections:
            connection.expire(now - self._request_timeout)
        self._sweeping = self.clock.call_at(now + SWEEP, self._sweep) if self.state.connections else None

    async def drain_if_all_stop(self) -> None:
        if all(route.stopping for route in self.routes):
            if self._drained is None:
                self._drained = asyncio.get_running_loop().create_task(self._drain())
            await asyncio.shield(self._drained)

    async def _drain(self) -> None:
        """As uvicorn's Server.shutdown: no time-out but for what is half read, since nothing in work is cut off."""
        self.draining = True
        if self._listener is not None:
            self._listener.close()
        await asyncio.sleep(0)  # what has arrived by now is read, and counts as in flight
        for connection in self.connections:
            connection.shutdown()
        grace = self.clock.call_at(self.clock.now() + GRACE, self._end_grace)
        try:
            await self._empty()
        finally:
            grace.cancel()

    def _end_grace(self) -> None:
        for connection in self.connections:
            connection.expire(self.clock.now())

    async def _empty(self) -> None:
        while self.state.connections:
            self._emptied.clear()
            await self._emptied.wait()

    def abort(self) -> None:
        for connection in self.connections:
            connection.transport.abort()

    async def close(self) -> None:
        """Cuts off what is not stopped."""
        if self._listener is not None:
            self._listener.close()
        self.abort()
        await _cancel(self.state.tasks)
        for route in list(self.routes):
            self.remove(route)
        await self._empty()
        if self._drained is not None:
            self._drained.cancel()
        if self._sweeping is not None:
            self._sweeping.cancel()


class _Joined:
    """uvicorn writes a head and its body one after the other: joined they cost one system call, not two."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held: list[bytes] | None = None
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def hold(self) -> None:
        self._held = []

    def release(self) -> None:
        held, self._held = self._held, None
        if held:
            self._transport.write(b"".join(held))

    def write(self, data: bytes) -> None:
        if self._held is None:
            self._transport.write(data)
        else:
            self._held.append(data)

    def close(self) -> None:
        self.release()
        self._transport.close()


class _Connection(HttpToolsProtocol):
    """uvicorn's connection with the bounds that it lacks, on the size of what is no body and on a client's time."""

    cycle: Any  # None before the first request

    def __init__(self, server: _Server, config: uvicorn.Config, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(config, server.state, {"connection": self}, loop)
        self.logger, self.access_log = LOG, False
        self._owner = server
        self._now = server.clock.now
        self._refused = False
        self._headed: Any = None  # the scope of the last request whose head is whole
        self._frame = 0  # bytes that have come since the last head or piece of a body
        self._reading_since: float | None = None  # the request that is being read, or the first that is awaited
        self._writing_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, _Joined(transport)))
        self.peer = (Peer(self.client[0] if self.client else "", self.scheme or "http"),)
        self._reading_since = self._now()
        self._owner.made()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.app_state.clear()  # else it would hold itself
        self._owner.lost()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._frame += len(data)
        # in the server's context: a handler that had reading resumed left its own behind
        self._owner.context.run(super().data_received, data)
        cycle = self.cycle
        if cycle is not None and not (cycle.more_body or cycle.response_complete) and self.scope is self._headed:
            self._frame, self._reading_since = 0, None
            return
        if self._reading_since is None:
            self._reading_since = self._now()
        if self._frame > MAX_HEAD:
            self._refuse_frame()

    @property
    def _in_head(self) -> bool:
        return self.scope is not self._headed

    def on_headers_complete(self) -> None:
        if self._frame > MAX_HEAD and len(self.url) + sum(4 + len(n) + len(v) for n, v in self.headers) > MAX_HEAD:
            self._refuse_frame()
            raise httptools.HttpParserError
        before = self.cycle
        super().on_headers_complete()
        self._headed, self._frame = self.scope, 0
        self.headers = []  # not the scope's any more: trailers are nobody's
        if self.pipeline:  # it begins where the one before ends, and not in the context of that
            before.on_response = partial(self._owner.context.run, before.on_response)

    def on_body(self, body: bytes) -> None:
        self._frame = 0
        super().on_body(body)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing_since = self._now()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._writing_since = None

    # ending

    def _refuse_frame(self) -> None:
        if not self._in_head:
            self._refuse(TooLarge(f"there are more than {MAX_HEAD} bytes around the body"), 400)
        elif self.headers:
            self._refuse(TooLarge(f"the headers of a request may have {MAX_HEAD} bytes"), 431)
        else:
            self._refuse(TooLarge(f"the path of a request may have {MAX_HEAD} bytes"), 414)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        self._refuse(InvalidMessage("this is no HTTP/1.1 request"), 400)

    def _refuse(self, error: CallError, status: int) -> None:
        """What came is no request: says so, unless answers to good ones before it are still due, and ends."""
        if self._refused or self.transport.is_closing():
            return
        if self._answers_due():
            self.cycle.keep_alive = False
            return
        self._refused = True
        status, headers, body = problem_parts(error, status, *self.server_state.default_headers, CLOSE)
        lines = b"".join(b"%b: %b\r\n" % line for line in headers)
        self.transport.write(STATUS_LINE[status] + lines + b"\r\n" + body)
        if self.transport.can_write_eof():  # to close while the client still writes would take the answer from it
            self.transport.write_eof()
        else:
            self.transport.close()

    def _answers_due(self) -> bool:
        cycle = self.cycle
        return bool(self.pipeline) or (cycle is not None and not cycle.response_complete and not cycle.more_body)

    def eof_received(self) -> bool:  # type: ignore[override]
        """A client may close its half once its request is whole, and still read the answer."""
        if not self._answers_due() or self.scheme == "https":
            return False
        self.cycle.keep_alive = False
        return True

    def shutdown(self) -> None:
        """The server stops: ends at once where nothing is in flight; what is half read has its grace."""
        if not self._in_head or self._answers_due():
            super().shutdown()

    def expire(self, before: float) -> None:
        """Hangs up on a client that has been sending its request, or reading its answer, since `before`."""
        if self._writing_since is not None:
            if self._writing_since <= before:
                self.transport.abort()
        elif self._reading_since is not None and self._reading_since <= before and not self.flow.read_paused:
            if self._in_head or (self.cycle is not None and not self.cycle.response_complete):
                self._refuse(InvalidMessage("the request was not whole in time"), 408)
            if not self._answers_due():
                self.transport.close()
