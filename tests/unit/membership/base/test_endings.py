"""What is said of a process's end: who the OOM killer took is not just dead."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from membership.base.endings import OomKills, counted, signal_name
from membership.base.rank_id import RankId
from membership.store.records import RankExit
from workers.agent.exits import Exits
from workers.agent.restart_policy import RestartPolicy, ending

pytestmark = pytest.mark.unit

V2 = "0::/kubepods/pod1/c1\n"
V1 = "9:name=systemd:/\n4:memory:/docker/c1\n3:cpuset:/\n0::/\n"
HIDDEN = "0::/../../outside\n"  # of the host, which is not mounted here
EVENTS = "low 0\nhigh 0\nmax 31\noom 2\noom_kill 2\noom_group_kill 0\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"
NEAREST, ROOT = "/sys/fs/cgroup/kubepods/pod1/c1/memory.events", "/sys/fs/cgroup/memory.events"


@pytest.mark.parametrize(
    ("mine", "files", "found"),
    [
        (V2, {NEAREST: EVENTS, ROOT: "oom_kill 7\n"}, 2),
        (V2, {ROOT: EVENTS}, 2),
        (HIDDEN, {ROOT: EVENTS}, 2),
        (V1, {"/sys/fs/cgroup/memory/docker/c1/memory.oom_control": CONTROL, ROOT: EVENTS}, 5),
        (V1, {}, None),
        (V2, {NEAREST: "low 0\n"}, None),  # a kernel that does not count them
        (V2, {NEAREST: "oom_kill\n"}, None),
        ("", {ROOT: EVENTS}, None),
    ],
)
def test_a_cgroup_says_how_many_it_lost(mine: str, files: dict[str, str], found: int | None) -> None:
    def read(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    assert counted(mine, read) == found


def test_each_kill_explains_one_death() -> None:
    so_far = 3  # before we looked
    kills = OomKills(lambda: so_far)
    assert kills.of_a_death(-signal.SIGKILL) == "", "somebody's kill -9: nothing was counted"
    so_far = 5  # two at once
    assert kills.of_a_death(-signal.SIGSEGV) == kills.of_a_death(1) == ""
    assert kills.of_a_death(-signal.SIGKILL) == ", out of memory (cgroup oom_kill 2)"
    assert kills.of_a_death(-signal.SIGKILL) == ", out of memory (cgroup oom_kill 1)"
    assert kills.of_a_death(-signal.SIGKILL) == ""


def test_where_nothing_is_counted_it_is_only_suspected() -> None:
    kills = OomKills(lambda: None)
    assert kills.of_a_death(-signal.SIGKILL) == " (perhaps the OOM killer: see dmesg)"
    assert kills.of_a_death(-signal.SIGTERM) == ""


def test_an_exit_record_says_so_unless_the_agent_killed_it() -> None:
    counts = iter([0, 1, 2])
    exits = Exits(RestartPolicy(), oom_kills=OomKills(lambda: next(counts)))
    taken, ours = RankId(0, 1), RankId(1, 1)
    exits.died(taken, "detected by pidfd", {}, 0.0)
    exits.died(ours, "no heartbeat for 9 s", {}, 0.0)
    exits.killed(ours)
    records = [exits.ended(key, -signal.SIGKILL) for key in (taken, ours)]
    assert [record and record.reason for record in records] == [
        "killed by signal 9, SIGKILL, out of memory (cgroup oom_kill 1); detected by pidfd",
        "killed by signal 9, SIGKILL; no heartbeat for 9 s",
    ]


def test_signals_without_a_name_are_named_too() -> None:
    assert ending(-signal.SIGSEGV) == "killed by signal 11, SIGSEGV"
    assert signal_name(40) == "signal 40"


def test_a_slot_that_runs_out_of_device_memory_again_and_again_is_set_aside() -> None:
    """However far apart its deaths are: a load of minutes must not go on for ever."""
    exits, far = Exits(RestartPolicy(), oom_kills=OomKills(lambda: 0)), 10 * RestartPolicy().window_s

    def died(incarnation: int, *, full: bool, slot: int = 0, forgiven: float = 0.0, served_s: float = 0.0) -> RankExit:
        stored = {slot: RankExit(rank=slot, incarnation=incarnation - 1, reason="", at=0.0, forgiven=forgiven)}
        reason = "out of device memory: 2 GiB; detected by pidfd"
        now = incarnation * far
        return exits.died(RankId(slot, incarnation), reason, stored, now, now - served_s, device_full=full)

    found = [died(i, full=full) for i, full in enumerate((True, True, False, True, True, True), start=1)]
    assert [each.quarantined for each in found] == [False] * 5 + [True]
    assert found[-1].reason == "out of device memory: 2 GiB; detected by pidfd; 3 times in a row, slot set aside"
    assert died(7, full=True, served_s=RestartPolicy().window_s - 1.0).quarantined, "it could serve for a moment"
    assert not died(8, full=True, served_s=RestartPolicy().window_s).quarantined, "what a slot needs did fit"
    assert not died(9, full=True).quarantined
    assert died(10, full=True).quarantined
    assert not died(7, full=True, slot=1).quarantined, "another slot's"
    assert not died(11, full=True, forgiven=10.5 * far).quarantined, "an operator had it try again"
