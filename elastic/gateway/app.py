"""The gateway process: binds its ports, follows the store, talks to the engine, answers HTTP, and ends with grace."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
import structlog
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from elastic.gateway import health, openai, tokenization
from elastic.gateway.access import Access
from elastic.gateway.admin import Admin, admin_app
from elastic.gateway.admin_token import AdminToken
from elastic.gateway.answer.formats import format_for
from elastic.gateway.engine_link import EngineLink, LinkSettings
from elastic.gateway.http import new_app
from elastic.gateway.key_ring import KeyRing
from elastic.gateway.live import Live
from elastic.gateway.metrics import GatewayMetrics
from elastic.gateway.model_files import kept_files
from elastic.gateway.page import with_page
from elastic.gateway.registration import Registration
from elastic.gateway.server import Server
from elastic.gateway.tokenizer import Tokenizer
from elastic.serve.listening import ADMIN_CONNECTIONS, Listeners, is_loopback, listening, most_connections, urls_of
from elastic.serve.options import ApiOptions
from elastic.serve.origins import origins_of
from elastic.serve.state_dir import MODEL_FILES, StateDir
from elastic.serve.tls import certificates_of
from membership.base import descriptors
from membership.base.enums import GenerationConfig
from membership.base.errors import ElasticError, RequestError
from membership.base.events import EventLog
from membership.base.network import Network
from membership.base.timing import STOP_GRACE_S
from membership.store.interface import Store
from membership.store.mirror import Mirror
from membership.store.records import ClusterConfig, ClusterState, GatewayRecord
from workers.bulk.model_files import model_directory
from workers.model.text_files import SamplingDefaults, not_applied, sampling_defaults
from workers.queue.network import join_keys, require_joined

STOP_POLL_S = 0.1
CLOSE_TIMEOUT_S = 5
HURRIED_S = 0.5  # for the last words to clients, once the stop is hastened

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class GatewaySettings:
    """Where a gateway listens, and how it behaves. Port 0 takes any free one; without a token the admin API is off.

    `listeners`: sockets that are bound already, instead of the addresses.
    """

    name: str
    state_dir: Path
    admin_token: AdminToken
    host: str = "127.0.0.1"
    port: int = 0
    admin_host: str = "127.0.0.1"
    admin_port: int = 0
    max_connections: int | None = None
    listeners: Listeners | None = None
    grace_s: float = STOP_GRACE_S  # for open streams when the gateway is stopped
    link: LinkSettings = field(default_factory=LinkSettings)
    api: ApiOptions = field(default_factory=ApiOptions)
    network: Network | None = None  # how an engine on another host is reached
    node: str = ""  # this host's name in the cluster
    model: str = ""  # this host's copy of the checkpoint, if it is not where the config says


@dataclass
class Gateway:
    """All parts of a running gateway."""

    config: ClusterConfig
    mirror: Mirror
    link: EngineLink
    readiness: health.Readiness
    public: Server
    admin: Server
    grace_s: float
    hurry: threading.Event  # once it is set, no stream is waited for


def run_gateway(
    store: Store,
    cluster: str,
    settings: GatewaySettings,
    stop: threading.Event,
    events: EventLog,
    hurry: threading.Event | None = None,
) -> None:
    """Serve until `stop` is set, then let open streams end within the grace, or until `hurry` is set.

    ConfigError: a port is taken, or the model has no usable tokenizer.
    """
    name = settings.name
    note = partial(events.emit, cluster=cluster)
    most = most_connections(descriptors.limit(), settings.max_connections)
    certificates = certificates_of(settings.api)
    with (
        listening(settings, settings.listeners) as bound,
        Mirror(store, cluster) as mirror,
    ):
        config = _config(mirror, settings, stop)
        if config is None:
            return
        link = EngineLink(
            name, settings.link, network=settings.network, max_open=settings.api.max_open_requests, note=note
        )
        readiness = health.Readiness(link, mirror.state, lambda: mirror.trouble)
        history = StateDir(settings.state_dir).events
        keys = KeyRing(settings.api.api_key, settings.api.api_key_file)
        metrics = GatewayMetrics(mirror.state, history, cluster, keys)
        metrics.follow_load(link, config.served_model_name if settings.api.metrics_aliases else "")
        service = _service(config, settings, link, metrics)
        access = Access(
            public_app(service, readiness),
            keys,
            logged=settings.api.access_log,
            certified=settings.api.ssl_cert_reqs == 2,
        )
        public = for_browsers(access, settings.api)
        live = Live(mirror, history, metrics.traffic, lambda: readiness.stopping)
        admin = admin_app(
            Admin(store, cluster, mirror, settings.admin_token, history, lambda: readiness.stopping, live)
        )
        servers = (
            Server(public, bound.api, settings.grace_s, most, urgent=health.PATHS, certificates=certificates),
            Server(
                with_page(admin),
                bound.admin,
                1.0,
                ADMIN_CONNECTIONS,
                certificates=None if is_loopback(bound.admin) else certificates,
            ),
        )
        url, admin_url = urls_of(bound, _host_name(settings), tls=certificates is not None)
        record = GatewayRecord(name=name, pid=os.getpid(), url=url, admin_url=admin_url, node=settings.node)
        gateway = Gateway(config, mirror, link, readiness, *servers, settings.grace_s, hurry or threading.Event())
        with Registration(store, cluster, record, config.lease_ttl_s, partial(join_keys, settings.network)):
            note("gateway_started", name=name, url=record.url)
            asyncio.run(_serve(gateway, stop))
            note("gateway_stopped", name=name)


def _config(mirror: Mirror, settings: GatewaySettings, stop: threading.Event) -> ClusterConfig | None:
    """The cluster's, with the checkpoint (but for weights) where this host has it; None if asked to stop first."""
    config = mirror.wait_for_config(stop)
    if config is not None:
        require_joined(config, settings.network)
        keep = settings.state_dir / MODEL_FILES
        model = model_directory(mirror, settings.model, settings.node, keep, settings.network, stop)
        config = msgspec.structs.replace(config, model=model or config.model)
    return config


def _host_name(settings: GatewaySettings) -> str:
    """Of a gateway that listens at all of its host's addresses."""
    return settings.network.address if settings.network is not None else socket.gethostname()


def _service(
    config: ClusterConfig, settings: GatewaySettings, link: EngineLink, metrics: GatewayMetrics
) -> openai.Service:
    files = kept_files(config, settings.state_dir)
    sampling = SamplingDefaults()
    if settings.api.generation_config is GenerationConfig.MODEL:
        sampling = sampling_defaults(files)
        if ignored := not_applied(files):
            log.warning("generation_config_not_applied", keys=ignored)
    tokenizer, api = Tokenizer(files), settings.api
    return openai.Service(
        config,
        tokenizer,
        link,
        metrics,
        started=time.time(),
        sampling=sampling,
        tool_calls=format_for(api.tool_call_parser, tokenizer.tool_template_text),
        reasoning=api.reasoning_parser,
    )


def public_app(service: openai.Service, readiness: health.Readiness) -> FastAPI:
    """The application of the API port."""
    app = new_app("elastic-ep")
    openai.add_routes(app, service)
    tokenization.add_routes(app, service)
    health.add_routes(app, readiness, service.metrics)
    return app


def for_browsers(app: ASGIApp, api: ApiOptions) -> ASGIApp:
    """The application as pages of other origins may use it, if they may (CORS)."""
    allowed = origins_of(api)
    if not allowed.origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=allowed.origins,
        allow_methods=allowed.methods or ["*"],
        allow_headers=allowed.headers or ["*"],
        allow_credentials=api.allow_credentials,
        expose_headers=["X-Request-Id", "Retry-After"],
    )


async def _serve(gateway: Gateway, stop: threading.Event) -> None:
    """Run all parts until `stop`, then drain. A part that ends by itself is a failure of the gateway."""
    async with _following(gateway.mirror, gateway.link):
        parts = {
            asyncio.create_task(gateway.link.run(), name="engine link"),
            asyncio.create_task(gateway.public.serve(), name="public server"),
            asyncio.create_task(gateway.admin.serve(), name="admin server"),
        }
        stopped = asyncio.create_task(_set(stop), name="stop")
        try:
            done, _ = await asyncio.wait({*parts, stopped}, return_when="FIRST_COMPLETED")
            if stopped in done:
                await _drain(gateway, parts)
            for part in done - {stopped}:
                raise ElasticError(f"the gateway's {part.get_name()} ended by itself") from part.exception()
        finally:
            stopped.cancel()
            for part in parts:
                part.cancel()
            await asyncio.gather(stopped, *parts, return_exceptions=True)


async def _drain(gateway: Gateway, parts: set[asyncio.Task[None]]) -> None:
    """Take no more requests. Let the open ones end within the grace, then fail those that are left."""
    link = gateway.link
    gateway.readiness.stopping = True
    link.refusal = "this gateway is shutting down"
    log.info("gateway_draining", open_requests=len(link.journal), grace_s=gateway.grace_s)
    ends = {asyncio.create_task(link.drained(gateway.grace_s)), asyncio.create_task(_set(gateway.hurry))}
    _, late = await asyncio.wait(ends, return_when="FIRST_COMPLETED")
    for end in late:
        end.cancel()
    link.fail_open(RequestError(link.refusal, status=503, code="shutting_down", retry_after_s=1.0))
    gateway.public.should_exit = gateway.admin.should_exit = True
    servers = {part for part in parts if part.get_name().endswith("server")}
    grace_s = HURRIED_S if gateway.hurry.is_set() else gateway.grace_s + CLOSE_TIMEOUT_S
    await asyncio.wait(servers, timeout=grace_s)


async def _set(stop: threading.Event) -> None:
    # Not waited for in a thread of its own: there may be none to be had.
    while not stop.is_set():  # noqa: ASYNC110 - signal handlers and other threads set it
        await asyncio.sleep(STOP_POLL_S)


@asynccontextmanager
async def _following(mirror: Mirror, link: EngineLink) -> AsyncIterator[None]:
    """Pass each state on from the mirror's thread to the link's."""
    loop = asyncio.get_running_loop()

    def forward(state: ClusterState) -> None:
        with suppress(RuntimeError):  # the loop has just been closed: no one needs the state
            loop.call_soon_threadsafe(link.on_state, state)

    end: Callable[[], None] = mirror.subscribe(forward)
    try:
        link.on_state(mirror.state())
        yield
    finally:
        end()
