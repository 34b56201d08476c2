"""The specification of a transport (law 5): every transport passes each check that its traits call for.

for check in CHECKS:
    if not check.missing(Carrier):
        asyncio.run(check.run(Bench("sqlite:///check.db")))
"""
# ruff: noqa: S101, PT017 - plain asserts are the specification, and pytest is no dependency of ours

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

from msgspec import Struct

from quintet.errors import CallError, ChannelFull, QuintetError
from quintet.message import Channel, Message
from quintet.testing.bench import Bench, Receiver, sorted_bodies
from quintet.transport import (
    DONE,
    Again,
    ChannelState,
    Counting,
    Dead,
    Done,
    Letters,
    Tailing,
    Trait,
    Transport,
    Verdict,
)

SECONDS = 10.0  # real time that a check may take in all
SKEW = 1.0  # seconds that a deadline may shift on its way


class Check(Struct, frozen=True):
    """One sentence of the specification, with what it needs: traits, that it can be looked into, an address option."""

    name: str
    needs: frozenset[Trait]
    inspects: type | None
    option: str
    body: Callable[[Bench], Awaitable[None]]

    def __repr__(self) -> str:
        return f"<check: {self.name}>"

    def missing(self, transport: type[Transport] | Transport) -> str:
        """Why the transport is excused from this check; empty where it is not."""
        lacking = [trait.name for trait in Trait if trait in self.needs - transport.traits]
        kind = transport if isinstance(transport, type) else type(transport)
        if self.inspects is not None and not issubclass(kind, self.inspects):
            lacking.append(self.inspects.__name__)
        if self.option and self.option not in transport.options:
            lacking.append(f"?{self.option}=")
        return ", ".join(lacking)

    async def run(self, bench: Bench) -> None:
        """Raises AssertionError with a sentence where the transport fails. Closes the bench."""
        limit = asyncio.timeout(SECONDS)
        try:
            async with limit:
                try:
                    await self.body(bench)
                finally:
                    await bench.close()
        except TimeoutError as error:
            if limit.expired():
                raise AssertionError(f"{self.name}: not over after {SECONDS:g} s") from error
            raise


CHECKS: list[Check] = []


def skips(transport: type[Transport] | Transport) -> dict[str, str]:
    """The checks that a transport is excused from, each with the missing trait."""
    return {check.name: missing for check in CHECKS if (missing := check.missing(transport))}


def _check(
    name: str, *needs: Trait, inspects: type | None = None, option: str = ""
) -> Callable[[Callable[[Bench], Awaitable[None]]], Callable[[Bench], Awaitable[None]]]:
    def add(body: Callable[[Bench], Awaitable[None]]) -> Callable[[Bench], Awaitable[None]]:
        CHECKS.append(Check(name, frozenset(needs), inspects, option, body))
        return body

    return add


def _same(found: object, wanted: object, what: str) -> None:
    assert found == wanted, f"{what}: wanted {wanted!r}, found {found!r}"


# What travels


@_check("bytes arrive as they were sent: none, every value, and a megabyte")
async def _(bench: Bench) -> None:
    here, there, receiver, channel = await bench.open(), await bench.open(), Receiver(), bench.channel()
    await bench.serve(there, channel, receiver)
    bodies = [b"", bytes(range(256)), "Zürich → 東京 \N{TAXI}".encode(), b"\r\n\0\n", bytes(range(250)) * 4000]
    for count, body in enumerate(bodies, 1):
        await bench.send(here, channel, body)
        arrived = (await bench.got(receiver, count))[-1].body
        assert arrived == body, f"{len(body)} bytes {body[:20]!r}... arrived as {len(arrived)}: {arrived[:20]!r}..."


@_check("every field of a message arrives")
async def _(bench: Bench) -> None:
    here, there, receiver, channel = await bench.open(), await bench.open(), Receiver(), bench.channel()
    await bench.serve(there, channel, receiver)
    fields: dict[str, Any] = {
        "operation": "trips.create",
        "sender": "phone",
        "media_type": "application/json",
        "version": "1.2",
        "key": "trip-Ä 7",
        "reply_to": "replies.phone.1",
        "correlation_id": "c-1",
        "attempt": 3,
    }
    sent = bench.message(channel, b"{}", **fields)
    await here.send(sent)
    arrived = (await bench.got(receiver, 1))[0]
    _same(arrived.channel.name, channel.name, "the channel's name")
    for name in ("id", *fields):
        _same(getattr(arrived, name), getattr(sent, name), f"field {name}")


@_check("the user's headers arrive, whatever characters their values have")
async def _(bench: Bench) -> None:
    here, there, receiver, channel = await bench.open(), await bench.open(), Receiver(), bench.channel()
    await bench.serve(there, channel, receiver)
    headers = {
        "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "x-city": "Zürich, 東京",
        "x-odd": 'a=b; c:d, 100% "e" \\f',
        "x-empty": "",
    }
    await bench.send(here, channel, b"", headers=headers)
    arrived = (await bench.got(receiver, 1))[0].headers
    for name, value in headers.items():
        _same(arrived.get(name), value, f"header {name}")


@_check("a deadline arrives within the skew, and none stays none")
async def _(bench: Bench) -> None:
    here, there, receiver, channel = await bench.open(), await bench.open(), Receiver(), bench.channel()
    await bench.serve(there, channel, receiver)
    wanted = bench.clock.now() + 30
    await bench.send(here, channel, b"30 s", deadline=wanted)
    arrived = (await bench.got(receiver, 1))[0].deadline
    assert arrived is not None, "the deadline was lost"
    assert abs(arrived - wanted) < SKEW, f"a deadline in 30 s arrived as one in {arrived - wanted + 30:g} s"
    await bench.send(here, channel, b"none")
    _same((await bench.got(receiver, 2))[1].deadline, None, "the deadline of a message that has none")


@_check("what the receiver does to a message does not reach its sender, nor what the sender does later the receiver")
async def _(bench: Bench) -> None:
    here, there, channel = await bench.open(), await bench.open(), bench.channel()
    begun, changed, seen = asyncio.Event(), asyncio.Event(), list[str | None]()

    async def receive(message: Message) -> Verdict:
        message.headers["x-receiver"] = "was here"
        begun.set()
        await changed.wait()
        seen.append(message.headers.get("x-own"))
        return DONE

    await bench.serve(there, channel, receive)
    sent = bench.message(channel, headers={"x-own": "1"})
    sending = bench.start(here.send(sent))
    await bench.until(begun.is_set, lambda: "the message never arrived")
    sent.headers["x-own"] = "2"
    changed.set()
    await sending
    await bench.until(lambda: bool(seen), lambda: "the message was never handled")
    _same(seen, ["1"], "a header that the sender changed after sending, as the receiver saw it")
    _same(sent.headers.get("x-receiver"), None, "a header that the receiver added, in the sender's message")


@_check("channels whose names are alike do not mix")
async def _(bench: Bench) -> None:
    here, there, base = await bench.open(), await bench.open(), bench.name()
    names = [base, f"{base}.a", f"{base}-a", f"{base}_a", f"{base}.a.b", f"{base}.A"]
    channels = {name: Channel(name, route=f"POST /{name}") for name in names}
    receivers = {name: Receiver() for name in names}
    for name, channel in channels.items():
        await there.serve(channel, receivers[name], "group")
    await there.ready()
    for name, channel in channels.items():
        await bench.send(here, channel, name.encode())
    for name, receiver in receivers.items():
        await bench.got(receiver, 1)
        _same(receiver.bodies, [name.encode()], f"what came to {name}")


# Point-to-point


@_check("of many concurrent senders every message arrives once")
async def _(bench: Bench) -> None:
    senders = [await bench.open() for _ in range(3)]
    there, receiver, channel = await bench.open(), Receiver(), bench.channel(durable=True)
    await bench.serve(there, channel, receiver)
    bodies = [b"%04d" % number for number in range(240)]
    await asyncio.gather(
        *(senders[number % 3].send(bench.message(channel, body)) for number, body in enumerate(bodies))
    )
    await bench.got(receiver, len(bodies))
    await bench.quiet()
    _same(sorted_bodies(receiver), bodies, "what arrived")


@_check("a message goes to one of several receivers, once", Trait.REDELIVERS)
async def _(bench: Bench) -> None:
    here, one, two, channel = await bench.open(), await bench.open(), await bench.open(), bench.channel()
    first, second = Receiver(), Receiver()
    await bench.serve(one, channel, first)
    await bench.serve(two, channel, second)
    bodies = [b"%02d" % number for number in range(20)]
    await bench.send(here, channel, *bodies)
    await bench.until(
        lambda: len(first.messages) + len(second.messages) >= len(bodies), lambda: f"too few came: {first} {second}"
    )
    await bench.quiet()
    _same(sorted_bodies(first, second), bodies, "what came to both together")


@_check("receivers that compete share the work", Trait.REDELIVERS)
async def _(bench: Bench) -> None:
    here, one, two, channel = await bench.open(), await bench.open(), await bench.open(), bench.channel()
    first, second = Receiver(hold=True), Receiver(hold=True)
    await bench.serve(one, channel, first, limit=1)
    await bench.serve(two, channel, second, limit=1)
    await bench.send(here, channel, b"1", b"2", b"3")
    await bench.got(first, 1)  # each is busy with one, so the next goes to the other
    await bench.got(second, 1)
    first.release()
    await bench.got(first, 2)
    second.release()
    _same(sorted_bodies(first, second), [b"1", b"2", b"3"], "what came to both together")


@_check("what is sent before anybody receives waits", Trait.REDELIVERS)
async def _(bench: Bench) -> None:
    here, channel, receiver = await bench.open(), bench.channel(durable=True), Receiver()
    await bench.send(here, channel, b"1", b"2", b"3")
    await bench.serve(await bench.open(), channel, receiver)
    await bench.got(receiver, 3)
    _same(sorted_bodies(receiver), [b"1", b"2", b"3"], "what waited")


@_check("what has expired is not delivered, what has not is", Trait.REDELIVERS)
async def _(bench: Bench) -> None:
    here, channel, receiver = await bench.open(), bench.channel(), Receiver()
    now = bench.clock.now()
    await bench.send(here, channel, b"old", deadline=now + 0.05)
    await bench.send(here, channel, b"fresh", deadline=now + 60)
    await bench.quiet()
    await bench.serve(await bench.open(), channel, receiver)
    await bench.got(receiver, 1)
    await bench.quiet()
    _same(receiver.bodies, [b"fresh"], "what was delivered")


@_check("what is sent to a temporary channel that nobody holds is dropped without an error", Trait.REDELIVERS)
async def _(bench: Bench) -> None:
    here, there, channel, receiver = await bench.open(), await bench.open(), bench.channel(temporary=True), Receiver()
    await bench.send(here, channel, b"before")
    serving = await bench.serve(there, channel, receiver)
    await bench.send(here, channel, b"during")
    await bench.got(receiver, 1)
    await serving.stop()
    await bench.send(here, channel, b"after")
    await bench.quiet()
    _same(receiver.bodies, [b"during"], "what the holder of the temporary channel received")


@_check("a full channel refuses, and accepts again once there is room", Trait.REDELIVERS, option="capacity")
async def _(bench: Bench) -> None:
    here, channel, receiver = await bench.open(capacity=5), bench.channel(durable=True), Receiver()
    await bench.send(here, channel, *[b"%d" % number for number in range(5)])
    try:
        await bench.send(here, channel, b"one too many")
    except ChannelFull as error:
        assert channel.name in str(error), f"the error does not name the channel: {error}"
    else:
        raise AssertionError("a channel of capacity 5 accepted a sixth message")
    await bench.serve(await bench.open(capacity=5), channel, receiver)
    await bench.got(receiver, 5)
    await bench.quiet()
    await bench.send(here, channel, b"room again")
    await bench.got(receiver, 6)
    _same(len(receiver.messages), 6, "how many arrived of five, one refused and one more")


# Fan-out


@_check("every group receives every message, one member of each", Trait.FANOUT)
async def _(bench: Bench) -> None:
    here, one, two = await bench.open(), await bench.open(), await bench.open()
    channel, billing, first, second = bench.channel(fanout=True, durable=True), Receiver(), Receiver(), Receiver()
    await bench.serve(one, channel, billing, "billing")
    await bench.serve(one, channel, first, "dispatch")
    await bench.serve(two, channel, second, "dispatch")
    bodies = [b"%02d" % number for number in range(10)]
    await bench.send(here, channel, *bodies)
    await bench.got(billing, len(bodies))
    await bench.until(
        lambda: len(first.messages) + len(second.messages) >= len(bodies), lambda: f"too few came: {first} {second}"
    )
    await bench.quiet()
    _same(sorted_bodies(billing), bodies, "what came to the group of one")
    _same(sorted_bodies(first, second), bodies, "what came to the group of two together")


@_check("an event that nobody hears is accepted, and a group hears what is sent after it came", Trait.FANOUT)
async def _(bench: Bench) -> None:
    here, there, channel, receiver = await bench.open(), await bench.open(), bench.channel(fanout=True), Receiver()
    await bench.send(here, channel, b"before")
    await bench.serve(there, channel, receiver)
    await bench.send(here, channel, b"after")
    await bench.got(receiver, 1)
    await bench.quiet()
    _same(receiver.bodies, [b"after"], "what the group heard")


@_check("a group that was away finds what was sent meanwhile", Trait.FANOUT)
async def _(bench: Bench) -> None:
    here, there, channel = await bench.open(), await bench.open(), bench.channel(fanout=True, durable=True)
    serving = await bench.serve(there, channel, Receiver(), "dispatch")
    await serving.stop()
    await there.close()
    await bench.send(here, channel, b"1", b"2")
    back = Receiver()
    await bench.serve(await bench.open(), channel, back, "dispatch")
    await bench.got(back, 2)
    _same(sorted_bodies(back), [b"1", b"2"], "what was sent while the group was away")


@_check("a temporary group hears all while it is there, and nothing of what it missed", Trait.FANOUT)
async def _(bench: Bench) -> None:
    here, there, channel, before = await bench.open(), await bench.open(), bench.channel(fanout=True), Receiver()
    temporary = Channel(channel.name, fanout=True, temporary=True, route=channel.route)
    serving = await bench.serve(there, temporary, before, "screen-1")
    await bench.send(here, channel, b"1")
    await bench.got(before, 1)
    await serving.stop()
    await bench.send(here, channel, b"missed")
    after = Receiver()
    await bench.serve(await bench.open(), temporary, after, "screen-1")
    await bench.send(here, channel, b"2")
    await bench.got(after, 1)
    await bench.quiet()
    _same((before.bodies, after.bodies), ([b"1"], [b"2"]), "what the temporary group heard before and after")


@_check("a group that fails has its own copy delivered again, and no other group's", Trait.FANOUT, Trait.REDELIVERS)
async def _(bench: Bench) -> None:
    here, there, channel = await bench.open(), await bench.open(), bench.channel(fanout=True, durable=True)
    failing, well = Receiver(Again(0.0), Again(0.0)), Receiver()
    await bench.serve(there, channel, failing, "failing")
    await bench.serve(there, channel, well, "well")
    await bench.send(here, channel, b"1")
    await bench.got(failing, 3)
    await bench.got(well, 1)
    await bench.quiet()
    _same((len(failing.messages), len(well.messages)), (3, 1), "deliveries to the group that fails and to the other")


@_check("a group that lags and is full does not make the sender fail for the others", Trait.FANOUT, option="capacity")
async def _(bench: Bench) -> None:
    here, there = await bench.open(capacity=3), await bench.open(capacity=3)
    channel, well = bench.channel(fanout=True, durable=True), Receiver()
    await (await bench.serve(there, channel, Receiver(), "lagging")).stop()
    await bench.serve(there, channel, well, "well")
    for number in range(6):
        try:
            await bench.send(here, channel, b"%d" % number)
        except CallError as error:
            raise AssertionError(f"message {number + 1} failed for all because one group lags: {error}") from error
        await bench.got(well, number + 1)


# Order


@_check("messages of one key are handled one at a time and in order, those of others at once", Trait.ORDERED)
async def _(bench: Bench) -> None:
    here, one, two, channel = (
        await bench.open(),
        await bench.open(),
        await bench.open(),
        bench.channel(durable=True, keyed=True),
    )
    seen: dict[str, list[bytes]] = {"a": [], "b": []}
    busy, together = set[str](), set[str]()

    async def receive(message: Message) -> Verdict:
        if message.key in busy:
            together.add(message.key)
        busy.add(message.key)
        if len(busy) == 2:
            both.set()
        for _ in range(5):
            await asyncio.sleep(0)
        if not seen[message.key]:
            await both.wait()  # the first of each key waits for the other's: they must be in work at once
        seen[message.key].append(message.body)
        busy.discard(message.key)
        return DONE

    both = asyncio.Event()
    await bench.serve(one, channel, receive)
    await bench.serve(two, channel, receive)
    for number in range(12):
        for key in seen:
            await bench.send(here, channel, b"%02d" % number, key=key)
    await bench.until(
        lambda: len(seen["a"]) + len(seen["b"]) >= 24, lambda: f"24 deliveries were due, these came: {seen}"
    )
    assert not together, f"two messages of one key were in work at once: {sorted(together)}"
    for key, bodies in seen.items():
        _same(bodies, [b"%02d" % number for number in range(12)], f"the order of key {key}")


@_check("a message that fails holds back its key and no other, until it is done", Trait.ORDERED, Trait.REDELIVERS)
async def _(bench: Bench) -> None:
    here, there, channel = await bench.open(), await bench.open(), bench.channel(durable=True, keyed=True)
    order, failures = list[bytes](), [Again(0.05), Again(0.05)]

    async def receive(message: Message) -> Verdict:
        order.append(message.body)
        return failures.pop(0) if message.body == b"a1" and failures else DONE

    for key, body in (("a", b"a1"), ("a", b"a2"), ("b", b"b1"), ("b", b"b2")):
        await bench.send(here, channel, body, key=key)
    await bench.serve(there, channel, receive)
    await bench.until(lambda: len(order) >= 6, lambda: f"six deliveries were due, these came: {order}")
    _same([body for body in order if body.startswith(b"a")], [b"a1", b"a1", b"a1", b"a2"], "deliveries of key a")
    _same([body for body in order if body.startswith(b"b")], [b"b1", b"b2"], "deliveries of key b")
    if Trait.DELAYS in here.traits:
        assert order.index(b"b2") < len(order) - 2, f"key b waited for key a: {order}"


@_check("a message that is dead lets its key go on", Trait.ORDERED, Trait.REDELIVERS)
async def _(bench: Bench) -> None:
    here, channel, receiver = await bench.open(), bench.channel(durable=True, keyed=True), Receiver(Dead("hopeless"))
    await bench.send(here, channel, b"1", b"2", b"3", key="a")
    await bench.serve(await bench.open(), channel, receiver)
    await bench.got(receiver, 3)
    _same(receiver.bodies, [b"1", b"2", b"3"], "deliveries of the key")


# Again, and dead


@_check("Again delivers again, with the attempt one higher, until it is done", Trait.REDELIVERS)
async def _(bench: Bench) -> None:
    here, channel = await bench.open(), bench.channel(durable=True)
    receiver = Receiver(Again(0.0, "not yet"), Again(0.0, "not yet"))
    await bench.serve(await bench.open(), channel, receiver)
    await bench.send(here, channel, b"1")
    await bench.got(receiver, 3)
    await bench.quiet()
    _same([message.attempt for message in receiver.messages], [1, 2, 3], "the attempts")


@_check("a message that comes again is as it was sent, whatever its receiver did to it", Trait.REDELIVERS)
async def _(bench: Bench) -> None:
    here, channel = await bench.open(), bench.channel(durable=True)
    bodies, headers = list[bytes](), list[str | None]()

    async def receive(message: Message) -> Verdict:
        bodies.append(message.body)
        headers.append(message.headers.get("x-mark"))
        message.body, message.headers["x-mark"], message.key = b"spoilt", "spoilt", "spoilt"
        return DONE if len(bodies) == 2 else Again(0.0)

    await bench.serve(await bench.open(), channel, receive)
    await bench.send(here, channel, b"as sent", headers={"x-mark": "as sent"})
    await bench.until(lambda: len(bodies) == 2, lambda: f"two deliveries were due, {len(bodies)} came")
    _same((bodies[1], headers[1]), (b"as sent", "as sent"), "the second delivery's body and header")


@_check("Again waits as long as it was told, and lets other messages pass", Trait.DELAYS)
async def _(bench: Bench) -> None:
    here, channel, times = await bench.open(), bench.channel(durable=True), list[tuple[bytes, float]]()

    async def receive(message: Message) -> Verdict:
        times.append((message.body, bench.clock.now()))
        return Again(0.4) if message.body == b"later" and message.attempt == 1 else DONE

    await bench.serve(await bench.open(), channel, receive, limit=1)
    await bench.send(here, channel, b"later", b"passes")
    await bench.until(lambda: len(times) == 3, lambda: f"three deliveries were due, these came: {times}")
    _same(sorted(body for body, _ in times), [b"later", b"later", b"passes"], "the deliveries")
    _same(times[2][0], b"later", "the last delivery")
    waited = times[2][1] - next(time for body, time in times if body == b"later")
    assert 0.35 <= waited <= 2.0, f"Again(0.4) came again after {waited:.3f} s"


@_check("a delivery that was in work when its receiver went away comes to another", Trait.REDELIVERS)
async def _(bench: Bench) -> None:
    here, gone, channel = await bench.open(), await bench.open(), bench.channel(durable=True)
    first, second = Receiver(hold=True), Receiver()
    await bench.serve(gone, channel, first)
    await bench.send(here, channel, b"1")
    await bench.got(first, 1)
    await gone.close()
    _same(first.in_work, 0, "deliveries still in work after close()")
    await bench.serve(await bench.open(), channel, second)
    await bench.got(second, 1)
    _same(second.bodies, [b"1"], "what came to the other receiver")


@_check("a dead message is not delivered again, and those behind it are", Trait.REDELIVERS)
async def _(bench: Bench) -> None:
    here, channel, receiver = await bench.open(), bench.channel(durable=True), Receiver(Dead("hopeless"))
    await bench.serve(await bench.open(), channel, receiver, limit=1)
    await bench.send(here, channel, b"1", b"2")
    await bench.got(receiver, 2)
    await bench.quiet()
    _same(sorted_bodies(receiver), [b"1", b"2"], "the deliveries")


@_check(
    "a dead letter tells its channel, group, reason and attempts, and keeps its message",
    Trait.FANOUT,
    Trait.REDELIVERS,
    inspects=Letters,
)
async def _(bench: Bench) -> None:
    here, channel = await bench.open(), bench.channel(fanout=True, durable=True)
    receiver = Receiver(Again(0.0), Dead("the driver has no car"))
    await bench.serve(await bench.open(), channel, receiver, "dispatch")
    await bench.send(here, channel, b"body", key="k", headers={"x-user": "u"})
    await bench.got(receiver, 2)
    letter = (await _letters(here, channel, 1))[0]
    _same(
        (letter.channel, letter.group, letter.reason, letter.attempts),
        (channel.name, "dispatch", "the driver has no car", 2),
        "channel, group, reason and attempts of the dead letter",
    )
    message = letter.message
    _same((message.body, message.key, message.headers.get("x-user")), (b"body", "k", "u"), "its message")


@_check(
    "replay gives a dead letter to the group that failed, as its first attempt, and to no other",
    Trait.FANOUT,
    Trait.REDELIVERS,
    inspects=Letters,
)
async def _(bench: Bench) -> None:
    here, there, channel = await bench.open(), await bench.open(), bench.channel(fanout=True, durable=True)
    failing, well = Receiver(Again(0.0), Dead("hopeless")), Receiver()
    await bench.serve(there, channel, failing, "failing")
    await bench.serve(there, channel, well, "well")
    await bench.send(here, channel, b"1")
    letters = await _letters(here, channel, 1)
    _same(await cast(Letters, here).replay([letters[0].id, "no-such-letter"]), 1, "how many replay() says it replayed")
    again = (await bench.got(failing, 3))[2]
    await bench.quiet()
    _same((again.body, again.attempt), (b"1", 1), "body and attempt of the replayed message")
    _same(len(well.messages), 1, "deliveries to the group that never failed")
    await _letters(here, channel, 0)


@_check("drop deletes a dead letter for ever, and only that one", Trait.REDELIVERS, inspects=Letters)
async def _(bench: Bench) -> None:
    here, channel = await bench.open(), bench.channel(durable=True)
    receiver = Receiver(Dead("one"), Dead("two"))
    await bench.serve(await bench.open(), channel, receiver, limit=1)
    await bench.send(here, channel, b"1", b"2")
    letters = await _letters(here, channel, 2)
    _same(await cast(Letters, here).drop([letters[0].id, "no-such-letter"]), 1, "how many drop() says it dropped")
    kept = await _letters(here, channel, 1)
    _same(kept[0].id, letters[1].id, "the letter that was kept")
    await bench.quiet()
    _same(len(receiver.messages), 2, "deliveries in all")


# Receivers


@_check("never more than the limit are in work at once, and all get their turn")
async def _(bench: Bench) -> None:
    here, there, channel, receiver = await bench.open(), await bench.open(), bench.channel(), Receiver(hold=True)
    await bench.serve(there, channel, receiver, limit=3)
    sends = [bench.start(here.send(bench.message(channel, b"%d" % number))) for number in range(8)]
    await bench.got(receiver, 3)
    await bench.quiet()
    _same(receiver.in_work, 3, "deliveries in work with limit=3 and eight messages sent")
    receiver.release()
    outcomes = await asyncio.gather(*sends, return_exceptions=True)
    refused = [error for error in outcomes if isinstance(error, CallError)]
    if Trait.REPLIES not in here.traits:
        assert not refused, f"to send over the receivers' limit failed: {refused[0]!r}"
    await bench.got(receiver, 8 - len(refused))
    assert receiver.peak <= 3, f"{receiver.peak} deliveries were in work at once with limit=3"


@_check("stop() waits for the work in progress and settles it")
async def _(bench: Bench) -> None:
    here, there, channel, receiver = await bench.open(), await bench.open(), bench.channel(), Receiver(hold=True)
    serving = await bench.serve(there, channel, receiver)
    sending = bench.start(here.send(bench.message(channel, b"1")))
    await bench.got(receiver, 1)
    stopping = bench.start(serving.stop())
    await bench.quiet()
    assert not stopping.done(), "stop() returned while a delivery was in work"
    _same(receiver.in_work, 1, "deliveries in work while stop() waits")
    receiver.release()
    await asyncio.gather(stopping, sending)
    _same(receiver.in_work, 0, "deliveries in work after stop()")
    if Trait.REDELIVERS in here.traits:
        after = Receiver()
        await bench.serve(await bench.open(), channel, after)
        await bench.quiet()
        _same(after.bodies, [], "what was delivered again although its receiver had finished it before stop()")


@_check("what a stopped receiver has not begun goes to the next, once", Trait.REDELIVERS)
async def _(bench: Bench) -> None:
    here, there, channel, first = (
        await bench.open(),
        await bench.open(),
        bench.channel(durable=True),
        Receiver(hold=True),
    )
    serving = await bench.serve(there, channel, first, limit=2)
    bodies = [b"%02d" % number for number in range(20)]
    await bench.send(here, channel, *bodies)
    await bench.got(first, 2)
    stopping = bench.start(serving.stop())
    await bench.quiet()
    first.release()
    await stopping
    begun, second = len(first.messages), Receiver()
    await bench.serve(there, channel, second)  # the same transport may serve the channel again
    await bench.got(second, len(bodies) - begun)
    await bench.quiet()
    _same(begun, 2, "deliveries to the receiver that was stopped with two in work")
    _same(sorted_bodies(first, second), bodies, "what came to both together")


@_check("a receiver that raises or never ends stops no other message and no other channel")
async def _(bench: Bench) -> None:
    here, there = await bench.open(), await bench.open()
    bad, stuck, other = bench.channel("bad"), bench.channel("stuck"), bench.channel("other")
    raising, hanging, well = Receiver(raises=RuntimeError("a fault in the core")), Receiver(hold=True), Receiver()
    for channel, receiver in ((bad, raising), (stuck, hanging), (other, well)):
        await there.serve(channel, receiver, "group")
    await there.ready()
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # it may be reported there, which is right
    sends = [bench.start(here.send(bench.message(channel, b"1"))) for channel in (bad, stuck)]
    await bench.got(raising, 1)
    await bench.got(hanging, 1)
    await bench.send(here, bad, b"2")
    await bench.send(here, other, b"3")
    await bench.got(well, 1)
    await bench.until(lambda: b"2" in raising.bodies, lambda: f"b'2' never came after one that raised: {raising}")
    hanging.release()
    await asyncio.gather(*sends, return_exceptions=True)


@_check("a closed transport refuses to send with a clear error, and to close it again does no harm")
async def _(bench: Bench) -> None:
    here, channel = await bench.open(), bench.channel()
    await here.close()
    await here.close()
    try:
        await here.send(bench.message(channel, b"1"))
    except QuintetError as error:
        assert str(error), "the error has no text"
    else:
        raise AssertionError("a closed transport accepted a message")


@_check("close() leaves no task and no delivery behind")
async def _(bench: Bench) -> None:
    before = asyncio.all_tasks()
    here, there, channel, receiver = await bench.open(), await bench.open(), bench.channel(), Receiver(hold=True)
    await bench.serve(there, channel, receiver)
    sending = bench.start(here.send(bench.message(channel, b"1")))
    await bench.got(receiver, 1)
    await there.close()
    await here.close()
    _same(receiver.in_work, 0, "deliveries in work after close()")
    await asyncio.gather(sending, return_exceptions=True)
    await bench.until(
        lambda: not asyncio.all_tasks() - before, lambda: f"tasks left behind: {asyncio.all_tasks() - before}"
    )


# Replies


@_check("the reply comes back to its sender, each to its own", Trait.REPLIES)
async def _(bench: Bench) -> None:
    here, there, channel = await bench.open(), await bench.open(), bench.channel()

    async def receive(message: Message) -> Verdict:
        reply = bench.reply(message, message.body * 2, media_type="application/json", headers={"x-city": "Zürich"})
        return Done(reply)

    await bench.serve(there, channel, receive)
    requests = [bench.message(channel, b"%03d" % number, correlation_id=f"c-{number}") for number in range(60)]
    replies = await asyncio.gather(*(here.send(request) for request in requests))
    for request, reply in zip(requests, replies, strict=True):
        assert reply is not None, "send() returned no reply"
        _same(reply.body, request.body * 2, "the reply's body")
        _same(reply.media_type, "application/json", "the reply's media type")
        _same(reply.headers.get("x-city"), "Zürich", "the reply's header")
        _same(reply.status, "", "the status of a good reply")


@_check("a reply that is a failure comes back with its status and body", Trait.REPLIES)
async def _(bench: Bench) -> None:
    here, there, channel = await bench.open(), await bench.open(), bench.channel()

    async def receive(message: Message) -> Verdict:
        return Done(bench.reply(message, b'{"why": "full"}', status="remote", headers={":status": "500"}))

    await bench.serve(there, channel, receive)
    reply = await here.send(bench.message(channel, b"1"))
    assert reply is not None, "send() returned no reply"
    assert reply.status, "the failure came back as a good reply"
    _same(reply.body, b'{"why": "full"}', "the body of the failure")


@_check("a channel that nobody serves answers with an error, and does not hang", Trait.REPLIES)
async def _(bench: Bench) -> None:
    here, there, served = await bench.open(), await bench.open(), bench.channel()
    await bench.serve(there, served, Receiver())
    try:
        reply = await here.send(bench.message(bench.channel("unknown"), b"1"))
    except CallError as error:
        assert str(error), "the error has no text"
    else:
        assert reply is not None, "a message that nobody took was reported as taken"
        assert reply.status, f"a message that nobody took got a good reply: {reply!r}"


@_check("a sender learns when its receiver goes away in the middle of the work", Trait.REPLIES)
async def _(bench: Bench) -> None:
    here, there, channel, receiver = await bench.open(), await bench.open(), bench.channel(), Receiver(hold=True)
    await bench.serve(there, channel, receiver)
    sending = bench.start(here.send(bench.message(channel, b"1")))
    await bench.got(receiver, 1)
    await there.close()
    outcome = (await asyncio.gather(sending, return_exceptions=True))[0]
    failed = isinstance(outcome, CallError) or (isinstance(outcome, Message) and outcome.status)
    assert failed, f"the receiver went away, and the sender got {outcome!r}"


# What outlives a process, and what can be looked at


@_check("what was accepted is there after all have closed and opened again", Trait.DURABLE)
async def _(bench: Bench) -> None:
    here, queue, topic = await bench.open(), bench.channel(durable=True), bench.channel(fanout=True, durable=True)
    await (await bench.serve(here, topic, Receiver(), "dispatch")).stop()
    await bench.send(here, queue, b"1")
    await bench.send(here, topic, b"2")
    await here.close()
    back, first, second = await bench.open(), Receiver(), Receiver()
    await bench.serve(back, queue, first)
    await bench.serve(back, topic, second, "dispatch")
    await bench.got(first, 1)
    await bench.got(second, 1)
    _same((first.bodies, second.bodies), ([b"1"], [b"2"]), "what was there again")


@_check("tail sees what is sent from then on, and takes it from nobody", Trait.REDELIVERS, inspects=Tailing)
async def _(bench: Bench) -> None:
    here, there, watching = await bench.open(), await bench.open(), await bench.open()
    channel, other, receiver, seen = bench.channel("a"), bench.channel("b"), Receiver(), list[bytes]()
    await bench.send(here, channel, b"before")
    exact, prefixed = cast(Tailing, watching).tail(channel.name), cast(Tailing, watching).tail("check.*")

    async def watch() -> None:
        seen.append((await anext(exact)).body)
        seen.extend([(await anext(prefixed)).body for _ in range(2)])

    watcher = bench.start(watch())
    await bench.quiet()
    await bench.send(here, other, b"other")
    await bench.send(here, channel, b"own")
    await watcher
    _same((seen[0], sorted(seen[1:])), (b"own", [b"other", b"own"]), "what the two tails saw")
    await bench.serve(there, channel, receiver)
    await bench.got(receiver, 2)
    _same(sorted_bodies(receiver), [b"before", b"own"], "what was left for the receiver")


@_check("channels() counts what waits, what is in work and what is dead", Trait.REDELIVERS, inspects=Counting)
async def _(bench: Bench) -> None:
    here, there, channel = await bench.open(), await bench.open(), bench.channel(durable=True)
    dying, holding = Receiver(Dead("hopeless")), Receiver(hold=True)
    await bench.send(here, channel, b"dies")
    serving = await bench.serve(there, channel, dying)
    await bench.got(dying, 1)
    await serving.stop()
    await bench.serve(there, channel, holding, limit=1)
    await bench.send(here, channel, b"in work", b"waits", b"waits too")
    await bench.got(holding, 1)
    state = await _state(here, channel)
    for _ in range(500):  # where the broker is told by and by what is in work
        if state and (state.waiting, state.in_work, state.dead) == (2, 1, 1):
            break
        await asyncio.sleep(0.005)
        state = await _state(here, channel)
    assert state, "the channel is not among channels()"
    _same((state.waiting, state.in_work, state.dead), (2, 1, 1), "how many wait, are in work and are dead")
    assert state.oldest is None or 0 <= state.oldest < 10, f"the oldest waits since {state.oldest:g} s"
    holding.release()
    await bench.got(holding, 3)


async def _state(transport: Transport, channel: Channel) -> ChannelState | None:
    states = await cast(Counting, transport).channels()
    return next((state for state in states if state.channel == channel.name), None)


async def _letters(transport: Transport, channel: Channel, count: int) -> list[Any]:
    """Waits until the channel has so many dead letters: a verdict may take a moment to be written."""
    letters = list(await cast(Letters, transport).dead(channel.name))
    for _ in range(500):
        if len(letters) == count:
            break
        await asyncio.sleep(0.005)
        letters = list(await cast(Letters, transport).dead(channel.name))
    _same(len(letters), count, "dead letters of the channel")
    return letters
