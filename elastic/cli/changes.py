"""Commands that change a running cluster on purpose: scale, drain, undrain, rollout, rebalance, ops, pause, resume."""

from __future__ import annotations

import getpass
import socket
import time
from typing import TYPE_CHECKING, Annotated

import typer

from elastic.cli.flags import (
    AdminFlag,
    AdminTokenFlag,
    ClusterFlag,
    EtcdFlag,
    Output,
    OutputFlag,
    StateDirFlag,
    find_cluster,
    interruptible,
    reported,
    seconds,
    write_json,
)  # fmt: skip
from membership.base.errors import PlanRefused
from membership.operations import change as changes
from membership.operations.change import Change, describe_change
from membership.store.records import Operation, Phase

if TYPE_CHECKING:
    from elastic.cli.client import Client

PlanFlag = Annotated[
    bool, typer.Option("--plan", help="Only show what would change: exit 0 nothing, 2 something, 1 refused.")
]
WaitFlag = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it has ended.")]
IfEpochFlag = Annotated[int | None, typer.Option(help="Only if this is the current epoch.")]
OpIdFlag = Annotated[str | None, typer.Option(help="Id of the operation; the same id is the same operation.")]
RanksArgument = Annotated[list[int], typer.Argument(metavar="RANK...", help="Which ranks.")]

ops = typer.Typer(help="Look at operations, or cancel one.", no_args_is_help=True)


def scale(
    target: Annotated[int, typer.Argument(metavar="N", help="How many ranks.")],
    plan: PlanFlag = False,
    wait: WaitFlag = True,
    timeout: Annotated[str, typer.Option(help="Roll back if not committed by then.")] = "5m",
    if_epoch: IfEpochFlag = None,
    op_id: OpIdFlag = None,
    state_dir: StateDirFlag = None,
    admin: AdminFlag = None,
    admin_token: AdminTokenFlag = None,
    etcd: EtcdFlag = None,
    cluster: ClusterFlag = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Change the number of ranks while requests stream on."""
    with reported(), find_cluster(state_dir, admin, admin_token, etcd, cluster) as client:
        _change(client, changes.scale(target), plan, wait, timeout, if_epoch, op_id, output)


def drain(
    ranks: RanksArgument,
    plan: PlanFlag = False,
    wait: WaitFlag = True,
    deadline: Annotated[str, typer.Option(help="Roll back if not committed by then.")] = "90s",
    if_epoch: IfEpochFlag = None,
    op_id: OpIdFlag = None,
    state_dir: StateDirFlag = None,
    admin: AdminFlag = None,
    admin_token: AdminTokenFlag = None,
    etcd: EtcdFlag = None,
    cluster: ClusterFlag = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Take ranks out of service, whichever: experts and requests move first. Their slots stay empty until undrained."""
    with reported(), find_cluster(state_dir, admin, admin_token, etcd, cluster) as client:
        _change(client, changes.drain(*ranks), plan, wait, deadline, if_epoch, op_id, output)


def undrain(
    ranks: RanksArgument,
    plan: PlanFlag = False,
    wait: WaitFlag = True,
    timeout: Annotated[str, typer.Option(help="Roll back if not committed by then.")] = "5m",
    if_epoch: IfEpochFlag = None,
    op_id: OpIdFlag = None,
    state_dir: StateDirFlag = None,
    admin: AdminFlag = None,
    admin_token: AdminTokenFlag = None,
    etcd: EtcdFlag = None,
    cluster: ClusterFlag = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Fill drained slots again."""
    with reported(), find_cluster(state_dir, admin, admin_token, etcd, cluster) as client:
        _change(client, changes.undrain(*ranks), plan, wait, timeout, if_epoch, op_id, output)


def _change(
    client: Client, change: Change, plan: bool, wait: bool, timeout: str, if_epoch: int | None, op_id: str | None,
    output: Output,
) -> None:  # fmt: skip
    if plan:
        raise typer.Exit(_show_plan(client, change, output))
    timeout_s = seconds(timeout)
    operation = client.propose(change, op_id=op_id, if_epoch=if_epoch, timeout_s=timeout_s)
    _end(_wait(client, operation, timeout_s + 30.0, output) if wait else operation, output)


def _show_plan(client: Client, change: Change, output: Output) -> int:
    from elastic.cli.render import plan_view

    planned = client.plan(change)
    if output is Output.JSON:
        write_json(planned)
    elif not planned.refused:
        typer.echo(plan_view(planned))
    if planned.refused:
        raise PlanRefused(planned.refused)
    return 2 if planned.changes else 0


def _wait(client: Client, operation: Operation, timeout_s: float, output: Output) -> Operation:
    """Follow the operation to its end; Ctrl-C detaches and says how to come back."""
    from elastic.cli.client import wait_for
    from elastic.cli.render import Progress

    with interruptible() as stop, Progress(enabled=output is Output.TEXT) as progress:
        for latest in wait_for(client, operation, timeout_s, stop):
            operation = latest
            progress.update(operation)
    if operation.active:
        typer.echo(f"detached; the operation goes on. Come back with: elastic ops show {operation.id} --wait", err=True)
    return operation


def _end(operation: Operation, output: Output) -> None:
    """Say where the operation stands; exit status 1 if it was rolled back."""
    if output is Output.JSON:
        write_json(operation)
    elif operation.active:
        typer.echo(f"operation {operation.id}: {operation.phase}")
    if operation.phase is Phase.ABORTED:
        typer.echo(f"error: operation {operation.id} was rolled back: {operation.error}", err=True)
        raise typer.Exit(1)


@ops.command("ls")
def list_operations(
    state_dir: StateDirFlag = None,
    admin: AdminFlag = None,
    admin_token: AdminTokenFlag = None,
    etcd: EtcdFlag = None,
    cluster: ClusterFlag = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """The operations on record, the latest last."""
    with reported(), find_cluster(state_dir, admin, admin_token, etcd, cluster) as client:
        from elastic.cli.render import operation_line

        for operation in client.operations():
            if output is Output.JSON:
                write_json(operation)
            else:
                typer.echo(operation_line(operation, time.time()))


@ops.command("show")
def show_operation(
    op_id: Annotated[str, typer.Argument(metavar="ID", help="Of the operation.")],
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow it to its end.")] = False,
    timeout: Annotated[str, typer.Option(help="Wait no longer.")] = "10m",
    state_dir: StateDirFlag = None,
    admin: AdminFlag = None,
    admin_token: AdminTokenFlag = None,
    etcd: EtcdFlag = None,
    cluster: ClusterFlag = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """An operation: its phases, whom it waits for, how it ended. With --wait, exit 1 if it was rolled back."""
    with reported(), find_cluster(state_dir, admin, admin_token, etcd, cluster) as client:
        from elastic.explain import explained

        operation = client.operation(op_id)
        if wait:
            operation = _wait(client, operation, seconds(timeout), output)
        if output is Output.JSON:
            write_json(operation)
        else:
            typer.echo(explained(client.explain(op_id)))
        if wait and operation.phase is Phase.ABORTED:
            raise typer.Exit(1)


@ops.command("cancel")
def cancel_operation(
    op_id: Annotated[str, typer.Argument(metavar="ID", help="Of the operation.")],
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is rolled back.")] = True,
    state_dir: StateDirFlag = None,
    admin: AdminFlag = None,
    admin_token: AdminTokenFlag = None,
    etcd: EtcdFlag = None,
    cluster: ClusterFlag = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Have an operation rolled back, as long as it is not committed."""
    with reported(), find_cluster(state_dir, admin, admin_token, etcd, cluster) as client:
        operation = client.cancel(op_id, _somebody())
        if wait:
            operation = _wait(client, operation, 60.0, output)
        if output is Output.JSON:
            write_json(operation)
        else:
            typer.echo(f"operation {operation.id} ({describe_change(operation)}): {operation.phase}")
        if not operation.active and operation.phase is not Phase.ABORTED:
            typer.echo(f"error: operation {operation.id} was committed before it could be cancelled", err=True)
            raise typer.Exit(1)


def pause(
    ttl: Annotated[str, typer.Option(help="It ends by itself after this time.")] = "30m",
    reason: Annotated[str, typer.Option(help="Shown to whoever looks or is refused.")] = "",
    state_dir: StateDirFlag = None,
    admin: AdminFlag = None,
    admin_token: AdminTokenFlag = None,
    etcd: EtcdFlag = None,
    cluster: ClusterFlag = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Maintenance: refuse planned changes for a while. Faults are handled as ever; a running operation goes on."""
    with reported(), find_cluster(state_dir, admin, admin_token, etcd, cluster) as client:
        from membership.operations.pause import paused_words

        paused = client.pause(seconds(ttl), _somebody(), reason)
        if output is Output.JSON:
            write_json(paused)
        else:
            typer.echo(paused_words(paused, time.time()))


def rebalance(
    plan: PlanFlag = False,
    state_dir: StateDirFlag = None,
    admin: AdminFlag = None,
    admin_token: AdminTokenFlag = None,
    etcd: EtcdFlag = None,
    cluster: ClusterFlag = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Even measured load out now, rather than when it is clearly worth it: one budget's worth, in the background."""
    with reported(), find_cluster(state_dir, admin, admin_token, etcd, cluster) as client:
        from elastic.cli.render import rebalance_view

        planned = client.plan_rebalance() if plan else client.rebalance(_somebody())
        if output is Output.JSON:
            write_json(planned)
        elif not planned.refused:
            typer.echo(rebalance_view(planned, asked=not plan))
        if planned.refused:
            raise PlanRefused(planned.refused)
        raise typer.Exit(2 if plan and planned.changes else 0)


def resume(
    state_dir: StateDirFlag = None,
    admin: AdminFlag = None,
    admin_token: AdminTokenFlag = None,
    etcd: EtcdFlag = None,
    cluster: ClusterFlag = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """End a pause."""
    with reported(), find_cluster(state_dir, admin, admin_token, etcd, cluster) as client:
        resumed = client.resume()
        if output is Output.JSON:
            write_json({"resumed": resumed})
        else:
            typer.echo("planned changes go on" if resumed else "nothing was paused")


def rollout(
    before: Annotated[
        int | None, typer.Option(help="Replace this incarnation and earlier ones; default: all that serve now.")
    ] = None,
    timeout: Annotated[str, typer.Option(help="Of each step: roll it back if not committed by then.")] = "5m",
    state_dir: StateDirFlag = None,
    admin: AdminFlag = None,
    admin_token: AdminTokenFlag = None,
    etcd: EtcdFlag = None,
    cluster: ClusterFlag = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Replace all ranks by new ones, one after the other, while requests stream on."""
    with reported(), find_cluster(state_dir, admin, admin_token, etcd, cluster) as client, interruptible() as stop:
        from elastic.cli.render import Progress
        from elastic.cli.rollout import go_on, last_incarnation, rollout

        last = last_incarnation(client) if before is None else before
        operation = None
        with Progress(enabled=output is Output.TEXT) as progress:
            for operation in rollout(client, last, seconds(timeout), stop):
                progress.update(operation)
                if output is Output.JSON and not operation.active:
                    write_json(operation)
        if stop.is_set():
            typer.echo(f"stopped between two ranks; {go_on(last)}", err=True)
            raise typer.Exit(1)
        if operation is None and output is Output.TEXT:
            typer.echo(f"nothing to replace: no rank is of incarnation {last} or earlier")


def _somebody() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}"


def add_to(app: typer.Typer) -> None:
    """Register these commands."""
    for command in (scale, drain, undrain, rollout, rebalance, pause, resume):
        app.command(rich_help_panel="Operations")(command)
    app.add_typer(ops, name="ops", rich_help_panel="Operations")
