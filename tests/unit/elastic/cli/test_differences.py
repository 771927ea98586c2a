"""What `elastic doctor --cluster` says of a host that is not like the others."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from elastic.cli.differences import Here, differences
from elastic.serve.model_check import Finding
from membership.base.enums import Exactness
from membership.planning.identity import KERNELS
from membership.store.records import AgentRecord, Checkpoint, ClusterState, RankExit
from tests.support.cluster_states import CONFIG, healthy

pytestmark = pytest.mark.unit

CODE = "transformers 5.0.0, torch 2.9.1, llguidance 1.0.0, aaaa1111"
FILES = {"config.json": "c", "tokenizer.json": "t"}
ALIKE = Here("boot/1", CODE, "/m", FILES, "k1")
SERVED = Checkpoint(parts={"code": CODE, KERNELS: "k1"})


def cluster(code: str = CODE, exactness: Exactness = Exactness.INVARIANT) -> ClusterState:
    """Agents on this host and on host b, which runs `code`."""
    agents = {
        "a": AgentRecord(node="a", pid=1, started=1.0, host=ALIKE.host, code="anything"),
        "b": AgentRecord(node="b", pid=1, started=1.0, host="boot/2", code=code),
    }
    config = replace(CONFIG, files=tuple(FILES.items()), exactness=exactness)
    return healthy(agents=agents, config=config, checkpoint=SERVED)


def wrong(state: ClusterState, here: Here) -> list[Finding]:
    return [finding for finding in differences(state, here) if finding.level != "ok"]


def test_of_a_host_that_is_like_the_others_each_comparison_is_shown() -> None:
    found = list(differences(cluster(), ALIKE))
    assert [(each.what, each.level) for each in found] == [("host b", "ok"), ("checkpoint", "ok"), ("kernels", "ok")]


def test_other_versions_are_named_and_equal_ones_are_not() -> None:
    (found,) = wrong(cluster("transformers 5.0.0, torch 2.10.0, llguidance 1.0.0, bbbb2222"), ALIKE)
    assert (found.what, found.level) == ("host b", "fail")
    assert "torch 2.10.0 there and 2.9.1 here" in found.message
    assert "source of elastic-ep bbbb2222 there and aaaa1111 here" in found.message
    assert "transformers" not in found.message
    assert "install the same version" in found.hint


def test_an_agent_of_an_older_release_says_nothing_of_its_versions() -> None:
    (found,) = wrong(cluster(""), ALIKE)
    assert (found.what, found.level) == ("host b", "warn")
    assert "older" in found.message


@pytest.mark.parametrize(
    ("files", "level", "named"),
    [
        (FILES | {"tokenizer.json": "another"}, "fail", "tokenizer.json in /m are not"),
        ({"config.json": "c"}, "fail", "tokenizer.json in /m are not"),
        ({}, "warn", "there is no checkpoint at /m"),
    ],
)
def test_another_checkpoint_is_named_by_its_files(files: dict[str, str], level: str, named: str) -> None:
    (found,) = wrong(cluster(), Here(ALIKE.host, CODE, "/m", files, "k1"))
    assert (found.what, found.level) == ("checkpoint", level)
    assert named in found.message
    assert found.hint


def test_kernels_that_round_in_another_way_matter_only_where_outputs_are_equal_to_the_bit() -> None:
    other = Here(ALIKE.host, CODE, "/m", FILES, "k2")
    (found,) = wrong(cluster(), other)
    assert (found.what, found.level) == ("kernels", "fail")
    assert "(k2) than the ranks that serve (k1)" in found.message
    assert wrong(cluster(exactness=Exactness.STOCK), other) == []
    assert wrong(cluster(), Here(ALIKE.host, CODE, "/m", FILES)) == [], "not measured: its ranks have said it"


def test_a_rank_that_was_refused_on_any_host_is_shown_with_what_to_do() -> None:
    reason = "rank 3 on node b has another model than the cluster serves: weights (x instead of y)"
    exits = {3: RankExit(rank=3, incarnation=9, reason=reason, at=1.0, refused=True)}
    (found,) = wrong(replace(cluster(), exits=exits), ALIKE)
    assert (found.what, found.level, found.message) == ("ranks", "fail", reason)
    assert "put the files back" in found.hint


def test_a_rank_that_would_be_refused_is_shown_before_it_is() -> None:
    state = cluster()
    first = next(iter(state.ranks))
    ranks = state.ranks | {first: replace(state.ranks[first], fingerprint="k2")}
    (found,) = wrong(replace(state, ranks=ranks), ALIKE)
    assert "kernels (k2 instead of k1)" in found.message
