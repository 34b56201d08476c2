"""One reconnecting socket under our own wires: several hosts, TLS, back-off, coalesced writes, heart-beats.

A carrier makes a `Connection` with a factory of `Session`s. Each time a socket stands a fresh session greets the broker
on it, declares and subscribes again, and from then on is `connection.session`; it is never used for another socket, so
that nothing which belonged to a lost one (delivery tags, outstanding confirmations) can be taken for the new one's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from quintet.clock import Clock, Handle
from quintet.errors import AddressError, QuintetError, TransportError, Unavailable
from quintet.transport import Address, Tell

CONNECT_SECONDS = 5.0  # that one host may take to be connected and greeted: some accept and then stay silent
FIRST_SECONDS = 5.0  # that `open` goes on trying, before it says that no broker answers
PAUSE_FIRST, PAUSE_LONGEST = 0.05, 1.0  # between two rounds of attempts, growing twofold, half of it by chance
STEADY_SECONDS = 1.0  # that a session must have lasted for the next attempts to begin with the shortest pause
FAREWELL_SECONDS = 1.0
SAYS_BEFORE = 0.02  # seconds before its sender's time is up that a message is said to be not sent
SIGN_OF_LIFE = 64  # bytes that show that the way is open, although they complete no frame; a byte a second does not
BULK = 1 << 15  # bytes of a piece behind which there is more
READ_IN_TURN = 1 << 19  # bytes that are read before the loop gets its turn
WRITTEN_IN_TURN = 1 << 19  # and that are written
UNSENT_HIGH = 1 << 20  # bytes that the socket may lag behind before senders wait

TLS_OPTIONS: Final = frozenset({"ca", "cert", "certkey", "verify"})
"""Options of every address that may be secured; `verify=off` trusts any certificate, for tests."""

S_co = TypeVar("S_co", bound="Session", covariant=True)
S = TypeVar("S", bound="Session")


class Refused(TransportError):
    """The broker will not have us as we come (password, virtual host, version): to try again at once is no use."""


class Lost(TransportError):
    """A socket that is gone; the text says why."""


def credentials(address: Address, user: str = "", password: str = "") -> tuple[str, str]:
    """User and password: of the address, else QUINTET_<SCHEME>_USER and _PASSWORD, else as given here."""
    scheme = address.scheme.partition("+")[0].removesuffix("s").upper()
    return (
        address.user or os.environ.get(f"QUINTET_{scheme}_USER", user),
        address.password or os.environ.get(f"QUINTET_{scheme}_PASSWORD", password),
    )


def tls(address: Address) -> ssl.SSLContext:
    """How the connection is secured: certificates verified against the system's, or those of `?ca=`; a client's own
    certificate by `?cert=` and `?certkey=`. Raises AddressError."""
    options = address.options
    if (verify := options.get("verify", "on")) not in ("on", "off"):
        raise AddressError(f"{address}: option verify={verify!r} must be on or off")
    if "certkey" in options and "cert" not in options:
        raise AddressError(f"{address}: option certkey= is the key of a certificate: name that by cert=")
    for name in ("ca", "cert", "certkey"):
        if name in options and not Path(options[name]).is_file():
            raise AddressError(f"{address}: option {name}={options[name]!r} is no file")
    try:
        context = ssl.create_default_context(cafile=options.get("ca"))
        if "cert" in options:
            context.load_cert_chain(options["cert"], options.get("certkey"))
    except ssl.SSLError as error:
        raise AddressError(f"{address}: its certificates cannot be read: {error}") from None
    if verify == "off":
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def tls_if(wanted: bool, address: Address) -> ssl.SSLContext | None:
    """The same where TLS is wanted; where it is not, the address may not say how. Raises AddressError."""
    if wanted:
        return tls(address)
    if given := sorted(TLS_OPTIONS & address.options.keys()):
        secured = f"{address.scheme.partition('+')[0]}s"
        raise AddressError(
            f"{address}: option {given[0]}= is for TLS, which this address does not ask for: {secured}://"
        )
    return None


class Link(asyncio.Protocol):
    """One live socket. What is written in one turn of the loop goes out together, but does not wait for others where
    the turn before brought none."""

    def __init__(self, clock: Clock) -> None:
        self.error: Exception | None = None
        self.session: Session | None = None
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._out: list[bytes] = []
        self._turn = False  # something was written in this turn of the loop
        self._lone = False  # in the last turn with anything there was one write
        self._early: list[bytes] = []  # what came before there was a session
        self._transport: Any = None
        self._lost: asyncio.Future[None] = self._loop.create_future()
        self._room: asyncio.Future[None] | None = None  # there while no more should be written
        self._lags = False  # the socket does, behind what it was given
        self._beats: list[Handle] = []
        self._heard = self._wrote = clock.now()
        self._bulk = 0  # bytes that came in large pieces
        self._unsent = 0  # bytes in large pieces that were written in this turn of the loop

    def __repr__(self) -> str:
        return f"<link{f', lost: {self.error}' if self._lost.done() else ''}>"

    # what sessions use

    def write(self, data: bytes) -> None:
        """Sends the bytes, with all that is written in this turn of the loop; nothing once the socket is gone."""
        if not self._turn:
            self._turn = True
            self._loop.call_soon(self._end_turn)
            if self._lone and len(data) < BULK:
                self._out.append(data)
                self._flush()
                return
        self._out.append(data)
        if len(data) >= BULK:
            self._unsent += len(data)
            if self._unsent >= WRITTEN_IN_TURN and self._room is None:
                self._room = self._loop.create_future()

    @property
    def full(self) -> bool:
        """The socket lags behind, or much was written in this turn of the loop: await `room()` before more is."""
        return self._room is not None

    async def room(self) -> None:
        """Waits until the socket has caught up. Raises Lost."""
        while self._room is not None:
            await asyncio.shield(self._room)
        if self._lost.done():
            reason = self._reason()
            raise reason if isinstance(reason, TransportError) else Lost(_sentence(reason))

    def beat(self, every: float, data: bytes) -> None:
        """Writes `data` whenever nothing was written for so many seconds."""
        self._watch(every, lambda: self._wrote, lambda: self.write(data))

    def expect(self, within: float) -> None:
        """Gives the socket up when nothing has come for so many seconds."""
        self._watch(within, lambda: self._heard, lambda: self.drop(Lost(f"the broker was silent for {within:g} s")))

    def drop(self, error: Exception) -> None:
        """Gives the socket up at once, for this reason."""
        self.error = self.error or error
        if self._transport is not None:
            self._transport.abort()

    async def secure(self, context: ssl.SSLContext, host: str) -> None:
        """From plain to TLS on the same socket, where the protocol asks for that in the middle of its greeting."""
        self._flush()
        self._transport = await self._loop.start_tls(self._transport, self, context, server_hostname=host)

    # asyncio.Protocol

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.set_write_buffer_limits(high=UNSENT_HIGH)

    def data_received(self, data: bytes) -> None:
        if self.session is None:
            self._early.append(data)
            return
        if len(data) >= BULK:
            self._bulk += len(data)
            if self._bulk >= READ_IN_TURN:  # a loop that reads on as long as there is more keeps all others waiting
                self._bulk = 0
                self._transport.pause_reading()
                self._loop.call_soon(self._read_on)
        try:
            incomplete = self.session.received(data) is False
        except Exception as error:
            self.drop(error)
            return
        if not incomplete or len(data) >= SIGN_OF_LIFE:
            self._heard = self._clock.now()

    def _read_on(self) -> None:
        if not self._lost.done():
            self._transport.resume_reading()

    def pause_writing(self) -> None:
        self._lags = True
        self._room = self._room or self._loop.create_future()

    def resume_writing(self) -> None:
        self._lags = False
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = self.error or exc
        for beat in self._beats:
            beat.cancel()
        self.resume_writing()
        self._out.clear()
        if not self._lost.done():
            self._lost.set_result(None)

    # inside

    def begin(self, session: Session) -> None:
        """From now on what comes goes to the session."""
        self.session = session
        early, self._early = self._early, []
        for data in early:
            self.data_received(data)

    async def lost(self) -> Exception:
        """Waits until the socket is gone, and says why."""
        await asyncio.shield(self._lost)
        return self._reason()

    async def end(self) -> None:
        """Sends what is written, closes the socket, waits until it is gone."""
        self._flush()
        if self._transport is not None:
            self._transport.close()
            try:
                async with asyncio.timeout(FAREWELL_SECONDS):
                    await asyncio.shield(self._lost)
            except TimeoutError:
                self._transport.abort()
                await asyncio.shield(self._lost)

    def _reason(self) -> Exception:
        return self.error or Lost("the broker closed the connection")

    def _end_turn(self) -> None:
        waiting = len(self._out)
        self._turn, self._lone = False, waiting == 0 if self._lone else waiting == 1
        self._flush()

    def _flush(self) -> None:
        out = self._out
        if not out or self._lost.done():
            return
        self._out = []
        self._wrote = self._clock.now()
        self._unsent = 0
        self._transport.write(out[0] if len(out) == 1 else b"".join(out))
        if self._room is not None and not self._lags:
            self.resume_writing()

    def _watch(self, seconds: float, last: Callable[[], float], act: Callable[[], None]) -> None:
        """Acts whenever so much time has passed since `last()`."""
        place = len(self._beats)

        def look() -> None:
            if self._lost.done():
                return
            due = last() + seconds
            if due <= self._clock.now():
                act()
                due = self._clock.now() + seconds
            self._beats[place] = self._clock.call_at(due, look)

        self._beats.append(self._clock.call_at(self._clock.now() + seconds, look))


class Session(ABC):
    """A wire's protocol on one link, with what the carrier wants of it."""

    def __init__(self, link: Link) -> None:
        self.link = link

    @abstractmethod
    async def greet(self) -> None:
        """Shakes hands, declares, subscribes: after it the session is in use. Raises Refused, or anything else where
        it is worth trying again. It is given CONNECT_SECONDS."""

    @abstractmethod
    def received(self, data: bytes) -> bool | None:
        """Takes bytes as they come. What it raises ends the link, with that reason. False: they completed nothing, so
        that a few of them are no sign of life."""

    @abstractmethod
    def lost(self, error: Exception) -> None:
        """The link is gone, and with it all that was outstanding. Called once, also where `greet` had failed."""

    async def farewell(self) -> None:  # noqa: B027 - some wires just hang up
        """Takes leave of the broker before the link is closed; given FAREWELL_SECONDS."""


class Connection(Generic[S]):
    """Keeps one session with one of an address's hosts, for ever, until it is closed."""

    def __init__(
        self,
        address: Address,
        port: int,
        session: Callable[[Link], S],
        clock: Clock,
        tell: Tell,
        *,
        secured: ssl.SSLContext | None = None,
        hosts: tuple[tuple[str, int | None], ...] = (),
    ) -> None:
        """`port`: where an address names none. `secured`: TLS from the first byte (`tls_if`). `hosts`: others than the
        address's. `tell` hears of the loss of the connection and of its return, not of the first one."""
        self.address = address
        self.session: S | None = None
        self._hosts = [(host or "127.0.0.1", number or port) for host, number in hosts or address.hosts]
        self._make = session
        self._clock = clock
        self._tell = tell
        self._tls = secured
        self._keeper: asyncio.Task[None] | None = None
        self._up: asyncio.Future[None] | None = None  # resolved when there is a session
        self._error: Exception | None = None  # why there is none
        self._closed = False

    def __repr__(self) -> str:
        state = "up" if self.session else "closed" if self._closed else f"away: {self._error}"
        return f"<connection to {self.address}, {state}>"

    @property
    def host(self) -> tuple[str, int]:
        """The host and port in use, or tried next."""
        return self._hosts[0]

    def aim(self, hosts: Sequence[tuple[str, int]]) -> None:
        """The hosts that there are from now on; the one in use is kept, and tried first if it is still one of them."""
        self._hosts = sorted(hosts, key=lambda host: host != self._hosts[0])

    async def open(self) -> None:
        """Connects. Raises Refused at once, and Unavailable where no host answers for some seconds."""
        give_up = self._clock.now() + FIRST_SECONDS
        pause = PAUSE_FIRST
        while True:
            try:
                link, session = await self._connect()
            except Refused:
                raise
            except ssl.SSLCertVerificationError as error:
                raise Refused(f"{self.address}: its certificate is not trusted: {error.verify_message}") from None
            except Exception as error:
                if self._clock.now() + pause >= give_up:
                    raise Unavailable(f"{self.address}: no broker answers there: {_sentence(error)}") from error
                await self._clock.sleep(pause)
                pause = min(pause * 2, PAUSE_LONGEST)
            else:
                break
        self._keeper = asyncio.get_running_loop().create_task(self._keep(link, session))
        try:
            await asyncio.sleep(0)  # a keeper that is cancelled before it has begun would leave the socket open
        except BaseException:
            await self.close()
            raise

    async def ready(self, until: float | None) -> S:
        """The session, as soon as there is one. Raises Unavailable (not sent) where there is none by `until`, which is
        monotonic time in seconds; None waits for ever. It says so a moment before the caller's own time-out would,
        which could only say that it does not know."""
        while self.session is None:
            if self._closed or self._keeper is None:
                raise Unavailable(f"{self.address} is not open: open it first, and send before it is closed")
            self._up = self._up or asyncio.get_running_loop().create_future()
            timer = None if until is None else self._clock.call_at(until - SAYS_BEFORE, self._wake)
            try:
                await asyncio.shield(self._up)
            finally:
                if timer is not None:
                    timer.cancel()
            if self.session is None and until is not None and self._clock.now() >= until - SAYS_BEFORE:
                raise Unavailable(f"{self.address}: not sent, the broker is away: {_sentence(self._error)}")
        return self.session

    async def close(self) -> None:
        """Takes leave and frees the socket; also when called twice."""
        self._closed = True
        keeper, self._keeper = self._keeper, None
        session = self.session
        if session is not None:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(FAREWELL_SECONDS):
                    await session.farewell()
        if keeper is not None:
            keeper.cancel()
            await asyncio.wait([keeper])
        self._wake()

    def _wake(self) -> None:
        up, self._up = self._up, None
        if up is not None and not up.done():
            up.set_result(None)

    async def _keep(self, link: Link, session: S) -> None:
        """Has a session at all times, as far as the broker lets it."""
        pause = PAUSE_FIRST
        while True:
            self.session, since = session, self._clock.now()
            self._wake()
            try:
                self._error = await link.lost()
            finally:
                self.session = None
                if self._closed:
                    await link.end()
                session.lost(self._error or Lost("the connection was closed"))
            self._tell("broker-lost", str(self.address), _sentence(self._error))
            if self._clock.now() >= since + STEADY_SECONDS:
                pause = PAUSE_FIRST
            else:  # welcomed, and then thrown out at once
                pause = await self._pause(pause)
            while True:
                try:
                    link, session = await self._connect()
                except Exception as error:
                    self._error = error
                    pause = await self._pause(pause)
                else:
                    break
            self._tell("broker-back", str(self.address))

    async def _pause(self, seconds: float) -> float:
        """Waits about so long, half of it by chance; gives how long to wait the next time."""
        await self._clock.sleep(seconds * (0.5 + self._clock.random.random() / 2))
        return min(seconds * 2, PAUSE_LONGEST)

    async def _connect(self) -> tuple[Link, S]:
        """Tries each host in turn, first the one that was well the last time. Raises Refused where all of them refuse:
        one alone may be full, or about to go."""
        errors: list[Exception] = []
        for _ in range(len(self._hosts)):
            try:
                return await self._reach(*self._hosts[0])
            except (QuintetError, OSError, TimeoutError) as error:
                errors.append(error)
                self._hosts.append(self._hosts.pop(0))
        raise next((error for error in errors if not isinstance(error, Refused)), errors[0])

    async def _reach(self, host: str, port: int) -> tuple[Link, S]:
        loop = asyncio.get_running_loop()
        link = Link(self._clock)
        session: S | None = None
        limit = asyncio.timeout(CONNECT_SECONDS)
        try:
            async with limit:
                await loop.create_connection(
                    lambda: link, host, port, ssl=self._tls, server_hostname=host if self._tls else None
                )
                session = self._make(link)
                link.begin(session)
                greeting = asyncio.ensure_future(session.greet())
                gone = asyncio.ensure_future(link.lost())
                try:
                    await asyncio.wait([greeting, gone], return_when=asyncio.FIRST_COMPLETED)
                    if not greeting.done():
                        raise gone.result()
                    greeting.result()
                finally:
                    for task in (greeting, gone):
                        task.cancel()
                    await asyncio.gather(greeting, gone, return_exceptions=True)
        except BaseException as error:
            reason = link.error or error
            if limit.expired():
                reason = Lost(f"{host}:{port} did not answer within {CONNECT_SECONDS:g} s")
            link.drop(Lost("it was given up"))
            if session is not None:
                session.lost(reason if isinstance(reason, Exception) else Lost("it was given up"))
            if isinstance(error, Exception) and isinstance(reason, Exception):
                raise reason from None
            raise
        return link, session


def _sentence(error: BaseException | None) -> str:
    return "" if error is None else str(error) or type(error).__name__
