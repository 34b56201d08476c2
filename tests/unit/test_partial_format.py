# mypy: disable-error-code="empty-body"
"""A format that carries a request but not its reply is refused before the work, in every binding."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import Struct

from quintet import Contract, Fault, Service, async_request, request, serve, survey
from quintet.binding import bind
from quintet.client import Carriers
from quintet.clock import SYSTEM
from quintet.errors import ContractError, NotAcceptable, UnsupportedMediaType
from quintet.format import Codec, _media_types, installed
from quintet.formats.json import FORMAT as JSON
from quintet.message import Message, new_id

ODD = "application/odd"


class Fare(Struct):
    amount: float


class NoSuchTrip(Fault):
    fare: Fare | None = None


class OddFormat:
    """JSON that cannot carry a Fare."""

    media_type = ODD

    def codec(self, type_: Any) -> Codec[Any]:
        if type_ is Fare or type_ is NoSuchTrip.record:
            raise ContractError(f"{type_.__name__} cannot be carried as odd")
        return JSON.codec(type_)


class Trips(Contract, name="partial"):
    @request
    async def price(self, text: str) -> Fare: ...
    @request(faults=[NoSuchTrip])
    async def check(self, text: str) -> str: ...
    @request
    async def echo(self, text: str) -> str: ...
    @async_request
    async def receipt(self, text: str) -> Fare: ...


class Asked(Contract, name="partial-asked"):
    @survey
    async def offers(self, text: str) -> Fare: ...


@pytest.fixture(autouse=True)
def odd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(installed(), "odd", OddFormat())
    monkeypatch.setitem(_media_types(), ODD, "odd")


@pytest.mark.parametrize("operation", [Trips.price, Trips.check, Trips.receipt, Asked.offers], ids=repr)
def test_a_request_whose_reply_its_format_cannot_carry_is_refused(operation: Any) -> None:
    bound = bind("body", operation)
    with pytest.raises(UnsupportedMediaType, match=f"{operation.full_name}: its types cannot be carried as odd"):
        bound.arguments(Message(channel=bound.channel, body=b'{"text":"x"}', media_type=ODD))
    whole = bind("body", Trips.echo)
    assert whole.arguments(Message(channel=whole.channel, body=b'{"text":"x"}', media_type=ODD)) == Trips.echo.record(
        "x"
    )
    with pytest.raises(ContractError, match="cannot be carried as odd"):
        bind("body", operation, "odd")


def test_over_rest_the_reply_is_negotiated_before_the_work() -> None:
    bound = bind("rest", Trips.price)
    asked = Message(channel=bound.channel, body=b'{"text":"x"}', media_type=ODD, headers={"accept": ODD})
    with pytest.raises(NotAcceptable):
        bound.arguments(asked)
    asked.headers = {}
    assert bound.arguments(asked) == Trips.price.record("x")
    assert bound.reply(asked, Fare(1.5)).media_type == "application/json"
    with pytest.raises(ContractError, match="cannot be carried as odd"):
        bind("rest", Trips.price, "odd")


@pytest.mark.parametrize("address", ["memory://partial", "sqlite:///{folder}/partial.db"])
async def test_the_handler_does_not_run(address: str, tmp_path: Any) -> None:
    ran: list[str] = []
    service = Service(Trips, answers="memory://")

    for operation in (Trips.price, Trips.check, Trips.echo, Trips.receipt):

        @service.handles(operation)
        async def handle(text: str) -> Any:
            ran.append(text)
            return text

    at = address.format(folder=tmp_path)
    carriers = Carriers("test", SYSTEM)
    async with serve(service, at=at):
        exchange = await carriers.exchange(await carriers.reach(at))

        async def ask(operation: Any) -> Message | None:
            sent = Message(channel=operation.channel, id=new_id(), body=b'{"text":"x"}', media_type=ODD)
            sent.operation, sent.deadline = operation.full_name, SYSTEM.now() + 50
            return await exchange(sent)

        refused = await ask(Trips.price)
        assert refused is not None
        assert (refused.status, ran) == ("unsupported-media-type", [])
        good = await ask(Trips.echo)
        assert good is not None
        assert (good.status, good.media_type, good.body, ran) == ("", ODD, b'"x"', ["x"])
        await carriers.close()
