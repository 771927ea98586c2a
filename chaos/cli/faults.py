"""`elastic-chaos faults`: the faults and their victims; `role-matrix`: every process fault for every role."""

from __future__ import annotations

from typing import Annotated

import typer

from chaos.campaigns.role_matrix import FLAGS, Cell, CellResult, MatrixReceipt, RoleMatrix, all_cells
from chaos.campaigns.targets import LocalTarget
from chaos.cli.shared import ModelFlag, RanksFlag, finish, served
from chaos.faults.catalogue import FAULTS
from elastic.cli.command import command
from elastic.cli.flags import Output, OutputFlag, write_json
from membership.base.errors import ConfigError

OnlyFlag = Annotated[
    list[str] | None, typer.Option("--only", help="ROLE/FAULT, or a role or a fault alone; may be given several times.")
]


@command
def faults(
    victim: Annotated[str, typer.Option(help="Only faults that it can have: engine, rank, etcd, …")] = "",
    output: OutputFlag = Output.TEXT,
) -> None:
    """List the faults that can be injected, each with its victims."""
    found = {name: fault for name, fault in FAULTS.items() if not victim or fault.fits(victim)}
    if output is Output.JSON:
        plain = ("about", "victims", "heals", "needs", "params")
        write_json([{"name": name, **{key: getattr(fault, key) for key in plain}} for name, fault in found.items()])
        return
    width = max((len(name) for name in found), default=0)
    for name, fault in found.items():
        typer.echo(f"{name:{width}}  {fault.about}")
        details = [f"victims: {', '.join(fault.victims)}", "heals" if fault.heals else "the product must replace it"]
        if fault.needs:
            details.append(f"needs {', '.join(fault.needs)}")
        if fault.params:
            details.append(" ".join(f"{key}={value}" for key, value in fault.params.items()))
        typer.echo(f"{'':{width}}  {'; '.join(details)}")


@command
def role_matrix(
    only: OnlyFlag = None, ranks: RanksFlag = 3, model: ModelFlag = None, output: OutputFlag = Output.TEXT
) -> None:
    """Inject every process fault into every role under load. Exit 1 if a cell failed."""
    cells = _chosen(only or [])
    results: list[CellResult] = []
    while len(results) < len(cells):  # a cell that its cluster does not survive costs one
        with served(model, ranks, FLAGS, seed=0) as (cluster, notify):
            matrix = RoleMatrix(left=cells[len(results) :], ranks=ranks)
            matrix.run(LocalTarget(cluster), notify)
            results += matrix.results
    receipt = MatrixReceipt.of(len(cells), results)
    passed = f"{receipt.passed} of {receipt.cells} cells passed in {receipt.seconds} s"
    streams = f"{receipt.requests} requests, {receipt.broken} of them broke off with their gateway"
    finish(receipt.ok, receipt, [f"{passed}; {streams}"], output)


def _chosen(only: list[str]) -> list[Cell]:
    cells = all_cells()
    unknown = [word for word in only if not any(word in (cell.name, cell.role, cell.fault) for cell in cells)]
    if unknown:
        raise ConfigError(f"there is no cell {unknown[0]!r}", hint=f"cells are ROLE/FAULT, such as {cells[0].name}")
    return [cell for cell in cells if not only or not {cell.name, cell.role, cell.fault}.isdisjoint(only)]
