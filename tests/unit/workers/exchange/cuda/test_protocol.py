"""The protocol between ranks' kernels, in every order that their moves, a death and a call-off can come in."""

from __future__ import annotations

from itertools import product

import pytest

from tests.support.window_model import ORDER, Phase, Rules, Setting, Violation, explore

pytestmark = pytest.mark.unit

Sends = list[list[frozenset[int]]]


def two(*layers: str) -> Sends:
    """A word per layer: "both" ranks have rows for each other, "first" or "last" alone has, or "none" has."""
    rows = {"both": ({1}, {0}), "first": ({1}, set()), "last": (set(), {0}), "none": (set(), set())}
    return [[frozenset(peers) for peers in rows[layer]] for layer in layers]


UNEVEN: Sends = [[frozenset({1, 2}), frozenset({0}), frozenset()], [frozenset({1}), frozenset({2}), frozenset({0})]]
PATTERNS = [two("both", "both"), two("none", "both"), two("first", "last")]
EARLY_WORDS = {
    "asked before rows": (Phase.PUBLISH_QUESTIONS, Phase.WRITE_QUESTIONS, *ORDER[2:]),
    "answered before rows": (*ORDER[:4], Phase.PUBLISH_ANSWERS, Phase.WRITE_ANSWERS, *ORDER[6:]),
}


def test_without_a_fault_no_rank_waits_for_ever_or_is_overtaken() -> None:
    """In three layers, whichever of two ranks have rows for each other in each; and three ranks."""
    for layers in product(("both", "first", "last", "none"), repeat=3):
        assert explore(Setting(two(*layers))) > 3 * len(ORDER)
    assert explore(Setting(UNEVEN)) > 1000


@pytest.mark.parametrize("sends", PATTERNS, ids=["both", "none, both", "first, last"])
def test_a_death_and_a_call_off_anywhere_harm_no_step(sends: Sends) -> None:
    """Nor does what the dead still write. The next step is run with a successor in the slot."""
    assert explore(Setting(sends, steps=2, may_die=True, may_abort=True, replaced=True)) > 10_000


def test_two_of_three_go_on() -> None:
    assert explore(Setting(UNEVEN[1:], may_die=True)) > 1000


@pytest.mark.parametrize(
    "rules",
    [
        Rules(banks=1),
        Rules(base_rises=False),
        Rules(masked_are_not_awaited=False),
        Rules(aborts=False),
        Rules(gives_up_by_failing=False),
        Rules(reuse_waits=False),
        *(Rules(order=order) for order in EARLY_WORDS.values()),
    ],
    ids=["one bank", "base", "masked", "no abort", "silent", "reuse at once", *EARLY_WORDS],
)
def test_each_rule_is_needed(rules: Rules) -> None:
    with pytest.raises(Violation):
        all(explore(Setting(sends, steps=3, may_die=True, replaced=True, rules=rules)) for sends in PATTERNS)
