"""STOMP on the real brokers: ActiveMQ Classic, and RabbitMQ's plugin."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from running import Entry

from quintet.testing import CHECKS, Bench, Check, skips
from quintet.transports.stomp import Carrier

Brokers = Callable[[str], Entry]

ADDRESSES: dict[str, Callable[[Brokers], str]] = {
    "activemq": lambda broker: str(broker("activemq")["address"]),
    "rabbitmq": lambda broker: str(broker("rabbitmq")["stomp"]),
}
EXCUSES = {"REPLIES", "Tailing", "Counting", "?capacity="}
"""What it may lack, on either broker: the reviewed list."""


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
@pytest.mark.parametrize("dialect", ADDRESSES)
async def test_conformance(dialect: str, check: Check, broker: Brokers) -> None:
    missing = check.missing(Carrier)
    if missing:
        pytest.skip(f"stomp lacks {missing}")
    await check.run(Bench(ADDRESSES[dialect](broker)))


def test_it_is_excused_only_for_what_was_reviewed() -> None:
    excuses = {missing for sentence in skips(Carrier).values() for missing in sentence.split(", ")}
    assert excuses == EXCUSES
