"""The connection to publish, how a channel is reached over it, and the replies that come back by it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from quintet.connection import Link, Lost, Refused
from quintet.errors import ConnectionLost, TooLarge, Unavailable
from quintet.message import Channel, Message, native_of
from quintet.transports.amqp.failures import sentence
from quintet.wire import amqp
from quintet.wire.amqp import Content
from quintet.wire.amqp_message import properties, properties_of, read
from quintet.wire.amqp_session import Closed, Line, Outlet, Wire
from quintet.wire.amqp_topology import EXCHANGE, TAILS, Place, Publish, place_of

if TYPE_CHECKING:
    from quintet.transports.amqp.carrier import Carrier

REPLY_TO: Final = "amq.rabbitmq.reply-to"
"""RabbitMQ's pseudo queue for replies: whoever consumes it gets those to the requests of the same AMQP channel."""

ASKED_KEPT = 10_000  # requests whose loss is told to who waits for the reply; older ones have long timed out
ROUTES_KEPT = 1000  # of those who wait for replies
TAIL_SECONDS = 2.0  # between two times that a tail says it is there


class Route(Struct, frozen=True):
    """What comes before the content of each message to a channel."""

    confirmed: bytes
    asking: bytes
    watched: bytes
    """As `asking`, by the exchange where tails see it."""
    durable: bool
    waited_for: bool
    """A request: to publish it nobody waits for a confirmation, as its reply is one."""


class Publisher(Wire):
    """The connection to publish: one AMQP channel with confirmations, and one without, for requests and replies, whose
    caller learns by the reply, or by the lack of it, what became of them."""

    outlet: Outlet
    plain: Line

    def __init__(self, link: Link, carrier: Carrier, options: dict[str, Any]) -> None:
        super().__init__(link, carrier.clock, **options)
        self.carrier = carrier
        self.routes: dict[Channel, Route] = {}
        self.asked: dict[str, str] = {}
        """By correlation, where its reply is waited for: requests that have none yet."""
        self._routing: dict[Channel, asyncio.Task[Route]] = {}
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
            raise Refused(sentence(self.carrier.address, f"exchange {EXCHANGE}", error)) from None
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

    async def route(self, channel: Channel) -> Route:
        """Declares what the channel needs, once for all who send at the same time."""
        task = self._routing.get(channel)
        if task is None:
            task = self._routing[channel] = self.loop.create_task(self._find(channel))
            task.add_done_callback(
                lambda task: (self._routing.pop(channel, None), task.cancelled() or task.exception())
            )
        return await asyncio.shield(task)

    async def _find(self, channel: Channel) -> Route:
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
        route = Route(
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
        return any(matches(pattern, name) for pattern in self._tails)

    async def announce(self, pattern: str) -> None:
        """Says that somebody watches these channels, which holds for a few seconds."""
        await self.lay_exchange(TAILS)
        line = await self.line()
        line.publish(TAILS, "", Message(channel=Channel(TAILS), body=pattern.encode()))
        await line.close()

    def publish(self, message: Message, route: Route, reply_to: str) -> asyncio.Future[None]:
        outlet = self.outlet
        data = self._content(message, route.confirmed, outlet.number, route.durable, reply_to)
        return outlet.send(data, message.id)

    def ask(self, message: Message, route: Route) -> None:
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
        wall, deadline = clock.wall(), message.deadline
        header = properties(
            message,
            durable=durable,
            deadline=None if deadline is None else wall + (deadline - clock.now()),
            timestamp=int(wall) if durable or deadline is not None else 0,
            expires=not durable,  # what lasts would go to the dead letters, and is only dropped when it is taken
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
        assert isinstance(self.session, Publisher)  # noqa: S101
        self.session.returned(content)


_PLAIN = Publish()
_REPLIES = Channel(REPLY_TO, temporary=True, replies=True)


class Listening:
    """The replies to one process, which are in no queue."""

    def __init__(self, carrier: Carrier, name: str) -> None:
        self._carrier = carrier
        self._name = name

    def __repr__(self) -> str:
        return f"<{self._name} by {REPLY_TO}>"

    async def stop(self) -> None:
        self._carrier.replies.pop(self._name, None)


def matches(pattern: str, name: str) -> bool:
    return name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1]))
