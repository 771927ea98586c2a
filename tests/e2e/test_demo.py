"""`elastic demo`, as a newcomer runs it: a measured receipt, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.helpers import shm_as_before

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def test_the_receipt_is_measured_and_good(tmp_path: Path) -> None:
    shm_before = set(os.listdir("/dev/shm"))
    saved = tmp_path / "history.json"
    outcome = subprocess.run(
        [sys.executable, "-m", "elastic.cli", "demo", "--seed", "7", "--plain", "-o", "json", "--history", str(saved)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr[-3000:]
    receipt = json.loads(outcome.stdout.strip().splitlines()[-1])
    assert receipt["ok"] is True
    assert receipt["seed"] == 7
    assert receipt["requests"] >= 8  # each of the eight streams; how many more is the machine's business
    assert (receipt["lost"], receipt["duplicated"], receipt["altered"]) == (0, 0, 0)
    assert receipt["epochs"] == list(range(1, len(receipt["epochs"]) + 1))
    assert len(receipt["epochs"]) >= 5  # bring-up, up, loss, rejoin, down
    for measured in ("detected_ms", "recovered_ms", "max_token_gap_ms", "steady_token_gap_p99_ms", "restored_ms"):
        assert receipt[measured] > 0, measured
    assert receipt["scale_pause_ms"] >= 0
    shm_as_before(shm_before)
    assert not list(tmp_path.glob("elastic-ep-*"))

    checked = subprocess.run(
        [sys.executable, "-c", "from chaos.cli.main import main; main()", "check", str(saved), "-o", "json"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["requests"] == receipt["requests"]
