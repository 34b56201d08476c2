"""The request cache: within the work on one message, the same question is asked once."""

from __future__ import annotations

from quintet.context import replies
from quintet.filter import Guarded
from quintet.message import Handler, Message

PLACE = 8  # outermost, above the trace: a reply that is there already costs nothing and counts nowhere


def client(guarded: Guarded, handler: Handler) -> Handler:
    if not guarded.policy.cache or not guarded.operation.idempotent:
        return handler
    of_this_client = object()

    async def cache(message: Message) -> Message | None:
        kept = replies()
        if kept is None or not message.cache_key:
            return await handler(message)
        asked = of_this_client, message.cache_key
        if asked in kept:
            return kept[asked]
        reply = await handler(message)
        if reply is not None:
            kept[asked] = reply
        return reply

    return cache
