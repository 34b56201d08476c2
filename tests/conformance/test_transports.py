"""Every transport there is passes every check that its traits call for (law 7: a new file is found by itself)."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from quintet.testing import CHECKS, Bench, Check, FakeClock, skips
from quintet.transport import Transport, carrier, parse_address, schemes


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


BENCHES: dict[str, Callable[[Path], Bench]] = {
    "memory": lambda _: Bench("memory://", FakeClock()),
    "sqlite": lambda folder: Bench(f"sqlite:///{folder}/check.db"),
    "http": lambda _: Bench(f"http://127.0.0.1:{free_port()}"),
}
"""How a transport is reached here; one that needs a broker of its own is checked in tests/brokers."""

SUBJECTS = sorted(BENCHES.keys() & set(schemes())) + [
    f"memory://?like={scheme}" for scheme in sorted((BENCHES.keys() & set(schemes())) - {"memory"})
]


EXCUSES: dict[str, set[str]] = {
    "memory": {"REPLIES", "DURABLE"},
    "sqlite": {"REPLIES"},
    "http": {"FANOUT", "DURABLE", "REDELIVERS", "DELAYS", "ORDERED", "Tailing", "Counting", "Letters", "?capacity="},
}
"""What each transport may lack: the reviewed list. Whoever adds to it excuses a transport from part of the rules."""


def bench_for(subject: str, folder: Path) -> Bench:
    return Bench(subject, FakeClock()) if "://" in subject else BENCHES[subject](folder)


def transport_of(subject: str) -> type[Transport] | Transport:
    if "://" not in subject:
        return carrier(parse_address(f"{subject}://"))
    address = parse_address(subject)
    return carrier(address)(address)


def test_every_transport_is_checked_here_or_with_its_broker() -> None:
    elsewhere = {
        path.stem.removeprefix("test_") for path in (Path(__file__).parent.parent / "brokers").glob("test_*.py")
    }
    assert set(schemes()) <= BENCHES.keys() | elsewhere, "a transport is checked nowhere: give it a bench"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
@pytest.mark.parametrize("subject", SUBJECTS)
async def test_transport(subject: str, check: Check, tmp_path: Path) -> None:
    missing = check.missing(transport_of(subject))
    if missing:
        pytest.skip(f"{subject} lacks {missing}")
    await check.run(bench_for(subject, tmp_path))


@pytest.mark.parametrize("scheme", sorted(EXCUSES.keys() & set(schemes())))
def test_a_transport_is_excused_only_for_what_was_reviewed(scheme: str) -> None:
    excuses = {missing for sentence in skips(transport_of(scheme)).values() for missing in sentence.split(", ")}
    assert excuses == EXCUSES[scheme]
