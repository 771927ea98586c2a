"""Hosts in network namespaces: a leader that is cut off, also one way only, leaves office before the next has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyroute2
import pytest

from chaos.faults import netns
from chaos.faults.base import NotInjected
from chaos.faults.cuts import CUTS
from chaos.faults.members import EtcdMembers, Member
from chaos.faults.netns import Host, Network
from membership.base.errors import StoreUnavailable
from tests.support.helpers import eventually
from tests.support.hosts import own_namespaces

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces take root"),
]

T = 30.0
CANDIDATES = ("a", "b")


class Scene:
    """Three members and two candidates, each a host."""

    def __init__(self, network: Network, etcd: EtcdMembers, folder: Path) -> None:
        self.network, self.etcd, self.folder = network, etcd, folder

    @property
    def members(self) -> list[Host]:
        return [self.network[member.name] for member in self.etcd.members]

    def lines_of(self, name: str, kind: str = "") -> list[dict[str, Any]]:
        """What a candidate has printed, complete lines only."""
        lines = (self.folder / name).read_text().split("\n")[:-1]
        return [line for line in map(json.loads, lines) if kind in ("", line["kind"])]

    def term(self, name: str) -> int:
        """A candidate's token while it believes itself in office, else 0."""
        terms = [line for line in self.lines_of(name) if line["kind"] in ("won", "left")]
        return int(terms[-1]["token"]) if terms and terms[-1]["kind"] == "won" else 0

    def synced(self, name: str) -> bool:
        states = [line["kind"] for line in self.lines_of(name) if line["kind"] in ("synced", "unsynced")]
        return bool(states) and states[-1] == "synced"

    def leader(self) -> str:
        """The candidate in office."""
        return eventually(lambda: next((name for name in CANDIDATES if self.term(name)), ""), T, "a leader")

    def assert_one_leader(self) -> None:
        """Terms do not overlap, and what was done was done by ever later holders. All terms but the last are over."""
        eventually(lambda: sum(bool(self.term(name)) for name in CANDIDATES) <= 1, T, "all but one to have said so")
        lines = sorted((line for name in CANDIDATES for line in self.lines_of(name)), key=lambda line: line["at"])
        terms = {line["token"]: [line["at"], float("inf")] for line in lines if line["kind"] == "won"}
        for line in lines:
            if line["kind"] == "left":
                terms[line["token"]][1] = line["at"]
        order = sorted(terms.items())
        for (before, (_, left)), (after, (won, _)) in pairwise(order):
            assert left < won, f"{before} and {after} were in office at once, for {left - won:.3f} s"
        acts = sorted((line["revision"], line["token"]) for line in lines if line["kind"] == "acted")
        assert [token for _, token in acts] == sorted(token for _, token in acts)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("scene")
    with ExitStack() as opened:
        network = opened.enter_context(Network(["m0", "m1", "m2", *CANDIDATES]))
        etcd = opened.enter_context(EtcdMembers(folder, places=[network[f"m{i}"] for i in range(3)]))
        for name in CANDIDATES:
            opened.enter_context(candidate(network[name], etcd.urls, folder / name))
        yield Scene(network, etcd, folder)
    assert own_namespaces() == set()


@contextmanager
def candidate(host: Host, urls: Sequence[str], output: Path) -> Iterator[None]:
    command = [sys.executable, "-m", "tests.support.candidate_process", ",".join(urls)]
    with output.open("wb") as out:
        process = host.run(lambda: subprocess.Popen(command, stdout=out))
    try:
        yield
    finally:
        process.kill()
        process.wait(T)


@contextmanager
def in_force(fault: str, host: Host, others: Sequence[Host]) -> Iterator[str]:
    """The cut during the block; what proves it."""
    injector = CUTS[fault][1](host, others)
    proof = injector.inject().proof
    try:
        yield proof
    finally:
        injector.heal()
        injector.heal()  # once more changes nothing


@pytest.mark.parametrize("fault", CUTS)
def test_each_cut_is_proven_and_healed(scene: Scene, fault: str) -> None:
    m0, a, b = scene.network["m0"], scene.network["a"], scene.network["b"]
    with in_force(fault, a, [b]) as proof:
        assert " to " in proof
        with pytest.raises(NotInjected, match="as it is"):
            CUTS[fault][1](a, [b]).inject()
        with in_force("host-reset", m0, [b]):  # another fault beside it, which ends first
            assert proof


@pytest.mark.parametrize("fault", ["host-deaf", "host-mute", "host-link-down"])
def test_a_leader_that_is_cut_off_leaves_office_before_the_next_takes_it(scene: Scene, fault: str) -> None:
    cut_off = scene.leader()
    other = next(name for name in CANDIDATES if name != cut_off)
    token = scene.term(cut_off)
    with in_force(fault, scene.network[cut_off], scene.members):
        eventually(lambda: scene.term(other) > token, T, "the other candidate in office")
        eventually(lambda: not scene.term(cut_off), T, "the one that is cut off to say that it left")
        eventually(lambda: not scene.synced(cut_off), T, "the mirror that is cut off to say so")
        eventually(lambda: scene.synced(other), T, "the other's mirror")
    eventually(lambda: scene.synced(cut_off), T, "the mirror to be back")
    scene.assert_one_leader()


@pytest.mark.parametrize("fault", ["host-deaf", "host-mute"])
def test_an_etcd_leader_that_is_cut_off_from_its_members_is_done_without(scene: Scene, fault: str) -> None:
    """Clients reach all three, and one answers that it has no leader."""
    leading = eventually(lambda: etcd_leader(scene), T, "a leader of etcd")
    others = [member for member in scene.etcd.members if member is not leading]
    with in_force(fault, scene.network[leading.name], [scene.network[each.name] for each in others]):
        was = leading.status().member_id
        eventually(lambda: all(each.status().leader not in (0, was) for each in others), T, "another leader of etcd")
        acted = max(line["revision"] for name in CANDIDATES for line in scene.lines_of(name, "acted"))
        eventually(lambda: acts_after(scene, acted) >= 5, T, "a candidate to act")
    eventually(lambda: all(map(scene.synced, CANDIDATES)), T, "the mirrors to follow")
    scene.assert_one_leader()


def acts_after(scene: Scene, revision: int) -> int:
    return sum(line["revision"] > revision for name in CANDIDATES for line in scene.lines_of(name, "acted"))


def etcd_leader(scene: Scene) -> Member | None:
    try:
        return scene.etcd.leader()
    except StoreUnavailable:
        return None


def test_what_a_killed_owner_left_is_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    left = f"{netns.PREFIX}{2**22 + 1}-m0"  # of a process that cannot be
    netns.create(left)
    with Network([]):
        assert left not in netns.namespaces()


def test_without_pyroute2_nothing_is_injected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyroute2", None)
    with pytest.raises(NotInjected, match="pyroute2 is not installed") as caught, Network(["a"]):
        pass
    assert "elastic-ep[chaos]" in caught.value.hint


@pytest.mark.parametrize("refusal", [PermissionError(1, "no"), pyroute2.NetlinkError(1, "no")])
def test_without_the_right_nothing_is_injected(refusal: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise refusal

    before = own_namespaces()
    monkeypatch.setattr(pyroute2.netns, "create", refused)
    with pytest.raises(NotInjected) as caught, Network(["a"]):
        pass
    assert "root" in caught.value.hint
    assert own_namespaces() == before
