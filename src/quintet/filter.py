"""The chain that stands between a caller and a transport, and between a transport and a handler."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeAlias

from quintet.message import Handler, Message

Filter: TypeAlias = Callable[[Message, Handler], Awaitable[Message | None]]
"""Enforces one part of a policy around a Handler. Sees bytes and names, never the format."""


def chain(filters: Iterable[Filter], handler: Handler) -> Handler:
    """Wraps the handler so that the first filter is the outermost."""
    for filter_ in reversed(list(filters)):
        handler = _wrap(filter_, handler)
    return handler


def _wrap(filter_: Filter, inner: Handler) -> Handler:
    return lambda message: filter_(message, inner)  # hands the coroutine on: no frame of its own while it waits
