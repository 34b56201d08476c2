"""`quintet bridge`: moves channels from one transport to another, while services go on, for migrations."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import re
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from msgspec import Struct, structs

from quintet.cli.exits import run, sentence
from quintet.cli.loading import load_operation
from quintet.cli.numbers import seconds_or_none
from quintet.client import Carriers
from quintet.clock import SYSTEM
from quintet.errors import (
    PROBLEM_MEDIA_TYPE,
    CallError,
    ConfigurationError,
    InvalidMessage,
    Safety,
    TooLarge,
    TransportError,
    to_problem,
)
from quintet.message import Channel, Handler, Message
from quintet.transport import DONE, Address, Again, Dead, Serving, Trait, Transport, Verdict, parse_address

EXAMPLES = """\b
Examples:
  quintet bridge sqlite:///rides.db amqp://localhost --channel rides.contracts:Trips.arrived
  quintet bridge amqp://localhost kafka://localhost --channel trips.v1.created --fanout --group billing
  quintet bridge sqlite:///rides.db amqp://localhost --channel trips.v1.arrived --idle 5
"""
ACCEPT_SECONDS = 10.0  # that the other side may take to accept a message, before it is tried again
REPLY_SECONDS = 300.0  # that a request without a deadline is waited for
RETRY_SECONDS = 1.0
ENDING_SECONDS = 3.0  # for what is in work at the end; what TO has not accepted by then stays at FROM
REASONS_KEPT = 1000

# where an address names no port, to see that FROM and TO are one
USUAL_PORTS: Final = {
    "amqp": 5672,
    "amqps": 5671,
    "stomp": 61613,
    "stomps": 61614,
    "kafka": 9092,
    "kafkas": 9092,
    "nsq": 4150,
    "nsqs": 4150,
}
PRECONDITION_FAILED: Final = 406
"""What AMQP says of a queue that is there with other arguments."""


def bridge(
    source: Annotated[str, typer.Argument(metavar="FROM", help="The transport whose messages are moved.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="The transport that they are moved to.")],
    channels: Annotated[
        list[str],
        typer.Option(
            "--channel",
            metavar="NAME",
            help="As trips.v1.arrived, or its operation as rides.contracts:Trips.arrived; may be repeated.",
        ),
    ],
    group: Annotated[
        str, typer.Option("--group", help="Fan-out: the one group whose copies are moved; others keep theirs.")
    ] = "bridge",
    fanout: Annotated[bool, typer.Option("--fanout", help="The channels given by name are of events.")] = False,
    keyed: Annotated[bool, typer.Option("--keyed", help="The channels given by name keep the order of keys.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Messages on their way at once.")] = 100,
    idle: Annotated[
        float,
        typer.Option("--idle", callback=seconds_or_none, help="Ends when nothing came for so many seconds; 0: never."),
    ] = 0.0,
) -> None:
    """Moves what waits in channels, and what comes, from one transport to another, without loss.

    A message is taken from FROM once TO has accepted it, with its id: where the bridge is killed in between it goes
    over twice, and a receiver that is idempotent knows the repeat. A request's reply is brought back. What TO cannot
    hold becomes a dead letter at FROM. Services may be moved one by one meanwhile: first the receivers, then the
    senders. Ctrl-C or SIGTERM ends it, within seconds.

    An event that is moved goes to every group at TO: move a fan-out channel once, over one group. A second bridge over
    another group would send each event again, to all of them; let what that group has be handled at FROM.
    """
    _refuse_one_place(parse_address(source), parse_address(target))
    run(_bridge(source, target, [_way(name, fanout, keyed) for name in channels], group, limit, idle))


def _refuse_one_place(start: Address, end: Address) -> None:
    """Raises ConfigurationError where both are one, as far as their texts and the names of hosts tell."""
    if start.scheme == end.scheme and _places(start) & _places(end):
        raise ConfigurationError(f"FROM {start} and TO {end} are the same: there is nothing to move")


def _places(address: Address) -> set[tuple[Any, ...]]:
    """What an address leads to: two that share any of it are one."""
    if not address.host:
        return {(str(Path(address.path.removeprefix("/")).resolve()),)}
    found: set[tuple[Any, ...]] = set()
    for host, port in address.hosts:
        found |= {(ip, port or USUAL_PORTS.get(address.scheme), address.path.strip("/")) for ip in _ips(host)}
    return found


def _ips(host: str) -> set[str]:
    try:
        found = {str(one[4][0]) for one in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return {host}
    return {"loopback" if ipaddress.ip_address(ip).is_loopback else ip for ip in found}


class _Way(Struct, frozen=True):
    """A channel to be moved, as its contract says or, where only its name was given, as the options do."""

    channel: Channel
    by_name: bool


def _way(name: str, fanout: bool, keyed: bool) -> _Way:
    if ":" in name:
        return _Way(load_operation(name).channel, by_name=False)
    if not name.strip() or "*" in name or "#" in name:
        raise ConfigurationError(f"--channel {name!r} names no channel: give each its own --channel, without * and #")
    return _Way(Channel(name, fanout=fanout, durable=True, keyed=keyed), by_name=True)


async def _bridge(source: str, target: str, ways: Sequence[_Way], group: str, limit: int, idle: float) -> None:
    async with _open(source, target) as (carriers, here, there):
        mover, ended = _Mover(here, there, await carriers.exchange(there)), asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
        async with _served(here, ways, mover, group, limit):
            names = ", ".join(way.channel.name for way in ways)
            print(f"moving {names} from {here.address} to {there.address}; Ctrl-C ends it", file=sys.stderr, flush=True)
            if idle:
                _end_when_quiet(mover, idle, ended)
            await ended.wait()


def _end_when_quiet(mover: _Mover, seconds: float, ended: asyncio.Event) -> None:
    due = (SYSTEM.now() if mover.working else mover.last) + seconds
    if due <= SYSTEM.now():
        ended.set()
    else:
        SYSTEM.call_at(due, lambda: _end_when_quiet(mover, seconds, ended))


@asynccontextmanager
async def _open(source: str, target: str) -> AsyncGenerator[tuple[Carriers, Transport, Transport]]:
    """Both transports, open. Raises ConfigurationError where one of them is of no use."""
    carriers = Carriers("quintet-bridge", SYSTEM)
    try:
        here, there = await carriers.reach(source), await carriers.reach(target)
        if Trait.REDELIVERS not in here.traits:
            raise ConfigurationError(f"{here.address} keeps no messages that could be moved: it hands them on")
        if there.binding != here.binding:
            raise ConfigurationError(f"{there.address} carries other messages ({there.binding}) than {here.address}")
        yield carriers, here, there
    finally:
        await carriers.close()


@asynccontextmanager
async def _served(here: Transport, ways: Sequence[_Way], mover: _Mover, group: str, limit: int) -> AsyncGenerator[None]:
    """All channels being moved; says at the end how many messages were."""
    servings: list[Serving] = []
    ready = False
    try:
        for way in ways:
            servings += [await _serve(here, way, mover, group, limit)]
        await here.ready()
        ready = True
        yield
    finally:
        with contextlib.suppress(TimeoutError):  # then what is in work is cancelled, and given back
            async with asyncio.timeout(ENDING_SECONDS):
                await asyncio.gather(*(serving.stop() for serving in servings))
        if ready or mover.moved:
            dead = f", {mover.dead} dead letters at {here.address}" if mover.dead else ""
            print(f"{mover.moved} moved{dead}", flush=True)


async def _serve(here: Transport, way: _Way, mover: _Mover, group: str, limit: int) -> Serving:
    """Raises ConfigurationError where the channel that is there is another than --channel says."""
    channel = way.channel
    receive = functools.partial(mover.receive, channel)
    try:
        return await here.serve(channel, receive, group, limit)
    except TransportError as error:
        if getattr(error.__cause__, "code", 0) != PRECONDITION_FAILED:
            raise
        if way.by_name:
            keyed = "leave out --keyed" if channel.keyed else "say --keyed"
            raise ConfigurationError(
                f"{channel.name} at {here.address} is another channel than --channel says ({error.__cause__}):"
                f" {keyed}, or name its operation as MODULE:CONTRACT.OPERATION"
            ) from None
        as_it_is = structs.replace(channel, native=here.as_it_is)  # its handler has native options
        return await here.serve(as_it_is, receive, group, limit)


class _Mover:
    """What is called with each message, and what became of them all."""

    def __init__(self, here: Transport, there: Transport, exchange: Handler) -> None:
        self.moved = self.dead = self.working = 0
        self.last = SYSTEM.now()  # time that a message was in work, or is to come again
        self._here = here
        self._there = there
        self._exchange = exchange
        self._told: set[str] = set()

    async def receive(self, channel: Channel, message: Message) -> Verdict:
        self.working += 1
        try:
            verdict = await self._move(channel, message)
        finally:
            self.working -= 1
            self.last = SYSTEM.now()
        if isinstance(verdict, Again):
            self.last += 2 * verdict.after
        return verdict

    async def _move(self, channel: Channel, message: Message) -> Verdict:
        now, reply_to, correlation = SYSTEM.now(), message.reply_to, message.correlation_id
        until = message.deadline or now + (REPLY_SECONDS if reply_to else ACCEPT_SECONDS)
        copy = structs.replace(message, channel=channel, attempt=1, until=min(until, now + ACCEPT_SECONDS))
        try:
            if not reply_to:
                await self._there.send(copy)
            else:
                async with asyncio.timeout(until - now):
                    reply = await self._exchange(copy)
                if reply is not None:
                    await self._reply(reply, reply_to, correlation)
        except (TooLarge, InvalidMessage) as error:
            return await self._refused(message, error)
        except CallError as error:
            if reply_to and error.safety is not Safety.NOT_SENT:
                return DONE  # it must not be done twice: its caller hears nothing, as if it had called TO itself
            self._tell(copy, error, "it is tried again")
            return Again(RETRY_SECONDS, str(error))
        except TimeoutError:
            return DONE  # nobody waits for the reply any more
        self.moved += 1
        return DONE

    async def _refused(self, message: Message, error: CallError) -> Verdict:
        """TO cannot hold it, nor FROM its reply, and never will."""
        if message.reply_to:
            failure = Message(channel=message.channel, status=error.code, body=to_problem(error))
            failure.media_type = PROBLEM_MEDIA_TYPE
            with contextlib.suppress(CallError):
                await self._reply(failure, message.reply_to, message.correlation_id)
            self._tell(message, error, "its caller was told")
            return DONE
        self.dead += 1
        self._tell(message, error, "it becomes a dead letter where it was")
        return Dead(str(error))

    async def _reply(self, reply: Message, reply_to: str, correlation: str) -> None:
        reply.channel, reply.correlation_id = Channel(reply_to, temporary=True), correlation
        await self._here.send(reply)

    def _tell(self, message: Message, error: CallError, what: str) -> None:
        """Prints a failure, once for all messages that fail in the same way."""
        reason = f"{message.channel.name}: {sentence(error)}"
        kind = re.sub(r"\d+", "", reason.replace(repr(message), "").replace(message.id or " ", ""))
        if kind in self._told or len(self._told) >= REASONS_KEPT:
            return
        self._told.add(kind)
        print(f"{reason}; {what}", file=sys.stderr, flush=True)
