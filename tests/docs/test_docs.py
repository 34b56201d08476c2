"""What is written is executed (law 12): every snippet of the README and the docs, page by page, in its order.

- ```python runs; all blocks of a page share one module; a ```text block behind it is the output it must print.
- ```python title=rides/contracts.py (any language) is written to that file, below the page's own folder.
- ```console runs each line behind "$ " in one shell per page; the lines below are its output.
In an expected output "..." stands for anything. `<!-- not executed: why -->` before a block leaves it out.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import Struct

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?P<language>\w*)(?: title=(?P<title>\S+))?\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
SKIP = re.compile(r"<!-- not executed: .+? -->\s*\Z", re.DOTALL)
PATIENCE = 60.0  # seconds that one command may take


class Block(Struct):
    language: str
    title: str
    code: str
    line: int
    executed: bool


def blocks(text: str) -> list[Block]:
    return [
        Block(
            match["language"],
            match["title"] or "",
            match["code"],
            text.count("\n", 0, match.start()) + 1,
            not SKIP.search(text[: match.start()]),
        )
        for match in FENCE.finditer(text)
    ]


def same(expected: str, printed: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in expected.strip().split("..."))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


class Shell:
    """One bash for a page, so that what a command starts in the background stays for the next."""

    def __init__(self, folder: Path) -> None:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "NO_COLOR": "1", "COLUMNS": "120", "TERM": "dumb"}
        self._bash = subprocess.Popen(
            ["bash"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._bash.stdout
        for line in self._bash.stdout:
            self._lines.put(line)

    def run(self, command: str) -> tuple[str, int]:
        assert self._bash.stdin
        self._bash.stdin.write(f"{command}\nprintf '\\n=== %s\\n' $?\n")
        self._bash.stdin.flush()
        printed: list[str] = []
        while True:
            try:
                line = self._lines.get(timeout=PATIENCE)
            except queue.Empty:
                pytest.fail(f"$ {command}\nwas not done after {PATIENCE:g} s; it had printed:\n{''.join(printed)}")
            if line.startswith("=== "):
                return "".join(printed), int(line[4:])
            printed.append(line)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._bash.pid, signal.SIGTERM)
        assert self._bash.stdin
        assert self._bash.stdout
        self._bash.stdin.close()
        self._bash.wait(PATIENCE)
        self._reader.join(PATIENCE)
        self._bash.stdout.close()


def commands(code: str) -> Iterator[tuple[str, str]]:
    """Each command of a console block with the output that is expected of it."""
    for part in re.split(r"^\$ ", code, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        count = 1
        while lines[count - 1].endswith("\\"):
            count += 1
        yield "\n".join(lines[:count]), "\n".join(lines[count:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_snippet_of_a_page_does_what_it_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = types.ModuleType(f"docs_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    known = set(sys.modules)
    shell = Shell(tmp_path)
    try:
        found = blocks(page.read_text())
        for block, following in zip(found, [*found[1:], None], strict=True):
            where = f"{page.relative_to(ROOT)}:{block.line}"
            if not block.executed:
                continue
            if block.title:
                file = tmp_path / block.title
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block.code)
            elif block.language == "python":
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(compile(block.code, where, "exec"), module.__dict__)
                if following and following.language == "text" and following.executed:
                    assert same(following.code, printed.getvalue()), f"{where} printed:\n{printed.getvalue()}"
            elif block.language == "console":
                for command, expected in commands(block.code):
                    output, code = shell.run(command)
                    assert same(expected, output) if expected else code == 0, (
                        f"{where}: $ {command}\nprinted:\n{output}"
                    )
    finally:
        shell.close()
        for name in set(sys.modules) - known:
            del sys.modules[name]


def test_the_tables_of_the_docs_say_what_the_code_says() -> None:
    checked = subprocess.run([sys.executable, ROOT / "scripts/tables", "--check"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
