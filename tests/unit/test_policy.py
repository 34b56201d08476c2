"""Policies: defaults, what overrides what, sentences for what is wrong, and guards on plain functions."""

from __future__ import annotations

import asyncio
import math

import msgspec
import pytest
from callee import Callee, Passengers, run

from quintet import (
    Breaker,
    Bulkhead,
    CircuitOpen,
    ConfigurationError,
    Contract,
    DeadlineExceeded,
    Hedge,
    Injection,
    LimitReached,
    Overloaded,
    Policy,
    Rate,
    RemoteError,
    Retry,
    Service,
    Unavailable,
    connect,
    on,
    request,
    serve,
    set_policy,
    stale,
)
from quintet.filter import Guarded, client_chain
from quintet.filters import balancer
from quintet.filters.balancer import Balancer
from quintet.message import Message
from quintet.policy import DEFAULT, resolve
from quintet.testing import FakeClock


class Others(Contract, name="others"):
    @request
    async def get(self) -> str: ...


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda: Policy(timeout=-1), r"Policy\(timeout=-1: seconds must be more than 0\)"),
        (lambda: Policy(timeout=math.nan), "timeout=nan: seconds must be more than 0"),
        (lambda: Policy(timeout=math.inf), "timeout=inf: seconds must be more than 0"),
        (lambda: Policy(breaker=True), r"Policy\(breaker=True\): give a Breaker\(...\), or False for none"),
        (lambda: Policy(retry=Bulkhead()), r"give a Retry\(...\)"),  # type: ignore[arg-type]
        (lambda: Bulkhead(0), "limit=0: at least 1 request must be allowed"),
        (lambda: Bulkhead(1, -1), "queue=-1: 0"),
        (lambda: Breaker(error_rate=1.5), "error_rate=1.5: a share must be more than 0 and at most 1"),
        (lambda: Breaker(error_rate=math.nan), "error_rate=nan: a share"),
        (lambda: Breaker(slow_rate=0), "slow_rate=0: a share"),
        (lambda: Breaker(min_calls=0), "min_calls=0: must be 1 or more"),
        (lambda: Breaker(probes=0), "probes=0: must be 1 or more"),
        (lambda: Breaker(window=0), "window=0: seconds must be more than 0"),
        (lambda: Breaker(open_for=-5), "open_for=-5: seconds must be more than 0"),
        (lambda: Breaker(open_for=10, longest=5), "longest=5: must be at least open_for"),
        (lambda: Breaker(slow_call=0), "slow_call=0: seconds must be more than 0"),
        (lambda: Retry(0), "times=0: must be 1 or more"),
        (lambda: Retry(2, budget=1.5), "budget=1.5: must be a share from 0 to 1"),
        (lambda: Retry(2, first=3, longest=1), "first=3: must be from 0 to longest"),
        (lambda: Retry(2, attempt_timeout=0), "attempt_timeout=0: seconds must be more than 0"),
        (lambda: Hedge(0), "after=0: seconds must be more than 0"),
        (lambda: Hedge(0.1, times=0), "times=0: must be 1 or more"),
        (lambda: Rate(0), "calls=0: must be 1 or more"),
        (lambda: Rate(10, seconds=0), "seconds=0: seconds must be more than 0"),
        (lambda: Injection(rate=2), "rate=2: a share"),
        (lambda: Injection(latency=-1), "latency=-1: seconds must be 0 or more"),
        (lambda: Injection(error="boom"), "error='boom': known are .*unavailable"),
    ],
)
def test_bad_settings_are_refused_with_one_sentence(wrong: object, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        wrong()  # type: ignore[operator]


def test_an_unknown_setting_is_refused_where_a_policy_is_read_from_a_file() -> None:
    policy = msgspec.convert({"timeout": 0.3, "bulkhead": {"limit": 20}, "breaker": False}, Policy)
    assert policy == Policy(timeout=0.3, bulkhead=Bulkhead(20), breaker=False)
    with pytest.raises(msgspec.ValidationError, match="unknown field `timeuot`"):
        msgspec.convert({"timeuot": 0.3}, Policy)
    with pytest.raises(msgspec.ValidationError, match="unknown field `erorr_rate`"):
        msgspec.convert({"breaker": {"erorr_rate": 0.3}}, Policy)


def test_with_no_policy_given_the_defaults_hold() -> None:
    assert resolve(Passengers, ())["get"].policy == Policy(
        timeout=1.0,
        bulkhead=Bulkhead(1000, 0, "service"),
        breaker=Breaker(error_rate=0.5, min_calls=20, window=10.0, open_for=5.0, probes=1),
    )


def test_what_is_set_for_an_operation_goes_before_what_is_set_for_its_contract() -> None:
    found = resolve(
        Passengers,
        [
            on(Passengers.get, timeout=2.0, breaker=False),
            Policy(timeout=0.3, bulkhead=Bulkhead(20)),
            Policy(retry=Retry(1)),
        ],
    )
    assert found["book"].policy == Policy(timeout=0.3, bulkhead=Bulkhead(20), retry=Retry(1)).over(DEFAULT)
    assert found["get"].policy == Policy(timeout=2.0, bulkhead=Bulkhead(20), retry=Retry(1), breaker=False)


def test_a_limit_that_is_set_for_an_operation_is_its_own() -> None:
    policy = resolve(Passengers, on(Passengers.get, bulkhead=Bulkhead(5), rate=Rate(9)))["get"].policy
    assert (policy.bulkhead, policy.rate) == (Bulkhead(5, per="operation"), Rate(9, per="operation"))


def test_a_policy_for_an_operation_of_another_contract_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"on\(Others.get, ...\) does not belong to Passengers"):
        resolve(Passengers, on(Others.get, timeout=1))


def test_the_filters_stand_in_the_documented_order() -> None:
    from quintet.filter import _innermost_first

    order = ["cache", "deadline", "retry", "hedge", "rate", "breaker", "bulkhead", "balancer", "timeout", "injection"]
    found = [module.__name__.rpartition(".")[2] for module in reversed(_innermost_first())]
    assert [name for name in found if name in order] == order


def test_a_policy_changes_while_calls_are_under_way_and_keeps_its_state() -> None:
    async def main() -> None:
        service = Callee(Policy(bulkhead=Bulkhead(5)), FakeClock())
        await service.fail(19)
        holding = service.start()
        await service.clock.settle()
        changed = msgspec.structs.replace(service.guarded, policy=Policy(bulkhead=Bulkhead(1)).over(DEFAULT))
        send = client_chain(changed, [service.exchange])
        assert isinstance(await service.call(send=send), LimitReached)
        service.hanging[0].set_result(Unavailable("nobody there"))
        await holding
        assert isinstance(await service.call(send=send), CircuitOpen)  # the twentieth failure

    run(main)


def test_the_policy_of_a_connected_client_changes_and_nothing_is_forgotten() -> None:
    async def main() -> None:
        clock, service, failing = FakeClock(), Service(Others), False

        @service.handles(Others.get)
        async def get() -> str:
            if failing:
                raise RuntimeError("the database is gone")
            return "here"

        fallback = [on(Others.get, fallback=[stale(max_age=60)])]
        async with (
            serve(service, at="memory://", clock=clock),
            connect(Others, "memory://", clock=clock, policy=fallback) as others,
        ):
            assert await others.get() == "here"
            failing = True
            for _ in range(19):
                assert await others.get() == "here"
            with pytest.raises(ConfigurationError, match="does not belong to Others"):
                set_policy(others, [Policy(timeout=5), on(Passengers.get, timeout=1)])
            assert await others.get() == "here"  # the old one is in force
            set_policy(others, Policy(timeout=5))
            with pytest.raises(CircuitOpen):
                await others.get()
            set_policy(others, fallback)
            reply = await others.get.reply()
            assert (reply.value, reply.stale) == ("here", True)
            set_policy(others, Policy(breaker=Breaker(force_closed=True)))
            with pytest.raises(RemoteError):
                await others.get()

    run(main)


# guards


def test_a_policy_guards_any_async_function() -> None:
    async def main() -> None:
        clock, ran = FakeClock(), list[str]()

        @Policy(timeout=0.3, breaker=Breaker(min_calls=2)).guards(clock=clock, name="mail.send")
        async def send(to: str, *, subject: str = "") -> str:
            """Sends a mail."""
            ran.append(to)
            if to == "nobody":
                await asyncio.Event().wait()
            return f"{subject} to {to}"

        assert send.__doc__ == "Sends a mail."
        assert await send("ada", subject="hello") == "hello to ada"
        call = asyncio.ensure_future(send("nobody"))
        await clock.advance(0.31)
        with pytest.raises(DeadlineExceeded, match=r"mail.send did not answer within 0.3 s"):
            await call
        with pytest.raises(CircuitOpen, match=r"mail.send: not sent, its circuit is open"):
            await send("ada")
        assert ran == ["ada", "nobody"]

    run(main)


def test_a_guarded_function_raises_what_it_raises_and_is_limited() -> None:
    async def main() -> None:
        free = asyncio.Event()

        @Policy(bulkhead=Bulkhead(1)).guards
        async def divide(by: int) -> float:
            await free.wait()
            return 1 / by

        call = asyncio.ensure_future(divide(0))
        await asyncio.sleep(0)
        with pytest.raises(LimitReached):
            await divide(1)
        free.set()
        with pytest.raises(ZeroDivisionError):
            await call
        assert await divide(2) == 0.5

    run(main)


@pytest.mark.parametrize(("idempotent", "runs"), [(True, 3), (False, 1)])
def test_a_guarded_function_is_repeated_where_it_is_idempotent(idempotent: bool, runs: int) -> None:
    async def main() -> None:
        ran = 0

        @Policy(retry=Retry(2, first=0.0)).guards(idempotent=idempotent)
        async def flaky() -> None:
            nonlocal ran
            ran += 1
            raise OSError("gone")

        with pytest.raises(OSError, match="gone"):
            await flaky()
        assert ran == runs

    run(main)


def test_a_plain_function_cannot_be_guarded() -> None:
    def plain() -> None: ...

    with pytest.raises(ConfigurationError, match="must be `async def` to be guarded"):
        Policy().guards(plain)  # type: ignore[arg-type]


# rate


def test_calls_above_the_rate_are_refused_at_once_and_told_when_to_come_back() -> None:
    async def main() -> None:
        service = Callee(Policy(rate=Rate(10, seconds=2.0)), FakeClock())
        for _ in range(10):
            assert await service.call() is None
        error = await service.call()
        assert isinstance(error, LimitReached)
        assert str(error) == "passengers.get: not sent, 10 calls in 2 s are allowed"
        assert error.retry_after == pytest.approx(2.0)
        await service.clock.advance(1000)
        for _ in range(10):  # no more than that was saved up
            assert await service.call() is None
        assert isinstance(await service.call(), LimitReached)
        assert service.total("refused") == 0  # held back above the breaker

    run(main)


def test_a_lower_rate_does_not_give_back_what_was_used_up() -> None:
    async def main() -> None:
        service = Callee(Policy(rate=Rate(10)), FakeClock())
        for _ in range(8):
            await service.call()
        changed = msgspec.structs.replace(service.guarded, policy=Policy(rate=Rate(5)).over(DEFAULT))
        send = client_chain(changed, [service.exchange])
        assert isinstance(await service.call(send=send), LimitReached)

    run(main)


# injection


def test_faults_are_injected_only_where_the_environment_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        policy = Policy(injection=Injection(error="unavailable"))
        monkeypatch.delenv("QUINTET_INJECT", raising=False)
        assert await Callee(policy, FakeClock()).call() is None
        monkeypatch.setenv("QUINTET_INJECT", "on")
        service = Callee(policy, FakeClock())
        error = await service.call()
        assert isinstance(error, Unavailable)
        assert str(error) == "passengers.get: injected, QUINTET_INJECT=on"
        assert service.total("failure") == 1  # to the breaker it is the service's failure

    run(main)


def test_injected_latency_is_cut_by_the_timeout_and_comes_at_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUINTET_INJECT", "on")

    async def main() -> None:
        service = Callee(Policy(injection=Injection(latency=5.0, rate=0.3), timeout=1.0, breaker=False), FakeClock())
        calls = [asyncio.ensure_future(service.call()) for _ in range(1000)]
        await service.clock.advance(1.01)
        late = sum(isinstance(call.result(), DeadlineExceeded) for call in calls)
        assert 250 < late < 350
        assert service.begun == 1000 - late

    run(main)


# balancer


class Fleet:
    """Several instances of one service; those in `broken` fail, those in `stuck` hang."""

    def __init__(self, count: int, policy: Policy | None = None) -> None:
        self.clock = FakeClock()
        self.asked = [0] * count
        self.broken: set[int] = set()
        self.stuck: set[int] = set()
        self.guarded = Guarded(Passengers.get, (policy or Policy()).over(DEFAULT), self.clock)
        self.send = client_chain(self.guarded, [self.instance(index) for index in range(count)])

    def instance(self, index: int) -> object:
        async def exchange(message: Message) -> Message:
            self.asked[index] += 1
            if index in self.stuck:
                await asyncio.Event().wait()
            if index in self.broken:
                raise Unavailable("nobody there")
            return message

        return exchange

    async def call(self) -> BaseException | None:
        try:
            await self.send(Message(channel=Passengers.get.channel))
        except Exception as error:
            return error
        return None

    @property
    def balancer(self) -> Balancer:
        return self.guarded.own.of(Balancer, lambda: Balancer(self.clock, 0))


def test_all_instances_get_their_share() -> None:
    async def main() -> None:
        fleet = Fleet(3)
        for _ in range(300):
            await fleet.call()
        assert all(70 < asked < 130 for asked in fleet.asked)

    run(main)


def test_of_two_instances_the_less_busy_one_is_asked() -> None:
    async def main() -> None:
        fleet = Fleet(2, Policy(breaker=False))
        fleet.stuck = {0}
        calls = [asyncio.ensure_future(fleet.call()) for _ in range(20)]
        await fleet.clock.settle()
        assert fleet.asked[0] <= 1  # it holds one already
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert [instance.outstanding for instance in fleet.balancer.instances] == [0, 0]

    run(main)


def test_one_bad_replica_is_passed_over_and_does_not_open_the_circuit() -> None:
    """Behaviour 32."""

    async def main() -> None:
        fleet = Fleet(3)
        fleet.broken = {1}
        failures = sum([await fleet.call() is not None for _ in range(200)])
        assert failures == 5
        assert fleet.asked[1] == 5
        await fleet.clock.advance(5.001)
        failures = sum([await fleet.call() is not None for _ in range(200)])
        assert failures == 1  # it came back, failed, and is ejected for longer
        await fleet.clock.advance(9.9)
        assert sum([await fleet.call() is not None for _ in range(200)]) == 0
        fleet.broken = set()
        await fleet.clock.advance(0.2)
        before = fleet.asked[1]
        for _ in range(200):
            assert await fleet.call() is None
        assert fleet.asked[1] > before + 30

    run(main)


def test_an_instance_that_answers_now_and_then_is_not_ejected() -> None:
    async def main() -> None:
        fleet = Fleet(2, Policy(breaker=False))
        for _ in range(10):
            fleet.broken = {0, 1}
            while max(instance.failures for instance in fleet.balancer.instances) < 4:
                await fleet.call()
            fleet.broken = set()
            while any(instance.failures for instance in fleet.balancer.instances):
                await fleet.call()
        assert not any(instance.ejections for instance in fleet.balancer.instances)

    run(main)


def test_an_instance_that_hangs_is_ejected_too() -> None:
    async def main() -> None:
        fleet = Fleet(2)
        fleet.stuck = {0}
        for _ in range(12):
            call = asyncio.ensure_future(fleet.call())
            await fleet.clock.advance(1.01)
            await call
        assert fleet.asked[0] <= 7

    run(main)


@pytest.mark.parametrize(("count", "ejected"), [(2, 1), (3, 1), (4, 2), (5, 2)])
def test_never_more_than_half_of_the_instances_are_ejected(count: int, ejected: int) -> None:
    """Behaviour 32."""

    async def main() -> None:
        fleet = Fleet(count, Policy(breaker=False))
        fleet.broken = set(range(count))
        for _ in range(200):
            assert await fleet.call() is not None
        now = fleet.clock.now()
        assert sum(instance.back_at > now for instance in fleet.balancer.instances) == ejected

    run(main)


def test_a_single_instance_needs_no_balancer() -> None:
    fleet = Fleet(1)
    assert not any(isinstance(state, Balancer) for state in fleet.guarded.own._kept.values())
    assert balancer.PLACE > 50


def test_a_client_with_two_addresses_of_one_service_uses_both() -> None:
    async def main() -> None:
        asked: list[str] = []

        def instance(name: str) -> Service:
            service = Service(Others)

            @service.handles(Others.get)
            async def get() -> str:
                asked.append(name)
                return name

            return service

        async with (
            serve(instance("one"), at="http://127.0.0.1:0") as (one,),
            serve(instance("two"), at="http://127.0.0.1:0") as (two,),
            connect(Others, [one, two]) as others,
        ):
            assert {await others.get() for _ in range(40)} == {"one", "two"}

    run(main)


def test_a_service_refuses_what_is_above_its_rate() -> None:
    async def main() -> None:
        service = Service(Others, policy=Policy(rate=Rate(2, seconds=60)))

        @service.handles(Others.get)
        async def get() -> str:
            return "here"

        async with serve(service, at="memory://"), connect(Others, "memory://") as others:
            assert [await others.get(), await others.get()] == ["here", "here"]
            with pytest.raises(Overloaded, match=r"others.get: refused, 2 calls in 60 s are taken in") as refused:
                await others.get()
            assert refused.value.retry_after is not None
            assert 0 < refused.value.retry_after <= 60

    run(main)


def test_no_second_holds_more_calls_than_the_rate_whenever_it_begins_and_a_reload_changes_nothing() -> None:
    async def main() -> None:
        service = Callee(Policy(rate=Rate(100)), FakeClock())
        through: list[float] = []
        send = service.send
        for tick in range(300):
            for _ in range(5):
                if await service.call(send=send) is None:
                    through.append(service.clock.now())
            await service.clock.advance(0.01)
            if tick == 120:
                send = client_chain(service.guarded, [service.exchange])
        assert max(sum(begin <= at < begin + 1 - 1e-9 for at in through) for begin in through) == 100
        assert len(through) == 300

    run(main)
