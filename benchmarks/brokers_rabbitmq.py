"""RabbitMQ: requests and confirmed messages per second, beside aio-pika and FastStream.

Sender, receiver and broker are a process each, on a fresh broker; all event loops are uvloop's; a message is a record
of about 100 bytes as JSON, decoded and encoded by msgspec on all sides; the peers take turns, and each figure is the
median of its rounds. Requests go to a transient queue and their replies come by direct reply-to; a receiver has at most
256 in hand and acknowledges after its handler; aio-pika and FastStream send neither with publisher confirms. Messages
are persistent, in quorum queues for all, confirmed to the sender, and acknowledged after the handler.
"""

# mypy: disable-error-code="empty-body"
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
    Sample,
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

REPLIES = "amq.rabbitmq.reply-to"
QUORUM = {"x-queue-type": "quorum"}


# aio-pika, as its users write it who know RabbitMQ


async def _channel(at: At, stay: Stay, *, confirms: bool) -> Any:
    import aio_pika

    connection = await aio_pika.connect_robust(at.address)
    stay.push_async_callback(connection.close)
    channel = await connection.channel(publisher_confirms=confirms)
    await channel.set_qos(MANY)
    return channel


async def answer_aio_pika(at: At, _: Heard, stay: Stay) -> None:
    from aio_pika import Message
    from aio_pika.abc import AbstractIncomingMessage

    channel = await _channel(at, stay, confirms=False)
    queue = await channel.declare_queue(at.name, auto_delete=True)
    publish = channel.default_exchange.publish

    async def answer(request: AbstractIncomingMessage) -> None:
        body = encode(decode(request.body))
        reply = Message(body, content_type="application/json", correlation_id=request.correlation_id)
        await publish(reply, request.reply_to, mandatory=False)  # or it arrives, and is returned
        await request.ack()

    await queue.consume(answer)


async def ask_aio_pika(at: At, stay: Stay) -> Call:
    from aio_pika import Message
    from aio_pika.abc import AbstractIncomingMessage

    channel, loop = await _channel(at, stay, confirms=False), asyncio.get_running_loop()
    publish = channel.default_exchange.publish
    waiting: dict[str | None, asyncio.Future[bytes]] = {}

    async def replied(message: AbstractIncomingMessage) -> None:
        waiting.pop(message.correlation_id).set_result(message.body)

    replies = await channel.get_queue(REPLIES, ensure=False)
    await replies.consume(replied, no_ack=True)

    async def call() -> object:
        correlation, future = new_id(), loop.create_future()
        waiting[correlation] = future
        request = Message(
            encode(sample()), content_type="application/json", correlation_id=correlation, reply_to=REPLIES
        )
        await publish(request, at.name)
        return decode(await future)

    return call


async def hear_aio_pika(at: At, heard: Heard, stay: Stay) -> None:
    from aio_pika.abc import AbstractIncomingMessage

    channel = await _channel(at, stay, confirms=False)
    queue = await channel.declare_queue(at.name, durable=True, arguments=QUORUM)

    async def hear(message: AbstractIncomingMessage) -> None:
        heard(at.sample(message.body))
        await message.ack()

    await queue.consume(hear)


async def tell_aio_pika(at: At, stay: Stay) -> Call:
    from aio_pika import DeliveryMode, Message

    publish = (await _channel(at, stay, confirms=True)).default_exchange.publish

    def call() -> Any:
        message = Message(
            at.body(), content_type="application/json", message_id=new_id(), delivery_mode=DeliveryMode.PERSISTENT
        )
        return publish(message, at.name)

    return call


# FastStream with its faster serializer and without its log


async def _faststream(at: At, stay: Stay, *, confirms: bool) -> Any:
    from fast_depends.msgspec import MsgSpecSerializer
    from faststream.rabbit import Channel, RabbitBroker

    channel = Channel(prefetch_count=MANY, publisher_confirms=confirms)
    broker = RabbitBroker(at.address, default_channel=channel, logger=None, serializer=MsgSpecSerializer())
    stay.push_async_callback(broker.stop)
    return broker


async def answer_faststream(at: At, _: Heard, stay: Stay) -> None:
    from faststream.rabbit import RabbitQueue

    broker = await _faststream(at, stay, confirms=False)

    @broker.subscriber(RabbitQueue(at.name, durable=False, auto_delete=True))  # type: ignore[untyped-decorator]
    async def answer(request: Sample) -> Sample:
        return request

    await broker.start()


async def ask_faststream(at: At, stay: Stay) -> Call:
    broker = await _faststream(at, stay, confirms=False)
    await broker.start()

    async def call() -> object:
        return decode((await broker.request(sample(), at.name, timeout=30.0)).body)

    return call


async def hear_faststream(at: At, heard: Heard, stay: Stay) -> None:
    from faststream.rabbit import QueueType, RabbitQueue

    broker = await _faststream(at, stay, confirms=False)

    @broker.subscriber(RabbitQueue(at.name, queue_type=QueueType.QUORUM, durable=True))  # type: ignore[untyped-decorator]
    async def hear(message: Sample) -> None:
        heard(message)

    await broker.start()


async def tell_faststream(at: At, stay: Stay) -> Call:
    broker = await _faststream(at, stay, confirms=True)
    await broker.start()
    return lambda: broker.publish(sample(), at.name, persist=True)


ASK: Peers = {
    **ours.ASK,
    "aio-pika": (answer_aio_pika, ask_aio_pika),
    "FastStream": (answer_faststream, ask_faststream),
}
TELL: Peers = {
    **ours.TELL,
    "aio-pika": (hear_aio_pika, tell_aio_pika),
    "FastStream": (hear_faststream, tell_faststream),
}


def figures() -> list[Figure]:
    with broker("rabbitmq") as rabbitmq:
        ask = compare(
            __name__, "ask", ASK, rabbitmq, title="request/response", levels=(1, 16, MANY), seconds=0.5, rounds=5
        )
        tell = compare(
            __name__,
            "tell",
            TELL,
            rabbitmq,
            title="publish + consume",
            levels=(MANY,),
            seconds=0.8,
            rounds=5,
            handled=True,
        )
        return [
            ask.beside("aio-pika", MANY, 8),
            ask.beside("FastStream", MANY, 40),
            ask.beside("aio-pika", 1, 1.8),
            tell.beside("aio-pika", MANY, 3),
            tell.beside("FastStream", MANY, 4.5),
            *large_figures(__name__, "tell", rabbitmq, beside=("aio-pika",)),
            *ask.figures(),
            *tell.figures(),
        ]


if __name__ == "__main__":
    side({"ask": ASK, "tell": TELL})
