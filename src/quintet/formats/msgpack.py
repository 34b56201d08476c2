"""MessagePack, by msgspec: bytes and times in their native kinds, records as maps by field name."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from quintet.format import Codec, strict


class MsgPack:
    media_type: ClassVar[str] = "application/msgpack"

    def codec(self, type_: Any) -> Codec[Any]:
        return Codec(msgspec.msgpack.Encoder().encode, strict(type_, lambda kind: msgspec.msgpack.Decoder(kind).decode))


FORMAT = MsgPack()
