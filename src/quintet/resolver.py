"""Where the instances of a service are at the moment: what stands behind the "+" of http+dns://trips.internal:8001."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import ClassVar
from urllib.parse import urlencode

from quintet.clock import Clock
from quintet.errors import AddressError, Unavailable
from quintet.transport import Address, Transport, open_address, parse_address

log = logging.getLogger("quintet.resolver")


class Resolver(ABC):
    """Finds the instances of one service. Subclasses live one per file in `resolvers/`, as the class `Lookup`.

    What the address says behind the "?" is the resolver's where it is among its `options`, else the transport's.
    `every`: seconds between two looks.
    """

    options: ClassVar[frozenset[str]] = frozenset()
    every: float = 5.0

    def __init__(self, address: Address) -> None:
        self.address = address
        self.scheme = address.scheme.partition("+")[0]
        self.every = address.option("every", self.every)
        if not 0 < self.every < float("inf"):
            raise AddressError(f"{address}: every={self.every:g}: seconds between two looks must be more than 0")
        own = self.options | {"every"}
        rest = {name: value for name, value in address.options.items() if name not in own}
        self._query = f"?{urlencode(rest)}" if rest else ""
        self.path = address.path

    def __repr__(self) -> str:
        return f"<resolver {self.address}>"

    @abstractmethod
    async def look(self) -> Sequence[str]:
        """The "host:port" of each instance, or its whole address. Raises Unavailable where that cannot be known."""

    def instance(self, found: str) -> str:
        """The address of one instance. Raises AddressError."""
        text = found if "://" in found else f"{self.scheme}://{found}{self.path}{self._query}"
        if parse_address(text).scheme != self.scheme:
            raise AddressError(f"{self.address}: its instance {found} must be reached by {self.scheme} too")
        return text


def resolver_of(text: str) -> Resolver | None:
    """The resolver of an address; None where it says itself where the service is. Raises AddressError."""
    address = parse_address(text)
    kind = address.scheme.partition("+")[2]
    if not kind.isidentifier() or not importlib.util.find_spec(f"quintet.resolvers.{kind}"):
        return None
    found: Resolver = importlib.import_module(f"quintet.resolvers.{kind}").Lookup(address)
    model(found)  # refuses what its transport would refuse
    return found


def model(resolver: Resolver, clock: Clock | None = None) -> Transport:
    """A transport such as each instance has, never opened: it tells traits and binding while none is known."""
    text = resolver.instance("unresolved:1")
    return open_address(text, clock) if clock else open_address(text)


def hosts(found: Iterable[tuple[str, int]]) -> list[str]:
    """Hosts and ports as addresses have them, each once and in order, so that the same set is the same list."""
    return sorted({f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in found})


class Following:
    """The instances behind one address, looked up again and again for as long as a client is connected.

    `changed` is called with their addresses when they are others than before. Where a look fails, those stay that were
    known: a name server that is down takes no service with it.
    """

    def __init__(self, resolver: Resolver, clock: Clock, changed: Callable[[], Awaitable[None]]) -> None:
        self.resolver = resolver
        self.model = model(resolver, clock)
        self.addresses: list[str] = []
        self._clock = clock
        self._changed = changed
        self._failed = False
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<following {self.resolver.address}: {', '.join(self.addresses) or 'no instance'}>"

    async def open(self) -> None:
        """Looks once, and from then on by itself."""
        await self._look()
        self._task = asyncio.create_task(self._follow(), name=f"follow {self.resolver.address}")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _follow(self) -> None:
        while True:
            await self._clock.sleep(self.resolver.every)
            try:
                await self._look()
                await self._changed()
            except Exception:
                log.exception("%s: its instances could not be reached", self.resolver.address)

    async def _look(self) -> None:
        try:
            found = [self.resolver.instance(one) for one in await self.resolver.look()]
        except (Unavailable, AddressError) as error:
            if not self._failed:
                log.warning("%s; what was known stays: %s", error, ", ".join(self.addresses) or "no instance")
            self._failed = True
            return
        self._failed = False
        if found != self.addresses:
            log.info("%s: its instances are %s", self.resolver.address, ", ".join(found) or "none")
            self.addresses = found
