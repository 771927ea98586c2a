"""Probes and metrics. Ready means: a request sent here would be answered; a degraded cluster still answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

from fastapi import FastAPI, Response

from elastic.gateway.engine_link import EngineLink
from elastic.gateway.http import json_response
from elastic.gateway.metrics import GatewayMetrics
from elastic.status import cluster_status
from membership.base.errors import ElasticError, SchemaError
from membership.base.timing import ENGINE_GRACE_S, STUCK_S
from membership.store.records import ClusterState

PATHS = frozenset({"/livez", "/readyz", "/health", "/ping", "/load", "/version", "/metrics"})  # open, never crowded out


@dataclass
class Readiness:
    """Why this gateway should get no requests; no reasons: it is ready."""

    link: EngineLink
    state: Callable[[], ClusterState]
    trouble: Callable[[], str] = str  # what is wrong with the store; requests are answered anyway
    stopping: bool = False

    def reasons(self) -> list[str]:
        """One sentence per obstacle."""
        try:
            state = self.state()
        except ElasticError as error:
            return [f"the cluster's state can no longer be followed: {error}"]
        return obstacles(state, self.link, self.stopping)

    def loading(self) -> list[dict[str, int]]:
        """How far each rank is that loads now."""
        status = cluster_status(self.state(), time.time())
        return [{"rank": r.rank, "bytes": r.load.bytes, "total": r.load.total} for r in status.ranks if r.load]


def obstacles(state: ClusterState, link: EngineLink, stopping: bool) -> list[str]:
    """Why requests sent here would not be answered."""
    found = ["this gateway is shutting down"] if stopping else []
    status = cluster_status(state, time.time())
    if not status.epoch:
        found.append(f"no epoch is committed yet{_too_few_agents(state)}")
    if status.coverage.uncovered:
        found.append(f"{status.coverage.uncovered} (layer, expert) pairs have no live replica")
    if link.stuck_s() > STUCK_S:
        found.append(f"the engine has brought no request any further for {link.stuck_s():.0f} s")
    patient = link.was_ready and link.down_s() < ENGINE_GRACE_S
    if not (link.ready or patient):
        trouble = f": {link.trouble}" if link.trouble else ""
        found.append(f"no engine answers{trouble}" if state.engine else "there is no engine")
    elif status.epoch and not patient and (state.engine_status is None or not state.engine_status.epoch):
        found.append("the engine has not taken up the view yet")
    return found


def _too_few_agents(state: ClusterState) -> str:
    here, wanted = len(state.agents), state.config.min_agents if state.config is not None else 0
    return f": {here} of {wanted} agents are there" if 1 < wanted > here else ""


def add_routes(app: FastAPI, readiness: Readiness, metrics: GatewayMetrics) -> None:
    """Serve what PATHS has."""

    @app.get("/livez")
    async def livez() -> Response:
        try:
            readiness.state()
        except SchemaError as error:  # a restart would not help to read it, and would end all streams
            return json_response({"status": "alive", "reasons": [str(error)]})
        except ElasticError as error:
            return json_response({"status": "dead", "reasons": [str(error)]}, 503)
        return json_response({"status": "alive"})

    @app.get("/readyz")
    @app.get("/health")
    @app.get("/ping")
    @app.post("/ping")
    async def readyz() -> Response:
        reasons = readiness.reasons()
        if reasons:
            try:
                loading = readiness.loading()
            except ElasticError:  # one of the reasons
                loading = []
            answer = {"status": "not ready", "reasons": reasons, **({"loading": loading} if loading else {})}
            return json_response(answer, 503, {"Retry-After": "1"})
        answer = {"status": "ready", "state": cluster_status(readiness.state(), time.time()).state}
        trouble = readiness.trouble()
        return json_response({**answer, "store": trouble} if trouble else answer)

    @app.get("/load")
    async def load() -> Response:
        return json_response({"server_load": len(readiness.link.journal)})

    @app.get("/version")
    async def running_version() -> Response:
        return json_response({"version": version("elastic-ep")})

    @app.get("/metrics")
    async def exposition() -> Response:
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")
