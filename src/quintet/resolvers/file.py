"""`http+file:///etc/trips.addresses`: a file with the host:port (or the address) of an instance in each line."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from quintet.errors import AddressError, Unavailable
from quintet.resolver import Resolver
from quintet.transport import Address


class Lookup(Resolver):
    """Reads the file, as RFC 8089 names it, again each second; what stands behind a # is left out."""

    every = 1.0

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        if address.host or not address.path.strip("/"):
            raise AddressError(f"{address}: write {self.scheme}+file:///etc/trips.addresses, with the whole path")
        self._file = Path(address.path)
        self.path = ""

    async def look(self) -> Sequence[str]:
        try:
            text = await asyncio.to_thread(self._file.read_text)
        except (OSError, UnicodeDecodeError) as error:
            raise Unavailable(f"{self.address} cannot be read: {error}") from None
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        return list(dict.fromkeys(line for line in lines if line))
