"""Minor versions of a contract understand each other over every real broker, in every style."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from running import Entry
from subjects import SUBJECTS, address_of, broker_of
from versions import PAIRS, prove

from quintet.message import new_id


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize(("sender", "receiver"), PAIRS)
async def test_minor_versions_understand_each_other(
    name: str, sender: str, receiver: str, broker: Callable[[str], Entry]
) -> None:
    address = address_of(name, broker(broker_of(name)))
    await prove(address, sender, receiver, f"versions-{new_id()}")
