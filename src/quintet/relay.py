"""The relay: sends what committed transactions left in the outbox, each until it is accepted, and deletes it then.

It runs inside the service. A process that dies between the send and the deletion leaves the row: it is sent again,
under the same id, and a receiver with an `idempotent` store drops the repeat.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Iterable, Sequence
from contextvars import copy_context
from typing import Any

from msgspec import DecodeError

from quintet.binding import bind
from quintet.call import Options
from quintet.client import Sender
from quintet.clock import Clock
from quintet.contract import Fault
from quintet.errors import CallError, RemoteError, Safety, TransportError
from quintet.message import Message
from quintet.outbox import AGAIN, SENDABLE, Box, Count, Desk, Outbox, Row, Settled, Way
from quintet.policy import Policy
from quintet.transport import Address, ChannelState
from quintet.watch import Watch

log = logging.getLogger("quintet.relay")

POLICY = Policy(timeout=5.0, breaker=False, bulkhead=False, retry=False, hedge=False)
"""Of what is relayed: the relay waits and tries again by itself, and is to find at once that a broker is back."""
GROUP = "quintet.outbox"  # stands for the group in what is shown of a channel's messages that are not sent yet
BATCH = 200  # rows of a channel that are sent at once
LOOK_SECONDS = 1.0  # between two looks at the table, for what no wake-up told


class Relay:
    """Sends the outbox of one running service: each channel on its own, so that one whose broker is away holds up no
    other; in a channel the messages of one key in order, and others side by side."""

    def __init__(self, box: Box, senders: Iterable[Sender], format_name: str, clock: Clock, watch: Watch) -> None:
        ways = [_way(sender, format_name) for sender in senders if sender.operation.style in SENDABLE]
        self.box = box
        self._desk = Desk(box, {way.operation.full_name: way for way in ways})
        self._ways = {way.operation.channel.name: way for way in ways}
        self._clock = clock
        self._watch = watch
        self._lanes: dict[str, asyncio.Task[None]] = {}
        self._more: set[str] = set()  # channels in which something came since they were read
        self._failing: set[str] = set()  # channels whose last send failed
        self._in_work: dict[str, int] = {}
        self._woken = asyncio.Event()
        self._stopping = False
        self._paused: set[asyncio.Event] = set()  # after a failure
        self._looking: asyncio.Task[None] | None = None
        self._context = copy_context()
        self._leads = False  # else another instance relays
        self._outbox: Outbox | None = None
        self.connected = True

    def __repr__(self) -> str:
        return f"<relay of {self.box!r}: {sum(self._in_work.values())} in work{'' if self.connected else ', away'}>"

    @property
    def address(self) -> Address:
        return self.box.address

    async def open(self, outbox: Outbox) -> None:
        """Lets the outbox be added to. Raises TransportError, ConfigurationError."""
        await self.box.open(self.wake)
        outbox._opened[:] = [self._desk]
        self._outbox = outbox

    def start(self) -> None:
        """Begins to send: when all of the process listens, or what waited would pass by its own services."""
        self._looking = asyncio.get_running_loop().create_task(self._look())

    async def stop(self) -> None:
        """Sends once more what is there now, waits for what is under way, and ends."""
        self._stopping = True
        for pause in self._paused:
            pause.set()
        try:
            if self._looking is not None:
                self._looking.cancel()
                await asyncio.wait([self._looking])
                await self._look_once()
            await asyncio.gather(*self._lanes.values(), return_exceptions=True)
        finally:
            for lane in self._lanes.values():
                lane.cancel()
            await asyncio.gather(*self._lanes.values(), return_exceptions=True)
            if self._outbox is not None:
                self._outbox._opened.clear()
            await self.box.close()

    async def channels(self) -> Sequence[ChannelState]:
        """What waits in the outbox, by channel."""
        return [self._state(count) for count in await self.box.count()]

    def _state(self, count: Count) -> ChannelState:
        in_work = min(count.waiting, self._in_work.get(count.channel, 0))
        return ChannelState(
            channel=count.channel,
            group=GROUP,
            waiting=count.waiting - in_work,
            in_work=in_work,
            dead=count.set_aside,
            oldest=count.oldest,
        )

    # looking

    def wake(self, channel: str) -> None:
        """Something may wait in the channel, or, without one, anywhere."""
        if not channel:
            self._woken.set()
            return
        self._more.add(channel)
        hopeless = self._stopping and channel in self._failing
        if self._leads and channel not in self._lanes and not hopeless:
            # not in the context of the handler that woke us: its deadline is not the relay's
            context = self._context.copy()
            self._lanes[channel] = asyncio.get_running_loop().create_task(self._carry(channel), context=context)

    async def _look(self) -> None:
        while True:
            self._woken.clear()
            await self._look_once()
            await self._clock.until(self._woken, LOOK_SECONDS)

    async def _look_once(self) -> None:
        try:
            channels = await self.box.look()
        except (TransportError, CallError) as error:
            self._lost(error)
            return
        self._found()
        self._leads = channels is not None
        for channel in {*(channels or ()), *self._more}:
            self.wake(channel)

    def _lost(self, error: Exception) -> None:
        if self.connected:
            self.connected = False
            self._watch.tell("broker-lost", str(self.address), error)

    def _found(self) -> None:
        if not self.connected:
            self.connected = True
            self._watch.tell("broker-back", str(self.address))

    # carrying

    async def _carry(self, channel: str) -> None:
        """Sends what waits in a channel until there is nothing more."""
        settled, failures = Settled(), 0
        try:
            while True:
                self._more.discard(channel)
                try:
                    rows = await self.box.turn(channel, settled, BATCH)
                    self._found()
                    settled = Settled()
                    if not rows and channel not in self._more:
                        return
                    error = await self._send(channel, rows, settled)
                    self._failing.add(channel)
                    if error is None:
                        self._failing.discard(channel)
                        failures = 0
                        if not self._stopping:
                            continue
                    failures = 0 if settled.sent else failures
                    await self.box.turn(channel, settled, 0)  # what is done must not wait with what is not
                    settled = Settled()
                except (TransportError, CallError) as gone:
                    error = gone
                    self._lost(gone)
                failures += 1
                if not self._stopping:
                    level = logging.WARNING if failures == 1 else logging.DEBUG
                    log.log(level, "%s waits in the outbox, and is tried again: %s", channel, error)
                    await self._pause(AGAIN.wait(failures, self._clock.random.random()))
                if self._stopping:
                    return
        except Exception:
            log.exception("%s: an error in the relay; it goes on at the next look", channel)
        finally:
            del self._lanes[channel]

    async def _pause(self, seconds: float) -> None:
        """Or until the relay is to stop."""
        over = asyncio.Event()
        self._paused.add(over)
        try:
            await self._clock.until(over, seconds)
        finally:
            self._paused.discard(over)

    async def _send(self, channel: str, rows: Sequence[Row], settled: Settled) -> Exception | None:
        """Sends rows and notes what became of them. Gives an error where some are to be tried again."""
        way = self._ways.get(channel)
        if way is None:
            reason = f"{self.box.service} says nothing in {channel} any more: its contracts changed while this waited"
            for row in rows:
                self._set_aside(channel, row, reason, settled)
            return None
        chains: dict[object, list[Row]] = {}
        for row in rows:
            chains.setdefault(row.key or row.seq, []).append(row)
        self._in_work[channel] = len(rows)
        try:
            failed = await asyncio.gather(*(self._send_in_order(way, chain, settled) for chain in chains.values()))
        finally:
            del self._in_work[channel]
        return next((error for error in failed if error is not None), None)

    async def _send_in_order(self, way: Way, chain: Sequence[Row], settled: Settled) -> Exception | None:
        """Sends the messages of one key; stops at the first that cannot be sent now, and gives the reason."""
        channel = way.operation.channel
        for row in chain:
            if row.expires is not None and row.expires <= self._clock.wall():
                settled.sent.append(row.seq)  # as its sender wished
                continue
            try:
                message = row.unpacked(channel, self._clock)
                await _within_trace(way, message)
            except DecodeError as error:
                self._set_aside(channel.name, row, f"its row cannot be read: {error}", settled)
            except Exception as error:
                if not _is_for_good(error):
                    return error
                self._set_aside(channel.name, row, f"{type(error).__name__}: {error}", settled)
            else:
                settled.sent.append(row.seq)
            if self._stopping:
                return None
        return None

    def _set_aside(self, channel: str, row: Row, reason: str, settled: Settled) -> None:
        settled.refused.append((row.seq, reason))
        way = self._ways.get(channel)
        self._watch.tell("dead-letter", way.operation.full_name if way else channel, reason)


def _is_for_good(error: Exception) -> bool:
    """Whether it would be refused in the same way again. A handler that failed (over HTTP it says so) may not."""
    if isinstance(error, CallError):
        return error.safety is Safety.FAILED and not isinstance(error, RemoteError)
    return isinstance(error, Fault)


async def _within_trace(way: Way, message: Message) -> None:
    """Sends the message with its trace as the one in work, as if it were sent where it was added."""
    propagate: Any = sys.modules.get("opentelemetry.propagate")
    if propagate is None:
        await way.send(message)
        return
    from opentelemetry import context

    token = context.attach(propagate.extract(message.headers))
    try:
        await way.send(message)
    finally:
        context.detach(token)


def _way(sender: Sender, format_name: str) -> Way:
    operation, outside = sender.operation, sender.bound
    inside = bind("body", operation, format_name)
    if type(outside) is type(inside):
        return Way(operation, sender.prepare, sender.send)

    def prepare(args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> Message:
        return _moved(sender.prepare(args, kwargs, options), inside.request(operation.record(*args, **kwargs)))

    async def send(message: Message) -> None:
        await sender.send(_moved(message, outside.request(inside.arguments(message))))

    return Way(operation, prepare, send)


def _moved(message: Message, other: Message) -> Message:
    """The other, which holds the same in another binding, with what goes beside it."""
    other.id, other.sender, other.key, other.deadline = message.id, message.sender, message.key, message.deadline
    other.headers |= {name: value for name, value in message.headers.items() if not name.startswith(":")}
    return other
