"""The memory transport beyond the conformance suite: its options, its bounds, and being like another transport."""

from __future__ import annotations

import asyncio

import pytest

from quintet.errors import AddressError, CannotCarry, ConnectionLost, Overloaded, RemoteError, Unavailable
from quintet.message import Channel, Message
from quintet.testing import FakeClock, Receiver
from quintet.transport import DONE, Again, Dead, Done, Serving, Trait, Verdict, carrier, open_address, parse_address
from quintet.transports import memory
from quintet.transports.memory import Carrier

WORK = Channel("work")
NEWS = Channel("news", fanout=True)


async def opened(address: str = "memory://", clock: FakeClock | None = None) -> Carrier:
    transport = open_address(address, clock or FakeClock())
    assert isinstance(transport, Carrier)
    await transport.open()
    return transport


def like(monkeypatch: pytest.MonkeyPatch, *traits: Trait) -> str:
    """The address of a bus that is like a transport with just these traits."""

    class Other(Carrier):
        pass

    Other.traits = frozenset(traits)
    monkeypatch.setattr(memory, "carrier", lambda _: Other)
    return "memory://?like=other"


async def test_addresses_of_one_name_share_a_bus_and_others_do_not() -> None:
    one, same, other = await opened("memory://a"), await opened("memory://a"), await opened("memory://b")
    await one.send(Message(channel=WORK))
    assert [state.waiting for state in await same.channels()] == [1]
    assert await other.channels() == []


def test_two_event_loops_never_share_a_bus() -> None:
    async def main() -> None:
        transport = await opened("memory://a")
        assert await transport.channels() == []
        await transport.send(Message(channel=WORK))

    asyncio.run(main())
    asyncio.run(main())


def test_it_is_like_the_transport_that_is_asked_for() -> None:
    for scheme in ("memory", "http"):
        address = parse_address(f"memory://?like={scheme}")
        assert carrier(address)(address).traits == carrier(parse_address(f"{scheme}://")).traits
    assert Trait.REPLIES not in Carrier.traits  # and the class itself stays as it was


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("memory://?like=pigeons", "unknown scheme 'pigeons'"),
        ("memory://?capacity=0", "option capacity must be a number of at least 1"),
        ("memory://?capacity=many", "is not a number"),
        ("memory://?size=3", "unknown option size"),
    ],
)
def test_a_wrong_address_is_refused_with_a_sentence(address: str, sentence: str) -> None:
    with pytest.raises(AddressError, match=sentence):
        open_address(address)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: object) -> None:
        raise ImportError("No module named 'confluent_kafka'")

    monkeypatch.setattr(memory, "carrier", missing)
    with pytest.raises(AddressError, match=r"like kafka its library is needed: .*confluent_kafka"):
        open_address("memory://?like=kafka")


async def test_one_name_cannot_be_like_two_transports() -> None:
    await opened("memory://a")
    with pytest.raises(AddressError, match="already in use with other traits"):
        await opened("memory://a?like=http")


async def test_without_fanout_an_event_is_refused_by_the_missing_trait(monkeypatch: pytest.MonkeyPatch) -> None:
    transport = await opened(like(monkeypatch, Trait.REDELIVERS))
    with pytest.raises(CannotCarry, match="cannot carry news: no FANOUT"):
        await transport.send(Message(channel=NEWS))
    with pytest.raises(CannotCarry, match="cannot carry news: no FANOUT"):
        await transport.serve(NEWS, Receiver(), "group")


async def test_where_nothing_is_delivered_again_the_sender_learns_what_became_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transport, outcomes = await opened(like(monkeypatch, Trait.REPLIES)), list[Verdict | str]()
    outcomes += [Again(3.0), Dead("hopeless"), Done(Message(channel=WORK, body=b"reply"))]

    async def receive(_: Message) -> Verdict:
        outcome = outcomes.pop(0)
        assert not isinstance(outcome, str)
        return outcome

    serving = await transport.serve(WORK, receive, "group")
    with pytest.raises(Overloaded) as overloaded:
        await transport.send(Message(channel=WORK))
    assert overloaded.value.retry_after == 3.0
    with pytest.raises(RemoteError, match="could not be handled"):
        await transport.send(Message(channel=WORK))
    reply = await transport.send(Message(channel=WORK))
    assert reply
    assert reply.body == b"reply"
    await serving.stop()
    with pytest.raises(Unavailable, match="nobody serves work"):
        await transport.send(Message(channel=WORK))


async def test_senders_that_wait_for_a_receiver_that_goes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    transport, receiver = await opened(like(monkeypatch, Trait.REPLIES)), Receiver(hold=True)
    await transport.serve(WORK, receiver, "group", limit=1)
    sends = [asyncio.create_task(transport.send(Message(channel=WORK))) for _ in range(3)]
    await FakeClock().settle()
    await transport.close()
    errors = await asyncio.gather(*sends, return_exceptions=True)
    assert [type(error) for error in errors] == [ConnectionLost, Unavailable, Unavailable]


async def test_a_sender_that_never_waits_does_not_starve_the_receiver() -> None:
    transport, receiver, most = await opened(), Receiver(), 0
    await transport.serve(WORK, receiver, "group", limit=1)
    for number in range(20_000):
        await transport.send(Message(channel=WORK))
        most = max(most, number - len(receiver.messages))
    assert most < 2_000


async def test_what_a_receiver_was_woken_for_goes_to_another_where_it_stops_first() -> None:
    transport, first, second = await opened(), Receiver(), Receiver()
    stopping = await transport.serve(WORK, first, "group")
    await transport.serve(WORK, second, "group")
    await transport.send(Message(channel=WORK))  # wakes the first, which has had no turn of the loop yet
    await stopping.stop()
    await FakeClock().settle()
    assert (len(first.messages), len(second.messages)) == (0, 1)


async def test_a_buffer_that_the_sender_writes_into_later_arrives_as_it_was() -> None:
    transport, receiver, body = await opened(), Receiver(), bytearray(b"sent")
    await transport.serve(WORK, receiver, "group")
    await transport.send(Message(channel=WORK, body=body))  # type: ignore[arg-type]
    body[:] = b"late"
    await FakeClock().settle()
    assert receiver.bodies == [b"sent"]


async def test_a_cancelled_receiver_has_its_message_again_after_a_second() -> None:
    clock = FakeClock()
    transport, attempts = await opened(clock=clock), list[int]()

    async def receive(message: Message) -> Verdict:
        attempts.append(message.attempt)
        if len(attempts) == 1:
            task = asyncio.current_task()
            assert task
            task.cancel()
            await asyncio.sleep(0)
        return DONE

    await transport.serve(WORK, receive, "group", limit=1)
    await transport.send(Message(channel=WORK))
    await clock.settle()
    assert attempts == [1]
    await clock.advance(1.0)
    assert attempts == [1, 2]


async def test_the_copy_of_a_group_that_is_full_goes_to_the_dead_letters() -> None:
    transport = await opened("memory://?capacity=2")
    await (await transport.serve(NEWS, Receiver(), "lagging")).stop()
    for number in range(3):
        await transport.send(Message(channel=NEWS, body=b"%d" % number))
    (letter,) = await transport.dead("news")
    assert (letter.group, letter.message.body) == ("lagging", b"2")
    assert "2 messages waiting" in letter.reason


async def test_dead_letters_are_bounded_and_the_oldest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "DEAD_KEPT", 2)

    clock = FakeClock()
    transport = await opened(clock=clock)
    await transport.serve(WORK, Receiver(Dead("a"), Dead("b"), Dead("c")), "group", limit=1)
    for _ in range(3):
        await transport.send(Message(channel=WORK))
    await clock.settle()
    assert [letter.reason for letter in await transport.dead()] == ["b", "c"]


async def test_a_temporary_group_leaves_nothing_behind_when_it_goes() -> None:
    transport = await opened()
    servings: list[Serving] = [
        await transport.serve(Channel("replies", temporary=True), Receiver(), ""),
        await transport.serve(Channel("news", fanout=True, temporary=True), Receiver(), "screen"),
    ]
    for serving in servings:
        await serving.stop()
    assert await transport.channels() == []


async def test_a_tail_ends_when_its_transport_is_closed_and_is_forgotten_when_nobody_holds_it() -> None:
    transport, other = await opened(), await opened()
    tail = transport.tail("work")
    ending = asyncio.ensure_future(anext(tail, None))
    await asyncio.sleep(0)
    await transport.close()
    assert await ending is None
    other.tail("work")  # nobody keeps it
    assert other._opened().observers == []
