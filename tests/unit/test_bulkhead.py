"""The bulkhead: no more than the limit under way, a place freed exactly once, a queue that forgets who left."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest
from callee import Callee, Passengers, run

from quintet import (
    Bulkhead,
    Contract,
    DeadlineExceeded,
    LimitReached,
    Overloaded,
    Policy,
    RemoteError,
    Safety,
    Service,
    connect,
    notification,
    request,
    serve,
)
from quintet.filters import bulkhead
from quintet.filters.bulkhead import Outstanding
from quintet.message import Message
from quintet.testing import FakeClock


def callee(limit: int = 10, queue: int = 0, timeout: float = 1.0) -> Callee:
    return Callee(Policy(bulkhead=Bulkhead(limit, queue), timeout=timeout), FakeClock())


async def end(service: Callee, *calls: asyncio.Task[BaseException | None]) -> None:
    for future in service.hanging:
        if not future.done():
            future.set_result(None)
    await asyncio.wait(calls)


def test_the_call_above_the_limit_fails_in_the_same_tick_and_is_not_sent() -> None:
    """Behaviour 19."""

    async def main() -> None:
        service = callee()
        calls = [service.start() for _ in range(10)]
        await service.clock.settle()
        with pytest.raises(LimitReached) as refused:  # runs to its end without the loop: nothing is awaited
            service.send(Message(channel=Passengers.get.channel)).__await__().send(None)
        assert refused.value.safety is Safety.NOT_SENT
        assert "10 requests to passengers are outstanding" in str(refused.value)
        assert service.begun == 10
        await end(service, *calls)
        assert await service.call() is None

    run(main)


def test_a_place_is_freed_exactly_once_however_the_call_ends() -> None:
    """Behaviour 20."""

    async def main() -> None:
        service, chance = callee(), random.Random(1)
        service.circuit.settings = type(service.circuit.settings)(force_closed=True)
        for _ in range(100):
            calls = [service.start() for _ in range(10)]
            await service.clock.settle()
            assert service.outstanding.busy == 10
            for call, future in zip(calls, service.hanging[-10:], strict=True):
                match chance.randrange(4):
                    case 0:
                        future.set_result(None)
                    case 1:
                        future.set_result(RemoteError("failed"))
                    case 2:
                        call.cancel()
                    case _:
                        pass  # its time will be up
            await service.clock.advance(1.01)
            assert all(call.done() for call in calls)
            assert service.outstanding.busy == 0
        calls = [service.start() for _ in range(11)]
        await service.clock.settle()
        assert sum(call.done() for call in calls) == 1
        await end(service, *calls)

    run(main)


def test_a_queued_caller_gets_the_place_that_becomes_free_first_come_first_served() -> None:
    async def main() -> None:
        service = callee(limit=1, queue=2)
        first, second, third, refused = (service.start() for _ in range(4))
        await service.clock.settle()
        assert isinstance(await refused, LimitReached)
        for call in (first, second, third):
            assert len(service.hanging) == 1
            service.hanging.pop().set_result(None)
            await service.clock.settle()
            assert call.done()
        assert service.outstanding.busy == 0

    run(main)


def test_a_queued_caller_that_is_cancelled_frees_its_place_in_the_queue() -> None:
    """Behaviour 21."""

    async def main() -> None:
        service = callee(limit=1, queue=1)
        holding, queued = service.start(), service.start()
        await service.clock.settle()
        queued.cancel()
        await asyncio.wait([queued])
        another = service.start()
        await service.clock.settle()
        assert not another.done()
        service.hanging[0].set_result(None)
        await service.clock.settle()
        assert service.begun == 2
        await end(service, holding, another)
        assert service.outstanding.busy == 0

    run(main)


def test_a_caller_that_is_cancelled_as_it_gets_its_place_hands_it_on() -> None:
    async def main() -> None:
        for turns in range(4):  # of the loop between the freed place and the cancellation
            service = callee(limit=1, queue=2)
            calls = [service.start() for _ in range(3)]
            await service.clock.settle()
            service.hanging[0].set_result(None)
            for _ in range(turns):
                await asyncio.sleep(0)
            calls[1].cancel()
            await service.clock.settle()
            assert service.outstanding.busy == 1
            await end(service, *calls)
            assert service.outstanding.busy == 0

    run(main)


def test_who_waits_in_the_queue_waits_no_longer_than_its_deadline() -> None:
    async def main() -> None:
        service = callee(limit=1, queue=1, timeout=1.0)
        outstanding = service.outstanding
        outstanding.busy = 1  # work that never ends
        queued = service.start()
        await service.clock.advance(0.99)
        assert not queued.done()
        await service.clock.advance(0.02)
        assert isinstance(queued.result(), LimitReached)
        assert service.clock.timers == []
        assert outstanding.busy == 1

    run(main)


def test_work_that_ignores_cancellation_keeps_its_place_until_it_ends() -> None:
    """Behaviour 22."""

    async def main() -> None:
        service = callee(limit=1)
        freed = asyncio.Event()

        async def stubborn(message: Message) -> Message:
            while not freed.is_set():
                try:
                    await freed.wait()
                except asyncio.CancelledError:
                    continue
            return message

        guard = bulkhead.client(service.guarded, stubborn)
        work = asyncio.ensure_future(guard(Message(channel=Passengers.get.channel)))
        await service.clock.settle()
        work.cancel()
        await service.clock.settle()
        assert service.outstanding.busy == 1
        assert isinstance(await service.call(), LimitReached)
        freed.set()
        await work
        assert service.outstanding.busy == 0

    run(main)


def test_the_limit_changes_while_calls_are_under_way() -> None:
    """Behaviour 23."""

    async def main() -> None:
        service = callee(limit=10)
        calls = [service.start() for _ in range(10)]
        await service.clock.settle()
        service.outstanding.configure(Bulkhead(5))
        assert isinstance(await service.call(), LimitReached)
        for future in service.hanging[:6]:
            future.set_result(None)
        await service.clock.settle()
        assert service.outstanding.busy == 4
        assert await service.call() is None
        service.outstanding.configure(Bulkhead(20))
        more = [service.start() for _ in range(16)]
        await service.clock.settle()
        assert service.outstanding.busy == 20
        await end(service, *calls, *more)
        assert service.outstanding.busy == 0

    run(main)


def test_a_higher_limit_lets_the_queue_in_at_once() -> None:
    async def main() -> None:
        service = callee(limit=1, queue=5)
        calls = [service.start() for _ in range(4)]
        await service.clock.settle()
        assert service.begun == 1
        service.outstanding.configure(Bulkhead(3, 5))
        await service.clock.settle()
        assert service.begun == 3
        service.hanging[0].set_result(None)
        await service.clock.settle()
        await end(service, *calls)
        assert service.outstanding.busy == 0

    run(main)


def test_the_place_of_another_thread_goes_to_who_waits_in_this_one() -> None:
    """Behaviour 18."""
    outstanding = Outstanding(FakeClock())
    outstanding.configure(Bulkhead(1, 1))
    taken, waits = threading.Event(), threading.Event()

    async def holds() -> None:
        await outstanding.enter(None, LimitReached("full"))
        taken.set()
        await asyncio.to_thread(waits.wait, 10)
        outstanding.leave()

    async def queues() -> None:
        asyncio.get_running_loop().call_soon(waits.set)
        await outstanding.enter(None, LimitReached("full"))

    thread = threading.Thread(target=lambda: asyncio.run(holds()))
    thread.start()
    assert taken.wait(10)
    asyncio.run(asyncio.wait_for(queues(), 10), debug=True)  # which refuses what only the loop's own thread may do
    thread.join()
    outstanding.leave()
    assert outstanding.busy == 0


def test_the_operations_of_one_service_share_its_limit_and_one_that_has_its_own_does_not() -> None:
    async def main() -> None:
        clock = FakeClock()
        one = Callee(Policy(bulkhead=Bulkhead(1)), clock)
        other = Callee(Policy(bulkhead=Bulkhead(1)), clock, Passengers.book, one.guarded.shared)
        own = Callee(Policy(bulkhead=Bulkhead(1, per="operation")), clock, Passengers.book, one.guarded.shared)
        holding = one.start()
        await clock.settle()
        assert isinstance(await other.call(), LimitReached)
        assert await own.call() is None
        await end(one, holding)

    run(main)


class Desk(Contract, name="desk"):
    @request
    async def ask(self, question: str) -> str: ...

    @notification
    async def tell(self, news: str) -> None: ...


def test_one_way_sends_are_not_counted_as_outstanding() -> None:
    service = Callee(Policy(), FakeClock(), Desk.tell)
    assert bulkhead.client(service.guarded, service.exchange) == service.exchange


async def full(service: Service) -> None:
    """Waits until as many requests are in work as may be."""
    assert service.running is not None
    found = service.running._state.of(Outstanding, lambda: Outstanding(FakeClock()))
    while found.busy < found.limit:
        await asyncio.sleep(0)


def desk_service(begun: list[str], free: asyncio.Event, limit: int) -> Service:
    service = Service(Desk, concurrency=1, policy=Policy(bulkhead=Bulkhead(limit)))

    @service.handles(Desk.ask)
    async def ask(question: str) -> str:
        begun.append(question)
        await free.wait()
        return "yes"

    @service.handles(Desk.tell)
    async def tell(news: str) -> None: ...

    return service


def test_a_service_with_too_many_requests_in_work_refuses_at_once_and_says_that_nothing_was_begun() -> None:
    async def main() -> None:
        begun, free = list[str](), asyncio.Event()
        service = desk_service(begun, free, 3)
        async with serve(service, at="http://127.0.0.1:0") as (address,), connect(Desk, address) as desk:
            calls = [asyncio.ensure_future(desk.ask.using(timeout=20)(str(number))) for number in range(3)]
            await full(service)
            with pytest.raises(Overloaded, match=r"desk.ask: 3 requests are in work, more are refused") as refused:
                await desk.ask("one too many")
            assert refused.value.safety is Safety.NOT_SENT
            free.set()
            assert await asyncio.gather(*calls) == ["yes"] * 3

    run(main)


def test_a_request_whose_deadline_passes_while_it_waits_its_turn_is_not_begun() -> None:
    """Behaviour 27."""

    async def main() -> None:
        begun, free, clock = list[str](), asyncio.Event(), FakeClock()
        service = desk_service(begun, free, 2)
        async with (
            serve(service, at="http://127.0.0.1:0", clock=clock) as (address,),
            connect(Desk, address, policy=Policy(breaker=False)) as desk,
        ):
            first = asyncio.ensure_future(desk.ask.using(timeout=20)("first"))
            while not begun:
                await asyncio.sleep(0)
            second = asyncio.ensure_future(desk.ask.using(timeout=20)("second"))
            await full(service)
            await clock.advance(30)  # on the service's clock alone: the callers are still there
            free.set()
            assert await first == "yes"
            with pytest.raises(DeadlineExceeded) as late:
                await second
            assert late.value.safety is Safety.NOT_SENT
            assert begun == ["first"]

    run(main)
