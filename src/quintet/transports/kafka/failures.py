"""The one door of librdkafka's errors: what they mean, and what is to be done about them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from quintet.errors import CallError, ConnectionLost, InvalidMessage, Overloaded, TooLarge, Unavailable
from quintet.transports.kafka.settings import GIVE_UP

if TYPE_CHECKING:
    from confluent_kafka import KafkaError

HUNG_UP = "the connection is closed before an answer: it may want TLS (?tls=on), or a login (user:password@, ?sasl=)"
UNHEARD = "nothing is said there; does a broker of Kafka listen on that port?"
ADVICE: Final = {
    "Connection refused": "is a broker running there?",
    "Failed to resolve": "is the host's name right?",
    "SSL connection closed by peer": "does that port speak TLS?",
    "current SASL state": "no login is wanted on that port",
}
"""What to do, by what librdkafka's texts hold."""


def translated(raised: Any, where: str, away: str = "") -> CallError:
    """What a KafkaException means to who sent or asked; `away` says why no broker is there, where none is."""
    error: KafkaError = raised.args[0]
    code, text = error.code(), error.str()
    if code in (error._TIMED_OUT, error._TRANSPORT) and away:
        return Unavailable(f"{where}: no broker answers: {away}")
    if no_topic(raised):
        return Unavailable(f"{where}: there is no such topic, or no such partition of it")
    if code in (error.MSG_SIZE_TOO_LARGE, error.RECORD_LIST_TOO_LARGE):
        return TooLarge(f"{where}: {text}; Topic(config={{'max.message.bytes': ...}}) allows more")
    if code in (error.INVALID_MSG, error.INVALID_RECORD):
        return InvalidMessage(f"{where}: {text}")
    if code == error._MSG_TIMED_OUT:
        return ConnectionLost(f"{where}: not confirmed within {GIVE_UP:g} s")
    if purged(raised):
        return ConnectionLost(f"{where}: its producer or its topic was closed before the broker had confirmed")
    if code in (error.NOT_ENOUGH_REPLICAS, error.THROTTLING_QUOTA_EXCEEDED, error.POLICY_VIOLATION):
        return Overloaded(f"{where}: {text}")
    if error.fatal() or code in (error.OUT_OF_ORDER_SEQUENCE_NUMBER, error.NOT_ENOUGH_REPLICAS_AFTER_APPEND):
        return ConnectionLost(f"{where}: {text}")
    return Unavailable(f"{where}: {text}")


def no_topic(raised: Any) -> bool:
    """The topic is not there, or not that partition of it."""
    error = raised.args[0]
    return error.code() in (error.UNKNOWN_TOPIC_OR_PART, error._UNKNOWN_TOPIC, error._UNKNOWN_PARTITION)


def purged(raised: Any) -> bool:
    """librdkafka threw it away, with the producer or the topic that it was for."""
    error = raised.args[0]
    return error.code() in (error._PURGE_INFLIGHT, error._PURGE_QUEUE, error._DESTROY)


def told(error: KafkaError) -> str:
    """What happened to a connection, where, and what to do."""
    text = re.sub(r"/bootstrap(?=:)| \(after [^)]*\)", "", error.str()).rstrip(": ")
    if error.code() == error._BAD_MSG:
        return f"{text.partition(': ')[0]}: what answers there is not Kafka, or wants TLS (?tls=on)"
    return "; ".join([text, *(advice for mark, advice in ADVICE.items() if mark in text)])


def text(raised: Any) -> str:
    """What librdkafka says of it itself."""
    return str(raised.args[0].str())
