"""The suite runs each part as a command and holds its receipt against goals; a part without a receipt has failed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from chaos.campaigns.bursts import FOR_EACH_KIND
from chaos.campaigns.suite import Goal, Outcome, Part, Receipt, SuiteReceipt, at_least, run_suite
from chaos.campaigns.suite_parts import Dose, parts
from chaos.cli.suite import show
from elastic.cli.render import console

pytestmark = pytest.mark.unit


def goals(receipt: Receipt) -> Iterator[Goal]:
    yield at_least("lives", 1, receipt["lives"])


def part(name: str, *arguments: str, limit_s: float = 60.0) -> Part:
    return Part(name, "", arguments, goals, limit_s)


def test_parts_side_by_side_and_what_each_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulated = part("simulated", "simulate", "--faults", "20", "--jobs", "1", "--seed", "5", "-o", "json")
    silent = part("silent", "scenarios")  # a table for people
    late = part("late", "simulate", "--faults", "1000000", "-o", "json", limit_s=0.2)
    progress: list[str] = []
    receipt = run_suite([[], [simulated, silent], [late]], 5, tmp_path, progress.append)
    assert [(each.name, each.ok) for each in receipt.parts] == [("simulated", True), ("silent", False), ("late", False)]
    assert not receipt.ok
    assert receipt.parts[0].goals[0].reached.isdigit()
    assert "not done within 0 s" in receipt.parts[2].said
    assert (tmp_path / "simulated.json").is_file()
    assert progress[-1].startswith("late: BROKEN after")
    show(receipt, Console(width=200))
    assert "make chaos SEED=5" in capsys.readouterr().out


def test_what_a_part_has_said_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """It may be of any program: rich would take [/tmp/x] for the end of a style, and fail."""
    failed = Outcome(name="soak", about="", ok=False, seconds=1.0, goals=(), said="no file [/tmp/x]")
    show(SuiteReceipt(ok=False, seed=5, seconds=1.0, parts=(failed,)), console())
    shown = capsys.readouterr().out
    assert "no file [/tmp/x]" in shown
    assert "the suite failed in 0.0 minutes; again: make chaos SEED=5" in shown


def test_each_part_is_a_command_that_there_is(tmp_path: Path) -> None:
    from typer.main import get_command

    from chaos.cli.main import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert {each.arguments[0] for stage in parts(1, tmp_path) for each in stage} <= set(commands)


def test_a_share_does_less_and_leaves_no_part_out(tmp_path: Path) -> None:
    """A third of what is simulated, and of the soak: enough for each kind of burst."""
    whole, third = (
        {each.name: each for stage in parts(1, tmp_path, dose=Dose(share)) for each in stage} for share in (1, 3)
    )
    assert whole.keys() == third.keys()
    for name, share in (("simulate", 3), ("simulate-hosts", 3), ("soak", 3)):
        numbers = zip(whole[name].arguments, third[name].arguments, strict=True)
        drawn = [(int(a), int(b)) for a, b in numbers if a != b]
        assert drawn
        assert all(b == -(-a // share) for a, b in drawn)
    assert all(
        whole[name].arguments == third[name].arguments for name in whole.keys() - {"simulate", "simulate-hosts", "soak"}
    )
    numbers = dict(itertools.pairwise(third["soak"].arguments))
    done = {name: int(numbers[f"--{name}"]) for name in ("kills", "zombies", "outages", "requests")}
    clean = dict.fromkeys(("lost", "duplicated", "altered", "non_2xx"), 0) | {"broken": []}
    assert done["kills"] >= FOR_EACH_KIND
    assert all(goal.ok for goal in third["soak"].goals({**done, **clean}))
    assert [goal.ok for goal in whole["soak"].goals({**done, **clean})].count(False) == len(done)


def test_answers_with_a_form_are_judged_by_kills_and_by_each_request(tmp_path: Path) -> None:
    (formed,) = (each for stage in parts(1, tmp_path) for each in stage if each.name == "structured")
    held: Receipt = {
        "faults": {"kill": 50},
        "requests": 9,
        "lost": 0,
        "duplicated": 0,
        "altered": 0,
        "non_2xx": 0,
        "broken": [],
    }
    assert all(goal.ok for goal in formed.goals(held))
    for worse in ({"faults": {"kill": 49}}, {"requests": 0}, {"altered": 1}, {"lost": 1}, {"broken": ["x"]}):
        assert [goal.ok for goal in formed.goals({**held, **worse})].count(False) == 1


def test_a_speed_is_judged_of_what_runs_alone(tmp_path: Path) -> None:
    stages = {pace: [[each.name for each in stage] for stage in parts(1, tmp_path, pace)] for pace in (True, False)}
    assert stages[True][:2] == [["simulate"], ["simulate-hosts", "planted"]]
    assert stages[False][0] == ["simulate", "simulate-hosts", "planted"]
    assert stages[True][2:] == stages[False][1:]
