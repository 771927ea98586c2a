"""The state of scaling: each rank in one list, and none is safe to end that is used, awaited or not yet certain."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from elastic.gateway.scaling import IDLE, scaling_status
from elastic.status import cluster_status
from membership.base.enums import OperationKind
from membership.base.errors import ConfigError
from membership.store.records import (
    AgentRecord,
    ClusterState,
    Desired,
    EngineRecord,
    EngineStatus,
    GatewayRecord,
    Member,
    Operation,
    Phase,
)
from tests.support.cluster_states import TOKEN, healthy, record, without

pytestmark = pytest.mark.unit


def operation(target: int, phase: Phase, **more: Any) -> dict[str, Operation]:
    return {"r": Operation(id="r", kind=OperationKind.SCALE, target=target, previous=4, phase=phase, **more)}


def test_without_an_operation() -> None:
    found = scaling_status(healthy(), 10.0)
    assert (found.phase, found.operation_id, found.pending_size, found.last_error) == (IDLE, "", None, "")
    assert (found.requested_size, found.effective_size, found.epoch) == (4, 4, 3)
    assert (found.active_ranks, found.safe_to_terminate_ranks) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert found.safe_to_terminate_nodes == ()


def test_a_rank_that_is_dead_is_unavailable_and_not_safe() -> None:
    found = scaling_status(without(healthy(), 2), 10.0)
    assert (found.active_ranks, found.unavailable_ranks, found.effective_size) == ((0, 1, 3), (2,), 4)
    assert found.safe_to_terminate_ranks == (4, 5, 6, 7)


def test_ranks_that_join_are_not_safe() -> None:
    state = healthy()
    specs = state.assignments["n"].ranks
    joining = replace(
        state,
        assignments={"n": replace(state.assignments["n"], ranks=(*specs, replace(specs[0], rank=4, incarnation=9)))},
        desired=Desired(ranks=6, slots=(0, 1, 2, 3, 4, 5)),
        operations=operation(6, Phase.SPAWNING),
    )
    found = scaling_status(joining, 10.0)
    assert (found.phase, found.pending_size, found.effective_size) == ("spawning", 6, 4)
    assert (found.joining_ranks, found.safe_to_terminate_ranks) == ((4,), (6, 7)), "slot 5 is chosen, and awaited"


@pytest.mark.parametrize(
    "uncertain",
    [
        {"desired": Desired(ranks=6)},
        {"desired": Desired(ranks=5, slots=(0, 1, 2, 3))},
        {"engine_status": EngineStatus(token=TOKEN, epoch=2)},
        {"engine_status": EngineStatus(token=TOKEN - 1, epoch=3)},
        {"engine_status": None},
    ],
)
def test_none_is_safe_while_it_is_not_certain(uncertain: dict[str, Any]) -> None:
    found = scaling_status(replace(healthy(), **uncertain), 10.0)
    assert (found.safe_to_terminate_ranks, found.safe_to_terminate_nodes) == ((), ())


def test_none_is_safe_while_the_store_is_silent() -> None:
    found = scaling_status(healthy(), 10.0, "the store has been silent for 7 s")
    assert (found.safe_to_terminate_ranks, found.safe_to_terminate_nodes) == ((), ())
    assert found.trouble == "the store has been silent for 7 s"


def test_a_host_of_the_engine_or_of_a_gateway_is_not_safe() -> None:
    small = healthy(2)
    agents = {**small.agents, **{node: AgentRecord(node=node, pid=4, started=1.0) for node in "bcd"}}
    engine = EngineRecord(node="b", pid=5, address="", broadcast_handle=b"", mask_handle=b"")
    gateways = {"g": GatewayRecord(name="g", pid=6, url="", admin_url="", node="c")}
    state = replace(small, agents=agents, engine=engine, gateways=gateways)
    assert scaling_status(state, 10.0).safe_to_terminate_nodes == ("d",)
    assert [node.node for node in cluster_status(state, 10.0).nodes if node.safe_to_delete] == ["d"]


def test_a_rank_that_left_is_safe_once_its_process_has_ended() -> None:
    small = healthy(2)
    agents = {**small.agents, "b": AgentRecord(node="b", pid=4, started=1.0)}
    gone = replace(small, agents=agents, operations=operation(2, Phase.DONE, epoch=3))
    there = replace(record(3), node="b")
    leaving = replace(gone, ranks={**gone.ranks, there.id: there}, operations=operation(2, Phase.RETIRING))
    assert scaling_status(leaving, 10.0).retiring_ranks == (3,)
    assert scaling_status(leaving, 10.0).safe_to_terminate_ranks == (2, 4, 5, 6, 7)
    assert scaling_status(leaving, 10.0).safe_to_terminate_nodes == ()
    assert scaling_status(gone, 10.0).safe_to_terminate_ranks == (2, 3, 4, 5, 6, 7)
    assert scaling_status(gone, 10.0).safe_to_terminate_nodes == ("b",)


def test_ranks_that_are_staged_are_not_safe() -> None:
    state = healthy(2)
    if state.view is None:
        raise AssertionError("healthy has a view")
    member = Member(rank=6, node="n", incarnation=9)
    staged = replace(state, next=replace(state.view, epoch=4, members=(*state.view.members, member)))
    assert 6 not in scaling_status(staged, 10.0).safe_to_terminate_ranks


def test_an_operation_that_ended_stays_on_record() -> None:
    found = scaling_status(healthy(operations=operation(6, Phase.ABORTED, error="rank 4 died", finished=9.0)), 10.0)
    assert (found.operation_id, found.phase, found.pending_size, found.last_error) == (
        "r",
        "aborted",
        None,
        "rank 4 died",
    )


def test_there_is_no_cluster_yet() -> None:
    with pytest.raises(ConfigError):
        scaling_status(ClusterState(revision=1), 10.0)
