"""The caller's side: `connect`, and how a call becomes a message and its reply a value."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar

from msgspec import UNSET, structs

from quintet.binding import PENDING, Bound, bind, fill_link
from quintet.cache_key import cache_key
from quintet.call import DEFAULTS, Call, Options, Pending, PendingCall, Reply
from quintet.clock import SYSTEM, Clock
from quintet.compiler import model_of
from quintet.context import CURRENT
from quintet.contract import FANOUT, LONGEST_WAIT, NEEDS, Contract, Operation, Style
from quintet.errors import (
    CALLERS_MISTAKES,
    AddressError,
    CallError,
    CannotCarry,
    ConnectionLost,
    DeadlineExceeded,
    Safety,
    TransportError,
    Unavailable,
)
from quintet.fallback import Fallbacks
from quintet.filter import Guarded, State, client_chain
from quintet.message import Handler, Message, new_id
from quintet.meter import CLIENTS, meters
from quintet.policy import On, Policies, Policy, resolve
from quintet.replies import Replies
from quintet.resolver import Following, resolver_of
from quintet.transport import Trait, Transport, open_address, parse_address
from quintet.watch import Listener, Watch

log = logging.getLogger("quintet.client")

C = TypeVar("C", bound=Contract)

LINGER = 60.0  # seconds that an instance which left may still end what it has in work
_TRACE = ("traceparent", "tracestate", "baggage")  # W3C trace context, handed on to nested calls


class Carriers:
    """The transports that one client or service talks through: one per address, with its replies where needed."""

    def __init__(self, owner: str, clock: Clock, listener: Listener | None = None) -> None:
        self.owner = owner
        self.clock = clock
        self.listener = listener
        self._open: dict[str, Transport] = {}
        self._replies: dict[str, Replies] = {}
        self._stacks: dict[str, AsyncExitStack] = {}  # what closes with the transport of an address
        self._followed: dict[str, Following | None] = {}
        self._refresh: list[Callable[[], Awaitable[None]]] = []
        self._refreshing = asyncio.Lock()
        self._found: dict[str, float | None] = {}  # instances that a resolver found, and when one that left is closed
        self._watches: list[Watch] = []
        self.watch = self.watch_of(owner)

    def watch_of(self, owner: str) -> Watch:
        """What tells this client's or process's listener what happens in one of its services."""
        found = Watch(owner, self.listener, self.clock)
        self._watches.append(found)
        return found

    async def reach(self, address: str) -> Transport:
        """The opened transport of an address. Raises AddressError, TransportError."""
        found = self._open.get(address)
        if found is None:
            if resolver_of(address):
                raise AddressError(f"{address} says where to look for a service to call: nothing is served there")
            found = open_address(address, self.clock)
            found.tell = self._heard
            await found.open()
            stack = self._stacks[address] = AsyncExitStack()
            stack.callback(self.watch.tell, "disconnected", str(found.address))
            stack.push_async_callback(found.close)
            self._open[address] = found
            self.watch.tell("connected", str(found.address))
        return found

    def _heard(self, kind: Literal["broker-lost", "broker-back"], subject: str, reason: object = "") -> None:
        """A transport's broker went away or is back: then circuits that opened meanwhile need not wait any longer."""
        self.watch.tell(kind, subject, reason)
        if kind == "broker-back":
            for meter in meters(CLIENTS):
                if meter.circuit is not None and meter.watch in self._watches:
                    meter.circuit.try_now()

    def opened(self) -> list[Transport]:
        return list(self._open.values())

    async def exchange(self, transport: Transport) -> Handler:
        """Sends a request over the transport and brings its reply."""
        if Trait.REPLIES in transport.traits:
            return transport.send
        return (await self.replies(transport)).exchange

    async def replies(self, transport: Transport) -> Replies:
        address = transport.address.text
        found = self._replies.get(address)
        if found is None:
            found = self._replies[address] = Replies(transport, self.owner)
            await found.open()
            self._stacks.setdefault(address, AsyncExitStack()).push_async_callback(found.close)
        return found

    async def choose(self, operation: Operation[Any, Any, Any], addresses: Sequence[str]) -> Transport:
        """The first of the addresses that can carry the operation. Raises CannotCarry with what each one lacks."""
        lacking: list[str] = []
        for address in addresses:
            following = await self.follow(address)
            if following and operation.style in FANOUT:
                lacking.append(f"{address} finds instances to call, no channel that all of them share")
                continue
            transport = following.model if following else await self.reach(address)
            missing = NEEDS[operation.style] - transport.traits
            if not missing:
                return transport
            lacking += [f"{transport.address} lacks {trait.name} ({trait.value})" for trait in missing]
        raise CannotCarry(
            f"{operation!r} ({operation.style.value}) cannot be carried: {'; '.join(lacking) or 'no address was given'}"
        )

    async def instances(
        self, operation: Operation[Any, Any, Any], addresses: Sequence[str]
    ) -> tuple[Transport, list[Transport]]:
        """The chosen transport, and all that are like it: instances of a service (none where a resolver finds none)."""
        chosen = await self.choose(operation, addresses)
        found: dict[str, Transport] = {}
        for address in addresses:
            following = await self.follow(address)
            for instance in following.addresses if following else [address]:
                if parse_address(instance).scheme == chosen.address.scheme:
                    try:
                        found[instance] = await self.reach(instance)
                        if following:
                            self._found[instance] = None
                    except TransportError as error:
                        if not following:
                            raise
                        log.warning("%s: %s cannot be reached: %s", address, instance, error)
        return chosen, [transport for transport in found.values() if transport.traits == chosen.traits]

    async def follow(self, address: str) -> Following | None:
        """What follows the instances behind an address; None where it is an instance's own. Raises AddressError."""
        if address not in self._followed:
            resolver = resolver_of(address)
            following = self._followed[address] = Following(resolver, self.clock, self._renew) if resolver else None
            if following:
                await following.open()
        return self._followed[address]

    def on_change(self, refresh: Callable[[], Awaitable[None]]) -> None:
        """Calls back when the instances behind an address are others than before."""
        self._refresh.append(refresh)

    async def _renew(self) -> None:
        """Has all clients take in the instances that came, and closes those that left some time ago."""
        async with self._refreshing:
            for refresh in self._refresh:
                await refresh()
            there = {one for following in self._followed.values() if following for one in following.addresses}
            now = self.clock.now()
            for address, until in list(self._found.items()):
                if address in there or address in self._followed:
                    continue
                if until is None:
                    self._found[address] = now + LINGER
                elif until <= now:
                    del self._found[address], self._open[address]
                    self._replies.pop(address, None)
                    await self._stacks.pop(address).aclose()

    async def close(self) -> None:
        for watch in self._watches:
            watch.ended = True
        for following in self._followed.values():
            if following:
                await following.close()
        async with AsyncExitStack() as stack:
            for one in self._stacks.values():
                stack.push_async_callback(one.aclose)


class Sender:
    """One operation on its way out: compiled once, then `prepare` and `send` for each message."""

    def __init__(
        self,
        operation: Operation[Any, Any, Any],
        bound: Bound,
        exchanges: Sequence[Handler],
        guarded: Guarded,
        sender: str,
    ) -> None:
        self.operation = operation
        self.bound = bound
        self._record = operation.record
        self._key_of = operation.key_of
        self._sender = sender
        self.clock = guarded.clock
        self._guarded = guarded
        self.keyed = False  # whether its replies are kept, and a message needs the key that they are found by
        self.reach(exchanges)

    @property
    def instances(self) -> tuple[str, ...]:
        """The addresses that it is sent to, one for each message, where there are several."""
        return self._guarded.instances

    def reach(self, exchanges: Sequence[Handler], instances: Sequence[str] = ()) -> None:
        """Sends to others from the next message on. What filters remember of those that stay stays."""
        self._exchanges = list(exchanges)
        self._guarded = structs.replace(self._guarded, instances=tuple(instances))
        self.guard(self._guarded.policy)

    def guard(self, policy: Policy) -> None:
        """Puts a policy in force from the next message on. What filters remember stays."""
        self.patience = policy.timeout or 1.0  # beside the wait that a pending answer's request asks for
        self._guarded = structs.replace(self._guarded, policy=policy)
        self.send = client_chain(self._guarded, self._exchanges)

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options = DEFAULTS) -> Message:
        """The call as a message. Raises TypeError for arguments that are not the operation's."""
        try:
            record = self._record(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.operation!r}: {error}") from None
        message = self.bound.request(record)
        message.id = new_id()
        message.sender = self._sender
        if self._key_of:
            message.key = self._key_of(record)
        inherited = CURRENT.get()._message.headers
        if inherited:
            for name in _TRACE:
                if name in inherited:
                    message.headers[name] = inherited[name]
        if options is not DEFAULTS:
            message.id = options.id or message.id
            message.key = options.key or message.key
            message.headers.update(options.headers)
            message.native = options.native
            now = self.clock.now()
            if options.timeout is not UNSET:
                message.until = math.inf if options.timeout is None else now + options.timeout
            if options.expires is not None:
                message.deadline = now + options.expires
        if self.keyed:
            message.cache_key = cache_key(record, options.headers)
        return message


def _raising(exchange: Handler, bound: Bound) -> Handler:
    async def exchange_or_raise(message: Message) -> Message | None:
        reply = await exchange(message)
        if reply is not None:
            failure = bound.failure(reply)  # an exception again, inside the filters: retry and breaker must see it
            if failure is not None:
                try:
                    raise failure
                finally:
                    del failure  # its traceback holds this frame: a cycle for the garbage collector at each fault
        return reply

    return exchange_or_raise


class Line:
    """An operation of a connected client (call.Line)."""

    def __init__(
        self,
        sender: Sender,
        lines: Mapping[str, Line],
        companions: tuple[Sender, Sender] | None,
        guarded: Guarded,
    ) -> None:
        self.name = sender.operation.full_name
        self.sender = sender
        self._lines = lines
        self._companions = companions
        self._waits = sender.operation.style is Style.REQUEST
        self._guarded = guarded
        self._fallbacks: Fallbacks | None = None

    @property
    def senders(self) -> Sequence[Sender]:
        return (self.sender, *(self._companions or ()))

    def guard(self, on: On) -> None:
        """Puts a policy and its fallbacks in force from the next call on."""
        for sender in self.senders:
            sender.guard(on.policy)
        guarded = structs.replace(self._guarded, policy=on.policy)
        self._fallbacks = Fallbacks(guarded, on.fallback, self._read) if on.fallback else None
        self.sender.keyed = bool(on.policy.cache or (self._fallbacks and self._fallbacks.keeps))

    async def value(self, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> Any:
        message = self.sender.prepare(args, kwargs, options)
        if self._fallbacks:
            return (await self._answer(self._fallbacks, message, args, kwargs)).value
        return self._value_of(message, await self.sender.send(message))

    def _value_of(self, message: Message, reply: Message | None) -> Any:
        if self._waits:
            return self.sender.bound.result(_there(reply, self.name))
        return Pending(self, message.id) if self._companions else None

    async def reply(self, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> Reply[Any]:
        message = self.sender.prepare(args, kwargs, options)
        if self._fallbacks:
            return await self._answer(self._fallbacks, message, args, kwargs)
        reply = await self.sender.send(message)
        if not self._waits:
            return Reply(self._value_of(message, reply), reply.headers if reply else {})
        return self._read(_there(reply, self.name))

    async def _answer(
        self, fallbacks: Fallbacks, message: Message, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Reply[Any]:
        """The reply, or what stands in for it: above the codec, for a reply that cannot be read is a failure too."""
        sent = False
        try:
            reply = _there(await self.sender.send(message), self.name)
            sent = True
            read = self._read(reply)
        except CallError as error:
            if isinstance(error, CALLERS_MISTAKES) and not sent:
                raise  # a call that is wrong would be wrong for ever, and nobody would see it
            answer = await fallbacks.answer(error, message.cache_key, args, kwargs)
            if answer is None:
                raise
            return answer
        fallbacks.keep(message.cache_key, reply)
        return read

    def _read(self, reply: Message, stale: bool = False) -> Reply[Any]:
        value = self.sender.bound.result(reply)
        links = {
            name: partial(self._follow, name, href, value) for name, href in self.sender.bound.links(reply).items()
        }
        return Reply(value, reply.headers, links, stale)

    async def _follow(self, name: str, href: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        operation = self.sender.operation
        target = self._lines[operation.links[name].operation]
        filled = fill_link(operation, name, value)
        open_fields = [field for field in target.sender.operation.record.__struct_fields__ if field not in filled]
        said = dict(zip(open_fields, args, strict=False)) | kwargs
        message = target.sender.prepare((), filled | said)
        if href:
            target.sender.bound.follow(message, href, said)
            if message.cache_key:
                message.cache_key += href.encode("utf-8", "surrogatepass")  # the service says where, not the record
        return target._value_of(message, await target.sender.send(message))

    async def result(self, pending_id: str, wait: float | None) -> Any:
        collect, clock = self._companion(0), self.sender.clock
        until = None if wait is None else clock.now() + wait
        failures = 0
        while True:
            left = LONGEST_WAIT if until is None else min(LONGEST_WAIT, max(0.0, until - clock.now()))
            message = collect.prepare((pending_id, left), {})
            message.until = clock.now() + left + collect.patience
            try:
                reply = _there(await collect.send(message), self.name)
            except CallError as error:
                # to ask again is harmless: who said how long they wait outlives a restart of the service
                failures += 1
                pause = min(0.1 * 2**failures, 2.0)
                if error.safety is Safety.FAILED or until is None or clock.now() + pause >= until:
                    raise
                await clock.sleep(pause)
                continue
            if reply.status != PENDING:
                return collect.bound.result(reply)
            if until is not None and clock.now() >= until:
                raise DeadlineExceeded(f"{self.name}: no answer yet after {wait:g} s (the work goes on)")

    async def cancel(self, pending_id: str) -> None:
        withdraw = self._companion(1)
        await withdraw.send(withdraw.prepare((pending_id,), {}))

    def _companion(self, which: int) -> Sender:
        assert self._companions is not None, "only an async request has a result and a cancel"  # noqa: S101
        return self._companions[which]


def _there(reply: Message | None, name: str) -> Message:
    if reply is None:
        raise ConnectionLost(f"{name}: the transport brought no reply")
    return reply


async def plug(
    client: Contract, carriers: Carriers, addresses: Sequence[str], policies: Policies, format_name: str, name: str
) -> None:
    """Puts the typed calls of its contract into a client that sends under `name`. Raises ConfigurationError."""
    contract = type(client)
    policy = resolve(contract, policies)
    service = State()  # of the remote service, shared by all of its operations
    lines: dict[str, Line] = {}
    watch = carriers.watch_of(name)

    async def sender(guarded: Guarded, binding: str, transports: Sequence[Transport]) -> Sender:
        made = Sender(guarded.operation, bind(binding, guarded.operation, format_name), [_nobody], guarded, name)
        await point(made, transports)
        return made

    async def point(sender: Sender, transports: Sequence[Transport]) -> None:
        exchanges = [await way(sender, transport) for transport in transports]
        sender.reach(exchanges or [_nobody], [transport.address.text for transport in transports])

    async def way(sender: Sender, transport: Transport) -> Handler:
        if sender.operation.style is Style.REQUEST or Trait.REPLIES in transport.traits:
            return _raising(await carriers.exchange(transport), sender.bound)
        return transport.send  # nothing comes back that could say that it failed

    async def refresh() -> None:
        for line in lines.values():
            _, transports = await carriers.instances(line.sender.operation, addresses)
            if line.sender.instances != tuple(transport.address.text for transport in transports):
                for sender in line.senders:
                    await point(sender, transports)

    for attribute, operation in contract.__quintet__.operations.items():
        if operation.style in FANOUT:
            continue  # only the contract's own service publishes and asks
        chosen, instances = await carriers.instances(operation, addresses)
        companions = None
        call: type[Call[Any, Any]] = Call
        where = " or ".join(str(transport.address) for transport in instances or [chosen])
        guarded = Guarded(operation, policy[attribute].policy, carriers.clock, service, where=where, watch=watch)
        if operation.style is Style.ASYNC_REQUEST:
            collect, withdraw = (
                structs.replace(guarded, operation=other, own=State()) for other in operation.companions
            )
            companions = (
                await sender(collect, chosen.binding, instances),
                await sender(withdraw, chosen.binding, instances),
            )
            call = PendingCall
        lines[attribute] = Line(await sender(guarded, chosen.binding, instances), lines, companions, guarded)
        lines[attribute].guard(policy[attribute])
        client.__dict__[attribute] = call(lines[attribute])
    carriers.on_change(refresh)


async def _nobody(message: Message) -> Message | None:
    raise Unavailable(f"{message.operation}: not sent, no instance of its service is known at the moment")


def set_policy(client: Contract, policy: Policies) -> None:
    """Changes the policy of a connected client while it is in use.

    Calls under way end as they began; breakers, limits, budgets and kept replies go on from where they are. Raises
    ConfigurationError where the policy is wrong: then the old one stays in force.
    """
    found = resolve(type(client), policy)
    for attribute, call in client.__dict__.items():
        call._line.guard(found[attribute])


class connect(Generic[C]):  # noqa: N801 - reads as a verb: async with connect(Trips, address) as trips
    """A typed client of a contract: `async with connect(Passengers, "http://127.0.0.1:8001") as passengers: ...`.

    `addresses`: one or several; each operation takes the first that can carry its style. `policy`: a Policy, or a list
    of one and of `on(operation, ...)`. `name`: what the service sees as the sender. `format`: what requests are written
    in. `listener`: a function that is told what happens (watch.py). Raises ConfigurationError on entering; its calls
    raise declared faults and CallError.
    """

    def __init__(
        self,
        contract: type[C],
        addresses: str | Sequence[str],
        *,
        policy: Policies = (),
        name: str = "client",
        format: str = "json",  # noqa: A002 - the word users know
        listener: Listener | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        model_of(contract)  # refuses what contradicts itself
        self._contract = contract
        self._addresses = [addresses] if isinstance(addresses, str) else list(addresses)
        self._policy = policy
        self._format = format
        self._name = name
        self._carriers = Carriers(name, clock, listener)

    def __repr__(self) -> str:
        return f"<connect {self._contract.__name__} at {', '.join(self._addresses)}>"

    async def __aenter__(self) -> C:
        client = self._contract()
        try:
            await plug(client, self._carriers, self._addresses, self._policy, self._format, self._name)
        except BaseException:
            await self._carriers.close()
            raise
        return client

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._carriers.close()
