"""The door of a service: whatever a handler does, its caller gets an answer and its message a verdict."""
# mypy: disable-error-code="empty-body"

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from quintet import (
    Contract,
    Declined,
    Fault,
    Redelivery,
    RemoteError,
    Service,
    async_request,
    connect,
    notification,
    request,
    serve,
)
from quintet.testing import harness

ATTEMPTS = 3
SOON = Redelivery(attempts=ATTEMPTS, first=0.001, longest=0.001)


class Failed(Fault, status=422):
    reason: str
    code_number: int = 0


class FailedTwice(Failed):
    times: int = 2


class Undeclared(Fault):
    reason: str = "inner"


class Doors(Contract, name="doors"):
    @request(faults=[Failed])
    async def ask(self, text: str) -> str: ...

    @notification
    async def tell(self, text: str) -> None: ...

    @async_request(faults=[Failed])
    async def later(self, text: str) -> str: ...


class SaysNothing(Exception):
    """An exception whose text cannot be read."""

    def __str__(self) -> str:
        raise ValueError("no text")


def doors(handle: Callable[[str], Awaitable[Any]]) -> Service:
    service = Service(Doors, answers="memory://", redelivery=SOON)
    operations: tuple[Any, ...] = (Doors.ask, Doors.tell, Doors.later)
    for operation in operations:

        async def does(text: str) -> Any:
            return await handle(text)

        service.handles(operation)(does)
    return service


async def a_fault_that_cannot_be_written(text: str) -> Any:
    raise Failed(reason=ValueError(text))  # type: ignore[arg-type]


async def a_fault_that_was_spoiled(text: str) -> Any:
    fault = Failed(reason=text)
    fault.reason = ValueError(text)  # type: ignore[assignment]
    raise fault


async def half_a_surrogate_pair(text: str) -> Any:
    raise Failed(reason=f"{text}\ud800")


async def a_text_that_cannot_be_read(text: str) -> Any:
    raise SaysNothing


async def a_cancellation_that_nobody_asked_for(text: str) -> Any:
    task = asyncio.ensure_future(asyncio.sleep(1000))
    task.cancel()
    await task


async def a_group_of_cancellations(text: str) -> Any:
    raise BaseExceptionGroup(text, [asyncio.CancelledError()])


async def an_exit(text: str) -> Any:
    raise SystemExit(text)


async def a_decline(text: str) -> Any:
    raise Declined(text)


async def an_undeclared_fault(text: str) -> Any:
    raise Undeclared


ODD = [
    a_fault_that_cannot_be_written,
    a_fault_that_was_spoiled,
    half_a_surrogate_pair,
    a_text_that_cannot_be_read,
    a_cancellation_that_nobody_asked_for,
    a_group_of_cancellations,
    an_exit,
    a_decline,
    an_undeclared_fault,
]
odd = pytest.mark.parametrize("handle", ODD, ids=lambda handle: handle.__name__)


@odd
@pytest.mark.parametrize("like", ["http", "sqlite"])
async def test_whatever_a_handler_raises_its_caller_gets_a_remote_error_and_the_log_the_rest(
    handle: Callable[[str], Awaitable[Any]], like: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with harness(doors(handle), like=[like]) as bench:
        with pytest.raises(RemoteError, match=r"doors\.ask failed in doors"):
            await bench.connect(Doors).ask.using(timeout=30)("x")
    assert any("doors.ask failed" in entry.message and entry.exc_info for entry in caplog.records)


@odd
async def test_whatever_a_handler_raises_its_notification_is_tried_again_and_then_dead(
    handle: Callable[[str], Awaitable[Any]],
) -> None:
    started = 0

    async def counted(text: str) -> Any:
        nonlocal started
        started += 1
        await handle(text)

    async with harness(doors(counted), like=["sqlite"]) as bench:
        await bench.connect(Doors).tell("x")
        with pytest.raises(AssertionError, match="a delivery died"):
            await bench.handled(Doors.tell)
        (letter,) = await bench.dead()
        assert letter.attempts == started == ATTEMPTS
        assert letter.reason.isprintable()


@odd
@pytest.mark.parametrize("like", ["http", "sqlite"])
async def test_whatever_a_handler_raises_its_async_request_is_answered_at_last(
    handle: Callable[[str], Awaitable[Any]], like: str
) -> None:
    async with harness(doors(handle), like=[like]) as bench:
        pending = await bench.connect(Doors).later("x")
        with pytest.raises(RemoteError, match=r"doors\.later failed in doors"):
            await pending.wait(30)


@pytest.mark.parametrize("operation", ["ask", "later"])
@pytest.mark.parametrize("like", ["http", "sqlite"])
async def test_a_subclass_travels_as_the_fault_that_is_declared(operation: str, like: str) -> None:
    async def handle(text: str) -> Any:
        raise FailedTwice(reason=text, code_number=7)

    async with harness(doors(handle), like=[like]) as bench:
        client = bench.connect(Doors)
        with pytest.raises(Failed) as caught:
            await (client.ask("x") if operation == "ask" else (await client.later("x")).wait(30))
        assert caught.value == Failed(reason="x", code_number=7)


@pytest.mark.parametrize("at", ["http://127.0.0.1:0", "sqlite:///{}/doors.db"])
async def test_the_same_over_real_transports(at: str, tmp_path: Any) -> None:
    for handle in (a_fault_that_was_spoiled, a_cancellation_that_nobody_asked_for):
        async with (
            serve(doors(handle), at=at.format(tmp_path)) as (address,),
            connect(Doors, address) as client,
        ):
            with pytest.raises(RemoteError, match=r"doors\.ask failed in doors"):
                await client.ask.using(timeout=30)("x")


def test_a_fault_checks_its_fields_when_it_is_made() -> None:
    with pytest.raises(TypeError, match=r"Failed: Expected `str`, got `int` - at `\$.reason`"):
        Failed(reason=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Failed: .*ValueError"):
        Failed(reason=ValueError("x"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Failed: .*half a surrogate pair"):
        Failed(reason="\ud800")
    assert Failed(reason="x").reason == "x"


async def test_a_cancellation_by_the_service_itself_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    begun = asyncio.Event()

    async def hang(text: str) -> Any:
        begun.set()
        await asyncio.Event().wait()

    async with harness(doors(hang), like=["sqlite"]) as bench:
        await bench.connect(Doors).tell("x")
        await begun.wait()
    assert not [entry for entry in caplog.records if entry.levelno >= logging.ERROR]
