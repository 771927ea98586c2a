"""`elastic-chaos planted`: take one guard after the other out of a copy of the product, and see that it is noticed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from elastic.cli.flags import Output, OutputFlag, reported, write_json
from membership.base.errors import ConfigError

if TYPE_CHECKING:
    from chaos.mutants.hunt import Hunted

ROW = "{:<25} {:<22} {:<12} {:>6}  {}"


def planted(
    only: Annotated[list[str] | None, typer.Option(help="Only this bug; may be given more than once.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Plant bugs in copies of the product, each without one guard. Exit 1 if any is not caught."""
    from chaos.mutants.bugs import BUGS
    from chaos.mutants.hunt import hunt

    with reported():
        unknown = set(only or ()) - {bug.name for bug in BUGS}
        if unknown:
            raise ConfigError(f"no planted bug {sorted(unknown)}", hint="elastic-chaos planted shows all of them")
        bugs = [bug for bug in BUGS if not only or bug.name in only]
        if output is Output.TEXT:
            typer.echo(ROW.format("bug", "caught by", "after", "events", "what it takes away"))
        receipt = hunt(bugs, jobs, _row if output is Output.TEXT else lambda found: None)
        if output is Output.JSON:
            write_json(receipt)
        else:
            for broken in receipt.control:
                typer.echo(f"control failed, so that no catch means anything: {broken}")
            shortest = f", median of {receipt.median_events:g} events" if receipt.median_events is not None else ""
            typer.echo(f"{receipt.caught} of {receipt.planted} planted bugs caught{shortest}, {receipt.seconds:g} s")
        raise typer.Exit(0 if receipt.ok else 1)


def _row(found: Hunted) -> None:
    by = found.caught_by if found.caught else "NOT CAUGHT"
    after = f"{found.lives} lives" if found.lives else f"{found.seconds:.1f} s"
    typer.echo(ROW.format(found.bug, by, after, "" if found.events is None else found.events, found.guards))
    if not found.caught and found.how:
        typer.echo(f"    {found.how}")
