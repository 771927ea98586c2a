"""How client commands talk to a cluster: through its store when they can reach it, else through the admin API.

The store path works with every gateway dead; the admin path works from anywhere with a token.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec

from elastic.explain import Explanation, explain
from elastic.http_errors import from_http
from elastic.serve.tls import authorities
from elastic.serve.tokens import admin_token, http_url
from elastic.status import cluster_status
from membership.base.enums import OperationKind
from membership.base.errors import ConfigError, ElasticError, NoAnswer, WaitTimeout
from membership.base.events import Event, EventLog
from membership.operations.change import Change
from membership.operations.dry_run import Plan, plan_change
from membership.operations.operations import cancel, propose
from membership.operations.pause import pause, resume
from membership.operations.quarantine import unquarantine
from membership.operations.rebalance_now import RebalancePlan, plan_rebalance, request_rebalance
from membership.operations.rotate_keys import RotationPlan, Secrets, plan_rotation, rotate_keys, secrets_in
from membership.store.codec import decode
from membership.store.interface import Store
from membership.store.keys import Keys, state_from
from membership.store.records import ClusterState, Operation, Pause, RankExit, View

POLL_S = 0.1
T = TypeVar("T")


class StoreClient:
    """Talks to the cluster's store; events come from the state directory."""

    def __init__(self, store: Store, cluster: str, events: Path | None) -> None:
        self._store, self._cluster, self._events = store, cluster, events

    def state(self) -> ClusterState:
        """Read everything once."""
        revision, items = self._store.range(Keys(self._cluster).prefix)
        state = state_from(items, revision)
        if state.config is None:
            raise ConfigError(f"no cluster named {self._cluster!r} in this store", hint="check --cluster and --etcd")
        return state

    def status(self) -> dict[str, Any]:
        """The status document: see elastic/status.py."""
        return dict(msgspec.to_builtins(cluster_status(self.state(), time.time())))

    def view(self) -> View:
        """The committed membership; epoch 0: none yet."""
        return self.state().view or View(epoch=0)

    def plan(self, change: Change) -> Plan:
        """What the change would do."""
        return plan_change(change, self.state())

    def propose(self, change: Change, *, op_id: str | None, if_epoch: int | None, timeout_s: float) -> Operation:
        """Propose an operation."""
        return propose(self._store, self._cluster, change, op_id=op_id, if_epoch=if_epoch, timeout_s=timeout_s)

    def cancel(self, op_id: str, by: str) -> Operation:
        """Roll an operation back."""
        return cancel(self._store, self._cluster, op_id, by)

    def operations(self) -> tuple[Operation, ...]:
        """Those on record, the latest last."""
        return self.state().history

    def pause(self, ttl_s: float, by: str, reason: str) -> Pause:
        """Refuse planned changes for a while."""
        return pause(self._store, self._cluster, ttl_s, by=by, reason=reason)

    def resume(self) -> bool:
        """End the pause."""
        return resume(self._store, self._cluster)

    def plan_rebalance(self) -> RebalancePlan:
        """What a rebalance would do now."""
        return plan_rebalance(self.state(), time.time())

    def rebalance(self, by: str) -> RebalancePlan:
        """Request a rebalance now."""
        return request_rebalance(self._store, self._cluster, by)

    def secrets(self) -> Secrets:
        """Who has which join secrets."""
        return secrets_in(self.state())

    def plan_rotation(self) -> RotationPlan:
        """What a rotation of the join secret would do now, or has still to do."""
        return plan_rotation(self.state(), time.time())

    def rotate_keys(self, generation: int | None = None) -> RotationPlan:
        """Have the cluster use the other join secret."""
        return rotate_keys(self._store, self._cluster, generation=generation)

    def operation(self, op_id: str) -> Operation:
        """One operation by id."""
        found = self._store.get(Keys(self._cluster).op(op_id))
        if found is None:
            raise ConfigError(f"no operation {op_id!r}", hint="see: elastic ops ls; older ones: elastic events")
        return decode(found.value, Operation)

    def explain(self, subject: str | None) -> tuple[Explanation, ...]:
        """Causes of the present state."""
        return explain(self.state(), time.time(), subject)

    def unquarantine(self, rank: int) -> RankExit:
        """Allow a slot to be filled again."""
        return unquarantine(self._store, self._cluster, rank)

    def events(self, follow: bool, stop: threading.Event) -> Iterator[Event]:
        """The event history."""
        if self._events is None:
            raise ConfigError("the event history is on the serving machine", hint="use --state-dir or --admin")
        return EventLog.follow(self._events, stop) if follow else iter(EventLog.read(self._events))


class AdminClient:
    """Talks to a gateway's admin port with a bearer token."""

    def __init__(self, url: str, token: str, timeout_s: float = 10.0, *, trust: ssl.SSLContext | None = None) -> None:
        """`trust`: certificates instead of the environment's."""
        headers = {"Authorization": f"Bearer {admin_token(token)}"}
        # It heeds the environment's certificates, and no proxy: nothing reads the token.
        transport = httpx.HTTPTransport(verify=authorities(url) if trust is None else trust)
        self._http = httpx.Client(
            base_url=http_url(url, "--admin"), headers=headers, timeout=timeout_s, transport=transport, trust_env=False
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def status(self) -> dict[str, Any]:
        """GET status."""
        return dict(self._call("GET", "status"))

    def view(self) -> View:
        """GET view."""
        return _record(self._call("GET", "view"), View)

    def plan(self, change: Change) -> Plan:
        """POST with plan=true: changes nothing."""
        return _record(self._call("POST", change.kind, json={"ranks": _ranks(change), "plan": True}), Plan)

    def propose(self, change: Change, *, op_id: str | None, if_epoch: int | None, timeout_s: float) -> Operation:
        """POST scale, drain or undrain."""
        asked = {"ranks": _ranks(change), "op_id": op_id, "if_epoch": if_epoch, "timeout_s": timeout_s}
        answer = self._call("POST", change.kind, json={k: v for k, v in asked.items() if v is not None})
        return _record(answer, Operation)

    def cancel(self, op_id: str, by: str) -> Operation:
        """POST operations/<id>/cancel."""
        return _record(self._call("POST", f"operations/{op_id}/cancel", json={"by": by}), Operation)

    def operations(self) -> tuple[Operation, ...]:
        """GET operations."""
        return _record(self._call("GET", "operations")["operations"], tuple[Operation, ...])

    def pause(self, ttl_s: float, by: str, reason: str) -> Pause:
        """POST pause."""
        return _record(self._call("POST", "pause", json={"ttl_s": ttl_s, "by": by, "reason": reason}), Pause)

    def resume(self) -> bool:
        """POST resume."""
        return bool(self._call("POST", "resume")["resumed"])

    def plan_rebalance(self) -> RebalancePlan:
        """POST rebalance with plan=true: changes nothing."""
        return _record(self._call("POST", "rebalance", json={"plan": True}), RebalancePlan)

    def rebalance(self, by: str) -> RebalancePlan:
        """POST rebalance."""
        return _record(self._call("POST", "rebalance", json={"by": by}), RebalancePlan)

    def secrets(self) -> Secrets:
        """GET keys."""
        return _record(self._call("GET", "keys"), Secrets)

    def plan_rotation(self) -> RotationPlan:
        """POST keys/rotate with plan=true: changes nothing."""
        return _record(self._call("POST", "keys/rotate", json={"plan": True}), RotationPlan)

    def rotate_keys(self, generation: int | None = None) -> RotationPlan:
        """POST keys/rotate."""
        return _record(self._call("POST", "keys/rotate", json={"generation": generation}), RotationPlan)

    def operation(self, op_id: str) -> Operation:
        """GET one operation."""
        return _record(self._call("GET", f"operations/{op_id}"), Operation)

    def explain(self, subject: str | None) -> tuple[Explanation, ...]:
        """GET explain, of one rank, of one operation, or of the cluster and each rank that does not serve."""
        which = {} if subject is None else {"subject": subject}
        return _record(self._call("GET", "explain", params=which), tuple[Explanation, ...])

    def unquarantine(self, rank: int) -> RankExit:
        """POST unquarantine."""
        return _record(self._call("POST", f"ranks/{rank}/unquarantine"), RankExit)

    def failpoints(self) -> dict[str, Any]:
        """GET failpoints: the armed ones, and all known points and actions."""
        return dict(self._call("GET", "failpoints"))

    def arm(self, failpoints: str) -> dict[str, Any]:
        """PUT failpoints: arm these and disarm all others."""
        return dict(self._call("PUT", "failpoints", json={"failpoints": failpoints}))

    def events(self, follow: bool, stop: threading.Event) -> Iterator[Event]:
        """GET the event history; `follow` keeps streaming."""
        try:
            with self._http.stream("GET", "/admin/v1/events", params={"follow": follow}) as answer:
                if not answer.is_success:
                    answer.read()
                    raise _error_of(answer)
                for line in answer.iter_lines():
                    if stop.is_set():
                        return
                    if line:
                        yield msgspec.json.decode(line, type=Event)
        except httpx.HTTPError as error:
            raise self._silence(error) from error

    def _call(self, method: str, path: str, **options: Any) -> Any:
        try:
            answer = self._http.request(method, f"/admin/v1/{path}", **options)
        except httpx.HTTPError as error:
            raise self._silence(error) from error
        if answer.is_success:
            return answer.json()
        raise _error_of(answer)

    def _silence(self, error: httpx.HTTPError) -> NoAnswer:
        return NoAnswer(f"no answer from {self._http.base_url}: {error}", hint="is the gateway up?")


Client = StoreClient | AdminClient  # the same methods: what commands need from a cluster


def _ranks(change: Change) -> int | tuple[int, ...]:
    return change.target if change.kind == OperationKind.SCALE else change.ranks


def _record(answer: Any, kind: type[T]) -> T:
    """JSON has numbers, as keys, as strings."""
    return msgspec.convert(answer, kind, strict=False)


def _error_of(answer: httpx.Response) -> ElasticError:
    """The error in an answer of the admin API, or in that of something else at its address."""
    try:
        error = answer.json()["error"]
        code, message = str(error.get("code") or ""), str(error["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        code, message = "", answer.text
    return from_http(answer.status_code, code, message)


def wait_for(client: Client, operation: Operation, timeout_s: float, stop: threading.Event) -> Iterator[Operation]:
    """The operation each time it has changed, until it has ended or `stop` is set; WaitTimeout after `timeout_s`.

    If the store or gateway does not answer, it is retried: the operation continues meanwhile.
    """
    deadline = time.monotonic() + timeout_s
    yield operation
    while operation.active and not stop.wait(POLL_S):
        silence = ""
        try:
            seen, operation = operation, client.operation(operation.id)
            if operation != seen:
                yield operation
        except NoAnswer as error:
            silence = f" ({error})"
        if operation.active and time.monotonic() > deadline:
            again = f"it goes on; watch: elastic ops show {operation.id} --wait"
            raise WaitTimeout(f"operation {operation.id} is still {operation.phase}{silence}", hint=again)
