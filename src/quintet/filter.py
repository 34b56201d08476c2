"""The filters that stand between a caller and a transport, and between a transport and a handler.

A filter enforces one part of a policy. It is a function that wraps a Handler and gives a Handler, or the same one back
where the policy does not ask for it: `client(guarded, handler)`, and `server(guarded, handler)` on the service's side.
Each stands in its file in `filters/`, with its PLACE in the order: the lowest is the outermost. Filters see bytes and
names, never the format.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

from msgspec import Struct, field

from quintet.clock import Clock
from quintet.contract import Operation
from quintet.errors import ConfigurationError
from quintet.message import Handler
from quintet.meter import CLIENTS, SERVERS, Meter
from quintet.policy import Policy
from quintet.watch import Watch

T = TypeVar("T")


class State:
    """What filters remember between calls: one object of each kind. It outlives a change of the policy."""

    def __init__(self) -> None:
        self._kept: dict[type[Any], Any] = {}

    def __repr__(self) -> str:
        return f"<state {list(self._kept.values())}>"

    def of(self, kind: type[T], make: Callable[[], T]) -> T:
        """The one object of this kind, made where there is none yet."""
        if kind not in self._kept:
            self._kept[kind] = make()
        found: T = self._kept[kind]
        return found


class Guarded(Struct, frozen=True):
    """What a filter is built for: one operation, on the side of its caller or of its service.

    `shared` is the state of the whole remote service as one client sees it (of the own service, on its side),
    `own` that of this operation alone. `where`: the addresses it is reached at, for who reads an error.
    `instances`: the address behind each of the exchanges, where there are several. `watch` is told
    what happens.
    """

    operation: Operation[Any, Any, Any]
    policy: Policy
    clock: Clock
    shared: State = field(default_factory=State)
    own: State = field(default_factory=State)
    where: str = ""
    instances: tuple[str, ...] = ()
    watch: Watch = field(default_factory=Watch)

    @property
    def meter(self) -> Meter:
        """Where filters enter what they count."""
        return self.own.of(Meter, Meter)

    def state(self, per: str) -> State:
        return self.shared if per == "service" else self.own


def client_chain(guarded: Guarded, exchanges: Sequence[Handler]) -> Handler:
    """The caller's filters around the exchanges with each address; the file that offers `balance` makes one of them."""
    handlers = list(exchanges)
    _enter(guarded)
    for module in _innermost_first():
        if hasattr(module, "client"):
            handlers = [module.client(guarded, handler) for handler in handlers]
        elif hasattr(module, "balance") and len(handlers) > 1:
            handlers = [module.balance(guarded, handlers)]
    (handler,) = handlers
    CLIENTS[handler] = guarded.meter
    return handler


def server_chain(guarded: Guarded, handler: Handler) -> Handler:
    """The service's filters around the handler."""
    _enter(guarded)
    for module in _innermost_first():
        if hasattr(module, "server"):
            handler = module.server(guarded, handler)
    SERVERS[handler] = guarded.meter
    return handler


def _enter(guarded: Guarded) -> None:
    meter = guarded.meter
    meter.operation, meter.policy, meter.watch = guarded.operation, guarded.policy, guarded.watch


@cache
def _innermost_first() -> list[Any]:
    import quintet.filters as folder

    found = [importlib.import_module(f"quintet.filters.{file.name}") for file in pkgutil.iter_modules(folder.__path__)]
    found.sort(key=lambda module: -module.PLACE)
    for one, other in pairwise(found):
        if one.PLACE == other.PLACE:  # which of them is outermost would be decided by their names
            raise ConfigurationError(
                f"{one.__name__} and {other.__name__} have the same PLACE ({one.PLACE}): change one"
            )
    return found
