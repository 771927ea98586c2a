"""Simulated lives: no promise breaks, a seed is one life to the bit, and a guard taken out of the product is missed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from chaos.cli import app
from chaos.simulation import world
from chaos.simulation.life import Life, live
from chaos.simulation.swarm import simulate
from elastic.journal import Journal
from elastic.migration import Migration
from elastic.protocol import Tokens
from elastic.scheduler import Scheduler
from membership import planner, succession
from membership.census import Census

pytestmark = pytest.mark.unit

LIVES = 200  # in which a planted bug must show


def test_the_same_seed_is_the_same_life_in_another_process() -> None:
    program = "import msgspec, chaos.simulation.life as l; print(msgspec.json.encode(l.live(7)).decode())"
    again = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert msgspec.json.decode(again.stdout, type=Life) == live(7)
    assert live(8).digest != live(7).digest


def test_the_command() -> None:
    outcome = CliRunner().invoke(app, ["simulate", "--faults", "30", "--jobs", "1", "--seed", "3", "-o", "json"])
    assert outcome.exit_code == 0, outcome.output
    assert msgspec.json.decode(outcome.stdout.splitlines()[-1])["lives"] >= 20
    outcome = CliRunner().invoke(app, ["simulate", "--replay", "--seed", "7"])
    assert msgspec.json.decode(outcome.stdout.splitlines()[-1], type=Life) == live(7)


def test_a_swarm_of_lives_breaks_no_promise() -> None:
    told = list[int]()
    receipt = simulate(seed=1, faults=600, jobs=1, tell=lambda lives, faults: told.append(faults))
    assert receipt.ok, receipt.violations
    assert receipt.faults >= 600
    assert receipt.faults == told[-1]
    assert receipt.replayed > 0
    assert set(receipt.kinds) >= {"kill", "zombie", "depose", "crash", "change", "late"}
    assert receipt.tokens > receipt.requests > 0


def stale_controllers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody compares what was read with what is there; only leadership is checked."""
    genuine = world.transaction
    monkeypatch.setattr(world, "transaction", lambda *known: ([], genuine(*known)[1]))


def unprepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A view is committed before its members are ready."""
    monkeypatch.setattr(Census, "unprepared", ())


def journal_believes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was emitted already is emitted again."""
    monkeypatch.setattr(Journal, "_fresh", lambda journal, request, message: message.tokens)


def any_engine_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway listens to engines that were replaced, and trusts each to go on where the stream is."""

    def fresh(journal: Journal, request: Any, message: Tokens) -> list[int]:
        return message.tokens

    monkeypatch.setattr(Journal, "_addressed", lambda journal, message: journal._open.get(message.request_id))
    monkeypatch.setattr(Journal, "_fresh", fresh)


def requests_die_with_their_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lived on a dead rank is not computed elsewhere."""
    monkeypatch.setattr(Scheduler, "_requeue", lambda scheduler, sequence: scheduler._forget(sequence))


def moved_without_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request moves off a leaving rank before its KV blocks have."""

    def onwards(migration: Migration, move: Any, now: float) -> Iterator[Any]:
        migration._finish(move, now)
        return iter(())

    monkeypatch.setattr(Migration, "_next", onwards)


def orphans_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a loss nobody loads what is held by no one any more."""
    monkeypatch.setattr(succession, "repair", lambda layers, experts, held: held)


def nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations are committed and never done."""
    monkeypatch.setattr(planner, "_moved", lambda census, operation: None)


PLANTED: list[Callable[[pytest.MonkeyPatch], None]] = [
    stale_controllers, unprepared, journal_believes_all, any_engine_heard, requests_die_with_their_rank,
    moved_without_its_cache, orphans_left, nothing_ends,
]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_caught(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    lives = (live(seed) for seed in range(1, LIVES + 1))
    broken = next((life for life in lives if life.violation), None)
    assert broken is not None, f"{plant.__doc__} Nobody noticed in {LIVES} lives."
