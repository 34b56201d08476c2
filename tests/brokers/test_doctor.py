"""`quintet doctor` on the real thing: what is well, and each thing that is not in one sentence."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from commands import quintet
from subjects import BROKERS

SCHEMES = ("amqp", "stomp", "kafka", "nsq")
NO_ANSWER, REFUSED = 4, 5
ENDS_WITHIN = 45.0


def refused(address: str, *codes: int) -> str:
    """The one sentence that it ends with."""
    done = quintet("doctor", "--at", address, within=ENDS_WITHIN)
    assert done.returncode in codes, (address, done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    assert re.fullmatch(r"quintet: \S.*\n", done.stderr), done.stderr
    return done.stderr


def refused_each(port: int, *codes: int) -> list[str]:
    """What each kind of broker is said to be that is asked for at this port, all at the same time."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda scheme: refused(f"{scheme}://127.0.0.1:{port}", *codes), SCHEMES))


@pytest.mark.parametrize("name", BROKERS)
def test_it_says_what_is_there_and_what_would_not_work(name: str, broker: Callable[[str], Any]) -> None:
    done = quintet("doctor", "--at", broker(name)["address"], within=ENDS_WITHIN)
    assert (done.returncode, done.stderr) == (0, "")
    version = ".".join(broker(name)["version"].split(".")[:2])  # Kafka tells no more
    assert re.search(rf"^  (version|broker): .*\b{re.escape(version)}", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^  reached: in \d+ ms$", done.stdout, re.MULTILINE)
    assert re.search(r"^  round trip: a message to itself took [\d.]+ ms$", done.stdout, re.MULTILINE), done.stdout
    assert "  carries: request/response, notification" in done.stdout


def test_a_user_who_may_only_send_sees_what_is_there_and_what_he_may_not_do(broker: Callable[[str], Any]) -> None:
    entry = broker("rabbitmq")
    control(entry, "add_user", "sender", "s3cr3t")
    try:
        control(entry, "set_permissions", "sender", "^$", r"^(quintet|amq\.default)$", "^$")
        at = entry["address"].replace("guest:guest", "sender:s3cr3t")
        done = quintet("doctor", "--at", at, within=ENDS_WITHIN)
    finally:
        control(entry, "delete_user", "sender")
    assert (done.returncode, done.stderr) == (0, "")
    assert "! round trip: a message to itself was not possible: " in done.stdout
    assert "ACCESS_REFUSED" in done.stdout
    assert "  version: RabbitMQ" in done.stdout
    assert "s3cr3t" not in done.stdout


def test_more_copies_than_there_are_brokers_is_a_finding(broker: Callable[[str], Any]) -> None:
    done = quintet("doctor", "--at", f"{broker('kafka')['address']}?replication=3", within=ENDS_WITHIN)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^! round trip: .* replication factor", done.stdout, re.MULTILINE), done.stdout
    assert "  version: Apache Kafka" in done.stdout


def control(entry: dict[str, Any], *words: str) -> None:
    """What RabbitMQ's administrator says."""
    subprocess.run(
        [entry["rabbitmqctl"], "-q", *words],
        env={**os.environ, **entry["environment"]},
        check=True,
        capture_output=True,
    )


@pytest.mark.parametrize("name", ["rabbitmq", "activemq", "kafka"])
def test_a_wrong_password_is_refused_and_not_shown(name: str, broker: Callable[[str], Any]) -> None:
    address = broker(name)["sasl" if name == "kafka" else "address"]
    user = "guest" if name == "rabbitmq" else "quintet"
    said = refused(address.replace(f"{user}:{user}@", f"{user}:s3cr3t@"), REFUSED)
    assert "s3cr3t" not in said
    assert user in said or "password" in said.lower() or "authenticat" in said.lower()


def test_a_virtual_host_that_there_is_not_is_refused(broker: Callable[[str], Any]) -> None:
    assert "nowhere" in refused(f"{broker('rabbitmq')['address']}/nowhere", REFUSED)


def test_where_nobody_listens_it_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    for said in refused_each(port, NO_ANSWER):
        assert f"127.0.0.1:{port}" in said


@pytest.fixture
def stranger() -> Iterator[Callable[[bytes], int]]:
    """`stranger(b"...")`: the port of a server that says this to whoever connects, whatever it hears."""
    servers: list[socket.socket] = []

    def stand(words: bytes) -> int:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def answer() -> None:
            held = []
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    break
                client.sendall(words)
                held.append(client)
            for client in held:
                client.close()

        threading.Thread(target=answer, daemon=True).start()
        port: int = server.getsockname()[1]
        return port

    yield stand
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


@pytest.mark.parametrize(
    "words", [b"", b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"], ids=["silent", "http"]
)
def test_where_something_else_listens_it_says_so(words: bytes, stranger: Callable[[bytes], int]) -> None:
    refused_each(stranger(words), NO_ANSWER, REFUSED)
