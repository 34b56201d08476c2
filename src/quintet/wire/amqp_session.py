"""One AMQP connection on one link: the greeting, its channels, what was asked on them and what was published."""

from __future__ import annotations

import asyncio
import contextlib
import platform
from collections import deque
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any, Final, TypeVar

from quintet.clock import Clock
from quintet.connection import Link, Lost, Refused, Session
from quintet.errors import ConnectionLost, Overloaded, ProtocolError, Safety, TransportError
from quintet.message import Channel, Message
from quintet.wire import amqp
from quintet.wire.amqp import Confirm, Content, Method, Parser
from quintet.wire.amqp_message import DELAYS, properties, properties_of
from quintet.wire.amqp_topology import AGAIN, DEAD_QUEUE, EXCHANGE, EXCHANGES, Place, delay_queue
from quintet.wire.names import DEAD

REFUSALS: Final = {
    402: "name a virtual host behind the host, as in amqp://host/vhost",
    403: "check user and password, in the address or in QUINTET_AMQP_USER and QUINTET_AMQP_PASSWORD",
    530: "name a virtual host that is there, and that the user has rights on",
}
"""Reply codes of a connection that is not to be tried again as it is, and what to do."""
CHANNELS_LEAST: Final = 64


class Closed(TransportError):
    """The broker closed a channel, or the connection: with a reply code (section 1.2) and a text of its own."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Unroutable(TransportError):
    """A mandatory message that no queue would take: it is nowhere."""


class Line:
    """An AMQP channel of a session. The broker closes it over a mistake, and then the others go on."""

    def __init__(self, session: Wire, number: int) -> None:
        self.session = session
        self.number = number
        self.error: Exception | None = None
        self.ended: Callable[[Exception], None] = _ignore
        """Called once when it is closed by the broker or lost."""
        self.cancelled: Callable[[str], None] = _ignore
        """Called with the tag of a consumer that the broker has cancelled: its queue is gone."""
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._closing: asyncio.Future[Any] | None = None

    def __repr__(self) -> str:
        return f"<AMQP channel {self.number}{f', closed: {self.error}' if self.error else ''}>"

    def call(self, name: str, **fields: Any) -> asyncio.Future[Any]:
        """Sends a method that has an answer, and gives the answer: a Method, or the Content of basic.get.

        Several may be sent before the first is answered. Raises TypeError or InvalidMessage where the method cannot be
        written; what it gives raises Closed or Lost.
        """
        data = amqp.method(self.number, name, **fields)  # before an answer is awaited: what raises here is not asked
        if self.error is not None:
            future: asyncio.Future[Any] = self.session.loop.create_future()
            future.set_exception(self.error)
            return future
        self.session.link.write(data)
        return self.expect()

    def tell(self, name: str, **fields: Any) -> None:
        """Sends a method that has no answer."""
        if self.error is None:
            self.session.link.write(amqp.method(self.number, name, **fields))

    def publish(self, exchange: str, routing_key: str, message: Message, *, mandatory: bool = False) -> None:
        """Sends a message to wherever it is wanted. Nothing is said of what becomes of it."""
        if self.error is None:
            publish = amqp.publishing(self.number, exchange, routing_key, mandatory=mandatory)
            header = properties(message, durable=message.channel.durable)
            frames = amqp.content(publish, self.number, header, message.body, self.session.frame_max)
            self.session.link.write(frames)

    def expect(self) -> asyncio.Future[Any]:
        """The next answer, in the order of what was asked."""
        future: asyncio.Future[Any] = self.session.loop.create_future()
        self._waiting.append(future)
        return future

    async def close(self) -> None:
        """Closes it; what is not acknowledged goes back to its queue. Also when called twice; its number is free once
        the broker has answered, whether anyone waits for that or not."""
        if self.error is not None:
            return
        if self._closing is None:
            self._closing = self.call("channel.close", reply_code=200)
            self._closing.add_done_callback(lambda _: self.end(Lost("it was closed")))
        with contextlib.suppress(TransportError):
            await asyncio.shield(self._closing)

    # called by the session

    def answer(self, event: Method | Content) -> None:
        if not self._waiting:
            raise ProtocolError(f"{event.name if isinstance(event, Method) else 'a message'} that was not asked for")
        future = self._waiting.popleft()
        if not future.done():
            future.set_result(event)

    def confirm(self, confirm: Confirm) -> None:
        raise ProtocolError(f"a confirmation on channel {confirm.channel}, where none were asked for")

    def returned(self, content: Content) -> None:
        """A mandatory message came back."""

    def end(self, error: Exception) -> None:
        if self.error is not None:
            return
        self.error = error
        self.session.lines.pop(self.number, None)
        for future in self._waiting:
            if not future.done():
                future.set_exception(error)
                future.exception()  # whoever asked may be gone
        self._waiting.clear()
        self.ended(error)


class Outlet(Line):
    """An AMQP channel in confirm mode: each message is known to be stored, or not."""

    def __init__(self, session: Wire, number: int) -> None:
        super().__init__(session, number)
        self._tag, self._lowest = 0, 1  # of what was published last, and the first that may be unconfirmed
        self._unconfirmed: dict[int, tuple[asyncio.Future[None], str]] = {}
        self._unroutable: set[str] = set()  # ids of messages that came back, and are to be confirmed next

    def begin(self) -> asyncio.Future[Any]:
        return self.call("confirm.select")

    def send(self, data: bytes, id: str) -> asyncio.Future[None]:  # noqa: A002 - the message's
        """Sends a message and gives what is done once the broker has it. That raises Unroutable where it was mandatory,
        Overloaded where it was refused, ConnectionLost where it may be there or not."""
        future: asyncio.Future[None] = self.session.loop.create_future()
        if self.error is not None:
            future.set_exception(ConnectionLost(f"not sent: {self.error}", safety=Safety.NOT_SENT))
            return future
        self._tag += 1
        self._unconfirmed[self._tag] = (future, id)
        self.session.link.write(data)
        return future

    def confirm(self, confirm: Confirm) -> None:
        unconfirmed = self._unconfirmed
        if not confirm.multiple:
            self._settle(unconfirmed.pop(confirm.tag, None), confirm.taken)
            return
        if confirm.tag > self._tag:
            raise ProtocolError(f"a confirmation of message {confirm.tag} where {self._tag} were published")
        for tag in range(self._lowest, (confirm.tag or self._tag) + 1):
            if tag in unconfirmed:
                self._settle(unconfirmed.pop(tag), confirm.taken)
        self._lowest = max(self._lowest, confirm.tag + 1)

    def _settle(self, published: tuple[asyncio.Future[None], str] | None, taken: bool) -> None:
        if published is None:
            raise ProtocolError("a confirmation of what was not published")
        future, id_ = published
        back = bool(self._unroutable) and id_ in self._unroutable
        if back:
            self._unroutable.discard(id_)
        if future.done():
            return
        if back:
            future.set_exception(Unroutable("no queue would take it"))
        elif taken:
            future.set_result(None)
        else:
            future.set_exception(Overloaded("the broker refused it", safety=Safety.UNKNOWN))

    def returned(self, content: Content) -> None:
        self._unroutable.add(properties_of(content).get("message-id", ""))  # comes before its confirmation

    def end(self, error: Exception) -> None:
        unconfirmed, self._unconfirmed = self._unconfirmed, {}
        for future, _ in unconfirmed.values():
            if not future.done():
                future.set_exception(ConnectionLost(f"sent, but not confirmed: {error}"))
        super().end(error)


L = TypeVar("L", bound=Line)


class Wire(Session):
    """A session with a broker. `call` does anything of AMQP that there is no other way to."""

    def __init__(
        self,
        link: Link,
        clock: Clock,
        address: str,
        user: str,
        password: str,
        *,
        name: str,
        vhost: str,
        beat: int,
        external: bool,
    ) -> None:
        super().__init__(link)
        self.clock = clock
        self.loop = asyncio.get_running_loop()
        self.server: dict[str, Any] = {}
        """The broker's properties: product, version, cluster_name, capabilities ..."""
        self.frame_max = amqp.FRAME_MAX
        self.heartbeat = beat
        self.blocked: str = ""
        """Why the broker takes no messages at the moment; empty where it does."""
        self.lines: dict[int, Line] = {}
        self.consumers: dict[bytes, Callable[[Content], None]] = {}
        """What takes the deliveries of each consumer, by its tag."""
        self.error: Exception | None = None
        self._address = address
        self._user, self._password, self._name, self._vhost, self._external = user, password, name, vhost, external
        self._parser = Parser()
        self._channel_max = CHANNELS_LEAST
        self._latest = 0  # of the numbers of lines
        self._tags = 0
        self._unblocked: asyncio.Future[None] | None = None
        self._goodbyes: set[asyncio.Task[None]] = set()  # to channels that nobody waited for
        self._allowed: set[tuple[str, str]] = set()  # exchanges and routing keys that we may publish to
        self._laid: set[str] = set()  # what is known to stand on the broker
        self._control = Line(self, 0)
        self.lines[0] = self._control

    def __repr__(self) -> str:
        state = f"lost: {self.error}" if self.error else f"blocked: {self.blocked}" if self.blocked else "up"
        return f"<AMQP connection {self._name}, {len(self.lines) - 1} channels, {state}>"

    # what its holder does

    async def line(self) -> Line:
        """A fresh AMQP channel. Raises TransportError."""
        return await self.open(Line)

    async def open(self, kind: type[L]) -> L:
        """A fresh AMQP channel of that kind."""
        if self.error is not None:
            raise self.error
        number = self._number()
        line = kind(self, number)
        self.lines[number] = line
        try:
            await line.call("channel.open")
        except BaseException:
            self._goodbyes.add(closing := self.loop.create_task(line.close()))
            closing.add_done_callback(self._goodbyes.discard)
            raise
        return line

    async def call(self, name: str, **fields: Any) -> dict[str, Any]:
        """Does one method of AMQP (`wire/amqp.py` has them) on a channel of its own, and gives its answer's fields:
        `await native.call("queue.purge", queue="trips.v1.create")`. Raises TransportError with the broker's words."""
        line = await self.line()
        try:
            answer = await line.call(name, **fields)
            return dict(answer.fields)
        finally:
            await line.close()

    def tag(self) -> str:
        """A name for a consumer that no other of this session has."""
        self._tags += 1
        return f"quintet.{self._tags}"

    async def unblocked(self) -> None:
        """Waits until the broker takes messages again. Raises Lost."""
        while self.blocked and self.error is None:
            self._unblocked = self._unblocked or self.loop.create_future()
            await asyncio.shield(self._unblocked)
        if self.error is not None:
            raise self.error

    # what stands on the broker (amqp_topology.py)

    @property
    def lasting(self) -> bool:
        """From RabbitMQ 4 on, what several connections share has to be durable."""
        major = str(self.server.get("version", "")).partition(".")[0]
        return major.isascii() and major.isdigit() and len(major) < 9 and int(major) >= 4

    async def lay(self, place: Place, channel: Channel) -> None:
        """Declares a queue and binds it. Raises Closed."""
        if channel.durable:
            await self.lay_dead()
        line = await self.line()
        try:
            asked = [
                line.call(
                    "queue.declare",
                    queue=place.queue,
                    passive=not place.declared,
                    durable=place.durable,
                    exclusive=place.exclusive,
                    auto_delete=place.exclusive,
                    arguments=place.arguments,
                ),
                *self.bindings(line, place, channel),
            ]
            await asyncio.gather(*asked)
        finally:
            await line.close()

    def bindings(self, line: Line, place: Place, channel: Channel) -> list[Awaitable[Any]]:
        if channel.temporary and not channel.fanout:
            return []  # sent to over the default exchange
        asked = [line.call("queue.bind", queue=place.queue, exchange=EXCHANGE, routing_key=channel.name)]
        if not channel.temporary and AGAIN in self._laid:
            asked.append(line.call("queue.bind", queue=place.queue, exchange=AGAIN, routing_key=place.queue))
        return list(asked)

    async def lay_exchange(self, name: str) -> None:
        if name in self._laid:
            return
        type_, arguments = EXCHANGES[name]
        try:
            await self.call("exchange.declare", exchange=name, type=type_, durable=True, arguments=arguments)
        except Closed as error:
            if error.code != 403:
                raise
            await self.call("exchange.declare", exchange=name, passive=True)  # who may not make it may use it
        self._laid.add(name)

    async def lay_dead(self) -> None:
        """The dead-letter queue, and what leads to it."""
        if "letters" not in self._laid:
            await asyncio.gather(self.lay_exchange(DEAD), self.lay_exchange(AGAIN))
            await self.lay_queue(DEAD, DEAD_QUEUE, DEAD, {})
            self._laid.add("letters")

    async def lay_queue(self, name: str, arguments: dict[str, Any], exchange: str, binding: dict[str, Any]) -> None:
        line = await self.line()
        try:
            await asyncio.gather(
                line.call("queue.declare", queue=name, durable=True, arguments=arguments),
                line.call("queue.bind", queue=name, exchange=exchange, arguments=binding),
            )
        except Closed as error:
            if error.code != 403:
                raise
            await self.call("queue.declare", queue=name, passive=True)
        finally:
            await line.close()

    async def lay_for_copies(self, delay: int) -> None:
        """What a copy needs that is dead, or that is to wait for so many milliseconds."""
        await self.lay_dead()
        if delay and (queue := delay_queue(delay))[0] not in self._laid:
            name, arguments, binding = queue
            await self.lay_exchange(DELAYS)
            await self.lay_queue(name, arguments, DELAYS, binding)
            self._laid.add(name)

    def forget(self) -> None:
        """Something of it is gone: all is declared again when it is needed."""
        self._laid.clear()
        self._allowed.clear()

    async def try_publishing(self, exchange: str, key: str) -> None:
        """Finds out whether we may, once: on a channel of its own, in a transaction that is rolled back, as RabbitMQ
        closes the channel on which it refuses a message. Raises Closed."""
        if (exchange, key) in self._allowed:
            return
        line = await self.line()
        try:
            selected = line.call("tx.select")
            line.publish(exchange, key, Message(channel=Channel(key)))
            await asyncio.gather(selected, line.call("tx.rollback"))
        finally:
            await line.close()
        self._allowed.add((exchange, key))

    def reopen(self, line: L) -> L:
        """A fresh AMQP channel in the place of one that the broker has closed: what is written next goes over it."""
        fresh = self.lines[line.number] = type(line)(self, line.number)
        fresh.call("channel.open")
        return fresh

    # Session

    async def greet(self) -> None:
        """Raises Refused where user, password or virtual host are not to the broker's liking."""
        control, link = self._control, self.link
        started = control.expect()
        link.write(amqp.PROTOCOL_HEADER)
        start: Method = await started
        self.server = start.fields["server_properties"]
        mechanism = "EXTERNAL" if self._external else "PLAIN"
        if mechanism.encode() not in start.fields["mechanisms"].split():
            known = start.fields["mechanisms"].decode()
            raise self._refused(f"the broker does not know {mechanism}, only {known}", "change ?auth=")
        tune: Method = await control.call(
            "connection.start-ok",
            client_properties={
                "product": "Quintet",
                "version": version("quintet"),
                "platform": f"{platform.python_implementation()} {platform.python_version()}",
                "connection_name": self._name,
                "capabilities": amqp.CAPABILITIES,
            },
            mechanism=mechanism,
            response=b"" if self._external else amqp.plain(self._user, self._password),
            locale="en_US",
        )
        if tune.name != "connection.tune":
            raise self._refused(f"the broker asks for more than a password: {tune.name}", "take ?auth=external")
        self.frame_max = min(tune.fields["frame_max"] or amqp.FRAME_MAX, amqp.FRAME_MAX)
        if self.frame_max < amqp.FRAME_LEAST:
            raise self._refused(f"the broker allows frames of {self.frame_max} bytes", f"allow {amqp.FRAME_LEAST}")
        self._parser.frame_max = self.frame_max
        self._channel_max = tune.fields["channel_max"] or 65535
        agreed = {"channel_max": self._channel_max, "frame_max": self.frame_max, "heartbeat": self.heartbeat}
        control.tell("connection.tune-ok", **agreed)
        if self.heartbeat:
            link.beat(self.heartbeat / 2, amqp.HEARTBEAT)
            link.expect(self.heartbeat)
        await control.call("connection.open", virtual_host=self._vhost)

    def received(self, data: bytes) -> None:
        consumers = self.consumers
        for event in self._parser.feed(data):
            if isinstance(event, Content):
                take = consumers.get(event.consumer)
                if take is not None:
                    take(event)
                elif not event.consumer and (line := self.lines.get(event.channel)) is not None:
                    if event.returned:
                        line.returned(event)
                    else:
                        line.answer(event)
            elif isinstance(event, Confirm):
                if (line := self.lines.get(event.channel)) is not None:
                    line.confirm(event)
            else:
                self._method(event)

    def _method(self, event: Method) -> None:
        line = self.lines.get(event.channel)
        if line is None:
            return  # of a channel that was closed meanwhile
        name, fields = event.name, event.fields
        if name == "channel.close":
            line.tell("channel.close-ok")
            line.end(Closed(fields["reply_code"], fields["reply_text"]))
        elif name == "channel.flow":
            line.tell("channel.flow-ok", active=fields["active"])
            self._block("" if fields["active"] else "flow control")
        elif name == "basic.cancel":
            line.cancelled(fields["consumer_tag"])
        elif event.channel:
            line.answer(event)
        elif name == "connection.close":
            line.tell("connection.close-ok")
            code, text = fields["reply_code"], fields["reply_text"]
            closed = Lost(f"the broker closed the connection: {text}")
            self.link.drop(self._refused(text, REFUSALS[code]) if code in REFUSALS else closed)
        elif name == "connection.blocked":
            self._block(fields["reason"] or "it is short of memory or disk")
        elif name == "connection.unblocked":
            self._block("")
        else:
            line.answer(event)

    def lost(self, error: Exception) -> None:
        self.error = error if isinstance(error, TransportError) else Lost(str(error) or type(error).__name__)
        for line in list(self.lines.values()):
            line.end(self.error)
        self._block("")

    async def farewell(self) -> None:
        await self._control.call("connection.close", reply_code=200, reply_text="goodbye")

    # inside

    def _refused(self, why: str, advice: str) -> Refused:
        return Refused(f"{self._address}: {why}; {advice}")

    def _number(self) -> int:
        for _ in range(self._channel_max):
            self._latest = self._latest % self._channel_max + 1
            if self._latest not in self.lines:
                return self._latest
        raise TransportError(f"the broker allows {self._channel_max} AMQP channels on a connection, all are in use")

    def _block(self, reason: str) -> None:
        self.blocked = reason
        waiting, self._unblocked = self._unblocked, None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)


def _ignore(_: Any) -> None: ...
