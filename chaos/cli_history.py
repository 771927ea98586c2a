"""`elastic-chaos check`: what clients saw, judged again from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chaos.history import compare, load
from elastic.options import Output, OutputFlag, reported, write_json


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
