"""Whether anything listens where etcd should be: known before gRPC is there to wait for it."""

from __future__ import annotations

import socket

import pytest

from membership.base.errors import ConfigError, StoreUnavailable
from membership.store.endpoints import require_listener

pytestmark = pytest.mark.unit


def test_one_endpoint_of_several_is_enough() -> None:
    with socket.create_server(("127.0.0.1", 0)) as there:
        require_listener(["127.0.0.1:1", f"http://127.0.0.1:{there.getsockname()[1]}"])


def test_where_nothing_listens_each_endpoint_is_named() -> None:
    with pytest.raises(StoreUnavailable) as raised:
        require_listener(["https://127.0.0.1:1", "https://[::1]:2"], timeout_s=0.1)
    assert "https://127.0.0.1:1 cannot be reached: Connection refused" in str(raised.value)
    assert "https://[::1]:2 cannot be reached" in str(raised.value)
    assert raised.value.hint


def test_our_own_etcd_is_waited_for_by_who_connects() -> None:
    require_listener(["unix:///nowhere/etcd.sock"], timeout_s=0.0)


@pytest.mark.parametrize("endpoints", [[], ["ftp://etcd:1"], ["http://a:1", "https://a:1"], ["http://u@a:1"]])
def test_what_is_no_endpoint_is_refused_without_a_look(endpoints: list[str]) -> None:
    with pytest.raises(ConfigError):
        require_listener(endpoints, timeout_s=60.0)
