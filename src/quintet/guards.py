"""Policies on plain functions: the same chain of filters around code that uses none of our transports."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from quintet.clock import SYSTEM, Clock
from quintet.contract import Operation, Style
from quintet.errors import ConfigurationError
from quintet.filter import Guarded, client_chain
from quintet.message import Channel, Message
from quintet.policy import DEFAULT, Policy

P = ParamSpec("P")
R = TypeVar("R")


class _Function(Operation[Any, Any, Any]):
    """A function in the place of an operation of a contract."""

    @property
    def full_name(self) -> str:
        return self.name


class _Invocation(Message, kw_only=True):
    """A call in the place of a message."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Any = None


def guard(
    policy: Policy,
    function: Callable[P, Awaitable[R]],
    *,
    name: str = "",
    idempotent: bool = False,
    clock: Clock = SYSTEM,
) -> Callable[P, Coroutine[Any, Any, R]]:
    """What `Policy.guards` makes of a function."""
    name = name or getattr(function, "__qualname__", type(function).__name__)
    plain: object = function
    if inspect.isfunction(plain) and not inspect.iscoroutinefunction(plain):
        raise ConfigurationError(f"{name} must be `async def` to be guarded; run what blocks with asyncio.to_thread")
    operation = _Function(function, Style.REQUEST, idempotent=idempotent)
    operation.name = name
    channel = Channel(name)

    async def call(message: Message) -> Message:
        assert isinstance(message, _Invocation)  # noqa: S101 - for the type checkers
        message.value = await function(*message.args, **message.kwargs)
        return message

    send = client_chain(Guarded(operation, policy.over(DEFAULT), clock), [call])

    @functools.wraps(function)
    async def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        reply: Any = await send(_Invocation(channel=channel, args=args, kwargs=kwargs))
        value: R = reply.value
        return value

    return guarded
