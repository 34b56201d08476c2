"""`quintet bridge`: moves channels from one transport to another, while services go on, for migrations."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated

import typer
from msgspec import structs

from quintet.cli.exits import run
from quintet.cli.loading import load_operation
from quintet.client import Carriers
from quintet.clock import SYSTEM
from quintet.errors import CallError, ConfigurationError, Safety, TooLarge
from quintet.message import Channel, Handler, Message
from quintet.transport import DONE, Again, Dead, Trait, Transport, Verdict

EXAMPLES = """\b
Examples:
  quintet bridge sqlite:///rides.db amqp://localhost --channel rides.contracts:Trips.arrived
  quintet bridge amqp://localhost kafka://localhost --channel trips.v1.created --fanout --group billing
  quintet bridge sqlite:///rides.db amqp://localhost --channel trips.v1.arrived --idle 5
"""
ACCEPT_SECONDS = 10.0  # that the other side may take to accept a message, before it is tried again
RETRY_SECONDS = 1.0


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
        str, typer.Option("--group", help="Fan-out: the group whose copies are moved; others keep theirs.")
    ] = "bridge",
    fanout: Annotated[bool, typer.Option("--fanout", help="The channels given by name are of events.")] = False,
    keyed: Annotated[bool, typer.Option("--keyed", help="The channels given by name keep the order of keys.")] = False,
    limit: Annotated[int, typer.Option("--limit", help="Messages on their way at once.")] = 100,
    idle: Annotated[float, typer.Option("--idle", help="Ends when nothing came for so many seconds; 0: never.")] = 0.0,
) -> None:
    """Moves what waits in channels, and what comes, from one transport to another, without loss.

    A message is taken from FROM once TO has accepted it, with its id: where the bridge is killed in between it goes
    over twice, and a receiver that is idempotent knows the repeat. A request's reply is brought back. Services may be
    moved one by one meanwhile: first the receivers, then the senders.
    """
    run(_bridge(source, target, [_channel(name, fanout, keyed) for name in channels], group, limit, idle))


def _channel(name: str, fanout: bool, keyed: bool) -> Channel:
    if ":" in name:
        return load_operation(name).channel
    return Channel(name, fanout=fanout, durable=True, keyed=keyed)


async def _bridge(source: str, target: str, channels: Sequence[Channel], group: str, limit: int, idle: float) -> None:
    moved, last, ended = 0, SYSTEM.now(), asyncio.Event()

    def count() -> None:
        nonlocal moved, last
        moved += 1
        last = SYSTEM.now()

    def look() -> None:
        due = last + idle
        if due <= SYSTEM.now():
            ended.set()
        else:
            SYSTEM.call_at(due, look)

    try:
        async with _open(source, target) as (carriers, here, there):
            exchange = await carriers.exchange(there)
            async with AsyncExitStack() as serving:
                for channel in channels:
                    mover = _Mover(here, there, exchange, count)
                    served = await here.serve(channel, mover.receive, group, limit)
                    serving.push_async_callback(served.stop)
                await here.ready()
                names = ", ".join(channel.name for channel in channels)
                print(f"moving {names} from {here.address} to {there.address}; Ctrl-C ends it", file=sys.stderr)
                if idle:
                    look()
                await ended.wait()
    finally:
        print(f"{moved} moved")


@asynccontextmanager
async def _open(source: str, target: str) -> AsyncGenerator[tuple[Carriers, Transport, Transport]]:
    """Both transports, open. Raises ConfigurationError where one of them is of no use."""
    carriers = Carriers("quintet-bridge", SYSTEM)
    try:
        here, there = await carriers.reach(source), await carriers.reach(target)
        if here is there:
            raise ConfigurationError(f"FROM and TO are both {source}: there is nothing to move")
        if Trait.REDELIVERS not in here.traits:
            raise ConfigurationError(f"{source} keeps no messages that could be moved: it hands them on")
        if there.binding != here.binding:
            raise ConfigurationError(f"{target} carries other messages ({there.binding}) than {source}")
        yield carriers, here, there
    finally:
        await carriers.close()


class _Mover:
    """What is called with each message of one channel."""

    def __init__(self, here: Transport, there: Transport, exchange: Handler, count: Callable[[], None]) -> None:
        self._here = here
        self._there = there
        self._exchange = exchange
        self._count = count

    async def receive(self, message: Message) -> Verdict:
        reply_to, correlation = message.reply_to, message.correlation_id
        copy = structs.replace(message, attempt=1, until=message.deadline or SYSTEM.now() + ACCEPT_SECONDS)
        try:
            if not reply_to:
                await self._there.send(copy)
            elif (reply := await self._exchange(copy)) is not None:
                reply.channel, reply.correlation_id = Channel(reply_to, temporary=True), correlation
                await self._here.send(reply)
        except TooLarge as error:
            return Dead(str(error))
        except CallError as error:
            return DONE if reply_to and error.safety is not Safety.NOT_SENT else Again(RETRY_SECONDS, str(error))
        self._count()
        return DONE
