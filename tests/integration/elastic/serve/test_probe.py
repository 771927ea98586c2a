"""The readiness probe of roles without an API, as a kubelet asks it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing

import httpx
import pytest
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from structlog.testing import capture_logs

from elastic.serve import probe as module
from elastic.serve.etcd_server import free_ports
from elastic.serve.probe import MAX_CLIENTS, Probe, probe
from membership.base.errors import ConfigError
from tests.support.ipv6 import needs_ipv6

pytestmark = pytest.mark.integration


def counted() -> bytes:
    return b"elastic_ep_something 1.0\n"


@pytest.fixture
def answering() -> Iterator[Probe]:
    made = Probe("127.0.0.1", 0, counted)
    yield made
    made.close()


def asked(answering: Probe, path: str = "/readyz") -> httpx.Response:
    return httpx.get(f"http://127.0.0.1:{answering.port}{path}", timeout=30)


def test_it_is_ready_once_nothing_is_lacking(answering: Probe) -> None:
    begun = asked(answering)
    assert (begun.status_code, begun.json()["status"]) == (503, "not ready")
    answering.report("ranks [2] do not serve yet")
    assert asked(answering).json()["reasons"] == ["ranks [2] do not serve yet"]
    answering.report("")
    assert (asked(answering).status_code, asked(answering).json()) == (200, {"status": "ready"})
    assert asked(answering, "/livez").status_code == 404


def test_it_says_what_its_role_has_counted(answering: Probe) -> None:
    said = asked(answering, "/metrics")
    assert (said.status_code, said.headers["content-type"]) == (200, CONTENT_TYPE_PLAIN_0_0_4)
    assert said.content == counted()


def test_an_error_in_what_is_counted_is_an_answer_and_a_log_line() -> None:
    def failing() -> bytes:
        raise KeyError("node")

    with capture_logs() as logged, closing(Probe("127.0.0.1", 0, failing)) as answering:
        said = asked(answering, "/metrics")
        assert (said.status_code, said.json()) == (500, {"error": "KeyError: 'node'"})
        assert asked(answering).status_code == 503
    assert [(each["event"], each["log_level"]) for each in logged if each["log_level"] == "error"] == [
        ("metrics_failed", "error")
    ]


@needs_ipv6
def test_it_listens_at_an_ipv6_address() -> None:
    six = Probe("[::1]", 0, counted)
    try:
        assert httpx.get(f"http://[::1]:{six.port}/readyz", timeout=30).status_code == 503
    finally:
        six.close()


def test_a_client_that_says_nothing_keeps_nobody_from_an_answer(answering: Probe) -> None:
    answering.report("")
    with socket.create_connection(("127.0.0.1", answering.port), timeout=30):
        assert asked(answering).status_code == 200


def test_of_too_many_clients_that_say_nothing_the_oldest_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLIENT_TIMEOUT_S", 600.0)  # none of them goes by itself
    with closing(Probe("127.0.0.1", 0, counted)) as answering, ExitStack() as clients:
        idle = [
            clients.enter_context(socket.create_connection(("127.0.0.1", answering.port), timeout=60))
            for _ in range(MAX_CLIENTS + 2)
        ]
        assert asked(answering).status_code == 503, "a kubelet is heard"
        assert [each.recv(1) for each in idle[:3]] == [b"", b"", b""]
        idle[-1].sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
        assert idle[-1].recv(16).startswith(b"HTTP/1.0 503"), "the newest stay"


def test_a_port_in_use_is_refused_by_name(answering: Probe) -> None:
    with pytest.raises(
        ConfigError, match=f"--probe-port: cannot listen at 127.0.0.1:{answering.port}: Address already"
    ):
        Probe("127.0.0.1", answering.port, counted)


def test_it_listens_for_as_long_as_the_role_works() -> None:
    (port,) = free_ports(1)
    with probe("", port, counted) as report:
        report("")
        assert httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=30).status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=30)
    with probe("", None, counted) as report:
        report("")
