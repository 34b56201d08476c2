"""JSON (RFC 8259), by msgspec: dates as RFC 3339, bytes as base64, decimals and UUIDs as strings."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from quintet.format import Codec, strict


class Json:
    media_type: ClassVar[str] = "application/json"

    def codec(self, type_: Any) -> Codec[Any]:
        return Codec(msgspec.json.Encoder().encode, strict(type_, lambda kind: msgspec.json.Decoder(kind).decode))


FORMAT = Json()
