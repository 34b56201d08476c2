"""A TCP proxy that breaks the network while it runs: what a client meets when a cable, a firewall or a host fails."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from typing import Literal, Self, get_args

Mode = Literal["pass", "silent", "reset", "trickle", "half-close"]
SIZE = 65536


class Proxy:
    """`async with Proxy("127.0.0.1:5672") as proxy:` let a client connect to `proxy.address`; `proxy.switch("silent")`.

    - pass: as if it were not there
    - silent: connections are accepted and stand, but nothing comes through, either way, until it is switched again
    - reset: all connections are reset, and new ones too
    - trickle: one byte each `pace` seconds, each way
    - half-close: the server seems to have closed its side; what is sent to it still arrives
    """

    def __init__(self, to: str, *, at: str = "127.0.0.1:0", pace: float = 1.0) -> None:
        self.to, self.at, self.pace = to, at, pace
        self.mode: Mode = "pass"
        self.accepted = 0
        self._switched = asyncio.Event()
        self._connections: dict[asyncio.Task[None], socket.socket] = {}

    def __repr__(self) -> str:
        return f"<Proxy to {self.to}: {self.mode}, {len(self._connections)} connections>"

    async def __aenter__(self) -> Self:
        self._listener = socket.create_server(_host_and_port(self.at))
        self._listener.setblocking(False)
        host, port = self._listener.getsockname()
        self.address = f"{host}:{port}"
        self._accepting = asyncio.create_task(self._accept())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._accepting.cancel()
        tasks = [self._accepting, *self._connections]
        self.reset()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()

    def switch(self, mode: Mode) -> None:
        assert mode in get_args(Mode), mode
        self.mode = mode
        if mode == "reset":
            self.reset()
        if mode == "half-close":
            for client in self._connections.values():
                _end(client)
        self._switched.set()
        self._switched = asyncio.Event()

    def reset(self) -> None:
        """Resets the connections that there are, once, and stays in its mode."""
        for task in self._connections:
            task.cancel()

    async def _accept(self) -> None:
        while True:
            client, _ = await asyncio.get_running_loop().sock_accept(self._listener)
            self.accepted += 1
            task = asyncio.create_task(self._connection(client))
            self._connections[task] = client
            task.add_done_callback(self._connections.pop)

    async def _connection(self, client: socket.socket) -> None:
        server = socket.socket()
        server.setblocking(False)
        for each in (client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() will be a reset
        try:
            await self._while_silent()
            if self.mode == "reset":
                return
            await asyncio.get_running_loop().sock_connect(server, _host_and_port(self.to))
            if self.mode == "half-close":
                _end(client)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._carry(client, server))
                both.create_task(self._carry(server, client))
            for each in (client, server):  # both sides have ended in good order
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        except* OSError:
            pass
        finally:
            client.close()
            server.close()

    async def _carry(self, source: socket.socket, target: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(source, SIZE):
            while data:
                await self._while_silent()
                if self.mode == "half-close" and target in self._connections.values():
                    return
                size = 1 if self.mode == "trickle" else len(data)
                await loop.sock_sendall(target, data[:size])
                data = data[size:]
                if self.mode == "trickle":
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._switched.wait(), self.pace)
        await self._while_silent()
        _end(target)

    async def _while_silent(self) -> None:
        while self.mode == "silent":
            await self._switched.wait()


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition("://")[2].rpartition("@")[2].partition("/")[0].rpartition(":")
    return host, int(port)


def _end(target: socket.socket) -> None:
    with suppress(OSError):  # it is gone altogether
        target.shutdown(socket.SHUT_WR)
