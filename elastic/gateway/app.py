"""The gateway process: binds its ports, follows the store, talks to the engine, answers HTTP, and ends with grace."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import structlog
import uvicorn
from fastapi import FastAPI

from elastic.gateway import health, openai
from elastic.gateway.admin import Admin, admin_app
from elastic.gateway.engine_link import EngineLink, LinkSettings
from elastic.gateway.http import new_app
from elastic.gateway.metrics import GatewayMetrics
from elastic.gateway.registration import Registration
from elastic.gateway.tokenizer import Tokenizer
from elastic.serve.state_dir import StateDir
from membership.base.errors import ConfigError, ElasticError, RequestError
from membership.base.events import EventLog
from membership.store.interface import Store
from membership.store.mirror import Mirror
from membership.store.records import ClusterConfig, ClusterState, GatewayRecord
from workers.model.text_files import sampling_defaults

CONFIG_TIMEOUT_S = 60.0
STOP_POLL_S = 0.5
CLOSE_TIMEOUT_S = 5
BACKLOG = 2048
MAX_HEADER_BYTES = 32 * 1024

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class GatewaySettings:
    """Where a gateway listens, and how it behaves. Port 0 takes any free one; without a token the admin API is off."""

    name: str
    state_dir: Path
    admin_token: str
    host: str = "127.0.0.1"
    port: int = 0
    admin_port: int = 0
    grace_s: float = 15.0  # for open streams when the gateway is stopped
    link: LinkSettings = field(default_factory=LinkSettings)


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


def run_gateway(store: Store, cluster: str, settings: GatewaySettings, stop: threading.Event, events: EventLog) -> None:
    """Serve until `stop` is set, then let open streams end within the grace.

    ConfigError: a port is taken, or the model has no usable tokenizer.
    """
    name = settings.name
    note = partial(events.emit, cluster=cluster)
    with (
        listening(settings.host, settings.port, "--port") as public_socket,
        listening(settings.host, settings.admin_port, "--admin-port") as admin_socket,
        Mirror(store, cluster) as mirror,
    ):
        config = mirror.wait(lambda s: s.config is not None, CONFIG_TIMEOUT_S, f"the config of {cluster!r}").config
        if config is None:
            raise ConfigError(f"cluster {cluster!r} has no config")
        link = EngineLink(name, settings.link, note=note)
        readiness = health.Readiness(link, mirror.state, lambda: mirror.trouble)
        history = StateDir(settings.state_dir).events
        public = _public_app(config, link, readiness, history)
        admin = admin_app(Admin(store, cluster, mirror, settings.admin_token, history, lambda: readiness.stopping))
        servers = Server(public, public_socket, settings.grace_s), Server(admin, admin_socket, 1.0)
        record = GatewayRecord(name=name, pid=os.getpid(), url=_url(public_socket), admin_url=_url(admin_socket))
        gateway = Gateway(config, mirror, link, readiness, *servers, settings.grace_s)
        with Registration(store, cluster, record, config.lease_ttl_s):
            note("gateway_started", name=name, url=record.url)
            asyncio.run(_serve(gateway, stop))
            note("gateway_stopped", name=name)


def _public_app(config: ClusterConfig, link: EngineLink, readiness: health.Readiness, history: Path) -> FastAPI:
    metrics = GatewayMetrics(readiness.state, history, config.cluster)
    app = new_app("elastic-ep")
    model = Path(config.model)
    service = openai.Service(
        config, Tokenizer(model), link, metrics, started=time.time(), sampling=sampling_defaults(model)
    )
    openai.add_routes(app, service)
    health.add_routes(app, readiness, metrics)
    return app


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
    await link.drained(gateway.grace_s)
    link.fail_open(RequestError(link.refusal, status=503, code="shutting_down", retry_after_s=1.0))
    gateway.public.should_exit = gateway.admin.should_exit = True
    servers = {part for part in parts if part.get_name().endswith("server")}
    await asyncio.wait(servers, timeout=gateway.grace_s + CLOSE_TIMEOUT_S)


async def _set(stop: threading.Event) -> None:
    while not stop.is_set():
        await asyncio.to_thread(stop.wait, STOP_POLL_S)


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


class Server(uvicorn.Server):
    """uvicorn on a socket that is bound already, leaving signals to the role."""

    def __init__(self, app: FastAPI, bound: socket.socket, grace_s: float) -> None:
        self._bound = bound
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(grace_s) + 1,
        )
        super().__init__(config)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Until `should_exit`."""
        await super().serve([self._bound])

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The role handles signals."""
        yield


@contextmanager
def listening(host: str, port: int, flag: str) -> Iterator[socket.socket]:
    """A bound socket; ConfigError if the port is taken."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ConfigError(f"cannot listen on {host!r}: {error.strerror}", hint="check --host") from error
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}", hint=f"choose another {flag}") from error
    with bound:
        yield bound


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104 - comparing, not binding
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
