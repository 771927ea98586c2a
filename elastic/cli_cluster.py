"""Commands of somebody who looks at or changes a running cluster: status, explain, events, scale, unquarantine."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Annotated

import typer

from elastic.client import POLL_S, Client, find_cluster, wait_for
from elastic.options import (
    AdminFlag,
    AdminTokenFlag,
    ClusterFlag,
    EtcdFlag,
    Output,
    OutputFlag,
    StateDirFlag,
    reported,
    seconds,
    write_json,
)  # fmt: skip
from membership.errors import PlanRefused, WaitTimeout
from membership.types import Operation, Phase, RankState


def status(
    state_dir: StateDirFlag = None,
    admin: AdminFlag = None,
    admin_token: AdminTokenFlag = None,
    etcd: EtcdFlag = None,
    cluster: ClusterFlag = None,
    watch: Annotated[bool, typer.Option("-w", "--watch", help="Keep showing it.")] = False,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Show epoch, ranks, coverage, the running operation and the load."""
    with reported(), find_cluster(state_dir, admin, admin_token, etcd, cluster) as client, _interruptible() as stop:
        from elastic.show import status_view, watch_status

        if watch and output is Output.TEXT:
            watch_status(client.status, stop)
            return
        while True:
            document = client.status()
            if output is Output.JSON:
                write_json(document)
            else:
                from rich.console import Console

                Console().print(status_view(document))
            if not watch or stop.wait(1.0):
                return


def events(
    state_dir: StateDirFlag = None,
    admin: AdminFlag = None,
    admin_token: AdminTokenFlag = None,
    etcd: EtcdFlag = None,
    cluster: ClusterFlag = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as events happen.")] = False,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Show what happened: the one event history of the cluster."""
    with reported(), find_cluster(state_dir, admin, admin_token, etcd, cluster) as client, _interruptible() as stop:
        from elastic.show import event_line

        for event in client.events(follow, stop):
            if output is Output.JSON:
                write_json(event)
            else:
                typer.echo(event_line(event))


def explain(
    rank: Annotated[
        int | None, typer.Argument(help="Only this rank; default: the cluster and all that is not well.")
    ] = None,
    state_dir: StateDirFlag = None,
    admin: AdminFlag = None,
    admin_token: AdminTokenFlag = None,
    etcd: EtcdFlag = None,
    cluster: ClusterFlag = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Say why the cluster or a rank is as it is, what happens next, and what to do."""
    with reported(), find_cluster(state_dir, admin, admin_token, etcd, cluster) as client:
        from elastic.explain import explained

        found = client.explain(rank)
        if output is Output.JSON:
            write_json(found)
        else:
            typer.echo(explained(found))


def unquarantine(
    rank: Annotated[int, typer.Argument(help="The slot that was set aside.")],
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it serves or is set aside again.")] = True,
    timeout: Annotated[str, typer.Option(help="Wait no longer.")] = "2m",
    state_dir: StateDirFlag = None,
    admin: AdminFlag = None,
    admin_token: AdminTokenFlag = None,
    etcd: EtcdFlag = None,
    cluster: ClusterFlag = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Let a slot whose ranks kept dying be filled again. Exit 1 if it is set aside again."""
    with reported(), find_cluster(state_dir, admin, admin_token, etcd, cluster) as client, _interruptible() as stop:
        pardoned = client.unquarantine(rank)
        state = _settled(client, rank, seconds(timeout), stop) if wait else ""
        if output is Output.JSON:
            write_json({"rank": rank, "forgiven": pardoned.forgiven, "state": state or None})
        else:
            typer.echo(f"rank {rank}: {state or 'may start again'}")
        if state == RankState.QUARANTINED:
            raise typer.Exit(1)


def _settled(client: Client, rank: int, timeout_s: float, stop: threading.Event) -> str:
    """The slot's state once it serves or is set aside again; "" if it is not wanted (any more) or Ctrl-C came."""
    deadline, state = time.monotonic() + timeout_s, ""
    while not stop.wait(POLL_S):
        states = {each["rank"]: str(each["state"]) for each in client.status()["ranks"]}
        state = states.get(rank, "")
        if state in ("", RankState.SERVING, RankState.QUARANTINED):
            return state
        if time.monotonic() > deadline:
            raise WaitTimeout(f"rank {rank} is {state} after {timeout_s:g} s", hint=f"see: elastic explain {rank}")
    return ""


def scale(
    target: Annotated[int, typer.Argument(metavar="N", help="How many ranks.")],
    plan: Annotated[
        bool, typer.Option("--plan", help="Only show what would change: exit 0 nothing, 2 something, 1 refused.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it has ended.")] = True,
    timeout: Annotated[str, typer.Option(help="Roll back if not committed by then.")] = "5m",
    if_epoch: Annotated[int | None, typer.Option(help="Only if this is the current epoch.")] = None,
    op_id: Annotated[str | None, typer.Option(help="Id of the operation; the same id is the same operation.")] = None,
    state_dir: StateDirFlag = None,
    admin: AdminFlag = None,
    admin_token: AdminTokenFlag = None,
    etcd: EtcdFlag = None,
    cluster: ClusterFlag = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Change the number of ranks while requests stream on."""
    with reported(), find_cluster(state_dir, admin, admin_token, etcd, cluster) as client:
        if plan:
            raise typer.Exit(_show_plan(client, target, output))
        timeout_s = seconds(timeout)
        operation = client.scale(target, op_id=op_id, if_epoch=if_epoch, timeout_s=timeout_s)
        if wait:
            operation = _wait(client, operation, timeout_s + 30.0, output)
        if output is Output.JSON:
            write_json(operation)
        elif not wait:
            typer.echo(f"operation {operation.id}: {operation.phase}")
        if operation.phase is Phase.ABORTED:
            typer.echo(f"error: operation {operation.id} was rolled back: {operation.error}", err=True)
            raise typer.Exit(1)


def _show_plan(client: Client, target: int, output: Output) -> int:
    from elastic.show import plan_view

    planned = client.plan(target)
    if output is Output.JSON:
        write_json(planned)
    elif not planned.refused:
        typer.echo(plan_view(planned))
    if planned.refused:
        raise PlanRefused(planned.refused)
    return 2 if planned.changes else 0


def _wait(client: Client, operation: Operation, timeout_s: float, output: Output) -> Operation:
    """Follow the operation to its end; Ctrl-C detaches and says how to come back."""
    from elastic.show import Progress

    with _interruptible() as stop, Progress(enabled=output is Output.TEXT) as progress:
        for latest in wait_for(client, operation, timeout_s, stop):
            operation = latest
            progress.update(operation)
    if operation.active:
        typer.echo(
            f"detached; the operation goes on. Come back with: elastic scale {operation.target} --op-id {operation.id}",
            err=True,
        )
    return operation


class _interruptible:
    """A stop event that Ctrl-C sets, for the length of a block."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def __enter__(self) -> threading.Event:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self._stop

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()


def add_to(app: typer.Typer) -> None:
    """Register these commands."""
    for command in (status, explain, events, scale, unquarantine):
        app.command(rich_help_panel="Operations")(command)
