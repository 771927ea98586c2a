"""Outputs that are still being made: who waits for them."""

from __future__ import annotations

import queue
import threading
from contextlib import closing

import pytest

from workers.rank.output import OutputThread

pytestmark = pytest.mark.unit

WAIT_S = 5.0


class There:
    """An output that is there."""

    def get_output(self, timeout_s: float) -> str:
        return "the output"


def test_without_a_thread_an_output_is_waited_for_at_once_and_later_ones_by_a_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    deliver = lambda value: seen.put((value, threading.current_thread().name))  # noqa: E731
    with closing(OutputThread("outputs")) as outputs:
        with monkeypatch.context() as short:
            short.setattr(threading.Thread, "start", _no_thread)
            outputs.put(There(), WAIT_S, deliver)
        assert seen.get(timeout=WAIT_S) == ("the output", threading.current_thread().name)
        outputs.put(There(), WAIT_S, deliver)
        assert seen.get(timeout=WAIT_S) == ("the output", "outputs")


def _no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")
