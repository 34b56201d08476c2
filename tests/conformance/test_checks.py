"""The suite is tested itself: each check catches the transport that was broken for it, and says clearly why."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from quintet.testing import CHECKS, Bench, Check, FakeClock, skips
from quintet.transports.memory import Carrier


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


broken = load("broken")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
async def test_a_check_catches_the_transport_that_was_broken_for_it(check: Check) -> None:
    kind = broken.BROKEN[check.name]
    assert not check.missing(kind), f"{kind.__name__} would be excused from the check that should catch it"
    with pytest.raises(AssertionError) as caught:
        await check.run(Bench("memory://", FakeClock(), broken.opener(kind)))
    message = str(caught.value)
    assert len(message) > 20, f"a failure must say what went wrong, not {message!r}"
    assert "not over after" not in message, f"the check only noticed by hanging: {message}"


def test_every_check_has_its_own_sentence_and_a_broken_transport() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert set(broken.BROKEN) == set(names)


def test_a_skip_names_what_is_missing() -> None:
    excused = skips(Carrier)
    assert excused["what was accepted is there after all have closed and opened again"] == "DURABLE"
    assert set(excused.values()) == {"DURABLE", "REPLIES"}


async def test_a_check_that_hangs_is_ended_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(_: Bench) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("quintet.testing.checks.SECONDS", 0.01)
    check = Check("nothing hangs", frozenset(), False, "", hang)
    with pytest.raises(AssertionError, match="nothing hangs: not over after"):
        await check.run(Bench("memory://", FakeClock()))
