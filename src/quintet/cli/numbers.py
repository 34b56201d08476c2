"""Which numbers an option takes. (Typer's own bounds let NaN and infinity pass.)"""

from __future__ import annotations

import math

import typer


def seconds(value: float | None) -> float | None:
    """More than none. Raises BadParameter, which becomes the sentence of wrong usage."""
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise typer.BadParameter(f"{value:g}: seconds must be more than 0, and not without end")
    return value


def seconds_or_none(value: float) -> float:
    """0 or more. Raises BadParameter."""
    if not (value >= 0 and math.isfinite(value)):
        raise typer.BadParameter(f"{value:g}: seconds must be 0 or more, and not without end")
    return value
