"""`elastic-chaos soak` and `churn`: hundreds of faults, or of planned changes, on real processes under load."""

from __future__ import annotations

import shutil
import string
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from chaos.campaigns.bursts import Quota
from chaos.campaigns.campaign import seed_of
from chaos.campaigns.churn import Churn
from chaos.campaigns.host_soak import HostSoak
from chaos.campaigns.own_hosts import own_hosts
from chaos.campaigns.soak import FLAGS, LOAD, Soak
from chaos.campaigns.targets import LocalTarget
from chaos.cli.shared import (
    RanksFlag,
    RunOptions,
    device_flags,
    progress,
    run_on_own_cluster,
    save_record,
    show_receipt,
)
from chaos.target.checkpoint import checkpoint
from chaos.workload.streams import FULL
from elastic.cli.command import command
from elastic.cli.flags import Output, OutputFlag
from elastic.serve.options import Option, option
from membership.base.errors import ConfigError

StreamsFlag = Annotated[int, Option(help="Requests under way at a time.", minimum=1)]


@dataclass(frozen=True, kw_only=True)
class QuotaOptions:
    """How many faults a soak injects, at least, or how long it takes."""

    kills: int = option(300, "SIGKILLs of ranks, at least.", minimum=1)
    zombies: int | None = option(None, "Ranks stopped until given up. Default: by --kills.", minimum=0)
    outages: int | None = option(None, "Freezes and restarts of etcd. Default: by --kills.", minimum=0)
    requests: int | None = option(None, "Requests that must end. Default: 50 per kill.", minimum=0)
    minutes: float = option(0.0, "Run this long, instead of a number of faults.", minimum=0)

    def quota(self) -> Quota:
        """The usual proportions, unless they were given."""
        given = {"zombies": self.zombies, "outages": self.outages, "requests": self.requests}
        return msgspec.structs.replace(Quota.of(self.kills), **{k: v for k, v in given.items() if v is not None})


@dataclass(frozen=True, kw_only=True)
class HostOptions:
    """A soak over several hosts, and how long it is."""

    hosts: int = option(
        1, "3 or more: over so many network namespaces, whose hosts and links fail, too.", minimum=1, maximum=9
    )
    etcd_on_hosts: bool = option(False, "With --hosts: a member of etcd on each host, instead of one apart.")
    faults: int = option(300, "With --hosts: end after so many faults.", minimum=1)
    seconds: float = option(0.0, "With --hosts: end after this time, however few they were.", minimum=0)
    matrix: bool = option(
        False, "With --hosts: instead, each fault of the network once during a scale-up, a drain and a recovery."
    )

    def __post_init__(self) -> None:
        if self.hosts == 2:
            raise ConfigError(
                "two hosts are too few for --hosts", hint="without one of three, two are left to repair it"
            )


@command
def soak(
    wanted: QuotaOptions,
    over: HostOptions,
    options: RunOptions,
    ranks: RanksFlag = 4,
    streams: StreamsFlag = 24,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Inject faults into ranks, roles and etcd at random moments under load, nested too. Exit 1 if a promise broke."""
    if over.hosts > 1:
        options.refuse_device("--hosts")
        soak_over_hosts(over, options, ranks, output)
        return
    quota, load = wanted.quota(), msgspec.structs.replace(LOAD, streams=streams)
    run = Soak(seed=seed_of(options.seed), ranks=ranks, quota=quota, minutes=wanted.minutes, load=load)
    counts = f"--kills {quota.kills} --zombies {quota.zombies} --outages {quota.outages} --requests {quota.requests}"
    again = f"elastic-chaos soak {f'--minutes {run.minutes:g}' if run.minutes else counts} --ranks {ranks}"
    run.replay = " ".join((again, f"--streams {streams} --seed {run.seed}", *device_flags(options.device)))
    run_on_own_cluster(run, options, FLAGS)
    receipt = run.receipt()
    done = f"{receipt.kills} kills, {receipt.zombies} zombies, {receipt.outages} outages, {receipt.roles} roles"
    show_receipt(receipt, done, output)


def soak_over_hosts(over: HostOptions, options: RunOptions, ranks: int, output: Output) -> None:
    """Hosts, links, roles and ranks fail at random. What it takes of the machine is said if it is not there."""
    names = tuple(string.ascii_lowercase[: over.hosts])
    run = HostSoak(seed=seed_of(options.seed), ranks=ranks, faults=over.faults, limit_s=over.seconds, hosts=names)
    run.matrix = over.matrix
    run.replay = f"elastic-chaos soak --hosts {over.hosts} --faults {over.faults} --ranks {ranks} --seed {run.seed}"
    run.replay += (" --etcd-on-hosts" if over.etcd_on_hosts else "") + (" --matrix" if over.matrix else "")
    typer.echo(f"seed {run.seed}", err=True)
    notify = progress()
    with ExitStack() as opened:
        folder = Path(tempfile.mkdtemp(prefix="elastic-ep-chaos-"))
        opened.callback(clear, folder, run)
        cluster = opened.enter_context(own_hosts(names, folder, etcd_on_hosts=over.etcd_on_hosts))
        run.serve(cluster, checkpoint(options.model, folder))
        run.run(LocalTarget(cluster), notify)
    save_record(run, options.record)
    receipt = run.receipt()
    show_receipt(receipt, f"{receipt.faults} faults on {receipt.hosts} hosts", output)


def clear(folder: Path, run: HostSoak) -> None:
    """Away with it, unless the run broke, or was broken off: hosts' logs say why. An empty one says nothing."""
    held = bool(run.history) and run.receipt().ok
    if held or not any(folder.iterdir()):
        shutil.rmtree(folder)
    else:
        typer.echo(f"kept: {folder}", err=True)


@command
def churn(
    options: RunOptions,
    changes: Annotated[int, Option(help="Scales, drains and undrains.", minimum=1)] = 1000,
    ranks: RanksFlag = 4,
    most: Annotated[int, Option(help="Never more ranks than these.", minimum=2)] = 6,
    streams: StreamsFlag = 8,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Change size and ranks at random under load, some changes cancelled. Exit 1 if a promise broke."""
    load = msgspec.structs.replace(FULL, streams=streams)
    run = Churn(seed=seed_of(options.seed), ranks=ranks, changes=changes, most=most, load=load)
    again = f"elastic-chaos churn --changes {changes} --ranks {ranks} --most {most} --seed {run.seed}"
    run.replay = " ".join((again, *device_flags(options.device)))
    run_on_own_cluster(run, options)
    receipt = run.receipt()
    show_receipt(receipt, f"{receipt.changes} changes", output)
