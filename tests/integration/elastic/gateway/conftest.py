"""What a gateway needs of a cluster, and a gateway of it: a test's own, unless its file has them for longer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.gateway_cluster import GatewayCluster, RunningGateway


@pytest.fixture
def cluster(tmp_path: Path) -> GatewayCluster:
    cluster = GatewayCluster(tmp_path)
    cluster.publish_view()
    return cluster


@pytest.fixture
def gateway(cluster: GatewayCluster) -> Iterator[RunningGateway]:
    with cluster.gateway() as running:
        yield running
