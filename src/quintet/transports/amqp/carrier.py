"""The transport: opens, closes, sends, serves, and has what is served subscribe again after each loss."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from msgspec import structs

from quintet.clock import SYSTEM, Clock
from quintet.connection import SAYS_BEFORE, TLS_OPTIONS, Connection, Link, credentials, tls_if
from quintet.errors import (
    PROBLEM_MEDIA_TYPE,
    AddressError,
    CallError,
    ChannelFull,
    InvalidMessage,
    Overloaded,
    TransportError,
    Unavailable,
    to_problem,
)
from quintet.message import Channel, Message, Native
from quintet.transport import Address, DeadLetter, Finding, Receive, Trait, Transport
from quintet.transports.amqp.consuming import Consumer, Held
from quintet.transports.amqp.failures import AGAIN_FIRST, AGAIN_LONGEST, NOTICED, WITHIN, sentence
from quintet.transports.amqp.inspection import Tail, examine
from quintet.transports.amqp.letters import Letters
from quintet.transports.amqp.publishing import REPLY_TO, Listening, Publisher, Route
from quintet.transports.amqp.serving import Serving
from quintet.wire.amqp_message import DELAYS
from quintet.wire.amqp_session import Closed, Unroutable, Wire
from quintet.wire.amqp_topology import Queue
from quintet.wire.names import DEAD, PREFIX

HEARTBEAT = 10  # seconds, unless ?heartbeat= says otherwise: a connection that is silent for so long is given up
BODY_MAX = 128 * 1024 * 1024  # RabbitMQ's own default up to 3.13; a smaller limit is learnt when it is met


class Carrier(Transport):
    """amqp://user:password@host:5672,host2/vhost, amqps:// for TLS, with these options behind a "?":

    heartbeat=10     seconds of silence after which a connection is given up
    auth=plain       "external": who we are says the client's certificate (?cert= and ?certkey=)
    ca= cert= certkey= verify=     as of all TLS connections (connection.py)
    """

    traits = frozenset({Trait.FANOUT, Trait.DURABLE, Trait.REDELIVERS, Trait.DELAYS, Trait.ORDERED})
    options: ClassVar[frozenset[str]] = frozenset({"heartbeat", "auth"}) | TLS_OPTIONS
    as_it_is: ClassVar[tuple[Native, ...]] = (Queue(declare=False),)

    def __init__(self, address: Address, clock: Clock = SYSTEM) -> None:
        super().__init__(address, clock)
        self._beat = int(address.option("heartbeat", HEARTBEAT))
        if not 0 <= self._beat <= 3600:
            raise AddressError(f"{address}: option heartbeat must be 0 (none) to 3600 seconds")
        if (auth := address.options.get("auth", "plain")) not in ("plain", "external"):
            raise AddressError(f"{address}: option auth={auth!r} must be plain or external")
        self._external = auth == "external"
        self.publishing: Connection[Publisher] = self._connection(self._publisher)
        self._consuming: Connection[Consumer] | None = None
        self._opening = asyncio.Lock()
        self._letters = Letters(self)
        self._away = 0  # connections that are lost
        self._open = False
        self.largest = BODY_MAX
        self.replies: dict[str, Callable[[Message], None]] = {}
        """What takes the replies to each channel for them that is listened to."""
        self._held: list[Held] = []  # what consumes

    # Transport

    @property
    def connected(self) -> bool:
        return self._open and not self._away

    @property
    def native(self) -> Wire:
        """The connection to publish; `await native.call("queue.purge", queue=...)` does what AMQP can, `native.line()`
        is an AMQP channel of one's own. Raises Unavailable while the broker is away."""
        session = self.publishing.session
        if session is None:
            raise Unavailable(f"{self.address}: the broker is away")
        return session

    async def open(self) -> None:
        await self.publishing.open()
        self._open = True

    async def close(self) -> None:
        self._open = False
        held, self._held = self._held, []
        await asyncio.gather(*(one.abort() for one in held))
        self.replies.clear()
        consuming, self._consuming = self._consuming, None
        if consuming is not None:
            await consuming.close()
        await self.publishing.close()

    async def send(self, message: Message) -> None:
        session = self.publishing.session
        if session is None or session.blocked or session.link.full:
            session = await self._writable(message)
        channel = message.channel
        try:
            if channel.temporary and not channel.fanout:
                session.drop(message)
                return
            route = session.routes.get(channel)
            if route is None:
                session, route = await self._route(message)
            reply_to = REPLY_TO if message.reply_to and message.reply_to in self.replies else ""
            if reply_to and route.waited_for:
                session.ask(message, route)
                return
            try:
                await session.publish(message, route, reply_to)
            except Unroutable:  # its queue was deleted, and the message is nowhere
                session.routes.pop(channel, None)
                await self.clock.sleep(NOTICED)
                session, route = await self._route(message)
                await session.publish(message, route, reply_to)
        except Unroutable:
            raise Unavailable(f"{channel.name} at {self.address}: not sent, its queue is gone or not bound") from None
        except Overloaded as error:
            refused = f"{channel.name} at {self.address}: the broker refused the message"
            if channel.fanout:  # some of its groups may have got it
                raise Overloaded(refused, safety=error.safety) from None
            raise ChannelFull(f"{refused}, its queue is full") from None
        except UnicodeEncodeError as error:
            raise InvalidMessage(f"{message!r} cannot be written as UTF-8: {error}") from None

    async def serve(self, channel: Channel, receive: Receive, group: str, limit: int = 100) -> Serving:
        serving = Serving(self, channel, receive, group, limit)
        await self.begin(serving)
        return serving

    async def listen(self, channel: Channel, arrived: Callable[[Message], None]) -> Listening:
        """Takes replies by RabbitMQ's direct reply-to, which needs no queue."""
        session = await self.publishing.ready(self.clock.now() + WITHIN)
        self.replies[channel.name] = arrived
        try:
            await session.await_replies()
        except TransportError:
            if session.error is None:
                raise  # else the next session does it
        return Listening(self, channel.name)

    # sending

    async def _writable(self, message: Message) -> Publisher:
        """The session, once there is one that takes messages. Raises Unavailable just before the message's `until`, as
        its sender's own time-out could only say that it does not know."""
        until = message.until if message.until is not None else message.deadline
        while True:
            session = await self.publishing.ready(until)
            try:
                async with asyncio.timeout(None if until is None else until - SAYS_BEFORE - self.clock.now()):
                    if session.blocked:
                        await session.unblocked()
                    if session.link.full:
                        await session.link.room()
            except TimeoutError:
                reason = f": {session.blocked}" if session.blocked else ""
                raise Unavailable(f"{self.address}: not sent, the broker takes no messages{reason}") from None
            except (TransportError, OSError):
                continue  # it was lost meanwhile
            if not session.blocked:
                return session

    async def _route(self, message: Message) -> tuple[Publisher, Route]:
        """How to reach a channel over the session that there is. Raises CallError where that cannot be."""
        while True:
            session = await self._writable(message)
            try:
                route = await session.route(message.channel)
            except Closed as error:
                raise Unavailable(sentence(self.address, message.channel.name, error)) from error
            except TransportError as error:
                if session.error is None:
                    raise Unavailable(f"{self.address}: not sent, {error}") from error
            else:
                if session.error is None:
                    return session, route

    async def store(
        self, exchange: str, key: str, message: Message, wanted: Callable[[], bool], *, delay: int = 0
    ) -> bool:
        """Publishes a copy until the broker has it: at least once. False where it is no longer wanted, or where no
        queue takes it although all that can be declared is."""
        pause, laid, bare = AGAIN_FIRST, False, False
        while wanted():
            try:
                session = await self.publishing.ready(self.clock.now() + WITHIN)
            except Unavailable:
                if not self._open:
                    return False
                continue
            try:
                await session.lay_for_copies(delay)
                await session.try_publishing(exchange, key)
                await session.store(exchange, key, message, delay)
            except Unroutable:
                if laid or (exchange != DELAYS and key != DEAD):
                    return False
                laid = True
                session.forget()
            except (InvalidMessage, UnicodeEncodeError):
                if bare:
                    return False
                message, bare = _bare(message), True
            except (CallError, TransportError) as error:
                if isinstance(error, Closed) and pause == AGAIN_FIRST:  # no caller waits for it
                    said = {"message": sentence(self.address, key or exchange, error), "exception": error}
                    asyncio.get_running_loop().call_exception_handler(said)
                await self.clock.sleep(pause)
                pause = min(pause * 2, AGAIN_LONGEST)
            else:
                return True
        return False

    # connections

    def _connection(self, make: Callable[[Link], Any]) -> Connection[Any]:
        secured = self.address.scheme == "amqps"
        port = 5671 if secured else 5672
        return Connection(self.address, port, make, self.clock, self._told, secured=tls_if(secured, self.address))

    def _told(self, kind: Literal["broker-lost", "broker-back"], subject: str, reason: object = "") -> None:
        """Two connections, but one broker: it is away while either is."""
        before = self._away
        self._away += 1 if kind == "broker-lost" else -1
        if not before or not self._away:
            self.tell(kind, subject, reason)

    def _publisher(self, link: Link) -> Publisher:
        return Publisher(link, self, self._options("publishes"))

    def _consumer(self, link: Link) -> Consumer:
        return Consumer(link, self, self._options("consumes"))

    def _options(self, what: str) -> dict[str, Any]:
        user, password = credentials(self.address, "guest", "guest")
        return {
            "address": str(self.address),
            "user": user,
            "password": password,
            "name": f"Quintet {what}, process {os.getpid()} on {socket.gethostname()}",
            "vhost": self.address.path[1:] or "/",
            "beat": self._beat,
            "external": self._external,
        }

    async def consuming(self) -> Connection[Consumer]:
        """The connection to consume, opened when it is first wanted."""
        async with self._opening:
            if not self._open:
                raise Unavailable(f"{self!r} is not open: open() it first, and send and serve before close()")
            if self._consuming is None:
                made: Connection[Consumer] = self._connection(self._consumer)
                await made.open()
                self._consuming = made
            return self._consuming

    def resume(self, wire: Wire) -> None:
        """A consuming connection stands again: all that is served subscribes on it, each on its own account."""
        for one in self._held:
            if one.begun:
                one.resume(wire)

    async def begin(self, one: Held) -> None:
        """Has it subscribed, and from now on again after each loss. Raises TransportError, or Unavailable."""
        self._held.append(one)
        give_up = self.clock.now() + WITHIN
        try:
            while not one.begun:
                wire = await (await self.consuming()).ready(give_up)
                try:
                    await one.subscribe(wire)
                except TransportError:
                    if wire.error is None:
                        raise
                else:
                    one.begun = wire.error is None
        except BaseException:
            one.release()
            raise

    def release(self, one: Held) -> None:
        if one in self._held:
            self._held.remove(one)

    # replies

    def fail(self, correlation: str, name: str, error: CallError) -> None:
        """Tells who waits for a reply that none will come."""
        if name in self.replies:
            reply = Message(channel=Channel(name, temporary=True), correlation_id=correlation, status=error.code)
            reply.media_type, reply.body = PROBLEM_MEDIA_TYPE, to_problem(error)
            self.replies[name](reply)

    # looking in

    async def dead(self, channel: str | None = None) -> Sequence[DeadLetter]:
        return await self._letters.dead(channel)

    async def replay(self, ids: Sequence[str]) -> int:
        return await self._letters.replay(ids)

    async def drop(self, ids: Sequence[str]) -> int:
        return await self._letters.drop(ids)

    def tail(self, channel: str) -> Tail:
        return Tail(self, channel)

    async def examine(self) -> Sequence[Finding]:
        return await examine(self)


def _bare(message: Message) -> Message:
    """A message whose headers do not fit, without its user's: what ours say is kept, as far as it can be written."""
    ours = {
        name: value.encode("utf-8", "replace").decode()
        for name, value in message.headers.items()
        if name.startswith(PREFIX)
    }
    return structs.replace(message, headers=ours)
