"""What the commands of `elastic-chaos` share: flags, a cluster of their own, progress on stderr, receipts."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from typer import style

from chaos.campaigns.campaign import Campaign, Notify, Receipt
from chaos.campaigns.targets import LocalTarget
from chaos.target.checkpoint import checkpoint
from chaos.target.cluster import ServedCluster
from elastic.cli.flags import Output, write_json
from elastic.serve.options import ServeOptions, option
from membership.base.enums import Device
from membership.base.errors import ConfigError
from membership.base.starter import end_with_starter

RanksFlag = Annotated[int, typer.Option(min=1, help="Ranks to serve with.")]
ModelFlag = Annotated[Path | None, typer.Option(help="Serve this checkpoint instead of the shipped one.")]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every recorded run may be given."""

    seed: int | None = option(None, "Chooses what happens, and the sampled requests.")
    model: Path | None = option(None, "Serve this checkpoint instead of the shipped one.")
    record: Path | None = option(None, "Also save all that happened, for check and report.")
    device: Device = option(ServeOptions.device, "Where ranks compute (auto = a GPU if there is one).")

    def refuse_device(self, where: str) -> None:
        """ConfigError if a device is asked for, which has no effect there."""
        if self.device != ServeOptions.device:
            raise ConfigError("--device goes with a cluster of the run's own, on one host", hint=f"leave out {where}")


def device_flags(device: Device) -> tuple[str, ...]:
    """What `elastic serve` is given for it."""
    return () if device == ServeOptions.device else ("--device", device)


def end_in_order() -> None:
    """SIGTERM, a closed terminal and the end of our starter end a command as an error would: in order.

    If it does not come to that (SIGKILL, a crash), what it started ends by itself: see `membership/base/starter.py`.
    """
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]

    def end(number: int, frame: FrameType | None) -> None:
        for each in numbers:  # the first one is enough: a shell tells of a closed terminal after the kernel has
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for each in numbers:
        signal.signal(each, end)
    end_with_starter()


def progress() -> Notify:
    """Report steps on stderr, each with the seconds since now."""
    began = time.monotonic()
    return lambda step: typer.echo(f"{time.monotonic() - began:6.1f} s  {step}", err=True)


@contextmanager
def served(
    model: Path | None, ranks: int, flags: Sequence[str] = (), *, seed: int | None = None
) -> Iterator[tuple[ServedCluster, Notify]]:
    """A cluster for one command, and its progress."""
    with tempfile.TemporaryDirectory(prefix="elastic-ep-chaos-") as folder:
        path = checkpoint(model, Path(folder))
        if seed is not None:
            typer.echo(f"seed {seed}", err=True)
        notify = progress()
        with ServedCluster(path, ranks, state_dir=Path(folder) / "state", flags=flags) as cluster:
            yield cluster, notify


def run_on_own_cluster(run: Campaign, options: RunOptions, flags: Sequence[str] = ()) -> None:
    """Run a campaign on a cluster that is served for it, and save its record if that was asked for."""
    flags = (*flags, *device_flags(options.device))
    with served(options.model, run.ranks, flags, seed=run.seed) as (cluster, notify):
        run.run(LocalTarget(cluster), notify)
    save_record(run, options.record)


def save_record(run: Campaign, path: Path | None) -> None:
    """Save the record of a run, if a path is given."""
    if path is not None and run.recorder is not None:
        run.recorder.write(path)


def finish(ok: bool, result: object, lines: Iterable[str], output: Output) -> NoReturn:
    """Print a result, as JSON or as lines of text; exit 1 if it is not what it should be."""
    if output is Output.JSON:
        write_json(result)
    else:
        for line in lines:
            typer.echo(line)
    raise typer.Exit(0 if ok else 1)


def show_receipt(receipt: Receipt, done: str, output: Output) -> NoReturn:
    """Print what a campaign proved; exit 1 if a promise broke."""
    if output is Output.TEXT:
        refused = getattr(receipt, "non_2xx", None)
        kinds = f"{receipt.lost} lost, {receipt.duplicated} duplicated, {receipt.altered} altered"
        verdict = style("every promise held", fg="green") if receipt.ok else style("a promise broke", fg="red")
        more = "" if refused is None else f", {refused} refused"
        typer.echo(f"{verdict}: {done + ', ' if done else ''}{receipt.requests} requests, {kinds}{more}")
        for line in receipt.broken:
            typer.echo(f"  - {line}")
    write_json(receipt)
    raise typer.Exit(0 if receipt.ok else 1)
