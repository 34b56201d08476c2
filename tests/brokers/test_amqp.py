"""RabbitMQ: the conformance suite on the real broker, and what only it can get wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from running import Entry

from quintet.testing import CHECKS, Bench, Check, skips
from quintet.transports.amqp import Carrier

Brokers = Callable[[str], Entry]

EXCUSES = {"REPLIES", "Counting", "?capacity="}
"""What RabbitMQ may lack: replies are the core's, it tells of no message that is in work, and a length is an argument of
the queue, `Queue(max_length=)`, which cannot be changed once that is there."""


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
async def test_rabbitmq(broker: Brokers, check: Check) -> None:
    if missing := check.missing(Carrier):
        pytest.skip(f"RabbitMQ lacks {missing}")
    await check.run(Bench(broker("rabbitmq")["address"]))


def test_rabbitmq_is_excused_only_for_what_was_reviewed() -> None:
    assert {missing for sentence in skips(Carrier).values() for missing in sentence.split(", ")} == EXCUSES
