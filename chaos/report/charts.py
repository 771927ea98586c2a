"""Small pictures of distributions, as SVG that needs no script. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from chaos.report.streams import Histogram

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 560, 190, 40, 26, 8


def bars(run: Histogram, beside: Histogram | None = None, marks: Sequence[tuple[str, float]] = ()) -> Markup:
    """Counts over milliseconds, both on log scales; `beside` as an outline; `marks` as named lines."""
    edges = max((run.edges, beside.edges if beside else ()), key=len)
    counts = [*run.counts, *(beside.counts if beside else ())]
    if not sum(counts):
        return Markup('<p class="empty">Nothing was measured.</p>')
    first = next(i for i in range(len(edges)) if any(h and i < len(h.counts) and h.counts[i] for h in (run, beside)))
    x = _Axis(math.log10(max(edges[first], 1.0)), math.log10(edges[-1]), LEFT, WIDTH - 6)
    y = _Axis(-0.3, math.log10(max(counts)) + 0.35, HEIGHT - BOTTOM, TOP)
    parts = [*_grid(x, y)]
    for low, high, count in zip(run.edges, run.edges[1:], run.counts, strict=False):
        if count:
            left, top = x(math.log10(max(low, 1.0))), y(math.log10(count))
            width = max(1.0, x(math.log10(high)) - left - 1.0)
            parts.append(
                f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{y.low - top:.1f}" rx="1">'
                f"<title>{count:,} from {words(low)} to {words(high)}</title></rect>"
            )
    if beside is not None and beside.counts:
        parts.append(f'<path class="outline" d="{_outline(beside, x, y)}"/>')
    for number, (name, value) in enumerate(marks):
        if value > 0:
            at = x(min(x.last, max(x.first, math.log10(max(value, 1.0)))))
            anchor, nudge = ("end", -4) if at > WIDTH * 0.7 else ("start", 4)
            parts.append(
                f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{y.low}"/>'
                f'<text class="marked" x="{at + nudge:.1f}" y="{TOP + 10 + 13 * number}" text-anchor="{anchor}">'
                f"{name} {words(value)}</text>"
            )
    drawn = "".join(parts)
    return Markup(f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{drawn}</svg>')  # noqa: S704 - numbers


def words(ms: float) -> str:
    """`0.4 ms`, `12 ms`, `1.3 s`, `2 min 5 s`; a dash for what there is not."""
    if ms < 0:
        return "–"
    if ms < 99.95:
        return f"{ms:.1f}".removesuffix(".0") + " ms"
    if ms < 999.5:
        return f"{ms:.0f} ms"
    if ms < 60_000:
        return f"{ms / 1000:.3g} s"
    minutes, seconds = divmod(round(ms / 1000), 60)
    return f"{minutes} min {seconds} s"


class _Axis:
    def __init__(self, first: float, last: float, low: float, high: float) -> None:
        self.first, self.last, self.low, self.high = first, max(last, first + 0.1), low, high

    def __call__(self, value: float) -> float:
        return self.low + (value - self.first) / (self.last - self.first) * (self.high - self.low)


def _grid(x: _Axis, y: _Axis) -> list[str]:
    parts = []
    for power in range(math.ceil(y.first), math.floor(y.last) + 1):
        at = y(power)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 6}" y1="{at:.1f}" y2="{at:.1f}"/>')
        said = f"{10**power:,}" if power < 4 else f"{10 ** (power - 3):,}k"
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{said}</text>')
    for power in range(math.ceil(x.first), math.floor(x.last) + 1):
        for factor in (1, 3):
            value = factor * 10.0**power
            if math.log10(value) <= x.last:
                at = x(math.log10(value))
                anchor = "end" if at > WIDTH - 30 else "middle"
                parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{words(value)}</text>')
    return parts


def _outline(histogram: Histogram, x: _Axis, y: _Axis) -> str:
    path, last = list[str](), 0
    for low, count in zip(histogram.edges, [*histogram.counts, 0], strict=False):
        if not count and not last:
            continue
        at, top = x(math.log10(max(low, 1.0))), y(math.log10(count)) if count else y.low
        path.append(f"{'H' if path else f'M{at:.1f},{y.low}H'}{at:.1f}V{top:.1f}")
        last = count
    return "".join(path)
