"""A role that is a fork of its supervisor finds itself as one with an interpreter of its own would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support import ROOT
from tests.support.helpers import eventually

pytestmark = pytest.mark.integration


def run(what: str, log: Path) -> str:
    log.touch()
    command = [sys.executable, "-m", "tests.support.forked_role", what, str(log)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=False, cwd=ROOT).stdout.strip()


def test_a_fork_and_a_new_interpreter_find_the_same(tmp_path: Path) -> None:
    """The second is what a role gets whose fork has died while it waited."""
    found = {}
    for what in ("start", "gone"):
        assert run(what, tmp_path / what) == "7"
        found[what] = json.loads((tmp_path / what).read_text())
    title = f"{sys.executable} -m tests.support.forked_role"
    assert found["start"].pop("title").startswith(title)
    assert found["gone"].pop("title").startswith(title)
    assert found["start"] == found["gone"]
    assert found["start"] == {
        "arguments": ["ff"],
        "more": "ff",
        "sockets": ["socket", "socket"],
        "files": 2,
        "leads": True,
        "terminable": True,
    }


def test_one_that_waits_ends_with_its_supervisor(tmp_path: Path) -> None:
    pid = int(run("orphan", tmp_path / "log"))
    eventually(lambda: not psutil.pid_exists(pid), 60.0, "the fork to end")


def test_grpc_is_imported_before_the_fork_and_has_no_thread_yet() -> None:
    """Each role needs it: a fifth of a second. Its threads would survive no fork."""
    program = """
import importlib, os, sys
from elastic.serve.role_fork import MODULES
for name in MODULES:
    importlib.import_module(name)
print("grpc" in sys.modules, len(os.listdir("/proc/self/task")))
"""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=120, check=True, env=environ
    )
    assert done.stdout == "True 1\n"
