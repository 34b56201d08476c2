"""Fallbacks: what runs when, a stale reply, a chain, a fallback that fails."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from weakref import ref

import pytest
from callee import run

from quintet import (
    Breaker,
    Bulkhead,
    CallError,
    CircuitOpen,
    ConfigurationError,
    Contract,
    DeadlineExceeded,
    Fault,
    InvalidMessage,
    LimitReached,
    Policy,
    RemoteError,
    Service,
    connect,
    deadline,
    notification,
    on,
    request,
    serve,
    set_policy,
    stale,
)
from quintet.errors import UnknownOperation
from quintet.fallback import KEPT, KEPT_BYTES, Kept
from quintet.message import Message
from quintet.testing import FakeClock


class NoSuchPassenger(Fault, status=404):
    passenger_id: str


class Passengers(Contract, name="passengers"):
    @request(faults=[NoSuchPassenger])
    async def name(self, passenger_id: str) -> list[str]: ...

    @request
    async def seats(self, rows: dict[int, str], numbers: set[int]) -> list[str]: ...

    @notification
    async def greet(self, passenger_id: str) -> None: ...


class Desk:
    """The service, whose handler does what `answer` does."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.closing = asyncio.Event()
        self.answer: Callable[[str], object] = lambda passenger_id: [passenger_id, "Ada"]

    @asynccontextmanager
    async def client(self, *policy: object) -> AsyncIterator[Passengers]:
        service = Service(Passengers)

        @service.handles(Passengers.name)
        async def name(passenger_id: str) -> list[str]:
            found = self.answer(passenger_id)
            if found is None:
                await self.closing.wait()
            if isinstance(found, Exception):
                raise found
            return found  # type: ignore[return-value]

        @service.handles(Passengers.seats)
        async def seats(rows: dict[int, str], numbers: set[int]) -> list[str]:
            if self.answer is failing:
                raise RuntimeError("the database is gone")
            return ["seat"]

        @service.handles(Passengers.greet)
        async def greet(passenger_id: str) -> None: ...

        async with (
            serve(service, at="memory://", clock=self.clock),
            connect(Passengers, "memory://", clock=self.clock, policy=policy) as client,  # type: ignore[arg-type]
        ):
            yield client
            self.closing.set()  # the service waits for what it has in work

    async def within(self, call: asyncio.Future[list[str]], seconds: float = 2.0) -> list[str]:
        await self.clock.advance(seconds)
        return await call


def failing(passenger_id: str) -> object:
    return RuntimeError("the database is gone")


def hanging(passenger_id: str) -> object:
    return None


def test_a_fallback_runs_on_a_failure_and_on_a_timeout() -> None:
    """Behaviour 28."""

    async def main() -> None:
        desk = Desk()
        async with desk.client(on(Passengers.name, fallback=[["nobody"]])) as passengers:
            desk.answer = failing
            assert await passengers.name("p-1") == ["nobody"]
            desk.answer = hanging
            assert await desk.within(asyncio.ensure_future(passengers.name("p-1"))) == ["nobody"]

    run(main)


@pytest.mark.parametrize(
    ("policy", "error"),
    [(Policy(breaker=Breaker(force_open=True)), CircuitOpen), (Policy(bulkhead=Bulkhead(1)), LimitReached)],
)
def test_a_fallback_runs_on_an_open_circuit_and_on_a_refusal(policy: Policy, error: type[CallError]) -> None:
    """Behaviour 28."""

    async def main() -> None:
        desk = Desk()
        desk.answer = hanging
        async with desk.client(policy) as bare, desk_again(desk, policy) as guarded:
            holding = [asyncio.ensure_future(bare.name("p-1")), asyncio.ensure_future(guarded.name("p-1"))]
            await desk.clock.settle()
            with pytest.raises(error):
                await bare.name("p-1")
            assert await guarded.name("p-1") == ["nobody"]
            for call in holding:
                call.cancel()
            await asyncio.wait(holding)

    run(main)


def desk_again(desk: Desk, policy: Policy) -> connect[Passengers]:
    return connect(
        Passengers, "memory://", clock=desk.clock, policy=[policy, on(Passengers.name, fallback=[["nobody"]])]
    )


def test_a_declared_fault_is_an_answer_and_runs_no_fallback() -> None:
    """Behaviour 28."""

    async def main() -> None:
        desk = Desk()
        desk.answer = lambda passenger_id: NoSuchPassenger(passenger_id=passenger_id)
        async with desk.client(on(Passengers.name, fallback=[["nobody"]])) as passengers:
            with pytest.raises(NoSuchPassenger):
                await passengers.name("p-1")

    run(main)


@pytest.mark.parametrize("mistake", [InvalidMessage, UnknownOperation])
def test_a_mistake_of_the_caller_runs_no_fallback(mistake: type[CallError]) -> None:
    async def main() -> None:
        desk = Desk()
        async with desk.client(on(Passengers.name, fallback=[["nobody"]])) as passengers:
            line = passengers.name._line

            async def send(message: Message) -> Message:
                raise mistake("so it cannot be asked")

            line.sender.send = send  # type: ignore[attr-defined]
            with pytest.raises(mistake):
                await passengers.name("p-1")

    run(main)


def test_a_cancellation_runs_no_fallback() -> None:
    """Behaviour 28."""

    async def main() -> None:
        desk, ran = Desk(), list[str]()
        desk.answer = hanging

        async def guess(passenger_id: str) -> list[str]:
            ran.append(passenger_id)
            return []

        async with desk.client(on(Passengers.name, fallback=[guess])) as passengers:
            call = asyncio.ensure_future(passengers.name("p-1"))
            await desk.clock.settle()
            call.cancel()
            await asyncio.wait([call])
            assert call.cancelled()
            assert ran == []

    run(main)


def test_a_stale_reply_is_used_while_it_is_young_enough_and_says_so() -> None:
    """Behaviour 29."""

    async def main() -> None:
        desk = Desk()
        policy = on(Passengers.name, breaker=False, fallback=[stale(max_age=60), ["nobody"]])
        async with desk.client(policy) as passengers:
            fresh = await passengers.name.reply("p-1")
            assert (fresh.value, fresh.stale) == (["p-1", "Ada"], False)
            desk.answer = failing
            await desk.clock.advance(60)
            kept = await passengers.name.reply("p-1")
            assert (kept.value, kept.stale) == (["p-1", "Ada"], True)
            kept.value.append("changed by a caller")
            assert await passengers.name("p-1") == ["p-1", "Ada"]
            await desk.clock.advance(0.1)
            older = await passengers.name.reply("p-1")
            assert (older.value, older.stale) == (["nobody"], False)

    run(main)


def test_a_stale_reply_is_one_to_the_same_arguments_and_headers() -> None:
    async def main() -> None:
        desk = Desk()
        async with desk.client(on(Passengers.name, fallback=[stale(max_age=60)])) as passengers:
            await passengers.name.using(headers={"authorization": "ada"})("p-1")
            desk.answer = failing
            with pytest.raises(RemoteError):
                await passengers.name.using(headers={"authorization": "ada"})("p-2")
            with pytest.raises(RemoteError):
                await passengers.name.using(headers={"authorization": "eve"})("p-1")
            assert await passengers.name.using(headers={"authorization": "ada"})("p-1") == ["p-1", "Ada"]

    run(main)


def test_a_stale_reply_stands_in_whatever_order_the_dicts_and_sets_of_the_arguments_have() -> None:
    async def main() -> None:
        desk = Desk()
        async with desk.client(on(Passengers.seats, breaker=False, fallback=[stale(max_age=60)])) as passengers:
            await passengers.seats({1: "x", 2: "y"}, {0, 8})
            desk.answer = failing
            assert await passengers.seats({2: "y", 1: "x"}, set([8, 0])) == ["seat"]  # noqa: C405 - keeps its order
            with pytest.raises(RemoteError):
                await passengers.seats({1: "y", 2: "x"}, {0, 8})

    run(main)


def kept_by(client: Passengers) -> Kept:
    return client.name._line._guarded.own.of(Kept, lambda: Kept(FakeClock()))  # type: ignore[attr-defined, no-any-return]


def test_replies_are_kept_up_to_a_number_of_bytes_and_the_oldest_goes_first() -> None:
    async def main() -> None:
        desk = Desk()
        desk.answer = lambda passenger_id: [passenger_id, "x" * 1_000_000]
        async with desk.client(on(Passengers.name, breaker=False, fallback=[stale(max_age=60)])) as passengers:
            for number in range(100):
                await passengers.name(str(number))
            kept = kept_by(passengers)
            bodies = [len(reply.body) for _, _, reply in kept._replies.values()]
            assert sum(bodies) <= kept.bytes <= KEPT_BYTES
            assert len(bodies) == KEPT_BYTES // 1_000_000
            desk.answer = lambda passenger_id: ["x" * KEPT_BYTES]
            await passengers.name("99")  # larger than all that may be kept: only what it would replace goes
            assert len(kept) == len(bodies) - 1
            desk.answer = failing
            assert (await passengers.name.reply("98")).stale
            for gone in ("99", "0"):
                with pytest.raises(RemoteError):
                    await passengers.name(gone)

    run(main)


def test_replies_that_are_too_old_are_freed_without_another_call() -> None:
    async def main() -> None:
        desk = Desk()
        desk.answer = lambda passenger_id: [passenger_id, "x" * 100_000]
        fallback = [stale(max_age=60), stale(max_age=30)]  # the longest decides
        async with desk.client(on(Passengers.name, breaker=False, fallback=fallback)) as passengers:
            kept = kept_by(passengers)
            idle = len(desk.clock.timers)
            for number in range(100):
                await passengers.name(str(number))
                await desk.clock.advance(0.1)
            await desk.clock.advance(50)
            assert len(kept) == 100
            assert len(desk.clock.timers) == idle + 1
            await desk.clock.advance(6)
            assert 40 <= len(kept) <= 60
            await desk.clock.advance(6)
            assert (len(kept), kept.bytes, len(desk.clock.timers)) == (0, 0, idle)

    run(main)


def test_a_change_of_the_policy_keeps_the_replies_for_as_long_as_it_says_then() -> None:
    async def main() -> None:
        desk = Desk()
        async with desk.client(on(Passengers.name, fallback=[stale(max_age=60)])) as passengers:
            kept = kept_by(passengers)
            await passengers.name("p-1")
            set_policy(passengers, on(Passengers.name, breaker=False, fallback=[stale(max_age=120)]))
            await desk.clock.advance(100)
            assert len(kept) == 1
            set_policy(passengers, on(Passengers.name, fallback=[["none"]]))
            await desk.clock.advance(30)
            assert len(kept) == 0

    run(main)


def test_replies_are_freed_on_the_loop_that_is_running_when_another_has_ended() -> None:
    clock = FakeClock()
    kept = Kept(clock)
    kept.max_age = 60

    async def keep(key: bytes) -> None:
        kept.keep(key, Message(channel=Passengers.name.channel))

    async def free() -> None:
        await keep(b"other")
        await clock.advance(62)
        assert len(kept) == 0

    run(lambda: keep(b"one"))
    clock._timers.clear()  # they end with their loop
    run(free)


def test_the_replies_of_a_client_that_is_gone_are_freed() -> None:
    async def main() -> None:
        desk = Desk()
        async with desk.client(on(Passengers.name, fallback=[stale(max_age=1e6)])) as passengers:
            await passengers.name("p-1")
            gone = ref(kept_by(passengers))
        del passengers
        gc.collect()
        assert gone() is None

    run(main)


def test_only_so_many_replies_are_kept_and_the_oldest_goes_first() -> None:
    async def main() -> None:
        desk = Desk()
        async with desk.client(
            on(Passengers.name, breaker=False, fallback=[stale(max_age=60), ["none"]])
        ) as passengers:
            for number in range(KEPT + 1):
                await passengers.name(str(number))
            desk.answer = failing
            assert await passengers.name("0") == ["none"]
            assert await passengers.name("1") == ["1", "Ada"]

    run(main)


def test_the_chain_is_gone_down_until_one_has_an_answer() -> None:
    """Behaviour 29."""

    async def main() -> None:
        desk = Desk()
        desk.answer = failing

        async def broken(passenger_id: str) -> list[str]:
            raise OSError("no file")

        async def guess(passenger_id: str) -> list[str]:
            return [passenger_id, "guessed"]

        async with desk.client(on(Passengers.name, fallback=[stale(max_age=9), broken, guess, ["none"]])) as passengers:
            assert await passengers.name("p-1") == ["p-1", "guessed"]

    run(main)


def test_where_the_fallback_fails_too_the_caller_gets_the_calls_own_error() -> None:
    """Behaviour 30."""

    async def main() -> None:
        desk = Desk()
        desk.answer = failing

        async def broken(passenger_id: str) -> list[str]:
            raise OSError("no file")

        async with desk.client(on(Passengers.name, fallback=[broken])) as passengers:
            with pytest.raises(RemoteError) as raised:
                await passengers.name("p-1")
            assert raised.value.__notes__ == ["its fallback failed too: OSError: no file"]

    run(main)


def test_a_fallback_function_has_what_remains_of_the_callers_time_and_a_cap_of_its_own() -> None:
    async def main() -> None:
        desk = Desk()
        desk.answer = failing

        async def slow(passenger_id: str) -> list[str]:
            await asyncio.Event().wait()
            return []

        async with desk.client(Policy(timeout=0.5), on(Passengers.name, fallback=[slow, ["none"]])) as passengers:
            call = asyncio.ensure_future(passengers.name("p-1"))
            await desk.clock.advance(0.49)
            assert not call.done()
            assert await desk.within(call, 0.02) == ["none"]

            async def hurried() -> list[str]:
                with deadline(0.2, clock=desk.clock):
                    return await passengers.name("p-1")

            call = asyncio.ensure_future(hurried())
            await desk.clock.advance(0.21)
            assert await call == ["none"]

    run(main)


def test_no_more_than_ten_of_one_fallback_function_run_at_once() -> None:
    async def main() -> None:
        desk, running = Desk(), 0
        desk.answer = failing

        async def slow(passenger_id: str) -> list[str]:
            nonlocal running
            running += 1
            await asyncio.Event().wait()
            return []

        policy = on(Passengers.name, breaker=False, fallback=[slow])
        async with desk.client(policy) as passengers:
            calls = [asyncio.ensure_future(passengers.name("p-1")) for _ in range(15)]
            await desk.clock.settle()
            assert running == 10
            assert sum(isinstance(call.exception(), RemoteError) for call in calls if call.done()) == 5
            await desk.clock.advance(1.1)
            ended = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(error, RemoteError) for error in ended)

    run(main)


def test_what_cannot_be_a_fallback_is_refused_when_it_is_written() -> None:
    async def gone(passenger_id: str) -> None: ...

    def plain(passenger_id: str) -> list[str]:
        return []

    with pytest.raises(ConfigurationError, match="a notification has no reply to stand in for"):
        on(Passengers.greet, fallback=[gone])
    with pytest.raises(ConfigurationError, match="plain must be `async def`"):
        on(Passengers.name, fallback=[plain])  # type: ignore[list-item]
    with pytest.raises(ConfigurationError, match="max_age=0"):
        stale(max_age=0)


def test_the_deadline_error_passes_where_there_is_no_fallback_left() -> None:
    async def main() -> None:
        desk = Desk()
        desk.answer = hanging
        async with desk.client(on(Passengers.name, fallback=[stale(max_age=60)])) as passengers:
            with pytest.raises(DeadlineExceeded):
                await desk.within(asyncio.ensure_future(passengers.name("p-1")))

    run(main)
