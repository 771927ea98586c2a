"""A short churn, through the command that people use: scales, drains, undrains and cancellations under load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_a_short_churn(demo_model: Path) -> None:
    main = [sys.executable, "-c", "from chaos.cli.main import main; main()"]
    command = [*main, "churn", "--changes", "8", "--seed", "5", "-o", "json", "--model", str(demo_model)]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr[-2000:]
    receipt = json.loads(outcome.stdout)
    assert receipt["changes"] >= 8
    assert set(receipt["kinds"]) == {"scale", "drain", "undrain"}
    assert receipt["outcomes"]["done"] > 5
    assert receipt["requests"] >= 8
