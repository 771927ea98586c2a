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
assert take_own_shm()
Path("{LEFT}").touch()
print(Path("{LEFT}").exists())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount namespace needs root")
def test_what_others_leave_in_dev_shm_is_not_seen() -> None:
    done = subprocess.run([sys.executable, "-c", STRANGER], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.stdout, LEFT.exists()) == ("True\n", False), done.stderr
