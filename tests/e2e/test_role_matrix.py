"""A sample of the matrix of roles and faults (`elastic-chaos role-matrix`): injected, proven, healed, exact."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.campaigns.role_matrix import FLAGS, RoleMatrix, all_cells
from chaos.campaigns.targets import LocalTarget
from tests.e2e.conftest import Serve

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SAMPLE = ("engine/kill", "controller/kill", "agent/kill", "rank/step-hang-gil", "rank/crash-device", "etcd/kill",
          "etcd/stop")  # fmt: skip


def test_a_sample_of_the_role_matrix(serve: Serve, demo_model: Path) -> None:
    cells = [cell for cell in all_cells() if cell.name in SAMPLE]
    assert len(cells) == len(SAMPLE)
    said: list[str] = []
    cluster = serve(demo_model, 3, flags=FLAGS, own_zygote=True)
    matrix = RoleMatrix(left=list(cells))
    matrix.run(LocalTarget(cluster), said.append)
    assert [(result.cell, result.ok) for result in matrix.results] == [(cell.name, True) for cell in cells], said
    assert all(result.injected is not None and result.requests for result in matrix.results), said
    cluster.scale(4)  # it can still change: a repair that only looks alive would show here
    cluster.wait_serving(4)
