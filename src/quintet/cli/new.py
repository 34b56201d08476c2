"""`quintet new`: writes a project that runs and whose tests pass."""

from __future__ import annotations

import keyword
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from quintet.errors import ConfigurationError

EXAMPLES = """\b
Examples:
  quintet new shop
  cd shop && pytest && quintet up
"""


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the project and its package, as shop.")],
    folder: Annotated[str, typer.Option("--in", metavar="FOLDER", help="Where its folder is made.")] = ".",
) -> None:
    """Writes a project: a contract, its service, a listener, a deployment, tests in memory, a README."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ConfigurationError(f"{name!r} cannot name a Python package: take lower-case letters, digits and _")
    root = Path(folder, name)
    if root.exists():
        raise ConfigurationError(f"{root} exists already: take another name, or --in another folder")
    if find_spec(name) is not None or name == "tests":
        raise ConfigurationError(f"{name!r} would hide the Python package of that name: take another name")
    contract = "".join(part.capitalize() for part in name.split("_"))
    for path, text in FILES.items():
        file = root / path.replace("NAME", name)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text.replace("NAME", name).replace("CONTRACT", contract))
        except OSError as error:
            raise ConfigurationError(f"cannot write {file}: {error.strerror}") from None
    print(f"{root}: next, `cd {root}` and `quintet up`; its README tells the rest")


FILES = {
    "NAME/__init__.py": "",
    "NAME/contracts.py": '''# mypy: disable-error-code="empty-body"
"""What is said: agreed on first, shared by all who speak it."""

from msgspec import Struct

from quintet import Contract, Fault, event, request


class Greeting(Struct):
    name: str
    text: str


class Unwelcome(Fault, status=403):
    name: str


class CONTRACT(Contract, name="NAME", version="1.0"):
    """Greets those who are welcome."""

    @request(http="POST /greetings", faults=[Unwelcome])
    async def greet(self, name: str) -> Greeting: ...

    @event
    async def greeted(self, greeting: Greeting) -> None: ...
''',
    "NAME/service.py": '''"""The service of the contract CONTRACT."""

from quintet import Service

from NAME.contracts import CONTRACT, Greeting, Unwelcome

service = Service(CONTRACT)


@service.handles(CONTRACT.greet)
async def greet(name: str) -> Greeting:
    if name == "Nobody":
        raise Unwelcome(name=name)
    greeting = Greeting(name, f"Hello, {name}!")
    await service.publish(CONTRACT.greeted, greeting)
    return greeting
''',
    "NAME/board.py": '''"""A service that only listens needs no contract of its own."""

from quintet import Service

from NAME.contracts import CONTRACT, Greeting

service = Service(name="board")
seen: list[str] = []


@service.handles(CONTRACT.greeted)
async def greeted(greeting: Greeting) -> None:
    seen.append(greeting.text)
    print(greeting.text)
''',
    "quintet.toml": """# Where the services run, and how they are reached: `quintet up` starts them all.

[service.NAME]
app = "NAME.service:service"
at = ["http://127.0.0.1:${PORT:-8001}", "sqlite:///NAME.db"]

[service.board]
app = "NAME.board:service"
connect = { NAME = "sqlite:///NAME.db" }
""",
    "tests/test_NAME.py": '''"""The services in one event loop: no sockets, no files."""

import asyncio

import pytest

from quintet.testing import harness

from NAME import board
from NAME.contracts import CONTRACT, Greeting, Unwelcome
from NAME.service import service


def test_who_is_welcome_is_greeted_and_the_board_shows_it() -> None:
    async def main() -> None:
        async with harness(service, board.service) as running:
            client = running.connect(CONTRACT)
            assert await client.greet("Ada") == Greeting("Ada", "Hello, Ada!")
            await running.handled(CONTRACT.greeted, by="board")
            assert board.seen == ["Hello, Ada!"]

    asyncio.run(main())


def test_who_is_not_welcome_gets_the_declared_fault() -> None:
    async def main() -> None:
        async with harness(service, board.service) as running:
            with pytest.raises(Unwelcome):
                await running.connect(CONTRACT).greet("Nobody")

    asyncio.run(main())
''',
    "pyproject.toml": """[project]
name = "NAME"
version = "0.1.0"
requires-python = ">=3.11"
dependencies = ["quintet"]

[dependency-groups]
test = ["pytest"]

[tool.pytest.ini_options]
testpaths = ["tests"]
pythonpath = ["."]
""",
    ".gitignore": """.quintet/
*.db*
__pycache__/
""",
    "README.md": """# NAME

`NAME/contracts.py` says what is said, `NAME/service.py` does it, `NAME/board.py` hears of it, and `quintet.toml` says
where they run and how they are reached.

```console
$ pip install quintet pytest
$ pytest                       # in memory: no sockets, no files
$ quintet up                   # both services, one log; Ctrl-C stops them
```

In another terminal:

```console
$ quintet call NAME.contracts:CONTRACT.greet --to http://127.0.0.1:8001 '{"name": "Ada"}'
$ curl -s http://127.0.0.1:8001/v1/greetings -d '{"name": "Ada"}' -H 'content-type: application/json'
$ quintet tail 'NAME.*' --from sqlite:///NAME.db
$ quintet describe NAME.contracts:CONTRACT
```
""",
}
"""The project, by path; NAME and CONTRACT stand for its names."""
