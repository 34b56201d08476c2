"""The nsqds that an address leads to: which there are, how each is connected to, what it tells over HTTP.

They stand in the address, or in the lookup daemons that it names, which are asked again from time to time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any, Final, Literal, TypeAlias, TypeVar
from urllib.parse import urlencode, urlsplit

from quintet.clock import Clock
from quintet.connection import Connection, credentials, tls_if
from quintet.errors import AddressError, TransportError, Unavailable
from quintet.transport import Address, Tell
from quintet.wire import nsq_http as http
from quintet.wire.nsq import Snappy
from quintet.wire.nsq_session import NSQ, Profile, User
from quintet.wire.nsq_topology import EPHEMERAL, TEMPORARY

OPTIONS: Final = frozenset({"tls", "deflate", "snappy", "http", "poll", "heartbeat"})

PORT, LOOKUP_PORT = 4150, 4161
HEARTBEAT = 5.0  # seconds between nsqd's signs of life, unless ?heartbeat= says otherwise
MSG_TIMEOUT = 5.0  # seconds after which nsqd gives a delivery to another when this process has died
POLL = 15.0  # seconds between two questions to the lookup daemons, by chance a fifth more or less
SWEEP = 60.0
HTTP_SECONDS = 5.0
PASSING_SECONDS = 0.3  # that HTTP may take which is asked by who is about something else
SILENT_SECONDS = 10.0  # for which it is then not asked in passing again
GUESS_SECONDS = 1.0

Host: TypeAlias = tuple[str, int]
Line: TypeAlias = Connection[NSQ]
K = TypeVar("K")


class Nsqds:
    """All nsqds of an address: `hosts`, which change where lookup daemons name them."""

    def __init__(self, address: Address, clock: Clock, tell: Tell) -> None:
        scheme, _, variant = address.scheme.partition("+")
        hosts = [(host or "127.0.0.1", port) for host, port in address.hosts]
        self.address = address
        self.clock = clock
        self.lookups = [_url(host, port or LOOKUP_PORT) for host, port in hosts] if variant == "lookup" else []
        self.hosts: list[Host] = [(host, port or PORT) for host, port in hosts]
        self.profile = _profile(address, secured=_switch(address, "tls", scheme == "nsqs"))
        """How connections present themselves, unless they say otherwise."""
        self._poll_seconds = address.option("poll", POLL, least=0.05)
        self._bases = _bases(address, self.hosts)  # where they answer HTTP, as far as that is known
        self._guesses: dict[Host, tuple[asyncio.Task[None], float]] = {}  # where it may be, and when that was asked
        self._silent: dict[str, float] = {}  # until when HTTP that did not answer is left alone
        self._tell = tell
        self._away: set[User] = set()
        self._told_away = False
        self._chores: list[asyncio.Task[Any]] = []
        self._sweeping = False
        self._closed = False

    async def find(self) -> None:
        """Asks the lookup daemons, if the address names some. Raises Unavailable."""
        if self.lookups:
            self.hosts = await self._look()
            if not self.hosts:
                raise Unavailable(f"{self.address}: the lookup daemons know no nsqd")
            self.clock.random.shuffle(self.hosts)  # that not all senders take the same

    def follow(self, changed: Callable[[], None]) -> None:
        """From now on keeps `hosts` up to date, and finds out where they answer HTTP."""
        for host in self.hosts:
            self._chore(self.http_of(host))
        if self.lookups:
            self._chore(self._poll(changed))

    async def close(self) -> None:
        """Looks no more, and tells no more."""
        self._closed = True
        chores = [*self._chores, *(guess for guess, _ in self._guesses.values())]
        for chore in chores:
            chore.cancel()
        await asyncio.gather(*chores, return_exceptions=True)

    def _chore(self, work: Coroutine[Any, Any, object]) -> None:
        self._chores.append(asyncio.get_running_loop().create_task(work))

    # Lookup daemons

    async def _look(self) -> list[Host]:
        """The nsqds that the lookup daemons know. Raises Unavailable where none of these answers."""
        questions = (_fetch(f"{lookup}/nodes", http.Producers) for lookup in self.lookups)
        outcomes = await asyncio.gather(*questions, return_exceptions=True)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if len(errors) == len(outcomes):
            raise Unavailable(f"{self.address}: no lookup daemon answers: {errors[0]}") from errors[0]
        found = {
            (one.broadcast_address, one.tcp_port): _url(one.broadcast_address, one.http_port)
            for known in outcomes
            if isinstance(known, http.Producers)
            for one in known.producers or ()
        }
        self._bases.update(found)
        return list(found)

    async def _poll(self, changed: Callable[[], None]) -> None:
        while True:
            await self.clock.sleep(self._poll_seconds * (0.8 + 0.4 * self.clock.random.random()))
            try:
                found = await self._look()
            except Unavailable:
                continue  # those that are known are still good
            if found:
                before = [host for host in self.hosts if host in found]
                self.hosts = before + [host for host in found if host not in before]
                changed()

    # Connections

    def connect(self, user: User, *hosts: Host, profile: Profile | None = None, missed: bool = False) -> Line:
        """A connection to one of these hosts, not yet opened; `missed`: its loss and its return are told."""
        connection: Line = Connection(
            self.address,
            PORT,
            lambda link: NSQ(link, connection.host, profile or self.profile, user),
            self.clock,
            partial(self._told, user) if missed else _silent,
            hosts=hosts,
        )
        return connection

    def _told(self, user: User, kind: Literal["broker-lost", "broker-back"], subject: str, reason: object = "") -> None:
        """The first that is lost tells, and the last that is back."""
        (self._away.add if kind == "broker-lost" else self._away.discard)(user)
        if bool(self._away) != self._told_away and not self._closed:
            self._told_away = bool(self._away)
            self._tell(kind, subject, reason)

    def dropped(self, user: User) -> None:
        """A connection that is not wanted any more is not missed."""
        self._told(user, "broker-back", str(self.address))

    # nsqd's HTTP

    async def http_of(self, host: Host) -> str | None:
        """Where nsqd answers HTTP: as an address or lookup daemon says, else one port above, where that is its own."""
        if host not in self._bases:
            guess, since = self._guesses.get(host, (None, 0.0))
            if guess is None or (guess.done() and self.clock.now() - since > SWEEP):
                guess = asyncio.get_running_loop().create_task(self._guess(host))
                self._guesses[host] = (guess, self.clock.now())
            await asyncio.shield(guess)
        return self._bases.get(host)

    def tells(self, host: Host) -> bool:
        """Whether it is known where nsqd answers HTTP."""
        return host in self._bases

    async def _guess(self, host: Host) -> None:
        base = _url(host[0], host[1] + 1)
        with contextlib.suppress(TransportError):
            if (await _fetch(f"{base}/info", http.Info, GUESS_SECONDS)).tcp_port == host[1]:
                self._bases[host] = base

    async def _base(self, host: Host) -> str:
        base = await self.http_of(host)
        if base is None:
            raise TransportError(f"{self.address}: nsqd's HTTP is needed for that and not found: write ?http=host:port")
        return base

    async def started(self, host: Host) -> float | None:
        """When this nsqd was started, in seconds of the wall clock; None where it does not tell."""
        with contextlib.suppress(TransportError):
            url = f"{await self._base(host)}/info"
            return http.read(await self._in_passing(url), http.Info, url).start_time
        return None

    async def setting(self, host: Host, name: str, *, in_passing: bool = False) -> int:
        """One of nsqd's settings, by its name under /config. Raises TransportError."""
        url = f"{await self._base(host)}/config/{name}"
        return http.read(await (self._in_passing(url) if in_passing else _http(url)), int, url)

    async def topics(
        self, host: Host, topic: str = "", channel: str = "", *, in_passing: bool = False
    ) -> Sequence[http.TopicStats]:
        """All topics, or only the `topic` and `channel` wanted, in numbers. Raises TransportError."""
        url = http.stats_url(await self._base(host), topic=topic, channel=channel)
        return http.read(await (self._in_passing(url) if in_passing else _http(url)), http.Stats, url).topics or ()

    async def _in_passing(self, url: str, method: str = "GET") -> bytes:
        """For who is about something else, whom HTTP behind a firewall must not keep. Raises TransportError."""
        where, now = urlsplit(url).netloc, self.clock.now()
        if self._silent.get(where, now) > now:
            raise TransportError(f"{url} is not asked: it was silent a moment ago")
        try:
            return await _http(url, method, PASSING_SECONDS)
        except TransportError as error:
            if isinstance(error.__cause__, TimeoutError):
                self._silent[where] = self.clock.now() + SILENT_SECONDS
            raise

    async def remove(self, host: Host, topic: str, channel: str = "") -> None:
        """A topic or channel that nobody holds any more; where that cannot be done the sweeping of others does it."""
        base = self._bases.get(host)
        if base is not None and not channel.endswith(EPHEMERAL):
            kind = "channel" if channel else "topic"
            with contextlib.suppress(TransportError):
                query = urlencode({"topic": topic, "channel": channel})
                await self._in_passing(f"{base}/{kind}/delete?{query}", "POST")

    def sweep(self) -> None:
        """From now on removes temporary topics and channels whose holder has died."""
        if not self._sweeping:
            self._sweeping = True
            self._chore(self._sweep())

    async def _sweep(self) -> None:
        before = set[tuple[Host, str, str]]()
        while True:
            await self.clock.sleep(SWEEP * (0.8 + 0.4 * self.clock.random.random()))
            found = set[tuple[Host, str, str]]()
            for host in self.hosts:
                with contextlib.suppress(TransportError):
                    found |= {(host, *abandoned) for abandoned in _abandoned(await self.topics(host))}
            for abandoned in found & before:  # its holder was away twice
                await self.remove(*abandoned)
            before = found


def _abandoned(topics: Sequence[http.TopicStats]) -> Iterator[tuple[str, str]]:
    """What is temporary and has nobody connected to it: topics, and channels of topics."""
    for topic in topics:
        if not topic.topic_name.endswith(TEMPORARY):
            for one in topic.channels or ():
                if one.channel_name.endswith(TEMPORARY) and not one.client_count:
                    yield topic.topic_name, one.channel_name
        elif topic.abandoned:
            yield topic.topic_name, ""


async def _http(url: str, method: str = "GET", seconds: float = HTTP_SECONDS) -> bytes:
    """The body of a good answer. Raises TransportError."""
    parts = urlsplit(url)
    answer = bytearray()
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            try:
                writer.write(http.request(url, method))
                while (piece := await reader.read(1 << 16)) and len(answer) <= http.LARGEST:
                    answer += piece
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        raise TransportError(f"{url} does not answer: {error or 'time is up'}") from error
    return http.body_of(bytes(answer), url)


async def _fetch(url: str, kind: type[K], seconds: float = HTTP_SECONDS) -> K:
    return http.read(await _http(url, seconds=seconds), kind, url)


def _silent(kind: Literal["broker-lost", "broker-back"], subject: str, reason: object = "") -> None:
    """Where another connection tells."""


# What an address says


def _profile(address: Address, *, secured: bool) -> Profile:
    packed: list[Literal["deflate", "snappy"]] = [
        name for name in ("deflate", "snappy") if _switch(address, name, False)
    ]
    if len(packed) > 1:
        raise AddressError(f"{address}: deflate and snappy exclude each other: take one")
    if packed == ["snappy"]:
        try:
            Snappy()
        except ImportError:
            raise AddressError(f"{address}: snappy=on needs a library: pip install python-snappy") from None
    user, password = credentials(address)
    return Profile(
        heartbeat=address.option("heartbeat", HEARTBEAT, least=1.0),
        msg_timeout=MSG_TIMEOUT,
        sample_rate=0,
        secret=password or user,
        secured=tls_if(secured, address),
        compression=packed[0] if packed else "",
    )


def _bases(address: Address, hosts: Sequence[Host]) -> dict[Host, str]:
    """Where the nsqds answer HTTP, as far as `?http=` says so."""
    named = [urlsplit(f"//{one.removeprefix('http://')}") for one in address.options.get("http", "").split(",") if one]
    try:
        bases = [_url(one.hostname or "", one.port or PORT + 1) for one in named]
    except ValueError:
        bases = []
    if len(bases) != len(named) or len(bases) not in (0, len(hosts)):
        raise AddressError(f"{address}: option http must name one host:port for each nsqd, with commas between")
    return dict(zip(hosts, bases, strict=False))


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _switch(address: Address, name: str, default: bool) -> bool:
    value = address.options.get(name, "on" if default else "off")
    if value not in ("on", "off"):
        raise AddressError(f"{address}: option {name}={value!r} must be on or off")
    return value == "on"
