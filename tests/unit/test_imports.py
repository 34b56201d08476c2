"""Imports point one way (law 8), and one table says which."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import quintet

ROOT = Path(quintet.__file__).parent
ABOVE = {
    "blocking": "sides",
    "client": "sides",
    "server": "sides",
    "mock": "sides",
    "relay": "sides",
    "policy_file": "sides",
    "__main__": "cli",
}  # beside the core's files, not of it

MAY_IMPORT: dict[str, set[str]] = {
    "wire": {"wire", "core"},
    "core": {"core", "wire"},  # what is in the folders it loads by name
    "formats": {"core", "wire"},
    "filters": {"core"},
    "resolvers": {"core"},
    "bindings": {"core", "wire"},
    "transports": {"core", "wire"},  # and not each other
    "outboxes": {"core", "wire"},
    "idls": {"core", "wire"},
    "sides": {"core", "sides"},
    "quintet": {"core", "sides"},
    "testing": {"core", "sides", "testing", "transports"},
    "dashboard": {"core", "sides", "quintet", "dashboard"},
    "cli": {"core", "sides", "quintet", "cli", "dashboard", "idls"},
}


def room(parts: list[str]) -> str:
    """The room of a module of ours, by its name's parts behind "quintet"."""
    if not parts or parts == ["__init__"]:
        return "quintet"
    return parts[0] if parts[0] in MAY_IMPORT else ABOVE.get(parts[0], "core")


def imports(file: Path) -> set[str]:
    """The rooms a file imports. To look what there is, as by `import quintet.formats as folder`, is no such import; nor
    is what a transport that is a folder imports of its own."""
    found: set[str] = set()
    own = file.relative_to(ROOT).parts
    within = f"quintet.{own[0]}.{own[1]}." if len(own) > 2 else "nothing"
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module == "quintet":  # a file of ours, or a name out of __init__
            names = [f"quintet.{a.name}" if (ROOT / f"{a.name}.py").exists() else "quintet" for a in node.names]
        names += [a.name for a in node.names if a.name.count(".") > 1] if isinstance(node, ast.Import) else []
        ours = [name for name in names if name.split(".")[0] == "quintet" and within not in f"{name}."]
        found |= {room(name.split(".")[1:]) for name in ours}
    return found


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_imports_only_what_its_room_may(file: Path) -> None:
    own = room(list(file.relative_to(ROOT).with_suffix("").parts))
    wrong = imports(file) - MAY_IMPORT[own]
    assert not wrong, f"{file.relative_to(ROOT)} imports {', '.join(sorted(wrong))}; {own} may import {MAY_IMPORT[own]}"
