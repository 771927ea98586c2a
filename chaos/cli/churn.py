"""`elastic-chaos churn`: hundreds of planned changes under load."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from chaos.campaigns.campaign import seed_of
from chaos.campaigns.churn import LOAD, Churn
from chaos.campaigns.targets import LocalTarget
from chaos.cli.shared import ModelFlag, RanksFlag, RecordFlag, SeedFlag, StreamsFlag, save_record, served, show_receipt
from elastic.cli.command import command
from elastic.cli.flags import Output, OutputFlag


@command
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
    """Change size and ranks at random under load, some changes cancelled. Exit 1 if a promise broke."""
    load = msgspec.structs.replace(LOAD, streams=streams)
    run = Churn(seed=seed_of(seed), ranks=ranks, changes=changes, most=most, load=load)
    run.replay = f"elastic-chaos churn --changes {changes} --ranks {ranks} --most {most} --seed {run.seed}"
    with served(model, ranks, seed=run.seed) as (cluster, notify):
        run.run(LocalTarget(cluster), notify)
    save_record(run, record)
    receipt = run.receipt()
    show_receipt(receipt, f"{receipt.changes} changes", output)
