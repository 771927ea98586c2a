"""A sample of the matrix of roles and faults (all of it: `elastic-chaos role-matrix`): dealt, proven, healed, exact."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.campaigns.role_matrix import FLAGS, all_cells, run_role_matrix
from tests.e2e.conftest import Serve

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SAMPLE = ("engine/kill", "controller/kill", "agent/kill", "rank/step-hang-gil", "etcd/kill", "etcd/stop")


def test_a_sample_of_the_role_matrix(serve: Serve, demo_model: Path) -> None:
    cells = [cell for cell in all_cells() if cell.name in SAMPLE]
    assert len(cells) == len(SAMPLE)
    told: list[str] = []
    cluster = serve(demo_model, 3, flags=FLAGS)
    results = run_role_matrix(cluster, cells, told.append)
    assert [(result.cell, result.ok) for result in results] == [(cell.name, True) for cell in cells], told
    assert all(result.injected is not None and result.requests for result in results), told
    cluster.scale(4)  # it can still change: a repair that only looks alive would show here
    cluster.wait_serving(4)
