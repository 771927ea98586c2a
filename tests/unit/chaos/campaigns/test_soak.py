"""The soak's pure parts: bursts from a seed, which deaths lose an expert, growth over the kills, the check."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import islice, pairwise
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from chaos.campaigns import soak
from chaos.campaigns.bursts import FOR_EACH_KIND, KINDS, ROLES, SHARES, Burst, Kind, Quota, bursts
from chaos.campaigns.failpoint_stimuli import KILL_TWICE, LOAD, Scene
from chaos.campaigns.soak import Soak
from chaos.campaigns.targets import LocalTarget
from chaos.faults.base import Injected
from chaos.faults.signals import Killed
from chaos.faults.site import ServedSite
from chaos.scenarios.victims import holders
from chaos.target import footprint
from chaos.target.cluster import Cluster
from chaos.target.footprint import ONCE_MB, Footprint, growth, slope, without_one_rise
from chaos.workload.history import RequestRecord
from membership.store.records import ClusterState, Member, View
from tests.support.cluster_states import healthy, record

pytestmark = pytest.mark.unit

WHOLE = RequestRecord(prompt=0, started=0.0, tokens=("a", "b"), token_times=(0.1, 0.2), finish_reason="length")
KILLS = 200
QUOTA = Quota(kills=KILLS, zombies=2, outages=1, roles=1, requests=1)


def injected(fault: str, victim: str, times: int) -> list[Injected]:
    return [Injected(fault=fault, victim=victim, at=0.0, seen_at=0.1, proof="seen")] * times


def finished(kills: int = KILLS, grown_mb: float = 0.0, grown_files: int = 0) -> Soak:
    def held(at: int) -> dict[str, Footprint]:
        return {"engine 7": Footprint(80.0 + grown_mb * at / 100, 30 + grown_files * at // 100, 9)}

    faults = injected("kill", "rank 1", kills) + injected("stop", "rank 2", 2) + injected("stop", "etcd", 1)
    return Soak(
        seed=1, ranks=4, quota=QUOTA, injected=faults + injected("kill", "engine", 1),
        looks=[(at, held(at)) for at in range(20, kills + 1, 20)],
        oracle={0: WHOLE}, history=[WHOLE], restored_ms=[500.0], processes=(12, 12),
    )  # fmt: skip


@given(st.integers(0, 10_000), st.integers(15, 300), st.integers(2, 8))
def test_bursts_come_from_the_seed_and_add_up(seed: int, kills: int, ranks: int) -> None:
    quota = Quota.of(kills)
    drawn = list(islice(bursts(seed, quota, ranks), 2 * kills))
    assert drawn == list(islice(bursts(seed, quota, ranks), 2 * kills))
    assert sum(burst.kills for burst in drawn) >= kills
    assert sum(burst.kind == "zombie" for burst in drawn) >= quota.zombies
    assert sum(burst.kind in ("freeze", "restart") for burst in drawn) >= quota.outages
    assert [burst.kind for burst in drawn[: quota.roles + 1]].count("role") == quota.roles, "first, and never again"
    for burst in drawn:
        assert len(set(burst.places)) == len(burst.places)
        assert set(burst.places) <= set(range(ranks))


def test_every_kind_of_burst_comes_up() -> None:
    drawn = list(islice(bursts(0, Quota.of(600), 4), 700))
    assert {burst.kind for burst in drawn} == set(KINDS)
    assert {burst.role for burst in drawn} == {"", *ROLES}
    assert Quota.of(300) == Quota(kills=300, zombies=40, outages=20, roles=6, requests=15_000)


def test_the_holders_of_an_expert_are_all_of_them() -> None:
    placement = {0: ((0, 1),), 1: ((1, 2),), 2: ((2, 0),), 3: ((0, 1),)}
    assert {holders(placement, chance) for chance in (0.0, 0.5, 0.99)} == {(1, 2)}  # expert 2; the others have three


def test_a_slope_is_found_among_noise() -> None:
    assert slope([(x, 5 + 0.02 * x + (0.1 if x % 2 else -0.1)) for x in range(100)]) == pytest.approx(0.02, rel=0.05)
    assert slope([(1, 2.0)]) == slope([(1, 2.0), (1, 3.0)]) == 0.0


def test_growth_is_measured_of_processes_that_lived_throughout() -> None:
    held = Footprint(10.0, 5, 3)
    later = [(40, {"a": Footprint(11.0, 6, 3)}), (60, {"a": Footprint(12.0, 6, 3)})]
    (only,) = growth([(20, {"a": held, "b": held}), *later])
    assert (only.process, only.rss_mb, only.rss_mb_per_100, only.files) == ("a", (10.0, 12.0), 2.5, (5, 6))


LOOKS = range(60, 301, 20)  # of a soak of 300 kills, after its warm-up
FLICKER_MB = (0.0, 0.1, -0.1, 0.0, 0.2, -0.2)  # as allocators give back, and take again


def watched(leak_kb: float, step_mb: float = 0.0, step_at: int = 0) -> Soak:
    """A soak whose engine leaks this much per kill, and grows once by a step."""
    run = finished(kills=300)
    rss = [
        80.0 + leak_kb * kills / 1024 + step_mb * (kills >= step_at) + FLICKER_MB[n % len(FLICKER_MB)]
        for n, kills in enumerate(LOOKS)
    ]
    run.looks = [(kills, {"engine 7": Footprint(mb, 30, 9)}) for kills, mb in zip(LOOKS, rss, strict=True)]
    return run


@pytest.mark.parametrize("step_at", LOOKS)
def test_a_leak_of_20_kb_per_kill_is_found_and_a_table_that_doubles_once_is_none(step_at: int) -> None:
    """Seed 30833: 86.9 to 88.6 MB, of which 1.9 was the interpreter's table of interned strings."""
    assert watched(0.0, 1.9, step_at).leaks() == []
    for leaking in (watched(20.0), watched(20.0, 1.9, step_at), watched(0.0, 8.0, 180)):
        assert "memory of engine 7" in " ".join(leaking.leaks())


@given(st.lists(st.integers(-30, 30), max_size=20))
def test_one_rise_is_left_out_and_no_more(values: list[int]) -> None:
    found = without_one_rise([float(value) for value in values])
    assert len(found) == len(values)
    assert found[:1] == values[:1]
    left_out = [(b - a) - (d - c) for (a, b), (c, d) in zip(pairwise(values), pairwise(found), strict=True)]
    greatest = max([0, *(b - a for a, b in pairwise(values))])
    assert sorted(left_out, reverse=True)[:1] == ([min(greatest, ONCE_MB)] if left_out else [])
    assert sum(map(bool, left_out)) <= 1


def test_a_process_in_anothers_place_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new agent has a new forkserver: what the one holds says nothing of the other."""
    for title in ("elastic-ep::forkserver", "elastic-ep::zygote"):
        monkeypatch.setattr(footprint, "command_words", lambda _, title=title: [title])
        assert len({footprint._name(psutil.Process(pid)) for pid in (os.getpid(), os.getppid())}) == 2


def test_a_clean_soak_holds() -> None:
    receipt = finished().receipt()
    assert receipt.ok, receipt.broken
    assert (receipt.kills, receipt.zombies, receipt.outages, receipt.roles) == (KILLS, 2, 1, 1)
    assert (receipt.requests, receipt.lost) == (1, 0)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (finished(kills=199), "199 kills instead of 200"),
        (finished(grown_mb=1.5), "memory of engine 7 grows by 1.35 MB"),
        (finished(grown_files=20), "open files of engine 7"),
    ],
)
def test_what_broke_is_said(run: Soak, said: str) -> None:
    receipt = run.receipt()
    assert not receipt.ok
    assert said in " ".join(receipt.broken)


def test_what_a_process_grows_by_while_it_warms_up_is_no_leak() -> None:
    shorter = finished(kills=KILLS - 1, grown_mb=1.5)
    shorter.quota = replace(QUOTA, kills=KILLS - 1)
    assert shorter.receipt().ok


def test_a_lost_request_and_leftovers_break_it() -> None:
    run = finished()
    run.history.append(RequestRecord(prompt=0, started=0.0, tokens=("a",), token_times=(0.1,), error="cut"))
    run.history.append(RequestRecord(prompt=0, started=0.0, error="HTTP 503: later", status=503))
    run.processes, run.shm = (12, 13), (0, 2)
    receipt = run.receipt()
    assert (receipt.lost, receipt.non_2xx) == (2, 1)
    assert len(receipt.broken) == 5


@pytest.mark.parametrize("seed", range(30))
def test_a_soak_of_some_length_has_every_kind_of_burst(seed: int) -> None:
    quota = Quota.of(FOR_EACH_KIND)
    drawn = {burst.kind for burst in islice(bursts(seed, quota, 3), quota.roles + 30)}
    assert drawn >= {*SHARES}


class Survivors(Cluster):
    """A cluster of the ranks 1, 2 and 3: rank 0 died while it was made smaller. A successor comes at once."""

    def __init__(self) -> None:
        self.view = View(epoch=1, members=tuple(Member(rank=r, node="n", incarnation=r) for r in (1, 2, 3)))

    @property
    def now(self) -> ClusterState:
        of_each = {(m.rank, m.incarnation): record(m.rank, incarnation=m.incarnation) for m in self.view.members}
        return healthy(view=self.view, ranks={key: replace(each, pid=key[1]) for key, each in of_each.items()})

    def end(self, pid: int) -> Killed:
        assert pid in {member.incarnation for member in self.view.members}
        later = (replace(m, incarnation=m.incarnation + 100 * (m.incarnation == pid)) for m in self.view.members)
        self.view = replace(self.view, members=tuple(later))
        return Killed(pid, 0.0, 0.0)

    def stopped(self, fault: str, site: object, victim: str) -> Any:
        """The injector that stops a process; a rank is given up at once."""

        def inject() -> Injected:
            if victim != "etcd":
                self.end(next(m.incarnation for m in self.view.members if f"rank {m.rank}" == victim))
            return injected(fault, victim, 1)[0]

        return SimpleNamespace(inject=inject, heal=lambda: None)

    def client(self) -> Any:
        return SimpleNamespace(state=lambda: self.now, propose=lambda *_, **__: None)

    def wait_serving(self, ranks: int, timeout_s: float = 0.0, notify: Callable[[str], None] = print) -> dict[str, Any]:
        return {"ranks": [{"rank": m.rank, "incarnation": m.incarnation} for m in self.view.members]}

    def scale(self, target: int, timeout_s: float = 0.0) -> Any:
        assert target == len(self.view.members)


@pytest.mark.parametrize(
    ("kind", "dying"),
    [("one", 1), ("newcomer", 1), ("scale", 1), ("zombie", 1), ("freeze", 1), ("second", 2), ("commit", 2), ("all", 3)],
)
def test_victims_are_drawn_from_the_ranks_that_there_are(
    kind: Kind, dying: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale down keeps the ranks that live, so their numbers need not begin with 0."""
    cluster, run = Survivors(), Soak(seed=1, ranks=3, quota=QUOTA)
    run.target = cast(LocalTarget, SimpleNamespace(site=None))
    monkeypatch.setattr(Soak, "cluster", cluster)
    monkeypatch.setattr(soak, "kill", cluster.end)
    monkeypatch.setattr(soak, "injector", cluster.stopped)
    monkeypatch.setattr(soak, "wait_for", lambda *_: ())
    for first in range(3):
        places = tuple((first + number) % 3 for number in range(dying))
        before = cluster.view.members
        soak._Injection(run, Burst(kind, 0.0, places)).inject()
        died = [m.rank for m in before if m not in cluster.view.members]
        assert died == sorted((1, 2, 3)[place] for place in places)


def test_a_failpoints_victim_is_a_rank_that_there_is() -> None:
    cluster, armed = Survivors(), list[str]()
    scene = Scene(cast(Cluster, SimpleNamespace(client=lambda: SimpleNamespace(view=lambda: cluster.view))))
    scene.site = cast(ServedSite, SimpleNamespace(arm=armed.append))
    KILL_TWICE.arm(scene, "x=1*kill")
    LOAD.arm(scene, "x=1*kill")
    assert armed == ["x=1*kill;rank.before.prepare@3=1*kill", "x=1*kill"]


def test_a_rank_is_not_given_up_for_the_mask_of_its_predecessor() -> None:
    """The engine's status is of the view before for a moment, in which that one was masked."""
    state = healthy(3)
    victim, status = record(0), state.engine_status
    assert status is not None
    assert state.view is not None
    older, masked = replace(status, epoch=state.view.epoch - 1, masked=(0,)), replace(status, masked=(0,))
    without = replace(state.view, members=state.view.members[1:])
    assert not soak._given_up(state, victim)
    assert not soak._given_up(replace(state, engine_status=older), victim)
    assert soak._given_up(replace(state, engine_status=masked), victim)
    assert soak._given_up(replace(state, view=without), victim)
