"""What the tests of all brokers run on: a broker, and the way in which it is reached."""

from __future__ import annotations

from running import Broker, Entry

BROKERS = ["rabbitmq", "activemq", "kafka", "nsq"]
WAYS = {name: (name, "address") for name in BROKERS} | {"rabbitmq-stomp": ("rabbitmq", "stomp")}
"""The broker behind each name, and the key of its address."""
SUBJECTS = list(WAYS)


def broker_of(name: str) -> str:
    return WAYS[name][0]


def address_of(name: str, found: Entry | Broker) -> str:
    entry = found.entry if isinstance(found, Broker) else found
    address: str = entry[WAYS[name][1]]
    return address
