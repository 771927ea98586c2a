"""Each check finds the damage that it guards against, and quotes the lines that show it; a good run passes them all.

The run is of the planner's world (`support/recorded_run.py`): 5 epochs, a death, three operations, two controllers.
"""

from __future__ import annotations

import re

import pytest

from chaos.check.checker import Verdict, check_record, table
from chaos.check.evidence import Outcome
from tests.support.damage import DAMAGES
from tests.support.recorded_run import good_lines

pytestmark = pytest.mark.unit


def outcome(verdict: Verdict, title: str) -> Outcome:
    """The broken one of that title, or else the one there is."""
    rows = [row for row in verdict.outcomes if row.title == title]
    return next((row for row in rows if row.broken), rows[0])


def test_a_good_run_passes_every_check() -> None:
    verdict = check_record(good_lines())
    assert verdict.ok, list(table(verdict))
    assert all(row.verdict == "held" for row in verdict.outcomes), verdict
    assert outcome(verdict, "commits").figures == {"epochs": 5, "leaders": 2}
    assert outcome(verdict, "operations").figures == {"done": 2, "rolled_back": 1}
    assert outcome(verdict, "coverage").figures == {"losses": 1, "fewest_replicas": 1}


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_found_and_shown(name: str) -> None:
    hurt, title, what, quoted = DAMAGES[name]
    lines = list(good_lines())
    hurt(lines)
    verdict = check_record(lines)
    assert not verdict.ok
    found = [f for f in outcome(verdict, title).findings if re.search(what, f.what)]
    assert found, list(table(verdict))
    assert any(quoted in line for line in found[0].lines) or not quoted, found[0]
    assert len(found[0].lines) <= 6
