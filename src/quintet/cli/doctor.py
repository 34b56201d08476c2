"""`quintet doctor`: whether an address can be reached, what is there, and what would not work."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated, Any

import msgspec
import typer

from quintet.cli.exits import run
from quintet.clock import SYSTEM
from quintet.contract import NEEDS
from quintet.errors import CallError, TransportError
from quintet.message import Channel, Message, new_id
from quintet.transport import DONE, Finding, Trait, Transport, Verdict, open_address

EXAMPLES = """\b
Examples:
  quintet doctor --at amqp://guest:guest@localhost:5672
  quintet doctor --at kafka://localhost:9092 --json
"""
ROUND_TRIP_SECONDS = 5.0
AGAIN_SECONDS = 1.0  # until another message is sent


def doctor(
    at: Annotated[str, typer.Option("--at", metavar="ADDRESS", help="The address to look at.")],
    json: Annotated[bool, typer.Option("--json", help="Writes lines of JSON, for programs.")] = False,
) -> None:
    """Says whether an address can be reached, which version is there, what it allows, and what would not work.

    It sends a message to itself over a channel of its own, and leaves nothing behind. Exit code 4 where nobody is
    there, 5 where the broker lets nobody in; what a user may not do there is one of its findings.
    """
    run(_doctor(at, json))


async def _doctor(at: str, json: bool) -> None:
    transport = open_address(at)
    begun = SYSTEM.now()
    await transport.open()
    try:
        findings = [Finding("reached", f"in {1000 * (SYSTEM.now() - begun):.0f} ms")]
        if Trait.REDELIVERS in transport.traits:
            findings.append(await _round_trip(transport))
        findings += await transport.examine()
        findings += _traits(transport)
    finally:
        await transport.close()
    for finding in findings:
        if json:
            print(msgspec.json.encode(finding).decode())
        else:
            print(f"{'  ' if finding.well else '! '}{finding.what}: {finding.says}")


async def _round_trip(transport: Transport) -> Finding:
    """Sends a message to itself, and says how long that took, or why it did not arrive."""
    channel = Channel(f"quintet.doctor.{new_id()}", temporary=True)
    arrived = asyncio.Event()

    async def receive(_: Message) -> Verdict:
        arrived.set()
        return DONE

    try:
        serving = await transport.serve(channel, receive, "", 1)
        try:
            await transport.ready()
            begun = SYSTEM.now()
            async with asyncio.timeout(ROUND_TRIP_SECONDS):
                await _send(transport, channel, arrived)
            return Finding("round trip", f"a message to itself took {1000 * (SYSTEM.now() - begun):.1f} ms")
        finally:
            await serving.stop()
    except TimeoutError:
        return Finding("round trip", f"a message to itself did not arrive within {ROUND_TRIP_SECONDS:g} s", well=False)
    except (TransportError, CallError) as error:
        return Finding("round trip", f"a message to itself was not possible: {error}", well=False)


async def _send(transport: Transport, channel: Channel, arrived: asyncio.Event) -> None:
    """Sends messages until one has arrived. A broker that takes none may say so only when the second is sent."""
    while not arrived.is_set():
        message = Message(channel=channel, id=new_id(), body=b"{}", media_type="application/json")
        message.until = SYSTEM.now() + AGAIN_SECONDS
        await transport.send(message)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(AGAIN_SECONDS):
                await arrived.wait()


def _traits(transport: Transport) -> list[Finding]:
    """Which styles it carries, and what else the transport cannot do."""
    styles: list[Any] = [style.value for style, needs in NEEDS.items() if needs <= transport.traits]
    refused: list[Any] = [style.value for style, needs in NEEDS.items() if not needs <= transport.traits]
    found = [Finding("carries", ", ".join(styles))]
    if refused:
        found.append(Finding("does not carry", f"{', '.join(refused)}: give services another address too", well=False))
    lacking = [trait for trait in Trait if trait not in transport.traits | {Trait.REPLIES}]
    found += [Finding(f"lacks {trait.name}", f"nothing here {trait.value}", well=False) for trait in lacking]
    return found
