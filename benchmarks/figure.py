"""One measured figure, and the budget that it must hold."""

from __future__ import annotations

from msgspec import Struct


class Figure(Struct, frozen=True):
    """`holds` is None where there is no budget: the figure is there to be read."""

    name: str
    value: float
    unit: str
    budget: str = ""
    holds: bool | None = None


def at_least(name: str, value: float, unit: str, budget: float) -> Figure:
    return Figure(name, value, unit, f">= {budget:,g}", value >= budget)


def at_most(name: str, value: float, unit: str, budget: float) -> Figure:
    return Figure(name, value, unit, f"<= {budget:,g}", value <= budget)
