"""What all commands share: output formats, durations, sizes and Ctrl-C."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.metadata import version
from types import FrameType
from typing import Annotated, Any

import msgspec
import typer

DISTRIBUTION = "elastic-ep"


class Output(StrEnum):
    """What `-o` takes."""

    TEXT = "text"
    JSON = "json"


OutputFlag = Annotated[Output, typer.Option("-o", "--output", help="text for people, json for programs.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"elastic-ep {version(DISTRIBUTION)}")
        raise typer.Exit


def described(
    asked: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What a command line of ours takes before its first command."""


LARGEST = 2.0**63  # bytes; an option refuses it
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}


def seconds(text: str) -> float:
    """`90`, `90s`, `5m`, `250ms`, `1h` as seconds; typer.BadParameter otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|)", text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a duration; write it like 90s or 5m")
    return float(match[1]) * _UNITS[match[2]]


def size(text: str) -> int:
    """`0`, `500MB`, `2GiB`, `1.5G/s` as bytes; typer.BadParameter otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kMGT])(i?)B?|B?)(?:/s)?", text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size; write it like 500MB or 2GiB")
    number = float(match[1]) * (1024.0 if match[3] else 1000.0) ** " kMGT".index(match[2] or " ")
    return round(min(number, LARGEST))


def write_json(value: Any) -> None:
    """One line of JSON on stdout, including record fields that have their default."""
    value = msgspec.structs.asdict(value) if isinstance(value, msgspec.Struct) else value
    sys.stdout.flush()
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")  # UTF-8 wherever it is printed
    sys.stdout.buffer.flush()


def show(value: Any, text: str, output: Output) -> None:
    """The value as JSON, or the text for people, as `-o` says."""
    if output is Output.JSON:
        write_json(value)
    else:
        typer.echo(text)


@contextmanager
def interruptible(*numbers: signal.Signals) -> Iterator[threading.Event]:
    """A stop event that Ctrl-C (or these signals) sets while the block runs. What is ignored (nohup) stays so."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    heeded = [n for n in numbers or (signal.SIGINT,) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, on_signal) for number in heeded}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
