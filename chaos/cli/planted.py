"""`elastic-chaos planted` (or `mutants`): copies of the product without one guard each; tests must notice every one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from chaos.cli.shared import finish
from elastic.cli.command import command
from elastic.cli.flags import Output, OutputFlag
from membership.base.errors import ConfigError

if TYPE_CHECKING:
    from chaos.mutants.hunt import Hunted

ROW = "{:<32} {:<9} {:<8} {:>6} {:>8}  {}"
JOBS = 1 + (os.cpu_count() or 1)  # some wait for what their mutant never does, until a deadline
DEAREST = 5  # mutants whose time is worth a look


@command
def planted(
    only: Annotated[list[str] | None, typer.Option(help="Only this mutant. May be repeated.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Number of processes.")] = JOBS,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Remove one guard at a time from copies of the product. Exit 1 unless tests or simulation catch every mutant.

    The tests that a mutant names must fail on it and pass without it. Needs a checkout: the wheel contains no tests.
    """
    from chaos.mutants.catalogue import MUTANTS
    from chaos.mutants.hunt import hunt

    unknown = set(only or ()) - {mutant.name for mutant in MUTANTS}
    if unknown:
        raise ConfigError(f"no planted bug {sorted(unknown)}", hint="elastic-chaos planted shows all of them")
    mutants = [mutant for mutant in MUTANTS if not only or mutant.name in only]
    if output is Output.TEXT:
        typer.echo(ROW.format("mutant", "caught by", "after", "events", "cpu s", "what it takes away"))
    receipt = hunt(mutants, jobs, _row if output is Output.TEXT else _missed)
    shown = [f"control failed, so that no catch means anything: {broken}" for broken in receipt.control]
    shortest = f", median of {receipt.median_events:g} events" if receipt.median_events is not None else ""
    dearest = sorted(receipt.bugs, key=lambda found: found.cpu_s, reverse=True)[:DEAREST]
    shown.append(f"most of the processor: {', '.join(f'{found.bug} {found.cpu_s:.1f} s' for found in dearest)}")
    took = f"{receipt.seconds:g} s, {receipt.cpu_s:g} s of processors"
    shown.append(f"{receipt.caught} of {receipt.planted} mutants caught{shortest}, {took}")
    finish(receipt.ok, receipt, shown, output)


def _missed(found: Hunted) -> None:
    if not found.caught:
        typer.echo(f"{found.bug} is not caught by {found.caught_by}: {found.how or 'nothing broke'}", err=True)


def _row(found: Hunted) -> None:
    by = "NOT CAUGHT" if not found.caught else "simulate" if found.lives else "tests"
    after, events = f"{found.lives} runs" if found.lives else "", "" if found.events is None else found.events
    typer.echo(ROW.format(found.bug, by, after, events, f"{found.cpu_s:.1f}", found.guards))
    if not found.caught:
        typer.echo(f"    {found.caught_by}: {found.how or 'nothing broke'}")
