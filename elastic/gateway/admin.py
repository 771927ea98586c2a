"""The admin API, on a port of its own: look at the cluster and change it. Nothing here answers without the token."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi import Path as InPath
from msgspec.structs import asdict
from pydantic import Field

from elastic.explain import explain
from elastic.gateway.admin_token import AdminToken
from elastic.gateway.connection import DROP
from elastic.gateway.http import EventStream, json_response, new_app, read_body
from elastic.gateway.live import Live
from elastic.gateway.scaling import scaling_status
from elastic.gateway.schema import Shape, parse
from elastic.http_errors import as_http, message_of
from elastic.status import cluster_status
from membership.base import failpoints
from membership.base.errors import ConfigError, ElasticError, OperationConflict, RequestError, WaitTimeout
from membership.base.events import FOLLOW_POLL_S, Tail
from membership.base.failpoint_catalogue import POINTS
from membership.base.timing import LONGEST_TIMEOUT_S, SHORTEST_TIMEOUT_S
from membership.operations.change import Change, drain, scale, undrain
from membership.operations.dry_run import plan_change
from membership.operations.kill import kill
from membership.operations.operations import cancel, propose
from membership.operations.pause import pause, resume
from membership.operations.quarantine import unquarantine
from membership.operations.rebalance_now import plan_rebalance, request_rebalance
from membership.operations.rotate_keys import plan_rotation, rotate_keys, secrets_in
from membership.store.interface import Store
from membership.store.mirror import Mirror
from membership.store.records import ClusterState, Operation, View

S = TypeVar("S", bound=Shape)
T = TypeVar("T")
MAX_BODY_BYTES = 64 * 1024
BLANK_EVERY_S = 1.0
MAX_RANKS = 1_000_000  # of a request's field; the planner decides what the cluster allows
MAX_EPOCH = 2**63 - 1
Rank = Annotated[int, Field(ge=-MAX_RANKS, le=MAX_RANKS)]
Timeout = Annotated[float, Field(ge=SHORTEST_TIMEOUT_S, le=LONGEST_TIMEOUT_S)]


class ChangeRequest(Shape):
    """What every change takes. `plan`: only say what would change."""

    op_id: str | None = Field(default=None, min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._-]+$")
    if_epoch: int | None = Field(default=None, ge=0, le=MAX_EPOCH)
    timeout_s: Timeout = 300.0
    plan: bool = False


class ScaleRequest(ChangeRequest):
    """POST /admin/v1/scale."""

    ranks: Rank


class SlotsRequest(ChangeRequest):
    """POST /admin/v1/drain and undrain."""

    ranks: list[Rank] = Field(min_length=1, max_length=1024)


class PauseRequest(Shape):
    """POST /admin/v1/pause."""

    ttl_s: Timeout
    by: str = Field(default="admin API", max_length=128)
    reason: str = Field(default="", max_length=512)


class RebalanceRequest(Shape):
    """POST /admin/v1/rebalance. `plan`: only say what would change."""

    by: str = Field(default="admin API", max_length=128)
    plan: bool = False


class RotationRequest(Shape):
    """POST /admin/v1/keys/rotate. `plan`: only say what would change. `generation`: begin none beyond this."""

    plan: bool = False
    generation: int | None = Field(default=None, ge=0, le=MAX_EPOCH)


class CancelRequest(Shape):
    """POST /admin/v1/operations/<id>/cancel."""

    by: str = Field(default="admin API", min_length=1, max_length=128)


class KillRequest(Shape):
    """POST /admin/v1/ranks/<rank>/kill."""

    by: str = Field(default="admin API", max_length=128)


class FailpointsRequest(Shape):
    """PUT /admin/v1/failpoints: what is armed from now on, and nothing else."""

    failpoints: str = Field(max_length=MAX_BODY_BYTES)


class VllmScaleRequest(Shape):
    """POST /scale_elastic_ep, as vLLM has it."""

    new_data_parallel_size: Rank | None = None
    new_ep_size: Rank | None = None  # SGLang's name for the same
    drain_timeout: Timeout = 300.0

    @property
    def ranks(self) -> int:
        """The size, which is given once."""
        given = {self.new_data_parallel_size, self.new_ep_size} - {None}
        if len(given) != 1:
            raise RequestError("give new_data_parallel_size (or new_ep_size)", param="new_data_parallel_size")
        return int(given.pop() or 0)


@dataclass(frozen=True)
class Admin:
    """What the admin routes need."""

    store: Store
    cluster: str
    mirror: Mirror
    token: AdminToken
    events: Path
    stopping: Callable[[], bool]
    live: Live

    def check(self, request: Request) -> None:
        """RequestError unless the request bears the token, or if no token is set."""
        token = self.token.now()
        if not token:
            raise RequestError("the admin API is off: no token is set (ELASTIC_ADMIN_TOKEN)", status=403)
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), token.encode())
        if scheme.lower() != "bearer" or not right:
            raise RequestError("the admin API needs its token: Authorization: Bearer TOKEN", status=401)

    async def call(self, act: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Return what `act` on this cluster's store returns; its errors become RequestErrors."""
        try:
            return await asyncio.to_thread(act, self.store, self.cluster, *arguments, **options)
        except ElasticError as error:
            raise as_http(error) from error

    async def change(self, change: Change, asked: ChangeRequest) -> Response:
        """Plan, or propose an operation."""
        if asked.plan:
            return json_response(plan_change(change, self.mirror.state()))
        failpoints.hit("gateway.before.propose")
        try:
            operation = await asyncio.to_thread(
                propose,
                self.store,
                self.cluster,
                change,
                op_id=asked.op_id,
                if_epoch=asked.if_epoch,
                timeout_s=asked.timeout_s,
            )
        except OperationConflict as error:
            active = await asyncio.to_thread(_active_soon, self.mirror)
            body = {"message": message_of(error), "type": "conflict", "param": None, "code": "operation_active"}
            return json_response({"error": body, "operation": asdict(active) if active else None}, 409)
        except ElasticError as error:
            raise as_http(error) from error
        where = {"Location": f"/admin/v1/operations/{operation.id}"}
        return json_response(asdict(operation), 202, where)


def admin_app(admin: Admin) -> FastAPI:
    """The application of the admin port."""
    app = new_app("elastic-ep admin", admin.check)
    _add_reading(app, admin)
    _add_scaling(app, admin)
    _add_operations(app, admin)
    _add_maintenance(app, admin)
    _add_faults(app, admin)
    return app


async def _read(request: Request, shape: type[S]) -> S:
    return parse(await read_body(request, MAX_BODY_BYTES) or b"{}", shape)


def _add_operations(app: FastAPI, admin: Admin) -> None:
    @app.post("/admin/v1/scale")
    async def scale_to(request: Request) -> Response:
        asked = await _read(request, ScaleRequest)
        return await admin.change(scale(asked.ranks), asked)

    @app.post("/admin/v1/drain")
    async def drain_ranks(request: Request) -> Response:
        asked = await _read(request, SlotsRequest)
        return await admin.change(drain(*asked.ranks), asked)

    @app.post("/admin/v1/undrain")
    async def undrain_ranks(request: Request) -> Response:
        asked = await _read(request, SlotsRequest)
        return await admin.change(undrain(*asked.ranks), asked)

    @app.post("/admin/v1/operations/{name}/cancel")
    async def cancel_operation(request: Request, name: str) -> Response:
        asked = await _read(request, CancelRequest)
        failpoints.hit("gateway.before.cancel")
        return json_response(asdict(await admin.call(cancel, name, asked.by)), 202)

    @app.post("/scale_elastic_ep")
    async def scale_as_vllm(request: Request) -> Response:
        asked = await _read(request, VllmScaleRequest)
        change = ScaleRequest(ranks=asked.ranks, timeout_s=asked.drain_timeout)
        return await admin.change(scale(change.ranks), change)


def _add_maintenance(app: FastAPI, admin: Admin) -> None:
    @app.post("/admin/v1/rebalance")
    async def rebalance_now(request: Request) -> Response:
        asked = await _read(request, RebalanceRequest)
        if asked.plan:
            return json_response(asdict(plan_rebalance(admin.mirror.state(), time.time())))
        return json_response(asdict(await admin.call(request_rebalance, asked.by)), 202)

    @app.get("/admin/v1/keys")
    async def secrets() -> Response:
        return json_response(asdict(secrets_in(admin.mirror.state())))

    @app.post("/admin/v1/keys/rotate")
    async def rotate(request: Request) -> Response:
        asked = await _read(request, RotationRequest)
        if asked.plan:
            return json_response(asdict(plan_rotation(admin.mirror.state(), time.time())))
        return json_response(asdict(await admin.call(rotate_keys, generation=asked.generation)), 202)

    @app.post("/admin/v1/pause")
    async def pause_changes(request: Request) -> Response:
        asked = await _read(request, PauseRequest)
        return json_response(asdict(await admin.call(pause, asked.ttl_s, by=asked.by, reason=asked.reason)))

    @app.post("/admin/v1/resume")
    async def resume_changes() -> Response:
        return json_response({"resumed": await admin.call(resume)})

    @app.post("/admin/v1/ranks/{rank}/unquarantine")
    async def end_quarantine(rank: Annotated[int, InPath(ge=0, le=MAX_RANKS)]) -> Response:
        return json_response(asdict(await admin.call(unquarantine, rank)))


def _add_faults(app: FastAPI, admin: Admin) -> None:
    """Faults on request: each needs an operator's leave, --allow-kill of an agent or --chaos."""

    @app.post("/admin/v1/ranks/{rank}/kill")
    async def kill_rank(request: Request, rank: Annotated[int, InPath(ge=0, le=MAX_RANKS)]) -> Response:
        asked = await _read(request, KillRequest)
        return json_response(asdict(await admin.call(kill, rank, asked.by)), 202)

    def source() -> Path:
        found = failpoints.source()
        if found is None:
            raise RequestError("failpoints are off (serve with --chaos)", status=403, code="not_in_chaos_mode")
        return found

    def armed_in(path: Path) -> Response:
        return json_response({"failpoints": failpoints.read(path), "points": POINTS, "actions": failpoints.ACTIONS})

    @app.get("/admin/v1/failpoints")
    async def armed() -> Response:
        return armed_in(source())

    @app.put("/admin/v1/failpoints")
    async def arm(request: Request) -> Response:
        path, asked = source(), await _read(request, FailpointsRequest)
        try:
            failpoints.write(path, asked.failpoints)
        except ConfigError as error:
            raise RequestError(message_of(error), status=400, code="bad_failpoints") from error
        return armed_in(path)


def _add_reading(app: FastAPI, admin: Admin) -> None:
    @app.get("/admin/v1/status")
    async def status() -> Response:
        age = {"Age": str(int(admin.mirror.staleness_s))}
        status = cluster_status(admin.mirror.state(), time.time(), admin.mirror.trouble)
        return json_response(status, headers=age)

    @app.get("/admin/v1/view")
    async def view() -> Response:
        return json_response(admin.mirror.state().view or View(epoch=0))

    @app.get("/admin/v1/explain")
    async def explained(subject: str | None = None) -> Response:
        try:
            return json_response(explain(admin.mirror.state(), time.time(), subject, admin.mirror.trouble))
        except ElasticError as error:
            raise as_http(error) from error

    @app.get("/admin/v1/operations")
    async def operations() -> Response:
        return json_response({"operations": [asdict(op) for op in admin.mirror.state().history]})

    @app.get("/admin/v1/operations/{name}")
    async def operation(name: str) -> Response:
        state = await asyncio.to_thread(_with_operation, admin.mirror, name)
        return json_response(asdict(state.operations[name]))

    @app.get("/admin/v1/events")
    async def events(request: Request, follow: bool = False) -> Response:
        return EventStream(_event_lines(admin.events, follow, admin.stopping), {}, "application/x-ndjson", b"\n")

    @app.get("/admin/v1/stream")
    async def stream(request: Request) -> Response:
        admin.live.make_room()
        return EventStream(admin.live.stream(request.scope["state"][DROP]), {})


def _add_scaling(app: FastAPI, admin: Admin) -> None:
    """For controllers that run outside: ours, and vLLM's."""

    @app.get("/admin/v1/scaling")
    async def scaling() -> Response:
        try:
            status = scaling_status(admin.mirror.state(), time.time(), admin.mirror.trouble)
            return json_response(status, headers={"Age": str(int(admin.mirror.staleness_s))})
        except ElasticError as error:
            raise as_http(error) from error

    @app.get("/is_scaling_elastic_ep")
    @app.post("/is_scaling_elastic_ep")
    async def is_scaling() -> Response:
        return json_response({"is_scaling_elastic_ep": admin.mirror.state().active is not None})


def _with_operation(mirror: Mirror, name: str) -> ClusterState:
    """A state that has the operation: it may have been proposed a moment ago, through another gateway."""
    try:
        return mirror.wait(lambda state: name in state.operations, 0.5)
    except WaitTimeout:
        raise RequestError(f"no operation {name!r}", status=404, code="operation_not_found") from None


def _active_soon(mirror: Mirror) -> Operation | None:
    """The active operation; the mirror may be a moment behind the store."""
    try:
        return mirror.wait(lambda state: state.active is not None, 0.5).active
    except WaitTimeout:
        return None


async def _event_lines(path: Path, follow: bool, stopping: Callable[[], bool]) -> AsyncGenerator[bytes, None]:
    """The event history, line by line. With `follow`, new events too, and blank lines while there are none.

    A blank line shows that the gateway is alive, and lets the client check whether to stop. Damaged lines are left out.
    """
    tail, spoke_at = Tail(path), time.monotonic()
    while True:
        events = tail.read()
        if events is None and (not follow or stopping()):
            return
        if events or time.monotonic() - spoke_at >= BLANK_EVERY_S:
            spoke_at = time.monotonic()
            yield b"".join(msgspec.json.encode(event) + b"\n" for event in events or ()) or b"\n"
        if events is None:
            await asyncio.sleep(FOLLOW_POLL_S)
