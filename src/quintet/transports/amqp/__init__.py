"""RabbitMQ over AMQP 0-9-1: one connection to publish, one to consume.

What stands on the broker is in `wire/amqp_topology.py`, how a message looks in `wire/amqp_message.py`.
"""

from quintet.transports.amqp.carrier import Carrier
from quintet.wire.amqp_topology import Publish, Queue

__all__ = ["Carrier", "Publish", "Queue"]
