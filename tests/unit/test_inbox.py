"""What a service reached over HTTP keeps on disk: notifications in its inbox, async requests with its answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from quintet import (
    Cancelled,
    Contract,
    Redelivery,
    RemoteError,
    Service,
    UnknownPending,
    async_request,
    connect,
    current,
    notification,
    serve,
)
from quintet.client import Carriers
from quintet.message import Message
from quintet.testing import FakeClock

HTTP = "http://127.0.0.1:0"


class Orders(Contract, name="orders"):
    @notification(http="POST /orders/{order_id}", key="order_id")
    async def place(self, order_id: str, amount: int) -> None: ...

    @async_request(http="POST /receipts")
    async def receipt(self, order_id: str) -> str: ...  # type: ignore[empty-body]


def orders(
    place: Callable[[str, int], Awaitable[None]], receipt: Callable[[str], Awaitable[str]], inbox: str, answers: str
) -> Service:
    service = Service(
        Orders, inbox=inbox, answers=answers, grace=0.05, redelivery=Redelivery(attempts=3, first=0.01, longest=0.02)
    )
    service.handles(Orders.place)(place)
    service.handles(Orders.receipt)(receipt)
    return service


async def no_place(order_id: str, amount: int) -> None: ...
async def no_receipt(order_id: str) -> str:
    return f"receipt of {order_id}"


async def forever(*args: object) -> None:
    await asyncio.Event().wait()


async def test_without_an_inbox_a_notification_is_done_when_it_is_accepted_and_its_failure_is_the_reply(
    tmp_path: Path,
) -> None:
    done: list[str] = []

    async def place(order_id: str, amount: int) -> None:
        if amount < 0:
            raise ValueError("what?")
        done.append(order_id)

    service = orders(place, no_receipt, "", f"sqlite:///{tmp_path}/answers.db")
    async with serve(service, at=HTTP) as at, connect(Orders, at) as client:
        reply = await client.place.reply("o-1", 1)
        assert reply.headers[":status"] == "204"
        assert done == ["o-1"]
        with pytest.raises(RemoteError):
            await client.place("o-2", -1)


async def test_with_an_inbox_a_notification_is_accepted_on_disk_and_retried_like_any_delivery(tmp_path: Path) -> None:
    done, attempts = asyncio.Event(), list[tuple[int, str]]()

    async def place(order_id: str, amount: int) -> None:
        attempts.append((current().attempt, current().key))
        if current().attempt == 1:
            raise ValueError("the first time goes wrong")
        done.set()

    service = orders(place, no_receipt, f"sqlite:///{tmp_path}/inbox.db", f"sqlite:///{tmp_path}/answers.db")
    async with serve(service, at=HTTP) as at, connect(Orders, at) as client:
        reply = await client.place.reply("o-1", 1)
        assert reply.headers[":status"] == "202"
        await asyncio.wait_for(done.wait(), 10)
        assert attempts == [(1, "o-1"), (2, "o-1")]


async def test_what_was_accepted_is_handled_after_the_service_was_gone(tmp_path: Path) -> None:
    inbox, answers = f"sqlite:///{tmp_path}/inbox.db", f"sqlite:///{tmp_path}/answers.db"
    begun = asyncio.Event()

    async def stuck_place(order_id: str, amount: int) -> None:
        begun.set()
        await forever()

    async def stuck_receipt(order_id: str) -> str:
        await forever()
        return ""

    async with serve(orders(stuck_place, stuck_receipt, inbox, answers), at=HTTP) as at, connect(Orders, at) as client:
        pending = await client.receipt("o-1")
        await client.place("o-1", 1)
        await begun.wait()

    handled = asyncio.Event()

    async def place(order_id: str, amount: int) -> None:
        handled.set()

    async with serve(orders(place, no_receipt, inbox, answers), at=HTTP) as at, connect(Orders, at) as client:
        await asyncio.wait_for(handled.wait(), 10)
        assert await client.receipt.pending(pending.id).wait(10) == "receipt of o-1"


async def test_an_answer_is_told_by_whichever_instance_is_asked(tmp_path: Path) -> None:
    answers = f"sqlite:///{tmp_path}/answers.db"
    go = asyncio.Event()

    async def slowly(order_id: str) -> str:
        await go.wait()
        return f"receipt of {order_id}"

    one, other = orders(no_place, slowly, "", answers), orders(no_place, slowly, "", answers)
    async with serve(one, at=HTTP) as at_one, serve(other, at=HTTP) as at_other:
        async with connect(Orders, at_one) as client, connect(Orders, at_other) as elsewhere:
            pending = await client.receipt("o-1")
            waiting = asyncio.ensure_future(elsewhere.receipt.pending(pending.id).wait(10))
            go.set()
            assert await waiting == "receipt of o-1"
            with pytest.raises(UnknownPending, match="no pending answer 'nonsense'"):
                await elsewhere.receipt.pending("nonsense")


async def test_a_pending_answer_that_is_cancelled_over_http_says_so(tmp_path: Path) -> None:
    async def stuck(order_id: str) -> str:
        await forever()
        return ""

    service = orders(no_place, stuck, "", f"sqlite:///{tmp_path}/answers.db")
    async with serve(service, at=HTTP) as at, connect(Orders, at) as client:
        pending = await client.receipt("o-1")
        await pending.cancel()
        with pytest.raises(Cancelled):
            await pending


async def test_what_does_not_fit_the_contract_never_reaches_the_inbox(tmp_path: Path) -> None:
    service = orders(no_place, no_receipt, f"sqlite:///{tmp_path}/inbox.db", f"sqlite:///{tmp_path}/answers.db")
    async with serve(service, at=HTTP) as at:
        carriers = Carriers("test", FakeClock())
        transport = await carriers.reach(at[0])
        reply = await transport.send(
            Message(
                channel=Orders.place.channel,
                media_type="application/json",
                body=b'{"amount": "many"}',
                headers={":method": "POST", ":path": "/v1/orders/o-1"},
            )
        )
        assert reply
        assert reply.headers[":status"] == "422"
        await carriers.close()
