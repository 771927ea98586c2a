"""Replacing all ranks by new ones, one after the other, while requests stream on: `elastic rollout`.

One extra rank is added first; then each old rank is drained and its slot filled again; then the extra rank is removed.
Each step is an ordinary operation. Its id contains `before`, the last incarnation to be replaced: an interrupted
rollout is continued by running it again with the same `before`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from elastic.cli.client import Client, wait_for
from membership.base.errors import ElasticError, OperationConflict
from membership.operations.change import Change, describe_change, drain, scale, undrain
from membership.store.records import Operation, Phase, RankState


def last_incarnation(client: Client) -> int:
    """The newest incarnation that serves now."""
    return max((rank["incarnation"] for rank in client.status()["ranks"]), default=0)


def rollout(client: Client, before: int, timeout_s: float, stop: threading.Event) -> Iterator[Operation]:
    """Replace all ranks of incarnation `before` or earlier; yields the present operation whenever it has changed.

    Returns early, between two operations, once `stop` is set. Raises what `Client.propose` raises, WaitTimeout, and
    ElasticError if a step was rolled back.
    """
    surge = f"rollout-{before}-surge"
    size = _size(client, surge)
    steps = _steps(client, before, surge, size)
    for name, change in steps:
        if stop.is_set():
            return
        operation = client.propose(change, op_id=name, if_epoch=None, timeout_s=timeout_s)
        for latest in wait_for(client, operation, timeout_s + 30.0, stop):
            operation = latest
            yield operation
        if operation.phase is Phase.ABORTED:
            raise ElasticError(
                f"{describe_change(operation)} was rolled back: {operation.error}", hint=resume_hint(before)
            )


def resume_hint(before: int) -> str:
    """How to continue a rollout that stopped."""
    return f"once the cause is gone, go on with: elastic rollout --before {before}"


def is_unfinished(client: Client, before: int) -> bool:
    """Whether the last change was a step of this rollout, and its extra rank is still there."""
    operations = client.operations()
    surge = next((each for each in operations if each.id == f"rollout-{before}-surge"), None)
    if surge is None or surge.phase is Phase.ABORTED or not operations[-1].id.startswith(f"rollout-{before}-"):
        return False
    return int(client.status()["desired"]) != surge.previous


def _size(client: Client, surge: str) -> int:
    """The number of ranks at the end, which is the number before the rollout began."""
    begun = [operation for operation in client.operations() if operation.id == surge]
    if begun and begun[0].phase is Phase.ABORTED:
        raise OperationConflict(f"{surge} was rolled back: {begun[0].error}", hint="begin anew: elastic rollout")
    return begun[0].previous if begun else int(client.status()["desired"])


def _steps(client: Client, before: int, surge: str, size: int) -> Iterator[tuple[str, Change]]:
    """(id, change) of each operation, decided from the cluster's state at its turn."""
    if not client.plan(scale(size + 1)).refused:
        yield surge, scale(size + 1)
    while True:
        status = client.status()
        taken_out = {op.ranks[0] for op in client.operations() if op.id.startswith(f"rollout-{before}-drain-")}
        if empty := sorted(taken_out & set(status["drained"])):
            yield f"rollout-{before}-undrain-{empty[0]}", undrain(empty[0])
            continue
        serving = [rank for rank in status["ranks"] if rank["state"] == RankState.SERVING]
        old = [rank["rank"] for rank in serving if rank["incarnation"] <= before]
        if not old:
            break
        yield f"rollout-{before}-drain-{old[0]}", drain(old[0])
    if int(client.status()["desired"]) != size:
        yield f"rollout-{before}-end", scale(size)
