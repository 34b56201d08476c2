"""NSQ: messages published and consumed per second, beside ansq, and how soon one reaches an idle receiver.

Sender, receiver and broker are a process each, on a fresh broker that keeps all on disk (mem-queue-size 0); all event
loops are uvloop's; a message is a record of about 100 bytes as JSON, decoded and encoded by msgspec on all sides; the
peers take turns, and each figure is the median of its rounds. Each message is confirmed to the sender (256 wait for
that), a receiver has at most 256 in hand, and each is finished after its handler.
"""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks import brokers_ours as ours
from benchmarks.brokers import (
    ALONE,
    MANY,
    OURS,
    At,
    Call,
    Heard,
    Peers,
    Stay,
    broker,
    compare,
    large_figures,
    lone_figures,
    side,
)
from benchmarks.figure import Figure


async def _ansq(at: At, stay: Stay) -> Any:
    import ansq

    connection = await ansq.open_connection(at.host, at.port)
    stay.push_async_callback(connection.close)
    return connection


async def hear_ansq(at: At, heard: Heard, stay: Stay) -> None:
    connection = await _ansq(at, stay)
    await connection.subscribe(at.name, "bench", MANY)

    async def hear() -> None:
        async for message in connection.messages():
            heard(at.sample(message.body))
            await message.fin()

    stay.callback(asyncio.ensure_future(hear()).cancel)


async def tell_ansq(at: At, stay: Stay) -> Call:
    connection = await _ansq(at, stay)

    async def call() -> None:
        response = await connection.pub(at.name, at.body())
        if not response.is_ok:
            raise RuntimeError(f"{response}")

    return call


TELL: Peers = {**ours.TELL, "ansq": (hear_ansq, tell_ansq)}


def figures() -> list[Figure]:
    with broker("nsq") as nsq:
        tell = compare(
            __name__, "tell", TELL, nsq, title="publish + consume", levels=(MANY,), seconds=0.8, rounds=5, handled=True
        )
        return [
            tell.beside("ansq", MANY, 1),
            *lone_figures(__name__, "tell", (OURS, ALONE, "ansq"), nsq, reaches=1.0),
            *large_figures(__name__, "tell", nsq, beside=("ansq",)),
            *tell.figures(),
        ]


if __name__ == "__main__":
    side({"tell": TELL})
