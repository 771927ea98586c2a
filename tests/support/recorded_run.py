"""A small run to check: the planner's own world, watched and read as a recorder does it, with clients and faults.

Every transaction is the product's (`tests/support/world.py`); the lines come from the recorder's own functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from msgspec.structs import replace

from chaos.check.checker import check_record
from chaos.faults.base import Injected
from chaos.record.record import Answered, AnyLine, Changed, Expected, Happened, Header, InjectedFault, Verified
from chaos.record.recorder import Observed, look
from chaos.workload.history import RequestRecord
from membership.base.events import Event
from membership.store.in_memory import MemoryStore
from tests.support.world import World

START = 1000.0
TOKENS = ("a", "b", "c", "d")


class RecordedRun:
    """Plays a world and takes down what is seen of it."""

    def __init__(self, ranks: int = 3) -> None:
        self.store = MemoryStore()
        self.observed = Observed("/elastic-ep/sim/")
        self.lines: list[AnyLine] = []
        self._turn = 0
        self.world = World(desired=ranks, store=self.store, now=START)
        self._watch = self.store.watch("/elastic-ep/sim/", 1)
        self.see()

    def see(self) -> bool:
        """Take down what has changed, and what two clients read by turns. For `settle(until=…)`: never enough."""
        batch = self._watch.next(0.0)
        if batch is not None:
            self.lines += self.observed.watched(batch, self.world.now)
        self._turn += 1
        client, now = f"reader {self._turn % 2 + 1}", self.world.now
        self.lines.append(replace(look(self.store, self.world.keys, client, lambda: now), ended=now + 0.0002))
        return False

    def settle(self) -> None:
        """Until nothing happens any more."""
        self.world.settle(until=self.see)
        self.see()

    def event(self, kind: str, rank: int | None = None, **fields: Any) -> None:
        """A process writes an event."""
        self.lines.append(Happened(event=Event(ts=self.world.now, role="engine", kind=kind, rank=rank, fields=fields)))

    def kill(self, rank: int) -> None:
        """A proven kill, which the engine notices first."""
        incarnation = next(m.incarnation for m in self.world.state.view.members if m.rank == rank)  # type: ignore[union-attr]
        now = self.world.now
        fault = Injected(
            fault="kill", victim=f"rank {rank}", at=now, seen_at=now + 0.001, proof="pidfd says gone",
            pid=100 + incarnation,
        )  # fmt: skip
        self.lines.append(InjectedFault(fault=fault))
        self.world.now += 0.005
        self.world.mask(rank)
        self.event("rank_masked", rank, incarnation=incarnation)
        self.see()
        self.world.kill(rank)
        self.settle()


def tokens(prompt: int, seen: tuple[str, ...] = TOKENS, number: int = 0) -> RequestRecord:
    """A request's record."""
    return RequestRecord(
        prompt=prompt, id=f"cmpl-{prompt}-{number}", started=1.0 + number, tokens=seen, finish_reason="stop",
        token_times=tuple(1.1 + number + 0.1 * i for i in range(len(seen))), ended=2.0 + number,
    )  # fmt: skip


@cache
def good_lines() -> tuple[AnyLine, ...]:
    """A run in which every promise holds: bring-up, a death, a scale up by a new leader, one rolled back, one down."""
    run = RecordedRun()
    run.event("engine_elected", token=run.world.state.engine_token)
    run.settle()
    run.kill(1)
    run.world.elect()
    run.world.scale(4, op_id="up")
    run.settle()
    run.world.mute = {4, 5}
    run.world.scale(6, timeout_s=5.0, op_id="stuck")
    run.settle()
    run.world.scale(2, op_id="down")
    run.settle()
    lines = [_with_pid(line) for line in run.lines]
    header = Header(what="a small run", seed=1, started=START, wall=START, replay="", cluster="sim", ranks=3)
    oracle = [Expected(record=tokens(prompt)) for prompt in (0, 1)]
    answers = [Answered(record=tokens(prompt, number=number)) for number in (1, 2) for prompt in (0, 1)]
    said = Verified(promise="G7", ok=True, said="12 processes before, 12 after")
    return (header, *oracle, *answers, *lines, *_commit_events(lines), said)


def _with_pid(line: AnyLine) -> AnyLine:
    """The world's ranks all have the same process id: give each its own."""
    if isinstance(line, Changed) and "/ranks/" in line.key and not line.deleted:
        return replace(line, value={**line.value, "pid": 100 + line.value["incarnation"]})
    return line


def _commit_events(lines: list[AnyLine]) -> list[AnyLine]:
    """What the controllers say of their commits."""
    found: list[AnyLine] = []
    leader = 0
    for line in lines:
        if isinstance(line, Changed) and line.key.endswith("/leader") and not line.deleted:
            leader = line.create_revision
        elif isinstance(line, Changed) and line.key.endswith("/view"):
            fields = {"token": leader, "revision": line.revision, "experts_taken": 0}
            event = Event(
                ts=line.at, role="controller", kind="epoch_committed", epoch=line.value["epoch"], fields=fields
            )
            found.append(Happened(event=event))
    return found


def changed(lines: list[AnyLine], name: str, which: Callable[[Changed], bool] = lambda _: True) -> list[int]:
    """Where the lines are that change a key, and for which `which` holds."""
    key = f"/elastic-ep/sim/{name}"
    return [i for i, line in enumerate(lines) if isinstance(line, Changed) and line.key == key and which(line)]


def alarms(world: World) -> list[str]:
    """What the checks say against all that a world has written. (Controllers of a random episode look seldom: some
    operations end late.)"""
    prefix = world.keys.prefix
    batch = world.store.watch(prefix, 1).next(0.0)
    lines = Observed(prefix).watched(batch, world.now) if batch is not None else []
    header = Header(what="an episode", seed=0, started=START, wall=0.0, replay="", cluster=world.keys.cluster)
    found = [finding.what for row in check_record([header, *lines]).outcomes for finding in row.findings]
    return [what for what in found if "after its deadline" not in what]
