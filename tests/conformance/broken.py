"""One broken transport for each check of the suite: the memory transport with a single fault, as real ones have had."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

from msgspec.structs import replace

from quintet.clock import Clock
from quintet.errors import CallError, ChannelFull
from quintet.message import Channel, Message, new_id
from quintet.transport import DONE, Again, ChannelState, Dead, Receive, Trait, Verdict, parse_address
from quintet.transports.memory import Carrier, _Serving

T = TypeVar("T", bound=type[Carrier])

BROKEN: dict[str, type[Carrier]] = {}


def breaks(*checks: str) -> Callable[[T], T]:
    def register(kind: T) -> T:
        BROKEN.update(dict.fromkeys(checks, kind))
        return kind

    return register


def opener(kind: type[Carrier]) -> Callable[[str, Clock], Carrier]:
    return lambda address, clock: kind(parse_address(address), clock)


class Outgoing(Carrier):
    """Something happens to a message on its way out; None loses it."""

    def change(self, message: Message) -> Message | None:
        raise NotImplementedError

    async def send(self, message: Message) -> Message | None:
        changed = self.change(message)
        return None if changed is None else await super().send(changed)


class Incoming(Carrier):
    """Something happens around the receiver."""

    async def around(self, message: Message, receive: Receive) -> Verdict:
        raise NotImplementedError

    async def serve(self, channel: Channel, receive: Receive, group: str, limit: int = 100) -> _Serving:
        return await super().serve(channel, lambda message: self.around(message, receive), group, limit)


class Renamed(Carrier):
    """Another channel than the one asked for is used."""

    def sends_to(self, channel: Channel) -> Channel:
        return channel

    def serves(self, channel: Channel, group: str) -> tuple[Channel, str]:
        return channel, group

    async def send(self, message: Message) -> Message | None:
        return await super().send(replace(message, channel=self.sends_to(message.channel)))

    async def serve(self, channel: Channel, receive: Receive, group: str, limit: int = 100) -> _Serving:
        channel, group = self.serves(channel, group)
        return await super().serve(channel, receive, group, limit)


class Replying(Carrier):
    """A transport that carries replies by itself, as HTTP does."""

    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.REPLIES})


# What travels


@breaks("bytes arrive as they were sent: none, every value, and a megabyte")
class TakesBodiesForText(Outgoing):
    def change(self, message: Message) -> Message:
        return replace(message, body=message.body.decode("utf-8", "replace").encode())


@breaks("every field of a message arrives")
class ForgetsTheVersion(Outgoing):
    def change(self, message: Message) -> Message:
        return replace(message, version="")


@breaks("the user's headers arrive, whatever characters their values have")
class WritesHeadersInLatin1(Outgoing):
    def change(self, message: Message) -> Message:
        headers = {
            name: value.encode("latin-1", "replace").decode("latin-1") for name, value in message.headers.items()
        }
        return replace(message, headers=headers)


@breaks("a deadline arrives within the skew, and none stays none")
class SendsTheMonotonicClockToAnotherMachine(Outgoing):
    def change(self, message: Message) -> Message:
        return replace(message, deadline=message.deadline and message.deadline + 12_345.0)


@breaks("what the receiver does to a message does not reach its sender, nor what the sender does later the receiver")
class HandsOnTheSenderObject(Incoming):
    sent: ClassVar[dict[str, Message]] = {}

    async def send(self, message: Message) -> Message | None:
        self.sent[message.id] = message
        return await super().send(message)

    async def around(self, message: Message, receive: Receive) -> Verdict:
        return await receive(self.sent[message.id])


@breaks("channels whose names are alike do not mix")
class KnowsNoUpperCase(Renamed):
    def sends_to(self, channel: Channel) -> Channel:
        return replace(channel, name=channel.name.lower())

    def serves(self, channel: Channel, group: str) -> tuple[Channel, str]:
        return replace(channel, name=channel.name.lower()), group


# Point-to-point


@breaks("of many concurrent senders every message arrives once")
class LosesOneOfAHundred(Outgoing):
    count = 0

    def change(self, message: Message) -> Message | None:
        type(self).count += 1
        return message if self.count % 100 else None


@breaks("a message goes to one of several receivers, once")
class GivesEachReceiverACopy(Renamed):
    def sends_to(self, channel: Channel) -> Channel:
        return replace(channel, fanout=True)

    def serves(self, channel: Channel, group: str) -> tuple[Channel, str]:
        return replace(channel, fanout=True), group if channel.fanout else new_id()


@breaks("receivers that compete share the work")
class KnowsOneReceiverOnly(Renamed):
    def serves(self, channel: Channel, group: str) -> tuple[Channel, str]:
        taken = self._bus is not None and channel.name in self._bus.queues and self._bus.queues[channel.name].servings
        return (Channel(new_id()) if taken else channel), group


@breaks("what is sent before anybody receives waits")
class DropsWhatNobodyReceives(Carrier):
    async def send(self, message: Message) -> Message | None:
        known = self._opened().queues
        return await super().send(message) if message.channel.fanout or message.channel.name in known else None


@breaks("what has expired is not delivered, what has not is")
class ForgetsDeadlines(Outgoing):
    def change(self, message: Message) -> Message:
        return replace(message, deadline=None)


@breaks("what is sent to a temporary channel that nobody holds is dropped without an error")
class KeepsTemporaryChannels(Renamed):
    def sends_to(self, channel: Channel) -> Channel:
        return replace(channel, temporary=False)

    def serves(self, channel: Channel, group: str) -> tuple[Channel, str]:
        return replace(channel, temporary=False), group


@breaks("a full channel refuses, and accepts again once there is room")
class IsNeverFull(Carrier):
    async def open(self) -> None:
        self.capacity = 1_000_000
        await super().open()


# Fan-out


@breaks("every group receives every message, one member of each")
class PutsAllIntoOneGroup(Renamed):
    def serves(self, channel: Channel, group: str) -> tuple[Channel, str]:
        return channel, "all"


@breaks("an event that nobody hears is accepted, and a group hears what is sent after it came")
class TellsNewGroupsTheWholeHistory(Carrier):
    history: ClassVar[list[Message]] = []

    async def send(self, message: Message) -> Message | None:
        self.history.append(message)
        return await super().send(message)

    async def serve(self, channel: Channel, receive: Receive, group: str, limit: int = 100) -> _Serving:
        serving = await super().serve(channel, receive, group, limit)
        for message in [message for message in self.history if message.channel == channel]:
            await super().send(message)
        return serving


@breaks("a group that was away finds what was sent meanwhile")
class ForgetsAGroupThatLeaves(Renamed):
    def serves(self, channel: Channel, group: str) -> tuple[Channel, str]:
        return replace(channel, temporary=True), group


@breaks("a temporary group hears all while it is there, and nothing of what it missed")
class KeepsTemporaryGroups(Renamed):
    def serves(self, channel: Channel, group: str) -> tuple[Channel, str]:
        return replace(channel, temporary=False), group


@breaks(
    "a group that fails has its own copy delivered again, and no other group's",
    "a message that fails holds back its key and no other, until it is done",
    "a message that comes again is as it was sent, whatever its receiver did to it",
)
class SendsAgainToTheWholeChannel(Incoming):
    async def around(self, message: Message, receive: Receive) -> Verdict:
        channel, verdict = message.channel, await receive(message)
        if not isinstance(verdict, Again):
            return verdict
        await self.send(replace(message, channel=channel, attempt=message.attempt + 1))
        return DONE


@breaks("a group that lags and is full does not make the sender fail for the others")
class RefusesForTheSlowest(Carrier):
    async def send(self, message: Message) -> Message | None:
        for group in self._opened().groups.get(message.channel.name, {}).values():
            if group.size >= self.capacity:
                raise ChannelFull(f"{group.name} has no room")
        return await super().send(message)


# Order


@breaks("messages of one key are handled one at a time and in order, those of others at once")
class IgnoresKeys(Carrier):
    async def open(self) -> None:
        await super().open()
        self._opened().ordered = False


@breaks("a message that is dead lets its key go on")
class HoldsTheKeyOfTheDead(Incoming):
    async def around(self, message: Message, receive: Receive) -> Verdict:
        verdict = await receive(message)
        return Again(1e9, verdict.reason) if isinstance(verdict, Dead) else verdict


# Again, and dead


@breaks("Again delivers again, with the attempt one higher, until it is done")
class CountsNoAttempts(Incoming):
    async def around(self, message: Message, receive: Receive) -> Verdict:
        message.attempt = 1
        return await receive(message)


@breaks("Again waits as long as it was told, and lets other messages pass")
class ComesAgainAtOnce(Incoming):
    async def around(self, message: Message, receive: Receive) -> Verdict:
        verdict = await receive(message)
        return Again(0.0) if isinstance(verdict, Again) else verdict


@breaks("a delivery that was in work when its receiver went away comes to another")
class TakesCancelledForDone(Incoming):
    async def around(self, message: Message, receive: Receive) -> Verdict:
        try:
            return await receive(message)
        except asyncio.CancelledError:
            return DONE


@breaks("a dead message is not delivered again, and those behind it are")
class TriesTheDeadAgain(Incoming):
    async def around(self, message: Message, receive: Receive) -> Verdict:
        verdict = await receive(message)
        return Again(0.0) if isinstance(verdict, Dead) else verdict


@breaks("a dead letter tells its channel, group, reason and attempts, and keeps its message")
class GivesNoReason(Incoming):
    async def around(self, message: Message, receive: Receive) -> Verdict:
        verdict = await receive(message)
        return Dead("failed") if isinstance(verdict, Dead) else verdict


@breaks("replay gives a dead letter to the group that failed, as its first attempt, and to no other")
class ReplaysToAllGroups(Carrier):
    async def replay(self, ids: Sequence[str]) -> int:
        letters = [letter for letter in await self.dead() if letter.id in ids]
        await self.drop(ids)
        for letter in letters:
            await self.send(replace(letter.message, attempt=1))
        return len(letters)


@breaks("drop deletes a dead letter for ever, and only that one")
class DropsThemAll(Carrier):
    async def drop(self, ids: Sequence[str]) -> int:
        self._opened().dead.clear()
        return 1


# Receivers


@breaks("never more than the limit are in work at once, and all get their turn")
class CountsFromZero(Carrier):
    async def serve(self, channel: Channel, receive: Receive, group: str, limit: int = 100) -> _Serving:
        return await super().serve(channel, receive, group, limit + 1)


@breaks("stop() waits for the work in progress and settles it")
class StopsAtOnce(Carrier):
    async def serve(self, channel: Channel, receive: Receive, group: str, limit: int = 100) -> _Serving:
        serving = await super().serve(channel, receive, group, limit)
        vars(serving)["stop"] = serving.cancel
        return serving


@breaks("what a stopped receiver has not begun goes to the next, once")
class LosesWhatItHadPrefetched(Carrier):
    async def serve(self, channel: Channel, receive: Receive, group: str, limit: int = 100) -> _Serving:
        serving = await super().serve(channel, receive, group, limit)
        drain = serving.stop

        async def stop() -> None:
            for _ in range(min(limit, len(serving.group.waiting))):
                serving.group.waiting.popleft()
            await drain()

        vars(serving)["stop"] = stop
        return serving


@breaks("a receiver that raises or never ends stops no other message and no other channel")
class StopsAllWhenOneRaises(Incoming):
    broken = False

    async def around(self, message: Message, receive: Receive) -> Verdict:
        if self.broken:
            await asyncio.Event().wait()
        try:
            return await receive(message)
        except RuntimeError:
            self.broken = True
            raise


@breaks("a closed transport refuses to send with a clear error, and to close it again does no harm")
class AcceptsWhenClosed(Carrier):
    async def send(self, message: Message) -> Message | None:
        return None if self._bus is None else await super().send(message)


@breaks("close() leaves no task and no delivery behind")
class LeavesATaskBehind(Carrier):
    async def open(self) -> None:
        await super().open()
        self._heart_beat = asyncio.create_task(asyncio.Event().wait())


# Replies


@breaks("the reply comes back to its sender, each to its own")
class MixesReplies(Replying):
    last: Message | None = None

    async def send(self, message: Message) -> Message | None:
        reply = await super().send(message)
        self.last, mixed = reply, self.last
        return mixed or reply


@breaks("a reply that is a failure comes back with its status and body")
class TakesAllRepliesForGood(Replying):
    async def send(self, message: Message) -> Message | None:
        reply = await super().send(message)
        return reply and replace(reply, status="")


@breaks(
    "a channel that nobody serves answers with an error, and does not hang",
    "a sender learns when its receiver goes away in the middle of the work",
)
class ReportsFailuresAsTaken(Replying):
    async def send(self, message: Message) -> Message | None:
        try:
            return await super().send(message)
        except CallError:
            return None


# What outlives a process, and what can be looked at


@breaks("what was accepted is there after all have closed and opened again")
class KeepsAllInMemory(Carrier):
    traits: ClassVar[frozenset[Trait]] = Carrier.traits | {Trait.DURABLE}

    async def close(self) -> None:
        if self._bus:
            self._bus.queues.clear()
            self._bus.groups.clear()
        await super().close()


@breaks("tail sees what is sent from then on, and takes it from nobody")
class TailsTakeTheMessage(Carrier):
    async def send(self, message: Message) -> Message | None:
        observers = self._opened().observers
        for observer in observers:
            observer("", message, None)
        return None if observers else await super().send(message)


@breaks("channels() counts what waits, what is in work and what is dead")
class CountsWorkAsWaiting(Carrier):
    async def channels(self) -> Sequence[ChannelState]:
        return [replace(state, waiting=state.waiting + state.in_work) for state in await super().channels()]
