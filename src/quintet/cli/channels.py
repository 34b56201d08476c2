"""`quintet tail` and `quintet dead`: looks into a transport's channels without taking from them."""

from __future__ import annotations

import base64
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Annotated, Any

import msgspec
import typer

from quintet.cli.exits import run
from quintet.clock import SYSTEM
from quintet.errors import ConfigurationError, QuintetError
from quintet.format import by_media_type, format_named
from quintet.message import Message
from quintet.transport import (
    Counting,
    DeadLetter,
    Letters,
    Tailing,
    Trait,
    Transport,
    carrier,
    open_address,
    parse_address,
    schemes,
)

TAIL_EXAMPLES = """\b
Examples:
  quintet tail trips.v1.created --from sqlite:///rides.db
  quintet tail 'trips.*' --from sqlite:///rides.db --json | jq .body
"""
DEAD_EXAMPLES = """\b
Examples:
  quintet dead list --at sqlite:///rides.db
  quintet dead show 7 --at sqlite:///rides.db
  quintet dead replay --all --channel trips.v1.created --at sqlite:///rides.db
  quintet dead drop 7 9 --at sqlite:///rides.db
"""
At = Annotated[str, typer.Option("--at", metavar="ADDRESS", help="The transport that keeps the dead letters.")]
OfChannel = Annotated[str, typer.Option("--channel", metavar="NAME", help="Those of this channel only.")]
Ids = Annotated[list[str], typer.Argument(metavar="ID", help="Dead letters, as `dead list` names them.")]
All = Annotated[bool, typer.Option("--all", help="All dead letters (of --channel, where that is given).")]
Json = Annotated[bool, typer.Option("--json", help="Writes lines of JSON, for programs.")]


def tail(
    channel: Annotated[str, typer.Argument(metavar="CHANNEL", help="As trips.v1.created; * at the end for any rest.")],
    address: Annotated[str, typer.Option("--from", metavar="ADDRESS", help="The transport that carries it.")],
    count: Annotated[int, typer.Option("--count", min=0, help="Ends after so many messages; 0 for never.")] = 0,
    json: Json = False,
) -> None:
    """Prints each message that is sent to a channel from now on, without taking it from anyone."""
    run(_tail(channel, address, count, json))


async def _tail(channel: str, address: str, count: int, json: bool) -> None:
    async with _looking_into(address, Tailing) as transport:
        messages = transport.tail(channel)
        there = sorted(
            {state.channel for state in await transport.channels()} if isinstance(transport, Counting) else ()
        )
        if there and not any(fnmatchcase(name, channel) for name in there):
            _note(f"no channel {channel} there yet; there are: {', '.join(there)}")
        _note(f"watching {channel} at {parse_address(address)}; Ctrl-C ends it")
        seen = 0
        async for message in messages:
            print(_as_json(message) if json else _as_line(message), flush=True)
            seen += 1
            if seen == count:
                return


def _as_line(message: Message) -> str:
    parts = [
        datetime.now().astimezone().strftime("%H:%M:%S.%f")[:-3],
        message.channel.name,
        f"from {message.sender or '?'}",
        f"id={message.id}",
    ]
    parts += [f"key={message.key}"] if message.key else []
    parts += [f"attempt={message.attempt}"] if message.attempt > 1 else []
    parts += [message.status] if message.status else []
    return f"{'  '.join(parts)}  {msgspec.json.encode(_body(message)).decode()}"


def _as_json(message: Message, **more: Any) -> str:
    return msgspec.json.encode({**more, **_fields(message)}).decode()


def _fields(message: Message) -> dict[str, Any]:
    return {
        "id": message.id,
        "channel": message.channel.name,
        "operation": message.operation,
        "sender": message.sender,
        "key": message.key,
        "attempt": message.attempt,
        "status": message.status,
        "media_type": message.media_type,
        "headers": message.headers,
        "body": _body(message),
    }


def _body(message: Message) -> Any:
    """The body as JSON can show it: read by its format, else as Base64."""
    if not message.body:
        return None
    try:
        value = format_named(by_media_type(message.operation, message.media_type)).codec(Any).decode(message.body)
        return msgspec.to_builtins(value, str_keys=True)
    except QuintetError:
        return {"base64": base64.b64encode(message.body).decode()}


dead = typer.Typer(
    help="Messages that could not be handled: lists them, shows them, sends them again, deletes them.",
    epilog=DEAD_EXAMPLES,
)


@dead.command("list")
def list_dead(at: At, channel: OfChannel = "", json: Json = False) -> None:
    """Lists the dead letters, the oldest first."""
    run(_list(at, channel, json))


async def _list(at: str, channel: str, json: bool) -> None:
    async with _looking_into(at, Letters) as transport:
        letters = await transport.dead(channel or None)
    for letter in letters:
        print(_letter_as_json(letter) if json else f"{letter.id}  {_head(letter)}  {letter.reason}")
    if not json:
        _note(f"{len(letters)} dead letter{'' if len(letters) == 1 else 's'}")


@dead.command("show")
def show_dead(ids: Ids, at: At, json: Json = False) -> None:
    """Shows dead letters with their headers and bodies."""
    run(_show(ids, at, json))


async def _show(ids: list[str], at: str, json: bool) -> None:
    async with _looking_into(at, Letters) as transport:
        for letter in await _chosen(transport, ids, False, ""):
            if json:
                print(_letter_as_json(letter))
                continue
            print(f"{letter.id}  {_head(letter)}\n  reason: {letter.reason}")
            if letter.times:
                print(f"  attempts failed at: {', '.join(map(_moment, letter.times))}")
            for name, value in _fields(letter.message).items():
                if value and name not in ("id", "channel", "attempt"):
                    print(f"  {name}: {value if isinstance(value, str) else msgspec.json.encode(value).decode()}")


@dead.command("replay")
def replay_dead(at: At, ids: Ids = [], everything: All = False, channel: OfChannel = "", json: Json = False) -> None:  # noqa: B006
    """Sends dead letters again, as a first attempt, to the service that failed on them."""
    run(_settle("replay", at, ids, everything, channel, json))


@dead.command("drop")
def drop_dead(
    at: At,
    ids: Ids = [],  # noqa: B006
    everything: All = False,
    channel: OfChannel = "",
    yes: Annotated[bool, typer.Option("--yes", help="Does not ask before it deletes --all.")] = False,
    json: Json = False,
) -> None:
    """Deletes dead letters for ever."""
    if everything and not yes:
        if not sys.stdin.isatty():
            raise ConfigurationError("to delete all dead letters for ever without being asked, say --yes")
        which = f" of {channel}" if channel else ""
        typer.confirm(f"Delete all dead letters{which} at {parse_address(at)} for ever?", abort=True)
    run(_settle("drop", at, ids, everything, channel, json))


async def _settle(verb: str, at: str, ids: list[str], everything: bool, channel: str, json: bool) -> None:
    from rich.console import Console

    async with _looking_into(at, Letters) as transport:
        act = transport.replay if verb == "replay" else transport.drop
        tried, total, begun = dict[str, float](), 0, SYSTEM.wall()
        chosen, left = await _chosen(transport, ids, everything, channel), 0
        with Console(stderr=True).status(f"{verb} of {len(chosen)} dead letters") as progress:
            while chosen:
                tried |= {letter.id: letter.died_at for letter in chosen}
                count = await act(list(dict.fromkeys(letter.id for letter in chosen)))
                total += count
                there = await transport.dead(channel or None) if everything or total < len(tried) else ()
                left = sum(tried.get(letter.id) == letter.died_at for letter in there)
                # a transport may show some of them at a time; what died meanwhile is left alone
                old = [one for one in there if one.died_at <= begun and tried.get(one.id, one.died_at) == one.died_at]
                chosen = old if everything and count else []
                progress.update(f"{verb} of {len(chosen)} dead letters, after {total}")
    done = "replayed" if verb == "replay" else "dropped"
    print(msgspec.json.encode({done: total}).decode() if json else f"{total} {done}")
    _note_left(verb, left, len(tried) - total - left)


def _note_left(verb: str, kept: int, gone: int) -> None:
    """Says why fewer were replayed or dropped than were chosen."""
    if kept and verb == "replay":
        _note(f"{kept} are left: the service that failed on them is known no more, or its channel took none in time")
    elif kept:
        _note(f"{kept} are left: the broker did not let go of them in time; try again")
    if gone > 0:
        _note(f"{gone} were there no more: another has taken them meanwhile")


async def _chosen(transport: Letters, ids: list[str], everything: bool, channel: str) -> Sequence[DeadLetter]:
    if everything == bool(ids):
        raise ConfigurationError("name dead letters by their ids, or all of them with --all")
    letters = await transport.dead(channel or None)
    if everything:
        return letters
    if unknown := set(ids) - {letter.id for letter in letters}:
        raise ConfigurationError(
            f"there is no dead letter {', '.join(sorted(unknown))}; `quintet dead list` shows them"
        )
    wanted = set(ids)
    return [letter for letter in letters if letter.id in wanted]


def _head(letter: DeadLetter) -> str:
    group = f" ({letter.group})" if letter.group else ""
    return f"{_moment(letter.died_at)}  {letter.channel}{group}  {letter.attempts} attempts"


def _moment(wall: float) -> str:
    return datetime.fromtimestamp(wall).astimezone().isoformat(" ", "seconds")


def _letter_as_json(letter: DeadLetter) -> str:
    return _as_json(
        letter.message,
        dead_letter=letter.id,
        group=letter.group,
        reason=letter.reason,
        attempts=letter.attempts,
        died_at=letter.died_at,
        times=letter.times,
    )


@asynccontextmanager
async def _looking_into(address: str, wanted: type) -> AsyncGenerator[Any, None]:
    """The open transport of an address. Raises ConfigurationError where it keeps no channels that could be seen."""
    parsed = parse_address(address)
    if not issubclass(carrier(parsed), wanted):
        raise ConfigurationError(
            f"{parsed}: this transport keeps none that could be looked at; these do: {', '.join(_that_can(wanted))}"
        )
    transport: Transport = open_address(address)
    await transport.open()
    try:
        yield transport
    finally:
        await transport.close()


def _that_can(wanted: type) -> list[str]:
    found = {scheme: carrier(parse_address(f"{scheme}://x/x")) for scheme in schemes()}
    return [scheme for scheme, kind in found.items() if issubclass(kind, wanted) and Trait.DURABLE in kind.traits]


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
