"""`elastic-chaos soak` and `churn`: many kills, many changes, on real processes under load."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from chaos.churn import Churn, ChurnReceipt, run_churn
from chaos.churn import judge as judge_churn
from chaos.cluster import ServedCluster
from chaos.endurance import Tell, seed_of
from chaos.history import save
from chaos.soak import FLAGS, Soak, SoakReceipt, judge, run_soak
from elastic.options import Output, OutputFlag, reported, write_json

SeedFlag = Annotated[int | None, typer.Option(help="Chooses what happens, and the sampled requests.")]
RanksFlag = Annotated[int, typer.Option(min=1, help="Ranks to serve with.")]
StreamsFlag = Annotated[int, typer.Option(min=1, help="Requests under way at a time.")]
ModelFlag = Annotated[Path | None, typer.Option(help="Serve this checkpoint instead of the shipped one.")]
HistoryFlag = Annotated[Path | None, typer.Option(help="Also save what the clients saw, for elastic-chaos check.")]


def soak(
    kills: Annotated[int, typer.Option(min=1, help="SIGKILLs, at least.")] = 300,
    seed: SeedFlag = None,
    ranks: RanksFlag = 4,
    streams: StreamsFlag = 8,
    model: ModelFlag = None,
    history: HistoryFlag = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Kill random ranks at random moments under load, nested deaths too. Exit 1 if anything was lost or leaks."""
    with reported():
        run = Soak(seed=seed_of(seed), ranks=ranks)
        with served(model, ranks, run.seed, FLAGS) as (cluster, tell):
            run_soak(cluster, run, kills, streams, tell)
        if history is not None:
            save(history, run.history, run.oracle)
        receipt = judge(run, kills)
        _print(receipt, f"{receipt.kills} kills", output)


def churn(
    changes: Annotated[int, typer.Option(min=1, help="Scales, drains and undrains.")] = 1000,
    seed: SeedFlag = None,
    ranks: RanksFlag = 4,
    most: Annotated[int, typer.Option(min=2, help="Never more ranks than these.")] = 6,
    streams: StreamsFlag = 8,
    model: ModelFlag = None,
    history: HistoryFlag = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Change size and ranks at random under load, some changes cancelled. Exit 1 if anything was lost or leaks."""
    with reported():
        run = Churn(seed=seed_of(seed), ranks=ranks, most=most)
        with served(model, ranks, run.seed) as (cluster, tell):
            run_churn(cluster, run, changes, streams, tell)
        if history is not None:
            save(history, run.history, run.oracle)
        receipt = judge_churn(run, changes)
        _print(receipt, f"{receipt.changes} changes", output)


@contextmanager
def served(
    model: Path | None, ranks: int, seed: int, flags: Sequence[str] = ()
) -> Iterator[tuple[ServedCluster, Tell]]:
    """A cluster of its own, and how to tell people on stderr what goes on."""
    with tempfile.TemporaryDirectory(prefix="elastic-ep-chaos-") as folder:
        path = model or Path(folder) / "demo-moe"
        if model is None:
            from elastic.demo_model import write_demo_model

            write_demo_model(path)
        typer.echo(f"seed {seed}", err=True)
        started = time.monotonic()

        def tell(step: str) -> None:
            typer.echo(f"{time.monotonic() - started:6.1f} s  {step}", err=True)

        with ServedCluster(path, ranks, state_dir=Path(folder) / "state", flags=flags) as cluster:
            yield cluster, tell


def _print(receipt: SoakReceipt | ChurnReceipt, done: str, output: Output) -> None:
    """Say what came of it; exit 1 if a promise broke."""
    if output is Output.TEXT:
        typer.echo(f"{'every promise held' if receipt.ok else 'a promise broke'}: {done}, "
                   f"{receipt.requests} requests, {receipt.lost} lost, {receipt.duplicated} duplicated, "
                   f"{receipt.altered} altered")  # fmt: skip
        for line in receipt.broken:
            typer.echo(f"  - {line}")
    write_json(receipt)
    raise typer.Exit(0 if receipt.ok else 1)
