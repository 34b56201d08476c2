"""What a handler hands on arrives over every real broker, and nothing that HTTP owns goes along."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from handed_on import prove
from running import Entry
from subjects import SUBJECTS, address_of, broker_of


@pytest.mark.parametrize("name", SUBJECTS)
async def test_a_handler_hands_its_headers_on_and_nothing_that_http_owns(
    name: str, broker: Callable[[str], Entry]
) -> None:
    await prove(address_of(name, broker(broker_of(name))))
