"""What stands where in NSQ: the names of our topics, and of NSQ's channels on them (docs/nsq.md has the table)."""

from __future__ import annotations

import functools
import hashlib
import re
from typing import Final

from quintet.message import Channel
from quintet.wire.names import DEAD

WORK: Final = "work"
"""NSQ's channel of a point-to-point channel's topic: whoever serves it shares it."""
LETTERS: Final = "letters"
"""NSQ's channel of the topic of dead letters."""
TEMPORARY: Final = ".temporary"
"""How topics and channels end that belong to one process; those that nobody holds any more are swept away."""
AGAIN: Final = ".again"
"""How the topic ends that brings a message once more to one group of an event, and to no other."""
EPHEMERAL: Final = "#ephemeral"
"""How NSQ's own temporary channels end."""
NOBODY: Final = "nobody#ephemeral"
"""NSQ's channel in which an event's copy for nobody ends, or a topic without groups would keep it for the first."""
TAILS: Final = "quintet.tails"
"""The topic on which who watches says so, that new topics are shown to it from their first message on."""

LONGEST_NAME: Final = 64  # characters of a topic or a channel, nsqd's own limit
_LONGEST_PREFIX: Final = 28  # characters that fit into a name beside a number

_NAME: Final = re.compile(r"[.a-zA-Z0-9_-]+", re.ASCII)
_STRANGE: Final = re.compile(r"[^.a-zA-Z0-9_-]", re.ASCII)


def fit(name: str, suffix: str = "") -> str:
    """The topic or channel of a name: itself where NSQ takes it, else shortened, with a hash that tells it apart.

    The rule: what NSQ refuses becomes "_", it is cut so that all fit into 64 characters, and "." with the first 16
    hexadecimal digits of the name's SHA-256 follow. `suffix` comes last and is never cut.
    """
    room = LONGEST_NAME - len(suffix)
    if len(name) <= room and _NAME.fullmatch(name):
        return name + suffix
    digest = hashlib.sha256(name.encode(errors="replace")).hexdigest()[:16]
    return f"{_STRANGE.sub('_', name)[: room - 17]}.{digest}{suffix}"


@functools.lru_cache(maxsize=8192)
def topic_of(channel: Channel) -> str:
    """The topic of a channel."""
    return fit(channel.name, TEMPORARY if channel.temporary and not channel.fanout else "")


def again_topic_of(channel: Channel, group: str) -> str:
    """The topic that brings a message once more to one group; where there are none it is the channel's own."""
    return fit(f"{channel.name}.{group}", AGAIN) if channel.fanout else topic_of(channel)


def is_inner(topic: str) -> bool:
    """A topic that is no channel of a contract."""
    return topic.endswith((TEMPORARY, AGAIN, EPHEMERAL)) or topic in (DEAD, TAILS)


def tail_channel(number: str) -> str:
    """NSQ's channel, on the topics that it watches, of the tail with this number."""
    return fit(f"tail.{number}", TEMPORARY)


def announcement(number: str, prefix: str) -> str:
    """NSQ's channel of TAILS by which a tail says which topics it wants to see."""
    end = next((place for place, letter in enumerate(prefix) if not _NAME.fullmatch(letter)), len(prefix))
    return fit(f"{number}.{prefix[: min(end, _LONGEST_PREFIX)]}", TEMPORARY)


def announced(channel: str) -> tuple[str, str]:
    """The tail's number, and how the topics begin that it wants to see."""
    number, _, prefix = channel.removesuffix(TEMPORARY).partition(".")
    return number, prefix
