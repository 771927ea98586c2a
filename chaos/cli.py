"""The `elastic-chaos` command: the kill-rank scenario, the soak of many kills, and a saved history judged again."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from chaos.cluster import ServedCluster
from chaos.demo import demo
from chaos.history import compare, load, save
from chaos.soak import FLAGS, Soak, SoakReceipt, judge, run_soak, seed_of
from elastic.options import Output, OutputFlag, reported, write_json

app = typer.Typer(
    name="elastic-chaos",
    help="Prove that a killed rank loses, duplicates and alters nothing.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("kill-rank")(demo)


@app.command()
def soak(
    kills: Annotated[int, typer.Option(min=1, help="SIGKILLs, at least.")] = 300,
    seed: Annotated[int | None, typer.Option(help="Chooses victims, moments and the sampled requests.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to serve with.")] = 4,
    streams: Annotated[int, typer.Option(min=1, help="Requests under way at a time.")] = 8,
    model: Annotated[Path | None, typer.Option(help="Serve this checkpoint instead of the shipped one.")] = None,
    history: Annotated[
        Path | None, typer.Option(help="Also save what the clients saw, for elastic-chaos check.")
    ] = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Kill random ranks at random moments under load, nested deaths too. Exit 1 if anything was lost or leaks."""
    with reported(), tempfile.TemporaryDirectory(prefix="elastic-ep-soak-") as folder:
        path = model or Path(folder) / "demo-moe"
        if model is None:
            from elastic.demo_model import write_demo_model

            write_demo_model(path)
        run = Soak(seed=seed_of(seed), ranks=ranks)
        typer.echo(f"seed {run.seed}", err=True)
        started = time.monotonic()
        with ServedCluster(path, ranks, state_dir=Path(folder) / "state", flags=FLAGS) as cluster:
            run_soak(
                cluster, run, kills, streams,
                lambda step: typer.echo(f"{time.monotonic() - started:6.1f} s  {step}", err=True),
            )  # fmt: skip
        if history is not None:
            save(history, run.history, run.oracle)
        receipt = judge(run, kills)
        _print(receipt, output)
        raise typer.Exit(0 if receipt.ok else 1)


def _print(receipt: SoakReceipt, output: Output) -> None:
    if output is Output.TEXT:
        typer.echo(f"{'every promise held' if receipt.ok else 'a promise broke'}: {receipt.kills} kills, "
                   f"{receipt.requests} requests, {receipt.lost} lost, {receipt.duplicated} duplicated, "
                   f"{receipt.altered} altered")  # fmt: skip
        for line in receipt.broken:
            typer.echo(f"  - {line}")
    write_json(receipt)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="A history saved with --history.")], output: OutputFlag = Output.TEXT
) -> None:
    """Compare a saved history with its oracle again. Exit 1 if anything differs."""
    with reported():
        saved = load(file)
        verdict = compare(saved.history, saved.oracle)
        if output is Output.JSON:
            write_json(verdict)
        else:
            for found in verdict.differences:
                typer.echo(f"request {found.prompt} {found.kind}: {found.explanation}")
            typer.echo(f"{verdict.requests} requests, {len(verdict.differences)} differences")
        raise typer.Exit(0 if verdict.ok else 1)


def main() -> None:
    """Entry point of the `elastic-chaos` script."""
    app()
