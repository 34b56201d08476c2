"""ActiveMQ over STOMP: requests per second, beside stompman.

Sender, receiver and broker are a process each, on a fresh broker; all event loops are uvloop's; a message is a record
of about 100 bytes as JSON, decoded and encoded by msgspec on all sides; the peers take turns, and each figure is the
median of its rounds. Requests go to a queue, not persistent and without receipts for stompman; their replies come by a
temporary queue, acknowledged by the broker itself; a receiver has at most 256 in hand and acknowledges each after its
handler. stompman has no limit of its own on its handlers, which is faster than its default of 100.
"""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks import brokers_ours as ours
from benchmarks.brokers import (
    MANY,
    At,
    Call,
    Heard,
    Peers,
    Stay,
    broker,
    compare,
    decode,
    encode,
    large_figures,
    sample,
    side,
)
from benchmarks.figure import Figure
from quintet.message import new_id

PREFETCH = {"activemq.prefetchSize": str(MANY)}


async def _stompman(at: At, stay: Stay) -> Any:
    from stompman import Client, ConnectionParameters

    user, _, password = at.address.partition("//")[2].partition("@")[0].partition(":")
    server = ConnectionParameters(at.host, at.port, user, password)
    return await stay.enter_async_context(Client([server], max_concurrent_handlers=None))


def _failed(error: Exception, _: object) -> None:
    raise error


async def answer_stompman(at: At, _: Heard, stay: Stay) -> None:
    client = await _stompman(at, stay)

    async def answer(frame: Any) -> None:
        headers = {"correlation-id": frame.headers["correlation-id"]}
        body = encode(decode(frame.body))
        await client.send(body, frame.headers["reply-to"], content_type="application/json", headers=headers)

    await client.subscribe(f"/queue/{at.name}", answer, headers=PREFETCH, on_suppressed_exception=_failed)


async def ask_stompman(at: At, stay: Stay) -> Call:
    client, loop = await _stompman(at, stay), asyncio.get_running_loop()
    waiting: dict[str, asyncio.Future[bytes]] = {}
    replies = f"/temp-queue/{at.name}"

    async def replied(frame: Any) -> None:
        waiting.pop(frame.headers["correlation-id"]).set_result(frame.body)

    await client.subscribe(replies, replied, ack="auto", headers=PREFETCH, on_suppressed_exception=_failed)

    async def call() -> object:
        correlation, future = new_id(), loop.create_future()
        waiting[correlation] = future
        headers = {"correlation-id": correlation, "reply-to": replies}
        await client.send(encode(sample()), f"/queue/{at.name}", content_type="application/json", headers=headers)
        return decode(await future)

    return call


async def hear_stompman(at: At, heard: Heard, stay: Stay) -> None:
    client = await _stompman(at, stay)

    async def hear(frame: Any) -> None:
        heard(at.sample(frame.body))

    await client.subscribe(f"/queue/{at.name}", hear, headers=PREFETCH, on_suppressed_exception=_failed)


async def tell_stompman(at: At, stay: Stay) -> Call:
    client = await _stompman(at, stay)
    headers = {"persistent": "true"}
    return lambda: client.send(at.body(), f"/queue/{at.name}", headers=headers, receipt_timeout=10.0)


ASK: Peers = {**ours.ASK, "stompman": (answer_stompman, ask_stompman)}
TELL: Peers = {**ours.TELL, "stompman": (hear_stompman, tell_stompman)}


def figures() -> list[Figure]:
    with broker("activemq") as activemq:
        levels = (1, 16, MANY)
        ask = compare(
            __name__, "ask", ASK, activemq, title="request/response", levels=levels, seconds=0.5, rounds=5, warm=0.6
        )
        return [
            ask.beside("stompman", MANY, 3),
            *large_figures(__name__, "tell", activemq, beside=("stompman",)),
            *ask.figures(),
        ]


if __name__ == "__main__":
    side({"ask": ASK, "tell": TELL})
