"""Simulated episodes: no invariant breaks, a seed is one episode to the bit, and a missing guard is noticed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from chaos.cli.main import app
from chaos.cli.simulate import Over, kept
from chaos.simulation.campaign import Progress, SimulationReceipt, Where, simulate
from chaos.simulation.episode import Episode, Step, run_episode, setup
from chaos.simulation.faults import FAULTS
from chaos.simulation.gpu_faults import GPU_FAULTS
from chaos.simulation.gpus import Kernels, Windows
from chaos.simulation.host_faults import HOST_FAULTS
from chaos.simulation.minimise import invariant_of, minimise
from chaos.simulation.pairs import pairs_of, parts, walk
from chaos.simulation.rank import RankProcess
from elastic.engine.scheduler import Scheduler
from membership.base.errors import ConfigError

pytestmark = pytest.mark.unit

EPISODES = 200  # in which a mutant must show
CORPUS = [line for line in Path(__file__).with_name("corpus.txt").read_text().splitlines() if not line.startswith("#")]


def test_the_same_seed_is_the_same_episode_in_another_process() -> None:
    program = "import msgspec, chaos.simulation.episode as l; print(msgspec.json.encode(l.run_episode(7)).decode())"
    environ = {**os.environ, "PYTHONHASHSEED": "1"}
    again = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True, env=environ
    )
    assert msgspec.json.decode(again.stdout, type=Episode) == run_episode(7)
    assert run_episode(8).digest != run_episode(7).digest


def test_episodes_are_run_again_in_other_processes() -> None:
    """Both times in a process of their own, here beyond this one: a pool leaves its tracker behind."""
    command = [sys.executable, "-c", "from chaos.cli.main import main; main()", "simulate", "--jobs", "1", "-o", "json"]
    options = ["--faults", "60", "--seed", "11", "--replays", "3"]
    ran = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60, check=True)
    receipt = msgspec.json.decode(ran.stdout, type=SimulationReceipt)
    assert receipt.ok
    assert receipt.replayed == min(3, receipt.episodes) > 0


def test_what_is_left_of_an_episode_is_as_it_was() -> None:
    """Leaving events out changes nothing about what the others draw."""
    whole = setup(4).schedule
    some = run_episode(4, keep=[2, 5])
    assert [(step.index, step.kind) for step in some.steps] == [(i, whole[i].kind) for i in (2, 5)]
    assert [step.at for step in some.steps] == pytest.approx([whole[i].at for i in (2, 5)], abs=0.001)
    assert run_episode(4, keep=[2, 5]) == some
    assert run_episode(4, keep=[]).steps == ()


def test_the_commands() -> None:
    outcome = CliRunner().invoke(app, ["simulate", "--faults", "60", "--jobs", "1", "--seed", "3", "--replays", "0"])
    assert outcome.exit_code == 0, outcome.output
    assert "no invariant broke" in outcome.stdout
    assert "pairs: " in outcome.stdout
    outcome = CliRunner().invoke(app, ["replay", "--seed", "7", "--keep", "1,3", "-o", "json"])
    assert msgspec.json.decode(outcome.stdout.splitlines()[-1], type=Episode) == run_episode(7, keep=[1, 3])
    outcome = CliRunner().invoke(app, ["replay", "--seed", "7", "--keep", "none"])
    assert "no invariant broke" in outcome.stdout
    with pytest.raises(ConfigError, match="no list of numbers"):
        kept("3,x")


def test_a_campaign_breaks_no_invariant() -> None:
    progress = list[Progress]()
    receipt = simulate(seed=1, faults=400, jobs=1, on_progress=progress.append)
    assert receipt.ok, receipt.violations
    assert receipt.faults >= 400
    assert progress[-1].episodes == receipt.episodes
    assert set(receipt.kinds) >= {"kill-rank", "zombie-controller", "stop-engine", "outage", "change", "skew", "doubt"}
    assert receipt.tokens > receipt.requests > 0
    seen, total = map(int, receipt.pairs.split("/"))
    assert total == len(FAULTS) ** 2
    assert seen + len(receipt.pairs_missing) == total
    assert seen > total / 4


def test_a_campaign_over_hosts_breaks_no_invariant() -> None:
    receipt = simulate(seed=1, faults=300, jobs=1, where=Where(hosts=3))
    assert receipt.ok, receipt.violations
    assert receipt.faults >= 300
    assert set(receipt.kinds) >= HOST_FAULTS.keys()
    seen, total = map(int, receipt.pairs.split("/"))
    assert total == (len(FAULTS) + len(HOST_FAULTS)) ** 2
    assert seen > total / 6


def test_hosts_are_another_episode_of_the_same_seed() -> None:
    assert run_episode(7, hosts=3) == run_episode(7, hosts=3)
    assert len({run_episode(7, hosts=hosts).digest for hosts in (0, 2, 3)}) == 3
    assert not {event.kind for event in setup(4).schedule} & HOST_FAULTS.keys()
    again = CliRunner().invoke(app, ["replay", "--seed", "7", "--hosts", "3", "--keep", "none", "-o", "json"])
    assert msgspec.json.decode(again.stdout.splitlines()[-1], type=Episode) == run_episode(7, keep=[], hosts=3)
    with pytest.raises(ConfigError, match="no network within a host"):
        Over(hosts=1).where()


def test_a_campaign_over_gpus_breaks_no_invariant() -> None:
    receipt = simulate(seed=17, faults=100, jobs=1, where=Where(gpus=True))
    assert receipt.ok, receipt.violations
    assert receipt.gpus
    total = int(receipt.pairs.split("/")[1])
    assert total == (len(FAULTS) + len(GPU_FAULTS)) ** 2


def test_steps_run_together_and_are_called_off_and_windows_wait_for_the_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the episodes above would show nothing. Kernels run on after the death of their process."""
    ends, claims = Counter[tuple[str, bool]](), Counter[bool]()
    end, claimed = Kernels._end, Windows.claimed

    def ended(kernels: Kernels, failure: str) -> None:
        ends[failure, kernels._rank.alive] += 1
        end(kernels, failure)

    def asked(windows: Windows, rank: RankProcess) -> bool:
        claims[has := claimed(windows, rank)] += 1
        return has

    monkeypatch.setattr(Kernels, "_end", ended)
    monkeypatch.setattr(Windows, "claimed", asked)
    assert not any(run_episode(seed, gpus=True).violation for seed in (17, 48))
    assert ends["", True] > 20
    assert ends["called off", True] > 0
    assert sum(count for (_, alive), count in ends.items() if not alive) > 0
    assert claims[True] > 0 < claims[False]
    again = CliRunner().invoke(app, ["replay", "--seed", "7", "--gpus", "--keep", "none", "-o", "json"])
    assert msgspec.json.decode(again.stdout.splitlines()[-1], type=Episode) == run_episode(7, keep=[], gpus=True)
    with pytest.raises(ConfigError, match="ranks of several hosts run no step together"):
        Over(hosts=3, gpus=True).where()


@pytest.mark.parametrize("line", CORPUS)
def test_an_episode_that_once_broke_a_promise_does_not_break_it_again(line: str) -> None:
    seed, keep, wrong = line.split(maxsplit=2)
    assert not run_episode(int(seed), kept("" if keep == "all" else keep)).violation, wrong


def test_the_walk_passes_every_ordered_pair_of_kinds() -> None:
    kinds = ["a", "b", "c", "d", "e"]
    walks = [walk(kinds, part, 10) for part in range(parts(kinds, 10))]
    steps = [[Step(i, 0.0, kind, "done") for i, kind in enumerate(names)] for names in walks]
    assert set().union(*(pairs_of(each, kinds) for each in steps)) == {(a, b) for a in kinds for b in kinds}
    nothing = [Step(0, 0.0, "a", ""), Step(1, 0.0, "b", "done"), Step(2, 0.0, "other", "done")]
    assert pairs_of(nothing, kinds) == set(), "what did not happen, or is no fault, meets nothing"


def test_only_the_happenings_that_it_takes_are_left() -> None:
    """Of those that break the invariant only together, none is lost; another broken invariant is another finding."""

    def run(seed: int, keep: Sequence[int], timing: int = 0) -> Episode:
        steps = tuple(Step(i, float(i), "kill", "done") for i in keep)
        broken = "Violation: epoch 3 follows another" if {3, 17, 40} <= set(keep) else "Violation: other" * (3 in keep)
        return Episode(seed=seed, faults=0, kinds=(), steps=steps, violation=broken)

    found = minimise(run(7, range(60)), run=run)
    assert found.keep == (3, 17, 40)
    assert found.complete
    assert found.again == "elastic-chaos replay --seed 7 --keep 3,17,40"
    assert invariant_of("Violation: epoch 3 follows another") == invariant_of("Violation: epoch 12 follows another")
    late = minimise(run(7, range(60)), run=run, limit_s=0.0)
    assert not late.complete
    assert set(late.keep) >= {3, 17, 40}


def test_a_schedule_is_minimised_to_a_few_events(monkeypatch: pytest.MonkeyPatch) -> None:
    requests_die_with_their_rank(monkeypatch)
    broken = first_broken(1)
    found = minimise(broken)
    assert len(found.events) <= 6, found
    again = run_episode(found.seed, found.keep, timing=found.timing)
    assert again.violation == found.violation != ""
    monkeypatch.undo()
    assert not run_episode(found.seed, found.keep, timing=found.timing).violation


def requests_die_with_their_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lived on a dead rank is not computed elsewhere."""
    monkeypatch.setattr(Scheduler, "_requeue", lambda scheduler, sequence: scheduler._forget(sequence))


def first_broken(seed: int) -> Episode:
    """The first episode from `seed` on in which an invariant breaks."""
    episodes = (run_episode(each) for each in range(seed, seed + EPISODES))
    broken = next((episode for episode in episodes if episode.violation), None)
    assert broken is not None, f"no violation in {EPISODES} episodes"
    return broken
