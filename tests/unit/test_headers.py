# mypy: disable-error-code="empty-body"
"""Whose a header is: what HTTP owns is never the user's, and what a handler hands on always arrives."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from handed_on import prove

from quintet import ConfigurationError, Contract, Service, connect, current, event, notification, request, serve
from quintet.call import Options
from quintet.message import Channel, Message
from quintet.outbox import Outbox
from quintet.wire.http import CREDENTIALS, OWNED, HttpRequest, entity_tags, own_headers


@pytest.mark.parametrize("address", ["http://127.0.0.1:0", "memory://handed-on", "sqlite:///{folder}/handed-on.db"])
async def test_a_handler_hands_its_headers_on_and_nothing_that_http_owns(address: str, tmp_path: Path) -> None:
    await prove(address.format(folder=tmp_path))


@pytest.mark.parametrize("name", sorted(OWNED))
def test_using_refuses_what_http_owns_however_it_is_written(name: str) -> None:
    name = name.replace("*", "anything")
    for written in (name, name.upper()):
        with pytest.raises(ConfigurationError, match="HTTP owns this name, leave it out"):
            Options.of({"headers": {written: "x"}})
    assert own_headers({name: "x", name.title(): "x", "x-city": "Bern"}) == {"x-city": "Bern"}


@pytest.mark.parametrize("name", sorted(CREDENTIALS))
def test_credentials_are_written_and_not_handed_on(name: str) -> None:
    assert Options.of({"headers": {name: "x"}}).headers == {name: "x"}
    assert own_headers({name: "x", name.title(): "x"}) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("", "x"),
        ("a b", "x"),
        ("é", "x"),
        ("CC", "x"),
        ("a" * 256, "x"),
        ("x", "a\r\nb: c"),
        ("x", "\0"),
        ("x", "\ud800"),
    ],
)
def test_what_not_every_transport_carries_is_refused_and_not_handed_on(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match="not every transport carries this"):
        Options.of({"headers": {name: value}})
    assert own_headers({name: value}) == {}


def test_what_is_handed_on_fits_into_the_head_of_a_request() -> None:
    many = {f"x-{number}": "é" * 500 for number in range(100)}
    handed = own_headers({"x-large": "x" * 60_000} | many)
    assert 14_000 < sum(len(name) + len(value.encode()) for name, value in handed.items()) <= 16 * 1024


def test_it_is_refused_wherever_using_is_said() -> None:
    class Trips(Contract, name="refusing"):
        @event
        async def created(self, text: str) -> None: ...

    for using in (Service(Trips).using, Outbox("trips", "").using):
        with pytest.raises(ConfigurationError, match=r"using\(headers=\{'Accept': \.\.\.\}\): HTTP owns this name"):
            using(headers={"Accept": "text/html"})


async def test_the_request_that_http_delivered_is_seen_whole() -> None:
    class Trips(Contract, name="seen"):
        @request(http="PUT /seen/{trip}")
        async def put(self, trip: str, note: str, more: str = "") -> None: ...

    seen: list[HttpRequest | None] = []
    service = Service(Trips)

    @service.handles(Trips.put)
    async def put(trip: str, note: str, more: str) -> None:
        seen.append(current().http)

    async with serve(service, at=["http://127.0.0.1:0", "memory://seen"]) as (at, _):
        async with connect(Trips, "memory://seen") as client:
            await client.put("t", "n")
        host, port = at.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b'PUT /v1/seen/a%20b?x=%31 HTTP/1.1\r\nHost: h\r\nIf-Match: "a,b", W/"c"\r\nAuthorization: Basic x\r\n'
            b'X-City: Bern\r\nContent-Length: 12\r\nConnection: close\r\n\r\n{"note":"n"}'
        )
        assert (await reader.read()).startswith(b"HTTP/1.1 204")
        writer.close()
    nothing, found = seen
    assert nothing is None
    assert found is not None
    assert (found.method, found.path, found.client, found.scheme) == (
        "PUT", "/v1/seen/a%20b?x=%31", "127.0.0.1", "http",
    )  # fmt: skip
    assert found.if_match == ('"a,b"', 'W/"c"')
    assert found.headers["authorization"] == "Basic x"
    assert (found.headers["host"], found.headers["x-city"]) == ("h", "Bern")
    assert not [name for name in found.headers if name.startswith(":")]


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("", ()),
        ("*", ("*",)),
        ('"a"', ('"a"',)),
        (' "a" ,W/"b,c" ', ('"a"', 'W/"b,c"')),
        ("a", ("a",)),  # no tag: it equals none, and is not passed over
        ('"a", b', ('"a", b',)),
        ('"a', ('"a',)),
    ],
)
def test_entity_tags_are_read_by_their_quotes(text: str, tags: tuple[str, ...]) -> None:
    assert entity_tags(text) == tags


async def test_what_is_worked_off_an_inbox_has_the_users_headers_and_is_no_request_any_more(tmp_path: Path) -> None:
    class Trips(Contract, name="kept"):
        @notification
        async def told(self, text: str) -> None: ...

    service, seen, told = Service(Trips, inbox=f"sqlite:///{tmp_path}/inbox.db"), list[Any](), asyncio.Event()

    @service.handles(Trips.told)
    async def handle(text: str) -> None:
        seen.append((current().http, dict(current()._message.headers)))
        told.set()

    async with serve(service, at="http://127.0.0.1:0") as (at, *_):
        async with connect(Trips, at) as client:
            await client.told.using(headers={"x-city": "Bern", "authorization": "secret"})("x")
            await told.wait()
    assert seen == [(None, {"x-city": "Bern"})]  # what it came with lies on no disk


def test_a_message_without_headers_has_none() -> None:
    assert own_headers(Message(channel=Channel("x")).headers) == {}


def test_the_page_on_http_names_what_http_owns() -> None:
    page = (Path(__file__).parents[2] / "docs" / "http.md").read_text()
    listed = page.split("HTTP owns these names:")[1].split("\n\n")[0]
    names = set(listed.split("`")[1::2])
    assert names == OWNED - {":*"}
