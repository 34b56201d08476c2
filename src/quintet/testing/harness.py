"""Runs services and clients in one event loop, without sockets or files, and shows a test what was exchanged."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

from msgspec import structs

from quintet.binding import bind
from quintet.client import Carriers, plug
from quintet.clock import SYSTEM, Clock
from quintet.contract import FANOUT, Contract, Operation
from quintet.message import Message
from quintet.policy import Policies
from quintet.relay import Relay
from quintet.server import Running, Service
from quintet.store import Store
from quintet.testing.clock import FakeClock
from quintet.transport import Dead, DeadLetter, Done, Transport, Verdict, parse_address
from quintet.transports.memory import Carrier

C = TypeVar("C", bound=Contract)
T = TypeVar("T")

WITHIN = 5.0  # real seconds that `handled` waits
GRACE = 0.5  # real seconds that handlers still at work have at the end, then they are cancelled

_numbers = itertools.count(1)


class Harness:
    """What `harness` gives: clients, what was sent, what was handled, and the clock."""

    def __init__(self, brokers: Sequence[Carrier], carriers: Carriers, clock: Clock) -> None:
        self.brokers = brokers
        self.clock = clock
        self._carriers = carriers
        self._sent: list[Message] = []
        self._settled: list[tuple[str, Message, Verdict]] = []
        self._changed = asyncio.Event()
        for broker in brokers:
            broker.observe(self._observe)

    def __repr__(self) -> str:
        return f"<harness: {len(self._sent)} messages sent, {len(self._settled)} deliveries settled>"

    def connect(self, contract: type[C], *, policy: Policies = (), name: str = "test") -> C:
        """A connected client of one of the services; `name` is what they see as the sender."""
        client = contract()
        addresses = [broker.address.text for broker in self.brokers]
        _at_once(plug(client, self._carriers, addresses, policy, "json", name))
        return client

    def messages(self, operation: Operation[Any, Any, Any]) -> list[Message]:
        """The messages of an operation that were sent so far, oldest first."""
        return [message for message in self._sent if message.channel.name == operation.channel.name]

    def sent(self, operation: Operation[Any, Any, Any]) -> list[Any]:
        """Their parameters, each as a record: `bench.sent(Trips.created)[0].trip.id`."""
        bound = bind("body", operation)
        return [bound.arguments(message) for message in self.messages(operation)]

    async def handled(self, operation: Operation[Any, Any, Any], *, by: str = "", count: int = 1) -> list[Any]:
        """Waits until so many messages of an operation were handled since the start, and returns their parameters.

        `by`: the name of the service that handles it, needed for events and surveys that several hear. Raises
        AssertionError after 5 s of real time, or as soon as one is dead, and says what happened instead.
        """
        loop = asyncio.get_running_loop()
        give_up = loop.time() + WITHIN
        while True:
            verdicts = [
                (message, verdict)
                for group, message, verdict in self._settled
                if message.channel.name == operation.channel.name
                and (not by or operation.style not in FANOUT or group == by or group.startswith(f"{by}."))
            ]
            done = [message for message, verdict in verdicts if isinstance(verdict, Done)]
            if len(done) >= count:
                bound = bind("body", operation)
                return [bound.arguments(message) for message in done]
            dead = any(isinstance(verdict, Dead) for _, verdict in verdicts)
            if dead or loop.time() >= give_up:
                raise AssertionError(self._instead(operation, by, count, [verdict for _, verdict in verdicts]))
            self._changed.clear()
            timer = loop.call_at(give_up, self._changed.set)
            await self._changed.wait()
            timer.cancel()

    async def advance(self, seconds: float) -> None:
        """Moves the fake clock on and lets all that falls due happen."""
        if not isinstance(self.clock, FakeClock):
            raise TypeError("this harness runs on the system's clock: harness(..., clock=FakeClock())")
        await self.clock.advance(seconds)

    async def dead(self) -> Sequence[DeadLetter]:
        """The messages that could not be handled, oldest first."""
        return [letter for broker in self.brokers for letter in await broker.dead()]

    def _observe(self, group: str, message: Message, verdict: Verdict | None) -> None:
        kept = structs.replace(message, headers=message.headers.copy())  # as it was at this moment
        if verdict is None:
            self._sent.append(kept)
        else:
            self._settled.append((group, kept, verdict))
        self._changed.set()

    def _instead(self, operation: Operation[Any, Any, Any], by: str, count: int, verdicts: list[Verdict]) -> str:
        done = sum(isinstance(verdict, Done) for verdict in verdicts)
        sent = len(self.messages(operation))
        text = f"{operation!r} was handled {done} of {count} times{f' by {by}' if by else ''}; it was sent {sent} times"
        for verdict in verdicts[-3:]:
            if isinstance(verdict, Dead):
                text += f"; a delivery died: {verdict.reason}"
            elif not isinstance(verdict, Done):
                text += f"; a delivery comes again after {verdict.after:g} s: {verdict.reason}"
        if sent and not verdicts:
            text += "; no delivery was finished: who handles it is busy, or nobody does"
        if not sent:
            others = sorted({message.operation for message in self._sent})
            text += f"; what was sent is {', '.join(others) or 'nothing at all'}"
        return text


@asynccontextmanager
async def harness(
    *services: Service,
    clock: Clock | None = None,
    like: Sequence[str] = (),
    wrap: Callable[[Transport], Transport] = lambda transport: transport,
) -> AsyncGenerator[Harness]:
    """Runs the services over memory brokers of their own, connected to one another, and drains them at the end
    (what is still at work half a second later is cancelled).

    `clock`: a FakeClock where the test moves time. `like`: the transports that they have in production, as
    ["http", "sqlite"]: a broker for each, with its traits. `wrap`: what stands between the services and a broker, as
    `lambda transport: FaultyTransport(transport, drop=0.1)`. What a service keeps on disk in production, its answers,
    its inbox and what it has handled, is kept in memory. Raises ConfigurationError as `serve` does.
    """
    clock, name = clock or SYSTEM, f"memory://harness-{next(_numbers)}"
    addresses = [f"{name}.{scheme}?like={scheme}" for scheme in like] or [name]
    carriers = Carriers("harness", clock)
    connect: dict[type[Contract] | str, Sequence[str]] = {
        contract.__quintet__.name: addresses
        for service in services
        for contract in (
            *(type(client) for client, _ in service.clients),
            *(operation.contract for operation in service.handlings),
        )
    }
    async with AsyncExitStack() as stack:
        brokers, transports, relays = list[Carrier](), list[Transport](), list[Relay]()
        for address in addresses:
            broker = Carrier(parse_address(address), clock)
            transport = carriers._open[address] = wrap(Carrier(parse_address(address), clock))
            for opening in (broker, transport):
                await opening.open()
                stack.push_async_callback(opening.close)
            brokers.append(broker)
            transports.append(transport)
        stack.push_async_callback(carriers.close)
        for service in services:
            for kept in ("answers", "inbox"):
                stack.callback(setattr, service, kept, getattr(service, kept))
                setattr(service, kept, f"{name}.{kept}.{service.name}" if getattr(service, kept) else "")
            memory = f"{name}.{service.name}"
            if seen := service.idempotent:
                stack.callback(setattr, service, "idempotent", seen)
                service.idempotent = structs.replace(seen, address=memory) if isinstance(seen, Store) else memory
                if service.outbox.address == (seen.address if isinstance(seen, Store) else seen):
                    stack.callback(setattr, service.outbox, "address", service.outbox.address)
                    service.outbox.address = memory
            running = Running(service, addresses, connect, "json", carriers, None)
            stack.push_async_callback(_stop, running)
            await running.start()
            relays += [running.relay] if running.relay else []
        for transport in transports:
            await transport.ready()
        for relay in relays:
            relay.start()
        yield Harness(brokers, carriers, clock)


async def _stop(running: Running) -> None:
    try:
        await asyncio.wait_for(running.stop(), GRACE)
    except TimeoutError:  # a handler that a test left hanging: its work was cancelled with the wait
        await running.stop()


def _at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits for nothing: the memory transport opens and serves without."""
    try:
        coroutine.send(None)
    except StopIteration as finished:
        result: T = finished.value
        return result
    coroutine.close()
    raise RuntimeError("the memory transport was expected not to wait here")
