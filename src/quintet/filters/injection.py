"""Fault injection for tests and drills: latency and errors at a rate, only where the environment switches it on."""

from __future__ import annotations

import logging
import os

from quintet.errors import BY_CODE
from quintet.filter import Guarded
from quintet.message import Handler, Message
from quintet.policy import Injection

PLACE = 95  # innermost: what is injected must look to all others as if the service did it

SWITCH = "QUINTET_INJECT"

log = logging.getLogger("quintet.injection")


def client(guarded: Guarded, handler: Handler) -> Handler:
    settings, name, clock = guarded.policy.injection, guarded.operation.full_name, guarded.clock
    if not isinstance(settings, Injection) or os.environ.get(SWITCH) != "on":
        return handler
    log.warning("%s: faults are injected, %r", name, settings)

    async def injection(message: Message) -> Message | None:
        if clock.random.random() < settings.rate:
            if settings.latency:
                await clock.sleep(settings.latency)
            if settings.error:
                raise BY_CODE[settings.error](f"{name}: injected, {SWITCH}=on")
        return await handler(message)

    return injection
