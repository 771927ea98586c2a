"""`elastic-chaos faults`: what can be dealt, to whom, and what it needs."""

from __future__ import annotations

from typing import Annotated

import typer

from chaos.inject.catalogue import FAULTS, Fault
from elastic.options import Output, OutputFlag, write_json


def faults(
    victim: Annotated[str, typer.Option(help="Only faults that can befall it: engine, rank, etcd, …")] = "",
    output: OutputFlag = Output.TEXT,
) -> None:
    """List the faults that can be dealt, each with whom it befalls."""
    found = {name: fault for name, fault in FAULTS.items() if not victim or fault.fits(victim)}
    if output is Output.JSON:
        write_json([_plain(name, fault) for name, fault in found.items()])
        return
    width = max((len(name) for name in found), default=0)
    for name, fault in found.items():
        typer.echo(f"{name:{width}}  {fault.about}")
        details = [f"befalls {', '.join(fault.victims)}", "heals" if fault.heals else "the product must replace it"]
        if fault.needs:
            details.append(f"needs {', '.join(fault.needs)}")
        if fault.params:
            details.append(" ".join(f"{key}={value}" for key, value in fault.params.items()))
        typer.echo(f"{'':{width}}  {'; '.join(details)}")


def _plain(name: str, fault: Fault) -> dict[str, object]:
    return {
        "name": name,
        "about": fault.about,
        "victims": fault.victims,
        "heals": fault.heals,
        "needs": fault.needs,
        "params": fault.params,
    }
