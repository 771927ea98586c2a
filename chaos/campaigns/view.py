"""The demo's live picture: which rank holds which expert, the streams, and what happened when. Reads, never acts."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from chaos.workload.streams import Workload
from elastic.cli.render import COLOURS
from membership.base.events import Event
from membership.store.records import ClusterState

SHOWN_EVENTS = {
    "epoch_committed", "epoch_adopted", "rank_masked", "rank_recovered", "rank_died", "rank_spawned", "rank_prepared",
    "operation_phase", "role_died",
}  # fmt: skip


def picture(
    status: dict[str, Any], state: ClusterState, workload: Workload | None, events: list[Event], step: str
) -> RenderableType:
    """One frame."""
    title = Text.assemble(
        ("elastic-ep ", "bold"), (status["state"], COLOURS.get(status["state"], "")), f"  epoch {status['epoch']}",
        f"  running {status['requests']['running']}  waiting {status['requests']['waiting']}", ("   " + step, "cyan"),
    )  # fmt: skip
    columns = Table.grid(padding=(0, 2))
    columns.add_row(_grid(status, state), _streams(workload))
    return Panel(Group(title, Text(), columns, Text(), *_timeline(events)), border_style="dim")


def _grid(status: dict[str, Any], state: ClusterState) -> Table:
    """Rank x expert of the first MoE layer: a filled cell is a replica."""
    experts = state.config.experts if state.config else 0
    table = Table(box=None, pad_edge=False, header_style="dim", title="rank x expert (layer 0)", title_style="dim")
    table.add_column("rank", justify="right")
    table.add_column("state")
    for expert in range(min(experts, 64)):
        table.add_column(f"{expert:x}", justify="center")
    placement = state.view.placement if state.view else {}
    for rank in status["ranks"]:
        colour = COLOURS.get(rank["state"], "")
        layers = placement.get(rank["rank"], ())
        held = set(layers[0]) if layers else set()
        cells = [Text("■" if e in held else "·", colour if e in held else "dim") for e in range(min(experts, 64))]
        table.add_row(str(rank["rank"]), Text(rank["state"], colour), *cells)
    return table


def _streams(workload: Workload | None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", title="streams", title_style="dim")
    table.add_column("stream", justify="right")
    table.add_column("tokens")
    if workload is not None:
        for number, count in sorted(workload.open_streams().items()):
            table.add_row(str(number), Text("▪" * min(count // 2, 48), "green"))
        table.add_row("ended", str(len(workload.records())))
    return table


def _timeline(events: list[Event], rows: int = 8) -> list[Text]:
    lines = []
    for event in [e for e in events if e.kind in SHOWN_EVENTS][-rows:]:
        clock = time.strftime("%H:%M:%S", time.localtime(event.ts)) + f".{int(event.ts % 1 * 1000):03d}"
        said = " ".join(f"{k}={v}" for k, v in event.fields.items() if k not in ("traceback",))
        rank = "" if event.rank is None else f" rank {event.rank}"
        bad = event.kind in ("rank_died", "rank_masked", "role_died")
        lines.append(
            Text.assemble((clock, "dim"), " ", (event.kind, "red" if bad else "green"), rank, (" " + said, "dim"))
        )
    return lines
