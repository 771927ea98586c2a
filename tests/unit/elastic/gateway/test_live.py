"""What the live page is fed with: patches that make the new document of the old one, and what was sent per second."""

from __future__ import annotations

import asyncio
import re
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from elastic.gateway.live import MAX_READERS, STALLED_S, Live, LiveDocument, merge_patch
from elastic.gateway.page import FILES, POLICY
from elastic.gateway.traffic import KEPT_S, Traffic
from membership.base.enums import OperationKind
from membership.base.errors import RequestError
from membership.store.records import ClusterState, ExpertLoad, Heartbeats, Operation
from tests.support.cluster_states import healthy, without

pytestmark = pytest.mark.unit

LEAVES = st.one_of(st.booleans(), st.integers(), st.text(max_size=3), st.lists(st.integers(), max_size=3))
DOCUMENTS = st.recursive(
    st.dictionaries(st.sampled_from("abcd"), LEAVES, max_size=4),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), st.one_of(LEAVES, inner), max_size=4),
    max_leaves=12,
)


def applied(target: Any, patch: Any) -> Any:
    """RFC 7396, section 2."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = applied(result.get(name), value)
    return result


@given(DOCUMENTS, DOCUMENTS)
def test_a_patch_makes_the_new_document_of_the_old_one(old: dict[str, Any], new: dict[str, Any]) -> None:
    patch = merge_patch(old, new)
    assert applied(old, patch) == new
    assert (patch == {}) == (old == new)


def test_a_patch_says_what_has_changed_and_no_more() -> None:
    describe = LiveDocument().of
    before = healthy()
    now = describe(before, 10.0, "")
    assert now["ranks"]["2"] == {
        "rank": 2, "node": "n", "pid": 102, "incarnation": 3, "state": "serving", "slots": 4, "restarts": 0
    }  # fmt: skip
    assert (now["shape"]["layers"], now["shape"]["experts"], now["shape"]["max_ranks"]) == (2, 4, 8)
    assert now["placement"]["1"] == ((2, 3), (2, 3))
    assert merge_patch(now, describe(replace(before, revision=10), 11.0, "")) == {}
    dead = describe(without(before, 2), 11.0, "")
    patch = merge_patch(now, dead)
    sole = {"sole_experts": 4}  # of rank 0, which has the only replicas now
    assert patch["ranks"] == {"0": sole, "2": {"state": "dead", "pid": 0, "restarts": 2}}
    assert patch["status"]["state"] == "degraded"
    assert patch.keys() == {"ranks", "status"}
    assert applied(now, patch) == dead


def test_heartbeats_change_nothing() -> None:
    describe, state = LiveDocument().of, healthy()
    later = replace(state, heartbeats={"n": Heartbeats(node="n", at=12.0, beats={1: 12.0})})
    assert merge_patch(describe(state, 10.0, ""), describe(later, 12.0, "")) == {}


def test_loads_and_operations_come_and_go() -> None:
    describe, state = LiveDocument().of, healthy()
    operation = Operation(id="grow", kind=OperationKind.SCALE, target=6, previous=4, started=5.0, deadline=99.0)
    busy = replace(state, operations={"grow": operation}, expert_load=ExpertLoad(at=1.0, loads=((16, 8, 8, 32),) * 2))
    before, after = describe(state, 10.0, ""), describe(busy, 10.0, "")
    patch = merge_patch(before, after)
    assert patch["operations"]["grow"]["target"] == 6
    assert patch["loads"] == ((16, 8, 8, 32),) * 2
    assert patch["status"]["operation"]["phase"] == "proposed"
    assert merge_patch(after, describe(state, 10.0, ""))["status"]["operation"] is None


def test_what_has_not_changed_is_not_described_anew() -> None:
    """A placement may have tens of thousands of numbers, and the state changes once a second."""
    describe, state = LiveDocument().of, healthy()
    first, second = describe(state, 1.0, ""), describe(replace(state, revision=10), 2.0, "")
    assert all(first[name] is second[name] for name in ("shape", "placement", "loads", "operations"))


def test_a_cluster_that_has_only_begun() -> None:
    found = LiveDocument().of(ClusterState(revision=1), 1.0, "the store is silent")
    assert (found["status"]["state"], found["status"]["store"], found["ranks"]) == (
        "starting",
        "the store is silent",
        {},
    )


def test_traffic_is_kept_by_the_second() -> None:
    now = [100.2]
    traffic = Traffic(lambda: now[0])
    traffic.sent(3, 0.0)
    traffic.sent(1, 0.25)
    traffic.sent(1, 0.125)
    assert traffic.since(0) == [], "that second is not over"
    now[0] = 101.5
    traffic.ended()
    now[0] = 103.0
    assert [(s.at, s.tokens, s.gap_ms, s.ended) for s in traffic.since(0)] == [(100, 5, 250.0, 0), (101, 0, 0.0, 1)]
    assert [s.at for s in traffic.since(100)] == [101]
    now[0] = 101.5 + KEPT_S
    assert [s.at for s in traffic.since(0)] == [101]
    now[0] += 1
    assert traffic.since(0) == []


def test_the_page_needs_nothing_that_its_policy_forbids() -> None:
    """No script or style in the text, no handler in an attribute, nothing from another origin."""
    texts = {name: files("elastic.gateway").joinpath("ui", name).read_text("utf-8") for name, _ in FILES.values()}
    scripts = "".join(text for name, text in texts.items() if name.endswith(".js"))
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", texts["page.html"]) == []
    assert re.findall(r"\b(?:eval|innerHTML|outerHTML|document\.write|insertAdjacentHTML)\b", scripts) == []
    linked = re.findall(r"https?:[^'\"\s)]+", " ".join(texts.values()))
    assert set(linked) <= {"http://www.w3.org/2000/svg"}
    assert "unsafe" not in POLICY
    named = set(re.findall(r"\$\(\"([\w-]+)\"\)", texts["page.js"]))
    assert named <= set(re.findall(r'\bid="([\w-]+)"', texts["page.html"])), "elements that the script looks for"


def test_who_has_not_read_for_longest_gives_way_and_no_one_else() -> None:
    nothing: Any = None
    at, dropped = [100.0], []
    live = Live(nothing, Path("none"), Traffic(), lambda: False, clock=lambda: at[0])

    async def fill() -> None:
        readers = [live.stream(partial(dropped.append, number)) for number in range(MAX_READERS)]
        for reader in readers:  # each is being sent its first message
            live.make_room()
            assert (await anext(reader)).startswith(b"event: begin")
            at[0] += 1.0
        at[0] = 100.0 + STALLED_S - 0.1
        with pytest.raises(RequestError, match="8 readers"):
            live.make_room()
        at[0] = 100.0 + STALLED_S
        live.make_room()
        assert dropped == [0]
        newcomer = live.stream(partial(dropped.append, MAX_READERS))
        await anext(newcomer)
        with pytest.raises(RequestError, match="8 readers"):
            live.make_room()
        await readers[3].aclose()  # it leaves by itself
        live.make_room()
        for each in (*readers, newcomer):
            await each.aclose()
        assert dropped == [0]

    asyncio.run(fill())
