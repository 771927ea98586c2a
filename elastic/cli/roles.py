"""The role commands: `elastic agent|engine|controller|gateway`. `elastic serve` starts these; so does a pod."""

from __future__ import annotations

import os
import socket

import typer

from elastic.cli.command import command
from elastic.serve.options import AgentOptions, GatewayOptions, RoleOptions, StoreOptions
from elastic.serve.role_main import role
from elastic.serve.state_dir import StateDir, home
from membership.base.errors import ConfigError


def _find(options: StoreOptions) -> tuple[tuple[str, ...], str, StateDir]:
    """Endpoints, cluster name and state directory. What is not given is taken from the cluster served last."""
    if options.etcd and options.cluster:
        state = StateDir(options.state_dir or home() / options.cluster)
        state.path.mkdir(parents=True, exist_ok=True)
        return options.etcd, options.cluster, state
    if options.etcd or options.cluster:
        raise ConfigError("--etcd and --cluster go together", hint="give both, or neither and --state-dir")
    state = StateDir(options.state_dir) if options.state_dir else StateDir.last_served()
    address = state.address()
    return address.etcd, address.cluster, state


@command
def controller(options: RoleOptions) -> None:
    """Plan the cluster's membership and commit it as epochs. One controller leads, others stand by."""
    from membership.planning.controller import run_controller

    endpoints, cluster, state = _find(options)
    with role("controller", endpoints, state.events) as (store, stop, events):
        run_controller(store, cluster, options.node, stop, events)


@command
def agent(options: AgentOptions) -> None:
    """Start and supervise this host's ranks as assigned.

    SIGTERM first hands the ranks over to other hosts, if there are any; a second SIGTERM ends the agent at once.
    """
    from workers.agent.agent import AgentOptions as Options
    from workers.agent.agent import run_agent

    endpoints, cluster, state = _find(options)
    with role("agent", endpoints, state.events) as (store, stop, events):
        how = Options(options.worker_class, options.spares, options.drain_grace_s)
        run_agent(store, cluster, options.node, stop, events, how)


@command
def engine(options: RoleOptions) -> None:
    """Batch requests and run steps over all ranks. One engine is active, others stand by."""
    from elastic.engine.role import run_terms

    endpoints, cluster, state = _find(options)
    with role("engine", endpoints, state.events) as (store, stop, events):
        run_terms(store, cluster, options.node, stop, events)


@command
def gateway(options: GatewayOptions) -> None:
    """Serve HTTP: OpenAI API, health, metrics and admin API. Any number of gateways can run."""
    from elastic.gateway.app import GatewaySettings, run_gateway

    endpoints, cluster, state = _find(options)
    settings = GatewaySettings(
        name=options.name or f"{socket.gethostname()}-{os.getpid()}",
        state_dir=state.path,
        admin_token=os.environ.get("ELASTIC_ADMIN_TOKEN", ""),
        host=options.host,
        port=options.port,
        admin_port=options.admin_port,
    )
    with role("gateway", endpoints, state.events) as (store, stop, events):
        run_gateway(store, cluster, settings, stop, events)


def add_to(app: typer.Typer) -> None:
    """Register the role commands."""
    for each in (controller, agent, engine, gateway):
        app.command(rich_help_panel="Roles")(each)
