"""`elastic demo`: the product in a minute. Serve, stream, scale, kill, recover, and a receipt that was measured."""

from __future__ import annotations

import string
import tempfile
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from rich.live import Live

from chaos.campaigns.campaign import Campaign, Notify, Receipt, seed_of
from chaos.campaigns.kill_host import KillHost
from chaos.campaigns.kill_rank import KillRank
from chaos.campaigns.targets import LocalTarget
from chaos.campaigns.view import picture
from chaos.cli.shared import device_flags, end_in_order, progress, show_receipt
from chaos.target.checkpoint import checkpoint
from chaos.target.cluster import Cluster, ServedCluster
from chaos.target.host_cluster import HostCluster
from chaos.target.hosts import made_hosts
from chaos.workload.history import save
from elastic.cli.command import command
from elastic.cli.flags import Output, OutputFlag, write_json
from elastic.serve.etcd_server import EtcdServer
from elastic.serve.options import ServeOptions, option
from membership.base.enums import Device
from membership.base.errors import ConfigError

FRAME_S = 0.25


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What a demo may be given."""

    ranks: int = option(4, "Ranks to start with; the demo goes to two more and back.")
    hosts: int = option(
        1, "Several: each is a network namespace, and a host is killed.", minimum=1, maximum=len(string.ascii_lowercase)
    )
    device: Device = option(ServeOptions.device, "Where ranks compute (auto = a GPU if there is one).")
    seconds: float = option(10.0, "Stream at least this long.")
    seed: int | None = option(None, "Chooses the victim and the sampled requests.")
    plain: bool = option(False, "Lines instead of a live picture.", names=("--plain",))
    model: Path | None = option(None, "Serve this checkpoint instead of the shipped one.")
    history: Path | None = option(None, "Also save what the clients saw, for elastic-chaos check.")


@command
def demo(options: DemoOptions, output: OutputFlag = Output.TEXT) -> None:
    """Serve a MoE model, stream, scale, kill -9 a rank, recover; print the receipt. Exit 1 if a promise broke.

    With --hosts N: over N hosts, of which one is killed with all its processes. Skipped where no hosts can be made.
    """
    end_in_order()
    if options.hosts > 1:
        on_hosts(options, output)
        return
    run = KillRank(seed=seed_of(options.seed), ranks=options.ranks, at_least_s=options.seconds)
    with tempfile.TemporaryDirectory(prefix="elastic-ep-demo-") as folder:
        path = checkpoint(options.model, Path(folder))
        flags = device_flags(options.device)
        with ServedCluster(path, options.ranks, state_dir=Path(folder) / "state", flags=flags) as cluster:
            _play(cluster, run, plain=options.plain or output is Output.JSON)
            receipt = run.receipt(cluster.events())
    _finish(run, receipt, options.history, output)


def on_hosts(options: DemoOptions, output: Output) -> None:
    """The same over several hosts. Where none can be made, say why: nothing was proven, and nothing broke.

    ConfigError if a device is asked for, which has no effect there.
    """
    if options.device != ServeOptions.device:
        raise ConfigError("--device goes with one host", hint="leave out --hosts, or --device")
    names = string.ascii_lowercase[: options.hosts]
    run = KillHost(seed=seed_of(options.seed), ranks=options.ranks, at_least_s=options.seconds)
    with ExitStack() as opened:
        try:
            hosts = opened.enter_context(made_hosts(*names))
        except ConfigError as error:
            if output is Output.JSON:
                write_json({"skipped": str(error)})
            typer.echo(f"skipped: {error} ({error.hint})", err=True)
            return
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="elastic-ep-demo-")))
        etcd = opened.enter_context(EtcdServer(folder / "etcd", address=hosts.outside))
        cluster = HostCluster(hosts, etcd.url, folder, gateway=names[1])
        opened.callback(cluster.close)
        run.serve(cluster, checkpoint(options.model, folder))
        _play(cluster, run, plain=options.plain or output is Output.JSON)
        receipt = run.receipt(cluster.events())
    _finish(run, receipt, options.history, output)


def _finish(run: Campaign, receipt: Receipt, history: Path | None, output: Output) -> NoReturn:
    if history is not None:
        save(history, run.history, run.oracle)
    show_receipt(receipt, "", output)


def _play(cluster: Cluster, run: Campaign, *, plain: bool) -> None:
    """Run it, its steps as lines or under a live picture."""
    console = Console(stderr=True)
    if plain or not console.is_terminal:
        run.run(LocalTarget(cluster), progress())
        return
    step = ["starting"]
    ended = threading.Event()
    notify: Notify = lambda now: step.__setitem__(0, now)  # noqa: E731
    with Live(console=console, refresh_per_second=8) as live:
        painter = threading.Thread(target=_paint, args=(cluster, run, step, live, ended), name="painter", daemon=True)
        painter.start()
        try:
            run.run(LocalTarget(cluster), notify)
        finally:
            ended.set()
            painter.join(timeout=5.0)


def _paint(cluster: Cluster, run: Campaign, step: list[str], live: Live, ended: threading.Event) -> None:
    while not ended.wait(FRAME_S):
        if (cluster.state.path / "cluster.json").exists():
            client = cluster.client()
            live.update(picture(client.status(), client.state(), run.workload, cluster.events(), step[0]))
