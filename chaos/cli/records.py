"""`elastic-chaos check` and `report`: the record of a run, checked promise by promise, and drawn as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import msgspec
import typer

from chaos.check.checker import check_record, table
from chaos.cli.shared import finish
from chaos.record.record import read
from chaos.report import figures, page
from chaos.report.promises import checked
from chaos.report.render import headline
from chaos.report.stream import recording
from chaos.workload.history import Saved, compare, load
from elastic.cli.command import command
from elastic.cli.flags import Output, OutputFlag
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
    finish(verdict.ok, verdict, table(verdict), output)


def _older(file: Path) -> Saved | None:
    """The file as a history and its oracle alone; None if it is a record of lines."""
    with file.open("rb") as opened:
        return load(file) if opened.read(10).startswith(b'{"history"') else None


def _compare(saved: Saved, output: Output) -> NoReturn:
    """Compare a saved history with its oracle."""
    verdict = compare(saved.history, saved.oracle)
    shown = verdict.explained(len(verdict.differences))
    shown.append(f"{verdict.requests} requests, {len(verdict.differences)} differences")
    finish(verdict.ok, verdict, shown, output)


@command
def report(
    record: Annotated[Path, typer.Argument(help="The record of a run.", exists=True, dir_okay=False)],
    output: Annotated[
        Path | None, typer.Option("--output", help="The page; beside the record, as .html, if left out.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures here, as JSON; -: on stdout.")
    ] = None,
    stream: Annotated[
        Path | None, typer.Option("--stream", help="Also write the run here as a recording that the live page replays.")
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
    if stream is not None:
        _write(stream, b"".join(recording(lines)))
    typer.echo(figured if str(json) == "-" else f"{headline(found)}: {target}")
    raise typer.Exit(1 if found.verdict == "broke" else 0)


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
