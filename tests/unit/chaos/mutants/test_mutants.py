"""Planted bugs: each guard is still where its bug takes it from; what is planted is caught, and in the planted tree."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace
from typer.testing import CliRunner

from chaos.cli.main import app
from chaos.mutants.bug import SIMULATE, Bug
from chaos.mutants.bugs import BUGS
from chaos.mutants.checks import CHECKS
from chaos.mutants.hunt import HuntReceipt, hunt
from chaos.mutants.plant import ROOT, buggy
from membership.base.errors import ConfigError

pytestmark = pytest.mark.unit

TWICE = next(bug for bug in BUGS if bug.name == "tokens-twice")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_its_guard_is_there_once_and_what_is_left_compiles(bug: Bug) -> None:
    compile(buggy(bug), bug.file, "exec")
    assert buggy(bug) != (ROOT / bug.file).read_text()
    assert bug.caught_by == SIMULATE or bug.caught_by in CHECKS
    assert bug.guards[:2] in {f"G{number}" for number in range(1, 10)}


def test_the_catalogue_is_large_enough_and_each_check_has_a_bug_to_catch() -> None:
    assert len(BUGS) >= 25
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    assert sum(bug.caught_by == SIMULATE for bug in BUGS) >= 18
    assert CHECKS.keys() == {bug.caught_by for bug in BUGS} - {SIMULATE}


def test_a_guard_that_has_moved_is_noticed() -> None:
    with pytest.raises(ConfigError, match=r"'tokens-twice'.*stands 0 times in elastic/gateway/journal.py"):
        buggy(replace(TWICE, before="return message.tokens[:]"))


def test_a_planted_bug_is_caught_and_none_where_nothing_is_planted() -> None:
    harmless = replace(TWICE, name="harmless", after=TWICE.before)
    receipt = hunt([replace(TWICE, caught_by="journal"), replace(harmless, caught_by="journal")], jobs=2)
    assert not receipt.control
    assert [found.caught for found in receipt.bugs] == [True, False]
    assert "the client has" in receipt.bugs[0].how
    assert not receipt.ok


def test_the_command() -> None:
    outcome = CliRunner().invoke(app, ["planted", "--only", "crash-loop-for-ever", "--jobs", "2", "-o", "json"])
    assert outcome.exit_code == 0, outcome.output
    receipt = msgspec.json.decode(outcome.stdout.splitlines()[-1], type=HuntReceipt)
    assert (receipt.planted, receipt.caught, receipt.control) == (1, 1, ())
    outcome = CliRunner().invoke(app, ["planted", "--only", "nothing"])
    assert outcome.exit_code == 1
    assert "no planted bug ['nothing']" in outcome.output
