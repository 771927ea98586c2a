"""Code that runs as another user of this machine; only root can start it.

What it needs is imported before it becomes that user, who may not read the interpreter's directory.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
UID = 65534


def run_as(uid: int, code: str, imports: str = "import os") -> subprocess.CompletedProcess[str]:
    """Run `code` with this user and group id and no other groups, after `imports`."""
    become = f"import os; os.setgroups([]); os.setresgid({uid}, {uid}, {uid}); os.setresuid({uid}, {uid}, {uid})"
    command = [sys.executable, "-c", f"{imports}\n{become}\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)
