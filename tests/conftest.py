"""Runs `async def` tests, each in a loop of its own, and ends one that hangs."""

from __future__ import annotations

import asyncio
import inspect
import signal
from typing import Any

import pytest

SECONDS = 60.0


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    test = pyfuncitem.obj
    if not inspect.iscoroutinefunction(test):
        return None
    arguments: dict[str, Any] = {name: pyfuncitem.funcargs[name] for name in inspect.signature(test).parameters}

    async def main() -> None:
        async with asyncio.timeout(SECONDS):
            await test(**arguments)

    asyncio.run(main())
    return True


def pytest_configure() -> None:
    # a shell starts what it runs in the background with Ctrl-C ignored, and all our processes would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
