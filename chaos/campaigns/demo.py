"""`elastic demo`: the product in a minute. Serve, stream, scale, kill, recover, and a receipt that was measured."""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from chaos.campaigns.kill_rank import Receipt, Run, kill_rank, receipt
from chaos.campaigns.view import picture
from chaos.target.cluster import ServedCluster
from chaos.workload.history import save
from elastic.cli.flags import Output, OutputFlag, reported, write_json

FRAME_S = 0.25


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
    with reported():
        chosen = int(time.time()) % 100_000 if seed is None else seed
        run = Run(seed=chosen)
        with tempfile.TemporaryDirectory(prefix="elastic-ep-demo-") as folder:
            path = model or _write_model(Path(folder) / "demo-moe")
            with ServedCluster(path, ranks, state_dir=Path(folder) / "state") as cluster:
                _play(cluster, ranks, seconds, run, plain=plain or output is Output.JSON)
                outcome = receipt(run, cluster.events())
        if history is not None:
            save(history, run.history, run.oracle)
        _print(outcome, output)
        raise typer.Exit(0 if outcome.ok else 1)


def _write_model(directory: Path) -> Path:
    from elastic.demo.model import write_demo_model

    write_demo_model(directory)
    return directory


def _play(cluster: ServedCluster, ranks: int, seconds: float, run: Run, *, plain: bool) -> None:
    """Run the scenario, telling its steps line by line, or under a live picture."""
    console = Console(stderr=True)
    if plain or not console.is_terminal:
        started = time.monotonic()

        def tell(step: str) -> None:
            console.print(f"{time.monotonic() - started:6.1f} s  {step}", highlight=False, soft_wrap=True)

        kill_rank(cluster, ranks=ranks, seed=run.seed, seconds=seconds, run=run, tell=tell)
        return
    step = ["starting"]
    ended = threading.Event()
    with Live(console=console, refresh_per_second=8) as live:
        painter = threading.Thread(target=_paint, args=(cluster, run, step, live, ended), name="painter", daemon=True)
        painter.start()
        try:
            kill_rank(
                cluster, ranks=ranks, seed=run.seed, seconds=seconds, run=run, tell=lambda s: step.__setitem__(0, s)
            )
        finally:
            ended.set()
            painter.join(timeout=5.0)


def _paint(cluster: ServedCluster, run: Run, step: list[str], live: Live, ended: threading.Event) -> None:
    while not ended.wait(FRAME_S):
        if (cluster.state.path / "cluster.json").exists():
            client = cluster.client()
            live.update(picture(client.status(), client.state(), run, cluster.events(), step[0]))


def _print(outcome: Receipt, output: Output) -> None:
    if output is Output.JSON:
        write_json(outcome)
        return
    console = Console()
    verdict = "[green]every promise held[/]" if outcome.ok else "[red]a promise broke[/]"
    console.print(f"\n{verdict}: {outcome.requests} requests, {outcome.lost} lost, {outcome.duplicated} duplicated, "
                  f"{outcome.altered} altered")  # fmt: skip
    for line in outcome.broken:
        console.print(f"  [red]-[/] {line}", highlight=False)
    write_json(outcome)
