"""No choice of set members or map keys makes a body cost more than its size."""

from __future__ import annotations

import contextlib
import datetime
import time
import uuid
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from msgspec import Struct

from quintet.errors import InvalidMessage
from quintet.format import installed

FORMATS = installed()
COUNT = 3000
SAME_HASH = 2**61 - 1  # what Python takes the hashes of numbers by


class Cell(Struct, frozen=True):
    x: int
    y: int


class Board(Struct):
    cells: dict[str, list[set[uuid.UUID]]] = {}
    inner: Board | None = None


class Left(Struct, tag="left"):
    numbers: set[Decimal]


class Right(Struct, tag="right"):
    names: list[str]


class Row(Struct, tag="row", array_like=True):
    name: str
    numbers: set[Decimal]


def alike(kind: Any) -> list[Any]:
    """Different values of one hash."""
    if kind is int:
        return [number * SAME_HASH for number in range(1, COUNT)]
    if kind is uuid.UUID:
        return [uuid.UUID(int=number * SAME_HASH) for number in range(1, COUNT)]
    return [Decimal(number * SAME_HASH) for number in range(1, COUNT)]


@pytest.mark.parametrize("kind", [int, Decimal, uuid.UUID])
@pytest.mark.parametrize("name", ["json", "msgpack"])
def test_members_and_keys_that_were_chosen_to_collide_are_refused(name: str, kind: Any) -> None:
    if (name, kind) == ("msgpack", int):
        return  # 64 bits: nine numbers at most have one hash
    encode = FORMATS[name].codec(list[kind]).encode
    for collection in (set[kind], frozenset[kind]):
        with pytest.raises(InvalidMessage, match="have the same hash"):
            FORMATS[name].codec(collection).decode(encode(alike(kind)))
    body = FORMATS[name].codec(Any).encode({str(key): 1 for key in alike(kind)})
    with pytest.raises(InvalidMessage, match="have the same hash"):
        FORMATS[name].codec(dict[kind, int]).decode(body)


def test_uuids_as_bytes_and_of_both_kinds_are_refused_as_keys() -> None:
    keys = alike(uuid.UUID)
    decode = FORMATS["msgpack"].codec(dict[uuid.UUID, int]).decode
    with pytest.raises(InvalidMessage, match="have the same hash"):
        decode(msgspec.msgpack.encode({key.bytes: 1 for key in keys}))
    with pytest.raises(InvalidMessage, match="of one kind"):
        decode(msgspec.msgpack.encode({key.bytes if n % 2 else str(key): 1 for n, key in enumerate(keys)}))


@pytest.mark.parametrize("name", ["json", "msgpack"])
def test_a_collection_is_looked_at_wherever_it_stands(name: str) -> None:
    uuids = [str(one) for one in alike(uuid.UUID)]
    encode = FORMATS[name].codec(Any).encode
    for type_, body in (
        (Board, {"inner": {"inner": {"cells": {"a": [[], uuids]}}}}),
        (Left | Right, {"type": "left", "numbers": [str(one) for one in alike(Decimal)]}),
        (Row, ["row", "", [str(one) for one in alike(Decimal)]]),
        (tuple[str, set[uuid.UUID]], ["", uuids]),
        (list[set[uuid.UUID]] | None, [uuids]),
    ):
        with pytest.raises(InvalidMessage, match="have the same hash"):
            FORMATS[name].codec(type_).decode(encode(body))


@pytest.mark.parametrize("name", ["json", "msgpack"])
def test_large_collections_of_honest_members_are_read(name: str) -> None:
    day = datetime.timedelta(days=1)
    for type_, value in (
        (set[int], set(range(-5000, 5000))),
        (set[uuid.UUID], {uuid.uuid4() for _ in range(5000)}),
        (dict[Decimal, int], {Decimal(n) / 7: n for n in range(5000)}),
        (dict[float, int], {n / 7: n for n in range(5000)}),
        (set[Cell], {Cell(n % 97, n) for n in range(5000)}),
        (set[tuple[int, int]], {(n % 97, n) for n in range(5000)}),
        (set[datetime.timedelta | int], {n * day if n % 2 else n for n in range(5000)} if name == "json" else set()),
        (frozenset[frozenset[int]], frozenset(frozenset((n, n + 1)) for n in range(5000))),
        (Board, Board({"a": [{uuid.uuid4() for _ in range(500)}]}, Board())),
    ):
        codec = FORMATS[name].codec(type_)
        assert codec.decode(codec.encode(value)) == value


def test_one_member_that_comes_many_times_is_one_member() -> None:
    assert FORMATS["json"].codec(set[int]).decode(msgspec.json.encode([-1, -2] * 5000)) == {-1, -2}


@pytest.mark.parametrize("kind", [int, float, Decimal, uuid.UUID, datetime.timedelta, str])
def test_four_megabytes_of_hostile_keys_cost_no_more_than_a_few_times_honest_ones(kind: Any) -> None:
    size = 4 * 2**20
    honest: list[Any]
    hostile: list[Any]
    if kind is int:
        honest, hostile = [n * 10**12 + n for n in range(200_000)], alike(int) * 60
    elif kind is float:
        honest = [n / 7 for n in range(200_000)]
        hostile = [m * 2.0 ** (61 * k) for m in range(1, 6000) for k in range(-16, 16)]
    elif kind is Decimal:
        honest, hostile = [Decimal(n * 10**12) for n in range(200_000)], alike(Decimal) * 50
    elif kind is uuid.UUID:
        honest = [uuid.UUID(int=n * 2**64 + n) for n in range(100_000)]
        hostile = [uuid.UUID(int=n * SAME_HASH) for n in range(100_000)]
    elif kind is datetime.timedelta:
        honest = [datetime.timedelta(seconds=n) for n in range(100_000)]
        hostile = [datetime.timedelta(days=n * 2**10) for n in range(500_000 // 2)]
    else:
        honest = hostile = [str(n) for n in range(200_000)]
    codec, encode = FORMATS["json"].codec(set[kind]), FORMATS["json"].codec(list[kind]).encode

    def cost(members: list[Any]) -> float:
        body = encode(members)[: size - 1].rpartition(b",")[0] + b"]"
        began = time.process_time()
        with contextlib.suppress(InvalidMessage):
            codec.decode(body)
        return time.process_time() - began

    usual = min(cost(honest) for _ in range(3))
    found = min(cost(hostile) for _ in range(2))
    print(f"{kind.__name__}: honest {usual:.3f} s, hostile {found:.3f} s")
    assert found < 6 * max(usual, 0.02)
