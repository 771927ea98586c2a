"""A served cluster for the end-to-end tests, and the checkpoints that they serve."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from chaos.target.cluster import ServedCluster
from chaos.target.warm_start import WarmStart
from elastic.demo.model import write_demo_model

Serve = Callable[..., ServedCluster]
LONGEST = "test_two_hosts.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file goes first: two run at a time, and at the end it would be alone."""
    items.sort(key=lambda item: item.path.name != LONGEST)


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint, written out once."""
    directory = tmp_path_factory.mktemp("model") / "demo-moe"
    write_demo_model(directory)
    return directory


@pytest.fixture(scope="session")
def warm(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmStart]:
    """What a cluster and its ranks import, imported once for all clusters."""
    with WarmStart(demo_model, tmp_path_factory.mktemp("warm")) as made:
        yield made


@pytest.fixture
def serve(tmp_path: Path, warm: WarmStart) -> Iterator[Serve]:
    """`serve(model, ranks, flags=(), state_dir=None)` starts a cluster; it is stopped at the end, logs go to stderr.

    `own_zygote`: it imports by itself what it needs, as `elastic serve` does for a user.
    """
    started: list[ServedCluster] = []
    stopped = ExitStack()

    def start(
        model: Path, ranks: int, flags: tuple[str, ...] = (), state_dir: Path | None = None, own_zygote: bool = False
    ) -> ServedCluster:
        folder = state_dir or tmp_path / f"state{len(started)}"
        given = None if own_zygote else warm
        cluster = ServedCluster(model, ranks, state_dir=folder, flags=flags, warm=given)
        started.append(stopped.enter_context(cluster))
        return cluster

    with stopped:
        yield start
    for cluster in started:
        for log in (cluster.state.path / "serve.log", *sorted((cluster.state.path / "logs").glob("*.log"))):
            tail = log.read_text(errors="replace")[-3000:]
            if tail:
                os.write(2, f"--- {log.name}\n{tail}\n".encode())
