"""A sequence diagram of recorded exchanges (record.py): as text for the terminal, and as an SVG."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias
from xml.sax.saxutils import escape

from msgspec import Struct
from rich.text import Text

from quintet.contract import Style
from quintet.record import Exchange

Shape: TypeAlias = Literal["request", "reply", "one-way", "fan-out", "mark"]

SHAPES: dict[str, Shape] = {
    Style.REQUEST.value: "request",
    Style.NOTIFICATION.value: "one-way",
    Style.ASYNC_REQUEST.value: "one-way",  # its sender does not wait either
    Style.EVENT.value: "fan-out",
    Style.SURVEY.value: "fan-out",
}
SAID = {"late": "too late", "DeadlineExceeded": "too late", "StillPending": "not yet", "CancelledError": "cut off"}
NO_FAILURE = frozenset({"done", "StillPending"})


class Arrow(Struct, eq=False):
    """One line of the diagram; `at` is its wall-clock time. A mark stands on the lifeline of its source, alone."""

    at: float
    shape: Shape
    style: str
    source: str
    targets: tuple[str, ...]
    label: str
    failed: bool = False
    began: Arrow | None = None  # of what ends a piece of work: the arrow that began it


def arrows(exchanges: Iterable[Exchange]) -> list[Arrow]:
    """What was exchanged, in the order of time: the copies of one message are one arrow, each reply is its own."""
    sent: dict[tuple[str, str, str, int], list[Exchange]] = {}
    for exchange in sorted(exchanges, key=lambda one: one.started):
        receiver = "" if SHAPES[exchange.style] == "fan-out" else exchange.receiver
        sent.setdefault((exchange.id, exchange.operation, receiver, exchange.attempt), []).append(exchange)
    found: list[Arrow] = []
    for copies in sent.values():
        first = copies[0]
        again = f" (attempt {first.attempt})" if first.attempt > 1 else ""
        targets = tuple(dict.fromkeys(copy.receiver for copy in copies))
        begin = Arrow(
            first.started, SHAPES[first.style], first.style, first.sender or "?", targets, first.operation + again
        )
        found.append(begin)
        found += [end for copy in copies if (end := _end(copy, begin))]
    return sorted(found, key=lambda arrow: arrow.at)


def _end(exchange: Exchange, began: Arrow) -> Arrow | None:
    """How a delivery ended, where that is to be seen: a reply, a failure, an answer that is kept."""
    outcome, receiver, style = exchange.outcome, exchange.receiver, exchange.style
    failed, said = outcome not in NO_FAILURE, SAID.get(outcome, outcome)
    if style in (Style.REQUEST.value, Style.SURVEY.value):
        label = _duration(exchange.ended - exchange.started) if outcome == "done" else said
        return Arrow(exchange.ended, "reply", style, receiver, (began.source,), label, failed, began)
    if failed:
        return Arrow(exchange.ended, "mark", style, receiver, (), said, failed, began)
    if style == Style.ASYNC_REQUEST.value:
        return Arrow(exchange.ended, "mark", style, receiver, (), "answer kept", failed, began)
    return None


def participants(found: Iterable[Arrow]) -> list[str]:
    """Everyone who said or heard something, in the order in which they appear."""
    return list(dict.fromkeys(name for arrow in found for name in (arrow.source, *arrow.targets)))


def _duration(seconds: float) -> str:
    milliseconds = max(seconds, 0) * 1000
    return f"{milliseconds:.0f} ms" if milliseconds >= 9.95 else f"{milliseconds:.1f} ms"


# --- in the terminal

COLOURS: dict[str, str] = {
    Style.REQUEST.value: "cyan",
    Style.NOTIFICATION.value: "green",
    Style.ASYNC_REQUEST.value: "blue",
    Style.EVENT.value: "magenta",
    Style.SURVEY.value: "yellow",
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # what neither a terminal nor XML takes well
_TIME = 8


def text(exchanges: Iterable[Exchange], *, width: int = 110, order: Sequence[str] = ()) -> Text:
    """The diagram in lines of at most `width` columns (more where the names leave no other way); rich prints it.

    `order`: who stands where, from the left; all others follow as they appear.
    """
    found = arrows(exchanges)
    names = _ordered(found, order)
    label_width = min(max((len(_label(arrow)) for arrow in found), default=0), 36)
    gutter = _TIME + 2 + label_width + 2
    step = max(4, min(14, (width - gutter - 1) // max(len(names), 1)))
    places = {name: gutter + step // 2 + number * step for number, name in enumerate(names)}
    total = max([width, *(place + 1 for place in places.values())])
    drawn = Text(no_wrap=True)
    for line in _heads(names, places, total):
        drawn.append(line.rstrip() + "\n", style="bold")
    begun = found[0].at if found else 0.0
    for arrow in found:
        colour = "red" if arrow.failed else COLOURS[arrow.style]
        drawn.append(f"{arrow.at - begun:>{_TIME - 2}.3f} s  ", style="dim")
        drawn.append(f"{_label(arrow):.{label_width}}".ljust(label_width + 2), style=colour)
        line = _row(arrow, places, total)[gutter:].rstrip()
        for piece in re.split("([^│ ]+)", line):
            drawn.append(piece, style="dim" if not piece.strip("│ ") else colour)
        drawn.append("\n")
    return drawn


def _label(arrow: Arrow) -> str:
    label = _CONTROL.sub("�", arrow.label)
    return f"  {label}" if arrow.began else label


def _ordered(found: list[Arrow], order: Sequence[str]) -> list[str]:
    there = participants(found)
    return [name for name in order if name in there] + [name for name in there if name not in order]


def _heads(names: list[str], places: dict[str, int], total: int) -> list[str]:
    """The names above their lifelines, on as many lines as keeps them apart."""
    lines: list[list[str]] = []
    for name in names:
        shown = _CONTROL.sub("�", name)
        start = max(0, min(places[name] - len(shown) // 2, total - len(shown)))
        for line in lines:
            if not "".join(line[max(0, start - 1) : start + len(shown) + 1]).strip(" "):
                break
        else:
            line = [" "] * (total + len(shown))
            lines.append(line)
        line[start : start + len(shown)] = shown
        for below in lines[: lines.index(line)]:
            below[places[name]] = "│"
    return ["".join(line) for line in reversed(lines)]


def _row(arrow: Arrow, places: dict[str, int], total: int) -> str:
    """One arrow across the lifelines."""
    row = [" "] * total
    for place in places.values():
        row[place] = "│"
    source = places[arrow.source]
    if arrow.shape == "mark":
        row[source] = "✗" if arrow.failed else "●"
        return "".join(row)
    targets = [places[target] for target in arrow.targets]
    line = "╌" if arrow.shape == "reply" else "─"
    right, left = ("▷", "◁") if arrow.shape in ("one-way", "reply") else ("▶", "◀")
    for place in range(min(source, *targets), max(source, *targets) + 1):
        row[place] = line
    for target in targets:
        if target == source:
            continue
        edge = target in (min(source, *targets), max(source, *targets))
        row[target] = "│" if edge else "┼"
        row[target + (-1 if target > source else 1)] = right if target > source else left
    row[source] = "◆" if arrow.shape == "fan-out" else "│"
    if source in targets:
        row[source] = "↺"
    return "".join(row)


# --- as an SVG

_CLASSES: dict[str, str] = {
    Style.REQUEST.value: "request",
    Style.NOTIFICATION.value: "notification",
    Style.ASYNC_REQUEST.value: "async",
    Style.EVENT.value: "event",
    Style.SURVEY.value: "survey",
}
_CSS = """
:root {
  --paper: #ffffff; --ink: #1b2130; --soft: #69738a; --line: #cfd6e2; --box: #f4f6fa; --bar: #e9edf5;
  --request: #1d63d8; --notification: #0b8457; --async: #0e7f9c; --event: #8439c9; --survey: #b25d00;
  --failed: #d1242f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12161f; --ink: #e4e9f2; --soft: #8b96ab; --line: #343d4e; --box: #1c2330; --bar: #273044;
    --request: #6ea8ff; --notification: #4cc38a; --async: #4cc3dd; --event: #c792ff; --survey: #f2a65a;
    --failed: #ff7b72;
  }
}
svg { background: var(--paper); }
text { font: 12px ui-sans-serif, system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: var(--ink); }
.title { font-size: 18px; font-weight: 600; }
.name { font-weight: 600; font-size: 13px; text-anchor: middle; }
.soft, .time { fill: var(--soft); font-size: 11px; }
.time { text-anchor: end; font-variant-numeric: tabular-nums; }
.label { text-anchor: middle; paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }
.box { fill: var(--box); stroke: var(--line); }
.life { stroke: var(--line); stroke-dasharray: 2 4; }
.bar { fill: var(--bar); stroke: currentColor; stroke-opacity: .55; }
.arrow { stroke: currentColor; stroke-width: 1.6; fill: none; }
.reply .arrow { stroke-dasharray: 5 4; stroke-width: 1.3; }
.head { fill: currentColor; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round; }
.open { fill: none; stroke-linecap: round; }
.reply .label { fill: currentColor; font-size: 11px; }
.mark .label { fill: currentColor; font-size: 11px; text-anchor: start; }
"""
_ROW, _TOP, _LEFT, _BOX, _PAD = 32, 118, 84, 30, 24  # pixels: a row, the first one, the column of times, a name's box


def svg(exchanges: Iterable[Exchange], *, title: str = "What was exchanged", order: Sequence[str] = ()) -> str:
    """The diagram as one SVG document that follows the reader's light or dark scheme. All text in it is escaped."""
    found = arrows(exchanges)
    return _Drawing(found, _ordered(found, order), title).draw()


class _Drawing:
    def __init__(self, found: list[Arrow], names: list[str], title: str) -> None:
        self._found, self._names, self._title = found, names, title
        self._step = self._spacing()
        self._x = {name: _LEFT + _PAD + self._step / 2 + n * self._step for n, name in enumerate(names)}
        self._y: dict[int, float] = {}
        y, before = float(_TOP), 0.0
        self._gaps: list[tuple[float, float]] = []
        for arrow in found:
            if before and arrow.at - before >= 0.25:
                self._gaps.append((y - 4, arrow.at - before))
                y += _ROW * 0.75
            self._y[id(arrow)] = y
            before, y = arrow.at, y + _ROW
        self._bottom = y
        self._width = max(_LEFT + 3 * _PAD + self._step * max(len(names), 1), 620)
        self._height = self._bottom + _BOX + 84

    def _spacing(self) -> float:
        """As wide as names and the labels between neighbours need it."""
        place = {name: number for number, name in enumerate(self._names)}
        widest = max((_wide(name) * 1.12 + 40 for name in self._names), default=0.0)
        for arrow in self._found:
            steps = max((abs(place[target] - place[arrow.source]) for target in arrow.targets), default=1)
            widest = max(widest, (_wide(_short(arrow)) + 34) / max(steps, 1))
        return max(104.0, widest)

    def draw(self) -> str:
        begun = self._found[0].at if self._found else 0.0
        said = "; ".join(f"{arrow.source} to {', '.join(arrow.targets)}: {arrow.label}" for arrow in self._found)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self._width:.0f} {self._height:.0f}"'
            f' width="{self._width:.0f}" height="{self._height:.0f}" role="img" aria-labelledby="title">',
            f'<title id="title">{_safe(self._title)}</title><desc>{_safe(said)}</desc><style>{_CSS}</style>',
            f'<text class="title" x="{_PAD}" y="38">{_safe(self._title)}</text>',
        ]
        parts += self._lifelines()
        parts += self._bars()
        for y, seconds in self._gaps:
            parts.append(f'<text class="time" x="{_LEFT - 4}" y="{y:.1f}">⋮ {seconds:.1f} s</text>')
        for arrow in self._found:
            y = self._y[id(arrow)]
            parts.append(f'<text class="time" x="{_LEFT - 4}" y="{y + 4:.1f}">{arrow.at - begun:.3f} s</text>')
            parts.append(self._arrow(arrow, y))
        parts += self._legend()
        return "\n".join([*parts, "</svg>"]) + "\n"

    def _lifelines(self) -> Iterable[str]:
        top, bottom = _TOP - 60, self._bottom + 4
        for name, x in self._x.items():
            yield f'<line class="life" x1="{x:.1f}" y1="{top + _BOX}" x2="{x:.1f}" y2="{bottom:.1f}"/>'
            wide = max(_wide(name) * 1.12 + 24, 76)
            for y in (top, bottom):
                yield (
                    f'<rect class="box" x="{x - wide / 2:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{_BOX}" rx="7"/>'
                    f'<text class="name" x="{x:.1f}" y="{y + 20:.1f}">{_safe(name)}</text>'
                )

    def _bars(self) -> Iterable[str]:
        """The time for which a service worked on something; what overlaps stands a little to the right."""
        spans = [(self._y[id(end.began)], self._y[id(end)], end) for end in self._found if end.began]
        for top, bottom, end in sorted(spans, key=lambda span: span[:2]):
            depth = sum(upper < top < lower for upper, lower, other in spans if other.source == end.source)
            colour = "failed" if end.failed else _CLASSES[end.style]
            yield (
                f'<rect class="bar" style="color: var(--{colour})" x="{self._x[end.source] - 4 + 4 * depth:.1f}"'
                f' y="{top - 2:.1f}" width="8" height="{bottom - top + 4:.1f}" rx="3"/>'
            )

    def _arrow(self, arrow: Arrow, y: float) -> str:
        colour = "failed" if arrow.failed else _CLASSES[arrow.style]
        pieces = [f'<g class="{arrow.shape}" style="color: var(--{colour})">']
        source, label = self._x[arrow.source], _safe(_short(arrow))
        if arrow.shape == "mark":
            sign = "M-4 -4 4 4M4 -4 -4 4" if arrow.failed else "M-4 0 -1 3 4 -4"
            pieces.append(f'<path class="arrow" transform="translate({source + 13:.1f} {y:.1f})" d="{sign}"/>')
            pieces.append(f'<text class="label" x="{source + 23:.1f}" y="{y + 4:.1f}">{label}</text></g>')
            return "".join(pieces)
        targets = [self._x[target] for target in arrow.targets]
        furthest = {min(source, *targets), max(source, *targets)}  # one line to the furthest on either side
        pieces += [self._line(source, to, y, arrow.shape, stroked=to in furthest) for to in sorted(targets)]
        if arrow.shape == "fan-out":
            pieces.append(f'<circle class="head" cx="{source:.1f}" cy="{y:.1f}" r="4"/>')
        near = min(targets, key=lambda target: (abs(target - source), -target))
        middle = source + 34 + _wide(_short(arrow)) / 2 if near == source else (source + near) / 2
        pieces.append(f'<text class="label" x="{middle:.1f}" y="{y - 7:.1f}">{label}</text></g>')
        return "".join(pieces)

    def _line(self, source: float, target: float, y: float, shape: Shape, stroked: bool) -> str:
        if source == target:  # to itself
            path, tip, way = f"M{source:.1f} {y:.1f}h24v10h-19", source + 5, -1
            y += 10
        else:
            way = 1 if target > source else -1
            tip = target - 5 * way
            path = f"M{source + 4 * way:.1f} {y:.1f}H{tip - (6 * way if shape in ('request', 'fan-out') else 0):.1f}"
        head = f"M{tip - 7 * way:.1f} {y - 4.5:.1f}L{tip:.1f} {y:.1f}L{tip - 7 * way:.1f} {y + 4.5:.1f}"
        kind = "head" if shape in ("request", "fan-out") else "head open"
        line = f'<path class="arrow" d="{path}"/>' if stroked else ""
        return f'{line}<path class="{kind}" d="{head}{"" if "open" in kind else "Z"}"/>'

    def _legend(self) -> Iterable[str]:
        y, x = self._height - 38, float(_PAD)
        for style, name in _CLASSES.items():
            yield f'<circle cx="{x + 4:.1f}" cy="{y - 4:.1f}" r="4" style="fill: var(--{name})"/>'
            yield f'<text class="soft" x="{x + 14:.1f}" y="{y:.1f}">{_safe(style)}</text>'
            x += 34 + _wide(style) * 0.92
        said = "open head: nobody waits; dot: to all who listen; dashed: a reply; red: declined, too late, failed"
        yield f'<text class="soft" x="{_PAD}" y="{y + 20:.1f}">{said}</text>'


def _short(arrow: Arrow) -> str:
    """Without the contract's name: the lifelines say it."""
    return arrow.label if arrow.began else arrow.label.partition(".")[2] or arrow.label


def _wide(words: str) -> float:
    """About as many pixels as it is wide."""
    return sum(3.6 if letter in "ijlt.,:;'| ()[]" else 9.6 if letter in "mwMW@%" else 7.0 for letter in words)


def _safe(words: str) -> str:
    return escape(_CONTROL.sub("�", words))
