"""The `elastic-chaos` command. Each command stands in the file of its kind; here they are put together."""

from __future__ import annotations

from collections.abc import Callable

import typer

from chaos.cli_endurance import churn, soak
from chaos.cli_history import check
from chaos.cli_simulate import replay, simulate
from chaos.demo import demo

COMMANDS: dict[str, Callable[..., None]] = {
    "kill-rank": demo,
    "soak": soak,
    "churn": churn,
    "simulate": simulate,
    "replay": replay,
    "check": check,
}

app = typer.Typer(
    name="elastic-chaos",
    help="Prove that a killed rank loses, duplicates and alters nothing.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for name, command in COMMANDS.items():
    app.command(name)(command)


def main() -> None:
    """Entry point of the `elastic-chaos` script."""
    app()
