"""Commands of somebody who looks at a running cluster: status, explain, events; and unquarantine."""

from __future__ import annotations

import threading
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
from membership.base.errors import WaitTimeout
from membership.store.records import RankState

if TYPE_CHECKING:
    from elastic.cli.client import Client


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
    with reported(), find_cluster(state_dir, admin, admin_token, etcd, cluster) as client, interruptible() as stop:
        from elastic.cli.render import status_view, watch_status

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
    with reported(), find_cluster(state_dir, admin, admin_token, etcd, cluster) as client, interruptible() as stop:
        from elastic.cli.render import event_line

        for event in client.events(follow, stop):
            if output is Output.JSON:
                write_json(event)
            else:
                typer.echo(event_line(event))


def explain(
    subject: Annotated[
        str | None,
        typer.Argument(metavar="RANK|OP", help="Only this; default: the cluster and all that is not well."),
    ] = None,
    state_dir: StateDirFlag = None,
    admin: AdminFlag = None,
    admin_token: AdminTokenFlag = None,
    etcd: EtcdFlag = None,
    cluster: ClusterFlag = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Say why the cluster, a rank or an operation is as it is, what happens next, and what to do."""
    with reported(), find_cluster(state_dir, admin, admin_token, etcd, cluster) as client:
        from elastic.explain import explained

        found = client.explain(subject)
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
    with reported(), find_cluster(state_dir, admin, admin_token, etcd, cluster) as client, interruptible() as stop:
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
    from elastic.cli.client import POLL_S

    deadline, state = time.monotonic() + timeout_s, ""
    while not stop.wait(POLL_S):
        states = {each["rank"]: str(each["state"]) for each in client.status()["ranks"]}
        state = states.get(rank, "")
        if state in ("", RankState.SERVING, RankState.QUARANTINED):
            return state
        if time.monotonic() > deadline:
            raise WaitTimeout(f"rank {rank} is {state} after {timeout_s:g} s", hint=f"see: elastic explain {rank}")
    return ""


def add_to(app: typer.Typer) -> None:
    """Register these commands."""
    for command in (status, explain, events, unquarantine):
        app.command(rich_help_panel="Operations")(command)
