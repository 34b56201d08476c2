"""The chain that stands between a caller and a transport, and between a transport and a handler."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Awaitable, Callable, Iterable
from functools import cache
from typing import Any, TypeAlias

from msgspec import Struct

from quintet.clock import Clock
from quintet.contract import Operation
from quintet.message import Handler, Message
from quintet.policy import Policy

Filter: TypeAlias = Callable[[Message, Handler], Awaitable[Message | None]]
"""Enforces one part of a policy around a Handler. Sees bytes and names, never the format."""


def chain(filters: Iterable[Filter], handler: Handler) -> Handler:
    """Wraps the handler so that the first filter is the outermost."""
    for filter_ in reversed(list(filters)):
        handler = _wrap(filter_, handler)
    return handler


def _wrap(filter_: Filter, inner: Handler) -> Handler:
    return lambda message: filter_(message, inner)  # hands the coroutine on: no frame of its own while it waits


class Guarded(Struct, frozen=True):
    """What a filter is built for: one operation, on the side of its caller or of its service."""

    operation: Operation[Any, Any, Any]
    policy: Policy
    clock: Clock


def client_filters(guarded: Guarded) -> list[Filter]:
    """The caller's filters, outermost first: of each file in `filters/` that offers `client`, by its PLACE."""
    return _built("client", guarded)


def server_filters(guarded: Guarded) -> list[Filter]:
    """The service's filters, likewise, from the files that offer `server`."""
    return _built("server", guarded)


def _built(side: str, guarded: Guarded) -> list[Filter]:
    builders = [getattr(module, side) for module in _modules() if hasattr(module, side)]
    return [built for build in builders if (built := build(guarded))]


@cache
def _modules() -> list[Any]:
    import quintet.filters as folder

    found = [importlib.import_module(f"quintet.filters.{file.name}") for file in pkgutil.iter_modules(folder.__path__)]
    return sorted(found, key=lambda module: module.PLACE)
