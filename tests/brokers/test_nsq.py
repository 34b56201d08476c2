"""NSQ: the conformance suite on real nsqds, alone and behind a lookup daemon, and what only it can get wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from urllib.request import urlopen

import pytest
from running import Entry

from quintet.testing import CHECKS, Bench, Check, skips
from quintet.transports.nsq import Carrier

Brokers = Callable[[str], Entry]

EXCUSES = {"REPLIES", "ORDERED", "?capacity="}
"""What NSQ may lack: replies are the core's, it knows no order, and a queue of its is as long as the disk allows."""

ADDRESSES = {
    "nsqd": "{address}?http={http}",
    "nsqlookupd": "{lookup}",
    "TLS and DEFLATE": "{address}?http={http}&tls=on&ca={ca}&deflate=on",
}


@pytest.mark.parametrize("address", ADDRESSES.values(), ids=ADDRESSES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
async def test_nsq(broker: Brokers, check: Check, address: str) -> None:
    if missing := check.missing(Carrier):
        pytest.skip(f"NSQ lacks {missing}")
    nsq = broker("nsq")
    bench = Bench(address.format(**nsq))
    run = bench.name().rpartition(".")[2]
    try:
        await check.run(bench)
    finally:
        sweep(nsq["http"], lambda topic: run in topic)


def sweep(http: str, wanted: Callable[[str], bool]) -> None:
    """Removes topics: nsqd keeps each until it is told."""
    with urlopen(f"{http}/stats?format=json&include_clients=false&include_mem=false") as answer:
        topics = [topic["topic_name"] for topic in json.load(answer)["topics"]]
    for topic in filter(wanted, topics):
        with urlopen(f"{http}/topic/delete?topic={topic}", data=b""):
            pass


def test_nsq_is_excused_only_for_what_was_reviewed() -> None:
    assert {missing for sentence in skips(Carrier).values() for missing in sentence.split(", ")} == EXCUSES
