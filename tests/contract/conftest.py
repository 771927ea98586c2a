"""The two stores that the contract suite runs against, and a place of its own in them for each test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from elastic.serve.etcd_server import EtcdServer
from membership.store.etcd import connect
from membership.store.in_memory import MemoryStore
from membership.store.interface import Store


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    folder = tmp_path_factory.mktemp("etcd")
    with EtcdServer(folder, sockets=folder) as server:
        yield server


@pytest.fixture(params=["memory", "etcd"])
def store(request: pytest.FixtureRequest, etcd: EtcdServer) -> Iterator[Store]:
    found: Store = MemoryStore() if request.param == "memory" else connect([etcd.url])
    yield found
    found.close()


@pytest.fixture
def prefix() -> str:
    """Prefix of this test's keys: the etcd is shared."""
    return f"/test/{uuid.uuid4().hex}/"
