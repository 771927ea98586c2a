"""Every fault at every edge of an operation: it ends, done or rolled back, and no client that streams notices.

A process at a failpoint waits while the test injects a fault, then goes on.  it
All cases share one cluster; each, or from three to two and back, the first of the two changes under fire.

`make matrix` runs all of them (nine minutes on two cores); `make test` each edge and each fault, in fewer pairs.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.faults import kill
from chaos.target.warm_start import WarmStart
from membership.operations.change import Change, drain, scale, undrain
from membership.store.records import Member, Operation, Phase
from tests.support.held_cluster import DEADLINE_S, HeldCluster, T
from tests.support.helpers import eventually, hang
from tests.support.served import role_pid

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SMALL, LARGE = 2, 3
NEWCOMER = 2  # the slot that comes and goes
BEFORE_COMMIT = ("spawning", "handshaking", "loading")
UP = (*BEFORE_COMMIT, "committed", "retiring", "done")
DOWN = ("loading", "committed", "assigned", "retiring", "done")
FAULTS = ("kill controller", "depose controller", "kill newcomer", "hang newcomer", "stop etcd")
CHANGES = {  # the change and the way back, and the ranks that serve all the while
    "up": (scale(LARGE), scale(SMALL), (0, 1)),
    "down": (scale(SMALL), scale(LARGE), (0, 1)),
    "drain": (drain(0), undrain(0), (1, 2)),
}
OUTAGE_S = {"up": 3.5, "down": 1.0}  # longer than any lease, and shorter
OVERDUE_S = 4.0  # a deadline, for what never gets ready
INSIDE = (  # others than the controller, in the middle of their part
    ("kill newcomer", f"rank.registered@{NEWCOMER}"),
    ("kill newcomer", f"rank.before.prepare@{NEWCOMER}"),
    ("kill newcomer", f"rank.prepared@{NEWCOMER}"),
    ("leave it there", f"rank.registered@{NEWCOMER}"),
    ("leave it there", f"rank.before.prepare@{NEWCOMER}"),
    ("kill controller", "agent.before.spawn"),
    ("kill engine", "engine.before.flip"),
    ("kill engine", "engine.after.flip"),
)


Cell = tuple[str, str, str]
"""(change, failpoint, fault)"""


def edges(*phases: str) -> list[str]:
    return [f"controller.{when}.{phase}" for phase in phases for when in ("before", "after")]


def cells() -> list[Cell]:
    """Those to run."""
    return list(every_cell()) if os.environ.get("ELASTIC_WHOLE_MATRIX") else sample(list(every_cell()))


def sample(whole: list[Cell]) -> list[Cell]:
    """Each failpoint once, with the fault that came up least so far."""
    choices: dict[str, list[Cell]] = {}
    for cell in whole:
        choices.setdefault(cell[1], []).append(cell)
    times: Counter[str] = Counter()
    for choice in choices.values():
        choice.sort(key=lambda cell: times[cell[2]])
        times[choice[0][2]] += 1
    return [choice[0] for choice in choices.values()]


def every_cell() -> Iterator[Cell]:
    """The matrix."""
    for point in edges(*UP):
        for fault in FAULTS:
            if "newcomer" not in fault or point != "controller.before.spawning":  # there is none yet
                yield "up", point, fault
    yield from (("up", point, fault) for point in edges("aborted") for fault in ("kill controller", "stop etcd"))
    yield from (("up", point, fault) for fault, point in INSIDE)
    for point in edges(*DOWN):
        yield from (("drain", point, "kill controller"), ("down", point, "stop etcd"))


@pytest.fixture(scope="module")
def stage(demo_model: Path, warm: WarmStart, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeldCluster]:
    points = dict.fromkeys(point for _, point, _ in every_cell())
    with HeldCluster(demo_model, SMALL, tmp_path_factory.mktemp("faults"), points, warm) as held:
        yield held


@pytest.fixture(autouse=True)
def nothing_leaks(stage: HeldCluster, request: pytest.FixtureRequest) -> Iterator[None]:
    """Not the usual check (what a shared cluster starts is no leak): each case leaves one that serves."""
    assert not stage.broken, f"{stage.broken} left a cluster that cannot be used"
    yield
    stage.broken = request.node.name
    stage.cluster.wait_serving(size(stage))
    stage.broken = ""


def size(stage: HeldCluster) -> int:
    desired = stage.state.desired
    return desired.ranks if desired is not None else 0


def members(stage: HeldCluster, *ranks: int) -> list[Member | None]:
    view = stage.state.view
    return [view.member(rank) if view is not None else None for rank in ranks]


def change(stage: HeldCluster, request: Change) -> None:
    operation = stage.end_of(stage.propose(request, DEADLINE_S))
    assert operation.phase is Phase.DONE, operation
    stage.cluster.wait_serving(size(stage))


def inject(stage: HeldCluster, fault: str, point: str, outage_s: float) -> None:
    if fault == "kill controller":
        stage.kill_controller()
    elif fault == "depose controller":
        stage.depose_controller()
    elif fault == "kill newcomer":
        kill(stage.process_of(NEWCOMER).pid)
    elif fault == "hang newcomer":
        hang(stage.process_of(NEWCOMER).pid)
    elif fault == "kill engine":
        kill(role_pid(stage.cluster, "engine"))
    elif fault == "stop etcd":
        stage.stop_etcd(outage_s, point)


def with_fault(stage: HeldCluster, name: str, point: str, fault: str) -> tuple[Operation, int]:
    """Change, and inject while a process waits at the failpoint. How it ended; the incarnation with the fault."""
    left = fault == "leave it there"
    with stage.held(point):
        operation = stage.propose(CHANGES[name][0], OVERDUE_S if left else DEADLINE_S)
        if "aborted" in point:
            kill(stage.process_of(NEWCOMER).pid)
        stage.wait_held(point)
        faulty = stage.process_of(NEWCOMER).incarnation if "newcomer" in fault else 0
        inject(stage, fault, point, OUTAGE_S.get(name, 0.0))
        ended = stage.end_of(operation) if left else None
    return ended or stage.end_of(operation), faulty


def ends(point: str, fault: str) -> tuple[Phase, ...]:
    """How it may end: one way, but where it depends on which is faster."""
    phase = point.rpartition(".")[2]
    if fault == "stop etcd" or (point, fault) == ("controller.before.committed", "kill newcomer"):
        return Phase.DONE, Phase.ABORTED
    early = phase in BEFORE_COMMIT and "newcomer" in fault
    return (Phase.ABORTED,) if early or phase == "aborted" or point.startswith("rank.") else (Phase.DONE,)


@pytest.mark.parametrize(("name", "point", "fault"), cells())
def test_it_ends_and_no_client_notices(stage: HeldCluster, name: str, point: str, fault: str) -> None:
    request, back, stay = CHANGES[name]
    if size(stage) != (SMALL if name == "up" else LARGE):
        change(stage, scale(SMALL if name == "up" else LARGE))
    before, wanted, served = stage.state.view, size(stage), members(stage, *stay)
    operation, faulty = with_fault(stage, name, point, fault)
    assert operation.phase in ends(point, fault), operation
    if operation.phase is Phase.ABORTED:
        assert operation.error
        assert (stage.state.view, size(stage)) == (before, wanted), "nothing has changed"
        change(stage, request)
    elif faulty:
        eventually(lambda: (m := members(stage, NEWCOMER)[0]) and m.incarnation > faulty, T, "another newcomer")
    stage.cluster.wait_serving(size(stage))
    assert members(stage, *stay) == served, "serving ranks go on as they were"
    change(stage, back)
    stage.check_streams()
