# mypy: disable-error-code="empty-body"
"""What goes along when a handler hands its headers on, proven over the transport of an address."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from quintet import Contract, Service, current, notification, request, serve
from quintet.client import Carriers
from quintet.clock import SYSTEM
from quintet.message import Message, new_id

WITHIN = 50.0
OUTSIDE = {
    "Host": "outside.example", "Accept": "application/json", "Prefer": "wait=3", "If-None-Match": '"a"',
    "If-Match": '"b"', "Content-Language": "de", "Range": "bytes=0-1", "Origin": "http://outside.example",
    "Sec-Fetch-Site": "cross-site", "Referer": "http://outside.example/", "X-Forwarded-For": "10.0.0.1",
    "Authorization": "Bearer secret", "Cookie": "session=secret", "X-HTTP-Method-Override": "DELETE",
    "TE": "trailers", "Quintet-Key": "k", "X-City": "Zürich", "Accept-Language": "de", "Destination": "/queue/else",
    "Receipt": "1", "Message-Id": "7", "X-Death": "x", "Priority": "9", "Cc": "else", "Timestamp": "1", "Type": "t",
}  # fmt: skip
OWN = {
    "x-city": "Zürich", "accept-language": "de", "destination": "/queue/else", "receipt": "1", "message-id": "7",
    "x-death": "x", "priority": "9", "cc": "else", "timestamp": "1", "type": "t",
}  # fmt: skip
"""What of it is the user's own; AMQP, whose broker owns x-death, leaves that out on the way."""


class Outer(Contract, name="outer"):
    @request(http="DELETE /outer/{name}")
    async def drop(self, name: str) -> dict[str, str]: ...


async def prove(address: str) -> None:
    name = f"inner-{new_id()}"

    class Inner(Contract, name=name):
        @request(http="GET /things/{thing}")
        async def get(self, thing: str) -> str: ...
        @request(http="DELETE /things/{thing}")
        async def delete(self, thing: str) -> str: ...
        @notification
        async def told(self, text: str) -> None: ...

    inner, outer, ran = Service(Inner), Service(Outer), list[tuple[str, dict[str, str], Any]]()
    told = asyncio.Event()

    def note(what: str) -> str:
        ran.append((what, dict(current().headers), current().http))
        return what

    @inner.handles(Inner.get)
    async def get(thing: str) -> str:
        return note("get")

    @inner.handles(Inner.delete)
    async def delete(thing: str) -> str:
        return note("delete")

    @inner.handles(Inner.told)
    async def handle_told(text: str) -> None:
        note("told")
        told.set()

    client = outer.uses(Inner)

    @outer.handles(Outer.drop)
    async def drop(name: str) -> dict[str, str]:
        assert await client.get.using(headers=current().headers)("7") == "get"
        await client.told.using(headers=current().headers)("x")
        return dict(current().headers)

    direct = address.startswith("http")
    async with serve(inner, at=address) as (there, *_):
        inner_at = there if direct else address
        async with serve(outer, at="http://127.0.0.1:0", connect={Inner: inner_at}) as (at, *_):
            assert await _delete(at) == OWN
            async with asyncio.timeout(WITHIN):
                await told.wait()
        assert [what for what, _, _ in ran] == ["get", "told"]
        for _, headers, http in ran:
            trace = {"traceparent", "tracestate", "baggage"}
            arrived = {name: value for name, value in headers.items() if name not in trace}
            assert arrived in (OWN, {n: v for n, v in OWN.items() if n != "x-death"})
            assert (http is not None) == direct
        if not direct:
            await _foreign(address, Inner, ran)


async def _foreign(address: str, inner: Any, ran: list[tuple[str, dict[str, str], Any]]) -> None:
    """What a foreign sender writes over a queue is no request of HTTP, and not the user's own either."""
    carriers = Carriers("test", SYSTEM)
    try:
        exchange = await carriers.exchange(await carriers.reach(address))
        sent = Message(channel=inner.get.channel, id=new_id(), body=b'{"thing":"8"}', media_type="application/json")
        sent.operation, sent.deadline = inner.get.full_name, SYSTEM.now() + WITHIN
        sent.headers = {
            ":method": "DELETE", ":path": "/things/8", "accept": "text/html", "host": "else", "If-Match": '"a"',
            "Authorization": "secret", "x-own": "1",
        }  # fmt: skip
        reply = await exchange(sent)
        assert reply is not None
        assert reply.status == ""
        assert ran[-1] == ("get", {"x-own": "1"}, None)
    finally:
        await carriers.close()


async def _delete(at: str) -> Any:
    """A raw DELETE with many headers."""
    host, port = at.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    lines = "".join(f"{name}: {value}\r\n" for name, value in OUTSIDE.items())
    writer.write(f"DELETE /v1/outer/7 HTTP/1.1\r\n{lines}Connection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), answer
    return msgspec.json.decode(body)
