"""The chart of what three callers served over time, as one SVG document that follows the reader's colour scheme."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from xml.sax.saxutils import escape

from msgspec import Struct

STEP = 0.5  # seconds that one column stands for


class Panel(Struct, frozen=True):
    """One caller: when each page was served and what kind it was, and two short remarks on it.

    `open`: from when to when its circuit was open. All times are in seconds since the start.
    """

    title: str
    served: Sequence[tuple[float, str]]
    remarks: tuple[str, str]
    failed: bool = False
    open: tuple[float, float] | None = None


KINDS = {
    "fresh": "with fresh recommendations",
    "stale": "with stale ones",
    "none": "without any",
}
_CSS = """
:root {
  --paper: #ffffff; --ink: #1b2130; --soft: #69738a; --line: #dfe4ec; --hang: #fdf0ee; --mark: #d1242f;
  --fresh: #2f7de1; --stale: #e8a33d; --none: #a7b1c2; --good: #0b8457;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12161f; --ink: #e4e9f2; --soft: #8b96ab; --line: #2b3342; --hang: #2a1c22; --mark: #ff7b72;
    --fresh: #5b9dff; --stale: #e0a04a; --none: #5d6a80; --good: #4cc38a;
  }
}
svg { background: var(--paper); }
text { font: 12px ui-sans-serif, system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: var(--ink); }
.title { font-size: 18px; font-weight: 600; }
.name { font-size: 14px; font-weight: 600; }
.soft { fill: var(--soft); font-size: 11px; }
.tick { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
.end { text-anchor: end; }
.middle { text-anchor: middle; }
.hang { fill: var(--hang); }
.mark { stroke: var(--mark); stroke-width: 1.4; stroke-dasharray: 4 3; }
.said { fill: var(--mark); font-weight: 600; }
.good { fill: var(--good); font-weight: 600; }
.grid { stroke: var(--line); }
.come { stroke: var(--soft); stroke-dasharray: 1 3; }
.axis { stroke: var(--soft); }
.circuit { fill: none; stroke: var(--mark); stroke-width: 3; stroke-linecap: round; }
.fresh { fill: var(--fresh); } .stale { fill: var(--stale); } .none { fill: var(--none); }
"""
_LEFT, _TOP, _WIDE, _HIGH, _GAP, _SIDE = 52, 124, 600, 104, 54, 196  # pixels; _SIDE is where the remarks stand


def svg(panels: Sequence[Panel], *, title: str, rate: float, seconds: float, hangs: float, back: float) -> str:
    """Pages served per second, a panel for each caller one below the other.

    `rate`: visitors that come per second. `hangs`, `back`: when the service hung, of `seconds` in all.
    """
    height, width = _TOP + len(panels) * (_HIGH + _GAP), _LEFT + _WIDE + _SIDE
    said = "; ".join(f"{panel.title}: {', '.join(panel.remarks)}" for panel in panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' role="img" aria-labelledby="title">',
        f'<title id="title">{escape(title)}</title><desc>{escape(said)}</desc><style>{_CSS}</style>',
        f'<text class="title" x="{_LEFT - 28}" y="36">{escape(title)}</text>',
        *_legend(),
        *_span(_x(hangs, seconds), _x(back, seconds), height),
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, _TOP + number * (_HIGH + _GAP), rate, seconds, hangs, back)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _x(at: float, seconds: float) -> float:
    return _LEFT + _WIDE * at / seconds


def _legend() -> Iterator[str]:
    x = float(_LEFT - 28)
    yield f'<text class="soft" x="{x}" y="58">Pages served per second,</text>'
    x += 152
    for kind, said in KINDS.items():
        yield f'<rect class="{kind}" x="{x}" y="49" width="10" height="10" rx="2"/>'
        yield f'<text class="soft" x="{x + 15}" y="58">{said}</text>'
        x += 34 + 5.9 * len(said)
    yield f'<path class="circuit" d="M{x + 4} 54h14"/><text class="soft" x="{x + 26}" y="58">the circuit is open</text>'


def _span(hangs: float, back: float, height: float) -> Iterable[str]:
    """The time in which the service hung, behind all panels."""
    top, bottom = _TOP - 44, height - _GAP + 30
    yield f'<rect class="hang" x="{hangs:.1f}" y="{top}" width="{back - hangs:.1f}" height="{bottom - top}" rx="4"/>'
    for x, said, look in ((hangs, "Recommendation hangs", "said"), (back, "it is back", "good")):
        yield f'<text class="{look}" x="{x + 7:.1f}" y="{top + 17}">{said}</text>'


def _panel(panel: Panel, top: float, rate: float, seconds: float, hangs: float, back: float) -> Iterable[str]:
    bottom, scale = top + _HIGH, _HIGH / (rate * 1.5)
    yield f'<text class="name" x="{_LEFT + _WIDE + 16}" y="{top + 44}">{escape(panel.title)}</text>'
    for n, remark in enumerate(panel.remarks):
        look = "soft" if n else "said" if panel.failed else "good"
        yield f'<text class="{look}" x="{_LEFT + _WIDE + 16}" y="{top + 64 + 18 * n}">{escape(remark)}</text>'
    for value in (0.0, rate / 2, rate):
        y = bottom - value * scale
        look = "axis" if value == 0 else "come" if value == rate else "grid"
        yield f'<line class="{look}" x1="{_LEFT}" y1="{y:.1f}" x2="{_LEFT + _WIDE}" y2="{y:.1f}"/>'
        yield f'<text class="tick end" x="{_LEFT - 8}" y="{y + 4:.1f}">{value:g}</text>'
    yield from _columns(panel, bottom, scale, seconds)
    for at in (hangs, back):
        x = _x(at, seconds)
        yield f'<line class="mark" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}"/>'
    for second in range(0, int(seconds) + 1, 2):
        yield f'<text class="tick middle" x="{_x(second, seconds):.1f}" y="{bottom + 17}">{second} s</text>'
    if panel.failed:
        x = _x((hangs + back) / 2, seconds)
        yield f'<text class="said middle" x="{x:.1f}" y="{bottom - rate / 4 * scale + 4:.1f}">nothing is served</text>'
    if panel.open:
        start, end = (_x(at, seconds) for at in panel.open)
        yield f'<path class="circuit" d="M{start:.1f} {top + 4}H{end:.1f}"/>'


def _columns(panel: Panel, bottom: float, scale: float, seconds: float) -> Iterable[str]:
    """The pages, stacked by their kind. A column that does not fit is cut off, and says how high it would be."""
    wide = _x(STEP, seconds) - _x(0, seconds)
    for column in range(round(seconds / STEP)):
        x, y, room = _x(column * STEP, seconds), bottom, float(_HIGH)
        kinds = Counter(kind for at, kind in panel.served if column == int(at / STEP))
        for kind in KINDS:
            high = min(kinds[kind] / STEP * scale, room)
            y, room = y - high, room - high
            if high:
                box = f'x="{x + 0.75:.1f}" y="{y:.1f}" width="{wide - 1.5:.1f}" height="{high:.1f}"'
                yield f'<rect class="{kind}" {box}/>'
        if room <= 0:
            yield f'<text class="tick middle" x="{x + wide / 2:.1f}" y="{y - 5:.1f}">{kinds.total() / STEP:.0f}</text>'
