"""The deadline: a number that is carried along, the smaller of ours and what the caller's caller has left."""

from __future__ import annotations

import math
from collections.abc import Awaitable

from quintet.clock import Wheel
from quintet.context import CURRENT
from quintet.contract import Style
from quintet.errors import DeadlineExceeded, Safety
from quintet.filter import Guarded
from quintet.message import Handler, Message

PLACE = 20  # above retry: all attempts together have this long

GRAIN = Wheel.GRAIN  # a time-out is no more accurate, and preparing the message took some of it


def client(guarded: Guarded, handler: Handler) -> Handler:
    name, timeout, now = guarded.operation.full_name, guarded.policy.timeout, guarded.clock.now
    watch = guarded.watch
    waits = guarded.operation.style in (Style.REQUEST, Style.SURVEY)
    expires = guarded.operation.expires

    def too_late() -> DeadlineExceeded:
        error = DeadlineExceeded(f"{name}: no time was left to send it", safety=Safety.NOT_SENT)
        watch.tell("refused", name, error)
        return error

    def deadline(message: Message) -> Awaitable[Message | None]:
        start = now()
        until = message.until  # set by using(timeout=...)
        if until is None:
            if timeout is not None:
                until = start + timeout
        elif until == math.inf:
            until = None
        else:
            if timeout is None or until < start + timeout - GRAIN:
                message.hurried = until
            if until <= start:
                raise too_late()
        inherited = CURRENT.get().deadline
        if inherited is not None and (until is None or inherited < until):
            message.hurried = until = inherited
            if until <= start:
                raise too_late()
        message.until, message.begun = until, start
        if waits:
            message.deadline = until
        elif message.deadline is None and expires is not None:
            message.deadline = start + expires  # the work may rot; how long the sender waits for acceptance stays here
        return handler(message)

    return deadline


def server(guarded: Guarded, handler: Handler) -> Handler:
    name, now, watch = guarded.operation.full_name, guarded.clock.now, guarded.watch

    def drop_what_is_late(message: Message) -> Awaitable[Message | None]:
        if message.deadline is not None and message.deadline <= now():
            error = DeadlineExceeded(f"{name}: its deadline had passed before work was begun", safety=Safety.NOT_SENT)
            watch.tell("refused", name, error)
            raise error
        return handler(message)

    return drop_what_is_late
