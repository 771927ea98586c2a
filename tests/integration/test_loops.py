"""Each loop that must outlive faults, at each of its calls, under each error: it goes on once the fault is over.

While it lasts, what cannot be done is tried again, and what the loop looks after is untouched. The table is in
`tests/support/loops.py`; a file that starts a thread is in it, or listed with its reason.
"""

from __future__ import annotations

import ast
import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.helpers import eventually
from tests.support.loops import LOOPS, OTHERS, Call, Loop, Scene
from tests.support.sources import sources

pytestmark = pytest.mark.integration

# No descriptor; no memory; no process or thread; disk full; disk read-only; directory removed.
ERRORS = (errno.EMFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC, errno.EROFS, errno.ENOENT)
T = 30.0
MATRIX = [
    pytest.param(loop, number, id=f"{Path(loop.file).stem}-{call.replace(' ', '_')}")
    for loop in LOOPS
    for number, call in enumerate(loop.calls)
]


@contextmanager
def failing(call: Call, error: int, hits: list[int], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The call fails with this error, except in the test's own thread."""
    owner, name = call
    if isinstance(owner, Path):  # in another process, which reads what is to fail
        met = owner.with_suffix(".met")
        met.unlink(missing_ok=True)
        owner.write_text(f"{name} {error}")
        hits += [1, 1]  # `provoke` returns once that process has answered
        yield
        owner.unlink()
        assert met.read_text().split() == [name, str(error)], "the other process has not met the fault"
        return
    real = getattr(owner, name)

    def fail(*args: Any, **named: Any) -> Any:
        thread = threading.current_thread()
        if thread is threading.main_thread() or thread.name == "client":
            return real(*args, **named)
        hits.append(1)
        if owner is threading.Thread:
            raise RuntimeError("can't start new thread")
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        yield


@pytest.mark.parametrize(("loop", "number"), MATRIX)
def test_it_goes_on_once_the_fault_is_over(
    loop: Loop, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("membership.base.attempts.ATTEMPT_PAUSE_S", 0.01)
    monkeypatch.setattr("membership.base.attempts.ATTEMPT_PAUSE_MAX_S", 0.05)
    with loop.scene(tmp_path) as scene:
        assert len(scene.calls) == len(loop.calls)
        for error in ERRORS:
            hits: list[int] = []
            with failing(scene.calls[number], error, hits, monkeypatch):
                scene.provoke()
                met = partial(_met, hits, scene)
                eventually(met, T, f"{errno.errorcode[error]} to be met twice, or done without")
                assert scene.untouched()
            eventually(scene.done, T, f"what was to be done, once {errno.errorcode[error]} was over")
            assert scene.untouched()


def _met(hits: list[int], scene: Scene) -> bool:
    """Whether the fault was met and tried again; a log that cannot be opened is done without."""
    return len(hits) >= 2 or (bool(hits) and bool(scene.done()))


def test_each_file_that_starts_a_thread_is_in_the_table() -> None:
    starts = {
        source.path
        for source in sources("membership", "workers", "elastic")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("threading.Thread")
    }
    known = {loop.file for loop in LOOPS} | OTHERS.keys()
    assert starts - known == set()
    assert OTHERS.keys() - starts == set(), "stale entries"
