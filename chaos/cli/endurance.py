"""`elastic-chaos soak` and `churn`: many kills, many changes, on real processes under load."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from chaos.campaigns.churn import Churn, ChurnReceipt, run_churn
from chaos.campaigns.churn import judge as judge_churn
from chaos.campaigns.endurance import Tell, seed_of
from chaos.campaigns.soak import FLAGS, Soak, SoakReceipt, judge, run_soak
from chaos.campaigns.strikes import Dose
from chaos.target.cluster import ServedCluster
from elastic.cli.flags import Output, OutputFlag, reported, write_json

SeedFlag = Annotated[int | None, typer.Option(help="Chooses what happens, and the sampled requests.")]
RanksFlag = Annotated[int, typer.Option(min=1, help="Ranks to serve with.")]
StreamsFlag = Annotated[int, typer.Option(min=1, help="Requests under way at a time.")]
ModelFlag = Annotated[Path | None, typer.Option(help="Serve this checkpoint instead of the shipped one.")]
RecordFlag = Annotated[Path | None, typer.Option(help="Also save all that happened, for check and report.")]


def soak(
    kills: Annotated[int, typer.Option(min=1, help="SIGKILLs of ranks, at least.")] = 300,
    zombies: Annotated[
        int | None, typer.Option(min=0, help="Ranks stopped until given up. [default: by --kills]")
    ] = None,
    outages: Annotated[
        int | None, typer.Option(min=0, help="Freezes and restarts of etcd. [default: by --kills]")
    ] = None,
    requests: Annotated[int | None, typer.Option(min=0, help="Requests that must end.  [50 per kill]")] = None,
    minutes: Annotated[float, typer.Option(min=0.0, help="Go on for so long, instead of so many faults.")] = 0.0,
    seed: SeedFlag = None,
    ranks: RanksFlag = 4,
    streams: StreamsFlag = 24,
    model: ModelFlag = None,
    record: RecordFlag = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Strike ranks, roles and etcd at random moments under load, nested too. Exit 1 if anything was lost or leaks."""
    with reported():
        given = {"zombies": zombies, "outages": outages, "requests": requests}
        dose = msgspec.structs.replace(Dose.of(kills), **{k: v for k, v in given.items() if v is not None})
        chosen = seed_of(seed)
        exactly = f"--kills {kills} --zombies {dose.zombies} --outages {dose.outages} --requests {dose.requests}"
        again = f"elastic-chaos soak {f'--minutes {minutes:g}' if minutes else exactly} --ranks {ranks}"
        run = Soak(seed=chosen, ranks=ranks, minutes=minutes, replay=f"{again} --streams {streams} --seed {chosen}")
        with served(model, ranks, FLAGS, seed=run.seed) as (cluster, tell):
            run_soak(cluster, run, dose, streams, tell)
        if record is not None and run.recorder is not None:
            run.recorder.write(record)
        receipt = judge(run, dose)
        done = f"{receipt.kills} kills, {receipt.zombies} zombies, {receipt.outages} outages, {receipt.roles} roles"
        _print(receipt, done, output)


def churn(
    changes: Annotated[int, typer.Option(min=1, help="Scales, drains and undrains.")] = 1000,
    seed: SeedFlag = None,
    ranks: RanksFlag = 4,
    most: Annotated[int, typer.Option(min=2, help="Never more ranks than these.")] = 6,
    streams: StreamsFlag = 8,
    model: ModelFlag = None,
    record: RecordFlag = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Change size and ranks at random under load, some changes cancelled. Exit 1 if anything was lost or leaks."""
    with reported():
        chosen = seed_of(seed)
        again = f"elastic-chaos churn --changes {changes} --ranks {ranks} --most {most} --seed {chosen}"
        run = Churn(seed=chosen, ranks=ranks, most=most, replay=again)
        with served(model, ranks, seed=run.seed) as (cluster, tell):
            run_churn(cluster, run, changes, streams, tell)
        if record is not None and run.recorder is not None:
            run.recorder.write(record)
        receipt = judge_churn(run, changes)
        _print(receipt, f"{receipt.changes} changes", output)


@contextmanager
def served(
    model: Path | None, ranks: int, flags: Sequence[str] = (), *, seed: int | None = None
) -> Iterator[tuple[ServedCluster, Tell]]:
    """A cluster of its own, and how to tell people on stderr what goes on."""
    with tempfile.TemporaryDirectory(prefix="elastic-ep-chaos-") as folder:
        path = model or Path(folder) / "demo-moe"
        if model is None:
            from elastic.demo.model import write_demo_model

            write_demo_model(path)
        if seed is not None:
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
