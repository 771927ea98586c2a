"""`elastic-chaos suite`: all of it, and one table. `make chaos` runs this."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from chaos.campaigns.campaign import seed_of
from chaos.campaigns.suite import SuiteReceipt, run_suite
from chaos.campaigns.suite_parts import Dose, parts
from chaos.cli.shared import progress
from elastic.cli.command import command
from elastic.cli.flags import Output, OutputFlag, write_json
from elastic.cli.render import console
from membership.base.errors import ConfigError


@command
def suite(
    only: Annotated[list[str] | None, typer.Option(help="Only these parts.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all that is drawn.")] = None,
    out: Annotated[Path, typer.Option(help="Where receipts, logs and the record go.")] = Path("chaos-report"),
    share: Annotated[
        int, typer.Option(min=1, help="Simulate a third (3), a sixth (6) … of the faults; soak a third at least.")
    ] = 1,
    pace: Annotated[bool, typer.Option(help="Also check how fast the simulation is: needs two idle cores.")] = True,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Everything that proves the promises, part by part, and one table of it. Exit 1 if any goal was missed."""
    chosen = seed_of(seed)
    out.mkdir(parents=True, exist_ok=True)
    stages = parts(chosen, out, pace, Dose(share))
    names = [part.name for stage in stages for part in stage]
    for name in only or ():
        if name not in names:
            raise ConfigError(f"there is no part {name!r}", hint=f"there are {', '.join(names)}")
    typer.echo(f"seed {chosen}", err=True)
    wanted = [[part for part in stage if part.name in (only or names)] for stage in stages]
    receipt = run_suite(wanted, chosen, out, progress())
    if output is Output.JSON:
        write_json(receipt)
    else:
        show(receipt, console())
    raise typer.Exit(0 if receipt.ok else 1)


def show(receipt: SuiteReceipt, console: Console) -> None:
    """The table: a line per goal, and what a part that failed has said."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("part", "what", "must be", "is", ""):
        table.add_column(name, justify="right" if name in ("must be", "is") else "left")
    for part in receipt.parts:
        title = f"{part.name} ({part.seconds:.0f} s)"
        for goal in part.goals:
            end = Text("held", "green") if goal.ok else Text("MISSED", "red")
            table.add_row(title, goal.what, goal.wanted, goal.reached, end)
            title = ""
        if not part.ok:
            table.add_row(title, Text(part.said or "it failed", "red"))
    console.print(table)
    verdict = ("every promise held", "green") if receipt.ok else ("the suite failed", "red")
    again = f" in {receipt.seconds / 60:.1f} minutes; again: make chaos SEED={receipt.seed}"
    console.print(Text.assemble("\n", verdict, again))
