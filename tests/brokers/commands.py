"""The real command line, as a user calls it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def quintet(*words: str, within: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Runs `quintet WORDS` to its end."""
    command = [sys.executable, "-m", "quintet", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=within, check=False)


def start(*words: str, folder: Path, name: str = "command") -> subprocess.Popen[bytes]:
    """Starts `quintet WORDS`; what it writes goes to the file NAME.log in the folder."""
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", "quintet", *words], stdout=log, stderr=subprocess.STDOUT)
