"""Flags that several commands share, and how a command reports errors: one line on stderr that says what to do next."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from membership.base.errors import ElasticError

if TYPE_CHECKING:
    from elastic.cli.client import Client


class Output(StrEnum):
    """What `-o` takes."""

    TEXT = "text"
    JSON = "json"


StateDirFlag = Annotated[
    Path | None,
    typer.Option("--state-dir", envvar="ELASTIC_STATE_DIR", help="Directory of a cluster served from this machine."),
]
AdminFlag = Annotated[
    str | None, typer.Option("--admin", envvar="ELASTIC_ADMIN", help="URL of a gateway's admin port.")
]
AdminTokenFlag = Annotated[
    str | None, typer.Option("--admin-token", envvar="ELASTIC_ADMIN_TOKEN", help="Token of the admin port.")
]
EtcdFlag = Annotated[
    str | None, typer.Option("--etcd", envvar="ELASTIC_ETCD", help="etcd URLs, comma-separated.", metavar="URLS")
]
ClusterFlag = Annotated[
    str | None, typer.Option("--cluster", envvar="ELASTIC_CLUSTER", help="Name of the cluster in that etcd.")
]
OutputFlag = Annotated[Output, typer.Option("-o", "--output", help="text for people, json for programs.")]

RestartIntensityFlag = Annotated[
    int, typer.Option("--restart-intensity", help="Set a slot aside at so many deaths within --restart-window.")
]
RebalanceBudgetFlag = Annotated[
    str, typer.Option("--rebalance-budget", help="Weights that one background rebalance may load; 0: never rebalance.")
]
LoadBandwidthFlag = Annotated[
    str, typer.Option("--load-bandwidth", help="Of the checkpoint, per second and host, while serving; 0: no cap.")
]
CoverageDeadlineFlag = Annotated[
    str, typer.Option("--coverage-deadline", help="How long a request waits for lost experts before it gets a 503.")
]

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
    return round(float(match[1]) * (1024.0 if match[3] else 1000.0) ** " kMGT".index(match[2] or " "))


def write_json(value: Any) -> None:
    """One line of JSON on stdout; a record with all its fields, also those that have their default."""
    value = msgspec.structs.asdict(value) if isinstance(value, msgspec.Struct) else value
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()


def fail(error: ElasticError) -> typer.Exit:
    """Write the error as one line on stderr; raise what this returns."""
    hint = f" ({error.hint})" if error.hint else ""
    typer.echo(f"error: {error}{hint}".replace("\n", " "), err=True)
    return typer.Exit(1)


@contextmanager
def reported() -> Iterator[None]:
    """Turn our errors into that line and exit status 1."""
    try:
        yield
    except ElasticError as error:
        raise fail(error) from None


@contextmanager
def interruptible(*numbers: signal.Signals) -> Iterator[threading.Event]:
    """A stop event that Ctrl-C (or these signals) sets, for the length of a block."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in numbers or (signal.SIGINT,)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def find_cluster(
    state_dir: Path | None, admin: str | None, admin_token: str | None, etcd: str | None, cluster: str | None
) -> AbstractContextManager[Client]:
    """See elastic/cli/client.py, which takes long to import: most processes of a cluster never need it."""
    from elastic.cli import client

    return client.find_cluster(state_dir, admin, admin_token, etcd, cluster)
