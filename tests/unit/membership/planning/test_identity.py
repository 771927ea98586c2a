"""Whether a rank may serve beside the others: what differs is named, whatever it is, and copies are the same."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from membership.base.enums import Exactness
from membership.base.rank_id import RankId
from membership.planning.identity import HINT, HINT_COMPUTES, advice, learned, name_of, refusal
from membership.store.records import Checkpoint, ClusterConfig, ClusterState, Member, RankRecord, RankState, View

pytestmark = pytest.mark.unit

CONFIG = ClusterConfig(cluster="c", model="/m", served_model_name="m", moe_layers=2, experts=3)
PARTS = {"config.json": "c1", "weights": "w1", "code": "v1", "dtype": "bfloat16", "exactness": "invariant"}
PARTS |= {"threads": "1"}
E0, E1, E2, OTHER, UNKNOWN = b"aaaa", b"bbbb", b"cccc", b"zzzz", bytes(4)
WHOLE = (E0 + E1 + E2, E2 + E1 + E0)
KNOWN = Checkpoint(parts={**PARTS, "kernels": "k1"}, experts=WHOLE)


def record(rank: int = 1, **changes: object) -> RankRecord:
    base = RankRecord(
        rank=rank, incarnation=rank + 10, node="b", pid=1, state=RankState.STANDBY, fingerprint="k1", identity=PARTS,
    )  # fmt: skip
    return replace(base, **changes)


def state(*ranks: RankRecord, checkpoint: Checkpoint | None = KNOWN, **changes: object) -> ClusterState:
    by_id = {RankId(r.rank, r.incarnation): r for r in ranks}
    return ClusterState(revision=1, config=CONFIG, checkpoint=checkpoint, ranks=by_id, **changes)  # type: ignore[arg-type]


def test_the_same_content_may_serve_wherever_it_lies() -> None:
    assert refusal(state(), record(node="another host", expert_digests=WHOLE)) == ""


@pytest.mark.parametrize("part", [*PARTS])
def test_each_part_that_differs_refuses_and_is_named(part: str) -> None:
    why = refusal(state(), record(identity=PARTS | {part: "x9"}))
    assert why.startswith("rank 1 on node b ")
    assert f"{part} (x9 instead of {PARTS[part]})" in why
    assert advice(why) == (HINT if part in ("config.json", "weights") else HINT_COMPUTES)


def test_kernels_and_threads_matter_where_outputs_are_to_be_equal() -> None:
    other = record(fingerprint="k2", identity=PARTS | {"threads": "8"})
    assert "computes differently" in refusal(state(), other)
    stock = replace(CONFIG, exactness=Exactness.STOCK)
    known = replace(KNOWN, parts=KNOWN.parts | {"exactness": "stock"})
    parts = PARTS | {"exactness": "stock"}
    loose = ClusterState(revision=1, config=stock, checkpoint=known)
    assert refusal(loose, record(fingerprint="k2", identity=parts)) == ""
    assert "another model" in refusal(loose, record(identity=parts | {"weights": "w2"})), "a model matters always"


def test_a_single_expert_with_other_weights_refuses() -> None:
    held = (UNKNOWN + E1 + UNKNOWN, E2 + UNKNOWN + UNKNOWN)
    assert refusal(state(), record(expert_digests=held)) == ""
    why = refusal(state(), record(expert_digests=(UNKNOWN + OTHER + UNKNOWN, held[1])))
    assert f"weights of expert 1 of MoE layer 0 ({OTHER.hex()}, not {E1.hex()})" in why


def test_a_rank_that_has_not_loaded_is_not_refused() -> None:
    assert refusal(state(), record(identity={}, fingerprint="")) == ""


def test_before_the_first_view_the_lowest_rank_that_has_loaded_is_the_reference() -> None:
    mine, theirs = record(1), record(2, identity=PARTS | {"weights": "w2"})
    seen = state(mine, theirs, checkpoint=None)
    assert refusal(seen, mine) == ""
    assert "weights (w2 instead of w1)" in refusal(seen, theirs)
    unloaded = record(0, identity={}, fingerprint="")
    assert "w1" in refusal(state(unloaded, mine, theirs, checkpoint=None), theirs)


def test_members_are_the_reference_where_no_view_has_left_one() -> None:
    member, lower = record(3), record(0, identity=PARTS | {"code": "v2"})
    view = View(epoch=1, members=(Member(rank=3, node="b", incarnation=13),))
    seen = state(member, lower, checkpoint=None, view=view)
    assert "code (v2 instead of v1)" in refusal(seen, lower)


def test_what_serve_read_counts_for_the_first_rank_already() -> None:
    seen = ClusterState(revision=1, config=replace(CONFIG, files=(("config.json", "c0"), ("tokenizer.json", "t"))))
    assert "config.json (c1 instead of c0)" in refusal(seen, record(0))


def test_the_first_view_makes_the_reference_of_all_its_members() -> None:
    halves = (E0 + E1 + UNKNOWN, UNKNOWN + UNKNOWN + E0), (UNKNOWN + UNKNOWN + E2, E2 + E1 + UNKNOWN)
    ranks = [record(rank, expert_digests=held) for rank, held in enumerate(halves)]
    members = tuple(Member(rank=r.rank, node="b", incarnation=r.incarnation) for r in ranks)
    staged = state(*ranks, checkpoint=None, next=View(epoch=1, members=members))
    assert learned(staged) == KNOWN
    assert learned(replace(staged, checkpoint=KNOWN)) is None, "it stays what it is"
    assert learned(replace(staged, next=None)) is None, "there is no view to be the first"
    nothing = [record(r.rank, identity={}, fingerprint="") for r in ranks]
    assert learned(state(*nothing, checkpoint=None, next=staged.next)) is None


def test_the_name_of_what_is_served_follows_its_content() -> None:
    assert name_of(None) == ""
    assert name_of(KNOWN) == name_of(Checkpoint(parts=dict(reversed(KNOWN.parts.items())), experts=WHOLE))
    others = {name_of(replace(KNOWN, parts=KNOWN.parts | {"weights": "w2"}))}
    others.add(name_of(replace(KNOWN, experts=(WHOLE[0], OTHER + WHOLE[1][4:]))))
    assert len(others | {name_of(KNOWN)}) == 3
