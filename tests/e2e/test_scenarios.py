"""Two scenarios of the library through the command that people use: one on its own cluster, one on a running one.

The running one is reached by its admin API alone: the rank dies by a failpoint in its own step, the history proves it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Serve

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

COMMAND = [sys.executable, "-c", "from chaos.cli.main import main; main()", "run"]


def played(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, receipt (or nothing) and what was said meanwhile."""
    done = subprocess.run(
        [*COMMAND, *arguments, "-o", "json"],
        capture_output=True, text=True, timeout=240, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def test_on_a_cluster_of_its_own(demo_model: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    code, receipt, said = played("kill-during-scale-up", "--model", str(demo_model), "--record", str(record))
    assert (code, receipt.get("broken")) == (0, []), said
    assert receipt["faults"] == {"kill": 4}
    assert sum(receipt["operations"].values()) == 8
    assert receipt["requests"] > 0
    lines = [json.loads(line)["line"] for line in record.read_text().splitlines()]
    assert lines[0] == "header"
    assert lines.count("dealt") == 4
    assert {"expected", "answered", "changed", "read", "happened", "verified"} <= set(lines)


def test_on_a_running_deployment(serve: Serve, demo_model: Path) -> None:
    cluster = serve(demo_model, 2, ("--chaos",))
    cluster.wait_serving(2)
    address = cluster.state.address()
    there = ("--target", address.url, "--admin", address.admin_url, "--token", address.admin_token)
    before = {each["rank"]: each["incarnation"] for each in cluster.status()["ranks"]}

    refused = (
        ("kill-both-holders", "2 ranks would be down at a time"),
        ("kill-rank", "no terminal to ask"),
    )
    for scenario, why in refused:
        code, _, said = played(scenario, *there)
        assert code == 1
        assert why in said
    code, planned, _ = played("kill-rank", *there, "--dry-run")
    assert code == 2
    assert {victim for step in planned["steps"] for victim in step["victims"]} == {"rank 0", "rank 1"}
    assert {each["rank"]: each["incarnation"] for each in cluster.status()["ranks"]} == before, "nothing was done"

    code, receipt, said = played("kill-rank", *there, "--yes")
    assert (code, receipt.get("broken")) == (0, []), said
    assert receipt["faults"] == {"kill": 4}
    assert receipt["requests"] > 0
    after = {each["rank"]: each["incarnation"] for each in cluster.wait_serving(2)["ranks"]}
    assert all(after[rank] > before[rank] for rank in before)
    assert "rank.step" in said
