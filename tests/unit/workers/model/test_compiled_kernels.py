"""What Triton makes of the kernels, for which no GPU is needed: how they read is most of the time that they take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.unit


def test_weights_are_read_ahead_and_not_two_bytes_at_a_time(tmp_path: Path) -> None:
    """Those of experts come from an address in a table, of which Triton knows only what the kernel says."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.support.compiled_kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 5
    for name, (narrow, ahead) in found.items():
        assert narrow == 0, name
        assert ahead >= 16, f"{name}: not the weights, then"
