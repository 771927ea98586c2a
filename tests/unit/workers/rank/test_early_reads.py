"""Reads beside a step: each is done once or not at all, and nobody waits for one for ever."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import closing

import pytest

from workers.rank.early_reads import EarlyReads

pytestmark = pytest.mark.unit


def test_a_read_that_found_no_thread_is_never_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is done in turn instead. By the time that there is a thread for another, its blocks may be live again."""
    done: list[str] = []
    with closing(EarlyReads()) as reads:
        with monkeypatch.context() as short:
            short.setattr(threading.Thread, "start", _no_thread)
            assert not reads.begin(lambda: done.append("first"))
        assert reads.begin(lambda: done.append("second"))
        reads.settle()
    assert done == ["second"]


STUCK = """
import threading
from workers.rank import early_reads
early_reads.EARLY_READ_TIMEOUT_S = 0.05
reads = early_reads.EarlyReads()
assert reads.begin(threading.Event().wait)
try:
    reads.{by}()
except Exception:
    pass  # as a rank does where its agent had called: the error is the answer
"""


@pytest.mark.parametrize("by", ["settle", "close"])
def test_a_read_that_does_not_end_ends_its_rank(by: str) -> None:
    """Nothing else keeps it from writing into blocks that the next engine hands out."""
    process = subprocess.run([sys.executable, "-c", STUCK.format(by=by)], timeout=20, capture_output=True, check=False)
    assert process.returncode == 1
    assert b"early_read_stuck" in process.stdout + process.stderr


def test_the_error_of_a_read_is_raised_where_it_is_waited_for() -> None:
    with closing(EarlyReads()) as reads:
        reads.begin(lambda: print(1 / 0))
        with pytest.raises(ZeroDivisionError):
            reads.settle()


def _no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")
