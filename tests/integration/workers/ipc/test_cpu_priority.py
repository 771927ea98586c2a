"""Short turns: asked of the kernel for a process and the threads it starts later, nice value left alone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from workers.ipc.cpu_priority import usable_cores

pytestmark = pytest.mark.integration

PROGRAM = """
import ctypes, os, threading
from workers.ipc.cpu_priority import _SchedAttr, run_in_short_turns

def turn():
    found = _SchedAttr()
    ctypes.CDLL(None).syscall(315, 0, ctypes.byref(found), ctypes.sizeof(found), 0)
    return found.runtime, found.nice

os.nice(3)
before, taken, seen = turn(), run_in_short_turns(), []
thread = threading.Thread(target=lambda: seen.append(turn()))
thread.start()
thread.join()
print(before, taken, turn(), *seen, sep="|")
"""


def _release() -> tuple[int, int]:
    major, minor, *_ = platform.release().split(".")
    return int(major), int("".join(filter(str.isdigit, minor)))


@pytest.mark.skipif(
    platform.machine() != "x86_64" or _release() < (6, 12), reason="the kernel takes no slice for ordinary threads"
)
def test_a_process_and_its_later_threads_get_short_turns() -> None:
    outcome = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=30, check=True)
    before, taken, ours, threads = outcome.stdout.strip().split("|")
    assert taken == "True"
    length, nice = eval(before)
    assert length > 100_000
    assert eval(ours) == eval(threads) == (100_000, nice)


@pytest.mark.parametrize(("given", "most"), [("1", 1), ("4096", None), ("0", None), ("", None), ("many", None)])
def test_ranks_use_no_more_cores_than_their_pod_was_given(
    given: str, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.ipc.cpu_priority.CPU_MAX", Path("/missing"))
    monkeypatch.setenv("ELASTIC_CORES", given)
    assert usable_cores.__wrapped__() == (most or len(os.sched_getaffinity(0)))
