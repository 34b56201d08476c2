"""`http+dns://trips.internal:8001`: an instance at each IP address of a name."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from quintet.errors import AddressError, Unavailable
from quintet.resolver import Resolver, hosts
from quintet.transport import Address


class Lookup(Resolver):
    """Asks as this machine does for every name: its hosts file, its name servers."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        if not address.host or address.port is None:
            raise AddressError(f"{address}: write {self.scheme}+dns://NAME:PORT")
        if self.scheme.endswith("s"):
            raise AddressError(
                f"{address}: a certificate is for a name and not for its IP addresses: take {self.scheme}+srv://..."
            )
        self._host, self._port = address.host, address.port

    async def look(self) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise Unavailable(f"{self.address}: {self._host} has no address: {error}") from None
        return hosts((str(where[0]), self._port) for *_, where in found)
