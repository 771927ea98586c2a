"""`elastic-chaos report`: the record of a run as one page to look at, and its figures as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from chaos.check.checker import check_record
from chaos.record.record import read
from chaos.report import figures, page
from chaos.report.promises import checked
from chaos.report.render import headline
from elastic.cli.command import command
from membership.base.errors import ConfigError


@command
def report(
    record: Annotated[Path, typer.Argument(help="The record of a run.", exists=True, dir_okay=False)],
    output: Annotated[
        Path | None, typer.Option("--output", help="The page; beside the record, as .html, if left out.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures here, as JSON; -: on stdout.")
    ] = None,
) -> None:
    """Draw a run as one self-contained HTML file: verdict, timeline, faults, gaps. Exit 1 if a promise broke."""
    lines = list(read(record))
    found = figures(lines, checked(check_record(lines).outcomes))
    target = output or record.with_suffix(".html")
    _write(target, page(found).encode())
    figured = msgspec.json.encode(found)
    if json is not None and str(json) != "-":
        _write(json, figured)
    typer.echo(figured if str(json) == "-" else f"{headline(found)}: {target}")
    raise typer.Exit(1 if found.verdict == "broke" else 0)


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
