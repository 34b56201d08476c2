"""What users configure for calls: `Policy(timeout=0.3)` for a contract, `on(operation, ...)` for one operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ParamSpec, TypeAlias, TypeVar

import msgspec
from msgspec import Struct

from quintet.contract import Contract, Operation
from quintet.errors import ConfigurationError

P = ParamSpec("P")
R = TypeVar("R")


class Policy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How calls are guarded. What is None is not set here, and comes from the next wider policy, at last from DEFAULT.

    `timeout`: seconds that a caller waits, at most; nested calls inherit what remains.
    """

    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.timeout is not None and not self.timeout > 0:
            raise ConfigurationError(f"Policy(timeout={self.timeout!r}): seconds must be more than 0")

    def over(self, wider: Policy) -> Policy:
        """This policy, with what it leaves open taken from a wider one."""
        mine = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        return msgspec.structs.replace(wider, **mine)


DEFAULT = Policy(timeout=1.0)


class On(Struct, frozen=True):
    """A policy for one operation, made by `on`."""

    operation: Operation[Any, Any, Any]
    policy: Policy


def on(operation: Operation[P, R, Any], *, timeout: float | None = None) -> On:
    """What differs for one operation: `connect(..., policy=[Policy(timeout=0.3), on(Trips.create, timeout=2.0)])`."""
    return On(operation, Policy(timeout=timeout))


Policies: TypeAlias = Policy | On | Sequence[Policy | On]


def resolve(contract: type[Contract], policies: Policies) -> dict[str, Policy]:
    """The policy in force for each operation, by name. Raises ConfigurationError for a foreign operation."""
    given = [policies] if isinstance(policies, Policy | On) else list(policies)
    wide = DEFAULT
    for policy in given:
        if isinstance(policy, Policy):
            wide = policy.over(wide)
    found = dict.fromkeys(contract.__quintet__.operations, wide)
    for policy in given:
        if isinstance(policy, On):
            if policy.operation not in contract.__quintet__.operations.values():
                raise ConfigurationError(f"on({policy.operation!r}, ...) does not belong to {contract.__name__}")
            found[policy.operation.name] = policy.policy.over(found[policy.operation.name])
    return found
