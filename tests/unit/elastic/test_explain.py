"""Why things are as they are, explained from the records alone."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from elastic.explain import Explanation, explain, explained
from membership.base.endings import MEMORY_HINT
from membership.base.enums import OperationKind
from membership.base.errors import ConfigError
from membership.planning.identity import HINT
from membership.store.records import ClusterState, Desired, Operation, Phase, RankExit
from tests.support.cluster_states import CONFIG, healthy, without

pytestmark = pytest.mark.unit

NOW = 10.0


def of(state: ClusterState, subject: str) -> Explanation:
    (found,) = [each for each in explain(state, NOW) if each.subject == subject]
    return found


def test_a_healthy_cluster_needs_nothing() -> None:
    (cluster,) = explain(healthy(), NOW)
    assert (cluster.state, cluster.next, cluster.do) == ("serving", "", "")
    assert "4 of 4 wanted ranks serve, in epoch 3" in cluster.because


def test_a_slot_in_quarantine_says_why_and_what_to_do() -> None:
    rank = of(without(healthy(), 2, quarantined=True), "rank 2")
    assert rank.state == "quarantined"
    assert "died 9.0 s ago: killed; 2 deaths in this slot so far" in rank.because[-1]
    assert rank.do.endswith("elastic unquarantine 2")


def test_a_dead_rank_says_when_its_successor_starts() -> None:
    assert of(without(healthy(), 1, not_before=12.5), "rank 1").next == "a new incarnation in 2.5 s (backoff)"
    assert of(without(healthy(), 1), "rank 1").next == "a new incarnation at once"


def test_a_memory_limit_that_is_too_low_is_told_with_what_to_do() -> None:
    """Ranks that die of it again and again while the others serve: the cluster stays ready."""
    reason = "killed by signal 9, SIGKILL, out of memory (cgroup oom_kill 1); detected by pidfd"

    def starved(state: ClusterState) -> ClusterState:
        return replace(state, exits={slot: replace(last, reason=reason) for slot, last in state.exits.items()})

    dying, set_aside = (starved(without(healthy(), 1, quarantined=each)) for each in (False, True))
    assert of(dying, "rank 1").do == MEMORY_HINT
    assert of(set_aside, "rank 1").do == f"{MEMORY_HINT}; then: elastic unquarantine 1"
    for state in (dying, set_aside):
        cluster = of(state, "cluster")
        assert "rank 1 died for want of memory" in cluster.because
        assert cluster.do == MEMORY_HINT
    earlier = {slot: replace(last, incarnation=last.incarnation - 1) for slot, last in dying.exits.items()}
    back = replace(healthy(), exits=earlier)
    assert of(back, "cluster").do == "", "it serves again"
    assert of(without(healthy(), 1), "rank 1").do == "", "another death"


def test_one_rank_of_them() -> None:
    (rank,) = explain(healthy(), NOW, "3")
    assert (rank.subject, rank.state, rank.do) == ("rank 3", "serving", "")
    assert "incarnation 4 is process 103 on node n with 4 experts" in rank.because
    with pytest.raises(ConfigError, match="there is no rank or operation 9") as refused:
        explain(healthy(), NOW, "9")
    assert refused.value.hint == "the ranks are: 0, 1, 2, 3; elastic ops ls"


@pytest.mark.parametrize("subject", ["9" * 5000, "\u0663", "\u00b2", "-1", "03x", ""])
def test_what_cannot_be_a_rank(subject: str) -> None:
    with pytest.raises(ConfigError, match="there is no rank or operation"):
        explain(healthy(), NOW, subject)


def test_lost_experts_a_missing_engine_and_no_agent_are_explained() -> None:
    cluster = of(replace(without(healthy(), 0, 2), engine=None, agents={}), "cluster")
    published = " | ".join(cluster.because)
    assert "4 experts have no live replica" in published
    assert "no engine is active" in published
    assert cluster.do == "start an agent: elastic agent"


def test_what_is_wrong_with_the_store_comes_first() -> None:
    cluster = explain(healthy(), NOW, store="the store was wiped")[0]
    assert cluster.because[0] == "the store was wiped"
    assert "membership is frozen" in cluster.do


def test_a_scale_that_was_rolled_back_is_explained() -> None:
    failed = Operation(
        id="grow",
        kind=OperationKind.SCALE,
        target=6,
        previous=4,
        started=1.0,
        deadline=9.0,
        phase=Phase.ABORTED,
        error="no room",
    )
    assert (
        "operation grow (scale to 6) was rolled back: no room"
        in of(replace(healthy(), operations={"grow": failed}), "cluster").because
    )


def test_people_read_it_line_by_line() -> None:
    text = explained(explain(without(healthy(), 2, quarantined=True), NOW))
    assert text.splitlines()[0].startswith("cluster: ")
    assert "  do: find the cause" in text
    pardoned = RankExit(rank=2, incarnation=3, reason="killed", at=1.0, restarts=6, forgiven=8.0)
    assert "an operator ended its quarantine 2.0 s ago" in explained(
        explain(replace(without(healthy(), 2), exits={2: pardoned}), NOW)
    )


def test_a_refused_slot_says_how_to_get_the_model_back() -> None:
    state = without(healthy(), 2, quarantined=True, refused=True)
    rank = of(state, "rank 2")
    assert rank.do == f"{HINT}; then: elastic unquarantine 2"
    assert of(state, "cluster").do == HINT


def test_a_nodes_replaced_files_are_explained_while_all_serve() -> None:
    agents = {"n": replace(healthy().agents["n"], trouble="model.safetensors in /m changed")}
    cluster = of(healthy(agents=agents), "cluster")
    assert "node n: model.safetensors in /m changed" in cluster.because
    assert cluster.do.startswith("put the files back")


def test_first_ranks_that_wait_for_more_hosts_say_how_many_are_there() -> None:
    few = replace(healthy(view=None, assignments={}, ranks={}), config=replace(CONFIG, min_agents=2))
    cluster = of(few, "cluster")
    assert cluster.because[-1] == "1 of 2 agents are there (n): the first ranks wait (--min-agents)"
    assert cluster.do == "start `elastic agent` on more hosts"
    enough = replace(few, config=CONFIG)
    assert "--min-agents" not in explained(explain(enough, NOW))
    assert "--min-agents" not in explained(explain(healthy(config=replace(CONFIG, min_agents=2)), NOW)), "it has begun"


def full(state: ClusterState, capacity: int) -> ClusterState:
    """The only host may have so many ranks."""
    return replace(state, agents={"n": replace(state.agents["n"], capacity=capacity)})


def test_a_full_host_is_named_with_what_it_has_and_what_to_do() -> None:
    wanted = healthy(desired=Desired(ranks=6, slots=tuple(range(6))))
    cluster = of(full(wanted, 4), "cluster")
    assert cluster.because[-1] == "no host has room for rank 4, 5: n has 4 of 4"
    assert cluster.do.startswith("start `elastic agent` on another host, or one of these with a larger --capacity")
    assert of(full(wanted, 5), "cluster").because[-1] == "no host has room for rank 5: n has 4 of 5"
    for roomy in (full(wanted, 6), full(healthy(), 4)):
        assert "no host has room" not in explained(explain(roomy, NOW))
    leaving = replace(wanted, agents={"n": replace(wanted.agents["n"], leaving=True)})
    assert of(leaving, "cluster").because[-1] == "no host has room for rank 4, 5: n is leaving"


def test_a_dead_rank_without_room_and_a_scale_without_room_say_so() -> None:
    dead = full(without(healthy(), 1), 3)
    unassigned = {
        "n": replace(dead.assignments["n"], ranks=dead.assignments["n"].ranks[::2] + dead.assignments["n"].ranks[3:])
    }
    rank = of(replace(dead, assignments=unassigned), "rank 1")
    assert rank.next == "it is started once a host has room: n has 3 of 3"
    grow = Operation(
        id="grow", kind=OperationKind.SCALE, target=6, previous=4, started=1.0, phase_times={Phase.PROPOSED: 1.0}
    )
    state = full(healthy(desired=Desired(ranks=6, operation="grow"), operations={"grow": grow}), 4)
    assert "no host has room for rank 4, 5: n has 4 of 4" in explain(state, NOW, "grow")[0].because
