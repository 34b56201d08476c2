"""A contract's minor versions understand each other: what is added with a default breaks nobody, on any transport."""

from __future__ import annotations

from pathlib import Path

import pytest
from versions import PAIRS, prove


@pytest.mark.parametrize(("sender", "receiver"), PAIRS)
@pytest.mark.parametrize("level", range(4))
async def test_minor_versions_understand_each_other_over_http(sender: str, receiver: str, level: int) -> None:
    await prove("http://127.0.0.1:0", sender, receiver, "versions", level=level, fanout=False)


@pytest.mark.parametrize(("sender", "receiver"), PAIRS)
async def test_minor_versions_understand_each_other_in_memory(sender: str, receiver: str) -> None:
    await prove("memory://", sender, receiver, f"versions-{sender}-{receiver}".replace(".", ""))


@pytest.mark.parametrize(("sender", "receiver"), PAIRS)
async def test_minor_versions_understand_each_other_over_sqlite(sender: str, receiver: str, tmp_path: Path) -> None:
    await prove(f"sqlite:///{tmp_path}/versions.db", sender, receiver, "versions")
