"""`elastic-chaos failpoints` and `failpoint-matrix`: faults at exact moments, one by hand or all of them."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from chaos.campaigns.failpoint_matrix import ACTIONS, FLAGS, FailpointMatrix, every_cell
from chaos.campaigns.failpoint_stimuli import SMALL
from chaos.campaigns.targets import LocalTarget
from chaos.cli.shared import ModelFlag, finish, served
from elastic.cli.command import command
from elastic.cli.connection import AdminConnection
from elastic.cli.flags import Output, OutputFlag, write_json
from membership.base.errors import ConfigError
from membership.base.failpoint_catalogue import ON_ONE_HOST


@command
def failpoints(
    connection: AdminConnection,
    spec: Annotated[str | None, typer.Argument(help="NAME[@RANK]=[N*]ACTION;…  Empty: disarm. Left out: show.")] = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Arm faults in a cluster that is served with --chaos, or show which are armed and which there are."""
    with connection.admin_client() as client:
        found = client.failpoints() if spec is None else client.arm(spec)
    if output is Output.JSON:
        write_json(found)
        return
    typer.echo(f"armed: {found['failpoints'] or 'nothing'}")
    if spec is None:
        typer.echo(f"actions: {' '.join(found['actions'])}\npoints:\n  " + "\n  ".join(found["points"]))


@command
def failpoint_matrix(
    only: Annotated[str | None, typer.Option(help="Only the failpoints whose names begin with this.")] = None,
    action: Annotated[list[str] | None, typer.Option(help="Only these actions; default: all three.")] = None,
    model: ModelFlag = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """A role that dies, raises or hangs at every failpoint, under load. Exit 1 if a promise broke, or none passed."""
    cells = every_cell([point for point in ON_ONE_HOST if point.startswith(only or "")], tuple(action or ACTIONS))
    if not cells:
        raise ConfigError(f"there is no failpoint {only!r}", hint="see: elastic-chaos failpoints")
    started = time.monotonic()
    matrix, total = FailpointMatrix(left=cells), len(cells)
    with served(model, SMALL, FLAGS) as (cluster, notify):
        matrix.run(LocalTarget(cluster), notify)
    results = matrix.results
    failed = [each for each in results if not each.ok]
    ok = not failed and len(results) == total
    cells_run = f"{len(results)} of {total} cells in {time.monotonic() - started:.0f} s, {len(failed)} failed"
    shown = [f"{'every promise held' if ok else 'a promise broke'}: {cells_run}"]
    shown += [f"  - {each.point} {each.action}: {each.said}" for each in failed]
    finish(ok, {"ok": ok, "cells": total, "results": results}, shown, output)
