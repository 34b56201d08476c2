"""The broker inside the process: for tests, and for services that share one event loop.

All `memory://name` addresses of one running loop with the same name meet on one bus, which lives as long as the loop.
It obeys what a broker between processes would: a message handed on is a fresh object, a group away keeps its place,
a full channel refuses. `memory://?like=kafka` takes on the traits of that transport, to test what will run there.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import ClassVar, Self

from msgspec import Struct, structs

from quintet.clock import SYSTEM, Clock
from quintet.errors import (
    AddressError,
    CallError,
    CannotCarry,
    ChannelFull,
    ConnectionLost,
    DeadlineExceeded,
    Overloaded,
    RemoteError,
    Unavailable,
)
from quintet.message import Channel, Message, new_id
from quintet.transport import (
    Address,
    Again,
    ChannelState,
    Dead,
    DeadLetter,
    Done,
    Receive,
    Trait,
    Transport,
    Verdict,
    carrier,
    parse_address,
)
from quintet.workers import Workers

CAPACITY = 50_000  # unsettled messages per channel and group, unless ?capacity= says otherwise
DEAD_KEPT = 10_000  # dead letters per bus; the oldest goes first
TAIL_KEPT = 10_000  # messages that one tail may lag behind; the oldest goes first
PACE = 256  # messages waiting at which a sender begins to give the loop its turn
UNFINISHED_AFTER = 1.0  # seconds until a delivery whose receiver was cancelled comes again

Observer = Callable[[str, Message, Verdict | None], None]
"""Called with the group, the message and what became of it: None as it is sent to the group ("" where it has none)."""


class _Entry(Struct, eq=False):
    """A message on its way to one group."""

    message: Message
    sent_at: float
    replied: asyncio.Future[Message | None] | None = None


class _Group:
    """The receivers that share a channel's messages, and what waits for them."""

    def __init__(self, bus: _Bus, channel: Channel, name: str) -> None:
        self.bus = bus
        self.channel = channel.name
        self.name = name
        self.temporary = channel.temporary
        self.servings: deque[_Serving] = deque()
        self.waiting: deque[_Entry] = deque()
        self.behind: dict[str, deque[_Entry]] = {}  # by key under way: what may not start before it is settled
        self.size = 0  # not yet settled: waiting, behind a key, delayed or in work
        self.in_work = 0

    def put(self, entry: _Entry) -> None:
        self.size += 1
        key = entry.message.key
        if key and self.bus.ordered:
            behind = self.behind.get(key)
            if behind is not None:
                behind.append(entry)
                return
            self.behind[key] = deque()
        self.waiting.append(entry)
        self.wake()

    def wake(self) -> None:
        """Has one receiver look, each in its turn."""
        servings = self.servings
        for _ in range(len(servings)):
            workers = servings[0].workers
            if len(servings) > 1:
                servings.rotate(-1)
            if workers.waking or workers.wake():
                return

    def take(self, now: Callable[[], float]) -> _Entry | None:
        while self.waiting:
            entry = self.waiting.popleft()
            deadline = entry.message.deadline
            if deadline is not None and deadline <= now():
                self.finish(entry, DeadlineExceeded("the message expired before anyone took it"))
                continue
            if self.waiting:
                self.wake()
            self.in_work += 1
            return entry
        return None

    def settle(self, entry: _Entry, verdict: Verdict, clock: Clock) -> None:
        """What becomes of a delivery that was in work."""
        self.in_work -= 1
        bus, message = self.bus, entry.message
        for observer in bus.observers:
            observer(self.name, message, verdict)
        if isinstance(verdict, Done):
            self.finish(entry, verdict.reply)
        elif isinstance(verdict, Dead):
            bus.bury(self, message, verdict.reason, clock.wall())
            self.finish(entry, RemoteError("the message could not be handled"))
        elif Trait.REDELIVERS not in bus.traits:
            self.finish(entry, Overloaded("the receiver asks for the message later", retry_after=verdict.after))
        else:
            entry.message = structs.replace(message, attempt=message.attempt + 1)
            if verdict.after > 0 and Trait.DELAYS in bus.traits:
                clock.call_at(clock.now() + verdict.after, lambda: self.again(entry))
            else:
                self.again(entry)

    def again(self, entry: _Entry) -> None:
        self.waiting.append(entry)
        self.wake()

    def finish(self, entry: _Entry, outcome: Message | CallError | None) -> None:
        """The entry is settled for good: the sender that waits for it learns so, and the next of its key may start."""
        self.size -= 1
        replied = entry.replied
        if replied is not None and not replied.done():
            if isinstance(outcome, CallError):
                replied.set_exception(outcome)
            else:
                replied.set_result(None if outcome is None else _fresh(outcome))
        key = entry.message.key
        if key and self.bus.ordered:
            behind = self.behind[key]
            if behind:
                self.again(behind.popleft())  # to the end of the line: one busy key does not starve the others
            else:
                del self.behind[key]

    def left(self) -> None:
        """A receiver has stopped: what it was woken for goes to another, and a temporary group goes with its last."""
        if self.servings:
            self.wake()
            return
        if self.temporary:
            self.bus.forget(self)
        if self.bus.replies:
            for entry in list(self.waiting):
                self.finish(entry, Unavailable(f"nobody serves {self.channel} any more"))
            self.waiting.clear()


class _Bus:
    """All channels of one name in one loop."""

    def __init__(self, traits: frozenset[Trait]) -> None:
        self.traits = traits
        self.ordered = Trait.ORDERED in traits  # asked for each message, and an Enum's hash is slow
        self.replies = Trait.REPLIES in traits
        self.queues: dict[str, _Group] = {}  # point-to-point: one group without a name
        self.groups: dict[str, dict[str, _Group]] = {}  # fan-out: by channel and group
        self.dead: dict[str, tuple[_Group, DeadLetter]] = {}
        self.observers: list[Observer] = []

    def all_groups(self) -> list[_Group]:
        return [*self.queues.values(), *(group for groups in self.groups.values() for group in groups.values())]

    def group(self, channel: Channel, name: str) -> _Group:
        if not channel.fanout:
            return self.queues.get(channel.name) or self.queues.setdefault(channel.name, _Group(self, channel, ""))
        groups = self.groups.setdefault(channel.name, {})
        return groups.get(name) or groups.setdefault(name, _Group(self, channel, name))

    def forget(self, group: _Group) -> None:
        for known in (self.queues, self.groups.get(group.channel, {})):
            for name in [name for name, other in known.items() if other is group]:
                del known[name]

    def bury(self, group: _Group, message: Message, reason: str, wall: float) -> None:
        if len(self.dead) >= DEAD_KEPT:
            del self.dead[next(iter(self.dead))]
        letter = DeadLetter(
            id=new_id(),
            channel=group.channel,
            group=group.name,
            reason=reason,
            attempts=message.attempt,
            died_at=wall,
            message=message,
        )
        self.dead[letter.id] = (group, letter)


_buses: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Bus]] = weakref.WeakKeyDictionary()


class _Serving:
    """One receiver of a group."""

    def __init__(self, group: _Group, receive: Receive, limit: int, clock: Clock) -> None:
        self.group = group
        self.receive = receive
        self.clock = clock
        self.workers = Workers(partial(group.take, clock.now), self._deliver, limit)
        group.servings.append(self)

    def __repr__(self) -> str:
        return f"<serving {self.group.channel} as {self.group.name or 'its one receiver'}: {self.workers!r}>"

    async def _deliver(self, entry: _Entry) -> None:
        try:
            verdict = await self.receive(_fresh(entry.message))  # the receiver may change what it got, not the original
        except BaseException:
            if Trait.REDELIVERS in self.group.bus.traits:
                unfinished = Again(0.0 if self.workers.stopped else UNFINISHED_AFTER, "its receiver was cancelled")
                self.group.settle(entry, unfinished, self.clock)
            else:
                self.group.in_work -= 1
                self.group.finish(entry, ConnectionLost("the receiver went away"))
            raise
        self.group.settle(entry, verdict, self.clock)

    async def stop(self) -> None:
        await self._leave(self.workers.drain())

    async def cancel(self) -> None:
        await self._leave(self.workers.cancel())

    async def _leave(self, ended: Awaitable[None]) -> None:
        if self in self.group.servings:
            self.group.servings.remove(self)
        try:
            await ended
        finally:
            self.group.left()


class Carrier(Transport):
    """`memory://name?like=kafka&capacity=50000`: a bus of this process and event loop."""

    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.FANOUT, Trait.REDELIVERS, Trait.DELAYS, Trait.ORDERED})
    options: ClassVar[frozenset[str]] = frozenset({"like", "capacity"})

    def __init__(self, address: Address, clock: Clock = SYSTEM) -> None:
        super().__init__(address, clock)
        if like := address.options.get("like"):
            try:
                vars(self)["traits"] = carrier(parse_address(f"{like}://")).traits  # this instance's own
            except ImportError as error:
                raise AddressError(f"{address}: to be like {like} its library is needed: {error}") from error
        self.capacity = address.count("capacity", CAPACITY)
        self._bus: _Bus | None = None
        self._servings: list[_Serving] = []
        self._tails: weakref.WeakSet[_Tail] = weakref.WeakSet()

    async def open(self) -> None:
        """Raises AddressError where the bus of this name is like another transport."""
        buses = _buses.setdefault(asyncio.get_running_loop(), {})
        bus = buses.setdefault(self.address.host + self.address.path, _Bus(self.traits))
        if bus.traits != self.traits:
            raise AddressError(f"{self.address}: this name is already in use with other traits; take another name")
        self._bus = bus

    async def close(self) -> None:
        """Cancels what is still in work; it goes back to its channel."""
        servings, self._servings, self._bus = self._servings, [], None
        for tail in list(self._tails):
            await tail.aclose()
        for serving in servings:
            await serving.cancel()

    async def send(self, message: Message) -> Message | None:
        bus, channel = self._opened(), message.channel
        if bus.observers:
            for observer in bus.observers:
                observer("", message, None)
        now = self.clock.now()
        if channel.fanout:
            self._require(Trait.FANOUT, channel)
            for group in list(bus.groups.get(channel.name, {}).values()):
                if group.size < self.capacity:
                    group.put(_Entry(_fresh(message), now))
                elif not group.temporary:  # one group that lags must not make the sender fail for the others
                    reason = f"the group has {self.capacity} messages waiting, as many as it may"
                    bus.bury(group, _fresh(message), reason, self.clock.wall())
                await self._pace(group)
            return None
        queue = bus.queues.get(channel.name)
        if queue is None or not queue.servings:
            if bus.replies:
                raise Unavailable(f"nobody serves {channel.name} at {self.address}")
            if channel.temporary:
                return None  # its holder is gone, and with it all interest in the message
            queue = bus.group(channel, "")
        if queue.size >= self.capacity:
            raise ChannelFull(f"{channel.name} at {self.address} has {queue.size} messages, as many as it may")
        entry = _Entry(_fresh(message), now)
        if bus.replies:
            entry.replied = asyncio.get_running_loop().create_future()
        queue.put(entry)
        if entry.replied is not None:
            return await entry.replied
        if len(queue.waiting) >= PACE:
            await self._pace(queue)
        return None

    async def serve(self, channel: Channel, receive: Receive, group: str, limit: int = 100) -> _Serving:
        bus = self._opened()
        if channel.fanout:
            self._require(Trait.FANOUT, channel)
        joined = bus.group(channel, group)
        serving = _Serving(joined, receive, limit, self.clock)
        self._servings = [*(other for other in self._servings if not other.workers.stopped), serving]
        if joined.waiting:
            joined.wake()
        return serving

    async def _pace(self, group: _Group) -> None:
        """Senders that never wait would starve the receivers: the more there waits, the more turns they give."""
        if group.servings:
            for _ in range(len(group.waiting) // PACE):
                await asyncio.sleep(0)

    def _opened(self) -> _Bus:
        if self._bus is None:
            raise Unavailable(f"{self!r} is not open: open() it first, and send and serve before close()")
        return self._bus

    def _require(self, trait: Trait, channel: Channel) -> None:
        if trait not in self.traits:
            raise CannotCarry(f"{self.address} cannot carry {channel.name}: no {trait.name}, which {trait.value}")

    # Tailing, Counting, Letters

    def observe(self, observer: Observer) -> None:
        """Has the observer called with each message sent and each verdict, on all of the bus, as long as it lives."""
        self._opened().observers.append(observer)

    def tail(self, channel: str) -> _Tail:
        tail = _Tail(channel, self._opened().observers)
        self._tails.add(tail)
        return tail

    async def channels(self) -> Sequence[ChannelState]:
        now = self.clock.now()
        return [
            ChannelState(
                channel=group.channel,
                group=group.name,
                waiting=group.size - group.in_work,
                in_work=group.in_work,
                dead=sum(1 for owner, _ in group.bus.dead.values() if owner is group),
                oldest=now - group.waiting[0].sent_at if group.waiting else None,
            )
            for group in self._opened().all_groups()
        ]

    async def dead(self, channel: str | None = None) -> Sequence[DeadLetter]:
        return [
            structs.replace(letter, message=_fresh(letter.message))
            for _, letter in self._opened().dead.values()
            if channel in (None, letter.channel)
        ]

    async def replay(self, ids: Sequence[str]) -> int:
        bus, count = self._opened(), 0
        for id_ in ids:
            group, letter = bus.dead.get(id_, (None, None))
            if group is None or letter is None or (group.temporary and not group.servings):
                continue  # of a group that is gone: only to be looked at and dropped
            del bus.dead[id_]
            message = _fresh(letter.message)
            message.attempt, message.deadline = 1, None  # who replays wants it handled, however late it is
            group.put(_Entry(message, self.clock.now()))
            count += 1
        return count

    async def drop(self, ids: Sequence[str]) -> int:
        return sum(self._opened().dead.pop(id_, None) is not None for id_ in ids)


class _Tail:
    """Copies of what is sent to a channel, from the moment this object is made until it is closed or forgotten."""

    def __init__(self, pattern: str, observers: list[Observer]) -> None:
        kept: deque[Message] = deque(maxlen=TAIL_KEPT)
        more = asyncio.Event()
        prefix = pattern.removesuffix("*")

        def observe(_: str, message: Message, verdict: Verdict | None) -> None:
            name = message.channel.name
            if verdict is None and (name == pattern or (prefix != pattern and name.startswith(prefix))):
                kept.append(_fresh(message))
                more.set()

        observers.append(observe)
        self._kept, self._more, self._closed = kept, more, False
        self._forget = weakref.finalize(self, observers.remove, observe)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        while not self._kept:
            if self._closed:
                raise StopAsyncIteration
            self._more.clear()
            await self._more.wait()
        return self._kept.popleft()

    async def aclose(self) -> None:
        self._closed = True
        self._forget()
        self._more.set()


def _fresh(message: Message) -> Message:
    """A copy that shares nothing that can change, as a message from the wire would."""
    fresh = structs.replace(message, headers=message.headers.copy(), until=None)
    if type(fresh.body) is not bytes:
        fresh.body = bytes(fresh.body)  # a buffer that its sender may write into
    return fresh
