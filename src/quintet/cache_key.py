"""The key under which a reply is kept: equal arguments have equal keys, in whatever order their sets and dicts are."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

_TRACE = frozenset({"traceparent", "tracestate", "baggage"})
_PLAIN = frozenset({str, int, float, bool, bytes, type(None)})


def cache_key(record: Any, headers: Mapping[str, str]) -> bytes:
    """A digest of the parameters and of the user's headers, of the same length however much was asked."""
    mine = sorted((name, value) for name, value in headers.items() if name not in _TRACE)
    return blake2b(f"{_written(record)}{mine}".encode("utf-8", "surrogatepass"), digest_size=32).digest()


def _written(value: Any) -> str:
    """A text that is the same for equal values, and for no others."""
    kind = type(value)
    if kind in _PLAIN:
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(sorted([f'{_written(key)}:{_written(item)}' for key, item in value.items()]))}}}"
    if isinstance(value, set | frozenset):
        return f"{{{','.join(sorted(map(_written, value)))}}}"
    if isinstance(value, enum.Enum):
        return f"{kind.__qualname__}({_written(value.value)})"
    names = getattr(kind, "__struct_fields__", None) or getattr(kind, "__dataclass_fields__", ())
    if names:
        return f"{kind.__qualname__}({','.join([_written(getattr(value, name)) for name in names])})"
    return repr(value)
