"""What a broker is: how it is installed, configured and started, and how it is known to answer."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from broker.process import Trouble, born

CHECKOUT = Path(__file__).resolve().parents[2]
SOFTWARE = CHECKOUT / ".brokers" / "software"
STATE = Path(os.environ.get("QUINTET_BROKERS") or CHECKOUT / ".brokers").resolve()
HOST = "127.0.0.1"


class Broker(ABC):
    name: str
    package: str | None = None
    """Debian's."""
    needs: tuple[str, ...] = ()
    """The commands that are called here, of those in TOOLS."""
    ports: tuple[str, ...]
    """Each one above the one before it."""
    user: str | None = None
    """Who runs it, where this script is run by root."""
    farewell = signal.SIGTERM

    def __init__(self) -> None:
        self.folder = STATE / self.name

    # what each says of itself

    @abstractmethod
    def version(self) -> str | None:
        """None where it is not installed."""

    def fetch(self) -> None:  # noqa: B027 - most are Debian's
        """Installs what Debian does not have."""

    def prepare(self) -> None:  # noqa: B027 - who needs none has none
        """Writes its configuration, each time it is started."""

    @abstractmethod
    def commands(self) -> list[list[str]]:
        """The last is the broker; those before it live and die with it."""

    def environment(self) -> dict[str, str]:
        return {}

    @abstractmethod
    def addresses(self) -> dict[str, Any]:
        """Its `address`, and further ones by name."""

    @abstractmethod
    def answers(self) -> bool:
        """Asks in the broker's own protocol; an OSError is a no."""

    # what it says that with

    def port(self, name: str) -> int:
        number: int = json.loads((self.folder / "ports.json").read_text())[name]
        return number

    def at(self, name: str) -> str:
        return f"{HOST}:{self.port(name)}"

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def settings(self, name: str, settings: Mapping[str, object]) -> Path:
        return self.write(name, "".join(f"{key}={value}\n" for key, value in settings.items()))

    # what is known of it

    def settle(self) -> None:
        """Gives it a folder and, at its first start, ports. Below those the system deals to clients: one that
        reconnects to a broker that is away could be given the broker's very port."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = self.folder / "ports.json"
        ports: dict[str, int] = json.loads(kept.read_text()) if kept.exists() else {}
        if taken := [str(port) for name, port in ports.items() if name != "proxy" and not _free(port)]:
            raise Trouble(f"Port {' and '.join(taken)} of {self.name} is taken; remove {kept} to give it others.")
        while set(ports) != set(self.ports):
            first = random.randrange(20000, 32000)
            if all(_free(first + place) for place in range(len(self.ports))):
                ports = {name: first + place for place, name in enumerate(self.ports)}
        kept.write_text(json.dumps(ports, indent=2) + "\n")

    def running(self) -> dict[str, Any] | None:
        """Its entry in addresses.json, if the process of that time still runs."""
        try:
            entry: dict[str, Any] = json.loads((self.folder / "running.json").read_text())
        except FileNotFoundError:
            return None
        return entry if entry["born"] is not None and entry["born"] == born(entry["pid"]) else None

    def answering(self) -> bool:
        try:
            return self.answers()
        except OSError:
            return False

    def last_line(self) -> str:
        lines = (self.folder / "log").read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "nothing")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def ask(port: int, request: bytes, size: int) -> bytes:
    """The first bytes of what is answered; fewer where the broker closes."""
    with socket.create_connection((HOST, port), timeout=2.0) as connection:
        connection.sendall(request)
        reply = b""
        while len(reply) < size and (more := connection.recv(size - len(reply))):
            reply += more
        return reply


def stomp(port: int, user: str, host: str) -> bool:
    frame = f"CONNECT\naccept-version:1.2\nhost:{host}\nlogin:{user}\npasscode:{user}\n\n\0"
    return ask(port, frame.encode(), 10) == b"CONNECTED\n"
