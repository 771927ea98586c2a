"""`elastic-chaos run` and `scenarios`: play a written scenario, on a cluster of its own or on a running deployment."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from chaos.campaigns.endurance import Tell
from chaos.campaigns.run import Player
from chaos.cli.endurance import ModelFlag
from chaos.faults.catalogue import FAULTS
from chaos.scenarios.bed import bed, unable_here
from chaos.scenarios.blast_radius import HARMLESS, Limits, unfit
from chaos.scenarios.dry_run import Rehearsal, Scene, rehearse
from chaos.scenarios.keeping import keeping
from chaos.scenarios.reading import find, library
from chaos.scenarios.verdict import Played, RunReceipt, receipt
from chaos.target.cluster import Cluster
from chaos.target.stage import LocalStage, RemoteStage, Stage
from elastic.cli.client import AdminClient
from elastic.cli.command import command
from elastic.cli.connection import AdminConnection
from elastic.cli.flags import Output, OutputFlag, interruptible, reported, seconds, write_json
from elastic.serve.state_dir import StateDir
from membership.base.errors import ConfigError, PlanRefused

TargetFlag = Annotated[
    str | None, typer.Option("--target", help="Play on the deployment at this URL, not on a new one.")
]
DownFlag = Annotated[int, typer.Option("--max-ranks-down", min=0, help="Target: never more ranks down at a time.")]
UncoveredFlag = Annotated[
    bool, typer.Option("--allow-uncovered", help="Target: experts may lose their last live replica for a while.")
]
RolesFlag = Annotated[str, typer.Option("--only-roles", help="Target: strike nobody else (comma-separated).")]
UnreadyFlag = Annotated[str, typer.Option("--max-unready", help="Target: stop if it is not ready for longer.")]
BudgetFlag = Annotated[float, typer.Option("--max-seconds", min=1, help="Target: stop after this time.")]

DEFAULT_ROLES = ",".join(HARMLESS)


def scenarios(output: OutputFlag = Output.TEXT) -> None:
    """The scenarios that there are."""
    with reported():
        for scenario in library():
            faults = list(dict.fromkeys(blow.fault for blow in scenario.blows))
            if output is Output.JSON:
                write_json({"name": scenario.name, "about": scenario.about, "faults": faults, "seed": scenario.seed})
            else:
                typer.echo(f"{scenario.name:26} {scenario.about}")


@command
def run(
    connection: AdminConnection,
    scenario: Annotated[str, typer.Argument(help="A name (see: elastic-chaos scenarios), or a .yaml file.")],
    seed: Annotated[int | None, typer.Option(help="Makes the random choices; default: the scenario's.")] = None,
    record: Annotated[Path | None, typer.Option(help="Save all that was seen, for elastic-chaos check.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show: exit 0 nothing to do, 2 something, 1 refused.")
    ] = False,
    model: ModelFlag = None,
    target: TargetFlag = None,
    max_ranks_down: DownFlag = 1,
    allow_uncovered: UncoveredFlag = False,
    only_roles: RolesFlag = DEFAULT_ROLES,
    max_unready: UnreadyFlag = "10s",
    max_seconds: BudgetFlag = 600.0,
    yes: Annotated[bool, typer.Option("--yes", help="Target: do not ask before each fault.")] = False,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Play a scenario under load and judge what clients saw. Exit 1 if a promise broke. Ctrl-C takes faults back."""
    wanted = find(scenario)
    played = Played(wanted, wanted.seed if seed is None else seed)
    played.replay = f"elastic-chaos run {scenario} --seed {played.seed}"
    if target is None:
        _play_own(played, model, dry_run, record, output)
        return
    limits = Limits(
        max_ranks_down=max_ranks_down, allow_uncovered=allow_uncovered, max_unready_s=seconds(max_unready),
        max_seconds=max_seconds, only_roles=_roles(only_roles),
    )  # fmt: skip
    with _target(target, connection) as stage:
        _play_there(played, stage, limits, dry_run, yes, record, output)


def _play_own(played: Played, model: Path | None, dry_run: bool, record: Path | None, output: Output) -> None:
    """On a cluster of its own."""
    scenario = played.scenario
    ranks, tell = scenario.cluster.ranks, _teller()
    rehearsal = rehearse(scenario, played.seed, Scene(list(range(ranks)), unable=unable_here))
    if dry_run:
        _show(rehearsal, output)
    _require_accepted(rehearsal)
    tell(f"{scenario.name}, seed {played.seed}: {scenario.about}")
    with bed(scenario, model) as cluster:
        cluster.wait_serving(ranks, tell=tell)
        _finish(played, LocalStage(cluster), tell, record, output)


def _play_there(
    played: Played, stage: Stage, limits: Limits, dry_run: bool, yes: bool, record: Path | None, output: Output
) -> None:
    """On a running deployment, if it is fit for it and every step is within the limits."""
    if why := unfit(stage.client.status()):
        raise PlanRefused(f"nothing was done to {stage.url}: {why}")
    view = stage.client.view()
    scene = Scene(list(view.ranks), placement=view.placement, limits=limits, unable=stage.unable)
    rehearsal = rehearse(played.scenario, played.seed, scene)
    if dry_run:
        _show(rehearsal, output)
    _require_accepted(rehearsal)
    if not yes and not sys.stdin.isatty():
        raise ConfigError("nobody is here to be asked before each fault", hint="say --yes, or look first: --dry-run")
    tell = _teller()

    def confirm(deed: str) -> bool:
        return yes or typer.confirm(f"{deed} on {stage.url}?", err=True)

    tell(f"{played.scenario.name}, seed {played.seed}: {played.scenario.about}")
    _finish(played, stage, tell, record, output, limits, confirm)


def _finish(
    played: Played, stage: Stage, tell: Tell, record: Path | None, output: Output,
    limits: Limits | None = None, confirm: Callable[[str], bool] = lambda deed: True,
) -> None:  # fmt: skip
    """Play, judge, print; exit 1 if a promise broke."""
    asked = interruptible(signal.SIGINT, signal.SIGTERM)
    with asked as stop, keeping(stage, played, recorded=record is not None) as keeper:
        Player(played, stage, keeper, tell=tell, stop=stop, limits=limits, confirm=confirm).play()
        outcome = receipt(played)
        keeper.verified("G3", not outcome.lost + outcome.duplicated + outcome.altered, _counts(outcome))
        keeper.verified("G6", not played.troubles, "; ".join(played.troubles) or "whole in the end")
    if record is not None:
        keeper.write(record)
    if output is Output.TEXT:
        faults = sum(outcome.faults.values())
        typer.echo(f"{'every promise held' if outcome.ok else 'a promise broke'}: {played.scenario.name}, "
                   f"{faults} faults, {_counts(outcome)}")  # fmt: skip
        for line in outcome.broken:
            typer.echo(f"  - {line}")
    write_json(outcome)
    raise typer.Exit(0 if outcome.ok else 1)


def _counts(outcome: RunReceipt) -> str:
    kinds = {"lost": outcome.lost, "duplicated": outcome.duplicated, "altered": outcome.altered}
    told = (f"{count} {kind}" for kind, count in {**kinds, "refused": outcome.non_2xx}.items())
    return ", ".join((f"{outcome.requests} requests", *told))


def _teller() -> Tell:
    """How to say on stderr what goes on."""
    started = time.monotonic()
    return lambda step: typer.echo(f"{time.monotonic() - started:6.1f} s  {step}", err=True)


def _require_accepted(rehearsal: Rehearsal) -> None:
    if rehearsal.refused:
        first, more = rehearsal.refused[0], len(rehearsal.refused) - 1
        others = f"; so are {more} more steps: see --dry-run" if more else ""
        raise PlanRefused(f"nothing was done: step {first.step} ({first.does}) is refused: {first.refused}{others}")


def _show(rehearsal: Rehearsal, output: Output) -> NoReturn:
    """Show what would be done. Exit as `elastic scale --plan` does."""
    if output is Output.JSON:
        write_json(rehearsal)
    else:
        typer.echo(f"{rehearsal.scenario}, seed {rehearsal.seed}")
        for step in rehearsal.steps:
            victims = f" -> {', '.join(step.victims)}" if step.victims else ""
            needs = f" [needs {', '.join(step.needs)}]" if step.needs else ""
            refused = f" REFUSED: {step.refused}" if step.refused else ""
            typer.echo(f"{step.step:>5}  {step.does}{victims}{needs}{refused}")
    raise typer.Exit(1 if rehearsal.refused else 2 if rehearsal.changes else 0)


def _roles(text: str) -> tuple[str, ...]:
    """Roles, and what else the catalogue's faults befall."""
    known = {victim for fault in FAULTS.values() for victim in fault.victims}
    named = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := [name for name in named if name not in known]:
        raise ConfigError(f"--only-roles: there is no {unknown[0]!r}", hint=f"there are {', '.join(sorted(known))}")
    return named


@contextmanager
def _target(url: str, connection: AdminConnection) -> Iterator[Stage]:
    """The deployment at `url`, through its state directory if it is on this machine, else through its admin API."""
    url = url.rstrip("/")
    if connection.state_dir is not None:
        cluster = Cluster(StateDir(connection.state_dir))
        if cluster.url.rstrip("/") != url:
            raise ConfigError(f"the cluster in {connection.state_dir} is served at {cluster.url}, not at {url}")
        stage: Stage = LocalStage(cluster)
    elif connection.admin:
        stage = RemoteStage(url, AdminClient(connection.admin, connection.admin_token))
    else:
        raise ConfigError(
            "a target needs a way to be looked at and struck",
            hint="give --state-dir (this machine) or --admin and --token",
        )
    with closing(stage):
        yield stage
