"""What the broker refuses, or is away for: how that is told, and how long until it is tried once more."""

from __future__ import annotations

from quintet.transport import Address
from quintet.wire.amqp_session import Closed

WITHIN = 5.0  # seconds that the broker may be away when something is served or looked at
AGAIN_FIRST, AGAIN_LONGEST = 0.05, 1.0  # seconds until something that the broker refused is tried once more
NOTICED = 0.1  # until a queue that was deleted is declared again: who consumed it must have heard of it by then


def sentence(address: Address, name: str, error: Closed) -> str:
    """What the broker says, and what to do."""
    advice = {
        403: "give the user the right to configure, write and read it",
        404: "declare it, or leave that to Quintet",
        405: "another connection holds it",
        406: "it is there with other arguments: delete it, or take it as it is, with native=[Queue(declare=False)]",
    }.get(error.code, "")
    return f"{name} at {address}: {error}{f'; {advice}' if advice else ''}"
