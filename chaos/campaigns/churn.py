"""The churn: hundreds of planned changes of random size and victims under load, some cancelled, then judgement."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from chaos.campaigns.endurance import Endurance, Tell
from chaos.target.cluster import ServedCluster
from chaos.target.footprint import Growth
from chaos.workload.history import percentile
from elastic.cli.client import StoreClient, wait_for
from membership.base.errors import OperationConflict
from membership.operations.change import Change, drain, scale, undrain
from membership.store.records import Operation, Phase

CANCELLED = 0.1  # of the changes: somebody changes their mind
TIMEOUT_S = 120.0


class ChurnReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """What the churn proved; `broken` says which promises broke. Times are of whole operations, and of their pauses."""

    ok: bool
    seed: int
    changes: int
    kinds: dict[str, int]
    outcomes: dict[str, int]
    requests: int
    tokens: int
    lost: int
    duplicated: int
    altered: int
    seconds: float
    took_p50_ms: float
    took_p99_ms: float
    pause_p50_ms: float
    pause_p99_ms: float
    epochs: int
    processes: tuple[int, int]
    growth: tuple[Growth, ...]
    broken: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Churn(Endurance):
    """What a churn has gathered so far."""

    ranks: int  # at the start and in the end
    most: int  # never more ranks than these
    operations: list[Operation] = field(default_factory=list)
    cancelled: set[str] = field(default_factory=set)


def change(chooser: random.Random, slots: Sequence[int], drained: Sequence[int], most: int) -> Change:
    """Any change that is possible now: another size, some ranks drained, or a drained one back. Pure."""
    kinds = ["scale"]
    kinds += ["drain"] if len(slots) > 1 else []
    kinds += ["undrain"] * 2 if drained and len(slots) < most else []
    match chooser.choice(kinds):
        case "drain":
            return drain(*chooser.sample(sorted(slots), chooser.randint(1, min(2, len(slots) - 1))))
        case "undrain":
            return undrain(chooser.choice(sorted(drained)))
    return scale(chooser.choice([size for size in range(1, most + 1) if size != len(slots)]))


def run_churn(cluster: ServedCluster, churn: Churn, changes: int, streams: int, tell: Tell) -> None:
    """Change after change under load; in the end all that was drained is back, and the size as it was."""
    chooser = random.Random(churn.seed)
    with churn.under_load(cluster, churn.ranks, streams, tell) as workload:
        client = cluster.client()
        while len(churn.operations) < changes:
            desired = client.state().desired
            if desired is not None:
                request = change(chooser, desired.slots, desired.cordoned, churn.most)
                operation = _done(client, request, churn, cancel=chooser.random() < CANCELLED)
                if operation.target == churn.ranks and operation.phase is Phase.DONE:  # only the same size compares
                    churn.look(cluster, len(churn.operations), changes)
                took_ms = 1000 * (operation.finished - operation.started)
                tell(f"{len(churn.operations)}/{changes} {request}: {operation.phase} after {took_ms:.0f} ms; "
                     f"{len(workload.records())} requests ended")  # fmt: skip
        drained = client.status()["drained"]
        for request in ([scale(1)] if drained else []) + [undrain(slot) for slot in drained] + [scale(churn.ranks)]:
            _done(client, request, churn, cancel=False)
    churn.verify(len(churn.operations), "changes")


def _done(client: StoreClient, request: Change, churn: Churn, *, cancel: bool) -> Operation:
    """Have it done, or called off again at once, unless it was too quick; the operation once it has ended."""
    operation = client.propose(request, op_id=None, if_epoch=None, timeout_s=TIMEOUT_S)
    if cancel:
        with suppress(OperationConflict):
            client.cancel(operation.id, "churn")
            churn.cancelled.add(operation.id)
    *_, operation = wait_for(client, operation, TIMEOUT_S + 10.0, threading.Event())
    churn.operations.append(operation)
    return operation


def judge(churn: Churn, changes: int) -> ChurnReceipt:
    """Judge a finished churn. Pure."""
    verdict = churn.verdict()
    broken = churn.broken(changes, "changes")
    for operation in churn.operations:
        cancelled = operation.id in churn.cancelled
        if operation.phase is not (Phase.ABORTED if cancelled else Phase.DONE):
            was = "cancelled " if cancelled else ""
            broken.append(f"{was}operation {operation.id} ended {operation.phase}: {operation.error}")
    if len(churn.operations) < changes:
        broken.append(f"{len(churn.operations)} changes instead of {changes}")
    done = [operation for operation in churn.operations if operation.phase is Phase.DONE]
    took = [1000 * (operation.finished - operation.started) for operation in done]
    paused = [operation.pause_ms for operation in done]
    return ChurnReceipt(
        ok=not broken,
        seed=churn.seed,
        changes=len(churn.operations),
        kinds=dict(Counter(operation.kind for operation in churn.operations)),
        outcomes=dict(Counter(operation.phase.value for operation in churn.operations)),
        requests=verdict.requests,
        tokens=sum(len(record.tokens) for record in churn.history),
        lost=verdict.count("lost"),
        duplicated=verdict.count("duplicated"),
        altered=verdict.count("altered"),
        seconds=round(churn.seconds, 1),
        took_p50_ms=round(percentile(took, 0.5), 1),
        took_p99_ms=round(percentile(took, 0.99), 1),
        pause_p50_ms=round(percentile(paused, 0.5), 1),
        pause_p99_ms=round(percentile(paused, 0.99), 1),
        epochs=churn.epochs,
        processes=churn.processes,
        growth=churn.growth(),
        broken=tuple(broken),
    )
