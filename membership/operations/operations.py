"""Propose a change as an operation, or cancel one.

The operation and the new desired state are written in one transaction that compares `desired`: of two proposals at
once, one wins and the other finds it there. The controller does the rest.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

from msgspec.structs import replace

from membership.base.enums import OperationKind
from membership.base.errors import (
    ConfigError,
    Fenced,
    OperationConflict,
    PlanRefused,
    StoreUnavailable,
    WaitTimeout,
)
from membership.base.timing import OPERATION_TIMEOUT_S
from membership.operations.change import Change, describe_change, desired_by
from membership.operations.dry_run import plan_change
from membership.operations.pause import paused_words
from membership.store.codec import decode, encode
from membership.store.interface import Compare, Delete, Op, Put, Store
from membership.store.keys import Keys, state_from
from membership.store.phases import before_commit
from membership.store.records import ClusterState, Desired, Operation, Phase

ATTEMPTS = 5
KEPT = 128  # finished operations that stay readable: enough to resume a rollout of 60 ranks


def propose(
    store: Store,
    cluster: str,
    change: Change,
    *,
    op_id: str | None = None,
    if_epoch: int | None = None,
    timeout_s: float = OPERATION_TIMEOUT_S,
    clock: Callable[[], float] = time.time,
) -> Operation:
    """Propose the change; return its operation, which ends within `timeout_s`. The same id gives the same operation.

    OperationConflict: another operation is active, or the id is used for another change. Fenced: the epoch is not
    `if_epoch`. PlanRefused: the change is refused, or changes are paused. WaitTimeout: the state kept changing.
    """
    keys, name = Keys(cluster), op_id or uuid.uuid4().hex[:12]
    deadline = clock() + timeout_s
    while True:
        revision, items = store.range(keys.prefix)
        state = state_from(items, revision)
        known = state.operations.get(name)
        if known is not None:
            return _same(known, change)
        now = clock()
        _admit(state, cluster, change, if_epoch, now)
        if now >= deadline:
            raise WaitTimeout(f"operation {name} could not be proposed within {timeout_s:g} s: the state kept changing")
        operation, desired = _accepted(state, name, change, if_epoch or 0, now, deadline)
        watched = (keys.desired, keys.op(name), keys.view, keys.pause)
        unchanged = [Compare(key, "mod", "<", revision + 1) for key in watched]
        ops: list[Op] = [Put(keys.op(name), encode(operation)), Put(keys.desired, encode(desired))]
        ops += _expired(state, keys)
        try:
            if store.txn(unchanged, ops).succeeded:
                return operation
        except StoreUnavailable:  # unknown whether it took effect: read back
            found = store.get(keys.op(name))
            if found is None:
                raise
            return decode(found.value, Operation)


def _accepted(
    state: ClusterState, name: str, change: Change, if_epoch: int, now: float, deadline: float
) -> tuple[Operation, Desired]:
    before = state.desired or Desired(ranks=0)
    desired = replace(desired_by(change, before), operation=name)
    operation = Operation(
        id=name,
        kind=change.kind,
        target=desired.ranks,
        ranks=change.ranks,
        previous=before.ranks,
        started=now,
        deadline=deadline,
        if_epoch=if_epoch,
        phase_times={Phase.PROPOSED.value: now},
    )
    return operation, desired


def _same(known: Operation, change: Change) -> Operation:
    other_size = change.kind is OperationKind.SCALE and known.target != change.target
    if known.kind != change.kind or known.ranks != change.ranks or other_size:
        raise OperationConflict(f"operation {known.id} exists already: {describe_change(known)}, not {change}")
    return known


def _admit(state: ClusterState, cluster: str, change: Change, if_epoch: int | None, now: float) -> None:
    """Raise if the change must not be proposed now."""
    if state.config is None:
        raise ConfigError(f"there is no cluster {cluster!r} in this store", hint="check --cluster and --etcd")
    epoch = state.view.epoch if state.view else 0
    if if_epoch is not None and if_epoch != epoch:
        raise Fenced(f"the epoch is {epoch}, not {if_epoch}", hint="look at the new state, then decide again")
    if state.active is not None:
        raise OperationConflict(
            f"operation {state.active.id} ({describe_change(state.active)}, {state.active.phase}) is active",
            hint=f"wait for it: elastic ops show {state.active.id} --wait",
        )
    if state.pause is not None and state.paused(now):
        raise PlanRefused(paused_words(state.pause, now), hint="end it: elastic resume")
    refused = plan_change(change, state).refused
    if refused:
        raise PlanRefused(refused)


def cancel(store: Store, cluster: str, name: str, by: str) -> Operation:
    """Ask for the operation to be rolled back; return it, unchanged if it is cancelled already.

    ConfigError: there is no such operation. OperationConflict: it is committed, or its record kept changing.
    """
    key = Keys(cluster).op(name)
    for _ in range(ATTEMPTS):
        found = store.get(key)
        if found is None:
            raise ConfigError(f"no operation {name!r}", hint="see: elastic ops ls")
        operation = decode(found.value, Operation)
        if operation.cancelled or operation.phase is Phase.ABORTED:
            return operation
        if not before_commit(operation):
            scaled = operation.kind is OperationKind.SCALE
            undo = f"elastic scale {operation.previous}" if scaled else "the opposite operation"
            raise OperationConflict(f"operation {name} is {operation.phase}, and stands", hint=f"undo it by: {undo}")
        cancelled = replace(operation, cancelled=by)
        if store.txn([Compare(key, "mod", "=", found.mod_revision)], [Put(key, encode(cancelled))]).succeeded:
            return cancelled
    raise OperationConflict(f"operation {name} keeps changing", hint="ask again")


def _expired(state: ClusterState, keys: Keys) -> list[Delete]:
    """Delete the oldest finished operations beyond KEPT."""
    finished = sorted((op for op in state.operations.values() if not op.active), key=lambda op: op.started)
    return [Delete(keys.op(op.id)) for op in finished[:-KEPT]]
