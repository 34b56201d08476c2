"""What a transport is (law 2): it carries messages, and is told by the core what becomes of each delivery."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from enum import Enum
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable
from urllib.parse import parse_qsl, unquote, urlsplit

from msgspec import Struct
from msgspec.structs import force_setattr

from quintet.clock import SYSTEM, Clock
from quintet.errors import AddressError, Unavailable
from quintet.message import Channel, Message, Native


class Trait(Enum):
    """An ability that a transport states once. The value is what the docs table and error messages say."""

    REPLIES = "carries the reply to a message back by itself"
    FANOUT = "gives every group its copy of a message"
    DURABLE = "keeps accepted messages through a restart"
    REDELIVERS = "delivers a message again when its receiver failed or died"
    DELAYS = "can wait before it delivers again"
    ORDERED = "delivers messages of one key one at a time and in order"


class Done(Struct, frozen=True):
    """The delivery is finished; `reply` goes back by itself where the transport has REPLIES."""

    reply: Message | None = None


class Again(Struct, frozen=True):
    """Deliver it again after so many seconds, with `attempt` one higher. `reason` says why, for who looks."""

    after: float
    reason: str = ""


LONGEST_REASON = 4000  # bytes: ActiveMQ hangs up over a header of more than 10 KiB, and STOMP may write two for one


class Dead(Struct, frozen=True):
    """Never deliver it again: into the dead-letter channel, with the reason, which is cut to LONGEST_REASON bytes and
    made UTF-8: an error's text may hold what no broker could write."""

    reason: str

    def __post_init__(self) -> None:
        force_setattr(self, "reason", self.reason.encode(errors="replace")[:LONGEST_REASON].decode(errors="ignore"))


Verdict: TypeAlias = Done | Again | Dead
Receive: TypeAlias = Callable[[Message], Awaitable[Verdict]]
"""What a transport calls with each delivery. It never raises, but may be cancelled (then it is unfinished)."""

DONE = Done()


class Serving(Protocol):
    """One channel being served."""

    async def stop(self) -> None:
        """Takes no more, waits for the deliveries in work to be settled, then frees what it held."""
        ...


class Address(Struct, frozen=True):
    """An address taken apart: `scheme://[user[:password]@]host[:port]/path?options`."""

    text: str
    scheme: str
    host: str
    port: int | None
    path: str
    options: dict[str, str]
    user: str = ""
    password: str = ""
    hosts: tuple[tuple[str, int | None], ...] = ()
    """All hosts and their ports, where a broker has several addresses: `amqp://one:5672,two:5672/`."""

    def __str__(self) -> str:
        return masked(self.text)

    def option(self, name: str, default: float, least: float = 0.0) -> float:
        """A number among the options. Raises AddressError for less than `least`, and for what is none."""
        text = self.options.get(name)
        if text is None:
            return default
        try:
            number = float(text)
        except ValueError:
            raise AddressError(f"{self}: option {name}={text!r} is not a number") from None
        if not least <= number < math.inf:
            raise AddressError(f"{self}: option {name} must be a number of at least {least:g}")
        return number

    def count(self, name: str, default: int, least: int = 1) -> int:
        """A whole number among the options. Raises AddressError as `option` does."""
        number = self.option(name, default, least)
        if number != int(number):
            raise AddressError(f"{self}: option {name}={self.options[name]!r} is not a whole number")
        return int(number)


_PASSWORD = re.compile(r"(?<=://)([^:/?#]*):.*@")
_SECRET = re.compile(r"([?&][^=&]*(?:password|secret)[^=&]*=)[^&]*", re.IGNORECASE)


def masked(address: str) -> str:
    """An address as it may be shown: without passwords."""
    head, mark, options = address.partition("?")
    return _PASSWORD.sub(r"\1:***@", head) + _SECRET.sub(r"\1***", mark + options)


class Tell(Protocol):
    """Tells what happened to a connection; its subject is the address."""

    def __call__(self, kind: Literal["broker-lost", "broker-back"], subject: str, reason: object = "") -> None: ...


def _tell_nobody(kind: Literal["broker-lost", "broker-back"], subject: str, reason: object = "") -> None:
    """Where nobody listens."""


class Finding(Struct, frozen=True):
    """One thing that `quintet doctor` says of a broker."""

    what: str
    """As "version" or "delayed redelivery"."""
    says: str
    well: bool = True
    """False where something that a service may need would not work; then `says` tells what to do instead."""


class Transport(ABC):
    """Carries messages over one address. It never retries, never invents a time-out, never logs: it raises.

    Subclasses live one per file in `transports/`, named after the address's scheme, as the class `Carrier`.
    """

    traits: ClassVar[frozenset[Trait]]
    binding: ClassVar[str] = "body"  # the file in bindings/ that turns values into this transport's messages
    options: ClassVar[frozenset[str]] = frozenset()  # the names an address may carry behind the "?"; "x.*": any "x."
    variants: ClassVar[frozenset[str]] = frozenset()  # what may stand behind the "+" of its scheme
    as_it_is: ClassVar[tuple[Native, ...]] = ()  # the options of a channel that is there, and taken whatever it is

    def __init__(self, address: Address, clock: Clock = SYSTEM) -> None:
        self.address = address
        self.clock = clock
        self.tell: Tell = _tell_nobody  # of the loss of the connection to a broker, and of its return

    @property
    def connected(self) -> bool:
        """False while its broker is away: what is sent waits, and the health page says so."""
        return True

    @property
    def native(self) -> Any:
        """The connection of the broker's own kind, for what only this broker can do. Raises Unavailable."""
        raise Unavailable(f"{self!r} has no native connection")

    async def examine(self) -> Sequence[Finding]:
        """What an opened transport finds out about its broker: version, what it allows, what would not work."""
        return ()

    def __repr__(self) -> str:
        return f"<transport {self.address}>"

    async def open(self) -> None:  # noqa: B027 - most have something to open, memory has not
        """Gets ready to send and serve; raises TransportError or Unavailable where it cannot."""

    async def close(self) -> None:  # noqa: B027
        """Cancels what is still in work (stop() the servings first to let it finish) and frees everything, also when
        called twice. What was accepted stays with the broker; `send` raises Unavailable from now on."""

    @abstractmethod
    def send(self, message: Message) -> Coroutine[Any, Any, Message | None]:
        """Returns once the message is accepted; the reply where the transport has REPLIES. Raises CallError."""

    @abstractmethod
    async def serve(self, channel: Channel, receive: Receive, group: str, limit: int = 100) -> Serving:
        """Hands each delivery of the channel to `receive`, at most `limit` at once (which is also the prefetch),
        and acts on the verdict. On a fan-out channel each group gets every message that was sent after its first
        `serve` returned, whether one of its members is there at the moment or not (unless `temporary`)."""

    async def listen(self, channel: Channel, arrived: Callable[[Message], None]) -> Serving:
        """Hands each message of a channel for `replies` to `arrived`; nothing becomes of a reply, whoever waits or not.
        A transport that knows a shorter way for replies than through a queue and its tasks takes that."""

        async def receive(message: Message) -> Verdict:
            arrived(message)
            return DONE

        return await self.serve(channel, receive, "", limit=1000)

    async def ready(self) -> None:  # noqa: B027 - a transport that needs all its channels first listens here
        """Called once after all channels of a service are served, before it says that it is ready."""


class DeadLetter(Struct, kw_only=True):
    """A message that will not be delivered again."""

    id: str
    channel: str
    group: str
    reason: str
    attempts: int
    died_at: float
    message: Message
    times: Sequence[float] = ()
    """When its attempts failed, in seconds of the wall clock, as far as the transport knows."""


class ChannelState(Struct, kw_only=True):
    """What waits in a channel, per group (empty for point-to-point)."""

    channel: str
    group: str
    waiting: int
    in_work: int
    dead: int
    oldest: float | None
    """Seconds that the oldest waiting message is old; None where nothing waits, or the broker does not tell."""


class Shown(Struct, frozen=True):
    """What is at a path: whole, or in pieces as they come (which end when the service drains)."""

    body: bytes | AsyncGenerator[bytes, None]
    media_type: str
    status: int = 200


Page: TypeAlias = Callable[[Mapping[str, str]], Awaitable[Shown]]
"""What answers a GET, from the request's headers (names in lower case)."""


@runtime_checkable
class Showing(Protocol):
    """A transport that shows pages beside its channels, by their paths: set before it is `ready`."""

    pages: Mapping[str, Page]


@runtime_checkable
class Tailing(Protocol):
    """A transport whose messages can be watched: `quintet tail` asks for it."""

    def tail(self, channel: str) -> AsyncIterator[Message]:
        """Each message that is sent to the channel from now on, without taking it from anyone.
        `*` at the end matches any rest."""
        ...


@runtime_checkable
class Counting(Protocol):
    """A transport that knows what waits in its channels: /metrics and the dashboard ask for it."""

    async def channels(self) -> Sequence[ChannelState]: ...


@runtime_checkable
class Letters(Protocol):
    """A transport that keeps dead letters: `quintet dead` asks for it."""

    async def dead(self, channel: str | None = None) -> Sequence[DeadLetter]:
        """Oldest first."""
        ...

    async def replay(self, ids: Sequence[str]) -> int:
        """Puts dead letters back, attempt 1, to the group that failed on them. Returns how many."""
        ...

    async def drop(self, ids: Sequence[str]) -> int:
        """Deletes dead letters for ever. Returns how many."""
        ...


def parse_address(text: str) -> Address:
    """Takes an address apart; raises AddressError with what to write instead."""
    parts = urlsplit(text)
    if not parts.scheme or "://" not in text:
        raise AddressError(
            f"{text!r} is no address: write scheme://..., as http://127.0.0.1:8001 or sqlite:///rides.db"
        )
    try:
        each = [urlsplit(f"//{host}") for host in parts.netloc.rpartition("@")[2].split(",")]
        hosts = tuple((one.hostname or "", one.port) for one in each)
    except ValueError:
        hidden = "@" in text and "@" not in text.partition("?")[0]  # what looks like a port is of a password
        raise AddressError(
            f"{parts.scheme + '://...' if hidden else masked(text)}: the port must be a number from 0 to 65535"
            " (and / ? # @ in a password are written %2F %3F %23 %40)"
        ) from None
    if re.search(r":\d+,", parts.netloc.rpartition("@")[0]):
        raise AddressError(f"{masked(text)}: user and password belong before the first of the hosts, for all of them")
    return Address(
        text=text,
        scheme=parts.scheme,
        host=hosts[0][0],
        port=hosts[0][1],
        path=unquote(parts.path),
        options=dict(parse_qsl(parts.query, keep_blank_values=True)),
        user=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
        hosts=hosts,
    )


def carrier(address: Address) -> type[Transport]:
    """The transport class behind an address: `https` is `http`; a "+" leads to a variant that it knows."""
    name, plus, variant = address.scheme.partition("+")
    for candidate in (name, name.removesuffix("s")):
        if candidate.isidentifier() and importlib.util.find_spec(f"quintet.transports.{candidate}"):
            found: type[Transport] = importlib.import_module(f"quintet.transports.{candidate}").Carrier
            if plus and variant not in found.variants:
                raise AddressError(f"{address}: {name} has no variant {variant!r}, and no resolver is called that")
            return found
    raise AddressError(f"{address}: unknown scheme {address.scheme!r}; known are {', '.join(schemes())}")


def schemes() -> list[str]:
    """The schemes that are installed, by name."""
    import pkgutil

    import quintet.transports as folder

    return sorted(module.name for module in pkgutil.iter_modules(folder.__path__))


def open_address(text: str, clock: Clock = SYSTEM) -> Transport:
    """A transport for the address, not yet opened. Raises AddressError."""
    address = parse_address(text)
    found = carrier(address)
    anything = tuple(name.removesuffix("*") for name in found.options if name.endswith("*"))
    unknown = {name for name in address.options.keys() - found.options if not name.startswith(anything)}
    if unknown:
        known = ", ".join(sorted(found.options)) or "none"
        raise AddressError(f"{address}: unknown option {', '.join(sorted(unknown))}; known are: {known}")
    return found(address, clock)
