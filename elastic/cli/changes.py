"""Commands that change a running cluster: scale, drain, undrain, rollout, rebalance, ops, pause, resume."""

from __future__ import annotations

import getpass
import os
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from elastic.cli.command import WaitTimeoutFlag, command
from elastic.cli.connection import Connection
from elastic.cli.flags import Output, OutputFlag, interruptible, show, write_json
from elastic.serve.options import Option, option
from membership.base.errors import ConfigError, PlanRefused
from membership.base.timing import LONGEST_TIMEOUT_S, OPERATION_TIMEOUT_S, SHORTEST_TIMEOUT_S
from membership.operations import change as changes
from membership.operations.change import Change, describe_change
from membership.store.records import Operation, Phase

if TYPE_CHECKING:
    from elastic.cli.client import Client

PLAN_HELP = "Dry run: only show what would change. Exit status: 0 nothing, 2 something, 1 refused."
TIMEOUT_HELP = "Roll back if not committed within this time."
WAIT_MARGIN_S = 30.0  # how much longer to wait for an operation than its own timeout
PlanFlag = Annotated[bool, typer.Option("--plan", help=PLAN_HELP)]
LIMITS = {"minimum": SHORTEST_TIMEOUT_S, "maximum": LONGEST_TIMEOUT_S}
TtlFlag = Annotated[float, Option(help="The pause ends by itself after this time.", **LIMITS)]
StepTimeoutFlag = Annotated[float, Option(help="Roll a step back if it is not committed within this time.", **LIMITS)]
DrainedArgument = Annotated[list[int] | None, typer.Argument(metavar="RANK", help="Rank slots.")]
RanksArgument = Annotated[list[int], typer.Argument(metavar="RANK...", help="Rank slots.")]
OpIdArgument = Annotated[str, typer.Argument(metavar="ID", help="Operation id.")]

ops = typer.Typer(help="Show operations, or cancel one.", no_args_is_help=True)


@dataclass(frozen=True, kw_only=True)
class ChangeOptions:
    """What every change takes."""

    plan: bool = option(False, PLAN_HELP)
    wait: bool = option(True, "Wait until the operation has ended.", names=("--wait/--no-wait",))
    if_epoch: int | None = option(None, "Refuse unless this is the current epoch.")
    op_id: str | None = option(None, "Operation id, for safe retries: asking again with the same id changes nothing.")


@dataclass(frozen=True, kw_only=True)
class TimedChange(ChangeOptions):
    """What scale and undrain take."""

    timeout_s: float = option(OPERATION_TIMEOUT_S, TIMEOUT_HELP, **LIMITS)


@dataclass(frozen=True, kw_only=True)
class DrainChange(ChangeOptions):
    """What drain takes."""

    timeout_s: float = option(90.0, TIMEOUT_HELP, names=("--deadline",), **LIMITS)
    node: str = option("", "Instead of RANK...: all ranks of this host.")


@command
def scale(
    target: Annotated[int, typer.Argument(metavar="N", help="Number of ranks.")],
    options: TimedChange,
    connection: Connection,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Change the number of ranks while requests keep streaming."""
    _apply(connection, changes.scale(target), options, output)


@command
def drain(
    options: DrainChange, connection: Connection, ranks: DrainedArgument = None, output: OutputFlag = Output.TEXT
) -> None:
    """Take ranks out of service: experts and requests move first. Their slots stay empty until undrained."""
    if bool(ranks) == bool(options.node):
        raise ConfigError("name ranks, or a host", hint="elastic drain 0 2, or elastic drain --node NAME")
    chosen = ranks or ranks_of(connection, options.node)
    _apply(connection, changes.drain(*chosen), options, output)


def ranks_of(connection: Connection, node: str) -> list[int]:
    """All ranks of a host. ConfigError if it has none."""
    with connection.client() as client:
        found = [(rank["node"], rank["rank"]) for rank in client.status()["ranks"]]
    if not any(where == node for where, _ in found):
        hosts = ", ".join(sorted({where for where, _ in found if where}))
        raise ConfigError(f"no rank is on a host named {node}", hint=f"ranks are on: {hosts or 'none'}")
    return [rank for where, rank in found if where == node]


@command
def undrain(
    ranks: RanksArgument, options: TimedChange, connection: Connection, output: OutputFlag = Output.TEXT
) -> None:
    """Fill drained slots again."""
    _apply(connection, changes.undrain(*ranks), options, output)


def _apply(connection: Connection, change: Change, options: TimedChange | DrainChange, output: Output) -> None:
    with connection.client() as client:
        if options.plan:
            raise typer.Exit(_show_plan(client, change, output))
        timeout_s = options.timeout_s
        operation = client.propose(change, op_id=options.op_id, if_epoch=options.if_epoch, timeout_s=timeout_s)
        if options.wait:
            operation = _wait(client, operation, timeout_s + WAIT_MARGIN_S, output)
        _end(operation, output)


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
    """Follow the operation to its end; Ctrl-C detaches and says how to resume watching."""
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
    """Print the operation's phase; exit status 1 if it was rolled back."""
    if output is Output.JSON:
        write_json(operation)
    elif operation.active:
        typer.echo(f"operation {operation.id}: {operation.phase}")
    if operation.phase is Phase.ABORTED:
        typer.echo(f"error: operation {operation.id} was rolled back: {operation.error}", err=True)
        raise typer.Exit(1)


@ops.command("ls")
@command
def list_operations(connection: Connection, output: OutputFlag = Output.TEXT) -> None:
    """List recorded operations, newest last."""
    with connection.client() as client:
        from elastic.cli.render import operation_line

        for operation in client.operations():
            show(operation, operation_line(operation, time.time()), output)


@ops.command("show")
@command
def show_operation(
    op_id: OpIdArgument,
    connection: Connection,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the operation to its end.")] = False,
    timeout_s: WaitTimeoutFlag = 600.0,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Show an operation: its phases, what it waits for, how it ended. With --wait, exit 1 if it was rolled back."""
    with connection.client() as client:
        from elastic.explain import explained

        operation = client.operation(op_id)
        if wait:
            operation = _wait(client, operation, timeout_s, output)
        if output is Output.JSON:
            write_json(operation)
        else:
            typer.echo(explained(client.explain(op_id)))
        if wait and operation.phase is Phase.ABORTED:
            raise typer.Exit(1)


@ops.command("cancel")
@command
def cancel_operation(
    op_id: OpIdArgument,
    connection: Connection,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is rolled back.")] = True,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Roll an operation back, if it is not committed yet."""
    with connection.client() as client:
        operation = client.cancel(op_id, user())
        if wait:
            operation = _wait(client, operation, 60.0, output)
        show(operation, f"operation {operation.id} ({describe_change(operation)}): {operation.phase}", output)
        if not operation.active and operation.phase is not Phase.ABORTED:
            typer.echo(f"error: operation {operation.id} was committed before it could be cancelled", err=True)
            raise typer.Exit(1)


@command
def pause(
    connection: Connection,
    ttl_s: TtlFlag = 1800.0,
    reason: Annotated[str, typer.Option(help="Shown by status, and to anyone whose change is refused.")] = "",
    output: OutputFlag = Output.TEXT,
) -> None:
    """Refuse planned changes for a while (maintenance). Faults are still repaired; a running operation goes on."""
    with connection.client() as client:
        from membership.operations.pause import paused_words

        paused = client.pause(ttl_s, user(), reason)
        show(paused, paused_words(paused, time.time()), output)


@command
def rebalance(connection: Connection, plan: PlanFlag = False, output: OutputFlag = Output.TEXT) -> None:
    """Balance measured expert load now, below the usual threshold: one byte budget, loaded in the background."""
    with connection.client() as client:
        from elastic.cli.render import rebalance_view

        planned = client.plan_rebalance() if plan else client.rebalance(user())
        if output is Output.JSON:
            write_json(planned)
        elif not planned.refused:
            typer.echo(rebalance_view(planned, asked=not plan))
        if planned.refused:
            raise PlanRefused(planned.refused)
        raise typer.Exit(2 if plan and planned.changes else 0)


@command
def resume(connection: Connection, output: OutputFlag = Output.TEXT) -> None:
    """End a pause."""
    with connection.client() as client:
        resumed = client.resume()
        show({"resumed": resumed}, "planned changes go on" if resumed else "nothing was paused", output)


@command
def rollout(
    connection: Connection,
    before: Annotated[
        int | None, typer.Option(help="Replace this incarnation and earlier ones. Default: all that serve now.")
    ] = None,
    timeout_s: StepTimeoutFlag = 300.0,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Replace all rank processes by new ones, one after the other, while requests keep streaming."""
    with connection.client() as client, interruptible() as stop:
        from elastic.cli.render import Progress
        from elastic.cli.rollout import last_incarnation, resume_hint, rollout

        last = last_incarnation(client) if before is None else before
        operation = None
        with Progress(enabled=output is Output.TEXT) as progress:
            for operation in rollout(client, last, timeout_s, stop):
                progress.update(operation)
                if output is Output.JSON and not operation.active:
                    write_json(operation)
        if stop.is_set():
            typer.echo(f"stopped between two ranks; {resume_hint(last)}", err=True)
            raise typer.Exit(1)
        if operation is None and output is Output.TEXT:
            typer.echo(f"nothing to replace: no rank is of incarnation {last} or earlier")


def user() -> str:
    """Who asks, for the record."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's uid has no entry
        name = f"uid {os.getuid()}"
    return f"{name}@{socket.gethostname()}"


def add_to(app: typer.Typer) -> None:
    """Register these commands."""
    for each in (scale, drain, undrain, rollout, rebalance, pause, resume):
        app.command(rich_help_panel="Operations")(each)
    app.add_typer(ops, name="ops", rich_help_panel="Operations")
