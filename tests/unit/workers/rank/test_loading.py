"""A load's thread: at a low priority if it is to give way, and nothing else of the process with it."""

from __future__ import annotations

import os
import threading

import pytest

from workers.ipc.cpu_priority import LOW_NICE
from workers.protocol.load_progress import LoadProgress
from workers.rank.loading import Loading

pytestmark = pytest.mark.unit


def priority() -> int:
    """This thread's."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.parametrize("low", [False, True])
def test_only_a_load_that_gives_way_has_a_low_priority(low: bool) -> None:
    before = priority()
    loading = Loading(priority, LoadProgress(), low_priority=low)
    assert loading.get_output(10.0) == (max(before, LOW_NICE) if low else before)
    assert priority() == before
