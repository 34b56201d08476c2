"""What is installed, from Debian or into .brokers/software."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from broker.process import Trouble, is_root, run

TOOLS = {"java": "default-jre-headless", "mvn": "maven", "go": "golang-go", "openssl": "openssl"}
"""Which of Debian's packages has a command, where the machine has it from nowhere else."""


def debian(package: str) -> str | None:
    """The version of an installed package."""
    if not shutil.which("dpkg-query"):
        return None
    query = ["dpkg-query", "--show", "--showformat", "${db:Status-Status} ${Version}", package]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return answer[1] if answer[:1] == ["installed"] else None


def apt(packages: list[str]) -> None:
    names = " ".join(packages)
    if not shutil.which("apt-get"):
        raise Trouble(f"apt-get is missing: install {names} by other means, or use compose.yaml.")
    if not is_root():
        raise Trouble(f"Only root may install {names}: sudo scripts/brokers install")
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "--quiet=2", "-o", "DPkg::Lock::Timeout=300"]
    with _no_services():
        run([*command, "update"], "apt-get could not update its lists", quiet)
        run([*command, "--no-install-recommends", "install", *packages], f"{names} could not be installed", quiet)


@contextmanager
def _no_services() -> Iterator[None]:
    """Debian starts a service as it is installed, at all interfaces, unless this says no."""
    policy = Path("/usr/sbin/policy-rc.d")
    before = (policy.read_bytes(), policy.stat().st_mode) if policy.exists() else None
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()
        if before:
            policy.write_bytes(before[0])
            policy.chmod(before[1])


def fresh(folder: Path) -> Path:
    """Where a folder is made ready; it takes its own name at the end, so that a broken one is never taken for it."""
    work = folder.with_name(folder.name + ".new")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work
