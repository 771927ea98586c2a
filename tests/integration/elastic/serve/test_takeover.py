"""A cluster on an etcd that outlives its servers: one that was killed is waited out, one that lives is let alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from elastic.demo.model import shipped_demo_model
from elastic.serve.cluster_config import cluster_config
from elastic.serve.etcd_server import EtcdServer
from elastic.serve.options import ServeOptions
from elastic.serve.stored_config import write_config
from membership.base.errors import ConfigError
from membership.store.codec import encode
from membership.store.etcd import EtcdStore, connect
from membership.store.interface import Put
from membership.store.keys import Keys
from membership.store.lease import LeaseKeeper

pytestmark = pytest.mark.integration

OPTIONS = ServeOptions(model=shipped_demo_model())
CONFIG = cluster_config(OPTIONS)
KEYS = Keys(CONFIG.cluster)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EtcdStore]:
    with EtcdServer(tmp_path / "etcd") as server, closing(connect([server.url])) as store:
        store.put(KEYS.config, encode(CONFIG))
        yield store


def start(store: EtcdStore) -> list[str]:
    """What a start on this etcd says."""
    said: list[str] = []
    write_config(store, CONFIG, replace(OPTIONS, etcd=("external",)), said.append)
    return said


@pytest.mark.parametrize("offices", [("leader",), ("engine",), ("leader", "engine")])
def test_one_that_was_killed_is_waited_out(store: EtcdStore, offices: tuple[str, ...]) -> None:
    lease = store.grant(CONFIG.lease_ttl_s)
    store.txn([], [Put(KEYS.prefix + office, b"", lease) for office in offices])
    assert start(store) == [f"cluster '{CONFIG.cluster}' was served until now: up to 5 s until its leases run out"]
    assert all(store.get(KEYS.prefix + office) is None for office in offices)


@pytest.mark.parametrize("office", ["leader", "engine"])
def test_one_that_lives_is_let_alone(store: EtcdStore, office: str) -> None:
    with LeaseKeeper(store, CONFIG.lease_ttl_s) as keeper:
        store.put(KEYS.prefix + office, b"", keeper.lease)
        revision = store.range(KEYS.prefix)[0]
        with pytest.raises(ConfigError, match=f"served by another process.*{office} is renewed"):
            start(store)
        assert store.range(KEYS.prefix)[0] == revision
        assert keeper.alive


def test_nothing_is_waited_for_where_the_last_server_stopped(store: EtcdStore) -> None:
    assert start(store) == []
