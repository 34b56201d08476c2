"""What only Kafka can do for a channel or a message, in typed options that are checked when they are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from msgspec.structs import force_setattr

from quintet.errors import ConfigurationError
from quintet.message import Native


class Topic(Native, frozen=True, kw_only=True):
    """How a channel's topic is made, where it does not exist yet; and where a group begins that is new to it.

    `partitions` and `replication`: 0 takes the address's or the broker's own. `config`: Kafka's settings of a topic, as
    {"retention.ms": "86400000"}. `start`: "earliest" has a new group of a fan-out channel hear what was sent before it
    came, "latest" has a new point-to-point group leave that out.
    """

    partitions: int = 0
    replication: int = 0
    config: Mapping[str, str] | tuple[tuple[str, str], ...] = ()
    start: Literal["", "earliest", "latest"] = ""

    def __post_init__(self) -> None:
        if isinstance(self.config, Mapping):
            force_setattr(self, "config", tuple(self.config.items()))  # so that a channel can be hashed
        for wrong, why in (
            (not 0 <= self.partitions < 2**31, "partitions must be 1 or more, or 0 for the address's own"),
            (not 0 <= self.replication < 2**15, "replication must be 1 or more, or 0 for the address's own"),
            (self.start not in ("", "earliest", "latest"), "start must be earliest or latest"),
        ):
            if wrong:
                raise ConfigurationError(f"{self!r}: {why}")


class Record(Native, frozen=True, kw_only=True):
    """Where a message goes in its topic: to this partition (-1: by its key), with this time in seconds since 1970."""

    partition: int = -1
    timestamp: float = 0.0

    def __post_init__(self) -> None:
        if not -1 <= self.partition < 2**31:
            raise ConfigurationError(f"{self!r}: partition must be 0 or more, or -1 for the one of its key")
        if not 0 <= self.timestamp < 2**63 / 1000:
            raise ConfigurationError(f"{self!r}: timestamp must be seconds since 1970, or 0 for now")


TOPIC: Final = Topic()
RECORD: Final = Record()
