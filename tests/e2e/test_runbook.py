"""docs/OPERATIONS.md line by line, as an operator types it, while clients are served."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from chaos.target.cluster import ServedCluster
from chaos.workload.streams import FULL
from tests.e2e.conftest import Serve
from tests.support import ROOT
from tests.support.served import under_load

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

LOAD = replace(FULL, streams=2, rest_s=4.0)  # there all the while, and time for the commands
RUNBOOK = ROOT / "docs" / "OPERATIONS.md"
LINE = re.compile(r"^\$ (?P<command>.*?)(?:\s+# exit (?P<exits>[0-9 or]+):.*)?$")


def commands() -> list[tuple[str, set[int]]]:
    """(command line, exit statuses that it may have), in order."""
    found = [match for line in RUNBOOK.read_text().splitlines() if (match := LINE.match(line))]
    return [(match["command"], set(map(int, (match["exits"] or "0").split(" or ")))) for match in found]


def test_the_runbook_line_by_line(serve: Serve, demo_model: Path) -> None:
    cluster = serve(demo_model, 4)
    cluster.wait_serving(4)
    with under_load(cluster, LOAD, busy=1):
        every_line(cluster)
    cluster.wait_serving(4)


def every_line(cluster: ServedCluster) -> None:
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": binaries, "ELASTIC_STATE_DIR": str(cluster.state.path)}
    lines = commands()
    assert len(lines) > 25
    for command, exits in lines:
        outcome = subprocess.run(
            ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert outcome.returncode in exits, f"$ {command}\n{outcome.stdout}{outcome.stderr}"
        if 1 in exits:
            assert outcome.stderr.startswith("error: "), outcome.stderr
