"""An address as librdkafka is told of it: where, how secured, who we are, and how it sends and fetches."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from quintet.connection import credentials, tls_if
from quintet.errors import AddressError
from quintet.transport import Address

PORT = 9092
LARGEST = 8 * 1024 * 1024  # bytes of a record in a topic that is made here; Kafka's own limit is 1 MiB
START = 20.0  # seconds that a broker which was just started may take to know of a topic, or of a group
ANSWER = 5.0  # seconds that the broker may take to answer what is asked of it beside messages
GIVE_UP = 120.0  # seconds in which what was sent is confirmed, where its sender says nothing
STORE = 5.0  # seconds that a copy for the next attempt may take, then the message waits here instead
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")

SILENT = logging.Logger("quintet.librdkafka", logging.CRITICAL + 1)
"""It says to stderr what no level keeps it from."""


def config(address: Address) -> dict[str, Any]:
    options = address.options
    hosts = ",".join(f"{host or '127.0.0.1'}:{port or PORT}" for host, port in address.hosts)
    config: dict[str, Any] = {
        "bootstrap.servers": hosts,
        "client.id": "quintet",
        "log_level": 0,  # what matters is raised or told
        "logger": SILENT,
        "allow.auto.create.topics": False,
        "reconnect.backoff.ms": 50,
        "reconnect.backoff.max.ms": 500,
        "retry.backoff.ms": 50,
        "retry.backoff.max.ms": 500,
        "socket.connection.setup.timeout.ms": 5000,
        "socket.keepalive.enable": True,
        "socket.timeout.ms": 6000,
        "topic.metadata.propagation.max.ms": 2000,
        "topic.metadata.refresh.fast.interval.ms": 50,
    }
    secured = address.scheme == "kafkas"
    if "tls" in options:
        if options["tls"] not in ("on", "off"):
            raise AddressError(f"{address}: option tls={options['tls']!r} must be on or off")
        secured = options["tls"] == "on"
    user, password = credentials(address)
    if "sasl" in options and not user:
        raise AddressError(f"{address}: option sasl= needs a user: kafka://user:password@host or QUINTET_KAFKA_USER")
    config["security.protocol"] = ("SASL_" if user else "") + ("SSL" if secured else "PLAINTEXT")
    if user:
        mechanism = options.get("sasl", "PLAIN")
        if mechanism not in MECHANISMS:
            raise AddressError(f"{address}: option sasl={mechanism!r} must be one of {', '.join(MECHANISMS)}")
        config |= {"sasl.mechanism": mechanism, "sasl.username": user, "sasl.password": password}
    config |= _tls(address) if secured else {}
    tls_if(secured, address)
    if "rdkafka.debug" in options or "rdkafka.log_level" in options:
        del config["logger"]
    return config | {
        name.removeprefix("rdkafka."): value for name, value in options.items() if name.startswith("rdkafka.")
    }


def _tls(address: Address) -> dict[str, Any]:
    options, config = address.options, dict[str, Any]()
    for name, setting in (
        ("ca", "ssl.ca.location"),
        ("cert", "ssl.certificate.location"),
        ("certkey", "ssl.key.location"),
    ):
        if name in options:
            if not Path(options[name]).is_file():
                raise AddressError(f"{address}: option {name}={options[name]!r} is no file")
            config[setting] = options[name]
    if (verify := options.get("verify", "on")) not in ("on", "off"):
        raise AddressError(f"{address}: option verify={verify!r} must be on or off")
    if verify == "off":
        config["enable.ssl.certificate.verification"] = False
    return config


def producing(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "enable.idempotence": True,
        "linger.ms": 0.7,  # so long it takes to be given what makes one batch (bridge.MANY): a third of all the work
        "max.in.flight.requests.per.connection": 1,  # what comes meanwhile goes together
        "message.max.bytes": 2 * LARGEST,
        "message.timeout.ms": int(GIVE_UP * 1000),
        "partitioner": "murmur2_random",  # the Java clients' own: a key goes where their messages of that key go
        "queue.buffering.max.kbytes": 64 * 1024,
        "request.timeout.ms": 5000,
    } | config


def consuming(config: dict[str, Any]) -> dict[str, Any]:
    member = {
        "heartbeat.interval.ms": 300,  # by which a member learns that another has come
        # who stays goes on with what it has, also while the group waits for a member that is dead
        "partition.assignment.strategy": "cooperative-sticky",
        "session.timeout.ms": 10_000,
    }
    if config.get("group.protocol") == "consumer":  # there the broker decides on these
        member = {}
    return (
        {
            "auto.offset.reset": "earliest",
            "enable.auto.offset.store": False,
            "fetch.error.backoff.ms": 50,
            "fetch.max.bytes": 16 * 1024 * 1024,
            "fetch.queue.backoff.ms": 5,
            "fetch.wait.max.ms": 200,  # partitions that are new wait so long for those that have nothing
            "message.max.bytes": 2 * LARGEST,
            "queued.max.messages.kbytes": 16 * 1024,
            "queued.min.messages": 1000,  # of each partition; what was fetched comes even when that is paused
            "topic.metadata.refresh.interval.ms": 30_000,
        }
        | member
        | config
    )
