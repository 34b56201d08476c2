"""HTTP/1.1: uvicorn's connection inside the service's own loop, and a pool of keep-alive connections on httptools.

Options of an address: `max_body` (bytes of a body, both ways), `request_timeout` (seconds a client may take to send a
request or to read its answer), `keep_alive` (seconds a served connection may idle), `connections` (how many a client
opens at most), `ca` (a file of certificates to trust), `cert` and `key` (what an https server shows).
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from email.utils import formatdate
from typing import Any, Final
from urllib.parse import quote

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from quintet.clock import SYSTEM, Clock, Handle
from quintet.errors import (
    AddressError,
    CallError,
    ConnectionLost,
    InvalidMessage,
    RemoteError,
    TooLarge,
    TransportError,
    Unavailable,
)
from quintet.message import Channel, Message
from quintet.transport import Address, Done, Receive, Serving, Trait, Transport, Verdict, parse_address
from quintet.wire.http import (
    MalformedHTTP,
    NotRouted,
    RawHeaders,
    Response,
    ResponseParser,
    Router,
    read_headers,
    read_request,
    read_response,
    request_bytes,
    route_of,
    split_route,
    write_problem,
    write_response,
)

MAX_BODY: Final = 4 * 1024 * 1024  # bytes; what gRPC allows too
MAX_HEAD: Final = 32 * 1024
MAX_PATH: Final = 8 * 1024
IDLE: Final = 4.0  # seconds; below the 5 after which most servers close an idle connection
GRACE: Final = 5.0  # seconds that a request which is half read may still take when the server stops
CLOSE: Final = (b"connection", b"close")

_SILENT = logging.Logger("quintet.http", logging.CRITICAL)  # a transport never logs; uvicorn would
_SILENT.disabled = True


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
        self.max_body = int(address.option("max_body", MAX_BODY))
        self._pool = _Pool(self)
        self._server = _Server(self)

    async def open(self) -> None:
        self._pool.open()

    async def send(self, message: Message) -> Message | None:
        pool = self._pool
        request = request_bytes(message, pool.host, self.prefix, self.clock.now())
        connection = pool.take() or await pool.acquire()
        return read_response(await connection.exchange(request, message.headers.get(":method", "")), message)

    async def serve(self, channel: Channel, receive: Receive, group: str, limit: int = 100) -> Serving:  # noqa: ARG002
        return self._server.add(channel, receive, limit)

    async def ready(self) -> None:
        if self._server.routes and not self._server.listening:
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
        self.limit = int(address.option("connections", 1000))
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

_Scope = MutableMapping[str, Any]
_Events = Callable[[], Awaitable[Any]]
_Send = Callable[[Any], Awaitable[None]]
_Parts = tuple[int, RawHeaders, bytes]


class _Route:
    """One channel being served: hands over at most `limit` requests at once, the others wait in order."""

    def __init__(self, server: _Server, channel: Channel, receive: Receive, limit: int, route: str) -> None:
        self.channel, self.route = channel, route
        self.stopping = False
        self._server, self._receive, self._limit = server, receive, limit
        self._in_work = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._idle = asyncio.Event()
        self._idle.set()

    async def deliver(self, message: Message) -> Verdict:
        if self._in_work < self._limit:
            if not self._in_work:
                self._idle.clear()
            self._in_work += 1
        else:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._leave()
                raise
        try:
            return await self._receive(message)
        finally:
            self._leave()

    def _leave(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._in_work -= 1
        if not self._in_work:
            self._idle.set()

    async def stop(self) -> None:
        if not self.stopping:
            self.stopping = True
            try:
                await self._server.drain_if_all_stop()
                await self._idle.wait()
            except asyncio.CancelledError:
                self._server.impatient = True
                raise
            self._server.remove(self)


class _Server:
    """All that is served at one address: an ASGI application for uvicorn's connections."""

    def __init__(self, carrier: Carrier) -> None:
        address = carrier.address
        self.clock, self.max_body = carrier.clock, carrier.max_body
        self.request_timeout = address.option("request_timeout", 30.0)
        self.keep_alive = address.option("keep_alive", 60.0)
        self.router: Router[_Route] = Router()
        self.routes: set[_Route] = set()
        self.state = ServerState()
        self.listening = self.draining = False
        self.impatient = False  # somebody gave up waiting for what is in work
        self._carrier = carrier
        self._listener: asyncio.Server | None = None
        self._drained: asyncio.Task[None] | None = None
        self._emptied = asyncio.Event()
        self._sweeping: Handle | None = None
        self._date = (0, (b"date", b""))

    def add(self, channel: Channel, receive: Receive, limit: int) -> _Route:
        method, path, operation = split_route(route_of(channel))
        text = f"{method} {self._carrier.prefix}{path}" + (f"#{operation}" if operation else "")
        route = _Route(self, channel, receive, limit, text)
        try:
            self.router.add(text, route)
        except ValueError as error:
            raise AddressError(f"{self._carrier.address}: {channel.name}: {error}") from None
        self.routes.add(route)
        return route

    def remove(self, route: _Route) -> None:
        if route in self.routes:
            self.routes.remove(route)
            self.router.remove(route.route)

    async def listen(self) -> int:
        """Starts listening and returns the port. Raises TransportError and AddressError."""
        address = self._carrier.address
        config = uvicorn.Config(
            self.respond,
            http=_Connection,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            proxy_headers=False,
            workers=1,
            timeout_keep_alive=self.keep_alive,  # type: ignore[arg-type]  # handed to call_later as it is
        )
        config.load()
        loop = asyncio.get_running_loop()
        port = address.port if address.port is not None else (443 if self._carrier.secure else 80)
        try:
            self._listener = await loop.create_server(
                lambda: _Connection(self, config, loop), address.host, port, ssl=self._context(), backlog=2048
            )
        except OSError as error:
            raise TransportError(f"{address}: cannot listen there: {error.strerror or error}") from error
        self.listening = True
        return int(self._listener.sockets[0].getsockname()[1])

    def _context(self) -> ssl.SSLContext | None:
        if not self._carrier.secure:
            return None
        address = self._carrier.address
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(address.options["cert"], address.options.get("key"))
        except KeyError:
            raise AddressError(f"{address}: to serve https, name the certificate's file: ?cert=...&key=...") from None
        except OSError as error:
            raise AddressError(f"{address}: cannot use its certificate or key: {error}") from None
        return context

    # a request, from the first byte to the last of its answer

    async def respond(self, scope: _Scope, receive: _Events, send: _Send) -> None:
        """The ASGI application."""
        try:
            parts = await self._answer(scope, receive)
        except Exception as error:  # the verdict cannot be written: the client learns that it failed, the loop why
            asyncio.get_running_loop().call_exception_handler({"message": "unusable reply", "exception": error})
            parts = write_problem(_FAILED)
        if parts is None:
            return
        status, headers, body = parts
        headers.append(self._now())
        if self.draining:
            headers.append(CLOSE)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: _Scope, receive: _Events) -> _Parts | None:
        """Status, headers and body; None where the client left before its request was whole."""
        headers = read_headers(scope["headers"])
        length = int(headers.get("content-length", 0))
        if length > self.max_body and (length > 8 * self.max_body or "expect" in headers):
            return write_problem(self._too_large(), 413, CLOSE)  # nothing of it is read
        event = await receive()
        body = event.get("body", b"")
        if event.get("more_body", False):
            chunks, size = [body], len(body)
            while event.get("more_body", False):
                event = await receive()
                size += len(event.get("body", b""))
                if size <= self.max_body:
                    chunks.append(event.get("body", b""))
                elif size > 8 * self.max_body:
                    return write_problem(self._too_large(), 413, CLOSE)
            if size > self.max_body:  # read to its end: a client that still writes would not read the answer
                return write_problem(self._too_large())
            body = b"".join(chunks)
        if event["type"] != "http.request":
            return None
        if len(body) > self.max_body:
            return write_problem(self._too_large())
        if len(body) < length:
            return write_problem(InvalidMessage("the body did not come: this server offers no Upgrade"), 400, CLOSE)
        method: str = scope["method"]
        path: str = scope["raw_path"].decode("ascii")
        query: bytes = scope["query_string"]
        if len(path) + len(query) > MAX_PATH:
            return write_problem(TooLarge(f"the path and its query have more than {MAX_PATH} bytes"), 414)
        try:
            route, parameters = self.router.find(method, path, headers.get("quintet-operation", ""))
        except NotRouted as no:
            return self._unrouted(method, path, no)
        if route.stopping and not self.draining:
            return write_problem(Unavailable(f"{path!r} is being stopped here; it was not begun"))
        headers[":method"] = method
        headers[":path"] = f"{path}?{query.decode('ascii')}" if query else path
        if parameters:
            headers.update(parameters)
        try:
            message = read_request(route.channel, headers, body, self.clock.now())
        except InvalidMessage as error:
            return write_problem(error, 400)
        verdict = await route.deliver(message)
        if isinstance(verdict, Done):
            return write_response(verdict.reply)
        return write_problem(RemoteError(str(_FAILED), correlation_id=message.id))

    def _unrouted(self, method: str, path: str, no: NotRouted) -> _Parts:
        if method in {"GET", "HEAD"} and path in {"/health/live", "/health/ready"}:
            draining = self.draining or any(route.stopping for route in self.routes)
            word = "live" if path == "/health/live" else "draining" if draining else "ready"
            body = b'{"status":"%s"}' % word.encode()
            headers: RawHeaders = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
            return 503 if word == "draining" else 200, headers, body
        allow = (b"allow", no.allow.encode())
        if method == "OPTIONS" and no.allow:
            return 204, [allow], b""
        return write_problem(no.error, no.status, *([allow] if no.allow else []))

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body has more than the {self.max_body} bytes that are taken here")

    def _now(self) -> tuple[bytes, bytes]:
        second = int(self.clock.wall())
        if second != self._date[0]:
            self._date = (second, (b"date", formatdate(second, usegmt=True).encode()))
        return self._date[1]

    # the connections

    def watch(self) -> None:
        """Looks after the connections once a second, as long as there are any: one timer for all of them."""
        if self._sweeping is None:
            self._sweeping = self.clock.call_at(self.clock.now() + 1.0, self._sweep)

    def _sweep(self) -> None:
        self._sweeping = None
        before = self.clock.now() - self.request_timeout
        for connection in self._connections():
            connection.expire(before)
        if self.state.connections:
            self.watch()

    def _connections(self) -> list[_Connection]:
        return [c for c in self.state.connections if isinstance(c, _Connection)]

    def lost(self) -> None:
        if not self.state.connections:
            self._emptied.set()

    async def drain_if_all_stop(self) -> None:
        if all(route.stopping for route in self.routes):
            if self._drained is None:
                self._drained = asyncio.get_running_loop().create_task(self._drain())
            await asyncio.shield(self._drained)

    async def _drain(self) -> None:
        self.draining = True
        if self._listener is not None:
            self._listener.close()
        await asyncio.sleep(0)  # what has arrived by now is read, and counts as in flight
        for connection in self._connections():
            connection.shutdown()
        grace = self.clock.call_at(self.clock.now() + GRACE, self._end_grace)
        try:
            while self.state.connections:
                self._emptied.clear()
                await self._emptied.wait()
            while self.state.tasks:  # of clients that left
                await asyncio.wait(self.state.tasks)
        finally:
            grace.cancel()

    def _end_grace(self) -> None:
        for connection in self._connections():
            connection.expire(self.clock.now())

    async def close(self) -> None:
        """Stops what is not stopped yet. Cuts off what is left where it, or a `stop` before it, is cancelled."""
        try:
            if not self.impatient:
                await asyncio.gather(*(route.stop() for route in self.routes))
                await self.drain_if_all_stop()
        finally:
            if self._drained is not None:
                self._drained.cancel()
            if self._listener is not None:
                self._listener.close()
            if self._sweeping is not None:
                self._sweeping.cancel()
            for connection in self._connections():
                connection.transport.abort()
            for task in self.state.tasks:
                task.cancel()
            await asyncio.gather(*self.state.tasks, return_exceptions=True)


_FAILED = RemoteError("the service failed; its log says why")


class _Connection(HttpToolsProtocol):
    """uvicorn's connection, with bounds on the size and the time of a request, and answers in our form."""

    def __init__(self, server: _Server, config: uvicorn.Config, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(config, server.state, {}, loop)
        self.cycle: Any  # None before the first request
        self.logger, self.access_log = _SILENT, False
        self._owner = server
        self._heads = 0  # that were whole
        self._in_head, self._head_size = True, 0
        self._reading_since: float | None = None  # what it waits for: a request, or to be read
        self._writing_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._reading_since = self._owner.clock.now()
        self._owner.watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._owner.lost()

    def data_received(self, data: bytes) -> None:
        if self._reading_since is None:
            self._reading_since = self._owner.clock.now()
        while self._in_head and len(data) > MAX_HEAD - self._head_size:
            heads, room = self._heads, MAX_HEAD - self._head_size
            super().data_received(data[:room])
            if self.transport.is_closing():
                return
            if self._heads == heads:
                what, status = ("headers", 431) if self.headers else ("path", 414)
                self._refuse(TooLarge(f"the {what} of a request may have {MAX_HEAD} bytes"), status)
                return
            data = data[room:]
        if self._in_head:
            self._head_size += len(data)
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._heads += 1
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head, self._head_size = True, 0
        self._reading_since = None
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        self._refuse(InvalidMessage("this is no HTTP/1.1 request"), 400)

    def _refuse(self, error: CallError, status: int) -> None:
        """Answers what never became a request, and hangs up."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and not cycle.more_body:
            cycle.keep_alive = False  # a good request came before: its answer goes out, then it ends
            self.flow.pause_reading()
            return
        status, headers, body = write_problem(error, status, self._owner._now(), CLOSE)
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(b"HTTP/1.1 %d \r\n%b\r\n%b" % (status, lines, body))
        self.transport.close()

    def eof_received(self) -> bool:  # type: ignore[override]
        """A client may close its half once its request is whole, and still read the answer."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body or self.scheme == "https":
            return False
        cycle.keep_alive = False
        return True

    def pause_writing(self) -> None:
        self._writing_since = self._owner.clock.now()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._writing_since = None
        super().resume_writing()

    def shutdown(self) -> None:
        """The server stops: ends at once where nothing is in flight, else after the answer."""
        if self._in_head and self._head_size and (self.cycle is None or self.cycle.response_complete):
            return  # half a head is there: it has its grace
        super().shutdown()

    def expire(self, before: float) -> None:
        """Hangs up on a client that has been sending its request, or reading its answer, since `before`."""
        if self._writing_since is not None and self._writing_since <= before:
            self.transport.abort()
        elif self._reading_since is not None and self._reading_since <= before:
            if self._head_size or not self._in_head:
                self._refuse(InvalidMessage("the request was not whole in time"), 408)
            else:
                self.transport.close()
