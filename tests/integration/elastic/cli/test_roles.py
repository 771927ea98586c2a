"""What the role commands have in common."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from elastic.cli import roles
from elastic.gateway import event_metrics
from elastic.serve.etcd_server import free_ports
from elastic.serve.options import RoleOptions
from elastic.serve.state_dir import ClusterAddress, StateDir
from membership.base.events import EventLog

pytestmark = pytest.mark.integration


def test_what_a_role_counts_is_made_once_before_anybody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that count the same history would each begin anew; and the first would import beside an engine's steps."""
    made = list[Path]()

    class Counted(event_metrics.RoleMetrics):
        def __init__(self, history: Path, cluster: str) -> None:
            made.append(history)
            super().__init__(history, cluster)

    monkeypatch.setattr(event_metrics, "RoleMetrics", Counted)
    (port,) = free_ports(1)
    state = StateDir(tmp_path)
    EventLog(state.events, "engine", "c").emit("link_lost")

    def scraped(_: int) -> bool:
        said = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60, trust_env=False).raise_for_status()
        return "elastic_ep_link_cuts_total 1.0" in said.text.splitlines()

    address = ClusterAddress(cluster="c", etcd=("http://127.0.0.1:1",))
    with roles._probe(RoleOptions(probe_port=port), address, state), ThreadPoolExecutor(4) as clients:
        assert made == [state.events]
        assert all(clients.map(scraped, range(4)))
    assert made == [state.events]
