"""`elastic-chaos soak`: hundreds of faults on real processes under load."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from chaos.campaigns.bursts import Quota
from chaos.campaigns.campaign import seed_of
from chaos.campaigns.soak import FLAGS, LOAD, Soak
from chaos.campaigns.targets import LocalTarget
from chaos.cli.shared import ModelFlag, RanksFlag, RecordFlag, SeedFlag, StreamsFlag, save_record, served, show_receipt
from elastic.cli.command import command
from elastic.cli.flags import Output, OutputFlag

MAYBE = "[default: by --kills]"


@command
def soak(
    kills: Annotated[int, typer.Option(min=1, help="SIGKILLs of ranks, at least.")] = 300,
    zombies: Annotated[int | None, typer.Option(min=0, help=f"Ranks stopped until given up. {MAYBE}")] = None,
    outages: Annotated[int | None, typer.Option(min=0, help=f"Freezes and restarts of etcd. {MAYBE}")] = None,
    requests: Annotated[int | None, typer.Option(min=0, help="Requests that must end.  [50 per kill]")] = None,
    minutes: Annotated[float, typer.Option(min=0.0, help="Run this long, instead of a number of faults.")] = 0.0,
    seed: SeedFlag = None,
    ranks: RanksFlag = 4,
    streams: StreamsFlag = 24,
    model: ModelFlag = None,
    record: RecordFlag = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Inject faults into ranks, roles and etcd at random moments under load, nested too. Exit 1 if a promise broke."""
    given = {"zombies": zombies, "outages": outages, "requests": requests}
    quota = msgspec.structs.replace(Quota.of(kills), **{k: v for k, v in given.items() if v is not None})
    exactly = f"--kills {kills} --zombies {quota.zombies} --outages {quota.outages} --requests {quota.requests}"
    run = Soak(
        seed=seed_of(seed),
        ranks=ranks,
        quota=quota,
        minutes=minutes,
        load=msgspec.structs.replace(LOAD, streams=streams),
    )
    again = f"elastic-chaos soak {f'--minutes {minutes:g}' if minutes else exactly} --ranks {ranks}"
    run.replay = f"{again} --streams {streams} --seed {run.seed}"
    with served(model, ranks, FLAGS, seed=run.seed) as (cluster, notify):
        run.run(LocalTarget(cluster), notify)
    save_record(run, record)
    receipt = run.receipt()
    done = f"{receipt.kills} kills, {receipt.zombies} zombies, {receipt.outages} outages, {receipt.roles} roles"
    show_receipt(receipt, done, output)
