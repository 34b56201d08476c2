"""mypy and pyright accept what is right and complain about what is wrong, on exactly the lines that say so."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "src"
RIGHT, WRONG = HERE / "right.py", HERE / "wrong.py"


def mypy(folder: Path) -> dict[str, dict[int, str]]:
    """The errors by file name and line."""
    (folder / "mypy.ini").write_text("[mypy]\nstrict = True\n")
    done = _run(["mypy", "--output", "json", RIGHT.name, WRONG.name], folder)
    if "No module named mypy" in done.stderr:
        unavailable("mypy is not installed: make lint installs it")
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return _by_file((e["file"], e["line"], e["message"]) for e in found if e["severity"] == "error")


def pyright(folder: Path) -> dict[str, dict[int, str]]:
    # `service.handles(...)` and the like stand alone on their lines in wrong.py: that is not what is wrong there
    settings = {"reportUnusedExpression": False, "reportUnusedCoroutine": False, "extraPaths": [str(SOURCES)]}
    (folder / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict", **settings}))
    done = _run(["pyright", "--outputjson", "--pythonpath", sys.executable, "-p", "pyrightconfig.json"], folder)
    try:
        report = json.loads(done.stdout)
    except ValueError:  # the Python package is a wrapper, which fetches pyright itself when it first runs
        unavailable(f"pyright could not be installed: {(done.stderr or done.stdout).strip()[-300:]}")
    assert report["summary"]["filesAnalyzed"] == 2
    errors = [e for e in report["generalDiagnostics"] if e["severity"] == "error"]
    return _by_file((e["file"], e["range"]["start"]["line"] + 1, e["message"]) for e in errors)


def unavailable(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    for source in (RIGHT, WRONG):
        shutil.copy(source, folder)
    environment = {**os.environ, "MYPYPATH": str(SOURCES)}
    command = [sys.executable, "-m", *command]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def _by_file(errors: Iterable[tuple[str, int, str]]) -> dict[str, dict[int, str]]:
    found: dict[str, dict[int, str]] = {RIGHT.name: {}, WRONG.name: {}}
    for file, line, message in errors:
        found[Path(file).name][line] = message  # another file, as one of ours, is a KeyError
    return found


def marked(source: Path) -> dict[int, str]:
    lines = source.read_text(encoding="utf-8").splitlines()
    return {number: why[1] for number, line in enumerate(lines, 1) if (why := re.search("# wrong: (.*)", line))}


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_right_code_passes_and_each_wrong_line_is_reported(
    checker: Callable[[Path], dict[str, dict[int, str]]], tmp_path: Path
) -> None:
    found, expected = checker(tmp_path), marked(WRONG)
    assert len(expected) > 10
    assert found[RIGHT.name] == {}
    accepted = {line: why for line, why in expected.items() if line not in found[WRONG.name]}
    assert accepted == {}, f"{checker.__name__} accepts what is wrong"
    refused = {line: error for line, error in found[WRONG.name].items() if line not in expected}
    assert refused == {}, f"{checker.__name__} complains about what is right"
