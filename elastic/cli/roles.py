"""The role commands: `elastic agent|engine|controller|gateway`. `elastic serve` starts these; so does a pod."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Annotated

import typer

from elastic.cli.flags import reported, seconds
from elastic.serve.role_main import run_role
from elastic.serve.state_dir import StateDir, home
from membership.base.errors import ConfigError
from membership.base.events import EventLog
from membership.store.interface import Store

EtcdFlag = Annotated[str | None, typer.Option("--etcd", envvar="ELASTIC_ETCD", help="etcd URLs, comma-separated.")]
ClusterFlag = Annotated[str | None, typer.Option("--cluster", envvar="ELASTIC_CLUSTER", help="Name of the cluster.")]
HOST = socket.gethostname()
NodeFlag = Annotated[str, typer.Option(envvar="ELASTIC_NODE", help="Name of this host in the cluster.")]
StateDirFlag = Annotated[
    Path | None, typer.Option("--state-dir", envvar="ELASTIC_STATE_DIR", help="Where the event history goes.")
]


def _where(etcd: str | None, cluster: str | None, state_dir: Path | None) -> tuple[list[str], str, StateDir]:
    """Endpoints, cluster name and state directory; what is not given comes from the cluster served last."""
    if etcd and cluster:
        state = StateDir(state_dir) if state_dir else StateDir(home() / cluster)
        state.path.mkdir(parents=True, exist_ok=True)
        return etcd.split(","), cluster, state
    if etcd or cluster:
        raise ConfigError("--etcd and --cluster go together", hint="give both, or neither and --state-dir")
    state = StateDir(state_dir) if state_dir else StateDir.last_served()
    address = state.address()
    return list(address.etcd), address.cluster, state


def controller(
    etcd: EtcdFlag = None,
    cluster: ClusterFlag = None,
    state_dir: StateDirFlag = None,
    node: NodeFlag = HOST,
) -> None:
    """Turn desired and observed membership into epochs. One leads, others stand by."""
    with reported():
        from membership.planning.controller import run_controller

        endpoints, name, state = _where(etcd, cluster, state_dir)
        run_role(
            "controller", endpoints, str(state.events),
            lambda store, stop, events: run_controller(store, name, node, stop, events),
        )  # fmt: skip


def agent(
    etcd: EtcdFlag = None,
    cluster: ClusterFlag = None,
    state_dir: StateDirFlag = None,
    node: NodeFlag = HOST,
    worker_class: Annotated[
        str, typer.Option(help="module:Class of the worker that ranks run.")
    ] = "workers.rank.worker:EPWorker",
    spares: Annotated[int, typer.Option(min=0, help="Keep so many warm spares on this host.")] = 0,
    drain_grace: Annotated[
        str,
        typer.Option(help="On SIGTERM, hand over to ranks of other hosts first, for so long; 0: end at once."),
    ] = "60s",
) -> None:
    """Spawn and supervise this host's ranks as assigned. SIGTERM drains them, if others serve; a second one ends it."""
    with reported():
        from workers.agent.agent import run_agent

        endpoints, name, state = _where(etcd, cluster, state_dir)
        grace_s = seconds(drain_grace)
        run_role(
            "agent", endpoints, str(state.events),
            lambda store, stop, events: run_agent(
                store, name, node, stop, events, worker_class, spares=spares, drain_grace_s=grace_s
            ),
        )  # fmt: skip


def engine(
    etcd: EtcdFlag = None,
    cluster: ClusterFlag = None,
    state_dir: StateDirFlag = None,
    node: NodeFlag = HOST,
) -> None:
    """Batch requests and drive steps over all ranks. One is active, others stand by."""
    with reported():
        from elastic.engine.role import run_terms

        endpoints, name, state = _where(etcd, cluster, state_dir)
        run_role(
            "engine", endpoints, str(state.events),
            lambda store, stop, events: run_terms(store, name, node, stop, events),
        )  # fmt: skip


def gateway(
    etcd: EtcdFlag = None,
    cluster: ClusterFlag = None,
    state_dir: StateDirFlag = None,
    name: Annotated[str, typer.Option(help="Name of this gateway; default: host and process id.")] = "",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the OpenAI-compatible API.")] = 8000,
    admin_port: Annotated[int, typer.Option(help="Port of the admin API.")] = 8001,
) -> None:
    """Answer HTTP: OpenAI API, health, metrics, admin. Run as many as you like."""
    with reported():
        from elastic.gateway.app import run_gateway

        endpoints, cluster_name, state = _where(etcd, cluster, state_dir)
        token = os.environ.get("ELASTIC_ADMIN_TOKEN", "")

        def body(store: Store, stop: threading.Event, events: EventLog) -> None:
            me = name or f"{socket.gethostname()}-{os.getpid()}"
            run_gateway(store, cluster_name, me, host, port, host, admin_port, token, stop, events, state.path)

        run_role("gateway", endpoints, str(state.events), body)


def add_to(app: typer.Typer) -> None:
    """Register the role commands."""
    for command in (controller, agent, engine, gateway):
        app.command(rich_help_panel="Roles")(command)
