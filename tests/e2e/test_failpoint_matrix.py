"""A sample of the failpoint matrix; all of it is `elastic-chaos failpoint-matrix`."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.campaigns.failpoint_matrix import FLAGS, FailpointMatrix, every_cell
from chaos.campaigns.failpoint_stimuli import SMALL, STIMULI
from chaos.campaigns.targets import LocalTarget
from chaos.target.cluster import ServedCluster
from chaos.target.warm_start import WarmStart
from membership.base.failpoint_catalogue import ON_ONE_HOST

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

SAMPLE = (
    ("controller.after.committed", "kill"),
    ("rank.step", "hang"),
    ("rank.prepare_epoch", "raise"),
    ("agent.before.retire_epoch", "hang"),
    ("engine.before.status", "raise"),
    ("gateway.before.propose", "hang"),
)


def test_every_point_has_a_stimulus() -> None:
    assert STIMULI.keys() == set(ON_ONE_HOST)
    assert len(every_cell()) == 3 * len(ON_ONE_HOST)


def test_a_sample_of_cells(demo_model: Path, tmp_path: Path, warm: WarmStart) -> None:
    with ServedCluster(demo_model, SMALL, state_dir=tmp_path / "state", flags=FLAGS, warm=warm) as cluster:
        matrix = FailpointMatrix(left=list(SAMPLE))
        matrix.run(LocalTarget(cluster))
    assert sorted((each.point, each.action) for each in matrix.results) == sorted(SAMPLE)
    assert [each for each in matrix.results if not each.ok] == []
