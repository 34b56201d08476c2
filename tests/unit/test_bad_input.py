"""Bad input, as it reaches a running service: one clear error that names what and where, and the service goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import pytest
from msgspec import Struct
from trips_contract import Place, Trip, Trips

from quintet import Contract, ContractError, Number, Service, TransportError, connect, event, request, serve

TRIP = {"id": "t-1", "pickup": {"lat": 1.5}}


def trips() -> Service:
    service = Service(Trips, answers="memory://", max_body=200_000)

    @service.handles(Trips.create)
    async def create(trip: Trip) -> Trip:
        return trip

    @service.handles(Trips.get)
    async def get(trip_id: str) -> Trip:
        return Trip(trip_id, Place(1))

    @service.handles(Trips.cancel)
    async def cancel(trip_id: str, *, reason: str = "") -> None: ...

    @service.handles(Trips.pickup_requested)
    async def pickup_requested(trip_id: str, place: Place) -> None: ...

    @service.handles(Trips.receipt)
    async def receipt(trip_id: str) -> str:
        return ""

    return service


@asynccontextmanager
async def served() -> AsyncIterator[tuple[str, int]]:
    async with serve(trips(), at=["http://127.0.0.1:0?request_timeout=1", "memory://events"]) as addresses:
        port = int(addresses[0].partition("?")[0].rpartition(":")[2])
        yield addresses[0], port
        async with connect(Trips, addresses) as client:  # whatever was sent, it goes on
            assert (await client.create(Trip("after", Place(1)))).id == "after"


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def within_time() -> None:
        await asyncio.wait_for(main(), 30)

    asyncio.run(within_time())


async def exchange(port: int, request: bytes) -> tuple[int, dict[str, Any]]:
    """Sends bytes as they are; the status and the problem that comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = next((int(line[15:]) for line in head.lower().split("\r\n") if line.startswith("content-length:")), 0)
    body = await reader.readexactly(length)
    writer.close()
    await writer.wait_closed()
    return int(head.split()[1]), json.loads(body) if body.startswith(b"{") else {"detail": body.decode()}


def post(body: bytes, path: str = "/v1/trips", media_type: str = "application/json") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {media_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


BAD = {
    "malformed JSON": (post(b'{"id": '), 422, "truncated"),
    "nothing at all": (post(b""), 422, ""),
    "a wrong type": (post(b'{"id": 7, "pickup": {"lat": 1}}'), 422, "id: Expected `str`, got `int`"),
    "a wrong type deep inside": (post(b'{"id": "t", "pickup": {"lat": "x"}}'), 422, "pickup.lat: Expected `float`"),
    "a missing required field": (post(b'{"id": "t", "pickup": {}}'), 422, "pickup.lat: missing required field"),
    "too deep": (post(b'{"x":' + b"[" * 90_000), 422, "nested too deep"),
    "too large": (post(b'{"id": "' + b"x" * 300_000 + b'"}'), 413, "200000"),
    "invalid UTF-8": (post(b'{"id": "\xff\xfe", "pickup": {"lat": 1}}'), 422, "UTF-8"),
    "an unknown path": (post(b"{}", "/v1/journeys"), 404, "/v1/journeys"),
    "an unknown version": (post(b"{}", "/v9/trips"), 404, "/v9/trips"),
    "a wrong media type": (post(b"<trip/>", media_type="application/xml"), 415, "application/xml"),
    "a verb that is not there": (b"PATCH /v1/trips HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 405, "PATCH"),
    "a format that is not there": (
        b"GET /v1/trips/t HTTP/1.1\r\nHost: x\r\nAccept: image/png\r\n\r\n",
        406,
        "image/png",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_request_gets_one_error_that_names_what_and_where(bad: str) -> None:
    sent, status, words = BAD[bad]

    async def main() -> None:
        async with served() as (_, port):
            answered, problem = await exchange(port, sent)
            assert answered == status, problem
            assert words in problem["detail"]
            assert "Traceback" not in json.dumps(problem)

    run(main)


def test_an_unknown_field_is_ignored_and_a_missing_one_gets_its_default() -> None:
    async def main() -> None:
        async with served() as (_, port):
            answered, trip = await exchange(port, post(json.dumps({**TRIP, "colour": "red"}).encode()))
            assert answered == 201
            assert trip["pickup"] == {"lat": 1.5, "lon": 0.0}
            assert trip["state"] == "new"

    run(main)


@pytest.mark.parametrize(
    "bytes_",
    [b"\x00" * 50, b"GET\r\n\r\n", b"POST /v1/trips HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"],
)
def test_what_is_no_http_is_refused(bytes_: bytes) -> None:
    async def main() -> None:
        async with served() as (_, port):
            assert (await exchange(port, bytes_))[0] in (400, 505)

    run(main)


def test_a_truncated_request_is_never_handled() -> None:
    async def main() -> None:
        async with served() as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post(b'{"id": "t-1"')[:-5])
            writer.write_eof()
            assert b"201" not in await reader.read()
            writer.close()

    run(main)


def test_a_port_in_use_is_named() -> None:
    async def main() -> None:
        async with served() as (address, port):
            with pytest.raises(TransportError, match=f"{port}.*in use"):
                async with serve(trips(), at=[address, "memory://other"]):
                    pass

    run(main)


def corrupt(path: Path) -> None:
    path.write_bytes(b"this is no database, whatever its name says. " * 100)


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("spoil", [corrupt, folder])
def test_a_file_that_is_no_database_is_named_at_start_up(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "rides.db"
        spoil(path)
        with pytest.raises(TransportError, match=r"rides\.db"):
            async with serve(trips(), at=f"sqlite:///{path}"):
                pass

    run(main)


def test_a_contract_with_duplicate_numbers_is_refused_when_its_service_is_made() -> None:
    class Twice(Struct):
        a: Annotated[int, Number(1)]
        b: Annotated[int, Number(1)]

    class Numbers(Contract):
        @request
        async def get(self) -> Twice: ...  # type: ignore[empty-body]

        @event
        async def done(self) -> None: ...

    Numbers.get.function.__annotations__["return"] = Twice  # a class of this function is not found by its name
    with pytest.raises(ContractError, match=r"Twice.*\b1\b"):
        Service(Numbers)
