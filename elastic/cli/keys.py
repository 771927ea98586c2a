"""Commands about the secret that the hosts of a cluster share: `elastic keys ls`, `rotate` and `new`."""

from __future__ import annotations

import typer

from elastic.cli.changes import PlanFlag, StepTimeoutFlag
from elastic.cli.command import command
from elastic.cli.connection import Connection
from elastic.cli.flags import Output, OutputFlag, interruptible, show, write_json
from membership.base.errors import PlanRefused

keys = typer.Typer(help="Show or replace the join secret that a cluster's hosts share.", no_args_is_help=True)


@keys.command("ls")
@command
def list_secrets(connection: Connection, output: OutputFlag = Output.TEXT) -> None:
    """List which host has which join secrets, by name, and who listens with which generation."""
    with connection.client() as client:
        from elastic.cli.render import secrets_view

        found = client.secrets()
        show(found, secrets_view(found), output)


@keys.command("new")
@command
def new(output: OutputFlag = Output.TEXT) -> None:
    """Print a new random secret: another line for the file of --join-secret-file on each host.

    Beside the old one, whether or not the file ends with a line break: (echo; elastic keys new) >> FILE
    """
    from elastic.serve.join_secret import new_secret

    secret = new_secret()
    show({"secret": secret}, secret, output)


@keys.command("rotate")
@command
def rotate(
    connection: Connection,
    plan: PlanFlag = False,
    timeout_s: StepTimeoutFlag = 300.0,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Go over to the other join secret that all hosts have, while requests keep streaming.

    The engine begins a new term, then all rank processes are replaced, one after the other. Interrupted, run it again.
    """
    with connection.client() as client, interruptible() as stop:
        from elastic.cli.render import Progress, rotation_view, secrets_view
        from elastic.cli.rotation import lacks_its_end
        from elastic.cli.rotation import rotate as rotated

        planned = client.plan_rotation()
        if plan:
            if output is Output.JSON:
                write_json(planned)
            elif not planned.refused:
                typer.echo(rotation_view(planned))
        if planned.refused and not lacks_its_end(client, planned):
            raise PlanRefused(planned.refused, hint=planned.hint)
        if plan:
            raise typer.Exit(2 if planned.changes else 0)
        with Progress(enabled=output is Output.TEXT) as progress:
            for operation in rotated(client, timeout_s, stop):
                progress.update(operation)
                if output is Output.JSON and not operation.active:
                    write_json(operation)
        if stop.is_set():
            typer.echo("stopped between two ranks; go on with: elastic keys rotate", err=True)
            raise typer.Exit(1)
        found = client.secrets()
        show(found, secrets_view(found), output)


def add_to(app: typer.Typer) -> None:
    """Register these commands."""
    app.add_typer(keys, name="keys", rich_help_panel="Operations")
