"""The embedded broker: any number of processes of one machine share a SQLite file (the engine: `wire/sqlite.py`)."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Sequence
from typing import ClassVar, Self, TypeAlias

import apsw
from msgspec import DecodeError

from quintet.clock import SYSTEM, Clock, Handle
from quintet.database import Database, close_database, file_of, mode_of, open_database, refusal
from quintet.errors import AddressError, InvalidMessage, TransportError, Unavailable
from quintet.message import Channel, Message
from quintet.transport import Address, Again, ChannelState, Dead, DeadLetter, Done, Finding, Receive, Trait, Transport
from quintet.wire import sqlite as engine
from quintet.wire.envelope import pack, unpack
from quintet.workers import Workers

LOOK_SECONDS = 5.0
"""The longest time between two looks at the file, for what no wake-up announced: a process that died, a lost one."""
UNFINISHED_AFTER = 1.0  # seconds until a delivery whose receiver raised or was cancelled comes again

Delivery: TypeAlias = tuple[engine.Row, engine.Claim]


class Carrier(Transport):
    """sqlite:///relative.db or sqlite:////absolute.db, with these options behind a "?":

    lease=30            seconds until the messages of a receiver that hangs come again (a dead one is noticed earlier)
    attempts=10         crashes of its receivers until a message goes to the dead letters
    capacity=100000     messages per channel and group; over it ChannelFull, or a dead letter for a fan-out group
    retain=0            seconds that finished messages are kept in the table quintet_done
    mode=0600           permissions of a file that is made, in octal; the folder that is made for it has them as well
    synchronous=full    "normal" accepts without waiting for the disk: faster, a power cut may take the last moments
    """

    traits = frozenset({Trait.FANOUT, Trait.DURABLE, Trait.REDELIVERS, Trait.DELAYS, Trait.ORDERED})
    options: ClassVar[frozenset[str]] = frozenset({"lease", "attempts", "capacity", "retain", "mode", "synchronous"})

    def __init__(self, address: Address, clock: Clock = SYSTEM) -> None:
        super().__init__(address, clock)
        self._file, self._mode = file_of(address), mode_of(address)
        self._lease = address.option("lease", 30.0, 0.1)
        self.attempts = address.count("attempts", 10)
        self._capacity = address.count("capacity", 100_000)
        self.retain = address.option("retain", 0.0)
        synchronous = address.options.get("synchronous", "full")
        if synchronous not in ("full", "normal"):
            raise AddressError(f"{address}: option synchronous={synchronous!r} must be full or normal")
        self._to_disk = synchronous == "full"
        self._database: Database | None = None
        self.receiver = 0
        self._servings: list[_Serving] = []
        self._tails: list[_Tail] = []
        self._unsettled: list[engine.Settle] = []
        self._timer: Handle | None = None
        self._beating: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def connected(self) -> bool:
        """False once its file was removed or replaced."""
        return self._database is None or not self._database.removed

    @property
    def database(self) -> Database:
        if self._database is None:
            raise Unavailable(f"{self!r} is not open: open() it first, and send and serve before close()")
        return self._database

    async def open(self) -> None:
        self._database = await open_database(self._file, mode=self._mode)
        self._closing = False
        try:
            await self._database.submit(engine.CREATE, None)
            await self._join()
        except BaseException:
            await self.close()
            raise
        self._arm()

    async def close(self) -> None:
        """Cancels what is still in work; it goes back to its channel."""
        if self._database is None or self._closing:
            return
        self._closing = True
        database = self._database
        if self._timer is not None:
            self._timer.cancel()
        try:
            if self._beating is not None:
                self._beating.cancel()
                await asyncio.wait([self._beating])
            for tail in list(self._tails):
                await tail.aclose()
            await asyncio.gather(*(serving.abort() for serving in list(self._servings)))
            with contextlib.suppress(TransportError):  # then the lease ends it
                await database.submit(engine.LEAVE, self.receiver)
        finally:
            self._database = None
            await close_database(database)

    async def send(self, message: Message) -> None:
        channel, clock = message.channel, self.clock
        try:
            packed = pack(message)
            message.key.encode()
        except UnicodeEncodeError as error:
            raise InvalidMessage(f"{channel.name}: the message cannot be written as UTF-8: {error}") from None
        send = engine.Send(
            channel.name,
            channel.fanout,
            channel.temporary,
            message.key,
            clock.to_wall(message.deadline),
            message.attempt,
            clock.wall(),
            self._capacity,
            packed,
        )
        try:
            await self.database.submit(engine.enqueue, send, durable=channel.durable and self._to_disk)
        except TransportError as error:
            raise refusal(error) from error

    async def serve(self, channel: Channel, receive: Receive, group: str, limit: int = 100) -> _Serving:
        serving = _Serving(self, channel, receive, group if channel.fanout else "", limit)
        self._servings.append(serving)
        try:
            await serving.subscribe()
        except BaseException:
            self.ended(serving)
            raise
        return serving

    # Signs of life

    async def _join(self) -> None:
        self.receiver = await self.database.submit(engine.JOIN, self.clock.wall() + self._lease)

    def _arm(self) -> None:
        period = min(self._lease / 3, LOOK_SECONDS)
        self._timer = self.clock.call_at(self.clock.now() + period, self._tick)

    def _tick(self) -> None:
        self._arm()
        if self._beating is None or self._beating.done():
            self._beating = asyncio.get_running_loop().create_task(self._beat())

    async def _beat(self) -> None:
        """Prolongs the lease of all that is in work here, and looks for what no wake-up told."""
        now = self.clock.wall()
        try:
            await self.database.bury()
            if not await self.database.submit(engine.BEAT, engine.Beat(self.receiver, now + self._lease, now)):
                await self.database.enrol()
                await self._join()
                held: list[_Serving | _Tail] = [*self._servings, *self._tails]
                for one in held:
                    await one.subscribe()
            unsettled, self._unsettled = self._unsettled, []
            for settle in unsettled:
                self.settle(settle)
        except TransportError as error:
            self.report(error)
        for serving in self._servings:
            serving.pump()
        for tail in self._tails:
            tail.wake()

    def settle(self, settle: engine.Settle) -> asyncio.Future[None]:
        """Writes verdicts; those that the file does not take now are written later, for they stand."""

        def written(future: asyncio.Future[None]) -> None:
            error = None if future.cancelled() else future.exception()
            if error is not None:
                self._unsettled.append(settle)
                self.report(error)

        future = self.database.submit(engine.settle, settle)
        future.add_done_callback(written)
        return future

    def report(self, error: BaseException) -> None:
        """A failure that no caller waits for: it is tried again at the next sign of life."""
        context = {"message": f"{self!r}: {error}", "exception": error}
        asyncio.get_running_loop().call_exception_handler(context)

    async def examine(self) -> Sequence[Finding]:
        held = "until the disk has it" if self._to_disk else "not until the disk has it: a power cut may take the last"
        return [
            Finding("version", f"SQLite {apsw.sqlite_lib_version()}"),
            Finding("accepted", held, well=self._to_disk),
        ]

    # Tailing, Counting, Letters

    def tail(self, channel: str) -> _Tail:
        tail = _Tail(self, channel)
        self._tails.append(tail)
        return tail

    def tail_ended(self, tail: _Tail) -> None:
        self._tails.remove(tail)

    async def channels(self) -> Sequence[ChannelState]:
        return await self.database.submit(engine.CHANNELS, self.clock.wall())

    async def dead(self, channel: str | None = None) -> Sequence[DeadLetter]:
        return await self.database.submit(engine.DEAD, channel)

    async def replay(self, ids: Sequence[str]) -> int:
        return await self.database.submit(engine.REPLAY, engine.Replay(ids, self.clock.wall()), durable=True)

    async def drop(self, ids: Sequence[str]) -> int:
        return await self.database.submit(engine.DROP, ids, durable=True)

    def ended(self, serving: _Serving) -> None:
        if serving in self._servings:
            self._servings.remove(serving)


class _Serving:
    """One queue being served: it claims only what its free workers can begin, so that others get their share."""

    def __init__(self, carrier: Carrier, channel: Channel, receive: Receive, group: str, limit: int) -> None:
        self.carrier = carrier
        self.channel = channel
        self.receive = receive
        self.group = group
        self.workers = Workers(self._take, self._deliver, limit)
        self._queue = 0
        self._topic = ""
        self._ready: deque[Delivery] = deque()
        self._claim: asyncio.Future[engine.Claimed] | None = None
        self._more = False  # there may be more in the file
        self._settles: dict[tuple[int, int], engine.Settle] = {}  # verdicts of this turn of the loop
        self._written: set[asyncio.Future[None]] = set()
        self._timer: Handle | None = None
        self._due = 0.0  # when the timer fires
        self._stopping = False

    def __repr__(self) -> str:
        return f"<serving {self.channel.name} as {self.group or 'its one receiver'}: {self.workers!r}>"

    async def subscribe(self) -> None:
        """Makes sure that the queue exists, listens to it, and takes what is in it."""
        channel, database = self.channel, self.carrier.database
        holder = self.carrier.receiver if channel.temporary else None
        wish = engine.Subscribe(channel.fanout, channel.name, self.group, holder)
        self._queue = await database.submit(engine.SUBSCRIBE, wish, durable=not channel.temporary)
        if self._topic != engine.queue_topic(self._queue):
            await self._unlisten()
            self._topic = engine.queue_topic(self._queue)
            await database.listen(self._topic, self.pump)
        self.pump()

    async def _unlisten(self) -> None:
        if self._topic:
            topic, self._topic = self._topic, ""
            await self.carrier.database.unlisten(topic, self.pump)

    # Claiming

    def pump(self, _: str = "") -> None:
        """There may be something to take."""
        self._more = True
        self._claim_more()

    def _claim_more(self) -> None:
        count = self.workers.free - len(self._ready)
        if not self._more or self._claim is not None or self._stopping or count <= 0:
            return
        self._more = False
        carrier = self.carrier
        claim = engine.Claim(self._queue, carrier.receiver, count, carrier.clock.wall(), carrier.attempts)
        self._claim = carrier.database.submit(engine.CLAIM, claim)
        self._claim.add_done_callback(lambda future: self._claimed(future, claim))

    def _claimed(self, future: asyncio.Future[engine.Claimed], claim: engine.Claim) -> None:
        self._claim = None
        error = None if future.cancelled() else future.exception()
        if future.cancelled() or error is not None:
            if error is not None and not self._stopping:
                self.carrier.report(error)
            return
        claimed = future.result()
        self._ready.extend((row, claim) for row in claimed.rows)
        if self._stopping:
            self._give_back()
            return
        if claimed.full:
            self._more = True
        if claimed.next_due is not None:
            self._pump_at(claimed.next_due)
        if self._ready:
            self.workers.wake()
        self._claim_more()

    def _pump_at(self, due: float) -> None:
        """Looks again at that wall-clock time: for a message that waits until then."""
        if self._timer is not None:
            if self._due <= due:
                return
            self._timer.cancel()
        clock = self.carrier.clock
        self._due = due
        self._timer = clock.call_at(clock.now() + due - clock.wall(), self._is_due)

    def _is_due(self) -> None:
        self._timer = None
        self.pump()

    # Delivering

    def _take(self) -> Delivery | None:
        if not self._ready:
            return None
        delivery = self._ready.popleft()
        if self._ready:
            self.workers.wake()
        return delivery

    async def _deliver(self, delivery: Delivery) -> None:
        (seq, attempt, key, expires, packed), claim = delivery
        try:
            message = unpack(packed, self.channel, attempt, self.carrier.clock.from_wall(expires))
            verdict = await self.receive(message)
        except DecodeError as error:
            verdict = Dead(f"its row in {self.carrier.database.path} cannot be read: {error}")
        except BaseException:
            self._verdicts(claim).again.append((0.0 if self.workers.stopped else UNFINISHED_AFTER, seq))
            raise
        verdicts = self._verdicts(claim)
        if isinstance(verdict, Again):
            verdicts.again.append((verdict.after, seq))
            return
        if isinstance(verdict, Done):
            verdicts.done.append(seq)
        else:
            verdicts.dead.append((seq, verdict.reason))
        if key:
            verdicts.keys.append(key)

    def _verdicts(self, claim: engine.Claim) -> engine.Settle:
        """The verdicts of this turn of the loop, which are written together at its end."""
        verdicts = self._settles.get((claim.queue, claim.receiver))
        if verdicts is None:
            if not self._settles:
                asyncio.get_running_loop().call_soon(self._write)
            verdicts = engine.Settle(claim.queue, claim.receiver)
            self._settles[claim.queue, claim.receiver] = verdicts
        return verdicts

    def _write(self) -> None:
        settles, self._settles = self._settles, {}
        for settle in settles.values():
            settle.now, settle.retain = self.carrier.clock.wall(), self.carrier.retain
            written = self.carrier.settle(settle)
            self._written.add(written)
            written.add_done_callback(self._written.discard)
        self._claim_more()  # in the same transaction

    # Ending

    def _give_back(self) -> None:
        while self._ready:
            row, claim = self._ready.popleft()
            self._verdicts(claim).unstarted.append(row[0])

    async def stop(self) -> None:
        await self._end(self.workers.drain())

    async def abort(self) -> None:
        with contextlib.suppress(TransportError):  # the lease ends what could not be written
            await self._end(self.workers.cancel())

    async def _end(self, ended: Awaitable[None]) -> None:
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()
        self.carrier.ended(self)
        try:
            self._give_back()
            await ended
        finally:
            while self._claim is not None:
                await asyncio.wait([self._claim])
                await asyncio.sleep(0)
            self._write()
            if self._written:
                await asyncio.wait(self._written)
            await self._unlisten()
            if self.channel.temporary and self._queue:
                queue, self._queue = self._queue, 0
                await self.carrier.database.submit(engine.REMOVE, queue)


class _Tail:
    """What is sent to the channels of a pattern from the moment this object is made until it is closed."""

    def __init__(self, carrier: Carrier, pattern: str) -> None:
        self._carrier = carrier
        self._pattern = pattern
        self._begun = self._watch()
        self._topic = ""
        self._seen: deque[Message] = deque()
        self._more = asyncio.Event()
        self._closed = False

    def __repr__(self) -> str:
        return f"<tail of {self._pattern}{', closed' if self._closed else ''}>"

    def __aiter__(self) -> Self:
        return self

    def _watch(self) -> asyncio.Future[int]:
        carrier = self._carrier
        return carrier.database.submit(engine.WATCH, engine.Watch(self._pattern, carrier.receiver))

    async def subscribe(self) -> None:
        """Begins anew, after others found this process dead."""
        await self._unlisten()
        self._begun = self._watch()
        self.wake()

    async def _unlisten(self) -> None:
        if self._topic:
            topic, self._topic = self._topic, ""
            await self._carrier.database.unlisten(topic, self.wake)

    def wake(self, _: str = "") -> None:
        self._more.set()

    async def __anext__(self) -> Message:
        database = self._carrier.database
        while not self._seen:
            tail = await asyncio.shield(self._begun)
            if not self._topic:
                self._topic = engine.tail_topic(tail)
                await database.listen(self._topic, self.wake)
                self._more.set()
            await self._more.wait()
            if self._closed:
                raise StopAsyncIteration
            self._more.clear()
            self._seen.extend(await database.submit(engine.LOOK, tail))
        return self._seen.popleft()

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._carrier.tail_ended(self)
        self._more.set()
        with contextlib.suppress(TransportError):  # the lease ends it
            await self._unlisten()
            await self._carrier.database.submit(engine.UNWATCH, await self._begun)
