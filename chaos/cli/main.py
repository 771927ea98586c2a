"""The `elastic-chaos` command. Each command is in the file of its kind; here they are put together."""

from __future__ import annotations

from collections.abc import Callable

import typer

from chaos.campaigns.demo import demo
from chaos.cli.endurance import churn, soak
from chaos.cli.failpoints import failpoint_matrix, failpoints
from chaos.cli.faults import faults, role_matrix
from chaos.cli.planted import planted
from chaos.cli.records import check, report
from chaos.cli.run import run, scenarios
from chaos.cli.shared import end_in_order
from chaos.cli.simulate import replay, simulate
from chaos.cli.suite import suite
from elastic.cli import entry
from elastic.cli.flags import described

COMMANDS: dict[str, Callable[..., None]] = {
    "run": run,
    "scenarios": scenarios,
    "suite": suite,
    "kill-rank": demo,
    "soak": soak,
    "churn": churn,
    "simulate": simulate,
    "planted": planted,
    "mutants": planted,
    "replay": replay,
    "check": check,
    "faults": faults,
    "failpoints": failpoints,
    "failpoint-matrix": failpoint_matrix,
    "report": report,
    "role-matrix": role_matrix,
}

app = typer.Typer(
    name="elastic-chaos",
    help="Prove that a killed rank loses, duplicates and alters nothing.",
    callback=described,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for name, command in COMMANDS.items():
    app.command(name)(command)


def main() -> None:
    """Entry point of the `elastic-chaos` script."""
    end_in_order()
    entry.run(app)
