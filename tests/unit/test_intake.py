"""What a broker pushes: bounded, in order of its keys, settled by verdict, given back at the end."""

from __future__ import annotations

import asyncio

import pytest
from msgspec import Struct

from quintet.dead_letters import failures, letter, revive
from quintet.intake import CRASHES, Intake
from quintet.message import Channel, Message
from quintet.testing import FakeClock
from quintet.testing.bench import Receiver
from quintet.transport import Again, Dead

CHANNEL = Channel("trips.v1.created", fanout=True, durable=True, keyed=True)


class Sent(Struct, eq=False):
    body: bytes
    key: str = ""
    attempt: int = 1
    crashes: int = 0
    deadline: float | None = None


class Broker:
    """Remembers what the intake had done with each delivery."""

    def __init__(self) -> None:
        self.acknowledged: list[bytes] = []
        self.returned: list[bytes] = []
        self.sent_again: list[tuple[Message, float]] = []
        self.buried: list[Message] = []

    def read(self, delivery: Sent) -> Message:
        return Message(
            channel=CHANNEL,
            body=delivery.body,
            id="m-1",
            key=delivery.key,
            attempt=delivery.attempt,
            deadline=delivery.deadline,
            headers={},
        )

    def crashed(self, delivery: Sent) -> int:
        return delivery.crashes

    def done(self, delivery: Sent) -> None:
        self.acknowledged.append(delivery.body)

    async def again(self, delivery: Sent, copy: Message, after: float) -> None:
        self.sent_again.append((copy, after))

    async def dead(self, delivery: Sent, copy: Message) -> None:
        self.buried.append(copy)

    def give_back(self, delivery: Sent) -> None:
        self.returned.append(delivery.body)


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def intake_of(broker: Broker, receiver: Receiver, clock: FakeClock, limit: int = 10, *, keyed: bool = True) -> Intake:
    return Intake(broker, receiver, "billing", limit, clock, keyed=keyed)


async def test_what_is_handled_is_acknowledged_and_no_more_than_the_limit_is_in_work() -> None:
    broker, receiver = Broker(), Receiver(hold=True)
    intake = intake_of(broker, receiver, FakeClock(), limit=2, keyed=False)
    for number in range(5):
        intake.put(Sent(b"%d" % number))
    await turns()
    assert (receiver.in_work, intake.size, broker.acknowledged) == (2, 5, [])
    receiver.release()
    await turns()
    assert (receiver.peak, intake.size, sorted(broker.acknowledged)) == (2, 0, [b"0", b"1", b"2", b"3", b"4"])
    await intake.stop()


async def test_a_failed_message_is_sent_again_with_the_next_attempt_and_the_time_it_failed_at() -> None:
    clock, broker = FakeClock(), Broker()
    intake = intake_of(broker, Receiver(Again(2.0)), clock)
    intake.put(Sent(b"1", attempt=3))
    await turns()
    copy, after = broker.sent_again[0]
    assert (copy.attempt, after, failures(copy)) == (4, 2.0, [pytest.approx(clock.wall(), abs=0.01)])
    assert intake.size == 0


async def test_a_keyed_message_that_fails_is_held_back_here_with_those_behind_it_and_no_other() -> None:
    clock, broker = FakeClock(), Broker()
    receiver = Receiver(Again(2.0), hold=False)
    intake = intake_of(broker, receiver, clock)
    for body, key in ((b"a1", "a"), (b"a2", "a"), (b"b1", "b")):
        intake.put(Sent(body, key), key)
    await turns()
    assert (receiver.bodies, broker.acknowledged, intake.size) == ([b"a1", b"b1"], [b"b1"], 2)
    await clock.advance(2.1)
    await turns()
    assert receiver.bodies == [b"a1", b"b1", b"a1", b"a2"]
    assert [message.attempt for message in receiver.messages] == [1, 1, 2, 1]
    assert (broker.acknowledged, broker.sent_again, intake.size) == ([b"b1", b"a1", b"a2"], [], 0)


async def test_the_reason_of_a_dead_letter_is_not_longer_than_a_broker_takes_in_a_header() -> None:
    broker = Broker()
    intake = intake_of(broker, Receiver(Dead("漢" * 5000)), FakeClock())
    intake.put(Sent(b"1"))
    await turns()
    reason = letter(broker.buried[0]).reason
    assert 3990 < len(reason.encode()) <= 4000
    assert set(reason) == {"漢"}


async def test_a_dead_letter_tells_all_its_attempts_also_those_that_were_counted_here() -> None:
    clock, broker = FakeClock(), Broker()
    intake = intake_of(broker, Receiver(Again(1.0), Again(1.0), Dead("no car")), clock)
    start = clock.wall()
    intake.put(Sent(b"1", "a"), "a")
    for _ in range(3):
        await turns()
        await clock.advance(1.1)
    dead = letter(broker.buried[0])
    assert (dead.channel, dead.group, dead.reason, dead.attempts) == (CHANNEL.name, "billing", "no car", 3)
    assert dead.id == "m-1@billing"
    assert [round(time - start) for time in dead.times] == [0, 1, 2]
    again, group = revive(broker.buried[0])
    assert (again.attempt, again.channel.name, group, again.headers) == (
        1,
        CHANNEL.name,
        "billing",
        {"quintet-replayed": "1"},
    )


async def test_what_has_expired_is_acknowledged_and_not_handled() -> None:
    clock, broker, receiver = FakeClock(), Broker(), Receiver()
    intake = intake_of(broker, receiver, clock)
    intake.put(Sent(b"old", deadline=clock.now() - 1))
    await turns()
    assert (receiver.messages, broker.acknowledged) == ([], [b"old"])


async def test_a_message_that_kills_its_receivers_ends_as_a_dead_letter() -> None:
    broker, receiver = Broker(), Receiver()
    intake = intake_of(broker, receiver, FakeClock())
    intake.put(Sent(b"bomb", crashes=CRASHES + 1))
    await turns()
    assert not receiver.messages
    assert "went away 21 times" in letter(broker.buried[0]).reason


async def test_what_has_not_begun_is_given_back_when_it_stops() -> None:
    clock, broker, receiver = FakeClock(), Broker(), Receiver(hold=True)
    intake = intake_of(broker, receiver, clock, limit=1)
    for body, key in ((b"a1", "a"), (b"a2", "a"), (b"b1", "b")):
        intake.put(Sent(body, key), key)
    await turns()
    stopping = asyncio.ensure_future(intake.stop())
    await turns()
    assert not stopping.done()
    assert sorted(broker.returned) == [b"a2", b"b1"]
    intake.put(Sent(b"late"))
    assert broker.returned[-1] == b"late"
    receiver.release()
    await stopping
    assert (broker.acknowledged, intake.size) == ([b"a1"], 0)


async def test_what_waits_held_back_is_given_back_too_and_its_timer_does_nothing() -> None:
    clock, broker, receiver = FakeClock(), Broker(), Receiver(Again(5.0))
    intake = intake_of(broker, receiver, clock)
    intake.put(Sent(b"a1", "a"), "a")
    await turns()
    await intake.stop()
    await clock.advance(6)
    assert (broker.returned, intake.size, len(receiver.messages)) == ([b"a1"], 0, 1)


async def test_cancelled_work_is_given_back() -> None:
    broker, receiver = Broker(), Receiver(hold=True)
    intake = intake_of(broker, receiver, FakeClock())
    intake.put(Sent(b"1"))
    await turns()
    await intake.abort()
    assert (broker.returned, receiver.in_work, intake.size) == ([b"1"], 0, 0)


async def test_a_lost_session_takes_with_it_what_was_not_in_work_and_its_keys_go_on() -> None:
    clock, broker, receiver = FakeClock(), Broker(), Receiver(hold=True)
    intake = intake_of(broker, receiver, clock, limit=1)
    old = [Sent(b"a1", "a"), Sent(b"a2", "a"), Sent(b"b1", "b")]
    for delivery in old:
        intake.put(delivery, delivery.key)
    await turns()
    intake.forget(lambda delivery: delivery in old)
    assert intake.size == 1  # what is in work ends as it will
    for delivery in (Sent(b"a2 again", "a"), Sent(b"b1 again", "b")):
        intake.put(delivery, delivery.key)
    receiver.release()
    await turns()
    assert sorted(receiver.bodies) == [b"a1", b"a2 again", b"b1 again"]
    assert intake.size == 0


async def test_a_held_message_of_a_lost_session_is_dropped_and_its_key_goes_on() -> None:
    clock, broker, receiver = FakeClock(), Broker(), Receiver(Again(5.0))
    intake = intake_of(broker, receiver, clock)
    first = Sent(b"a1", "a")
    intake.put(first, "a")
    await turns()
    intake.forget(lambda delivery: delivery is first)
    intake.put(Sent(b"a1 again", "a"), "a")
    await clock.advance(6)
    assert (receiver.bodies, intake.size) == ([b"a1", b"a1 again"], 0)
