"""What `elastic doctor` says beforehand of deaths: from the planner alone, for ranks on one host or on several."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic.cli.doctor import Finding, examine
from elastic.demo.model import write_demo_model

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "demo-moe"
    write_demo_model(directory)
    return directory


def coverage(model: Path, ranks: int, redundancy: float, hosts: int = 1) -> Finding:
    (found,) = [f for f in examine(model, ranks, redundancy, hosts) if f.what == "coverage"]
    return found


def test_two_replicas_survive_a_rank_and_a_host(model: Path) -> None:
    found = coverage(model, 4, 2.0, hosts=2)
    assert found.level == "ok"
    assert "any one rank may die" in found.message
    assert "any one host may die" in found.message


def test_one_replica_does_not_and_it_says_what_would(model: Path) -> None:
    found = coverage(model, 4, 1.0)
    assert found.level == "warn"
    assert "the death of rank 0 or 1 or 2 or 3 leaves experts without a replica" in found.message
    assert found.hint.endswith("slots: --redundancy 2")


def test_hosts_of_unequal_size_need_more(model: Path) -> None:
    found = coverage(model, 3, 2.0, hosts=2)
    assert found.level == "warn"
    assert "any one rank may die" in found.message
    assert "host0 leaves experts without a replica" in found.message
    assert found.hint.endswith("slots: --redundancy 3")
    assert coverage(model, 3, 3.0, hosts=2).level == "ok"


def test_one_rank_needs_another(model: Path) -> None:
    assert coverage(model, 1, 2.0).hint == "add a rank"
