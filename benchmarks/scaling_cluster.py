"""Rows of `scaling.py` that scale a served cluster under streams: what clients felt of it, and how long it took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.recovery_cluster import POLL_S, Scene, scene
from benchmarks.recovery_report import Report, say
from chaos.workload.history import percentile
from membership.base.errors import ElasticError, WaitTimeout
from membership.store.records import Phase

SMALL, LARGE, STREAMS = 4, 8, 8
NEW = LARGE - SMALL
SETTLE_S, DWELL_S = 0.5, 1.5  # after a scale; then how long nothing is done
OPS_S = 120.0

Span = tuple[float, float]
"""From, until, on the monotonic clock."""


@dataclass(frozen=True)
class Scaled:
    """One scale, proven: the operation is done and the engine steps under its view. Times are monotonic seconds."""

    before: int
    target: int
    operation: str
    epoch: int
    bytes_moved: int
    asked_at: float
    committed_at: float
    adopted_at: float
    done_at: float
    pause_ms: float  # the engine's own: from the last step of the old view to the end of the first one of the new
    moved: int  # requests that changed their home
    rest: Span  # when nothing was done, before
    pids: frozenset[int] = frozenset()  # of the newcomers

    @property
    def full_ms(self) -> float:
        """From asking until the engine steps under the new view."""
        return (self.adopted_at - self.asked_at) * 1000


def scaled(scene: Scene, before: int, target: int, rest: Span) -> Scaled:
    """Scale at a random moment, and prove that it happened."""
    known = {record.pid for record in scene.state().ranks.values()}
    scene.pause()
    mark, asked_at = scene.history.mark(), time.monotonic()
    operation = scene.cluster.scale(target, OPS_S)
    adopted = scene.history.wait_adopted(mark, target, f"after scaling to {target}")
    committed = scene.history.wait(
        mark, f"commit of {operation.id}",
        lambda e: e.kind == "epoch_committed" and e.fields.get("operation") == operation.id,
    )  # fmt: skip
    view = scene.state().view
    ranks = view.ranks if view is not None else ()
    if operation.phase is not Phase.DONE or operation.epoch != committed.epoch or len(ranks) != target:
        raise ElasticError(f"scale to {target} was not done: {operation}, ranks {ranks}")
    if adopted.epoch != operation.epoch:
        raise ElasticError(f"epoch {operation.epoch} is the operation's, {adopted.epoch} was adopted")
    return Scaled(
        before, target, operation.id, operation.epoch, operation.bytes_moved, asked_at,
        scene.history.when(committed), scene.history.when(adopted), time.monotonic(),
        float(adopted.fields["pause_ms"]), int(adopted.fields["requests"]), rest,
        frozenset(scene.pid_of(rank) for rank in ranks) - known,
    )  # fmt: skip


def rest() -> Span:
    """Leave the cluster alone for a while."""
    time.sleep(SETTLE_S)
    began = time.monotonic()
    time.sleep(DWELL_S)
    return began, time.monotonic()


def until_spares(scene: Scene, wanted: int, timeout_s: float = 90.0) -> frozenset[int]:
    """The spares' processes, once this number waits."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = frozenset(pid for agent in scene.state().agents.values() for pid in agent.spares)
        if len(found) >= wanted:
            return found
        if time.monotonic() > deadline:
            raise WaitTimeout(f"{len(found)} of {wanted} spares wait after {timeout_s:.0f} s")
        time.sleep(POLL_S)


def cycle(scene: Scene, spares: int = 0) -> tuple[Scaled, Scaled]:
    """Up and down again."""
    waiting = until_spares(scene, spares) if spares else frozenset()
    up = scaled(scene, SMALL, LARGE, rest())
    if len(up.pids) != NEW or (spares and not up.pids <= waiting):
        raise ElasticError(f"of the new processes {sorted(up.pids)} some are no spares ({sorted(waiting)})")
    return up, scaled(scene, LARGE, SMALL, rest())


@dataclass
class Felt:
    """What clients saw of many scales. `steady` has the gaps of all rests at each size."""

    scene: Scene
    scales: Sequence[Scaled]
    steady: dict[int, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for each in self.scales:
            self.steady.setdefault(each.before, []).extend(self.scene.gaps(*each.rest))

    def p99_ms(self, size: int) -> float:
        """The steady p99 of single gaps at this size."""
        return percentile(self.steady[size], 0.99)

    def beyond_ms(self, scale: Scaled) -> float | None:
        """The largest gap across the flip beyond steady p99: that of the size where it is larger."""
        gaps = self.scene.gaps(scale.committed_at, scale.adopted_at)
        return max(0.0, max(gaps) - max(map(self.p99_ms, self.steady))) if gaps else None

    def chance(self, window_s: float) -> list[float]:
        """The same of windows of this length in the rests, each beyond its own size's p99."""
        found = []
        for each in self.scales:
            since, until = each.rest
            for number in range(int((until - since) / window_s)):
                gaps = self.scene.gaps(since + number * window_s, since + (number + 1) * window_s)
                found += [max(0.0, max(gaps) - self.p99_ms(each.before))] if gaps else []
        return found

    def slower(self, scale: Scaled) -> float | None:
        """How many times longer streams waited for a token, on average, while it was prepared than before.

        None if no request was under way: one that waits for its next token counts, however long.
        """
        during = self.scene.pace(scale.asked_at, scale.committed_at)
        before = self.scene.pace(*scale.rest)
        return before / during if during else None


def row_commit(report: Report, cycles: int, seed: int) -> None:
    """Up and down under load: the pause at commit, the pace while preparing, and the time to full size."""
    with scene(SMALL, STREAMS, seed, steady_s=1.0, roles="elastic.cli") as at:
        scales = []
        for number in range(cycles):
            scales += cycle(at)
            say(f"cycle {number}: full after {scales[-2].full_ms:.0f} ms up, {scales[-1].full_ms:.0f} ms down")
    felt = Felt(at, scales)
    for each in scales:
        report.receipt("commit", **_facts(each), beyond_ms=felt.beyond_ms(each), slower=felt.slower(each))
    load = f"{STREAMS} streams"
    for before, target in ((SMALL, LARGE), (LARGE, SMALL)):
        some = [each for each in scales if each.target == target]
        way = f"{before} -> {target}"
        beyond = [gap for each in some if (gap := felt.beyond_ms(each)) is not None]
        report.add(f"pause at commit {way}: largest gap beyond steady p99", load, "10 / 50 ms", beyond)
        report.add("- by the engine: last old step to end of first new one", load, "", [each.pause_ms for each in some])
        slower = [ratio for each in some if (ratio := felt.slower(each)) is not None]
        report.add(f"mean token gap while preparing {way} / before it", load, "1.5 x", slower, 2, "x")
    window_s = statistics.fmean(each.adopted_at - each.committed_at for each in scales)
    report.add(
        "the same gap without scaling (chance)", f"windows of {window_s * 1000:.0f} ms", "", felt.chance(window_s)
    )
    up = [each.full_ms for each in scales if each.target == LARGE]
    report.add(f"{NEW} new ranks, asked -> full size, forkserver", load, "1000 ms", up, 0)
    moved = sum(each.moved for each in scales)
    steady = ", ".join(f"{felt.p99_ms(size):.1f} ms with {size} ranks" for size in felt.steady)
    report.note(f"commit: steady p99 of gaps {steady}; {moved} requests computed again after {len(scales)} scales")
    report.ended("commit", at.verdict)


def row_size(report: Report, cycles: int, seed: int) -> None:
    """Time to full size with spares under load, and both ways in an idle cluster."""
    for streams, spares in ((STREAMS, NEW), (0, 0), (0, NEW)):
        way = "spares" if spares else "forkserver"
        load = f"{streams} streams" if streams else "idle"
        flags = ("--spares", str(spares)) if spares else ()
        found = []
        with scene(SMALL, streams, seed, steady_s=1.0, flags=flags, roles="elastic.cli") as at:
            for number in range(cycles):
                up, _ = cycle(at, spares)
                found.append(up.full_ms)
                report.receipt("size", way=way, streams=streams, **_facts(up))
                say(f"size {number}: {load}, {way}: full after {up.full_ms:.0f} ms")
        target = "300 ms" if spares else "1000 ms"
        report.add(f"{NEW} new ranks, asked -> full size, {way}", load, target, found, 0)
        report.ended(f"size, {way}, {load}", at.verdict)


def _facts(scale: Scaled) -> dict[str, object]:
    return {
        "before": scale.before, "target": scale.target, "operation": scale.operation, "epoch": scale.epoch,
        "bytes_moved": scale.bytes_moved, "full_ms": scale.full_ms, "pause_ms": scale.pause_ms, "moved": scale.moved,
        "prepare_ms": (scale.committed_at - scale.asked_at) * 1000, "pids": sorted(scale.pids),
    }  # fmt: skip
