"""`elastic demo`: the product in a minute. Serve, stream, scale, kill, recover, and a receipt that was measured."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from chaos.campaigns.campaign import Notify, seed_of
from chaos.campaigns.kill_rank import KillRank
from chaos.campaigns.targets import LocalTarget
from chaos.campaigns.view import picture
from chaos.cli.shared import end_in_order, progress, show_receipt
from chaos.target.checkpoint import checkpoint
from chaos.target.cluster import ServedCluster
from chaos.workload.history import save
from elastic.cli.command import command
from elastic.cli.flags import Output, OutputFlag

FRAME_S = 0.25


@command
def demo(
    ranks: Annotated[int, typer.Option(help="Ranks to start with; the demo goes to two more and back.")] = 4,
    seconds: Annotated[float, typer.Option(help="Stream at least this long.")] = 10.0,
    seed: Annotated[int | None, typer.Option(help="Chooses the victim and the sampled requests.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of a live picture.")] = False,
    model: Annotated[Path | None, typer.Option(help="Serve this checkpoint instead of the shipped one.")] = None,
    history: Annotated[
        Path | None, typer.Option(help="Also save what the clients saw, for elastic-chaos check.")
    ] = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Serve a MoE model, stream, scale, kill -9 a rank, recover; print the receipt. Exit 1 if a promise broke."""
    end_in_order()
    run = KillRank(seed=seed_of(seed), ranks=ranks, at_least_s=seconds)
    with tempfile.TemporaryDirectory(prefix="elastic-ep-demo-") as folder:
        path = checkpoint(model, Path(folder))
        with ServedCluster(path, ranks, state_dir=Path(folder) / "state") as cluster:
            _play(cluster, run, plain=plain or output is Output.JSON)
            receipt = run.receipt(cluster.events())
    if history is not None:
        save(history, run.history, run.oracle)
    show_receipt(receipt, "", output)


def _play(cluster: ServedCluster, run: KillRank, *, plain: bool) -> None:
    """Run it, its steps as lines or under a live picture."""
    console = Console(stderr=True)
    if plain or not console.is_terminal:
        run.run(LocalTarget(cluster), progress())
        return
    step = ["starting"]
    ended = threading.Event()
    notify: Notify = lambda now: step.__setitem__(0, now)  # noqa: E731
    with Live(console=console, refresh_per_second=8) as live:
        painter = threading.Thread(target=_paint, args=(cluster, run, step, live, ended), name="painter", daemon=True)
        painter.start()
        try:
            run.run(LocalTarget(cluster), notify)
        finally:
            ended.set()
            painter.join(timeout=5.0)


def _paint(cluster: ServedCluster, run: KillRank, step: list[str], live: Live, ended: threading.Event) -> None:
    while not ended.wait(FRAME_S):
        if (cluster.state.path / "cluster.json").exists():
            client = cluster.client()
            live.update(picture(client.status(), client.state(), run.workload, cluster.events(), step[0]))
