"""What is compared with ours in `benchmarks.real`: the right model, whole, and no process that nobody asks any more."""

from __future__ import annotations

import multiprocessing
import threading
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from benchmarks.real_aside import Aside
from benchmarks.real_llama import model_file

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module", autouse=True)
def tracker() -> None:
    """The process that Python keeps for all that it spawns, so that no test seems to leave it."""
    resource_tracker.ensure_running()


def silent(pipe: Connection, path: str, threads: int) -> None:
    """An engine that never says that it is ready."""
    threading.Event().wait()


def ended(pipe: Connection, path: str, threads: int) -> None:
    """One that does not load the model."""


def test_an_engine_that_does_not_come_leaves_no_process() -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(TimeoutError, match="x did not answer within 0 s"):
        Aside("x", silent, "", 1, ready_s=0.01)
    with pytest.raises(RuntimeError, match="the process of x has ended"):
        Aside("x", ended, "", 1)
    assert set(multiprocessing.active_children()) <= before


def test_a_file_that_was_not_written_whole_is_not_the_models(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")

    def write(checkpoint: Path, into: Path) -> None:
        into.write_bytes(b"of " + (checkpoint / weights.name).read_bytes())

    def stopped(checkpoint: Path, into: Path) -> None:
        into.write_bytes(b"of ")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model_file(tmp_path, stopped)
    file = model_file(tmp_path, write)
    assert file.read_bytes() == b"of one"
    assert model_file(tmp_path, stopped) == file, "it is there"
    weights.write_bytes(b"three")
    other = model_file(tmp_path, write)
    assert other.read_bytes() == b"of three"
    assert sorted(tmp_path.iterdir()) == sorted([weights, other]), "the other model's is gone"
