"""The brokers that tests talk to, all of them by scripts/brokers: those that all tests share, and those to be killed.

The shared ones are in a folder of their own and begin without data: a broker that keeps what many sessions left behind
gets slow. One that another session has started is used as it stands.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[2]
SCRIPT = CHECKOUT / "scripts" / "brokers"
NAMES = ("rabbitmq", "activemq", "kafka", "nsq", "postgresql")
NOT_INSTALLED = 3

Entry = dict[str, Any]
"""What addresses.json says of a broker: its `address`, further ones by name, `ca`, `version`, `pid`."""

_shared: dict[str, Broker] = {}
_took_part: dict[str, str] = {}
_missing: set[str] = set()


class Broker:
    """One broker, in the checkout's own folder or in `folder`. Its methods block for as long as the broker takes: call
    them by `asyncio.to_thread` where a loop has other work meanwhile."""

    def __init__(self, name: str, folder: Path | None = None) -> None:
        self.name = name
        self.folder = folder or Path(os.environ.get("QUINTET_BROKERS") or CHECKOUT / ".brokers" / "tests")
        self.entry: Entry = {}

    def __repr__(self) -> str:
        return f"<{self.name} in {self.folder}>"

    @property
    def address(self) -> str:
        address: str = self.entry["address"]
        return address

    def start(self) -> bool:
        """Returns once it answers: False where it was running before. After a kill: the same ports, the same data."""
        done = self.script("up")
        if done.returncode == NOT_INSTALLED:
            _missing.add(self.name)
            if os.environ.get("CI"):
                pytest.fail(done.stderr.strip(), pytrace=False)
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        self.entry = json.loads((self.folder / "addresses.json").read_text())[self.name]
        _took_part[self.name] = self.entry["version"]
        return "was up already" not in done.stdout

    def kill(self) -> None:
        """SIGKILL to all of its processes; returns when they are gone."""
        assert self.script("kill").returncode == 0

    def stop(self) -> None:
        self.script("down")

    def script(self, command: str) -> subprocess.CompletedProcess[str]:
        words, environment = (SCRIPT, command, self.name), {**os.environ, "QUINTET_BROKERS": str(self.folder)}
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def broker(name: str) -> Entry:
    """A shared broker, started if it is not running. Missing: the test is skipped, in CI it fails."""
    if name not in _shared:
        shared = Broker(name)
        if "not running" in shared.script("status").stdout:
            shutil.rmtree(shared.folder / name, ignore_errors=True)
        if shared.start():
            atexit.register(shared.stop)
        _shared[name] = shared
    return _shared[name].entry


def private(name: str) -> Broker:
    """A broker in a folder of its own, running, to be killed without disturbing others; `dispose` it."""
    folder = Path(tempfile.mkdtemp(prefix=f"quintet-{name}-"))
    folder.chmod(0o755)  # PostgreSQL, where root starts it, runs as a user who must come in
    own = Broker(name, folder)
    try:
        own.start()
    except BaseException:
        dispose(own)
        raise
    return own


def dispose(own: Broker) -> None:
    own.kill()
    shutil.rmtree(own.folder)


def summary() -> str:
    """Which brokers took part and which were missing."""
    took_part = ", ".join(f"{name} {version}" for name, version in sorted(_took_part.items()))
    missing = ", ".join(sorted(_missing))
    return f"took part: {took_part or 'none'}; missing: {missing or 'none'}"
