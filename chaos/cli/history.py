"""`elastic-chaos check`: a run, checked again from its file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from chaos.check.checker import check_record, table
from chaos.record.record import read
from chaos.workload.history import Saved, compare, load
from elastic.cli.command import command
from elastic.cli.flags import Output, OutputFlag, write_json
from membership.base.errors import ConfigError


@command
def check(
    file: Annotated[Path, typer.Argument(help="The record of a run, or a history saved with --history.")],
    output: OutputFlag = Output.TEXT,
) -> None:
    """Check the record of a run, promise by promise. Exit 1 if one broke, or if there was nothing to check."""
    if not file.is_file():
        raise ConfigError(f"there is no file {file}")
    saved = _older(file)
    if saved is not None:
        _compare(saved, output)
    verdict = check_record(read(file))
    if output is Output.JSON:
        write_json(verdict)
    else:
        for line in table(verdict):
            typer.echo(line)
    raise typer.Exit(0 if verdict.ok else 1)


def _older(file: Path) -> Saved | None:
    """The file as a history and its oracle alone; None if it is a record of lines."""
    with file.open("rb") as opened:
        return load(file) if opened.read(10).startswith(b'{"history"') else None


def _compare(saved: Saved, output: Output) -> NoReturn:
    """Compare a saved history with its oracle."""
    verdict = compare(saved.history, saved.oracle)
    if output is Output.JSON:
        write_json(verdict)
    else:
        for found in verdict.differences:
            typer.echo(f"request {found.prompt} {found.kind}: {found.explanation}")
        typer.echo(f"{verdict.requests} requests, {len(verdict.differences)} differences")
    raise typer.Exit(0 if verdict.ok else 1)
