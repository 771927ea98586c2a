"""Operations: proposed once, refused in words, planned without doing, waited for with a deadline."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from elastic.cli.render import plan_view
from membership.base.enums import OperationKind
from membership.base.errors import ConfigError, Fenced, OperationConflict, PlanRefused, StoreUnavailable
from membership.operations.change import scale
from membership.operations.dry_run import plan_change
from membership.operations.operations import KEPT, propose
from membership.operations.pause import pause
from membership.placement.survivability import survivability
from membership.store.interface import Compare, Op, TxnResult
from membership.store.phases import advance
from membership.store.records import Operation, Phase
from tests.support.world import CONFIG, World

pytestmark = pytest.mark.unit


@pytest.fixture
def world() -> World:
    world = World(config=replace(CONFIG, expert_bytes=1000))
    world.settle()
    return world


def test_a_proposal_is_stored_with_its_change(world: World) -> None:
    operation = world.scale(6, timeout_s=60.0)
    assert world.state.operations[operation.id] == operation
    assert (operation.phase, operation.previous, operation.deadline) == (Phase.PROPOSED, 4, operation.started + 60.0)
    desired = world.state.desired
    assert desired is not None
    assert (desired.ranks, desired.operation, desired.slots) == (6, operation.id, (0, 1, 2, 3))


def test_the_same_id_is_the_same_operation(world: World) -> None:
    first = world.scale(6, op_id="x")
    assert world.scale(6, op_id="x") == first
    world.settle()
    assert world.scale(6, op_id="x").phase is Phase.DONE
    with pytest.raises(OperationConflict, match="operation x exists already: scale to 6, not scale to 5"):
        world.scale(5, op_id="x")


def test_a_second_operation_names_the_active_one(world: World) -> None:
    world.scale(6, op_id="first")
    with pytest.raises(OperationConflict, match=r"operation first \(scale to 6, proposed\) is active"):
        world.scale(5)


def test_of_two_proposals_at_once_one_wins(world: World) -> None:
    class Late:
        """A store in which another client proposes between our look and our transaction."""

        def __init__(self) -> None:
            self.raced = False

        def __getattr__(self, name: str) -> object:
            return getattr(world.store, name)

        def txn(self, compares: list[Compare], success: list[Op]) -> TxnResult:
            if not self.raced:
                self.raced = True
                world.scale(5, op_id="other")
            return world.store.txn(compares, success)

    with pytest.raises(OperationConflict, match="other"):
        propose(Late(), "sim", scale(6), timeout_s=5.0, clock=lambda: world.now)  # type: ignore[arg-type]
    assert list(world.state.operations) == ["other"]


@pytest.mark.parametrize("landed", [True, False])
def test_an_answer_that_was_lost_is_read_back(world: World, landed: bool) -> None:
    class Lossy:
        def __getattr__(self, name: str) -> object:
            return getattr(world.store, name)

        def txn(self, compares: list[Compare], success: list[Op]) -> TxnResult:
            if landed:
                world.store.txn(compares, success)
            raise StoreUnavailable("no answer")

    store = Lossy()
    if landed:
        found = propose(store, "sim", scale(6), op_id="x", timeout_s=5.0, clock=lambda: world.now)  # type: ignore[arg-type]
        assert found == world.state.operations["x"]
    else:
        with pytest.raises(StoreUnavailable):
            propose(store, "sim", scale(6), op_id="x", timeout_s=5.0, clock=lambda: world.now)  # type: ignore[arg-type]


def test_an_epoch_that_has_passed_is_refused(world: World) -> None:
    with pytest.raises(Fenced, match="the epoch is 1, not 7"):
        propose(world.store, "sim", scale(6), if_epoch=7, timeout_s=5.0)
    assert propose(world.store, "sim", scale(6), if_epoch=1, timeout_s=5.0).if_epoch == 1


@pytest.mark.parametrize(("target", "words"), [(0, "0 ranks"), (13, "more than the 12"), (-1, "-1 ranks")])
def test_what_cannot_be_is_refused_before_anything_changes(world: World, target: int, words: str) -> None:
    before = world.state
    with pytest.raises(PlanRefused, match=words):
        world.scale(target)
    assert world.state == before


def test_a_cluster_that_starts_cannot_be_scaled_yet() -> None:
    with pytest.raises(PlanRefused, match="still starting"):
        World().scale(6)


def test_no_such_cluster(world: World) -> None:
    with pytest.raises(ConfigError, match="no cluster 'elsewhere'"):
        propose(world.store, "elsewhere", scale(6), timeout_s=5.0)


def test_old_operations_are_forgotten(world: World) -> None:
    for number in range(KEPT + 5):
        world.scale(4, op_id=f"op{number}")
        world.settle()
    kept = world.state.operations
    assert len(kept) == KEPT + 1
    assert "op0" not in kept
    assert f"op{KEPT + 4}" in kept


def test_a_plan_says_what_then_happens(world: World) -> None:
    for target in (6, 3, 5):
        plan = plan_change(scale(target), world.state)
        name = world.scale(target).id
        world.settle()
        operation = world.state.operations[name]
        assert operation.bytes_moved == plan.bytes_moved > 0
        assert set(world.serving) == set(plan.ranks) - set(plan.remove) | set(plan.add)


def test_a_plan_says_whose_death_would_cost_experts() -> None:
    world = World(desired=3, config=replace(CONFIG, expert_bytes=1000), nodes=("a", "b"))
    world.settle()
    before = world.state
    pair = plan_change(scale(2), before)
    assert pair.survives is not None
    assert (pair.survives.vital_ranks, pair.survives.vital_hosts) == ((), ())
    alone = plan_change(scale(1), before)
    assert alone.survives is not None
    assert (alone.survives.vital_ranks, alone.slots_for_rank_loss) == ((0,), None)
    assert world.state == before, "a plan changes nothing"


def test_a_plan_that_adds_ranks_knows_their_hosts() -> None:
    world = World(desired=1, config=replace(CONFIG, expert_bytes=1000), nodes=("a", "b"))
    world.settle()
    plan = plan_change(scale(4), world.state)
    world.scale(4)
    world.settle()
    view = world.state.view
    assert view is not None
    nodes = {m.rank: m.node for m in view.members}
    assert plan.survives == survivability(view.placement, nodes, CONFIG.moe_layers, CONFIG.experts)
    assert plan.survives.after_host_loss == 1


def test_a_plan_takes_as_long_as_the_last_one_took(world: World) -> None:
    assert plan_change(scale(6), world.state).estimated_s is None, "nothing was measured yet"
    times = {"proposed": 10.0, "spawning": 10.5, "loading": 12.0, "ready": 16.0, "done": 17.0}
    done = Operation(
        id="o",
        kind=OperationKind.SCALE,
        target=4,
        phase=Phase.DONE,
        bytes_moved=20_000,
        phase_times=times,
        pause_ms=21.0,
    )
    state = replace(world.state, operations={"o": done})
    assert "tokens wait about 21 ms at the commit" in plan_view(plan_change(scale(6), state))
    assert plan_change(scale(6), state).estimated_s == pytest.approx(2.0 + 10_000 * 4.0 / 20_000)
    assert plan_change(scale(3), state).estimated_s == pytest.approx(8_000 * 4.0 / 20_000), "no rank is launched"


def test_an_operation_that_is_over_leaves_room_for_the_next(world: World) -> None:
    operation = world.scale(6)
    ended = advance(operation, Phase.ABORTED, now=world.now, error="test")
    world.put(world.keys.op(operation.id), ended)
    assert world.scale(5).id != operation.id


def test_a_pause_at_the_same_moment_wins(world: World) -> None:
    """It is written between our look and our transaction, and counts from then."""

    class Paused:
        def __getattr__(self, name: str) -> object:
            return getattr(world.store, name)

        def txn(self, compares: list[Compare], success: list[Op]) -> TxnResult:
            if world.state.pause is None:
                pause(world.store, "sim", 60.0, clock=lambda: world.now)
            return world.store.txn(compares, success)

    with pytest.raises(PlanRefused, match="paused"):
        propose(Paused(), "sim", scale(6), timeout_s=5.0, clock=lambda: world.now)  # type: ignore[arg-type]
    assert not world.state.operations
