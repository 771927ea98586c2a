"""Records of a cluster that is well, and of one that has lost ranks."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from membership.store.records import (
    AgentRecord,
    Assignment,
    ClusterConfig,
    ClusterState,
    Desired,
    EngineRecord,
    EngineStatus,
    Heartbeats,
    Member,
    RankExit,
    RankRecord,
    RankSpec,
    RankState,
    View,
)

CONFIG = ClusterConfig(
    cluster="c", model="/m", served_model_name="m", moe_layers=2, experts=4, redundancy=2.0, max_ranks=8
)


TOKEN = 50


HALVES = (((0, 1), (0, 1)), ((2, 3), (2, 3)))


def record(rank: int, state: RankState = RankState.STANDBY, incarnation: int = 0) -> RankRecord:
    return RankRecord(rank=rank, node="n", incarnation=incarnation or rank + 1, pid=100 + rank, state=state)


def healthy(size: int = 4, **changes: Any) -> ClusterState:
    """`size` members; each expert on two of them."""
    members = tuple(Member(rank=rank, node="n", incarnation=rank + 1) for rank in range(size))
    specs = tuple(RankSpec(rank=m.rank, incarnation=m.incarnation) for m in members)
    state = ClusterState(
        revision=9,
        config=CONFIG,
        desired=Desired(ranks=size, slots=tuple(range(size))),
        view=View(epoch=3, members=members, placement={rank: HALVES[rank % 2] for rank in range(size)}),
        engine=EngineRecord(node="n", pid=2, address="a", broadcast_handle=b"", mask_handle=b""),
        engine_token=TOKEN,
        engine_status=EngineStatus(token=TOKEN, epoch=3, running=5, waiting=1),
        agents={"n": AgentRecord(node="n", pid=3, started=1.0)},
        assignments={"n": Assignment(node="n", ranks=specs, agent_started=1.0)},
        ranks={(rank, rank + 1): record(rank) for rank in range(size)},
        heartbeats={"n": Heartbeats(node="n", at=9.9, beats={rank + 1: 9.75 for rank in range(size)})},
    )
    return replace(state, **changes)


def without(state: ClusterState, *dead: int, **exit_fields: Any) -> ClusterState:
    """The agent has seen these ranks die."""
    ranks = {key: r for key, r in state.ranks.items() if key[0] not in dead}
    exits = {
        rank: RankExit(rank=rank, incarnation=rank + 1, reason="killed", at=1.0, restarts=2, **exit_fields)
        for rank in dead
    }
    return replace(state, ranks=ranks, exits=exits)
