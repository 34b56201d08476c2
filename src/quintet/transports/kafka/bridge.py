"""Between librdkafka's threads and the event loop: one producer and one consumer of confluent-kafka, each with a thread
that waits for it, and at most one wake-up of the loop for all that has come meanwhile.

Nothing here knows of messages and channels, and nothing blocks the loop. A consumer is touched by its own thread only.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar

from confluent_kafka import (
    Consumer,
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, OffsetSpec  # type: ignore[attr-defined]  # no __all__ there

from quintet.transports.kafka.seat import Seat
from quintet.wire.kafka import Headers, Record

__all__ = [  # of the library's, too, so that this is the one place that needs it
    "AdminClient",
    "ConfigResource",
    "ConsumerGroupTopicPartitions",
    "Inlet",
    "KafkaException",
    "NewTopic",
    "OffsetSpec",
    "Outlet",
    "TopicCollection",
    "TopicPartition",
    "read_all",
]

T = TypeVar("T")
Place: TypeAlias = tuple[str, int]
"""A topic and a partition of it."""

FIRST = 0
"""Where what there is begins: an offset, since librdkafka waits half a second before it asks for one. Where less is
left it goes on from the first that is there ("auto.offset.reset")."""
BURST = 500  # records that the loop is handed at once
END = {"enable.partition.eof": True, "fetch.wait.max.ms": 10}  # tells as soon as there is no more to read
POLL = 0.05  # seconds that a thread waits for its broker before it looks what else there is to do
CALM = 0.05  # seconds that records may wait for the loop before crowded topics are paused
LATER = (
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.NOT_COORDINATOR,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
)
"""Why a commit may fail that is taken a moment later."""
FEW = 16  # records outstanding up to which each is sent at once; of more a batch is made in "linger.ms"
MANY = 128  # records of one turn of the loop that are handed over together; so the broker has work meanwhile
BULK = 512 * 1024  # bytes of them after which the others wait for the next turn: each is copied, which takes its time
FAREWELL = 1.0  # seconds that leaving a group may take
FLUSH = 2.0  # seconds that what was produced has to be confirmed when the producer is closed
ANSWER = 5.0  # seconds that a group's coordinator may take


class Outlet:
    """A producer, and the thread that waits for its confirmations."""

    def __init__(self, config: dict[str, Any], trouble: Callable[[KafkaError], None]) -> None:
        """`trouble` is told on the loop of what happens to its connections."""
        self.loop = asyncio.get_running_loop()
        self._trouble = trouble
        self._turn: list[tuple[asyncio.Future[None], tuple[Any, ...]]] = []  # what was put in this turn of the loop
        self._reports: list[tuple[asyncio.Future[None], KafkaError | None]] = []
        self._outstanding = 0
        self._work = threading.Event()
        self._room: asyncio.Future[None] | None = None  # there while a sender waits for room in the queue
        self._closing = False
        self._over = self.loop.create_future()
        self.producer: Any = Producer({**config, "error_cb": self._on_error})
        self.produce: Callable[..., None] = self.producer.produce
        self._thread = threading.Thread(target=self._run, name="quintet-kafka-producer", daemon=True)
        self._thread.start()

    def put(
        self, topic: str, body: bytes | None, key: str | None, headers: Headers, partition: int, timestamp: int
    ) -> asyncio.Future[None]:
        """Hands a record to the producer at the end of this turn of the loop, with the others of the turn, or with so
        MANY: librdkafka would send the first by itself. The future is done once the broker has confirmed it; it fails
        with a KafkaException, BufferError where the queue is full, or UnicodeEncodeError. `partition`: -1 for the one
        of its key; `timestamp`: milliseconds since 1970, 0 for now."""
        future: asyncio.Future[None] = self.loop.create_future()
        if not self._turn:
            self.loop.call_soon(self._hand_over)
        report = partial(self._on_delivery, future)
        self._turn.append((future, (topic, body, key, partition, report, None, timestamp, headers)))
        if len(self._turn) == MANY:
            self._hand_over()
        return future

    def _hand_over(self, most: int = BULK) -> None:
        turn, self._turn = self._turn, []
        produce, room = self.produce, most
        for place, (future, record) in enumerate(turn):
            if room <= 0:
                self._turn = turn[place:]
                self.loop.call_soon(self._hand_over)
                break
            if not future.done():  # else its sender has gone
                try:
                    produce(*record)  # arguments with names take twice the time
                except Exception as error:
                    future.set_exception(error)
                else:
                    self._outstanding += 1
                    room -= len(record[1] or b"")
        self._work.set()

    async def room(self) -> None:
        """Waits until something was confirmed."""
        self._room = self._room or self.loop.create_future()
        await asyncio.shield(self._room)

    async def close(self) -> None:
        """Waits a little for what was produced to be confirmed; the rest fails."""
        self._hand_over(sys.maxsize)
        self._closing = True
        self._work.set()
        await asyncio.shield(self._over)

    # in the producer's thread

    def _on_delivery(self, future: asyncio.Future[None], error: KafkaError | None, _: object) -> None:
        self._reports.append((future, error))

    def _on_error(self, error: KafkaError) -> None:
        _tell(self.loop, self._trouble, error)

    def _run(self) -> None:
        producer = self.producer
        while not self._closing:
            self._work.clear()
            if not self._outstanding:
                producer.poll(0)  # for its errors
                self._work.wait(POLL)
            elif self._outstanding <= FEW:
                producer.flush(0.002)  # sends at once what otherwise waits for more ("linger.ms")
            else:
                producer.poll(POLL)
            if self._reports:
                reports, self._reports = self._reports, []
                _tell(self.loop, self._resolve, reports)
        producer.flush(FLUSH)
        producer.purge()
        producer.flush(FLUSH)
        _tell(self.loop, self._resolve, self._reports)
        self.producer = self.produce = None  # type: ignore[assignment]  # frees its threads here, and not in the loop's
        del producer
        _tell(self.loop, _finish, self._over)

    # in the loop

    def _resolve(self, reports: list[tuple[asyncio.Future[None], KafkaError | None]]) -> None:
        self._outstanding -= len(reports)
        for future, error in reports:
            if future.done():  # its sender has gone
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(KafkaException(error))
        room, self._room = self._room, None
        if room is not None:
            room.set_result(None)


def read_all(config: dict[str, Any], topic: str, partitions: int) -> list[Record]:
    """All records that a topic holds at the moment, for a thread of one's own. Raises KafkaException."""
    consumer: Any = Consumer({**config, "group.id": "quintet", "enable.auto.commit": False, **END})
    records: list[Record] = []
    try:
        consumer.assign([TopicPartition(topic, number, FIRST) for number in range(partitions)])
        at_end: set[int] = set()
        while len(at_end) < partitions:
            found = consumer.poll(ANSWER)
            if found is None:
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"{topic} could not be read"))
            for record in (found, *consumer.consume(BURST, 0)):
                error = record.error()
                if error is None:
                    records.append(record)
                elif error.code() == KafkaError._PARTITION_EOF:
                    at_end.add(record.partition())
                elif error.fatal():
                    raise KafkaException(error)
    finally:
        consumer.close()
    return records


class Listener(Protocol):
    """What the loop's side does with a consumer's events. All of it is called on the loop, in the order it happened."""

    def arrived(self, records: Sequence[Record]) -> None: ...

    def assigned(self, places: dict[Place, tuple[int | None, str]]) -> None:
        """From now on records of these partitions come, from the offset that was committed or is set in `starts`
        (None: from the first), with the metadata that was committed."""
        ...

    def revoked(self, places: Iterable[Place]) -> Coroutine[Any, Any, Sequence[TopicPartition]]:
        """The partitions go to another member once this returns, and what it returns is committed before."""
        ...

    def lost(self, places: Iterable[Place]) -> None:
        """The partitions are another member's already."""
        ...

    def uncommitted(self, places: Iterable[Place]) -> None:
        """The last commit of these failed."""
        ...

    def failed(self) -> None:
        """The consumer takes nothing any more: make another, in its `seat`."""
        ...


class Inlet:
    """A consumer, and the thread that polls it: a member of `group`, or of none where that is empty."""

    def __init__(self, config: dict[str, Any], group: str, listener: Listener, seat: Seat | None = None) -> None:
        self.starts: dict[Place, int] = {}  # where to begin in a partition of which the group has committed nothing
        self.crowded: frozenset[str] = frozenset()  # topics of which the loop has enough for now: set by `crowd`
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._eager = "cooperative" not in str(config.get("partition.assignment.strategy", "cooperative"))
        self._orders: deque[tuple[Callable[[Any], Any], asyncio.Future[Any]]] = deque()
        self._held: dict[Place, TopicPartition] = {}
        self._paused: frozenset[Place] = frozenset()
        self._calm = threading.Event()
        self._closing = False
        self._over = self._loop.create_future()
        # librdkafka wants a group of every consumer, also where it takes part in none
        own = {"group.id": group or "quintet", "enable.auto.commit": False, "on_commit": self._on_commit}
        self.seat = seat
        if not group or config.get("group.instance.id") == "":
            config = {name: value for name, value in config.items() if name != "group.instance.id"}
        elif "group.instance.id" not in config:
            self.seat = seat or Seat(f"{config['bootstrap.servers']} {group}")
            own["group.instance.id"] = self.seat.id
        self.consumer: Any = Consumer({**config, **own})
        self._thread = threading.Thread(target=self._run, name=f"quintet-kafka-{group or 'reader'}", daemon=True)
        self._thread.start()

    def do(self, order: Callable[[Any], T]) -> asyncio.Future[T]:
        """Has the consumer's thread call `order(consumer)`; at most POLL seconds pass before it does."""
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._closing:
            future.set_exception(KafkaException(KafkaError(KafkaError._DESTROY, "the consumer is closed")))
        else:
            self._orders.append((order, future))
        return future

    def subscribe(self, topics: Sequence[str]) -> asyncio.Future[None]:
        return self.do(
            lambda consumer: consumer.subscribe(
                list(topics), on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )
        )

    def assign(self, places: dict[Place, int]) -> asyncio.Future[None]:
        """Reads these partitions from these offsets, too, without a group."""

        def order(consumer: Any) -> None:
            for place, offset in places.items():
                self._held[place] = TopicPartition(*place, offset)
            consumer.incremental_assign([self._held[place] for place in places])

        return self.do(order)

    def unassign(self, places: Iterable[Place]) -> asyncio.Future[None]:
        def order(consumer: Any) -> None:
            gone = [self._held.pop(place) for place in places if place in self._held]
            if gone:
                consumer.incremental_unassign(gone)

        return self.do(order)

    def commit(self, offsets: Sequence[TopicPartition], *, wait: bool = False) -> asyncio.Future[Any]:
        """With `wait` it fails with a KafkaException; without, the listener is told of what could not be committed."""
        return self.do(lambda consumer: _commit(consumer, offsets) if wait else consumer.commit(offsets=list(offsets)))

    def crowd(self, topics: Iterable[str]) -> None:
        """Of these topics the loop has enough for now, of the others it may have more."""
        self.crowded = frozenset(topics)
        self._be_calm()

    async def close(self) -> None:
        """Leaves the group, without committing."""
        self._closing = True
        self._calm.set()
        await asyncio.shield(self._over)

    # in the consumer's thread

    def _run(self) -> None:
        consumer, loop, calm, fatal = self.consumer, self._loop, self._calm, False
        while True:
            self._work_off(consumer)
            if self._closing:
                break
            self._balance(consumer)
            try:
                record = consumer.poll(POLL)
                if record is None:
                    if self.seat is not None:
                        self.seat.hold()
                    continue
                records = [record, *consumer.consume(BURST - 1, 0)]  # with a time it would wait for so many
            except KafkaException as error:
                if error.args[0].code() != KafkaError._FATAL:  # a rebalance that failed: librdkafka joins again
                    continue
                fatal = True
                _tell(loop, self._listener.failed)
                while not self._closing:
                    self._work_off(consumer)
                    time.sleep(POLL)
                break
            calm.clear()
            _tell(loop, self._arrived, records)
            calm.wait(CALM)
        self._work_off(consumer)  # what was asked before it was closed
        if not fatal:
            with contextlib.suppress(KafkaException):
                self._leave(consumer)
        with contextlib.suppress(KafkaException, RuntimeError):
            consumer.close()
        if self.seat is not None and not fatal:
            self.seat.free()
        self.consumer = None
        del consumer
        _tell(loop, _finish, self._over)

    def _leave(self, consumer: Any) -> None:
        """Tells the group so: `close` alone would keep the seat of a member that has one."""
        give_up = time.monotonic() + FAREWELL
        if consumer.memberid():
            consumer.unsubscribe()
            while consumer.memberid() and time.monotonic() < give_up:
                consumer.poll(0.01)

    def _work_off(self, consumer: Any) -> None:
        while self._orders:
            order, future = self._orders.popleft()
            try:
                _tell(self._loop, _finish, future, order(consumer))
            except Exception as error:
                _tell(self._loop, _fail, future, error)

    def _balance(self, consumer: Any) -> None:
        """Pauses what is crowded, and goes on with what is not any more. What is paused is fetched again later, so
        that only topics are paused that stay crowded for a while."""
        crowded = self.crowded
        wanted = frozenset(place for place in self._held if place[0] in crowded) if crowded else frozenset[Place]()
        paused = self._paused & self._held.keys()
        if wanted == paused:
            return
        if more := wanted - paused:
            consumer.pause([TopicPartition(*place) for place in more])
        if less := paused - wanted:
            consumer.resume([TopicPartition(*place) for place in less])
        self._paused = wanted

    def _on_assign(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        begun: dict[Place, tuple[int | None, str]] = {}
        if partitions:
            for found in self._committed(consumer, partitions):
                place = (found.topic, found.partition)
                start = found.offset if found.offset >= 0 else self.starts.get(place)
                begun[place] = (start, found.metadata or "")
                self._held[place] = TopicPartition(*place, FIRST if start is None else start)
            self._paused -= begun.keys()
            taken = [self._held[place] for place in begun]
            consumer.assign(taken) if self._eager else consumer.incremental_assign(taken)
        _tell(self._loop, self._listener.assigned, begun)

    def _committed(self, consumer: Any, partitions: list[TopicPartition]) -> list[TopicPartition]:
        wanted = [TopicPartition(partition.topic, partition.partition) for partition in partitions]
        while True:
            try:
                found: list[TopicPartition] = consumer.committed(wanted, timeout=ANSWER)
            except KafkaException:  # to begin at a wrong place would lose or repeat what was sent
                if self._closing:
                    return []
                self._calm.wait(POLL)
            else:
                return found

    def _on_revoke(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        places = [(partition.topic, partition.partition) for partition in partitions]
        if not self._closing:
            # fails where the loop is gone, or nothing could be committed: then the next member repeats it
            with contextlib.suppress(KafkaException, RuntimeError):
                leaving = asyncio.run_coroutine_threadsafe(self._listener.revoked(places), self._loop)
                if offsets := leaving.result():
                    _commit(consumer, offsets)
        for place in places:
            self._held.pop(place, None)

    def _on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        failed = [(one.topic, one.partition) for one in partitions if error is not None or one.error is not None]
        if failed:
            _tell(self._loop, self._listener.uncommitted, failed)

    def _on_lost(self, _: Any, partitions: list[TopicPartition]) -> None:
        places = [(partition.topic, partition.partition) for partition in partitions]
        for place in places:
            self._held.pop(place, None)
        _tell(self._loop, self._listener.lost, places)

    # in the loop

    def _arrived(self, records: Sequence[Record]) -> None:
        self._listener.arrived(records)
        self._be_calm()

    def _be_calm(self) -> None:
        """More may come at once, as long as it is not of a topic that is crowded and not paused yet."""
        if not self.crowded or self.crowded <= {topic for topic, _ in self._paused}:
            self._calm.set()


def _commit(consumer: Any, offsets: Sequence[TopicPartition]) -> None:
    """Commits and waits for it, also where the group is just being rebalanced. Raises KafkaException."""
    give_up = time.monotonic() + ANSWER
    while True:
        try:
            consumer.commit(offsets=list(offsets), asynchronous=False)
        except KafkaException as error:
            if error.args[0].code() not in LATER or time.monotonic() > give_up:
                raise
            time.sleep(0.02)
        else:
            return


def _tell(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop was closed before the transport
        loop.call_soon_threadsafe(function, *args)


def _finish(future: asyncio.Future[Any], result: object = None) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
