"""What a scenario may do to a running deployment, and what it is refused, with why; victims; what breaks a run."""

from __future__ import annotations

import random
from typing import Any

import pytest

from chaos.campaigns.scenario_run import ScenarioRun
from chaos.faults.base import Injected, NotInjected
from chaos.scenarios.blast_radius import Limits, too_much, unfit
from chaos.scenarios.dry_run import DryRun, Expected, dry_run
from chaos.scenarios.reading import parse
from chaos.scenarios.script import Expect
from chaos.scenarios.victims import Chooser, Sight
from chaos.workload.history import RequestRecord
from membership.base.events import Event
from membership.store.records import Placement

pytestmark = pytest.mark.unit

PLACEMENT: Placement = {0: ((0, 1),), 1: ((1, 2),), 2: ((2, 0),), 3: ((0, 1),)}  # expert 2: ranks 1 and 2 alone
LIMITS = Limits()


def status(**changed: Any) -> dict[str, Any]:
    ranks = [{"rank": rank, "state": "serving"} for rank in range(4)]
    return {"state": "serving", "ranks": ranks, "desired": 4, "operation": None, "pause": None, "store": "", **changed}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, ""),
        ({"state": "degraded", "ranks": [{"rank": 1, "state": "dead"}]}, "it is degraded: rank 1 is dead"),
        ({"desired": 5}, "it is not whole (it has 4 ranks, wanted 5)"),
        ({"operation": {"id": "x1", "what": "scale to 6"}}, "operation x1 (scale to 6) is active"),
        ({"pause": {"words": "paused by me"}}, "paused by me; end the pause first"),
        ({"store": "wiped"}, "its store is in trouble: wiped"),
    ],
)
def test_a_deployment_must_be_fit(changed: dict[str, Any], says: str) -> None:
    why = unfit(status(**changed))
    assert why.startswith(says)
    assert bool(why) == bool(says)


@pytest.mark.parametrize(
    ("victims", "down", "limits", "says"),
    [
        (("rank 0",), (), LIMITS, ""),
        (("controller",), (0,), LIMITS, ""),
        (("rank 0",), (0,), LIMITS, ""),  # the same one
        (("rank 0",), (3,), LIMITS, "2 ranks would be down at a time (0, 3), and 1 may"),
        (("rank 0", "rank 3"), (), LIMITS, "allow it: --max-ranks-down 2"),
        (("rank 0", "rank newest"), (), LIMITS, "2 ranks would be down"),
        (("rank 0", "rank 3"), (), Limits(max_ranks_down=2), ""),
        (("rank 1", "rank 2"), (), Limits(max_ranks_down=2), "1 (layer, expert) pairs would have no live replica"),
        (("rank 1", "rank 2"), (), Limits(max_ranks_down=2, allow_uncovered=True), ""),
        (("gateway",), (), LIMITS, "--only-roles rank,controller,engine,engine-standby,gateway"),
        (("agent",), (), Limits(only_roles=("agent",)), "4 ranks would be down at a time"),
        (("supervisor",), (), Limits(only_roles=("supervisor",)), "nothing would start the supervisor again"),
    ],
)
def test_what_is_too_much(victims: tuple[str, ...], down: tuple[int, ...], limits: Limits, says: str) -> None:
    why = too_much(victims, down, PLACEMENT, limits)
    assert says in why
    assert bool(why) == bool(says)


def planned(steps: str, limits: Limits = LIMITS) -> DryRun:
    scenario = parse(f"name: n\nabout: a\nsteps: [{steps}]", "n.yaml")
    return dry_run(scenario, 1, Expected([0, 1, 2, 3], placement=PLACEMENT, limits=limits))


def test_a_dry_run_adds_up_what_is_down() -> None:
    assert not planned("kill: rank 0, wait: whole, kill: rank 1").refused
    second = planned("kill: rank 0, wait: 2, kill: rank 3").refused
    assert [step.step for step in second] == ["3"]
    holders = planned("kill: rank holders", Limits(max_ranks_down=2)).steps[0]
    assert holders.victims == ("rank 1", "rank 2")
    assert "no live replica" in holders.refused


def test_a_dry_run_that_does_nothing() -> None:
    assert not planned("wait: whole").changes
    assert planned("scale: back").changes


def test_others_were_no_victims_in_this_round() -> None:
    chooser, sight = Chooser(random.Random(3)), Sight((4, 5, 6), newest=6, placement=PLACEMENT)
    first = [chooser.choose("rank other", sight) for _ in range(3)]
    assert {victim for (victim,) in first} == {"rank 4", "rank 5", "rank 6"}
    with pytest.raises(NotInjected, match="no rank left"):
        chooser.choose("rank other", sight)
    chooser.next_round()
    assert chooser.choose("rank 5", sight) == chooser.choose("rank same", sight) == ("rank 5",)
    assert chooser.choose("rank other", sight) in (("rank 4",), ("rank 6",))
    assert chooser.choose("rank newest", sight) == ("rank 6",)
    assert chooser.choose("rank all", sight) == ("rank 4", "rank 5", "rank 6")
    assert chooser.choose("rank holders", sight) == ("rank 1", "rank 2")
    assert chooser.choose("engine", sight) == ("engine",)


RIGHT = RequestRecord(prompt=0, started=0.0, tokens=("a", "b"), token_times=(0.1, 0.2), finish_reason="length")
CUT = RequestRecord(prompt=0, started=0.0, tokens=("a",), token_times=(0.1,), error="ReadError: cut")
REFUSED = RequestRecord(prompt=0, started=0.0, error="HTTP 503: no live replica")
FAULT = Injected(fault="kill", victim="rank 1", at=1.0, seen_at=1.1, proof="gone")


def played(*history: RequestRecord, expect: Expect | None = None) -> ScenarioRun:
    scenario = parse("name: n\nabout: a\nsteps: [kill: rank 1]", "n.yaml")
    if expect is not None:
        scenario = type(scenario)(name="n", about="a", steps=scenario.steps, expect=expect)
    commits = [Event(ts=n, role="controller", kind="epoch_committed", epoch=n) for n in (2, 3)]
    return ScenarioRun(
        scenario=scenario, seed=1, injected=[FAULT], events=commits, oracle={0: RIGHT}, history=list(history)
    )


def test_a_run_in_which_all_held() -> None:
    found = played(RIGHT, RIGHT).receipt()
    assert (found.ok, found.broken, found.requests, found.epochs, found.faults) == (True, (), 2, 2, {"kill": 1})


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (played(RIGHT, CUT), "requests lost: 1, and at most 0 may be"),
        (played(RIGHT, REFUSED), "requests non-2xx: 1, and at most 0 may be"),
        (played(), "no request was compared"),
        (played(CUT, CUT, expect=Expect(lost=1)), "requests lost: 2, and at most 1 may be"),
    ],
)
def test_what_broke_is_said(run: ScenarioRun, says: str) -> None:
    found = run.receipt()
    assert not found.ok
    assert says in " ".join(found.broken)


def test_what_may_be_lost_may_be_lost() -> None:
    found = played(CUT, REFUSED, expect=Expect(lost="any", non_2xx=1)).receipt()
    assert (found.ok, found.lost, found.non_2xx) == (True, 1, 1)


def test_a_step_that_could_not_be_done_and_faults_that_were_not_injected_break_it() -> None:
    run = played(RIGHT)
    run.troubles, run.injected = ["step 1 (kill rank 1): gone already"], []
    found = run.receipt()
    assert found.broken == ("step 1 (kill rank 1): gone already", "no fault was injected")
    run.events.reverse()
    assert "epochs do not rise: [3, 2]" in run.receipt().broken
