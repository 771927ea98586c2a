"""The leak check of every test: it sees what this process left in /dev/shm, and nothing that others have there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.integration
LEFT = Path(f"/dev/shm/elastic-ep-left-{os.getpid()}")
STRANGER = f"""
from pathlib import Path
from tests.support.own_shm import take_own_shm
if take_own_shm():
    Path("{LEFT}").touch()
    print("left")
"""


def test_what_others_leave_in_dev_shm_is_not_seen() -> None:
    done = subprocess.run([sys.executable, "-c", STRANGER], capture_output=True, text=True, cwd=ROOT, timeout=60)
    if (done.returncode, done.stdout) == (0, ""):
        pytest.skip("a mount namespace needs more rights")
    assert (done.stdout, LEFT.exists()) == ("left\n", False), done.stderr
