"""`elastic-chaos simulate`: whole lives of a cluster under a virtual clock."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from chaos.endurance import seed_of
from elastic.options import Output, OutputFlag, write_json


def simulate(
    faults: Annotated[int, typer.Option(min=1, help="Until there were so many.")] = 20_000,
    seed: Annotated[int | None, typer.Option(help="The first life's; the next ones follow.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
    replay: Annotated[bool, typer.Option("--replay", help="Only the life of --seed; tell what happens.")] = False,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Live whole lives of a cluster under a virtual clock, with faults of all kinds. Exit 1 if a promise breaks."""
    from chaos.simulation.life import live
    from chaos.simulation.swarm import simulate

    first = seed_of(seed)
    if replay:
        life = live(first, lambda line: typer.echo(line, err=True))
        write_json(life)
        raise typer.Exit(1 if life.violation else 0)
    typer.echo(f"seed {first}", err=True)
    receipt = simulate(first, faults, jobs, lambda lives, made: typer.echo(f"{lives} lives, {made} faults", err=True))
    if output is Output.TEXT:
        for broken, how in receipt.violations:
            typer.echo(f"  - {how}\n    again: elastic-chaos simulate --replay --seed {broken}")
    write_json(receipt)
    raise typer.Exit(0 if receipt.ok else 1)
