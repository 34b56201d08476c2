"""The proxy that breaks the network in the brokers' tests does what it says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from proxy import Proxy


@asynccontextmanager
async def echo(pace: float = 1.0) -> AsyncIterator[Proxy]:
    """A proxy before a server that sends back what it gets, and adds a full stop where its client ends."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
            writer.write(b".")
        except ConnectionResetError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, Proxy("{}:{}".format(*server.sockets[0].getsockname()), pace=pace) as proxy:
        yield proxy


@asynccontextmanager
async def client(proxy: Proxy) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(*proxy.address.split(":"))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def test_it_passes_what_it_gets_and_an_end_as_well() -> None:
    async with echo() as proxy, client(proxy) as (reader, writer):
        writer.write(b"x" * 1_000_000)
        writer.write_eof()
        assert await reader.read() == b"x" * 1_000_000 + b"."
        assert proxy.accepted == 1


async def test_when_silent_it_accepts_and_holds_back_until_it_is_switched_again() -> None:
    async with echo() as proxy, client(proxy) as (reader, writer):
        writer.write(b"a")
        assert await reader.readexactly(1) == b"a"
        proxy.switch("silent")
        async with client(proxy) as (reader_of_another, another):
            writer.write(b"b")
            another.write(b"c")
            waiting = [asyncio.create_task(each.readexactly(1)) for each in (reader, reader_of_another)]
            assert not (await asyncio.wait(waiting, timeout=0.1))[0]
            proxy.switch("pass")
            assert await asyncio.gather(*waiting) == [b"b", b"c"]


async def test_a_reset_is_seen_as_one_by_those_connected_and_by_new_ones() -> None:
    async with echo() as proxy, client(proxy) as (reader, writer):
        writer.write(b"a")
        await reader.readexactly(1)
        proxy.switch("reset")
        with pytest.raises(ConnectionResetError):
            await reader.read()
        with pytest.raises(ConnectionResetError):
            async with client(proxy) as (reader_of_another, _):
                await reader_of_another.read()
        proxy.switch("pass")
        async with client(proxy) as (reader_of_a_third, third):
            third.write(b"b")
            assert await reader_of_a_third.readexactly(1) == b"b"


async def test_it_trickles_byte_by_byte_and_hands_over_the_rest_when_it_stops_to() -> None:
    loop = asyncio.get_running_loop()
    async with echo(pace=0.02) as proxy, client(proxy) as (reader, writer):
        proxy.switch("trickle")
        writer.write(b"abcdefgh")
        began = loop.time()
        assert await reader.readexactly(4) == b"abcd"
        assert loop.time() - began >= 0.05
        proxy.pace = 3600.0
        assert await reader.readexactly(1) == b"e"
        proxy.switch("pass")
        assert await reader.readexactly(3) == b"fgh"


async def test_half_closed_the_client_sees_an_end_and_may_still_send() -> None:
    async with echo() as proxy, client(proxy) as (reader, writer):
        writer.write(b"a")
        await reader.readexactly(1)
        proxy.switch("half-close")
        assert await reader.read() == b""
        writer.write(b"b")
        await writer.drain()


async def test_where_nobody_listens_a_client_is_reset() -> None:
    async with Proxy("127.0.0.1:1") as proxy, client(proxy) as (reader, _):
        with pytest.raises(ConnectionResetError):
            await reader.read()
