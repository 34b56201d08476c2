"""The chain that stands between a caller and a transport, and between a transport and a handler."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import cache
from typing import Any, TypeAlias, TypeVar

from msgspec import Struct, field

from quintet.clock import Clock
from quintet.contract import Operation
from quintet.message import Handler, Message
from quintet.policy import Policy

T = TypeVar("T")

Filter: TypeAlias = Callable[[Message, Handler], Awaitable[Message | None]]
"""Enforces one part of a policy around a Handler. Sees bytes and names, never the format."""


def chain(filters: Iterable[Filter], handler: Handler) -> Handler:
    """Wraps the handler so that the first filter is the outermost."""
    for filter_ in reversed(list(filters)):
        handler = _wrap(filter_, handler)
    return handler


def _wrap(filter_: Filter, inner: Handler) -> Handler:
    return lambda message: filter_(message, inner)  # hands the coroutine on: no frame of its own while it waits


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
    `own` that of this operation alone.
    """

    operation: Operation[Any, Any, Any]
    policy: Policy
    clock: Clock
    shared: State = field(default_factory=State)
    own: State = field(default_factory=State)

    def state(self, per: str) -> State:
        return self.shared if per == "service" else self.own


def client_chain(guarded: Guarded, exchanges: Sequence[Handler]) -> Handler:
    """The caller's filters around the exchanges with each address: of each file in `filters/` that offers `client`, by
    its PLACE, the lowest outermost. The file that offers `balance` makes one handler of several."""
    handlers = list(exchanges)
    for module in reversed(_modules()):
        if hasattr(module, "balance"):
            handlers = [module.balance(guarded, handlers)] if len(handlers) > 1 else handlers
        elif hasattr(module, "client") and (filter_ := module.client(guarded)):
            handlers = [_wrap(filter_, handler) for handler in handlers]
    (handler,) = handlers
    return handler


def server_filters(guarded: Guarded) -> list[Filter]:
    """The service's filters, outermost first: of each file in `filters/` that offers `server`, by its PLACE."""
    builders = [module.server for module in _modules() if hasattr(module, "server")]
    return [built for build in builders if (built := build(guarded))]


@cache
def _modules() -> list[Any]:
    import quintet.filters as folder

    found = [importlib.import_module(f"quintet.filters.{file.name}") for file in pkgutil.iter_modules(folder.__path__)]
    return sorted(found, key=lambda module: module.PLACE)
