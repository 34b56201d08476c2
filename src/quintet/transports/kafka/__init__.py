"""Apache Kafka: a topic for each channel, a consumer group for each group, on librdkafka (the extra `kafka`).

`kafka://host:9092,host2:9092?sasl=...&tls=on&rdkafka.<name>=...`; docs/kafka.md has the names, so that any program
takes part. What is done of a partition is committed behind the handlers, never beyond what is done (`wire/kafka.py`);
what is to come again waits in a retry topic of its group, or, with a key, here, where it holds back its key and no
other.
"""

from quintet.transports.kafka.carrier import Carrier, Clients
from quintet.transports.kafka.options import Record, Topic

__all__ = ["Carrier", "Clients", "Record", "Topic"]
