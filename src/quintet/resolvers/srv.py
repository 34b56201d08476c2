"""`http+srv://_trips._tcp.example`: an instance at each target of a name's SRV records (RFC 2782)."""

from __future__ import annotations

from collections.abc import Sequence

from quintet.errors import AddressError, ConfigurationError, Unavailable
from quintet.resolver import Resolver, hosts
from quintet.transport import Address

try:
    import dns.asyncresolver
    import dns.exception
    import dns.resolver
except ImportError:
    raise ConfigurationError("SRV records are looked up by dnspython: pip install quintet[dns]") from None


class Lookup(Resolver):
    """Asks the name servers of this machine, or the one that `?server=127.0.0.1:8600` names (Consul has its own).

    Of several priorities only the lowest is taken. Weights are left aside: the balancer goes by what is outstanding.
    """

    options = frozenset({"server"})

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        if not address.host or address.port is not None:
            raise AddressError(f"{address}: write {self.scheme}+srv://_trips._tcp.example; the records tell the port")
        self._server, _, port = address.options.get("server", "").partition(":")
        if not (port or "53").isdecimal():
            raise AddressError(
                f"{address}: server={address.options['server']!r} must be an IP address, as 127.0.0.1:8600"
            )
        self._port = int(port or 53)

    async def look(self) -> Sequence[str]:
        try:
            asking = dns.asyncresolver.Resolver(configure=not self._server)
            if self._server:
                asking.nameservers, asking.port = [self._server], self._port
            answer = await asking.resolve(self.address.host, "SRV", lifetime=self.every)
        except dns.resolver.NXDOMAIN:
            return []  # the name server knows: there is none
        except (dns.exception.DNSException, OSError, ValueError) as error:
            raise Unavailable(f"{self.address} cannot be looked up: {error}") from None
        first = min(record.priority for record in answer)
        found = [record for record in answer if record.priority == first]
        return hosts((record.target.to_text(omit_final_dot=True), record.port) for record in found)
