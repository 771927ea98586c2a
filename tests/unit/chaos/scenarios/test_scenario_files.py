"""Scenario files: all of the library can be read and planned; what is wrong in one is said with its place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chaos.scenarios.dry_run import Expected, dry_run
from chaos.scenarios.reading import LIBRARY, find, library, parse, read
from chaos.scenarios.script import CHAOS, Change, Expect, Heal, Inject, Release, Scenario, Wait
from chaos.workload.streams import Load
from membership.base.errors import ConfigError
from tests.support import ROOT

pytestmark = pytest.mark.unit

WHOLE = """
name: everything
about: Each kind of step,
  once.
cluster: {ranks: 3, redundancy: 1.5, flags: [--spares, 1]}
load: {streams: 2, max_tokens: 8}
seed: 7
steps:
  - kill: rank any
  - stop: [rank other, engine]
    for: 500ms
  - slow: rank 2
    with: {factor: 4}
    at: rank.prepared@2
  - wait: {event: rank_masked, rank: same, source: pidfd}
    within: 5
  - wait: whole
  - wait: 2
  - scale: 2 more
    strike: {at: loading, kill: rank newest}
  - drain: [rank 0, rank 1]
    ends: aborted
  - undrain: back
  - unquarantine: rank same
  - heal: slow
expect: {lost: any, non_2xx: 3}
repeat: 2
"""


def test_every_kind_of_step_is_read() -> None:
    scenario = parse(WHOLE, "x.yaml")
    kill = Inject(fault="kill", victims=("rank newest",), at="controller.after.loading")
    assert scenario.steps == (
        Inject(fault="kill", victims=("rank any",)),
        Inject(fault="stop", victims=("rank other", "engine"), for_s=0.5),
        Inject(fault="slow", victims=("rank 2",), params={"factor": 4}, at="rank.prepared@2"),
        Wait(event="rank_masked", fields={"rank": "same", "source": "pidfd"}, within_s=5.0),
        Wait(state="whole"),
        Wait(seconds=2.0),
        Change(kind="scale", size="2 more", faults=(kill,), ends="any"),
        Change(kind="drain", victims=("rank 0", "rank 1"), ends="aborted"),
        Change(kind="undrain", victims=("back",)),
        Release(victim="rank same"),
        Heal(fault="slow"),
    )
    assert scenario.about == "Each kind of step, once."
    assert (scenario.load, scenario.seed, scenario.repeat) == (Load(streams=2, max_tokens=8), 7, 2)
    assert scenario.expect == Expect(lost="any", non_2xx=3)
    assert (scenario.cluster.ranks, scenario.cluster.redundancy) == (3, 1.5)
    assert scenario.cluster.flags == ("--spares", 1)
    assert CHAOS in dry_run(scenario, 7, Expected([0, 1, 2])).steps[2].needs


STEP = "name: n\nabout: a\nsteps:\n  - wait: whole\n  - "


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        (f"{STEP}kil: rank any", "x.yaml: step 2: there is nothing called 'kil'", "did you mean 'kill'?"),
        (f"{STEP}kill: rank anny", "step 2: kill cannot happen to 'rank anny'", "did you mean 'rank any'?"),
        (f"{STEP}kill: disk", "step 2: kill cannot happen to 'disk'", "there are: rank N, rank any"),
        (f"{STEP}{{kill: rank any, wait: 2}}", "does one thing, not kill, wait", "one step for each"),
        (f"{STEP}{{kill: rank any, fro: 2}}", "kill has no 'fro'", "did you mean 'for'?"),
        (f"{STEP}{{slow: rank 1, with: {{factr: 2}}}}", "`with` of slow has no 'factr'", "did you mean 'factor'?"),
        (f"{STEP}{{kill: rank 1, at: rank.prepard}}", "at cannot be 'rank.prepard'", "did you mean 'rank.prepared'?"),
        (f"{STEP}wait: hole", "no step can wait for 'hole'", "did you mean 'whole'?"),
        (f"{STEP}wait: {{rank: 2}}", "must name its `event`", "rank_masked"),
        (f"{STEP}{{wait: 3, within: soon}}", "within: 'soon' is not a duration", ""),
        (f"{STEP}scale: up", "scale cannot be to 'up'", "N more"),
        (f"{STEP}{{scale: 3, faults: {{kill: rank 1}}}}", "a fault of a change needs `at`", "loading"),
        (f"{STEP}{{scale: 3, ends: well}}", "ends cannot be 'well'", "there are: done, aborted, any"),
        (f"{STEP}drain: engine", "'engine' is no rank", "rank N"),
        (f"{STEP}heal: kil", "heal cannot be 'kil'", "did you mean 'kill'?"),
        (f"{STEP}rest", "a step is a mapping", ""),
        ("name: n\nabout: a\nstep: []", "x.yaml: a scenario has no 'step'", "did you mean 'steps'?"),
        ("name: n\nabout: a\nsteps: []", "`steps` must be a list of at least one step", ""),
        ("name: n\nsteps: [wait: 1]", "x.yaml: object missing required field `about`", ""),
        (f"expect: {{lots: 1}}\n{STEP}wait: 1", "expect has no 'lots'", "did you mean 'lost'?"),
        (f"repeat: 0\n{STEP}wait: 1", "x.yaml: repeat: expected `int` >= 1", ""),
        (f"cluster: {{ranks: 900}}\n{STEP}wait: 1", "x.yaml: cluster.ranks: expected `int` <= 64", ""),
        ("a: [", "is no YAML", ""),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, says: str, hint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(text, "x.yaml")
    assert says in str(raised.value)
    assert hint in raised.value.hint


def test_a_name_that_is_not_in_the_library() -> None:
    with pytest.raises(ConfigError) as raised:
        find("kill-rnk")
    assert "did you mean 'kill-rank'?" in raised.value.hint


@pytest.mark.parametrize("path", sorted(LIBRARY.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_library_can_be_played(path: Path) -> None:
    scenario = read(path)
    assert scenario.name == path.stem
    planned = dry_run(scenario, scenario.seed, Expected(list(range(scenario.cluster.ranks))))
    assert planned.changes
    assert not planned.refused
    assert len(planned.steps) == len(scenario.steps) * scenario.repeat


def test_events_that_the_library_waits_for_are_emitted() -> None:
    product = "".join(
        path.read_text() for folder in ("membership", "workers", "elastic") for path in (ROOT / folder).rglob("*.py")
    )
    emitted = set(re.findall(r'"([a-z]+(?:_[a-z]+)+)"', product))
    waited = {step.event for scenario in library() for step in scenario.steps if isinstance(step, Wait) and step.event}
    assert waited
    assert waited <= emitted


def test_the_same_seed_chooses_the_same_victims() -> None:
    scenario: Scenario = find("kill-during-recovery")
    first, again, other = (dry_run(scenario, seed, Expected([0, 1, 2, 3])) for seed in (5, 5, 6))
    assert first == again
    assert first.steps != other.steps
    for turn in range(3):
        one, two = (first.steps[4 * turn + at].victims for at in (0, 2))
        assert one != two


def test_the_example_in_the_docs_is_a_scenario() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/SCENARIOS.md").read_text(), re.DOTALL)
    assert parse(example, "docs").steps == find("kill-during-recovery").steps
