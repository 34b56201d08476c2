"""Repeats of a message: the first is handled, what it did is kept with its reply, and the others get that reply."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import wraps
from math import inf
from typing import Any, TypeAlias

from quintet.binding import Bound
from quintet.context import CURRENT
from quintet.contract import Operation
from quintet.errors import DeadlineExceeded, QuintetError
from quintet.message import Message
from quintet.store import Conflict, SeenStore, UnitOfWork

Function: TypeAlias = Callable[..., Awaitable[Any]]

PATIENCE = 3  # times that a handler is overtaken (others changed what it read), then it has others wait
TRIES = 20  # in all, for other processes do not wait


def once(
    function: Function, operation: Operation[Any, Any, Any], store: SeenStore, inside: Bound, group: str
) -> Function:
    """The handler's function, called once in effect for each message of the group.

    `inside` writes the value into the store and reads it again, for the repeat may come over another transport. What
    the function raises leaves nothing behind: a repeat is handled anew. A GET changes nothing, so it is not kept.
    """
    name = f"{group}/{operation.channel.name}/"
    safe = operation.http.route.startswith("GET ")

    async def work(message: Message, key: str, args: Any, kwargs: Any) -> Any:
        """The function's value, called anew where others changed what it had read; kept under the key if it has one."""
        current = CURRENT.get()
        async with AsyncExitStack() as turn:
            for attempt in range(TRIES):
                if attempt == PATIENCE:
                    await turn.enter_async_context(store.turn)
                elif attempt < PATIENCE and store.turn.locked():
                    async with store.turn:  # let those go first who were overtaken again and again
                        pass
                current._store = unit = UnitOfWork(store, reads_only=safe)
                try:
                    value = await function(*args, **kwargs)
                    handled = await store.finish(key, inside.reply(message, value), unit.steps) if key else None
                except Conflict:
                    continue
                finally:
                    unit.ended = True
                return value if handled is None else inside.result(handled.reply)
        raise QuintetError(
            f"{operation.full_name}: what it read in its store was changed by others {TRIES} times before it was done:"
            " pass random() and times as values, and read no more than it needs"
        )

    @wraps(function)
    async def look(*args: Any, **kwargs: Any) -> Any:
        return await work(CURRENT.get()._message, "", args, kwargs)

    @wraps(function)
    async def handle(*args: Any, **kwargs: Any) -> Any:
        current = CURRENT.get()
        message = current._message
        key = name + message.id
        try:
            handled = await store.begin(key, inf if current.deadline is None else current.deadline)
        except TimeoutError:
            raise DeadlineExceeded(f"{operation.full_name}: message {message.id} is still in work elsewhere") from None
        if handled is not None:
            return inside.result(handled.reply)
        try:
            return await work(message, key, args, kwargs)
        except BaseException:
            store.release(key)
            raise

    return look if safe else handle
