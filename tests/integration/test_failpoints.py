"""Failpoints in processes: who is to die dies, who is to hang hangs, and a limit holds over restarts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from membership.events import EventLog
from membership.failpoints import ENV

pytestmark = pytest.mark.integration

PROGRAM = "import sys; from membership.failpoints import arm, hit; arm('test', sys.argv[1]); hit('rank.prepared', 2)"


def started(history: Path, faults: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(history)], env={**os.environ, ENV: faults})


def test_the_first_one_dies_and_the_next_does_not(tmp_path: Path) -> None:
    history = tmp_path / "events.jsonl"
    ends = [started(history, "rank.prepared=1*kill").wait(timeout=60.0) for _ in range(2)]
    assert ends == [-signal.SIGKILL, 0]
    assert [event.fields["action"] for event in EventLog.read(history)] == ["kill"]


def test_who_hangs_does_so_until_it_is_killed(tmp_path: Path) -> None:
    history = tmp_path / "events.jsonl"
    process = started(history, "rank.prepared@2=hang")
    told = next(iter(EventLog.follow(history, threading.Event())))
    assert told.fields["pid"] == process.pid
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=60.0) == -signal.SIGTERM


def test_what_there_is_not_ends_it_at_the_start(tmp_path: Path) -> None:
    assert started(tmp_path / "events.jsonl", "rank.nowhere=kill").wait(timeout=60.0) == 1
