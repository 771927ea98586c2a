"""Commands for looking at a running cluster: status, explain, events. Also unquarantine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elastic.cli.command import WaitTimeoutFlag, command
from elastic.cli.connection import Connection
from elastic.cli.flags import Output, OutputFlag, interruptible, show, write_json
from membership.base.errors import ConfigError, WaitTimeout
from membership.store.records import RankState

if TYPE_CHECKING:
    from rich.console import RenderableType

    from elastic.cli.client import Client
    from membership.base.events import Event

LINK_EVENTS = 8  # of cut links that `status --links` shows


@command
def status(
    connection: Connection,
    watch: Annotated[bool, typer.Option("-w", "--watch", help="Keep showing it until Ctrl-C.")] = False,
    links: Annotated[bool, typer.Option("--links", help="Show connections between hosts instead.")] = False,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Show epoch, ranks, coverage, the running operation and the load."""
    with connection.client() as client, interruptible() as stop:
        from elastic.cli.render import console, links_view, status_view, watch_status

        def view(document: dict[str, Any]) -> RenderableType:
            return links_view(document, _link_events(client, stop)) if links else status_view(document)

        if watch and output is Output.TEXT:
            watch_status(client.status, view, stop)
            return
        while True:
            document = client.status()
            if output is Output.JSON:
                write_json(document)
            else:
                console().print(view(document))
            if not watch or stop.wait(1.0):
                return


node = typer.Typer(help="Show the hosts of a cluster.", no_args_is_help=True)


@node.command("ls")
@command
def list_nodes(connection: Connection, output: OutputFlag = Output.TEXT) -> None:
    """List hosts: their ranks, experts whose only replicas are there, and which may be deleted."""
    with connection.client() as client:
        from elastic.cli.render import console, nodes_view

        document = client.status()
        if output is Output.JSON:
            write_json({"nodes": document["nodes"]})
        else:
            console().print(nodes_view(document))


def _link_events(client: Client, stop: threading.Event) -> list[Event]:
    """The last links that were cut, or came back; none where the history is out of reach."""
    try:
        found = [event for event in client.events(False, stop) if event.kind in ("link_lost", "link_back")]
    except ConfigError:
        return []
    return found[-LINK_EVENTS:]


@command
def events(
    connection: Connection,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Keep printing events as they happen.")] = False,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Show the cluster's event history."""
    with interruptible() as stop, ExitStack() as opened:
        found = _history(connection, follow, stop, opened)
        from elastic.cli.render import event_line

        for event in found:
            show(event, event_line(event), output)


def _history(connection: Connection, follow: bool, stop: threading.Event, opened: ExitStack) -> Iterator[Event]:
    """From the file itself where it is here: also of a cluster that is not being served any more."""
    file = connection.history()
    if file is None:
        return opened.enter_context(connection.client()).events(follow, stop)
    from membership.base.events import EventLog

    return EventLog.follow(file, stop) if follow else iter(EventLog.read(file))


@command
def explain(
    connection: Connection,
    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="RANK|OP", help="A rank or an operation id. Default: the cluster and each rank that does not serve."
        ),
    ] = None,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Explain the state of the cluster, a rank or an operation: the causes, what happens next, and what to do."""
    with connection.client() as client:
        from elastic.explain import explained

        found = client.explain(subject)
        show(found, explained(found), output)


@command
def unquarantine(
    connection: Connection,
    rank: Annotated[int, typer.Argument(help="The quarantined rank slot.")],
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until the rank serves, or is quarantined again.")
    ] = True,
    timeout_s: WaitTimeoutFlag = 120.0,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Fill a quarantined slot (one whose ranks kept dying) again. Exit 1 if it is quarantined again."""
    with connection.client() as client, interruptible() as stop:
        released = client.unquarantine(rank)
        state = _settled(client, rank, timeout_s, stop) if wait else ""
        document = {"rank": rank, "forgiven": released.forgiven, "state": state or None}
        show(document, f"rank {rank}: {state or 'may start again'}", output)
        if state == RankState.QUARANTINED:
            raise typer.Exit(1)


def _settled(client: Client, rank: int, timeout_s: float, stop: threading.Event) -> str:
    """The slot's state once it serves or is quarantined again; "" if it is not wanted any more, or on Ctrl-C."""
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
    for each in (status, explain, events, unquarantine):
        app.command(rich_help_panel="Operations")(each)
    app.add_typer(node, name="node", rich_help_panel="Operations")
