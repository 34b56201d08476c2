"""One connection to one nsqd on one link: the greeting, what was asked on it, and what was published."""

from __future__ import annotations

import asyncio
import itertools
import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from quintet.connection import Link, Refused, Session
from quintet.errors import CallError, ConnectionLost, Overloaded, ProtocolError, Safety, TooLarge, Unavailable
from quintet.wire import nsq

SILENCE: Final = 2.4  # heart-beats that may fail to come
BATCH: Final = 1 << 18  # bytes that go out in one MPUB
TURN: Final = 1 << 19  # and in one turn of the loop


class Limits(Struct):
    """What nsqd answers to IDENTIFY; times are in milliseconds."""

    version: str = ""
    max_rdy_count: int = 2500
    max_msg_timeout: int = 900_000
    msg_timeout: int = 60_000
    tls_v1: bool = False
    deflate: bool = False
    snappy: bool = False
    auth_required: bool = False


class Delivery(nsq.Arrived):
    """A message that was pushed, with what its user adds about where it came from."""

    tap: Any = None
    session: NSQ | None = None  # that nsqd has it in flight for


class User:
    """Whom a session is for."""

    async def begin(self, session: NSQ) -> None:
        """Subscribes, as the last part of the greeting."""

    def arrived(self, delivery: Delivery) -> None:
        """A message was pushed."""

    def failed(self, failure: nsq.Failure) -> None:
        """nsqd could not do a FIN, REQ or TOUCH: it does not have that message in flight for us."""

    def gone(self, session: NSQ) -> None:
        """The session is lost."""


class Subscriber(User):
    """Makes sure that a topic has a channel, and hears what that brings."""

    def __init__(
        self,
        topic: str,
        channel: str,
        ready: int = 0,
        heard: Callable[[Delivery], None] | None = None,
        *,
        fin: bool = True,
    ) -> None:
        """`ready`: how many messages nsqd may push ahead. `fin`: all is done with; else whoever hears it says so."""
        self.session: NSQ | None = None
        self._subscribe = nsq.sub(topic, channel)
        self._ready = ready
        self._heard = heard
        self._fin = fin

    async def begin(self, session: NSQ) -> None:
        self.session = session
        await session.command(self._subscribe)
        if self._ready:
            session.write(nsq.rdy(min(self._ready, session.limits.max_rdy_count)))

    def arrived(self, delivery: Delivery) -> None:
        if self._heard is not None:
            self._heard(delivery)
        if self._fin:
            self.write(nsq.fin(delivery.id))

    def gone(self, session: NSQ) -> None:
        if self.session is session:
            self.session = None

    def write(self, data: bytes) -> None:
        if self.session is not None:
            self.session.write(data)


class Profile(Struct, frozen=True):
    """How a session presents itself; times are in seconds, `sample_rate` in percent (0 for all messages)."""

    heartbeat: float
    msg_timeout: float
    sample_rate: int
    secret: str
    secured: ssl.SSLContext | None
    compression: Literal["", "deflate", "snappy"]


class NSQ(Session):
    """A connection to one nsqd: what `transport.native` gives.

    `await command(b"PUB topic\\n\\0\\0\\0\\2{}")` sends a command that nsqd answers, and returns the answer;
    `write` is for those that it does not answer (TOUCH, FIN, REQ, RDY, NOP), `limits` is what nsqd said of itself.
    """

    def __init__(self, link: Link, host: tuple[str, int], profile: Profile, user: User) -> None:
        super().__init__(link)
        self.limits = Limits()
        self.write: Callable[[bytes], None] = link.write
        self.declared: set[str] = set()  # topics that are known to keep what is sent to them
        self.host = host
        self._profile = profile
        self._user = user
        self._loop = asyncio.get_running_loop()
        self._frames = nsq.Frames(Delivery)
        self._layer: nsq.Layer | None = None
        self._stepping = False  # only up to the next answer is it known how to read what comes
        self._kept: bytes | None = None  # what came behind that answer
        self._asked: deque[list[asyncio.Future[bytes]]] = deque()  # who waits for the answers, in their order
        self._batches: dict[str, tuple[list[bytes], list[asyncio.Future[bytes]]]] = {}  # of this turn, by topic
        self._denied: CallError | None = None  # after it nsqd hangs up, and reads nothing more
        self._over: Exception | None = None

    def __repr__(self) -> str:
        host, port = self.host
        return f"<connection to nsqd {self.limits.version} at {host}:{port}, {len(self._asked)} answers due>"

    # Sending

    def publish(self, topic: str, body: bytes) -> asyncio.Future[bytes]:
        """Resolved when nsqd has accepted it, with all that is published to the topic in this turn of the loop."""
        future: asyncio.Future[bytes] = self._loop.create_future()
        if self._over is not None:
            future.set_exception(Unavailable(f"not sent: {self._over}"))
            return future
        batch = self._batches.get(topic)
        if batch is None:
            if not self._batches:
                self._loop.call_soon(self._flush)
            batch = self._batches[topic] = ([], [])
        batch[0].append(body)
        batch[1].append(future)
        return future

    def command(self, data: bytes) -> asyncio.Future[bytes]:
        """Sends a command that nsqd answers; resolved with the answer, and fails with CallError where that is one."""
        future: asyncio.Future[bytes] = self._loop.create_future()
        if self._over is not None:
            future.set_exception(Unavailable(f"not sent: {self._over}"))
            return future
        self._flush()
        self._asked.append([future])
        self.write(data)
        return future

    def _flush(self) -> None:
        """Sends what was published in this turn; of large messages one a turn, so that the loop is not kept."""
        batches, written = self._batches, 0
        while batches:
            if written > TURN:
                self._loop.call_soon(self._flush)
                return
            topic = next(iter(batches))
            bodies, futures = batches.pop(topic)
            count = size = 0
            for body in bodies:
                if count and size + len(body) > BATCH:
                    batches[topic] = (bodies[count:], futures[count:])
                    bodies, futures = bodies[:count], futures[:count]
                    break
                size += len(body)
                count += 1
            self._asked.append(futures)
            self.write(nsq.pub(topic, bodies[0]) if count == 1 else nsq.mpub(topic, bodies))
            written += size

    # Session

    async def greet(self) -> None:
        profile, compression = self._profile, self._profile.compression
        features: dict[str, Any] = {
            "client_id": socket.gethostname(),
            "hostname": socket.gethostname(),
            "user_agent": "quintet",
            "feature_negotiation": True,
            "heartbeat_interval": round(profile.heartbeat * 1000),
            "msg_timeout": round(profile.msg_timeout * 1000),
            "sample_rate": profile.sample_rate,
            "tls_v1": profile.secured is not None,
            "deflate": compression == "deflate",
            "snappy": compression == "snappy",
            # nsqd's buffer holds a lone message back for 250 ms. What is deflated it must flush by its clock, 25 ms
            **({"output_buffer_timeout": 25} if compression == "deflate" else {"output_buffer_size": -1}),
        }
        try:
            self.write(nsq.V2)
            said = await self._step(nsq.identify(features))
            try:
                self.limits = msgspec.json.decode(said, type=Limits)
            except (msgspec.DecodeError, RecursionError):
                raise ProtocolError(f"nsqd answered to IDENTIFY with {said[:100]!r}, which is no JSON") from None
            if profile.secured is not None:
                self._insist(self.limits.tls_v1, "TLS", "start it with --tls-cert and --tls-key, or take ?tls=off")
                await self.link.secure(profile.secured, self.host[0])
                await self._step()
            if compression:
                self._insist(getattr(self.limits, compression), compression, f"leave ?{compression}=on away")
                self._layer = nsq.Deflate() if compression == "deflate" else nsq.Snappy()
                self.write = self._pack
            answer = self.command(b"") if compression else None
            self._resume()
            if answer is not None:
                await answer
            if self.limits.auth_required:
                if not profile.secret:
                    raise Refused("nsqd asks for a secret: write nsq://:SECRET@host, or set QUINTET_NSQ_PASSWORD")
                await self.command(nsq.auth(profile.secret))
            self.link.expect(profile.heartbeat * SILENCE)
            await self._user.begin(self)
        except ConnectionLost:
            raise
        except CallError as error:
            raise Refused(f"{self.host[0]}:{self.host[1]}: {error}") from error

    def _insist(self, offered: bool, what: str, instead: str) -> None:
        if not offered:
            raise Refused(f"nsqd at {self.host[0]}:{self.host[1]} does not offer {what}: {instead}")

    async def _step(self, command: bytes = b"") -> bytes:
        """The next answer; what comes behind it is kept until it is known how to read it."""
        answer = self.command(command)
        self._stepping = True
        self._resume()
        return await answer

    def _resume(self) -> None:
        kept, self._kept = self._kept, None
        if kept:
            self.received(kept)

    def _pack(self, data: bytes) -> None:
        assert self._layer is not None  # noqa: S101
        if data:
            self.link.write(self._layer.pack(data))

    def received(self, data: bytes) -> bool:
        if self._kept is not None:
            self._kept += data
            return False
        if self._stepping:
            for end in range(1, len(data) + 1):
                if events := self._frames.feed(data[end - 1 : end]):
                    self._stepping, self._kept = False, data[end:]
                    return self._take(events)
            return False
        if self._layer is None:
            return self._take(self._frames.feed(data))
        taken = [self._take(self._frames.feed(piece)) for piece in self._layer.unpack(data)]
        return any(taken)

    def _take(self, events: Sequence[Delivery | nsq.Response | nsq.Failure]) -> bool:
        arrived = self._user.arrived
        for event in events:
            if type(event) is Delivery:
                arrived(event)
            elif type(event) is nsq.Response:
                if event.body == nsq.HEARTBEAT:
                    self.write(nsq.NOP)
                    continue
                for future in self._next():
                    if not future.done():
                        future.set_result(event.body)
            elif type(event) is nsq.Failure:
                if event.unasked:
                    self._user.failed(event)
                    continue
                self._denied = error = refusal(event)
                for future in self._next():
                    if not future.done():
                        future.set_exception(error)
        return bool(events)

    def _next(self) -> list[asyncio.Future[bytes]]:
        if not self._asked:
            raise ProtocolError("nsqd answered to nothing")
        return self._asked.popleft()

    def lost(self, error: Exception) -> None:
        self._over = error
        for future in itertools.chain.from_iterable(self._asked):
            if self._denied is not None:
                _fail(future, Unavailable(f"not sent: nsqd hung up after another command: {self._denied}"))
            else:
                _fail(future, ConnectionLost(f"sent, and then the connection to nsqd was lost: {error}"))
        for _, futures in self._batches.values():
            for future in futures:
                _fail(future, Unavailable(f"not sent, the connection to nsqd was lost: {error}"))
        self._asked.clear()
        self._batches.clear()
        self._user.gone(self)


def _fail(future: asyncio.Future[bytes], error: CallError) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # looked at, lest it is reported where its sender is gone


class Denied(Unavailable):
    """nsqd will not do that, and hangs up: to ask again is no use."""


def refusal(failure: nsq.Failure) -> CallError:
    """An error of nsqd as one of ours: the one door."""
    code, text = failure.code, failure.text
    says = f"nsqd refuses: {text} ({code})"
    if "too big" in text:
        return TooLarge(f"{says}: raise --max-msg-size and --max-body-size of nsqd, or send less")
    if code == "E_MPUB_FAILED":
        return Overloaded(says, safety=Safety.UNKNOWN)  # some of them may be on disk
    if code in ("E_PUB_FAILED", "E_DPUB_FAILED"):
        return Overloaded(says)
    return Denied(says)
