"""The figures of a run as one HTML file that needs nothing else: styles, script and data are inside.

Everything from the record is escaped: text by the template, data by writing it as JSON without `<`, `>` and `&`. The
page's own policy forbids it to load anything.
"""

from __future__ import annotations

import time
from functools import cache

import jinja2
import msgspec
from markupsafe import Markup

from chaos.report.charts import bars, words
from chaos.report.figures import Figures

HEADLINES = {"held": "Every promise held", "broke": "A promise broke", "unjudged": "Nothing was checked"}
DRAWN = ("duration_s", "seen", "ranks", "roles", "epochs", "operations", "faults")  # what the timeline needs
COLOURS = {  # of the timeline: the states that share each
    "serving": ("serving", "up", "ready"), "office": ("leading", "in office"), "waiting": ("waiting",),
    "launching": ("launching", "starting"), "handshaking": ("handshaking",), "loading": ("loading",),
    "standby": ("standby",), "draining": ("draining",), "masked": ("masked",), "dead": ("dead", "down"),
    "quarantined": ("quarantined",),
}  # fmt: skip


def page(figures: Figures) -> str:
    """The whole page."""
    seen = figures.seen
    return _environment().get_template("page.html").render(
        f=figures,
        headline=headline(figures),
        started=time.strftime("%d %b %Y, %H:%M:%S UTC", time.gmtime(figures.run.started)),
        data=_data(figures),
        gaps=bars(seen.gap_counts, seen.steady_counts, (("p99", seen.gap_p99_ms),)),
        lasted=bars(seen.lasted_counts, None, (("p50", seen.lasted_p50_ms), ("p99", seen.lasted_p99_ms))),
        victims=sorted({each.victim for each in figures.faults}),
        legend=_legend(figures),
        unjudged=sum(each.verdict == "unjudged" for each in figures.promises),
    )  # fmt: skip


def headline(figures: Figures) -> str:
    """The verdict in a few words."""
    broken = sum(each.verdict == "broke" for each in figures.promises)
    if broken > 1:
        return f"{broken} promises broke"
    if figures.verdict == "held" and any(each.verdict == "unjudged" for each in figures.promises):
        return "Every checked promise held"
    return HEADLINES[figures.verdict]


def _data(figures: Figures) -> Markup:
    """The data of the script, safe inside a script element."""
    text = msgspec.json.encode({name: getattr(figures, name) for name in DRAWN}).decode()
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)  # noqa: S704 - made safe above


def _legend(figures: Figures) -> list[tuple[str, str]]:
    """The colours that occur, each with the states that it stands for."""
    found = {span.state for lane in (*figures.ranks, *figures.roles) for span in lane.spans}
    said = ((colour, [state for state in states if state in found]) for colour, states in COLOURS.items())
    return [(colour, ", ".join(states)) for colour, states in said if states]


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("chaos.report", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(ms=words, count=lambda value: f"{value:,}")
    return environment
