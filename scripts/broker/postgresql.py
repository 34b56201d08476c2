"""PostgreSQL: no broker, but the database that an outbox stands in; Debian's."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from broker.installing import debian
from broker.kind import HOST, STATE, Broker
from broker.process import STOP, Trouble, is_root, run


class PostgreSQL(Broker):
    name = "postgresql"
    package = "postgresql"
    ports = ("postgresql",)
    user = "postgres"  # it refuses root
    farewell = signal.SIGINT  # SIGTERM would wait for its clients

    def __init__(self) -> None:
        super().__init__()
        homes = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
        self.bin = homes[-1] if homes else None
        self.data = self.folder / "data"
        above = [folder for folder in (STATE, *STATE.parents) if folder.exists()]
        if is_root() and not all(folder.stat().st_mode & 0o001 for folder in above):
            # the user postgres may not enter, say, /root
            self.data = Path(tempfile.gettempdir()) / f"quintet-postgresql{str(self.data).replace('/', '-')}"

    def version(self) -> str | None:
        return debian(f"postgresql-{self.bin.parent.name}") if self.bin else None

    def prepare(self) -> None:
        self.data.mkdir(mode=0o700, exist_ok=True)
        if is_root():
            shutil.chown(self.data, self.user, self.user)
        if not (self.data / "PG_VERSION").exists():
            options = ["--pgdata", str(self.data), "--username=postgres", "--auth=trust", "--encoding=UTF8"]
            options += ["--locale=C.UTF-8", "--no-sync"]
            run([f"{self.bin}/initdb", *options], "PostgreSQL's folder could not be laid out", user=self.user)
        self._free_lock()

    def _free_lock(self) -> None:
        """Its lock names a process that was ours and is gone; a dead one that nobody has waited for would still count.
        What is left of it ends by itself, and may write until then."""
        deadline = time.monotonic() + STOP
        while any(self._at_work(process) for process in Path("/proc").glob("[0-9]*")):
            if time.monotonic() > deadline:
                raise Trouble(f"What was left of PostgreSQL did not end within {STOP:.0f} s.")
            time.sleep(0.02)
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    def _at_work(self, process: Path) -> bool:
        try:
            return (process / "cwd").readlink() == self.data
        except OSError:
            return False

    def commands(self) -> list[list[str]]:
        settings = {"listen_addresses": HOST, "port": self.port("postgresql"), "unix_socket_directories": ""}
        options = [f"--{key}={value}" for key, value in settings.items()]
        return [[f"{self.bin}/postgres", "-D", str(self.data), *options]]

    def addresses(self) -> dict[str, Any]:
        return {"address": f"postgresql://postgres@{self.at('postgresql')}/postgres"}

    def answers(self) -> bool:
        command = [f"{self.bin}/pg_isready", "--quiet", f"--host={HOST}", f"--port={self.port('postgresql')}"]
        return subprocess.run(command, check=False).returncode == 0
