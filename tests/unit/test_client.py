"""The caller's side: addresses, time-outs and cancellation, replies that come late or twice, pending answers, links."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from trips_contract import Fares, Place, Trip, Trips

from quintet import (
    AddressError,
    CannotCarry,
    ConfigurationError,
    DeadlineExceeded,
    Policy,
    Service,
    Unavailable,
    connect,
    on,
    serve,
)
from quintet.message import Channel, Message
from quintet.replies import Replies
from quintet.testing import FakeClock
from quintet.transport import DONE, Done, Verdict, open_address

TRIP = Trip("t-1", Place(1.5))


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def within_time() -> None:
        await asyncio.wait_for(main(), 20)

    asyncio.run(within_time())


def fares(handler: Callable[[str], Awaitable[float]]) -> Service:
    service = Service(Fares)

    @service.handles(Fares.fare)
    async def fare(trip_id: str) -> float:
        return await handler(trip_id)

    return service


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("rides.db", "is no address: write scheme://"),
        ("gopher://host", "unknown scheme 'gopher'; known are .*http.*memory.*sqlite"),
        ("http://127.0.0.1:99999", "port must be a number"),
        ("memory://?colour=red", "unknown option colour"),
        ("http+dnss://trips:8001", "http has no variant 'dnss', and no resolver is called that"),
    ],
)
def test_an_address_that_cannot_be_used_is_one_sentence(address: str, sentence: str) -> None:
    async def main() -> None:
        with pytest.raises(AddressError, match=sentence):
            async with connect(Fares, address):
                pass

    run(main)


def test_without_an_address_nothing_can_be_carried() -> None:
    async def main() -> None:
        with pytest.raises(CannotCarry, match="no address was given"):
            async with connect(Fares, []):
                pass

    run(main)


def test_a_policy_of_another_contract_and_a_senseless_one_are_refused() -> None:
    async def main() -> None:
        with pytest.raises(ConfigurationError, match=r"on\(Trips.get, ...\) does not belong to Fares"):
            async with connect(Fares, "memory://", policy=on(Trips.get, timeout=1)):
                pass

    run(main)
    with pytest.raises(ConfigurationError, match="more than 0"):
        Policy(timeout=-1.0)


def test_arguments_that_are_not_the_operations_are_a_type_error() -> None:
    async def main() -> None:
        async with connect(Fares, "memory://") as client:
            with pytest.raises(TypeError, match=r"Fares.fare: .*trip_id"):
                await client.fare()  # type: ignore[call-arg]

    run(main)


def test_a_cancel_by_the_caller_in_the_tick_of_the_timeout_is_a_cancel() -> None:
    async def main() -> None:
        clock = FakeClock()
        async with connect(Fares, "memory://", policy=Policy(timeout=1.0), clock=clock) as client:
            call = asyncio.ensure_future(client.fare("t-1"))
            await clock.settle()
            clock.call_at(clock.now() + 1.0, call.cancel)  # before the wheel, which fires a grain later
            clock.call_at(clock.now() + 1.0078125, call.cancel)
            await clock.advance(1.1)
            assert call.cancelled()

    run(main)


def test_a_version_that_nobody_serves_is_named_where_it_was_asked_for() -> None:
    class Later(Fares, name="fares", version="9.0"):
        pass

    async def main() -> None:
        clock = FakeClock()

        async def fare(trip_id: str) -> float:
            return 1.0

        async with (
            serve(fares(fare), at="memory://v", clock=clock),
            connect(Later, "memory://v", clock=clock) as client,
        ):
            call = asyncio.ensure_future(client.fare("t-1"))
            await clock.advance(2)
            with pytest.raises(DeadlineExceeded, match=r"at memory://v \(channel fares\.v9\.fare\)"):
                await call

    run(main)


def test_a_timeout_leaves_the_task_of_the_caller_uncancelled() -> None:
    async def main() -> None:
        clock = FakeClock()
        async with connect(Fares, "memory://", policy=Policy(timeout=0.5), clock=clock) as client:

            async def caller() -> str:
                try:
                    await client.fare("t-1")
                except DeadlineExceeded:
                    await asyncio.sleep(0)
                    task = asyncio.current_task()
                    assert task is not None
                    return f"goes on, {task.cancelling()} cancellations"
                return "not reached"

            call = asyncio.ensure_future(caller())
            await clock.advance(1)
            assert call.result() == "goes on, 0 cancellations"
            assert clock.timers == []

    run(main)


def test_two_replies_late_replies_and_replies_to_nobody_harm_no_exchange() -> None:
    async def main() -> None:
        transport = open_address("memory://")
        await transport.open()
        replies, channel = Replies(transport, "test"), Channel("echo")
        await replies.open()

        async def echo_twice(message: Message) -> Verdict:
            for correlation in (message.correlation_id, message.correlation_id, "never heard of it", ""):
                reply = Message(channel=Channel(message.reply_to, temporary=True), body=message.body)
                reply.correlation_id = correlation
                await transport.send(reply)
            return DONE

        await transport.serve(channel, echo_twice, "")
        for body in (b"one", b"two", b"three"):
            reply = await replies.exchange(Message(channel=channel, id="same", body=body))
            assert reply.body == body
        assert "0 waiting" in repr(replies)
        await replies.close()
        await transport.close()

    run(main)


def test_a_caller_that_gives_up_leaves_nothing_waiting() -> None:
    async def main() -> None:
        transport = open_address("memory://")
        await transport.open()
        replies = Replies(transport, "test")
        await replies.open()
        exchange = asyncio.ensure_future(replies.exchange(Message(channel=Channel("nobody"), id="1")))
        await asyncio.sleep(0)
        assert "1 waiting" in repr(replies)
        exchange.cancel()
        with pytest.raises(asyncio.CancelledError):
            await exchange
        assert "0 waiting" in repr(replies)
        await replies.close()
        await transport.close()

    run(main)


def test_links_are_followed_by_name_where_the_reply_allows_them() -> None:
    async def main() -> None:
        cancelled: list[tuple[str, str]] = []
        service = Service(Trips, answers="memory://")

        async def nothing(*args: Any, **kwargs: Any) -> Any: ...

        @service.handles(Trips.create)
        async def create(trip: Trip) -> Trip:
            return trip

        @service.handles(Trips.cancel)
        async def cancel(trip_id: str, *, reason: str = "") -> None:
            cancelled.append((trip_id, reason))

        @service.handles(Trips.get)
        async def get(trip_id: str) -> Trip:
            return TRIP

        @service.handles(Trips.pickup_requested)
        async def pickup_requested(trip_id: str, place: Place) -> None: ...

        @service.handles(Trips.receipt)
        async def receipt(trip_id: str) -> str:
            return ""

        for address in ("memory://", "http://127.0.0.1:0"):
            where = [address, "memory://events"]
            async with serve(service, at=where) as at, connect(Trips, at) as client:
                reply = await client.create.reply(TRIP)
                assert reply.value == TRIP
                assert list(reply.links) == ["cancel"]
                await reply.links["cancel"]("changed my mind")
                reply = await client.create.reply(Trip("t-2", Place(1), state="ended"))
                assert list(reply.links) == []
        assert cancelled == [("t-1", "changed my mind")] * 2

    run(main)


def test_a_pending_answer_is_waited_for_through_a_restart_of_the_service() -> None:
    async def main() -> None:
        tries = 0

        class Away:
            """In the transport's place: unreachable twice, then there."""

            async def __call__(self, message: Message) -> Message | None:
                nonlocal tries
                tries += 1
                if tries <= 2:
                    raise Unavailable("nobody there")
                return await whole(message)

        clock = FakeClock()
        async with connect(Trips, "memory://", clock=clock) as client:
            collect = client.receipt._line._companions[0]  # type: ignore[attr-defined]
            answer = collect.bound.reply(Message(channel=Channel("x")), "the receipt")

            async def whole(message: Message) -> Message | None:
                return answer

            collect.send = Away()
            waiting = asyncio.ensure_future(client.receipt.pending("p-1").wait(30))
            await clock.advance(10)
            assert waiting.result() == "the receipt"
            tries = 0
            with pytest.raises(Unavailable):  # who names no time is told at once
                await client.receipt.pending("p-1")

    run(main)


def test_a_reply_that_does_not_fit_the_contract_says_so() -> None:
    async def main() -> None:
        transport = open_address("memory://")
        await transport.open()

        async def wrong(message: Message) -> Verdict:
            reply = Message(
                channel=Channel(message.reply_to, temporary=True), media_type="application/json", body=b'"a"'
            )
            reply.correlation_id = message.correlation_id
            await transport.send(reply)
            return Done()

        await transport.serve(Fares.fare.channel, wrong, "fares")
        async with connect(Fares, "memory://") as client:
            with pytest.raises(Exception, match=r"the reply of fares.fare does not fit its contract: Expected `float`"):
                await client.fare("t-1")
        await transport.close()

    run(main)
