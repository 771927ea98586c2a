"""The stores of the contract, and an etcd that trusts nobody: TLS, client certificates, a user with few rights.

Its tokens end after a second, so that each test of it meets their end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from elastic.serve.etcd_server import EtcdServer
from membership.store.etcd import connect
from membership.store.in_memory import MemoryStore
from membership.store.interface import Store
from membership.store.keys import ROOT
from tests.support.secured_etcd import SecuredEtcd, secured_etcd


@pytest.fixture(scope="session")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredEtcd]:
    """USER may use the keys of the tests, as a cluster's user may use that cluster's."""
    with secured_etcd(tmp_path_factory.mktemp("secured"), "/test/", ROOT, token_ttl_s=1) as etcd:
        yield etcd


@pytest.fixture(params=["memory", "etcd"])
def open_store(request: pytest.FixtureRequest, etcd: EtcdServer) -> Iterator[Store]:
    """One in which all keys may be read."""
    with closing(MemoryStore() if request.param == "memory" else connect([etcd.url])) as found:
        yield found


@pytest.fixture(params=["memory", "etcd", "secured"])
def store(request: pytest.FixtureRequest, etcd: EtcdServer, secured: SecuredEtcd) -> Iterator[Store]:
    if request.param == "secured":
        found: Store = secured.connect(prefix="/test/")
    else:
        found = MemoryStore() if request.param == "memory" else connect([etcd.url])
    with closing(found):
        yield found
