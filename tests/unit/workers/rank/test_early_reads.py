"""Reads beside a step: each is done once or not at all, and nobody waits for one for ever."""

from __future__ import annotations

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


def _no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")
