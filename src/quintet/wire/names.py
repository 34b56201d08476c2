"""The names by which a Message's fields travel as headers on transports that have them (AMQP, STOMP, Kafka, NSQ).

Where a wire has a property of its own for a field (AMQP's `message-id`, Kafka's record key) that is used instead, and
the wire's table says so. The user's headers, W3C trace context among them, travel beside these under their own names.
"""

from __future__ import annotations

from typing import Final

PREFIX: Final = "quintet-"

FIELDS: Final = {
    "id": "quintet-id",
    "operation": "quintet-operation",
    "sender": "quintet-sender",
    "version": "quintet-version",
    "key": "quintet-key",
    "reply_to": "quintet-reply-to",
    "correlation_id": "quintet-correlation",
    "status": "quintet-status",
}
"""The header that carries each text field of a Message; an empty one is left out."""

MEDIA_TYPE: Final = "content-type"
ATTEMPT: Final = "quintet-attempt"  # left out where it is 1
DEADLINE: Final = "quintet-deadline"  # seconds of the wall clock (since 1970, UTC), left out where nothing expires

DEAD: Final = "quintet.dead"
"""The channel of dead letters: one for each broker."""
REPLAYED: Final = "quintet-replayed"
"""How often a message was replayed: left out where it never was. It tells one death of a message from the next."""
FAILED_AT: Final = "quintet-failed-at"  # seconds of the wall clock at which each attempt failed, with commas between
DEAD_CHANNEL: Final = "quintet-dead-channel"
DEAD_FANOUT: Final = "quintet-dead-fanout"  # "yes" where that channel is one
DEAD_GROUP: Final = "quintet-dead-group"
DEAD_REASON: Final = "quintet-dead-reason"
DEAD_AT: Final = "quintet-dead-at"
DEAD_ID: Final = "quintet-dead-id"
"""What a dead letter's headers say beside the message's own."""
