"""A served cluster for the end-to-end tests, and the checkpoints that they serve."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chaos.target.cluster import ServedCluster
from elastic.demo.model import write_demo_model
from workers.agent.preload import WORKER_CLASS, preload_for
from workers.agent.zygote import Zygote

Serve = Callable[..., ServedCluster]


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint, written out once."""
    directory = tmp_path_factory.mktemp("model") / "demo-moe"
    write_demo_model(directory)
    return directory


@pytest.fixture(scope="session")
def zygote(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """What ranks import, imported once for all clusters: five seconds of a core for each of them otherwise."""
    preload = preload_for(WORKER_CLASS, str(demo_model.resolve()))
    made = Zygote(preload, os.environ, tmp_path_factory.mktemp("zygote") / "log")
    yield made
    made.close()


@pytest.fixture
def serve(tmp_path: Path, zygote: Zygote) -> Iterator[Serve]:
    """`serve(model, ranks, flags=(), state_dir=None)` starts a cluster; it is stopped at the end, logs go to stderr.

    `own_zygote`: it imports what its ranks need by itself, as `elastic serve` does for a user.
    """
    started: list[ServedCluster] = []

    def start(
        model: Path, ranks: int, flags: tuple[str, ...] = (), state_dir: Path | None = None, own_zygote: bool = False
    ) -> ServedCluster:
        folder = state_dir or tmp_path / f"state{len(started)}"
        given = None if own_zygote else zygote
        cluster = ServedCluster(model, ranks, state_dir=folder, flags=flags, zygote=given)
        started.append(cluster.__enter__())
        return cluster

    yield start
    for cluster in started:
        cluster.__exit__()
        for log in sorted((cluster.state.path / "logs").glob("*.log")):
            tail = log.read_text(errors="replace")[-3000:]
            if tail:
                os.write(2, f"--- {log.name}\n{tail}\n".encode())
