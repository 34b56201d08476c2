"""Kafka: messages published and consumed per second, with headers and commits, beside aiokafka and FastStream.

Sender, receiver and broker are a process each, on a fresh broker; all event loops are uvloop's; a message is a record
of about 100 bytes as JSON with five headers, decoded and encoded by msgspec on all sides; the peers take turns, and
each figure is the median of its rounds. All producers are idempotent with acks=all, and 256 messages wait to be
confirmed. Offsets are committed after the handlers: by aiokafka and FastStream's batches after each fetch, by
FastStream's handlers of one message after each if they are told to; by default they commit what may not have been
handled yet, which is less than the others promise. Before, each is warmed up for ten seconds: a broker that was just
started takes four times the work for a batch, and learns for a minute.
"""

# mypy: disable-error-code="import-untyped"
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
    Sample,
    Stay,
    broker,
    compare,
    large_figures,
    lone_figures,
    sample,
    side,
)
from benchmarks.figure import Figure
from quintet.message import new_id

PARTITIONS = 6  # as a topic has that Quintet makes; with one, all are slower
FASTSTREAM, BATCHES = "FastStream (its default)", "FastStream (batches)"
MOST = 5_000_000  # bytes of a request, which is what the broker allows


def _headers() -> dict[str, str]:
    """As many and as long as those that a contract's message has."""
    return {
        "message-id": new_id(),
        "content-type": "application/json",
        "operation": "bench-tell.note",
        "sender": "bench-tell",
        "version": "1.0",
    }


async def _topic(at: At) -> None:
    from aiokafka.admin import AIOKafkaAdminClient, NewTopic

    admin = AIOKafkaAdminClient(bootstrap_servers=f"{at.host}:{at.port}")
    await admin.start()
    await admin.create_topics([NewTopic(at.name, PARTITIONS, 1)])
    await admin.close()


async def hear_aiokafka(at: At, heard: Heard, stay: Stay) -> None:
    from aiokafka import AIOKafkaConsumer

    await _topic(at)
    consumer = AIOKafkaConsumer(
        at.name,
        bootstrap_servers=f"{at.host}:{at.port}",
        group_id=at.name,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        max_partition_fetch_bytes=MOST,
    )
    await consumer.start()
    stay.push_async_callback(consumer.stop)

    async def hear() -> None:
        while True:
            found = await consumer.getmany(timeout_ms=1000)
            for records in found.values():
                for record in records:
                    heard(at.sample(record.value))
            if found:
                await consumer.commit()

    stay.callback(asyncio.ensure_future(hear()).cancel)


async def tell_aiokafka(at: At, stay: Stay) -> Call:
    from aiokafka import AIOKafkaProducer

    producer = AIOKafkaProducer(
        bootstrap_servers=f"{at.host}:{at.port}", enable_idempotence=True, acks="all", max_request_size=MOST
    )
    await producer.start()
    stay.push_async_callback(producer.stop)

    def call() -> Any:
        headers = [(name, value.encode()) for name, value in _headers().items()]
        return producer.send_and_wait(at.name, at.body(), headers=headers)

    return call


async def _faststream(at: At, stay: Stay) -> Any:
    from fast_depends.msgspec import MsgSpecSerializer
    from faststream.kafka import KafkaBroker

    where = f"{at.host}:{at.port}"
    broker = KafkaBroker(where, logger=None, serializer=MsgSpecSerializer(), enable_idempotence=True, acks="all")
    stay.push_async_callback(broker.stop)
    return broker


async def hear_faststream(at: At, heard: Heard, stay: Stay) -> None:
    await _faststream_handler(at, heard, stay)


async def hear_faststream_acks(at: At, heard: Heard, stay: Stay) -> None:
    from faststream.middlewares import AckPolicy

    await _faststream_handler(at, heard, stay, ack_policy=AckPolicy.ACK)


async def _faststream_handler(at: At, heard: Heard, stay: Stay, **options: Any) -> None:
    await _topic(at)
    broker = await _faststream(at, stay)

    @broker.subscriber(at.name, group_id=at.name, auto_offset_reset="earliest", **options)  # type: ignore[untyped-decorator]
    async def hear(message: Sample) -> None:
        heard(message)

    await broker.start()


async def hear_faststream_batches(at: At, heard: Heard, stay: Stay) -> None:
    from faststream.middlewares import AckPolicy

    await _topic(at)
    broker = await _faststream(at, stay)
    options = {"auto_offset_reset": "earliest", "ack_policy": AckPolicy.ACK, "batch": True}

    @broker.subscriber(at.name, group_id=at.name, **options)  # type: ignore[untyped-decorator]
    async def hear(messages: list[Sample]) -> None:
        for message in messages:
            heard(message)

    await broker.start()


async def tell_faststream(at: At, stay: Stay) -> Call:
    broker = await _faststream(at, stay)
    await broker.start()
    return lambda: broker.publish(sample(), at.name, headers=_headers())


TELL: Peers = {
    **ours.TELL,
    "aiokafka": (hear_aiokafka, tell_aiokafka),
    FASTSTREAM: (hear_faststream, tell_faststream),
    BATCHES: (hear_faststream_batches, tell_faststream),
    "FastStream (commits each)": (hear_faststream_acks, tell_faststream),
}


def figures() -> list[Figure]:
    with broker("kafka") as kafka:
        tell = compare(
            __name__,
            "tell",
            TELL,
            kafka,
            title="publish + consume",
            levels=(MANY,),
            seconds=0.8,
            rounds=7,
            warm=10.0,
            handled=True,
        )
        return [
            tell.beside("aiokafka", MANY, 1.5),
            tell.beside(FASTSTREAM, MANY, 4),
            tell.beside(BATCHES, MANY, 4),
            *lone_figures(__name__, "tell", (OURS, ALONE, "aiokafka"), kafka, confirmed=2.0),
            *large_figures(__name__, "tell", kafka, beside=("aiokafka",)),
            *tell.figures(),
        ]


if __name__ == "__main__":
    side({"tell": TELL})
