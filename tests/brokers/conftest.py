"""Brokers as fixtures, and at the end one line that says which took part."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import running


@pytest.fixture(scope="session")
def broker() -> Callable[[str], running.Entry]:
    """`broker("rabbitmq")["address"]`: shared by all tests, so leave it as it was found."""
    return running.broker


@pytest.fixture(scope="session")
def private_broker() -> Iterator[Callable[[str], running.Broker]]:
    """`private_broker("rabbitmq")`: for whoever kills it, apart from the shared one; running at each call."""
    own: dict[str, running.Broker] = {}

    def give(name: str) -> running.Broker:
        if name not in own:
            own[name] = running.private(name)
        else:
            own[name].start()
        return own[name]

    yield give
    for each in own.values():
        running.dispose(each)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"brokers that {running.summary()}")
