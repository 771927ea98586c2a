"""`elastic-chaos run` and `scenarios`: run a written scenario, on a cluster of its own or on a running deployment."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from chaos.campaigns.campaign import START_S, Notify
from chaos.campaigns.own_cluster import own_cluster, unable_here
from chaos.campaigns.scenario_run import ScenarioRun
from chaos.campaigns.targets import LocalTarget, RemoteTarget, Target
from chaos.cli.shared import RunOptions, device_flags, progress, save_record, show_receipt
from chaos.faults.catalogue import FAULTS
from chaos.scenarios.blast_radius import HARMLESS, Limits, unfit
from chaos.scenarios.dry_run import DryRun, Expected
from chaos.scenarios.dry_run import dry_run as plan
from chaos.scenarios.reading import find, library
from chaos.scenarios.script import Inject
from chaos.target.cluster import Cluster, ServedCluster
from elastic.cli.client import AdminClient
from elastic.cli.command import command
from elastic.cli.connection import AdminConnection
from elastic.cli.flags import Output, OutputFlag, interruptible, write_json
from elastic.serve.options import option
from elastic.serve.state_dir import StateDir
from elastic.serve.tokens import http_url
from membership.base.errors import ConfigError, PlanRefused


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """The running deployment to inject faults into, and how far they may go there."""

    target: str = option("", "Run on the deployment at this URL, not on a new one.")
    max_ranks_down: int = option(1, "Target: never more ranks down at a time.", minimum=0)
    allow_uncovered: bool = option(False, "Target: experts may lose their last live replica for a while.")
    only_roles: str = option(",".join(HARMLESS), "Target: roles that may have faults (comma-separated).")
    max_unready_s: float = option(10.0, "Target: stop if it is not ready for longer.")
    max_seconds: float = option(600.0, "Target: stop after this time.", minimum=1)
    yes: bool = option(False, "Target: do not ask before each fault.", names=("--yes",))

    def limits(self) -> Limits:
        """How far faults may go. ConfigError if there is no such role."""
        return Limits(
            max_ranks_down=self.max_ranks_down, allow_uncovered=self.allow_uncovered,
            max_unready_s=self.max_unready_s, max_seconds=self.max_seconds, only_roles=_roles(self.only_roles),
        )  # fmt: skip


@command
def scenarios(output: OutputFlag = Output.TEXT) -> None:
    """The scenarios that there are."""
    for scenario in library():
        faults = list(dict.fromkeys(fault.fault for fault in scenario.faults))
        if output is Output.JSON:
            write_json({"name": scenario.name, "about": scenario.about, "faults": faults, "seed": scenario.seed})
        else:
            typer.echo(f"{scenario.name:26} {scenario.about}")


@command
def run(
    connection: AdminConnection,
    there: TargetOptions,
    scenario: Annotated[str, typer.Argument(help="A name (see: elastic-chaos scenarios), or a .yaml file.")],
    options: RunOptions,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show: exit 0 nothing to do, 2 something, 1 refused.")
    ] = False,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Run a scenario under load and check what clients saw. Exit 1 if a promise broke. Ctrl-C takes faults back."""
    wanted, record = find(scenario), options.record
    seed = wanted.seed if options.seed is None else options.seed
    played = ScenarioRun(scenario=wanted, seed=seed, watched=record is not None)
    played.replay = f"elastic-chaos run {scenario} --seed {played.seed}"
    if not there.target:
        flags = device_flags(options.device)
        played.replay += "".join(f" {flag}" for flag in flags)
        _run_own(played, partial(own_cluster, wanted, options.model, flags), dry_run, record, output)
        return
    options.refuse_device("--target")
    played.limits = there.limits()
    with _target(there.target, connection) as target:
        _run_there(played, target, dry_run, there.yes, record, output)


def _run_own(
    played: ScenarioRun,
    served: Callable[[], AbstractContextManager[ServedCluster]],
    dry_run: bool,
    record: Path | None,
    output: Output,
) -> None:
    """On a cluster of its own."""
    ranks = played.scenario.cluster.ranks
    _plan(played, Expected(list(range(ranks)), unable=unable_here), dry_run, output)
    notify = _announce(played)
    with served() as cluster:
        cluster.wait_serving(ranks, START_S, notify=notify)
        _finish(played, LocalTarget(cluster), notify, record, output)


def _run_there(
    played: ScenarioRun, target: Target, dry_run: bool, yes: bool, record: Path | None, output: Output
) -> None:
    """On a running deployment, if it is fit for it and every step is within the limits."""
    if why := unfit(target.client.status()):
        raise PlanRefused(f"nothing was done to {target.url}: {why}")
    view = target.client.view()

    def unable(step: Inject, victim: str) -> str:
        return target.unable(step.fault, victim, step.needs)

    expected = Expected(list(view.ranks), placement=view.placement, limits=played.limits, unable=unable)
    _plan(played, expected, dry_run, output)
    if not yes and not sys.stdin.isatty():
        raise ConfigError("no terminal to ask before each fault", hint="say --yes, or look first: --dry-run")
    played.confirm = lambda action: yes or typer.confirm(f"{action} on {target.url}?", err=True)
    _finish(played, target, _announce(played), record, output)


def _finish(played: ScenarioRun, target: Target, notify: Notify, record: Path | None, output: Output) -> NoReturn:
    """Run, check, print; exit 1 if a promise broke."""
    with interruptible(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as played.stop:
        played.run(target, notify)
    save_record(played, record)
    show_receipt(played.receipt(), f"{played.scenario.name}, {len(played.injected)} faults", output)


def _announce(played: ScenarioRun) -> Notify:
    """Report what runs, and from now on its progress."""
    notify = progress()
    notify(f"{played.scenario.name}, seed {played.seed}: {played.scenario.about}")
    return notify


def _plan(played: ScenarioRun, expected: Expected, show: bool, output: Output) -> None:
    """Do a dry run. If it is to be shown, show it and exit; PlanRefused if a step is refused."""
    planned = plan(played.scenario, played.seed, expected)
    if show:
        _show(planned, output)
    if planned.refused:
        first, more = planned.refused[0], len(planned.refused) - 1
        others = f"; so are {more} more steps: see --dry-run" if more else ""
        raise PlanRefused(f"nothing was done: step {first.step} ({first.does}) is refused: {first.refused}{others}")


def _show(planned: DryRun, output: Output) -> NoReturn:
    """Show what would be done. Exit as `elastic scale --plan` does."""
    if output is Output.JSON:
        write_json(planned)
    else:
        typer.echo(f"{planned.scenario}, seed {planned.seed}")
        for step in planned.steps:
            victims = f" -> {', '.join(step.victims)}" if step.victims else ""
            needs = f" [needs {', '.join(step.needs)}]" if step.needs else ""
            refused = f" REFUSED: {step.refused}" if step.refused else ""
            typer.echo(f"{step.step:>5}  {step.does}{victims}{needs}{refused}")
    raise typer.Exit(1 if planned.refused else 2 if planned.changes else 0)


def _roles(text: str) -> tuple[str, ...]:
    """Roles, and the other victims of the catalogue's faults."""
    known = {victim for fault in FAULTS.values() for victim in fault.victims}
    named = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := [name for name in named if name not in known]:
        raise ConfigError(f"--only-roles: there is no {unknown[0]!r}", hint=f"there are {', '.join(sorted(known))}")
    return named


@contextmanager
def _target(url: str, connection: AdminConnection) -> Iterator[Target]:
    """The deployment at `url`, through its state directory if it is on this machine, else through its admin API."""
    url = http_url(url, "--target").rstrip("/")
    if connection.state_dir is not None:
        cluster = Cluster(StateDir(connection.state_dir))
        if cluster.url.rstrip("/") != url:
            raise ConfigError(f"the cluster in {connection.state_dir} is served at {cluster.url}, not at {url}")
        target: Target = LocalTarget(cluster)
    elif connection.admin:
        target = RemoteTarget(url, AdminClient(connection.admin, connection.admin_token))
    else:
        raise ConfigError(
            "a target needs a way to inject faults",
            hint="give --state-dir (this machine) or --admin and --token",
        )
    with closing(target):
        yield target
