"""A short soak, through the command that people use: nested deaths under load, and nothing lost, altered or left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def test_a_short_soak(demo_model: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from chaos.cli.main import main; main()",
        "soak",
        "--kills",
        "14",
        "--requests",
        "200",
        "--seed",
        "45",
        "-o",
        "json",
    ]
    outcome = subprocess.run(
        [*command, "--model", str(demo_model)], capture_output=True, text=True, timeout=360, check=False
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr[-2000:]
    receipt = json.loads(outcome.stdout)
    assert receipt["ok"]
    assert receipt["kills"] >= 14
    assert receipt["zombies"] >= 2
    assert receipt["outages"] >= 1
    assert receipt["requests"] >= 200
    assert set(receipt["strikes"]) >= {"second", "newcomer", "holders", "all", "scale", "role", "zombie", "freeze"}
    assert "supervisor" in {each["process"] for each in receipt["growth"]}, "what runs all the while was watched"
