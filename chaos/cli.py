"""The `elastic-chaos` command: run the kill-rank scenario against a model, and judge a saved history again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chaos.demo import demo
from chaos.history import compare, load
from elastic.options import Output, OutputFlag, reported, write_json

app = typer.Typer(
    name="elastic-chaos",
    help="Prove that a killed rank loses, duplicates and alters nothing.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("kill-rank")(demo)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="A history saved with --history.")], output: OutputFlag = Output.TEXT
) -> None:
    """Compare a saved history with its oracle again. Exit 1 if anything differs."""
    with reported():
        saved = load(file)
        verdict = compare(saved.history, saved.oracle)
        if output is Output.JSON:
            write_json(verdict)
        else:
            for found in verdict.differences:
                typer.echo(f"request {found.prompt} {found.kind}: {found.explanation}")
            typer.echo(f"{verdict.requests} requests, {len(verdict.differences)} differences")
        raise typer.Exit(0 if verdict.ok else 1)


def main() -> None:
    """Entry point of the `elastic-chaos` script."""
    app()
