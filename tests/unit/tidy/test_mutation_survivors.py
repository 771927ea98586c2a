"""The changes that no test notices: each is of a line that is there, and no other than what the list explains."""

from __future__ import annotations

import pytest

from tests.support import ROOT
from tests.support.mutants import Mutant, Survivor, explained
from tests.support.mutation import TARGETS, UNIT

pytestmark = pytest.mark.unit


def test_each_explained_survivor_is_of_a_line_that_is_there() -> None:
    gone = [
        f"{each.file}: {each.before}"
        for each in explained()
        if each.file not in TARGETS
        or each.before not in map(str.strip, (ROOT / each.file).read_text(encoding="utf-8").splitlines())
    ]
    assert not gone, gone


def test_each_survivor_is_explained_once_and_in_words() -> None:
    changes = [(each.file, each.before, each.after) for each in explained()]
    assert len(changes) == len(set(changes))
    wordless = [each.before for each in explained() if len(each.why.split()) < 4]
    assert not wordless, wordless


def test_what_is_explained_is_that_change_only() -> None:
    one = Survivor(file="a.py", before="x > 0", after="x >= 0", why="")
    line = Survivor(file="a.py", before="x > 0", why="")
    boundary, turned = (Mutant("a.py", 1, "x > 0", after, "") for after in ("x >= 0", "x <= 0"))
    assert (one.explains(boundary), one.explains(turned)) == (True, False)
    assert (line.explains(boundary), line.explains(turned)) == (True, True)
    assert not line.explains(boundary._replace(file="b.py"))


def test_what_decides_and_its_tests_are_there() -> None:
    wanted = [*TARGETS, *(f"{UNIT}{test}" for tests in TARGETS.values() for test in tests)]
    assert [path for path in wanted if not (ROOT / path).exists()] == []
