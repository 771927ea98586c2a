"""`elastic-chaos faults`: what can be dealt, to whom; `role-matrix`: every process fault for every role."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from chaos.campaigns.role_matrix import FLAGS, Cell, CellResult, all_cells, run_role_matrix
from chaos.cli.endurance import ModelFlag, RanksFlag, served
from chaos.faults.catalogue import FAULTS, Fault
from elastic.cli.flags import Output, OutputFlag, reported, write_json
from membership.base.errors import ConfigError

OnlyFlag = Annotated[
    list[str] | None, typer.Option("--only", help="ROLE/FAULT, or a role or a fault alone; may be given several times.")
]


class MatrixReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """What the matrix proved."""

    ok: bool
    cells: int  # that were to be run
    passed: int
    requests: int
    broken: int  # streams that ended with their gateway
    seconds: float
    results: tuple[CellResult, ...]


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


def role_matrix(
    only: OnlyFlag = None, ranks: RanksFlag = 3, model: ModelFlag = None, output: OutputFlag = Output.TEXT
) -> None:
    """Deal every process fault to every role under load. Exit 1 if one was not dealt, or the cluster is not whole."""
    with reported():
        cells = _chosen(only or [])
        results: list[CellResult] = []
        while len(results) < len(cells):  # a cell that its cluster does not survive costs one
            with served(model, ranks, FLAGS, seed=0) as (cluster, tell):
                results += run_role_matrix(cluster, cells[len(results) :], tell, ranks)
        passed = sum(result.ok for result in results)
        receipt = MatrixReceipt(
            ok=passed == len(cells),
            cells=len(cells),
            passed=passed,
            requests=sum(result.requests for result in results),
            broken=sum(result.broken for result in results),
            seconds=round(sum(result.seconds for result in results), 1),
            results=tuple(results),
        )
        if output is Output.TEXT:
            typer.echo(f"{passed} of {len(cells)} cells passed in {receipt.seconds} s; {receipt.requests} requests, "
                       f"{receipt.broken} of them broke off with their gateway")  # fmt: skip
        else:
            write_json(receipt)
        raise typer.Exit(0 if receipt.ok else 1)


def _chosen(only: list[str]) -> list[Cell]:
    cells = all_cells()
    unknown = [word for word in only if not any(word in (cell.name, cell.role, cell.fault) for cell in cells)]
    if unknown:
        raise ConfigError(f"there is no cell {unknown[0]!r}", hint=f"cells are ROLE/FAULT, such as {cells[0].name}")
    return [cell for cell in cells if not only or not {cell.name, cell.role, cell.fault}.isdisjoint(only)]
