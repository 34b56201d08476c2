"""A member's name in its group, which whoever is started in its stead goes on with."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import tempfile
import time
import uuid
from pathlib import Path

KEPT = 24 * 3600.0  # seconds that the seat of a process that was killed waits for the one in its stead
SHOWN = 3600.0  # seconds after which who has a seat shows that


class Seat:
    """A member's name in its group (KIP-345), kept in a file that is locked for as long as its process lives.

    Whoever is started in the stead of a process that was killed finds the seat free, and goes on at once with the same
    partitions; without a name the group would wait until it is sure that the member is dead. And a member that comes
    back after the broker was away is known again. What nobody came back for within `KEPT` is removed.
    """

    def __init__(self, group: str) -> None:
        self.id = uuid.uuid4().hex
        self._file, self._path, self._shown = -1, Path(), time.monotonic()
        with contextlib.suppress(ImportError, OSError):  # without files each is just somebody new
            self._take(group)

    def _take(self, group: str) -> None:
        import fcntl  # not on Windows

        folder = Path(tempfile.gettempdir()) / f"quintet-kafka-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            return
        for number in itertools.count():
            path = folder / f"{hashlib.sha256(group.encode()).hexdigest()[:16]}.{number}"
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                continue
            self._file, self._path = file, path
            if name := os.read(file, 100).decode("ascii", "replace"):
                self.id = name
            else:
                os.write(file, self.id.encode())
            os.utime(file)
            break
        for path in folder.iterdir():
            if path.stat().st_mtime < time.time() - KEPT:
                _remove(path)

    def hold(self) -> None:
        """Shows once an hour that somebody has the seat. For its thread, where that has nothing else to do."""
        if self._file >= 0 and time.monotonic() - self._shown > SHOWN:
            self._shown = time.monotonic()
            os.utime(self._file)

    def free(self) -> None:
        """The member has left its group: nobody needs to go on with its name."""
        if self._file >= 0:
            self._path.unlink(missing_ok=True)  # while it is locked: who has opened it meanwhile has a name of its own
            os.close(self._file)
            self._file = -1


def _remove(path: Path) -> None:
    """Removes a seat that nobody has."""
    import fcntl

    with contextlib.suppress(OSError):  # somebody has it, or was faster
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(file)
