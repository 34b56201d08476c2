"""HTTP/1.1 on httptools, the parser of uvicorn: a server inside the service's own loop, and a pool of connections.

uvicorn's own connection was tried: its ASGI cycle costs as much again as all of this, a head may be endless in it and
a slow client stay for ever. granian, embedded, costs twice what uvicorn does.

Options of an address: `max_body` (bytes of a body, both ways), `request_timeout` (seconds a client may take to send a
request or to read its answer), `keep_alive` (seconds a served connection may idle), `connections` (how many a client
opens at most), `ca` (a file of certificates to trust), `cert` and `key` (what an https server shows).
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from email.utils import formatdate
from typing import Final
from urllib.parse import quote

import httptools
import msgspec

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
    SPARSE,
    MalformedHTTP,
    NotRouted,
    Response,
    ResponseParser,
    Router,
    add_header,
    problem_bytes,
    read_request,
    read_response,
    request_bytes,
    response_bytes,
    route_of,
    split_route,
)
from quintet.workers import Workers

MAX_BODY: Final = 4 * 1024 * 1024  # bytes; what gRPC allows too
MAX_HEAD: Final = 32 * 1024
MAX_PATH: Final = 8 * 1024
IDLE: Final = 4.0  # seconds; below the 5 after which most servers close an idle connection
SWEEP: Final = 1.0  # seconds between two looks at slow and idle clients
PATIENCE: Final = 8  # times max_body that is read and dropped, so that the client comes to read its 413
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

FAILED: Final = "the service failed; its log says why"
_Delivery = tuple[Message, "_Connection"]
_Request = tuple[str, str, dict[str, str], bytes | None, bool]
"""Method, target, headers, body (None: too large) and whether the connection stays."""


class _Route:
    """One channel being served."""

    def __init__(self, server: _Server, channel: Channel, receive: Receive, limit: int, route: str) -> None:
        self.channel, self.route = channel, route
        self.stopping = False
        self._server, self._receive = server, receive
        self._waiting: deque[_Delivery] = deque()
        self._unsettled = 0
        self._settled = asyncio.Event()
        self._settled.set()
        self._workers: Workers[_Delivery] = Workers(self._take, self._work, limit)

    def __repr__(self) -> str:
        return f"<serving {self.route}: {self._workers!r}>"

    @property
    def takes(self) -> bool:
        """While the whole server drains, what is half read still comes in."""
        return not self.stopping or (self._server.draining and not self._workers.stopped)

    def put(self, message: Message, connection: _Connection) -> None:
        self._waiting.append((message, connection))
        self._unsettled += 1
        if self._unsettled == 1:
            self._settled.clear()
        self._workers.wake()

    def _take(self) -> _Delivery | None:
        while self._waiting:
            delivery = self._waiting.popleft()
            if not delivery[1].is_closing():
                if self._waiting:
                    self._workers.wake()
                return delivery
            self._settle()  # nobody waits for it any more
        return None

    async def _work(self, delivery: _Delivery) -> None:
        message, connection = delivery
        try:
            connection.settle(message, await self._receive(message))
        except BaseException:
            connection.abort()
            raise
        finally:
            self._settle()

    def _settle(self) -> None:
        self._unsettled -= 1
        if not self._unsettled:
            self._settled.set()

    async def stop(self) -> None:
        """Ends listening, when all at this address stop. Where this is cancelled, what is in work is cut off."""
        self.stopping = True
        try:
            await asyncio.sleep(0)  # who stops a whole service stops its channels at once: they drain as one
            await self._server.drain_if_all_stop()
            await self._settled.wait()
            await self._workers.drain()
        except asyncio.CancelledError:
            await self.cancel()
            if self._server.draining:
                self._server.abort()
            raise
        self._server.remove(self)

    async def cancel(self) -> None:
        self._server.remove(self)
        while self._waiting:
            self._waiting.popleft()[1].abort()
            self._settle()
        await self._workers.cancel()


class _Server:
    """All that is served at one address."""

    def __init__(self, carrier: Carrier) -> None:
        address = carrier.address
        self.clock, self.max_body = carrier.clock, carrier.max_body
        self.request_timeout = address.option("request_timeout", 30.0)
        self.keep_alive = address.option("keep_alive", 60.0)
        self.routes: set[_Route] = set()
        self.connections: set[_Connection] = set()
        self.listening = self.draining = False
        self._carrier = carrier
        self._router: Router[_Route] = Router()
        self._listener: asyncio.Server | None = None
        self._drained: asyncio.Task[None] | None = None
        self._emptied = asyncio.Event()
        self._sweeping: Handle | None = None
        self._second, self._date = 0, ""

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
        address = self._carrier.address
        port = address.port if address.port is not None else (443 if self._carrier.secure else 80)
        context = self._context()
        try:
            self._listener = await asyncio.get_running_loop().create_server(
                lambda: _Connection(self), address.host, port, ssl=context, backlog=2048
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

    @property
    def date(self) -> str:
        second = int(self.clock.wall())
        if second != self._second:
            self._second, self._date = second, formatdate(second, usegmt=True)
        return self._date

    def begin(self, connection: _Connection, method: str, target: str, headers: dict[str, str], body: bytes) -> None:
        """A whole request has come: to its route, or answered at once where it has none."""
        if target[0] != "/":  # the absolute form of RFC 9112, section 3.2.2
            target = "/" + target.partition("://")[2].partition("/")[2]
        path = target.partition("?")[0]
        if not target.isascii() or "#" in target:
            connection.refuse(InvalidMessage("the path must be percent-encoded"), 400)
            return
        if len(target) > MAX_PATH:
            connection.refuse(TooLarge(f"the path and its query have more than {MAX_PATH} bytes"), 414)
            return
        try:
            route, parameters = self._router.find(method, path, headers.get("quintet-operation", ""))
        except NotRouted as no:
            self._unrouted(connection, method, path, no)
            return
        if not route.takes:
            connection.refuse(Unavailable(f"{path!r} is being stopped here; the request was not begun"))
            return
        headers[":method"] = method
        headers[":path"] = target
        if parameters:
            headers.update(parameters)
        try:
            message = read_request(route.channel, headers, body, self.clock.now())
        except InvalidMessage as error:
            connection.refuse(error, 400)
            return
        route.put(message, connection)

    def _unrouted(self, connection: _Connection, method: str, path: str, no: NotRouted) -> None:
        if method in {"GET", "HEAD"} and path in {"/health/live", "/health/ready"}:
            draining = path == "/health/ready" and any(route.stopping for route in self.routes)
            state = {"status": "draining" if draining else path.removeprefix("/health/")}
            connection.answer(
                Message(
                    channel=Channel(path),
                    body=msgspec.json.encode(state),
                    media_type="application/json",
                    headers={":status": "503" if draining else "200"},
                )
            )
        elif method == "OPTIONS" and no.allow:
            connection.answer(Message(channel=Channel(path), headers={"allow": no.allow}))
        else:
            connection.refuse(no.error, no.status, f"allow: {no.allow}" if no.allow else "")

    # the connections

    def made(self, connection: _Connection) -> None:
        self.connections.add(connection)
        if self._sweeping is None:
            self._sweeping = self.clock.call_at(self.clock.now() + SWEEP, self._sweep)

    def lost(self, connection: _Connection) -> None:
        self.connections.discard(connection)
        if not self.connections:
            self._emptied.set()

    def _sweep(self) -> None:
        """One timer for all connections, as long as there are any."""
        now = self.clock.now()
        for connection in list(self.connections):
            connection.expire(now - self.request_timeout, now - self.keep_alive)
        self._sweeping = self.clock.call_at(now + SWEEP, self._sweep) if self.connections else None

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
        for connection in list(self.connections):
            connection.drain()
        grace = self.clock.call_at(self.clock.now() + GRACE, self._end_grace)
        try:
            while self.connections:
                self._emptied.clear()
                await self._emptied.wait()
        finally:
            grace.cancel()

    def _end_grace(self) -> None:
        now = self.clock.now()
        for connection in list(self.connections):
            connection.expire(now, now)

    def abort(self) -> None:
        for connection in list(self.connections):
            connection.abort()

    async def close(self) -> None:
        """Cuts off what is not stopped."""
        if self._listener is not None:
            self._listener.close()
        await asyncio.gather(*(route.cancel() for route in list(self.routes)))
        self.abort()
        while self.connections:
            self._emptied.clear()
            await self._emptied.wait()
        if self._drained is not None:
            self._drained.cancel()
        if self._sweeping is not None:
            self._sweeping.cancel()


class _Connection(asyncio.Protocol):
    """One client's connection: its requests are begun one after the other, each when the one before is answered."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._now = server.clock.now
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        # the request that is being read
        self._in_head, self._head_size, self._heads = True, 0, 0  # the last: how many heads were whole
        self._reading_since: float | None = None
        self._url = b""
        self._headers: dict[str, str] = {}
        self._chunks: list[bytes] = []
        self._size = self._fed = 0  # of its body, and of all that came behind its head
        # the request that is being answered, and the whole ones behind it
        self._busy = self._keep_alive = self._head_only = False
        self._pending: deque[_Request] = deque()
        self._last = self._paused = False  # nothing is read any more, or for the moment
        self._idle_since = 0.0
        self._writing_since: float | None = None

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def abort(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._reading_since = self._now()
        self._server.made(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._pending.clear()
        self._server.lost(self)

    # reading

    def data_received(self, data: bytes) -> None:
        if self._last:
            return
        if self._reading_since is None:
            self._reading_since = self._now()
        while self._in_head and len(data) > MAX_HEAD - self._head_size:
            heads, room = self._heads, MAX_HEAD - self._head_size
            self._feed(data[:room])
            if self._heads == heads:
                what, status = ("headers", 431) if self._headers else ("path", 414)
                self._hang_up(TooLarge(f"the {what} of a request may have {MAX_HEAD} bytes"), status)
            if self._last:
                return
            data = data[room:]
        if self._in_head:
            self._head_size += len(data)
            self._feed(data)
        else:
            self._fed += len(data)
            self._feed(data)
            if not self._in_head and self._fed > MAX_HEAD + SPARSE * self._size:
                self._hang_up(TooLarge(f"there are more than {MAX_HEAD} bytes around the body"), 400)

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._last = True  # not offered: the request is answered as it is, and the rest is not for us
        except httptools.HttpParserCallbackError:
            raise
        except httptools.HttpParserError as error:
            self._hang_up(InvalidMessage(f"this is no HTTP/1.1 request: {error}"), 400)

    def on_message_begin(self) -> None:
        self._url, self._headers, self._chunks, self._size = b"", {}, [], 0

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # trailers are nobody's
            add_header(self._headers, name, value)

    def on_headers_complete(self) -> None:
        self._heads += 1
        self._in_head, self._fed = False, 0
        expected = "expect" in self._headers
        if expected or "content-length" in self._headers:
            size, limit = int(self._headers.get("content-length", 0)), self._server.max_body
            if size > limit and (expected or size > PATIENCE * limit):
                self._hang_up(self._too_large(), 413)
            elif expected and not self._busy and not self._last:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        if self._size <= self._server.max_body:
            self._chunks.append(body)
        elif self._size > PATIENCE * self._server.max_body:
            self._hang_up(self._too_large(), 413)

    def on_message_complete(self) -> None:
        self._in_head, self._head_size = True, 0
        self._reading_since = None
        if self._last:
            return
        upgrade = self._parser.should_upgrade()
        if upgrade and ("content-length" in self._headers or "transfer-encoding" in self._headers):
            self._hang_up(InvalidMessage("Upgrade is not offered here: send the request without it"), 400)
            return
        body = None if self._size > self._server.max_body else b"".join(self._chunks)
        keep_alive = self._parser.should_keep_alive() and not upgrade
        method = self._parser.get_method().decode()
        request = method, self._url.decode("latin-1"), self._headers, body, keep_alive
        if self._busy or self._pending or self._writing_since is not None:
            self._pending.append(request)
            self._pause()
        else:
            self._begin(request)

    def _begin(self, request: _Request) -> None:
        method, target, headers, body, self._keep_alive = request
        self._busy, self._head_only = True, method == "HEAD"
        if body is None:  # it was read to its end: who still writes would not read the answer
            self.refuse(self._too_large())
        else:
            self._server.begin(self, method, target, headers, body)

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body has more than the {self._server.max_body} bytes that are taken here")

    # answering

    def settle(self, message: Message, verdict: Verdict) -> None:
        if not isinstance(verdict, Done):
            self.refuse(RemoteError(FAILED, correlation_id=message.id))
            return
        try:
            self.answer(verdict.reply)
        except ValueError as error:  # a reply that cannot be written: the client learns that, the loop why
            self._loop.call_exception_handler({"message": f"{message!r}: unusable reply", "exception": error})
            self.refuse(RemoteError(FAILED, correlation_id=message.id))

    def answer(self, reply: Message | None) -> None:
        """The answer to the request that was begun. Raises ValueError where it cannot stand in HTTP."""
        close = self._closes()
        self._send(response_bytes(reply, self._server.date, close, self._head_only), close)

    def refuse(self, error: CallError, status: int = 0, line: str = "") -> None:
        close = self._closes()
        self._send(problem_bytes(error, status, line, self._server.date, close, self._head_only), close)

    def _closes(self) -> bool:
        return not self._keep_alive or (not self._pending and (self._last or self._server.draining))

    def _send(self, response: bytes, close: bool) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(response)
        self._busy = False
        if close:
            self._linger() if self._reading_since is not None else self._transport.close()
        elif self._pending or self._paused:
            self._loop.call_soon(self._advance)  # not at once: a row of refusals would recurse
        else:
            self._idle_since = self._now()

    def _linger(self) -> None:
        """The client is still writing: to close now would reset the connection, and the answer with it."""
        self._last = True
        self._pending.clear()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self._transport.close()

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _advance(self) -> None:
        if self._busy or self._writing_since is not None or self._transport.is_closing():
            return
        if self._pending:
            self._begin(self._pending.popleft())
        elif self._paused:
            self._paused = False
            self._transport.resume_reading()

    def pause_writing(self) -> None:
        """The client does not read its answers: nothing more is begun for it."""
        self._writing_since = self._now()
        self._pause()

    def resume_writing(self) -> None:
        self._writing_since = None
        self._advance()

    # ending

    def _hang_up(self, error: CallError, status: int) -> None:
        """What came is no request: says so, unless answers to good ones before it are still due, and ends."""
        if self._last:
            return
        self._last = True
        if not self._busy and not self._pending:
            self._keep_alive = self._head_only = False
            self.refuse(error, status)

    def eof_received(self) -> bool:
        """A client may close its half once its request is whole, and still read the answer."""
        self._last, self._reading_since = True, None
        return (self._busy or bool(self._pending)) and not self._transport.get_extra_info("sslcontext")

    def drain(self) -> None:
        """The server stops: ends at once where nothing is in flight; what is half read has its grace."""
        if self._in_head and not self._head_size and not self._busy and not self._pending:
            self._transport.close()

    def expire(self, before: float, idle_before: float) -> None:
        """Hangs up on a client that has been sending its request, or reading its answer, since `before`."""
        if self._writing_since is not None:
            if self._writing_since <= before:
                self._transport.abort()
        elif self._reading_since is not None:
            if self._reading_since > before:
                return
            if not self._last and (self._head_size or not self._in_head):
                self._hang_up(InvalidMessage("the request was not whole in time"), 408)
            else:
                self._transport.close()
        elif not self._busy and not self._pending and self._idle_since <= idle_before:
            self._transport.close()
