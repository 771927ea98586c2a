"""An etcd of a test's own, a connection to it, and commands as forks of where the imports are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from chaos.target.warm_start import WarmCommands
from elastic.serve.etcd_server import EtcdServer
from membership.store.etcd import connect
from membership.store.interface import Store


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmCommands]:
    with WarmCommands(tmp_path_factory.mktemp("warm")) as made:
        yield made


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path / "etcd") as server:
        yield server


@pytest.fixture
def store(etcd: EtcdServer) -> Iterator[Store]:
    with closing(connect([etcd.url])) as found:
        yield found
