"""Bytes of a hostile peer cost the one who sends them more than the one who reads them, and raise our errors only."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, cast

import msgspec
import pytest
from costs import grows_in_proportion

from quintet import Contract, Service, connect, request, serve
from quintet.dashboard.collector import _events
from quintet.errors import ProtocolError, RemoteError, from_problem
from quintet.message import Channel
from quintet.wire import amqp_session, envelope
from quintet.wire.amqp import Confirm
from quintet.wire.stomp import Parser


@pytest.mark.parametrize("line", [b"a:\n", b"\n\rx", b"xxxxxxxxxxx"])
def test_a_stomp_head_that_comes_byte_by_byte_is_read_once(line: bytes) -> None:
    def read(size: int) -> None:
        parser = Parser()
        stream = b"MESSAGE\n" + (line * size)[:size]
        with contextlib.suppress(ProtocolError):
            for at in range(len(stream)):
                list(parser.feed(stream[at : at + 1]))

    assert grows_in_proportion(read, 16_000)


def test_a_stomp_frame_is_found_wherever_its_bytes_are_cut() -> None:
    stream = b"\nMESSAGE\r\nname:value\r\n\r\nbody\0\nMESSAGE\n\nother\0"
    for first in range(len(stream)):
        for second in range(first, len(stream)):
            parser = Parser()
            parser.version = "1.2"
            frames = [f for part in (stream[:first], stream[first:second], stream[second:]) for f in parser.feed(part)]
            assert [(frame.headers, frame.body) for frame in frames] == [({"name": "value"}, b"body"), ({}, b"other")]


def test_a_snapshot_in_small_pieces_is_read_once_by_the_dashboard() -> None:
    async def pieces(size: int) -> AsyncIterator[bytes]:
        for _ in range(size // 8):
            yield b"12345678"

    def read(size: int) -> None:
        async def main() -> None:
            async for _ in _events(cast(Any, pieces(size))):
                pass

        asyncio.run(main())

    assert grows_in_proportion(read, 400_000)


async def test_the_dashboard_finds_events_wherever_their_bytes_are_cut() -> None:
    stream = b"data: one\n\n: ping\n\ndata: two\n\n"

    async def pieces(size: int) -> AsyncIterator[bytes]:
        for at in range(0, len(stream), size):
            yield stream[at : at + size]

    for size in range(1, len(stream) + 1):
        assert [event async for event in _events(cast(Any, pieces(size)))] == [b"one", b"two"]


async def test_a_confirmation_of_what_was_never_published_is_refused_at_once() -> None:
    outlet = amqp_session.Outlet.__new__(amqp_session.Outlet)
    outlet._tag, outlet._lowest, outlet._unconfirmed, outlet._unroutable = 3, 1, {}, set()
    with pytest.raises(ProtocolError, match="a confirmation of message 9223372036854775807 where 3 were published"):
        outlet.confirm(Confirm(1, 2**63 - 1, True, True))


@pytest.mark.parametrize(("version", "lasting"), [("3.10.8", False), ("4.0", True), ("²", False), ("9" * 5000, False)])
def test_the_version_that_a_broker_says_may_be_anything(version: str, lasting: bool) -> None:
    wire = amqp_session.Wire.__new__(amqp_session.Wire)
    wire.server = {"version": version}
    assert wire.lasting is lasting


def test_a_problem_that_is_nested_too_deep_is_a_remote_error() -> None:
    error = from_problem(b'{"x":' + b"[" * 20_000 + b"]" * 20_000 + b"}")
    assert isinstance(error, RemoteError)
    assert "could not be read" in str(error)


def test_a_stored_message_that_is_nested_too_deep_cannot_be_read() -> None:
    packed = msgspec.msgpack.encode([""] * 9 + [{}, b""])
    deep = b"\x9c" + packed[1:] + b"\x91" * 20_000 + b"\xc0"
    with pytest.raises(msgspec.DecodeError):
        envelope.unpack(deep, Channel("deep"))


class Echo(Contract, name="echo"):
    @request(http="POST /say")
    async def say(self, text: str) -> str: ...


async def test_a_request_whose_content_length_has_thousands_of_digits_is_read_or_refused() -> None:
    service = Service(Echo)

    @service.handles(Echo.say)
    async def say(text: str) -> str:
        return text

    body = b'{"text":"hi"}'
    async with serve(service, at="http://127.0.0.1:0") as addresses:
        port = int(addresses[0].rpartition(":")[2])
        for length, status in ((b"%d" % len(body), b"200"), (b"9" * 18, b"413"), (b"9" * 4400, b"400")):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = b"POST /v1/say HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: "
            writer.write(head + b"0" * (4400 - len(length)) + length + b"\r\n\r\n" + body)
            assert (await reader.readline()).split(b" ")[1] == status
            writer.close()


async def test_an_answer_whose_content_length_has_thousands_of_digits_is_read() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        length = b"0" * 4399 + b"4"
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
        writer.write(head + length + b'\r\n\r\n"hi"')
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, connect(Echo, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as echo:
        assert await echo.say("hi") == "hi"
