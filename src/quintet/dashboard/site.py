"""Serves the page, one stream of what it shows, and the orders that it sends; to this machine only."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, TypeAlias

import msgspec
import uvicorn

from quintet.clock import SYSTEM, Clock
from quintet.dashboard.collector import Collector
from quintet.errors import ConfigurationError, QuintetError, TransportError
from quintet.feed import CONTROL, Order, host_of, is_loopback

log = logging.getLogger("quintet.dashboard")

LARGEST = 64 * 1024  # bytes of an order
PAGE_HEADERS = {
    "content-type": "text/html; charset=utf-8",
    # the page loads nothing, and what it shows of foreign names cannot run
    "content-security-policy": "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline';"
    " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}

_Scope: TypeAlias = MutableMapping[str, Any]
_Receive: TypeAlias = Callable[[], Awaitable[Any]]
_Send: TypeAlias = Callable[[Any], Awaitable[None]]


class Site:
    """The ASGI application."""

    def __init__(self, collector: Collector, *, interval: float = 1.0, clock: Clock = SYSTEM) -> None:
        self._collector, self._interval, self._clock = collector, interval, clock
        self._page = files("quintet.dashboard").joinpath("page.html").read_bytes()
        self._latest = b""
        self._changed = asyncio.Condition()
        self._watching = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"<dashboard, watched by {self._watching} pages>"

    async def run(self) -> None:
        """Draws all of it once each second, for all pages together, and only while there is one."""
        while True:
            if self._watching:
                try:
                    await self._publish()
                except Exception:  # one process that shows nonsense must not blind the page for all others
                    log.exception("the page could not be drawn")
            await self._clock.sleep(self._interval)

    async def _publish(self) -> None:
        async with self._changed:
            self._latest = b"data: " + msgspec.json.encode(self._collector.view()) + b"\n\n"
            self._changed.notify_all()

    async def close(self) -> None:
        """Ends the streams: a server does not stop while one is open."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        assert scope["type"] == "http", "lifespan and web sockets are off"  # noqa: S101
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        match scope["method"], scope["path"]:
            case _ if not is_loopback(host_of(headers)):
                # a foreign page whose name was made to point here (DNS rebinding) comes with its own name
                await _answer(send, 403, "ask for this page as localhost or 127.0.0.1")
            case "GET", "/":
                await _answer(send, 200, self._page, PAGE_HEADERS)
            case "GET", "/stream":
                await self._stream(receive, send)
            case "POST", "/control":
                await self._control(headers, receive, send)
            case _:
                await _answer(send, 404, "there is only /")

    async def _stream(self, receive: _Receive, send: _Send) -> None:
        await send(_start(200, {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}))
        leaving = asyncio.create_task(_gone(receive))
        self._watching += 1
        try:
            await self._publish()
            shown = b""
            while not leaving.done() and not self._closed:
                if shown is not self._latest:
                    shown = self._latest  # who reads slowly misses some, and nothing piles up for it
                    await send({"type": "http.response.body", "body": shown, "more_body": True})
                async with self._changed:
                    await self._changed.wait_for(lambda: shown is not self._latest or self._closed)  # noqa: B023
        finally:
            self._watching -= 1
            leaving.cancel()
        await send({"type": "http.response.body"})

    async def _control(self, headers: dict[str, str], receive: _Receive, send: _Send) -> None:
        if not headers.get(CONTROL) or headers.get("sec-fetch-site", "same-origin") != "same-origin":
            await _answer(send, 403, f"an order comes from this page, with the header {CONTROL}")
            return
        body, more = b"", True
        while more and len(body) <= LARGEST:
            event = await receive()
            body, more = body + event.get("body", b""), event.get("more_body", False)
        try:
            order = msgspec.json.decode(body, type=Order)
            said = await self._collector.order(order)
        except (msgspec.MsgspecError, RecursionError, ConfigurationError) as error:
            await _answer(send, 400, str(error))
        except QuintetError as error:
            await _answer(send, 502, str(error))
        else:
            await _answer(send, 200, "; ".join(said))
            await self._publish()


async def _gone(receive: _Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _start(status: int, headers: dict[str, str]) -> dict[str, Any]:
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": pairs}


async def _answer(send: _Send, status: int, body: bytes | str, headers: dict[str, str] | None = None) -> None:
    content = body.encode() if isinstance(body, str) else body
    given = headers or {"content-type": "text/plain; charset=utf-8", "x-content-type-options": "nosniff"}
    await send(_start(status, given | {"content-length": str(len(content))}))
    await send({"type": "http.response.body", "body": content})


class _Server(uvicorn.Server):
    """Leaves signals to the command that it runs in."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


@asynccontextmanager
async def serve_dashboard(collector: Collector, port: int = 0, *, clock: Clock = SYSTEM) -> AsyncGenerator[str]:
    """Serves the page at 127.0.0.1 (port 0: a free one); gives its address. Raises TransportError: port in use."""
    try:
        listening = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise TransportError(f"the dashboard cannot listen at 127.0.0.1:{port}: {error.strerror}") from None
    site = Site(collector, clock=clock)
    settings = uvicorn.Config(
        site,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    server = _Server(settings)
    drawing = asyncio.create_task(site.run())
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        drawing.cancel()
        await site.close()
        server.should_exit = True
        await asyncio.gather(drawing, serving, return_exceptions=True)
        listening.close()
