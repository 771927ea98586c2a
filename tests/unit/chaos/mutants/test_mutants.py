"""Mutants: each guard is still where its mutant removes it; each is caught for the right reason, in its own tree."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from typer.testing import CliRunner

from chaos.cli.main import app
from chaos.mutants.catalogue import MUTANTS
from chaos.mutants.hunt import HuntReceipt, hunt
from chaos.mutants.mutant import Mutant, Shown
from chaos.mutants.tree import ROOT, mutated_source, require_tests
from membership.base.errors import ConfigError

pytestmark = pytest.mark.unit

NAMED = {mutant.name: mutant for mutant in MUTANTS}
TWICE = NAMED["tokens-twice"]
JOURNAL = "tests/unit/elastic/gateway/test_journal.py"
IN_ORDER = f"{JOURNAL}::test_tokens_are_accepted_in_order_and_duplicates_are_dropped"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_its_guard_is_there_once_and_what_is_left_compiles(mutant: Mutant) -> None:
    compile(mutated_source(mutant), mutant.file, "exec")
    assert mutated_source(mutant) != (ROOT / mutant.file).read_text()
    assert mutant.guards[:2] in {f"G{number}" for number in range(1, 10)}


@pytest.mark.parametrize("mutant", [mutant for mutant in MUTANTS if mutant.tests], ids=lambda mutant: mutant.name)
def test_the_tests_that_it_names_exist(mutant: Mutant) -> None:
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text()


def test_the_catalogue_is_large_enough() -> None:
    assert len(MUTANTS) >= 64
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert sum(not mutant.tests for mutant in MUTANTS) >= 18


def test_a_guard_that_has_moved_is_noticed() -> None:
    with pytest.raises(ConfigError, match=r"'tokens-twice'.*stands 0 times in elastic/gateway/journal.py"):
        mutated_source(replace(TWICE, before="return message.tokens[:]"))


def test_without_tests_it_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are no tests in") as caught:
        require_tests(tmp_path)
    assert "wheel" in caught.value.hint


def test_a_mutant_is_caught_and_an_unchanged_product_is_not() -> None:
    caught = replace(TWICE, tests=(IN_ORDER,))
    harmless = replace(caught, name="harmless", after=TWICE.before)
    receipt = hunt([caught, harmless], jobs=2)
    assert not receipt.control
    assert [found.caught for found in receipt.bugs] == [True, False]
    assert "test_tokens_are_accepted_in_order_and_duplicates_are_dropped: AssertionError" in receipt.bugs[0].how
    assert not receipt.ok


def test_a_schedule_that_has_shown_it_is_tried_first_and_a_stale_one_costs_no_more_than_time() -> None:
    known = replace(NAMED["cache-believed"], shown=Shown(1, ()))
    stale = replace(NAMED["submitted-twice"], shown=Shown(1, ()))
    receipt = hunt([known, stale], jobs=2, lives=3)
    assert not receipt.control
    assert [(found.caught, found.lives > 1) for found in receipt.bugs] == [(True, False), (True, True)]
    assert (receipt.bugs[0].shown, receipt.bugs[0].events) == (Shown(1, ()), 0)
    assert receipt.bugs[1].shown != stale.shown


def test_a_test_that_fails_for_another_reason_catches_nothing() -> None:
    """A module that cannot be imported, a name that is gone, a test that does not notice."""
    broken = replace(TWICE, name="broken", after="return message.nonsense", tests=(IN_ORDER,))
    unimportable = replace(broken, name="unimportable", before="from __future__ import annotations", after="import no")
    unnoticed = replace(TWICE, name="unnoticed", tests=(IN_ORDER, f"{JOURNAL}::test_only_the_current_engine_counts"))
    receipt = hunt([broken, unimportable, unnoticed], jobs=2)
    assert [found.caught for found in receipt.bugs] == [False, False, False]
    assert "AttributeError" in receipt.bugs[0].how
    assert "cannot be collected" in receipt.bugs[1].how
    assert "test_only_the_current_engine_counts does not notice" in receipt.bugs[2].how


def test_the_command() -> None:
    outcome = CliRunner().invoke(app, ["planted", "--only", "crash-loop-for-ever", "--jobs", "2", "-o", "json"])
    assert outcome.exit_code == 0, outcome.output
    receipt = msgspec.json.decode(outcome.stdout.splitlines()[-1], type=HuntReceipt)
    assert (receipt.planted, receipt.caught, receipt.control) == (1, 1, ())
    assert 0 < receipt.bugs[0].cpu_s < receipt.cpu_s
    outcome = CliRunner().invoke(app, ["mutants", "--only", "nothing"])
    assert outcome.exit_code == 1
    assert "no planted bug ['nothing']" in outcome.output
