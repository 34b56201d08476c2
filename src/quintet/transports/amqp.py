"""RabbitMQ over AMQP 0-9-1: one connection to publish, one to consume.

What stands on the broker is in `wire/amqp_topology.py`, how a message looks in `wire/amqp_message.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import Any, ClassVar, Final, Literal, Self

from msgspec import Struct, structs

from quintet.clock import SYSTEM, Clock
from quintet.connection import SAYS_BEFORE, TLS_OPTIONS, Connection, Link, Lost, Refused, credentials, tls_if
from quintet.errors import (
    PROBLEM_MEDIA_TYPE,
    AddressError,
    CallError,
    ChannelFull,
    ConnectionLost,
    InvalidMessage,
    Overloaded,
    ProtocolError,
    TooLarge,
    TransportError,
    Unavailable,
    to_problem,
)
from quintet.intake import Intake
from quintet.letters import letter, revive
from quintet.message import Channel, Message, native_of, new_id
from quintet.transport import Address, DeadLetter, Finding, Receive, Trait, Transport
from quintet.wire import amqp
from quintet.wire.amqp import Content, settle
from quintet.wire.amqp_message import DELAYS, properties, properties_of, read, read_dead, read_death
from quintet.wire.amqp_session import Closed, Line, Outlet, Unroutable, Wire
from quintet.wire.amqp_topology import (
    AGAIN,
    EXCHANGE,
    TAILS,
    Place,
    Publish,
    Queue,
    place_of,
    wait,
)
from quintet.wire.names import DEAD, PREFIX

__all__ = ["Carrier", "Publish", "Queue"]

REPLY_TO: Final = "amq.rabbitmq.reply-to"
"""RabbitMQ's pseudo queue for replies: whoever consumes it gets those to the requests of the same AMQP channel."""

HEARTBEAT = 10  # seconds, unless ?heartbeat= says otherwise: a connection that is silent for so long is given up
BODY_MAX = 128 * 1024 * 1024  # RabbitMQ's own default up to 3.13; a smaller limit is learnt when it is met
PREFETCH_KEYED = 4  # times the limit: so many may wait behind others of their key
PREFETCH_MAX = 65_535
WITHIN = 5.0  # seconds that the broker may be away when something is served or looked at
CLOSING_SECONDS = 2.0  # for an answer, when something is closed
AGAIN_FIRST, AGAIN_LONGEST = 0.05, 1.0  # seconds until something that the broker refused is tried once more
ASKED_KEPT = 10_000  # requests whose loss is told to who waits for the reply; older ones have long timed out
ROUTES_KEPT = 1000  # of those who wait for replies
NOTICED = 0.1  # until a queue that was deleted is declared again: who consumed it must have heard of it by then
IDLE = 30.0  # seconds without a delivery after which a consumer of a quorum queue subscribes anew
TAIL_SECONDS = 2.0  # between two times that a tail says it is there
TAIL_KEPT = 10_000  # messages that a tail may lag behind; the oldest go first
LETTERS_SECONDS = 15.0  # that one who looks at the dead letters waits for another who does
LETTERS_SHOWN = 10_000  # dead letters at a time
LOOKING: Final = f"{DEAD}.looking"
"""The queue whose owner looks at the dead letters."""


class Carrier(Transport):
    """amqp://user:password@host:5672,host2/vhost, amqps:// for TLS, with these options behind a "?":

    heartbeat=10     seconds of silence after which a connection is given up
    auth=plain       "external": who we are says the client's certificate (?cert= and ?certkey=)
    ca= cert= certkey= verify=     as of all TLS connections (connection.py)
    """

    traits = frozenset({Trait.FANOUT, Trait.DURABLE, Trait.REDELIVERS, Trait.DELAYS, Trait.ORDERED})
    options: ClassVar[frozenset[str]] = frozenset({"heartbeat", "auth"}) | TLS_OPTIONS

    def __init__(self, address: Address, clock: Clock = SYSTEM) -> None:
        super().__init__(address, clock)
        self._beat = int(address.option("heartbeat", HEARTBEAT))
        if not 0 <= self._beat <= 3600:
            raise AddressError(f"{address}: option heartbeat must be 0 (none) to 3600 seconds")
        if (auth := address.options.get("auth", "plain")) not in ("plain", "external"):
            raise AddressError(f"{address}: option auth={auth!r} must be plain or external")
        self._external = auth == "external"
        self._publishing: Connection[_Publisher] = self._connection(self._publisher)
        self._consuming: Connection[_Consumer] | None = None
        self._opening = asyncio.Lock()
        self._looking = asyncio.Lock()  # at the dead letters
        self._away = 0  # connections that are lost
        self._open = False
        self.largest = BODY_MAX
        self.replies: dict[str, Callable[[Message], None]] = {}
        """What takes the replies to each channel for them that is listened to."""
        self._held: list[_Held] = []  # what consumes

    # Transport

    @property
    def connected(self) -> bool:
        return self._open and not self._away

    @property
    def native(self) -> Wire:
        """The connection to publish; `await native.call("queue.purge", queue=...)` does what AMQP can, `native.line()`
        is an AMQP channel of one's own. Raises Unavailable while the broker is away."""
        session = self._publishing.session
        if session is None:
            raise Unavailable(f"{self.address}: the broker is away")
        return session

    async def open(self) -> None:
        await self._publishing.open()
        self._open = True

    async def close(self) -> None:
        self._open = False
        held, self._held = self._held, []
        await asyncio.gather(*(one.abort() for one in held))
        self.replies.clear()
        consuming, self._consuming = self._consuming, None
        if consuming is not None:
            await consuming.close()
        await self._publishing.close()

    async def send(self, message: Message) -> None:
        session = self._publishing.session
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

    async def serve(self, channel: Channel, receive: Receive, group: str, limit: int = 100) -> _Serving:
        serving = _Serving(self, channel, receive, group, limit)
        await self.begin(serving)
        return serving

    async def listen(self, channel: Channel, arrived: Callable[[Message], None]) -> _Listening:
        """Takes replies by RabbitMQ's direct reply-to, which needs no queue."""
        session = await self._publishing.ready(self.clock.now() + WITHIN)
        self.replies[channel.name] = arrived
        try:
            await session.await_replies()
        except TransportError:
            if session.error is None:
                raise  # else the next session does it
        return _Listening(self, channel.name)

    # sending

    async def _writable(self, message: Message) -> _Publisher:
        """The session, once there is one that takes messages. Raises Unavailable just before the message's `until`, as
        its sender's own time-out could only say that it does not know."""
        until = message.until if message.until is not None else message.deadline
        while True:
            session = await self._publishing.ready(until)
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

    async def _route(self, message: Message) -> tuple[_Publisher, _Route]:
        """How to reach a channel over the session that there is. Raises CallError where that cannot be."""
        while True:
            session = await self._writable(message)
            try:
                route = await session.route(message.channel)
            except Closed as error:
                raise Unavailable(_sentence(self.address, message.channel.name, error)) from error
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
                session = await self._publishing.ready(self.clock.now() + WITHIN)
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
                    said = {"message": _sentence(self.address, key or exchange, error), "exception": error}
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

    def _publisher(self, link: Link) -> _Publisher:
        return _Publisher(link, self, self._options("publishes"))

    def _consumer(self, link: Link) -> _Consumer:
        return _Consumer(link, self, self._options("consumes"))

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

    async def consuming(self) -> Connection[_Consumer]:
        """The connection to consume, opened when it is first wanted."""
        async with self._opening:
            if not self._open:
                raise Unavailable(f"{self!r} is not open: open() it first, and send and serve before close()")
            if self._consuming is None:
                made: Connection[_Consumer] = self._connection(self._consumer)
                await made.open()
                self._consuming = made
            return self._consuming

    def resume(self, wire: Wire) -> None:
        """A consuming connection stands again: all that is served subscribes on it, each on its own account."""
        for one in self._held:
            if one.begun:
                one.resume(wire)

    async def begin(self, one: _Held) -> None:
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

    def release(self, one: _Held) -> None:
        if one in self._held:
            self._held.remove(one)

    # replies

    def fail(self, correlation: str, name: str, error: CallError) -> None:
        """Tells who waits for a reply that none will come."""
        if name in self.replies:
            reply = Message(channel=Channel(name, temporary=True), correlation_id=correlation, status=error.code)
            reply.media_type, reply.body = PROBLEM_MEDIA_TYPE, to_problem(error)
            self.replies[name](reply)

    # Letters

    async def dead(self, channel: str | None = None) -> Sequence[DeadLetter]:
        """The first LETTERS_SHOWN of them."""
        found: list[DeadLetter] = []

        async def look(content: Content) -> bool:
            one = letter(read_dead(content, self.clock))
            if channel in (None, one.channel):
                found.append(one)
            return False

        await self._letters(look, lambda seen: seen == LETTERS_SHOWN)
        return sorted(found, key=lambda one: one.died_at)

    async def replay(self, ids: Sequence[str]) -> int:
        async def again(content: Content) -> bool:
            give_up = self.clock.now() + WITHIN
            message, group = revive(read_dead(content, self.clock))
            name = message.channel.name
            queue = f"{name}@{group}" if message.channel.fanout else name
            return await self.store("", queue, message, lambda: self.clock.now() < give_up)

        return await self._take(ids, again)

    async def drop(self, ids: Sequence[str]) -> int:
        async def nothing(_: Content) -> bool:
            return True

        return await self._take(ids, nothing)

    async def _take(self, ids: Iterable[str], act: Callable[[Content], Awaitable[bool]]) -> int:
        """Takes those dead letters out of their queue on which `act` succeeds, and returns how many those were."""
        wanted, taken = set(ids), 0

        async def look(content: Content) -> bool:
            nonlocal taken
            id_ = letter(read_dead(content, self.clock)).id
            if id_ not in wanted or not await act(content):
                return False
            wanted.discard(id_)
            taken += 1
            return True

        await self._letters(look, lambda _: not wanted)
        return taken

    async def _letters(self, take: Callable[[Content], Awaitable[bool]], enough: Callable[[int], bool]) -> None:
        """Shows each dead letter to `take`, until there are no more or `enough`, which is asked with how many were
        seen; deletes those that it took, and puts the others back."""
        wire = await (await self.consuming()).ready(self.clock.now() + WITHIN)
        try:
            await wire.lay_dead()
            async with self._looking, self._alone(wire):
                line, seen, left = await wire.line(), 0, 0
                try:
                    # One by one: each answer proves that the acknowledgement before it was carried out, where a burst
                    # of them with the channel's end behind it is forgotten in part.
                    while isinstance(content := await line.call("basic.get", queue=DEAD), Content):
                        if enough(seen):
                            left += 1
                            break
                        seen += 1
                        if await take(content):
                            line.tell("basic.ack", delivery_tag=content.tag)
                        else:
                            left += 1
                finally:
                    await line.close()
                await self._settled(wire, left)
        except Closed as error:
            raise TransportError(_sentence(self.address, DEAD, error)) from error

    @contextlib.asynccontextmanager
    async def _alone(self, wire: Wire) -> AsyncGenerator[None]:
        """Lets one look at the dead letters at a time, as two would each see a part of them: a queue that belongs to
        one connection says who. Raises TransportError where another goes on and on."""
        give_up = self.clock.now() + LETTERS_SECONDS
        while True:
            try:
                await wire.call("queue.declare", queue=LOOKING, exclusive=True, arguments={"x-queue-type": "classic"})
                break
            except Closed as error:
                if error.code == 403:  # who may look, and not declare
                    yield
                    return
                if error.code != 405:
                    raise
                if self.clock.now() >= give_up:
                    raise TransportError(
                        f"{self.address}: another looks at the dead letters, try again later"
                    ) from None
            await self.clock.sleep(AGAIN_FIRST)
        try:
            yield
        finally:
            with contextlib.suppress(TransportError):
                await wire.call("queue.delete", queue=LOOKING)

    async def _settled(self, wire: Wire, count: int) -> None:
        """Waits until so many dead letters are back in their queue, for whoever looks next."""
        give_up = self.clock.now() + WITHIN
        line = await wire.line()
        while await _waiting(line) < count and self.clock.now() < give_up:
            await self.clock.sleep(0.005)
        await line.close()

    # Tailing

    def tail(self, channel: str) -> _Tail:
        return _Tail(self, channel)

    async def announce(self, pattern: str) -> None:
        await (await self._publishing.ready(self.clock.now() + WITHIN)).announce(pattern)

    # the doctor

    async def examine(self) -> Sequence[Finding]:
        session = await self._publishing.ready(self.clock.now() + WITHIN)
        server = session.server
        found = [
            Finding("version", f"{server.get('product', '?')} {server.get('version', '?')}"),
            Finding("cluster", str(server.get("cluster_name", "not told"))),
            Finding("agreed on", f"frames of {session.frame_max} bytes, a heart-beat each {session.heartbeat / 2:g} s"),
            Finding("takes messages", session.blocked or "yes", well=not session.blocked),
        ]
        for what, able, otherwise in (
            ("publisher confirms", "publisher_confirms", "messages would be lost without a word: take RabbitMQ"),
            ("notice of cancelled consumers", "consumer_cancel_notify", "a deleted queue would be served in vain"),
            ("notice of being blocked", "connection.blocked", "senders would wait without knowing why"),
        ):
            has = bool(server.get("capabilities", {}).get(able))
            found.append(Finding(what, "yes" if has else otherwise, well=has))
        found.append(await self._try_out("durable channels", self._try_quorum(session)))
        found.append(await self._try_out("delayed redelivery", self._try_delay(session)))
        return found

    async def _try_out(self, what: str, trial: Awaitable[str]) -> Finding:
        try:
            async with asyncio.timeout(WITHIN):
                return Finding(what, await trial)
        except TimeoutError:
            return Finding(what, f"no answer within {WITHIN:g} s", well=False)
        except (TransportError, CallError, KeyError) as error:
            return Finding(what, f"not possible: {error}; users need the rights on names like ^quintet", well=False)

    async def _try_quorum(self, session: _Publisher) -> str:
        name = f"quintet.doctor.{new_id()}"
        arguments = {"x-queue-type": "quorum", "x-expires": 60_000}
        await session.call("queue.declare", queue=name, durable=True, arguments=arguments)
        await session.call("queue.delete", queue=name)
        return "quorum queues"

    async def _try_delay(self, session: _Publisher) -> str:
        wire = await (await self.consuming()).ready(None)
        name, arrived = f"quintet.doctor.{new_id()}", asyncio.Queue[Content]()
        line = await wire.line()
        try:
            await session.lay_for_copies(100)
            await line.call("queue.declare", queue=name, exclusive=True, arguments={"x-queue-type": "classic"})
            await line.call("queue.bind", queue=name, exchange=AGAIN, routing_key=name)
            wire.consumers[name.encode()] = arrived.put_nowait
            await line.call("basic.consume", queue=name, consumer_tag=name, no_ack=True)
            begun = self.clock.now()
            await session.store(DELAYS, name, Message(channel=Channel(name), id=name), 100)
            content = await arrived.get()
            took = self.clock.now() - begun
            skew = self.clock.wall() - float(read_death(content)["time"].timestamp())
            clocks = f"; its clock is {skew:+.0f} s off ours" if abs(skew) > 2 else ""
            return f"asked for 100 ms, got {1000 * took:.0f} ms{clocks}"
        finally:
            wire.consumers.pop(name.encode(), None)
            await line.close()


def _sentence(address: Address, name: str, error: Closed) -> str:
    """What the broker says, and what to do."""
    advice = {
        403: "give the user the right to configure, write and read it",
        404: "declare it, or leave that to Quintet",
        405: "another connection holds it",
        406: "it is there with other arguments: delete it, or take it as it is, with native=[Queue(declare=False)]",
    }.get(error.code, "")
    return f"{name} at {address}: {error}{f'; {advice}' if advice else ''}"


# ---------------------------------------------------------------------------------------------------------- publishing


class _Route(Struct, frozen=True):
    """What comes before the content of each message to a channel."""

    confirmed: bytes
    asking: bytes
    watched: bytes
    """As `asking`, by the exchange where tails see it."""
    durable: bool
    waited_for: bool
    """A request: to publish it nobody waits for a confirmation, as its reply is one."""


class _Publisher(Wire):
    """The connection to publish: one AMQP channel with confirmations, and one without, for requests and replies, whose
    caller learns by the reply, or by the lack of it, what became of them."""

    outlet: Outlet
    plain: Line

    def __init__(self, link: Link, carrier: Carrier, options: dict[str, Any]) -> None:
        super().__init__(link, carrier.clock, **options)
        self.carrier = carrier
        self.routes: dict[Channel, _Route] = {}
        self.asked: dict[str, str] = {}
        """By correlation, where its reply is waited for: requests that have none yet."""
        self._routing: dict[Channel, asyncio.Task[_Route]] = {}
        self._replying: dict[str, bytes] = {}  # by where to
        self._listens = False
        self._tails: dict[str, float] = {}  # patterns of who watches, and until when that holds
        self._hears: asyncio.Task[None] | None = None

    async def greet(self) -> None:
        await super().greet()
        self.outlet, self.plain = await asyncio.gather(self.open(Outlet), self.open(_Plain))
        self.outlet.ended = self.plain.ended = self._broken
        try:
            await asyncio.gather(self.outlet.begin(), self.lay_exchange(EXCHANGE))
        except Closed as error:
            raise Refused(_sentence(self.carrier.address, f"exchange {EXCHANGE}", error)) from None
        if self.carrier.replies:
            await self.await_replies()

    def _broken(self, error: Exception) -> None:
        """The broker closed what we publish on, over a message or since an exchange is gone: it is opened again in the
        same place, and all that was known of what we may send to is found out anew."""
        if self.error is not None:
            return
        if "configured max size" in str(error):
            with contextlib.suppress(ValueError):
                self.carrier.largest = int(str(error).rpartition(" ")[2])
        self.forget()
        self.routes.clear()
        if self.outlet.error is not None:
            outlet = self.outlet = self.reopen(self.outlet)
            self._begin(outlet, outlet.begin())
        if self.plain.error is not None:
            self.plain = self.reopen(self.plain)
            self._begin(self.plain)
            self._unanswered(error)

    def _begin(self, line: Line, begun: asyncio.Future[Any] | None = None) -> None:
        """Makes a channel ready that was opened again; one that the broker closes before that takes the connection with
        it."""

        def stands(_: object) -> None:
            if line.error is None:
                line.ended = self._broken

        line.ended = lambda error: self.link.drop(Lost(f"the broker closed the AMQP channel to publish on: {error}"))
        if self._listens:
            begun = self._take_replies(line)
        if begun is None:
            stands(line)
        else:
            begun.add_done_callback(stands)

    async def await_replies(self) -> None:
        if self._listens:
            return
        self._listens = True
        for line in (self.plain, self.outlet):  # replies come to the AMQP channel that the request went out on
            await self._take_replies(line)

    def _take_replies(self, line: Line) -> asyncio.Future[Any]:
        tag = f"quintet.replies.{line.number}"
        self.consumers[tag.encode()] = self._replied
        return line.call("basic.consume", queue=REPLY_TO, consumer_tag=tag, no_ack=True)

    def _replied(self, content: Content) -> None:
        reply = read(content, _REPLIES, self.clock)
        self.asked.pop(reply.correlation_id, None)
        for arrived in self.carrier.replies.values():  # there is one; each knows its own by their correlation
            arrived(reply)

    async def route(self, channel: Channel) -> _Route:
        """Declares what the channel needs, once for all who send at the same time."""
        task = self._routing.get(channel)
        if task is None:
            task = self._routing[channel] = self.loop.create_task(self._find(channel))
            task.add_done_callback(
                lambda task: (self._routing.pop(channel, None), task.cancelled() or task.exception())
            )
        return await asyncio.shield(task)

    async def _find(self, channel: Channel) -> _Route:
        waited_for = not channel.durable and not channel.fanout
        await self.lay_exchange(EXCHANGE)
        await self._check_rights(channel, "" if waited_for else EXCHANGE)
        if waited_for:
            with contextlib.suppress(Closed):  # who may not write to where it is seen sends unseen
                await self.try_publishing(EXCHANGE, channel.name)
                await self._hear_of_tails()
        if not channel.fanout:
            place = place_of(channel, "", lasting=self.lasting)
            line = await self.line()
            try:
                await line.call("queue.declare", queue=place.queue, passive=True)
            except Closed as error:
                if error.code == 404:
                    await self._lay_unless_there(place, channel)
                elif error.code != 403:  # who may not look may still send
                    raise
            else:
                with contextlib.suppress(Closed):  # it is bound already, if we may not
                    await asyncio.gather(*self.bindings(line, place, channel))
            finally:
                await line.close()
        route = _Route(
            amqp.publishing(self.outlet.number, EXCHANGE, channel.name, mandatory=not channel.fanout),
            amqp.publishing(self.plain.number, "", channel.name, mandatory=True),
            amqp.publishing(self.plain.number, EXCHANGE, channel.name, mandatory=True),
            channel.durable,
            waited_for,
        )
        self.routes[channel] = route
        return route

    async def _lay_unless_there(self, place: Place, channel: Channel) -> None:
        try:
            await self.lay(place, channel)
        except Closed as error:
            if error.code != 406:  # who serves it was first, with options of its own
                raise

    async def _check_rights(self, channel: Channel, exchange: str) -> None:
        """Raises Unavailable, with the right that is missing."""
        try:
            await self.try_publishing(exchange, channel.name)
        except Closed as error:
            if error.code != 403:
                raise
            where = f"{channel.name} at {self.carrier.address}: not sent, {error}"
            raise Unavailable(f"{where}; give the user the right to write to {exchange or 'amq.default'}") from None

    async def _hear_of_tails(self) -> None:
        """From now on requests that somebody watches go where they are seen."""
        self._hears = self._hears or self.loop.create_task(self._hear())
        await asyncio.shield(self._hears)

    async def _hear(self) -> None:
        line, tag = await self.line(), self.tag()
        with contextlib.suppress(Closed):  # who may declare nothing of their own are not seen
            await self.lay_exchange(TAILS)
            arguments = {"x-queue-type": "classic"}
            own = await line.call("queue.declare", exclusive=True, auto_delete=True, arguments=arguments)
            await line.call("queue.bind", queue=own.fields["queue"], exchange=TAILS)
            self.consumers[tag.encode()] = self._heard
            await line.call("basic.consume", queue=own.fields["queue"], consumer_tag=tag, no_ack=True)

    def _heard(self, content: Content) -> None:
        self._tails[content.body.decode("utf-8", "replace")] = self.clock.now() + 2 * TAIL_SECONDS

    def _tailed(self, name: str) -> bool:
        now = self.clock.now()
        for pattern, until in list(self._tails.items()):
            if until <= now:
                del self._tails[pattern]
        return any(_matches(pattern, name) for pattern in self._tails)

    async def announce(self, pattern: str) -> None:
        """Says that somebody watches these channels, which holds for a few seconds."""
        await self.lay_exchange(TAILS)
        line = await self.line()
        line.publish(TAILS, "", Message(channel=Channel(TAILS), body=pattern.encode()))
        await line.close()

    def publish(self, message: Message, route: _Route, reply_to: str) -> asyncio.Future[None]:
        outlet = self.outlet
        data = self._content(message, route.confirmed, outlet.number, route.durable, reply_to)
        return outlet.send(data, message.id)

    def ask(self, message: Message, route: _Route) -> None:
        """Sends what is to be replied to: the broker puts in the address of our replies."""
        asked = self.asked
        asked[message.correlation_id] = message.reply_to
        if len(asked) > ASKED_KEPT:
            for correlation in list(asked)[: ASKED_KEPT // 2]:
                del asked[correlation]
        watched = bool(self._tails) and self._tailed(message.channel.name)
        publish = route.watched if watched else route.asking
        self.link.write(self._content(message, publish, self.plain.number, route.durable, REPLY_TO))

    def drop(self, message: Message) -> None:
        """Sends to a queue that belongs to one process; without `mandatory`, as a reply to RabbitMQ's pseudo queue
        would arrive and be returned."""
        plain, name = self.plain, message.channel.name
        publish = self._replying.get(name)
        if publish is None:
            if len(self._replying) >= ROUTES_KEPT:
                self._replying.clear()
            publish = self._replying[name] = amqp.publishing(plain.number, "", name)
        self.link.write(self._content(message, publish, plain.number, False))

    def store(self, exchange: str, key: str, message: Message, delay: int) -> asyncio.Future[None]:
        """Publishes a copy of a message that is to last."""
        outlet = self.outlet
        publish = amqp.publishing(outlet.number, exchange, key, mandatory=True)
        deadline = self.clock.to_wall(message.deadline)
        header = properties(message, durable=True, deadline=deadline, timestamp=int(self.clock.wall()), delay=delay)
        return outlet.send(amqp.content(publish, outlet.number, header, message.body, self.frame_max), message.id)

    def _content(self, message: Message, publish: bytes, number: int, durable: bool, reply_to: str = "") -> bytes:
        body, clock = message.body, self.clock
        if len(body) > self.carrier.largest:
            raise TooLarge(f"{message!r} has {len(body)} bytes, {self.carrier.address} takes {self.carrier.largest}")
        deadline, expiration = message.deadline, 0
        if deadline is not None:
            left = deadline - clock.now()
            deadline = clock.wall() + left
            if not durable:  # what lasts goes to the dead letters when it expires, and is only dropped when it is taken
                expiration = max(1, int(left * 1000))
        header = properties(
            message,
            durable=durable,
            deadline=deadline,
            expiration=expiration,
            timestamp=int(clock.wall()) if durable else 0,
            priority=native_of(message.native, Publish, _PLAIN).priority or None if message.native else None,
            reply_to=reply_to,
        )
        return amqp.content(publish, number, header, body, self.frame_max)

    def returned(self, content: Content) -> None:
        """A request that no queue would take."""
        found = properties_of(content)
        correlation = found.get("correlation-id", "")
        name = content.fields["routing_key"]
        for channel in [channel for channel in self.routes if channel.name == name]:
            del self.routes[channel]  # to be declared again by the next one
        where = self.asked.pop(correlation, "")
        self.carrier.fail(correlation, where, Unavailable(f"{name} at {self.carrier.address}: nobody serves it"))

    def lost(self, error: Exception) -> None:
        super().lost(error)
        self._unanswered(error)

    def _unanswered(self, error: Exception) -> None:
        asked, self.asked = self.asked, {}
        for correlation, name in asked.items():
            self.carrier.fail(correlation, name, ConnectionLost(f"sent, but not replied to: {error}"))


class _Plain(Line):
    def returned(self, content: Content) -> None:
        assert isinstance(self.session, _Publisher)  # noqa: S101
        self.session.returned(content)


_PLAIN = Publish()
_REPLIES = Channel(REPLY_TO, temporary=True, replies=True)


class _Listening:
    """The replies to one process, which are in no queue."""

    def __init__(self, carrier: Carrier, name: str) -> None:
        self._carrier = carrier
        self._name = name

    def __repr__(self) -> str:
        return f"<{self._name} by {REPLY_TO}>"

    async def stop(self) -> None:
        self._carrier.replies.pop(self._name, None)


# ----------------------------------------------------------------------------------------------------------- consuming


class _Consumer(Wire):
    """The connection to consume."""

    def __init__(self, link: Link, carrier: Carrier, options: dict[str, Any]) -> None:
        super().__init__(link, carrier.clock, **options)
        self.carrier = carrier

    async def greet(self) -> None:
        await super().greet()
        self.carrier.resume(self)


class _Subscription:
    """A consumer on an AMQP channel of its own: what it brought, and what of that is settled."""

    def __init__(self, line: Line, tag: str) -> None:
        self.line = line
        self.tag = tag
        self._low = 1  # the lowest delivery tag that is not settled
        self._ahead: set[int] = set()  # settled ones above it
        self._done: list[int] = []  # handled, to be acknowledged in this turn of the loop

    @property
    def lost(self) -> bool:
        return self.line.error is not None

    @property
    def settled(self) -> int:
        """A number that grows with each delivery that is settled."""
        return self._low + len(self._ahead)

    def done(self, tag: int) -> None:
        done = self._done
        if not done:
            self.line.session.loop.call_soon(self.flush)
        done.append(tag)

    def back(self, tag: int) -> None:
        """Another receiver may have it."""
        self._write(settle(self.line.number, tag, "basic.reject", 1))
        self._ahead.add(tag)

    def flush(self) -> None:
        """Acknowledges what is done: all that is complete from below in one, the others each."""
        done, self._done = self._done, []
        if not done:
            return
        done.sort()
        low, ahead, count = self._low, self._ahead, 0
        for tag in done:
            while low in ahead:
                ahead.discard(low)
                low += 1
            if tag != low:
                break
            low += 1
            count += 1
        self._low = low
        number = self.line.number
        acks = [settle(number, done[count - 1], "basic.ack", count > 1)] if count else []
        for tag in done[count:]:
            ahead.add(tag)
            acks.append(settle(number, tag))
        self._write(b"".join(acks))

    def _write(self, data: bytes) -> None:
        if self.line.error is None:
            self.line.session.link.write(data)


class _Held(ABC):
    """Something that consumes a queue, for as long as it is held: it subscribes on each new connection."""

    def __init__(self, carrier: Carrier, name: str) -> None:
        self.carrier = carrier
        self.name = name
        self.begun = False
        self.subscription: _Subscription | None = None
        self._resuming: asyncio.Task[None] | None = None
        self._told = ""

    @abstractmethod
    async def subscribe(self, wire: Wire) -> None:
        """Declares what is missing, and consumes. Raises TransportError with a sentence."""

    @abstractmethod
    async def abort(self) -> None:
        """Ends at once; what is in work goes back to the queue."""

    def gone(self, subscription: _Subscription) -> None:  # noqa: B027 - a tail has nothing to forget
        """What it had brought comes again, if its queue is still there."""

    async def consume(
        self, wire: Wire, queue: str, take: Callable[[_Subscription, Content], None], prefetch: int, **fields: Any
    ) -> None:
        line = await wire.line()
        subscription = self.subscription = _Subscription(line, wire.tag())
        tag = subscription.tag.encode()
        wire.consumers[tag] = functools.partial(take, subscription)
        cancelled: list[str] = []
        line.cancelled = cancelled.append
        try:
            await line.call("basic.qos", prefetch_count=min(prefetch, PREFETCH_MAX))
            await line.call("basic.consume", queue=queue, consumer_tag=subscription.tag, **fields)
        except BaseException:
            self._drop(wire, subscription)
            raise
        if cancelled:
            self._drop(wire, subscription)
            raise TransportError(f"{queue} was deleted")
        line.ended = functools.partial(self._ended, wire, subscription)
        line.cancelled = functools.partial(self._cancelled, wire, subscription)

    async def unsubscribe(self) -> None:
        """Takes no more."""
        subscription = self.subscription
        if subscription is not None and not subscription.lost:
            with contextlib.suppress(TransportError, TimeoutError):
                async with asyncio.timeout(CLOSING_SECONDS):
                    await subscription.line.call("basic.cancel", consumer_tag=subscription.tag)

    def release(self) -> None:
        """From now on it is not subscribed again."""
        self.carrier.release(self)
        if self._resuming is not None:
            self._resuming.cancel()

    async def leave(self) -> None:
        """Acknowledges what is done; the rest goes back to the queue."""
        subscription = self.subscription
        if subscription is not None:
            subscription.flush()
            closing = self._drop(subscription.line.session, subscription)
            await asyncio.wait([closing], timeout=CLOSING_SECONDS)

    def _drop(self, wire: Wire, subscription: _Subscription) -> asyncio.Task[None]:
        """Forgets it, and closes its AMQP channel."""
        line = subscription.line
        line.ended = line.cancelled = _nothing
        wire.consumers.pop(subscription.tag.encode(), None)
        if self.subscription is subscription:
            self.subscription = None
        return wire.loop.create_task(line.close())

    def resume(self, wire: Wire, after: float = 0.0) -> None:
        if self._resuming is not None:
            self._resuming.cancel()
        self._resuming = wire.loop.create_task(self._resume(wire, after))

    async def _resume(self, wire: Wire, after: float) -> None:
        """Subscribes again, as often as it takes: a queue whose leader is being elected, a right that is missing."""
        await self.carrier.clock.sleep(after)
        pause = AGAIN_FIRST
        while wire.error is None:
            try:
                await self.subscribe(wire)
            except (TransportError, CallError, ProtocolError) as error:
                if wire.error is None and str(error) != self._told:
                    self._told = str(error)
                    self.report(error)
                await self.carrier.clock.sleep(pause)
                pause = min(pause * 2, AGAIN_LONGEST)
            else:
                self._told = ""
                return

    def report(self, error: Exception) -> None:
        """A failure that no caller waits for."""
        asyncio.get_running_loop().call_exception_handler({"message": f"{self.name}: {error}", "exception": error})

    def _ended(self, wire: Wire, subscription: _Subscription, error: Exception) -> None:
        self._drop(wire, subscription)
        self.gone(subscription)
        if wire.error is None:  # the broker closed this one alone: a delivery was too long in work, or its queue failed
            self.report(TransportError(f"{self.name} at {self.carrier.address}: {error}; it is served again"))
            self.resume(wire)

    def _cancelled(self, wire: Wire, subscription: _Subscription, _: str) -> None:
        """The queue was deleted, or has moved."""
        self._drop(wire, subscription)
        self.gone(subscription)
        self.resume(wire, NOTICED)


class _Serving(_Held):
    """One channel being served."""

    def __init__(self, carrier: Carrier, channel: Channel, receive: Receive, group: str, limit: int) -> None:
        super().__init__(carrier, channel.name)
        self.channel = channel
        self.group = group if channel.fanout else ""
        self.intake: Intake[Content] = Intake(self, receive, group, limit, carrier.clock, keyed=channel.keyed)
        self._queue = ""
        self._prefetch = limit * PREFETCH_KEYED if channel.keyed else limit
        self._parked = False  # what has not begun goes back when the AMQP channel is closed
        self._renewing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<serving {self.channel.name} as {self.group or 'its one receiver'}: {self.intake!r}>"

    async def subscribe(self, wire: Wire) -> None:
        channel = self.channel
        place = place_of(channel, self.group, lasting=wire.lasting, suffix=f".{new_id()}")
        self._queue = place.queue
        try:
            await wire.lay_exchange(EXCHANGE)
            if not channel.temporary:
                await wire.lay_dead()  # and with it what leads back to its queue
            await wire.lay(place, channel)
            await self.consume(wire, place.queue, self._take, self._prefetch, arguments=place.consumer)
        except Closed as error:
            raise TransportError(_sentence(self.carrier.address, place.queue, error)) from error
        except InvalidMessage as error:
            raise TransportError(f"{place.queue} at {self.carrier.address} cannot be served: {error}") from None
        if self._renewing is None and place.arguments.get("x-queue-type") == "quorum":
            self._renewing = wire.loop.create_task(self._renew(place.consumer))

    def release(self) -> None:
        super().release()
        if self._renewing is not None:
            self._renewing.cancel()

    async def _renew(self, arguments: dict[str, Any]) -> None:
        """Subscribes anew whenever nothing has come for long. RabbitMQ says nothing to a consumer whose quorum queue is
        deleted and at once declared again: it counts it as one of the new queue's, and never brings it anything."""
        while True:
            subscription, resuming = self.subscription, self._resuming
            settled = subscription.settled if subscription is not None else 0
            await self.carrier.clock.sleep(IDLE)
            if subscription is None or subscription is not self.subscription or subscription.lost:
                continue
            if resuming is not None and not resuming.done():
                continue
            if self.intake.size or subscription.settled != settled:
                continue
            line, tag = subscription.line, subscription.tag
            with contextlib.suppress(TransportError):  # then it is subscribed again in any case
                await line.call("basic.cancel", consumer_tag=tag)
                if (
                    self.intake.size or subscription.settled != settled
                ):  # it lives, and must not lose what has just come
                    await line.call("basic.consume", queue=self._queue, consumer_tag=tag, arguments=arguments)
                elif subscription is self.subscription:
                    self._drop(line.session, subscription)
                    self.resume(line.session)

    def gone(self, subscription: _Subscription) -> None:
        self.intake.forget(lambda content: content.origin is subscription)

    async def stop(self) -> None:
        self.release()
        try:
            if self.channel.keyed:  # the next in line must not get a key of which a message is still in work here
                self._parked = True
                await self.intake.stop()
                await self.unsubscribe()
            else:
                await self.unsubscribe()
                await self.intake.stop()
        finally:
            await self.leave()

    async def abort(self) -> None:
        self.release()
        self._parked = True
        await self.intake.abort()
        await self.leave()

    def _take(self, subscription: _Subscription, content: Content) -> None:
        content.origin = subscription
        self.intake.put(content, self.read(content).key if self.channel.keyed else "")

    # Source

    def read(self, delivery: Content) -> Message:
        if delivery.copy is not None:
            return _fresh(delivery.copy)
        try:
            return read(delivery, self.channel, self.carrier.clock)
        except ProtocolError:  # no broker lets that through
            return Message(channel=self.channel, body=delivery.body, id=new_id(), headers={})

    def crashed(self, delivery: Content) -> int:
        return delivery.crashes

    def done(self, delivery: Content) -> None:
        delivery.origin.done(delivery.tag)

    def give_back(self, delivery: Content) -> None:
        if not self._parked:
            delivery.origin.back(delivery.tag)

    async def again(self, delivery: Content, copy: Message, after: float) -> None:
        if self.channel.temporary or self._streams:  # its queue goes with us, so it may as well wait here
            delivery.copy = copy
            self.carrier.clock.call_at(self.carrier.clock.now() + after, lambda: self._back(delivery))
            return
        ms = wait(after) if after > 0 else 0
        if await self.carrier.store(DELAYS if ms else "", self._queue, copy, self._wanted(delivery), delay=ms):
            self.done(delivery)

    async def dead(self, delivery: Content, copy: Message) -> None:
        if await self.carrier.store("", DEAD, copy, self._wanted(delivery)):
            self.done(delivery)

    def _wanted(self, delivery: Content) -> Callable[[], bool]:
        """Whether it can still be acknowledged; else the broker brings it again."""
        return lambda: not delivery.origin.lost

    def _back(self, delivery: Content) -> None:
        if not delivery.origin.lost:
            self.intake.put(delivery)

    @property
    def _streams(self) -> bool:
        return any(isinstance(option, Queue) and option.type == "stream" for option in self.channel.native)


class _Tail(_Held):
    """Copies of what is sent to a channel, from the moment this object is made until it is closed."""

    def __init__(self, carrier: Carrier, pattern: str) -> None:
        super().__init__(carrier, f"tail of {pattern}")
        self._pattern = pattern
        self._kept: deque[Message] = deque(maxlen=TAIL_KEPT)
        self._more = asyncio.Event()
        self._closed = False
        self._failed: Exception | None = None
        self._starting = asyncio.get_running_loop().create_task(self._start())

    async def _start(self) -> None:
        try:
            await self.carrier.begin(self)
        except (TransportError, CallError) as error:
            self._failed = error
            self._more.set()
            return
        while True:
            with contextlib.suppress(TransportError, CallError):
                await self.carrier.announce(self._pattern)
            await self.carrier.clock.sleep(TAIL_SECONDS)

    async def subscribe(self, wire: Wire) -> None:
        words = self._pattern.split(".")
        binding = ".".join([*words[:-1], "#"]) if self._pattern.endswith("*") else self._pattern
        queue = f"quintet.tail.{new_id()}"
        arguments = {"x-max-length": TAIL_KEPT, "x-queue-type": "classic"}
        await wire.lay_exchange(EXCHANGE)
        line = await wire.line()
        try:
            await asyncio.gather(
                line.call("queue.declare", queue=queue, exclusive=True, auto_delete=True, arguments=arguments),
                line.call("queue.bind", queue=queue, exchange=EXCHANGE, routing_key=binding),
            )
        finally:
            await line.close()
        await self.consume(wire, queue, self._take, 1000)

    def _take(self, subscription: _Subscription, content: Content) -> None:
        subscription.done(content.tag)
        name = content.fields["routing_key"]
        if _matches(self._pattern, name):
            self._kept.append(read(content, Channel(name), self.carrier.clock))
            self._more.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        while not self._kept:
            if self._closed:
                raise StopAsyncIteration
            if self._failed is not None:
                raise self._failed
            self._more.clear()
            await self._more.wait()
        return self._kept.popleft()

    async def aclose(self) -> None:
        self._closed = True
        self._more.set()
        self._starting.cancel()
        await asyncio.wait([self._starting])
        self.release()
        await self.leave()

    abort = aclose


def _matches(pattern: str, name: str) -> bool:
    return name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1]))


def _fresh(message: Message) -> Message:
    return structs.replace(message, headers=dict(message.headers))


def _bare(message: Message) -> Message:
    """A message whose headers do not fit, without its user's: what ours say is kept, as far as it can be written."""
    ours = {
        name: value.encode("utf-8", "replace").decode()
        for name, value in message.headers.items()
        if name.startswith(PREFIX)
    }
    return structs.replace(message, headers=ours)


def _nothing(_: Any) -> None: ...


async def _waiting(line: Line) -> int:
    """How many dead letters are in their queue, and in nobody's hand."""
    answer = await line.call("queue.declare", queue=DEAD, passive=True)
    count: int = answer.fields["message_count"]
    return count
