"""The service's side: handlers, what a delivery goes through, publish and ask, start-up and drain."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar, Unpack

from msgspec import Struct, structs
from msgspec.structs import asdict, astuple

from quintet.binding import DECLINED, Bound, bind
from quintet.call import DEFAULTS, Answer, Options, UsingNow
from quintet.client import Carriers, Sender, plug
from quintet.clock import SYSTEM, Clock
from quintet.compiler import model_of
from quintet.context import CURRENT, Current
from quintet.contract import FANOUT, NEEDS, Contract, Event, Fault, Operation, Style, Survey
from quintet.delivery import HandlerFailed, Redelivery, decide, leaves
from quintet.errors import (
    CallError,
    CannotCarry,
    ConfigurationError,
    DeadlineExceeded,
    Declined,
    QuintetError,
    RemoteError,
    Safety,
    TooLarge,
)
from quintet.feed import ORDERS, TOKEN, Feed, Newest
from quintet.filter import Guarded, State, server_chain
from quintet.gate import Gate
from quintet.message import Channel, Handler, Message, Native, new_id
from quintet.observe import Observer, Place
from quintet.outbox import Outbox, open_box
from quintet.pending import PendingWork, StillPending
from quintet.policy import DEFAULT, Bulkhead, On, Policies, Policy
from quintet.record import Exchange, Recorder
from quintet.relay import POLICY, Relay
from quintet.repeats import once
from quintet.store import SeenStore, Store, open_seen, open_store
from quintet.transport import DONE, Dead, Done, Receive, Serving, Showing, Trait, Transport, Verdict, parse_address
from quintet.watch import Listener

log = logging.getLogger("quintet.service")

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=Contract)
AnyOperation: TypeAlias = Operation[Any, Any, Any]

OWN_STYLES = frozenset(
    {Style.REQUEST, Style.NOTIFICATION, Style.ASYNC_REQUEST}
)  # what a service must have handlers for


class Handling(Struct, frozen=True):
    """A function that handles an operation, and how."""

    operation: AnyOperation
    function: Callable[..., Awaitable[Any]]
    every_instance: bool
    redelivery: Redelivery
    native: tuple[Native, ...] = ()
    own: bool = True  # the user's function: what it raises stays inside, but for declared faults


class Service:
    """What runs: the handlers of one contract's operations, and of others' events and surveys.

    `inbox`: an address of a durable transport, where notifications that come over a direct one (HTTP) are kept and
    worked off. `answers`: where the answers of async requests are kept, a file that all instances share
    (".quintet/<name>.db") unless "memory://" or another is named, for `keep_answers` seconds. `concurrency`: handlers
    at work at once; up to the `bulkhead` of its `policy` more requests wait their turn, others are refused.
    `max_body`: bytes that a message's body may have. `grace`: seconds that what is in work has to end when the service
    stops; what is longer is cancelled, and comes again where it was queued. `lifespan`: an async context manager
    around all. `idempotent`: a Store, or its address, that knows the repeats of a message for 7 days: what its handler
    does through `current().store` is done once, and each repeat gets the same reply. `outbox`: the address of the
    service's own database, whose transactions what is sent may belong to (outbox.py).
    """

    def __init__(
        self,
        contract: type[Contract] | None = None,
        *,
        name: str = "",
        inbox: str = "",
        answers: str = "",
        keep_answers: float = 7 * 24 * 3600.0,
        idempotent: Store | str = "",
        outbox: str = "",
        concurrency: int = 100,
        max_body: int = 4 * 1024 * 1024,
        grace: float = 30.0,
        policy: Policy = Policy(),  # noqa: B008 - frozen
        redelivery: Redelivery = Redelivery(),  # noqa: B008 - frozen
        lifespan: Callable[[Service], AbstractAsyncContextManager[object]] | None = None,
    ) -> None:
        if contract is None and not name:
            raise ConfigurationError("a service without a contract needs a name: Service(name='notification')")
        if contract is not None:
            model_of(contract)  # refuses what contradicts itself
        if concurrency < 1:
            raise ConfigurationError(f"Service(concurrency={concurrency}): at least 1 handler must be able to run")
        self.contract = contract
        self.name = name or (contract.__quintet__.name if contract else "")
        self.inbox = inbox
        self.answers = answers or f"sqlite:///.quintet/{self.name}.db"
        self.keep_answers = keep_answers
        self.idempotent = idempotent
        self.outbox = Outbox(self.name, outbox)
        self.concurrency = concurrency
        self.max_body = max_body
        self.grace = grace
        self.policy = policy.over(DEFAULT)
        self.redelivery = redelivery
        self.lifespan = lifespan
        self.handlings: dict[AnyOperation, Handling] = {}
        self.clients: list[tuple[Contract, Policies]] = []
        self.running: Running | None = None

    def __repr__(self) -> str:
        return f"<service {self.name}, {len(self.handlings)} handlers{', running' if self.running else ''}>"

    def handles(
        self,
        operation: Operation[P, R, Any],
        *,
        every_instance: bool = False,
        redelivery: Redelivery | None = None,
        native: Sequence[Native] = (),
    ) -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Awaitable[R]]]:
        """Decorates the coroutine function that handles an operation: this service's own, or another's event or survey.

        `every_instance`: each process of this service gets its own copy of an event. `native`: what one transport alone
        can do for the channel, as `amqp.Queue(max_priority=9)`; others pass over it. Raises ConfigurationError.
        """

        def register(function: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
            own = self.contract is not None and operation in self.contract.__quintet__.operations.values()
            where = f"{self.name}: the handler of {operation!r}"
            if not own and operation.style not in FANOUT:
                raise ConfigurationError(
                    f"{where}: a {operation.style.value} is handled by the service of its own contract,"
                    f" Service({operation.contract.__name__})"
                )
            if operation in self.handlings:
                raise ConfigurationError(f"{where}: there is one already, {_place(self.handlings[operation].function)}")
            if every_instance and operation.style not in FANOUT:
                raise ConfigurationError(f"{where}: every_instance= is for events and surveys")
            _check_signature(operation, function, where)
            self.handlings[operation] = Handling(
                operation, function, every_instance, redelivery or self.redelivery, tuple(native)
            )
            return function

        return register

    def uses(self, contract: type[C], *, policy: Policies = ()) -> C:
        """A typed client of another service, connected when this one starts, where the deployment says it is."""
        model_of(contract)
        client = contract()
        self.clients.append((client, policy))
        return client

    async def publish(self, operation: Operation[P, None, Event], *args: P.args, **kwargs: P.kwargs) -> None:
        """Publishes an event of this service's contract; returns once it is accepted. Raises CallError."""
        await self._running().publish(operation, args, kwargs, DEFAULTS)

    def using(self, **options: Unpack[UsingNow]) -> Publishing:
        """What `using` is on a call: `await service.using(headers={...}).publish(Trips.created, trip)`."""
        return Publishing(self, Options.of(options))

    async def transport(self, address: str) -> Transport:
        """The open transport of one of the running service's addresses; its `native` is the broker's own connection."""
        return await self._running().carriers.reach(address)

    def ask(self, operation: Operation[P, R, Survey], *args: P.args, **kwargs: P.kwargs) -> Question[R]:
        """Asks a survey of this service's contract: `async with service.ask(...).within(2.0, enough=3) as answers`."""
        running = self._running()
        return Question(running, running.outlet(operation, Style.SURVEY), args, kwargs)

    def _running(self) -> Running:
        if self.running is None:
            raise QuintetError(f"service {self.name} is not running: use `async with serve(...)` or `quintet serve`")
        return self.running


class Publishing:
    """Publishes the events of a service with other options than usual."""

    def __init__(self, service: Service, options: Options) -> None:
        self._service = service
        self._options = options

    async def publish(self, operation: Operation[P, None, Event], *args: P.args, **kwargs: P.kwargs) -> None:
        """As Service.publish."""
        await self._service._running().publish(operation, args, kwargs, self._options)


def _place(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _check_signature(operation: AnyOperation, function: Callable[..., Any], where: str) -> None:
    if not inspect.iscoroutinefunction(function):
        raise ConfigurationError(
            f"{where} must be `async def`: {_place(function)} is not; run what blocks with asyncio.to_thread"
        )
    wanted = list(operation.record.__struct_fields__)
    parameters = inspect.signature(function).parameters.values()
    given = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    known = [parameter.name for parameter in parameters]
    if missing := [name for name in wanted if name not in known]:
        raise ConfigurationError(f"{where}: {_place(function)} lacks the parameter {', '.join(missing)}")
    if extra := [name for name in given if name not in wanted]:
        raise ConfigurationError(f"{where}: {_place(function)} wants {', '.join(extra)}, which the contract has not")


class Question(Generic[R]):
    """A survey that is about to be asked."""

    def __init__(self, running: Running, sender: Sender, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running = running
        self._sender = sender
        self._message = sender.prepare(args, kwargs)

    @asynccontextmanager
    async def within(self, seconds: float, *, enough: int | None = None) -> AsyncGenerator[AsyncIterator[Answer[R]]]:
        """The answers as they come, until so many seconds have passed or `enough` answers came."""
        if seconds <= 0 or (enough is not None and enough < 1):
            raise ConfigurationError(f"{self._sender.operation!r}: within(seconds > 0, enough >= 1)")
        sender, message, clock = self._sender, self._message, self._running.clock
        arrived: asyncio.Queue[Message | None] = asyncio.Queue()
        replies = await self._running.carriers.replies(self._running.home(sender.operation))
        message.until = clock.now() + seconds
        correlation = replies.expect(message, arrived.put_nowait)
        timer = clock.call_at(message.until, lambda: arrived.put_nowait(None))
        try:
            await sender.send(message)
            yield self._answers(arrived, enough)
        finally:
            timer.cancel()
            replies.forget(correlation)

    async def _answers(self, arrived: asyncio.Queue[Message | None], enough: int | None) -> AsyncIterator[Answer[R]]:
        count = 0
        seen: set[str] = set()  # at least once: the same responder's answer may come twice
        while (enough is None or count < enough) and (reply := await arrived.get()) is not None:
            if reply.status == DECLINED or reply.id in seen:
                continue
            seen.add(reply.id)
            failure = self._sender.bound.failure(reply)
            if failure is not None:
                log.warning("%s: %s could not answer: %s", self._sender.operation.full_name, reply.sender, failure)
                continue
            count += 1
            yield Answer(self._sender.bound.result(reply), reply.sender)


Connections: TypeAlias = Mapping[type[Contract] | str, str | Sequence[str]]


class Running:
    """One service while it runs: its transports, what it serves, and the path of each delivery."""

    def __init__(
        self,
        service: Service,
        at: Sequence[str],
        connect: Connections,
        format_name: str,
        carriers: Carriers,
        recorder: Recorder | Newest | None,
    ) -> None:
        self.service = service
        self.carriers = carriers
        self.clock = carriers.clock
        self._at = list(at)
        self._connect = {
            (key if isinstance(key, str) else key.__quintet__.name): ([to] if isinstance(to, str) else list(to))
            for key, to in connect.items()
        }
        self._format = format_name
        self._watch = carriers.watch_of(service.name)
        self._recorder = recorder
        self._gate = Gate(service.concurrency)
        self._servings: list[Serving] = []
        self.ready = False  # all that it needs stands: from now on it drains before it ends
        self._outlets: dict[AnyOperation, Sender] = {}
        self._homes: dict[AnyOperation, Transport] = {}
        self.relay: Relay | None = None
        self._pending: PendingWork | None = None
        self._seen: SeenStore | None = None
        self._kept: set[tuple[AnyOperation, str]] = set()  # what is worked off an inbox already
        self._stack = AsyncExitStack()
        self._state = State()  # what the filters of all its operations share

    def __repr__(self) -> str:
        return f"<running {self.service.name} at {', '.join(self._at)}>"

    # start-up: every error of configuration is raised here, none at the first call

    async def start(self) -> None:
        service = self.service
        self._check_handlers()
        self._served = [await self.carriers.reach(address) for address in self._at]
        for client, policies in service.clients:
            addresses = self._connect.get(type(client).__quintet__.name)
            if addresses is None:
                raise ConfigurationError(
                    f"service {service.name} uses {type(client).__name__}: say where it is,"
                    f" connect={{{type(client).__name__}: 'http://...'}} or connect.{type(client).__quintet__.name}"
                )
            await plug(client, self.carriers, addresses, policies, self._format, service.name)
        for operation in service.contract.__quintet__.operations.values() if service.contract else ():
            if operation.style in FANOUT:
                await self._open_outlet(operation)
        if any(handling.operation.style is Style.ASYNC_REQUEST for handling in service.handlings.values()):
            store = open_store(service.answers, keep=service.keep_answers, clock=self.clock)
            await store.open()
            self._stack.push_async_callback(store.close)
            self._pending = PendingWork(store, self.clock)
        if service.idempotent:
            self._seen = open_seen(service.idempotent, clock=self.clock)
            await self._seen.open()
            self._stack.push_async_callback(self._seen.close)
        if service.outbox.address:
            await self._open_relay()
        service.running = self
        if service.lifespan is not None:
            await self._stack.enter_async_context(service.lifespan(service))
        for handling in service.handlings.values():
            await self._serve(handling)

    async def stop(self) -> None:
        """Takes no more, lets what is in work end within the service's grace, and frees what it held."""
        if self.ready:
            self._watch.tell("draining", self.service.name)
        if self._pending:
            self._pending.drain()
        stopping = {asyncio.ensure_future(serving.stop()) for serving in self._servings}
        late = stopping
        try:
            late = (await asyncio.wait(stopping, timeout=self.service.grace))[1] if stopping else stopping
        finally:
            for stop in late:
                stop.cancel()  # and with it the work that it waits for
        if late:
            log.warning("%s: what was in work after %g s was cancelled", self.service.name, self.service.grace)
        for outcome in await asyncio.gather(*stopping, return_exceptions=True):
            if isinstance(outcome, Exception):
                log.error("%s: a channel did not stop cleanly", self.service.name, exc_info=outcome)
        self._servings.clear()
        await self._stack.aclose()
        if self.service.running is self:  # and not another, that this one could not start beside
            self.service.running = None

    def _check_handlers(self) -> None:
        service = self.service
        if service.running is not None:
            raise ConfigurationError(f"service {service.name} is running already in this process")
        for operation in service.contract.__quintet__.operations.values() if service.contract else ():
            if operation.style in OWN_STYLES and operation not in service.handlings:
                raise ConfigurationError(
                    f"service {service.name} has no handler for {operation!r}: write @service.handles({operation!r})"
                )
        if not self._at and any(h.operation.style in OWN_STYLES for h in service.handlings.values()):
            raise ConfigurationError(f"service {service.name}: say where it is served, at=['http://127.0.0.1:8001']")

    def _home_addresses(self, operation: AnyOperation) -> list[str]:
        return self._connect.get(operation.contract.__quintet__.name) or self._at

    async def _open_outlet(self, operation: AnyOperation) -> None:
        addresses = self._home_addresses(operation)
        if not addresses:
            raise ConfigurationError(f"service {self.service.name}: say where {operation!r} is published, at=[...]")
        transport = self._homes[operation] = await self.carriers.choose(operation, addresses)
        if operation.style is Style.SURVEY:
            await self.carriers.replies(transport)
        self._outlets[operation] = self._sender(operation, DEFAULT)

    def _sender(self, operation: AnyOperation, policy: Policy) -> Sender:
        transport = self._homes[operation]
        bound = bind(transport.binding, operation, self._format)
        guarded = Guarded(operation, policy, self.clock, watch=self._watch)
        return Sender(operation, bound, [transport.send], guarded, self.service.name)

    async def _open_relay(self) -> None:
        """What is in the outbox is sent by ways of its own: it is not to wait for circuits that calls have opened."""
        service = self.service
        senders = [self._sender(operation, POLICY.over(DEFAULT)) for operation in self._outlets]
        for client, policies in service.clients:
            contract = type(client)
            relayed, given = contract(), [policies] if isinstance(policies, Policy | On) else policies
            addresses = self._connect[contract.__quintet__.name]
            await plug(relayed, self.carriers, addresses, [*given, POLICY], self._format, service.name)
            senders += [call._line.sender for call in relayed.__dict__.values()]
        box = open_box(service.outbox.address, service.name, self.clock)
        self.relay = Relay(box, senders, self._format, self.clock, self._watch)
        self._stack.push_async_callback(self.relay.stop)
        await self.relay.open(service.outbox)

    def outlet(self, operation: AnyOperation, style: Style) -> Sender:
        """What sends an own event or survey. Raises ConfigurationError for one that is not this service's."""
        found = self._outlets.get(operation)
        if found is None or operation.style is not style:
            verb = "publish" if style is Style.EVENT else "ask"
            raise ConfigurationError(
                f"service {self.service.name} cannot {verb} {operation!r}: not of its own contract"
            )
        return found

    async def publish(
        self, operation: AnyOperation, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options
    ) -> None:
        sender = self.outlet(operation, Style.EVENT)
        await sender.send(sender.prepare(args, kwargs, options))

    def home(self, operation: AnyOperation) -> Transport:
        return self._homes[operation]

    async def _serve(self, handling: Handling) -> None:
        operation = handling.operation
        if operation.style in FANOUT:
            transport = await self.carriers.choose(operation, self._home_addresses(operation))
            await self._listen(transport, handling)
            return
        able = [transport for transport in self._served if not NEEDS[operation.style] - transport.traits]
        if not able:
            await self.carriers.choose(operation, self._at)  # raises CannotCarry with what each address lacks
        for transport in able:
            if operation.style is Style.REQUEST or Trait.REDELIVERS in transport.traits:
                await self._listen(transport, handling)
            elif operation.style is Style.ASYNC_REQUEST:
                # a direct transport forgets what it has handed over: the submission is kept with the answers
                await self._keep(transport, handling, self.service.inbox or self.service.answers)
            elif self.service.inbox:
                await self._keep(transport, handling, self.service.inbox)
            else:
                await self._listen(transport, handling)
            if self._pending and operation.style is Style.ASYNC_REQUEST:
                functions = self._pending.companions(operation, direct=Trait.REPLIES in transport.traits)
                for companion, function in zip(operation.companions, functions, strict=True):
                    await self._listen(transport, Handling(companion, function, False, handling.redelivery, own=False))

    async def _listen(self, transport: Transport, handling: Handling) -> None:
        bound = bind(transport.binding, handling.operation, self._format)
        group, channel = self.service.name, bound.channel
        if handling.native:
            channel = structs.replace(channel, native=handling.native)
        if handling.every_instance:
            group, channel = f"{group}.{new_id()}", _temporary(channel)
        await self._take(transport, channel, self._receiver(transport, handling, bound, group), group)

    async def _keep(self, transport: Transport, handling: Handling, address: str) -> None:
        """Serves a direct transport by putting each message into a durable inbox, and works the inbox off."""
        inbox = await self.carriers.reach(address)
        if Trait.REDELIVERS not in inbox.traits:
            raise CannotCarry(f"service {self.service.name}: inbox={address!r} lacks {Trait.REDELIVERS.name}")
        outside = bind(transport.binding, handling.operation, self._format)
        await self._take(transport, outside.channel, self._accepter(handling, outside, inbox), self.service.name)
        if inbox not in self._served and (handling.operation, address) not in self._kept:
            self._kept.add((handling.operation, address))
            await self._listen(inbox, handling)

    def _guarded(self, operation: AnyOperation) -> Guarded:
        return Guarded(operation, self.service.policy, self.clock, self._state, watch=self._watch)

    async def _take(self, transport: Transport, channel: Channel, receive: Receive, group: str) -> None:
        limit, bulkhead = self.service.concurrency, self.service.policy.bulkhead
        if Trait.REPLIES in transport.traits and isinstance(bulkhead, Bulkhead):
            limit = max(limit, bulkhead.limit + 1)  # a caller waits behind each: one more is taken, to refuse it
        self._servings.append(await transport.serve(channel, receive, group, limit))

    # the path of a delivery, from the transport's hand to the user's function and back

    def _receiver(self, transport: Transport, handling: Handling, bound: Bound, group: str) -> Receive:
        """What the transport calls: the door, where a failure becomes a message or a verdict."""
        operation, style, name = handling.operation, handling.operation.style, self.service.name
        handle = self._handler(handling, bound)
        if self._pending and style is Style.ASYNC_REQUEST:
            return self._pending.worker(operation, handle, bound, handling.redelivery, self._failure, self._refuse)
        direct = Trait.REPLIES in transport.traits
        retried = Trait.REDELIVERS in transport.traits and style in (Style.NOTIFICATION, Style.EVENT)
        answered = style in (Style.REQUEST, Style.SURVEY)

        async def receive(message: Message) -> Verdict:
            try:
                reply = await handle(message)
            except StillPending:
                reply = bound.pending(message)
            except Declined:
                reply = Message(channel=message.channel, operation=operation.full_name, status=DECLINED)
            except Exception as error:
                failure = self._failure(error, message, operation)
                if retried:
                    return self._told(message, decide(error, message.attempt, handling.redelivery, self.clock))
                reply = self._refuse(bound, message, failure, operation)
            if direct:
                return Done(reply)
            if answered and reply is not None and message.reply_to:
                reply.channel = Channel(message.reply_to, temporary=True)
                reply.correlation_id = message.correlation_id
                reply.id, reply.sender = f"{message.id}:{group}", name  # the same on a repeat: whoever waits counts one
                await self._send_reply(transport, reply)
            return DONE

        return receive

    def _told(self, message: Message, verdict: Verdict) -> Verdict:
        if isinstance(verdict, Dead):
            self._watch.tell("dead-letter", message.operation or message.channel.name, verdict.reason, message.attempt)
        return verdict

    async def _send_reply(self, transport: Transport, reply: Message) -> None:
        try:
            await transport.send(reply)
        except QuintetError as error:  # the caller waits no longer than its deadline; to handle it again would not help
            log.warning("%s: the reply %s could not be sent: %s", reply.operation, reply.id, error)

    def _handler(self, handling: Handling, bound: Bound) -> Handler:
        """The service's filters around the function: a message in, the reply out, failures raised."""
        operation, function, clock = handling.operation, handling.function, self.clock
        max_body, own = self.service.max_body, handling.own
        if self._seen and own and not handling.every_instance:
            function = once(function, operation, self._seen, bind("body", operation, self._format), self.service.name)
        gate = self._gate if own else Gate(sys.maxsize)  # who waits for an answer must not keep it from being made
        declared: tuple[type[Exception], ...] = operation.faults
        if operation.style is Style.SURVEY:
            declared = (*declared, Declined)
        invoke = _invoker(operation, function)

        async def call(message: Message) -> Message | None:
            if len(message.body) > max_body:
                raise TooLarge(f"{operation.full_name}: {len(message.body)} bytes, {max_body} are allowed")
            record = bound.arguments(message)
            if gate.busy < gate.limit:  # the usual case without an await
                gate.busy += 1
            else:
                await gate.enter()
                if message.deadline is not None and message.deadline <= clock.now():
                    gate.leave()
                    raise DeadlineExceeded(
                        f"{operation.full_name}: its deadline passed while it waited its turn", safety=Safety.NOT_SENT
                    )
            token = CURRENT.set(Current(message, clock, message.deadline))
            try:
                value = await invoke(record)
            except declared:
                raise
            except BaseException as error:
                if leaves(error):
                    raise
                raise HandlerFailed(error) if own or not isinstance(error, Exception) else error from None
            finally:
                gate.leave()
                CURRENT.reset(token)
            return bound.reply(message, value)

        handle = server_chain(self._guarded(operation), call)
        return handle if self._recorder is None else self._recorded(handle, operation, self._recorder)

    def _recorded(self, handle: Handler, operation: AnyOperation, recorder: Recorder | Newest) -> Handler:
        async def record(message: Message) -> Message | None:
            started, outcome = self.clock.wall(), "done"
            try:
                reply = await handle(message)
                if message.deadline is not None and self.clock.now() > message.deadline:
                    outcome = "late"
                return reply
            except BaseException as error:
                cause = error.error if isinstance(error, HandlerFailed) else error
                outcome = "declined" if isinstance(cause, Declined) else type(cause).__name__
                raise
            finally:
                recorder.write(
                    Exchange(
                        started=started,
                        ended=self.clock.wall(),
                        sender=message.sender,
                        receiver=self.service.name,
                        operation=operation.full_name,
                        style=operation.style.value,
                        id=message.id,
                        attempt=message.attempt,
                        outcome=outcome,
                    )
                )

        return record

    def _failure(self, error: Exception, message: Message, operation: AnyOperation) -> Fault | CallError:
        """What of a failure may travel; the rest goes to the log."""
        if isinstance(error, Fault) and (declared := error.among(operation.faults)) is not None:
            return declared
        if isinstance(error, CallError):
            error.correlation_id = message.id
            return error
        with suppress(Exception):  # a log that fails does not touch the work
            log.error(
                "%s failed (message %s from %s, attempt %d)",
                operation.full_name,
                message.id,
                message.sender or "?",
                message.attempt,
                exc_info=error.error if isinstance(error, HandlerFailed) else error,
            )
        return RemoteError(f"{operation.full_name} failed in {self.service.name}", correlation_id=message.id)

    def _refuse(self, bound: Bound, message: Message, failure: Fault | CallError, operation: AnyOperation) -> Message:
        """A failure as a reply; what cannot be written goes to the log, and a RemoteError in its place."""
        try:
            return bound.refuse(message, failure)
        except Exception as error:
            return bound.refuse(message, self._failure(HandlerFailed(error), message, operation))

    def _accepter(self, handling: Handling, outside: Bound, inbox: Transport) -> Receive:
        """Takes from a direct transport: what fits the contract is kept in the inbox, and then accepted."""
        operation = handling.operation
        inside = bind(inbox.binding, operation, self._format)

        async def keep(message: Message) -> Message | None:
            record = outside.arguments(message)
            kept = inside.request(record)
            kept.id, kept.sender, kept.deadline = message.id, message.sender, message.deadline
            kept.key = message.key or (operation.key_of(record) if operation.key_of else "")
            kept.headers = dict(Current(message, self.clock, None).headers)
            await inbox.send(kept)
            if self._pending and operation.style is Style.ASYNC_REQUEST:
                await self._pending.store.accept(message.id)
            return outside.accepted(message)

        handle = server_chain(self._guarded(operation), keep)

        async def receive(message: Message) -> Verdict:
            try:
                return Done(await handle(message))
            except Exception as error:
                return Done(self._refuse(outside, message, self._failure(error, message, operation), operation))

        return receive


def _invoker(operation: AnyOperation, function: Callable[..., Awaitable[Any]]) -> Callable[[Struct], Awaitable[Any]]:
    """Calls the function with the record of parameters taken apart: by position where the order is the same."""
    fields, parameters = operation.record.__struct_fields__, inspect.signature(function).parameters
    plain = all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters.values())
    if plain and list(parameters)[: len(fields)] == list(fields):
        return lambda record: function(*astuple(record))
    return lambda record: function(**asdict(record))


def _temporary(channel: Channel) -> Channel:
    return structs.replace(channel, temporary=True, durable=False)


def _feed(
    services: Sequence[Service],
    places: Callable[[], Iterable[Place]],
    carriers: Carriers,
    observe: str,
    recorder: Recorder | None,
) -> Feed:
    return Feed(
        [service.name for service in services],
        places,
        host=parse_address(observe).host,
        token=os.environ.get(TOKEN, ""),
        recorder=recorder,
        answers={fault.__name__ for service in services for handled in service.handlings for fault in handled.faults},
        clock=carriers.clock,
    )


@asynccontextmanager
async def serve(
    *services: Service,
    at: str | Sequence[str] = (),
    connect: Connections | None = None,
    format: str = "json",  # noqa: A002 - the word users know
    record: str = "",
    observe: str = "",
    listener: Listener | None = None,
    clock: Clock = SYSTEM,
) -> AsyncGenerator[list[str]]:
    """Runs services in this process and drains them at the end; gives the addresses that they are served at.

    `at`: where they are served, one address or several. `connect`: where the services are that they use, and where the
    events and surveys live that they handle, by contract or its name. `record`: a file to which each delivery is
    written (record.py). `observe`: an HTTP address for the /metrics, /hystrix.stream and /health of services that are
    served at none (every HTTP address in `at` has them too), and for the dashboard's feed (feed.py), which is nowhere
    else. `listener`: a function that is told what happens (watch.py). Raises ConfigurationError before anything is
    served.
    """
    carriers = Carriers("+".join(service.name for service in services), clock, listener)
    addresses = [at] if isinstance(at, str) else list(at)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(carriers.close)
        recorder = Recorder(record) if record else None
        if recorder:
            stack.callback(recorder.close)
        seen = [await carriers.reach(observe)] if observe else []
        if not all(isinstance(transport, Showing) for transport in seen):
            raise ConfigurationError(f"observe={observe!r} cannot show pages: name an http address")
        started = list[Running]()

        def places() -> list[Place]:
            return [*carriers.opened(), *(running.relay for running in started if running.relay)]

        feed = _feed(services, places, carriers, observe, recorder) if observe else None
        told = feed.newest if feed else recorder
        started += [Running(service, addresses, connect or {}, format, carriers, told) for service in services]
        for running in started:
            stack.push_async_callback(running.stop)
            await running.start()
        served = [await carriers.reach(address) for address in addresses]
        showing = {transport: None for transport in (*served, *seen) if isinstance(transport, Showing)}
        if showing:
            observer = Observer(clock, places)
            observer.start()
            stack.callback(observer.stop)
            for place in showing:
                place.pages = observer.pages
                if feed and place in seen:
                    stack.callback(feed.close)
                    place.pages = {**observer.pages, "/quintet.stream": feed.page}
        if feed:
            orders = await seen[0].serve(ORDERS, feed.receive, "quintet")
            if seen[0] in served:  # else it is open until all has drained
                stack.push_async_callback(orders.stop)
        for transport in dict.fromkeys((*served, *seen)):
            await transport.ready()
        for transport in seen:
            log.info("metrics are shown at %s/metrics", transport.address)
        for running in started:
            running.ready = True
            if running.relay:
                running.relay.start()
        yield [str(transport.address) for transport in served]
