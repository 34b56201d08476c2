"""The record of what was really exchanged: one line of JSON per delivery, written by the service that received it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec
from msgspec import Struct


class Exchange(Struct, kw_only=True):
    """One delivery: who sent what to whom, when (wall-clock seconds), and how it ended.

    `outcome` is "done", "late" (done when its sender waited no longer), "declined", or the name of the error raised.
    """

    started: float
    ended: float
    sender: str
    receiver: str
    operation: str
    style: str
    id: str
    attempt: int
    outcome: str


class Recorder:
    """Appends exchanges to a file that several processes may share: a line is one write."""

    def __init__(self, path: str | Path) -> None:
        self._encode = msgspec.json.Encoder().encode
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, exchange: Exchange) -> None:
        os.write(self._file, self._encode(exchange) + b"\n")

    def close(self) -> None:
        os.close(self._file)


def read(path: str | Path) -> Iterable[Exchange]:
    """What was recorded, in the order in which it was begun."""
    decode = msgspec.json.Decoder(Exchange).decode
    lines = Path(path).read_bytes().splitlines()
    return sorted((decode(line) for line in lines), key=lambda exchange: exchange.started)
