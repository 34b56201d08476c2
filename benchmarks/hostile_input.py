"""What bytes that were chosen to hurt cost the one who reads them, in processor time.

Keys: 4 MiB of set members of one type, in JSON, chosen to have one hash where the type lets them (they are refused), or
at least the lowest bits of one. Pieces: a STOMP head and a dashboard's feed that never end, in small pieces.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import time
import uuid
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from typing import Any, cast

from benchmarks.figure import Figure, at_most
from quintet.dashboard.collector import _events
from quintet.errors import InvalidMessage, QuintetError
from quintet.format import format_named
from quintet.wire.stomp import Parser

SIZE = 4 * 1024 * 1024
PERIOD = 2**61 - 1
"""Python's hash of a number is the number modulo this."""

KEYS: dict[str, tuple[Any, list[Any]]] = {
    "int": (int, [number * PERIOD for number in range(1, 250_000)]),
    "int of 64 bits": (int, [number << 40 for number in range(1, 2**18)]),
    "float": (float, [m * 2.0 ** (61 * k) for m in range(1, 6000) for k in range(-16, 16)]),
    "Decimal": (Decimal, [Decimal(number * PERIOD) for number in range(1, 250_000)]),
    "UUID": (uuid.UUID, [uuid.UUID(int=number * PERIOD) for number in range(1, 120_000)]),
    "timedelta": (datetime.timedelta, [datetime.timedelta(days=number << 10) for number in range(250_000)]),
    "date": (datetime.date, [datetime.date.fromordinal(1 + number) for number in range(330_000)]),
    "str": (str, [str(number) for number in range(600_000)]),
}


def processor_seconds(work: Callable[[], object]) -> float:
    """Seconds of processor time, the least of three."""
    found = []
    for _ in range(3):
        began = time.process_time()
        with contextlib.suppress(QuintetError):
            work()
        found.append(time.process_time() - began)
    return min(found)


def members(kind: Any, values: list[Any]) -> float:
    body = format_named("json").codec(list[kind]).encode(values)[: SIZE - 1].rpartition(b",")[0] + b"]"
    decode = format_named("json").codec(set[kind]).decode

    def read() -> None:
        with contextlib.suppress(InvalidMessage):
            decode(body)

    return processor_seconds(read)


def stomp_head(size: int) -> float:
    stream = b"MESSAGE\n" + (b"a:\n" * size)[:size]

    def read() -> None:
        parser = Parser()
        for at in range(len(stream)):
            list(parser.feed(stream[at : at + 1]))

    return processor_seconds(read)


def feed(size: int) -> float:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(size // 1024):
            yield b"x" * 1024

    async def read() -> None:
        async for _ in _events(cast(Any, pieces())):
            pass

    return processor_seconds(lambda: asyncio.run(read()))


def figures() -> list[Figure]:
    return [
        *(at_most(f"4 MiB of set[{name}]", members(*case), "s", 0.3) for name, case in KEYS.items()),
        at_most("a STOMP head of 256 kB, byte by byte", stomp_head(256 * 1024), "s", 1.0),
        at_most("a dashboard's feed of 8 MB without an end, in pieces of 1 kB", feed(8 * 1024 * 1024), "s", 1.0),
    ]
