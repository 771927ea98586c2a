"""What a rotation of the join secret would do, or why it is refused, and who has which secrets."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from membership.base.enums import OperationKind
from membership.operations.rotate_keys import name_of, plan_rotation, secrets_in
from membership.store.records import (
    AgentRecord,
    ClusterState,
    EngineRecord,
    EngineStatus,
    GatewayRecord,
    Operation,
    Pause,
    Phase,
    RankRecord,
    RankState,
)
from tests.support.world import CONFIG

pytestmark = pytest.mark.unit

OLD, NEW, OTHER = "old key", "new key", "other key"
BOTH = (NEW, OLD)
NOW = 100.0


def rank(slot: int, incarnation: int, key: str, node: str = "a") -> RankRecord:
    return RankRecord(rank=slot, incarnation=incarnation, node=node, pid=1, state=RankState.STANDBY, join_key=key)


def cluster(**changes: Any) -> ClusterState:
    """Two hosts that have both secrets and use the old one."""
    records = [rank(0, 3, OLD), rank(1, 4, OLD, "b")]
    whole: dict[str, Any] = {
        "revision": 9,
        "config": replace(CONFIG, join_key=OLD),
        "incarnation": 4,
        "engine": EngineRecord(node="a", pid=1, address="", broadcast_handle=b"", mask_handle=b"", join_key=OLD),
        "engine_token": 7,
        "engine_status": EngineStatus(token=7, epoch=1, join_keys=BOTH),
        "agents": {node: AgentRecord(node=node, pid=1, started=1.0, join_keys=BOTH) for node in "ab"},
        "gateways": {"g": GatewayRecord(name="g", pid=1, url="", admin_url="", node="b", join_keys=BOTH)},
        "ranks": {record.id: record for record in records},
    }
    return ClusterState(**(whole | changes))


def rotated(*ranks: RankRecord, engine: str = NEW, grace: bool = True, **changes: Any) -> ClusterState:
    """The same once the config names the new one; these ranks are there, and the engine listens with this."""
    config = replace(CONFIG, join_key=NEW, join_keys_before=(OLD,), join_grace=grace, join_generation=1, join_since=4)
    before = cluster()
    assert before.engine is not None
    record = replace(before.engine, join_key=engine)
    return cluster(config=config, engine=record, ranks={each.id: each for each in ranks}, **changes)


def test_all_that_listens_does_so_anew() -> None:
    plan = plan_rotation(cluster(), NOW)
    assert (plan.refused, plan.changes, plan.begun) == ("", True, False)
    assert (plan.secret, plan.generation) == (name_of(NEW), 1)
    assert (plan.engine, plan.ranks, plan.before) == (True, (0, 1), 4)


def test_one_that_was_interrupted_goes_on_with_what_is_left() -> None:
    """Under the number under which it began, whichever ranks are left: its operations are known by that."""
    plan = plan_rotation(rotated(rank(0, 3, OLD), rank(1, 6, NEW)), NOW)
    assert (plan.begun, plan.changes, plan.engine, plan.ranks, plan.before) == (True, True, False, (0,), 4)
    late = plan_rotation(rotated(rank(0, 5, NEW), rank(1, 6, OLD)), NOW)
    assert (late.ranks, late.before) == ((1,), 6), "it was started afterwards, where the new one was lacking"
    engine = plan_rotation(rotated(rank(0, 5, NEW), engine=OLD), NOW)
    assert (engine.begun, engine.engine, engine.ranks) == (True, True, ())


def test_nothing_is_left_once_all_listen_with_the_new_one() -> None:
    plan = plan_rotation(rotated(rank(0, 5, NEW)), NOW)
    assert (plan.begun, plan.ends, plan.changes) == (True, True, True), "but to retire the one before"
    plan = plan_rotation(rotated(rank(0, 5, NEW), grace=False), NOW)
    assert (plan.begun, plan.ends, plan.changes, plan.refused) == (True, False, False, "")


def test_where_it_was_never_replaced_another_one_is_asked_for() -> None:
    alone = AgentRecord(node="a", pid=1, started=1.0, join_keys=(OLD,))
    status = EngineStatus(token=7, epoch=1, join_keys=(OLD,))
    plan = plan_rotation(cluster(agents={"a": alone}, gateways={}, engine_status=status), NOW)
    assert plan.refused == "no host has another join secret than the one that is used"
    assert "elastic keys new" in plan.hint


@pytest.mark.parametrize("lacks", ["engine", "gateway", "agent"])
def test_a_process_that_lacks_the_new_secret_is_named(lacks: str) -> None:
    state = cluster()
    if lacks == "engine":
        state = replace(state, engine_status=EngineStatus(token=7, epoch=1, join_keys=(OLD,)))
    elif lacks == "gateway":
        state = replace(state, gateways={"g": replace(state.gateways["g"], join_keys=(OLD,))})
    else:
        state = replace(state, agents=state.agents | {"b": replace(state.agents["b"], join_keys=(OLD,))})
    where = {"engine": "engine on a", "gateway": "gateway g on b", "agent": "agent on b"}[lacks]
    plan = plan_rotation(state, NOW)
    assert plan.refused == f"join secret {name_of(NEW)} is lacking: {where}"
    assert "--join-secret-file" in plan.hint


@pytest.mark.parametrize("begun", [False, True])
def test_a_host_that_lacks_the_old_secret_is_named_while_something_listens_with_it(begun: bool) -> None:
    """The new engine could join no far rank: `elastic keys new > FILE` has ended the old line."""
    alone = {"b": AgentRecord(node="b", pid=1, started=1.0, join_keys=(NEW,))}
    plan = plan_rotation(rotated(rank(0, 3, OLD), agents=alone) if begun else cluster(agents=alone), NOW)
    assert plan.begun is begun
    assert plan.refused == f"join secret {name_of(OLD)}, with which processes still listen, is lacking: agent on b"
    assert "put its line back" in plan.hint
    plan = plan_rotation(rotated(rank(0, 5, NEW), agents=alone), NOW)
    assert (plan.refused, plan.ends) == ("", True), "nothing does any more"
    plan = plan_rotation(rotated(rank(0, 3, OLD), agents=alone, grace=False), NOW)
    assert (plan.refused, plan.ranks) == ("", (0,)), "it is retired, and opens nothing"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"config": CONFIG}, "this cluster is on one host: it has no join secret"),
        ({"pause": Pause(until=NOW + 60, since=NOW)}, "planned changes are paused for another 60 s"),
        (
            {"operations": {"o": Operation(id="o", kind=OperationKind.SCALE, target=5, phase=Phase.SPAWNING)}},
            "operation o is under way",
        ),
        (
            {"agents": {"a": AgentRecord(node="a", pid=1, started=1.0, join_keys=(*BOTH, OTHER))}},
            f"hosts have several other join secrets: {', '.join(sorted((name_of(NEW), name_of(OTHER))))}",
        ),
    ],
)
def test_what_is_in_the_way_is_said(changes: dict[str, Any], why: str) -> None:
    plan = plan_rotation(cluster(**changes), NOW)
    assert plan.refused == why
    assert not plan.changes


def test_the_secret_before_is_no_new_one() -> None:
    """Its line may stay in the files for as long as one likes."""
    assert not plan_rotation(rotated(rank(0, 5, NEW), grace=False), NOW).changes


def test_each_process_is_shown_with_its_generation() -> None:
    found = secrets_in(rotated(rank(0, 5, NEW), rank(1, 4, OLD), rank(2, 6, OTHER), engine=OLD))
    assert (found.generation, found.current, found.before, found.others) == (1, name_of(NEW), name_of(OLD), ())
    assert found.grace
    assert found.in_use == tuple(sorted(map(name_of, (OLD, NEW, OTHER))))
    names = tuple(map(name_of, BOTH))
    assert [(use.role, use.node, use.generation, use.has) for use in found.uses] == [
        ("engine", "a", 0, names),
        ("gateway g", "b", None, names),
        ("agent", "a", None, names),
        ("agent", "b", None, names),
        ("rank 0", "a", 1, None),
        ("rank 1", "a", 0, None),
        ("rank 2", "a", None, None),
    ]


def test_what_an_engine_has_is_unknown_before_it_says_so() -> None:
    state = replace(cluster(), engine_token=8)
    assert secrets_in(state).uses[0].has is None
    assert plan_rotation(state, NOW).refused == ""
