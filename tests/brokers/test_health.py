"""A broker that is away is told: by the page that a load balancer asks, and to the listener."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Callable

import pytest
from running import Broker
from subjects import BROKERS

from quintet import Contract, Service, notification, serve
from quintet.watch import Occurrence

WITHIN = 45.0  # seconds: more than a busy machine takes, less than a test may


def ready(at: str) -> tuple[int, dict[str, object]]:
    try:
        with urllib.request.urlopen(f"{at}/health/ready", timeout=5) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


@pytest.mark.parametrize("name", BROKERS)
async def test_a_service_is_not_ready_while_its_broker_is_away_and_says_so(
    name: str, private_broker: Callable[[str], Broker]
) -> None:
    broker = private_broker(name)

    class Ledger(Contract, name="ledger"):
        @notification
        async def entered(self, number: int) -> None: ...

    ledger, heard = Service(Ledger), list[Occurrence]()

    @ledger.handles(Ledger.entered)
    async def entered(number: int) -> None: ...

    def told() -> list[tuple[str, str]]:
        return [(one.kind, one.subject) for one in heard if one.kind.startswith("broker")]

    async def until(status: int, count: int) -> dict[str, object]:
        """What the page says once it has this status and so much was told."""
        async with asyncio.timeout(WITHIN):
            while (answer := await asyncio.to_thread(ready, at))[0] != status or len(told()) != count:
                await asyncio.sleep(0.05)
        return answer[1]

    async with serve(ledger, at=["http://127.0.0.1:0", broker.address], listener=heard.append) as (at, _):
        assert await until(200, 0) == {"status": "ready"}
        await asyncio.to_thread(broker.kill)
        shown = broker.address.replace(":guest@", ":***@").replace(":quintet@", ":***@")
        assert await until(503, 1) == {"status": "disconnected", "away": [shown]}
        assert told() == [("broker-lost", shown)]
        await asyncio.to_thread(broker.start)
        assert await until(200, 2) == {"status": "ready"}
        assert told() == [("broker-lost", shown), ("broker-back", shown)]
    assert [one.reason for one in heard if one.kind == "broker-lost"] != [""], "it says why"
