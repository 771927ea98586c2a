"""`elastic init`, and the role commands: `elastic agent|engine|controller|gateway`, which `elastic serve` starts."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager

import msgspec
import typer

from elastic.cli.command import command
from elastic.serve.join_secret import network_of
from elastic.serve.listening import inherited_listeners
from elastic.serve.options import (
    AgentOptions,
    GatewayOptions,
    InitOptions,
    NetworkOptions,
    RoleOptions,
    StoreOptions,
)
from elastic.serve.probe import Report, probe
from elastic.serve.role_main import role
from elastic.serve.state_dir import ClusterAddress, StateDir, home
from elastic.serve.tokens import admin_token
from membership.base.errors import ConfigError
from membership.base.network import Network
from membership.store.records import ClusterConfig


def _find(options: StoreOptions) -> tuple[ClusterAddress, StateDir]:
    """The cluster's store and state directory. What is not given is taken from the cluster served last."""
    if options.etcd and options.cluster:
        state = StateDir(options.state_dir or home() / options.cluster)
        state.make()
        address = ClusterAddress(cluster=options.cluster, etcd=options.etcd, credentials=options.credentials())
        return address, state
    if options.etcd or options.cluster:
        raise ConfigError("--etcd and --cluster go together", hint="give both, or neither and --state-dir")
    state = StateDir(options.state_dir) if options.state_dir else StateDir.last_served()
    address = state.address()
    return msgspec.structs.replace(address, credentials=options.credentials(address.credentials)), state


def _network(options: NetworkOptions, address: ClusterAddress) -> Network | None:
    return network_of(options.advertise, options.join_secret_file, address.cluster, options.port_range)


def _probe(options: RoleOptions, address: ClusterAddress, state: StateDir) -> AbstractContextManager[Report]:
    """How the role says that it does its part, and what has happened to it."""
    metrics: Callable[[], bytes] = bytes
    if options.probe_port is not None:  # else it cannot be asked
        from elastic.gateway.event_metrics import RoleMetrics  # now: it takes long, and later steps would wait for it

        metrics = RoleMetrics(state.events, address.cluster).exposition
    return probe(options.advertise, options.probe_port, metrics)


@command
def init(options: InitOptions) -> None:
    """Write what roles need before they begin: the cluster's config and size. Run again, it changes nothing.

    `elastic serve` does this by itself. A cluster that spans hosts needs the join secret here, too.
    """
    from elastic.serve.init_config import run_init
    from membership.base.logs import configure

    configure("init")
    run_init(options, typer.echo)


@command
def controller(options: RoleOptions) -> None:
    """Plan the cluster's membership and commit it as epochs. One controller leads, others stand by."""
    from membership.planning.controller import run_controller
    from workers.queue.network import require_joined

    address, state = _find(options)
    with role("controller", address, state.events, options.limit, options.etcd_wait_s) as (store, stop, events):
        network = _network(options, address)
        with _probe(options, address, state) as report:

            def admit(config: ClusterConfig) -> None:
                require_joined(config, network)
                report("")

            run_controller(store, address.cluster, options.node, stop, events, admit=admit)


@command
def agent(options: AgentOptions) -> None:
    """Start and supervise this host's ranks as assigned.

    SIGTERM first hands the ranks over to other hosts, if there are any; a second one ends them and the agent at once.
    """
    from workers.agent.agent import AgentOptions as Options
    from workers.agent.agent import run_agent
    from workers.model.code import code_version

    address, state = _find(options)
    with role("agent", address, state.events, options.limit, options.etcd_wait_s) as (store, stop, events):
        network = _network(options, address)
        capacity = options.capacity or 0
        model, grace_s = options.local_model, options.drain_grace_s
        with _probe(options, address, state) as report:
            code = code_version() if network is not None else ""
            how = Options(
                worker_class=options.worker_class,
                spares=options.spares,
                drain_grace_s=grace_s,
                capacity=capacity,
                model=model,
                network=network,
                report=report,
                code=code,
                machine=options.machine,
                zone=options.zone,
                killable=options.allow_kill,
                keep=state.model_files,
            )
            run_agent(store, address.cluster, options.node, stop, events, how, stop.hurry)


@command
def engine(options: RoleOptions) -> None:
    """Batch requests and run steps over all ranks. One engine is active, others stand by."""
    from elastic.engine.role import run_terms

    address, state = _find(options)
    with role("engine", address, state.events, options.limit, options.etcd_wait_s) as (store, stop, events):
        network = _network(options, address)
        with _probe(options, address, state) as report:
            run_terms(store, address.cluster, options.node, stop, events, network, report)


@command
def gateway(options: GatewayOptions) -> None:
    """Serve HTTP: OpenAI API, health, metrics and admin API. Any number of gateways can run."""
    address, state = _find(options)  # before imports that take long
    from elastic.gateway.admin_token import AdminToken
    from elastic.gateway.app import GatewaySettings, run_gateway

    settings = GatewaySettings(
        name=options.name or f"{socket.gethostname()}-{os.getpid()}",
        state_dir=state.path,
        admin_token=AdminToken(admin_token(os.environ.get("ELASTIC_ADMIN_TOKEN", "")), options.admin_token_file),
        host=options.host,
        port=options.port,
        admin_host=options.admin_host,
        admin_port=options.admin_port,
        max_connections=options.max_connections,
        listeners=inherited_listeners(),
        grace_s=options.stop_grace_s,
        api=options,
        network=_network(options, address),
        node=options.node,
        model=options.local_model,
    )
    with role("gateway", address, state.events, options.limit, options.etcd_wait_s) as (store, stop, events):
        run_gateway(store, address.cluster, settings, stop, events, stop.hurry)


def add_to(app: typer.Typer) -> None:
    """Register the role commands."""
    for each in (init, controller, agent, engine, gateway):
        app.command(rich_help_panel="Roles")(each)
