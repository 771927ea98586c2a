"""Clients that take all connections, or try to: probes, admin, open streams and the link to the engine go on."""

from __future__ import annotations

import json
import signal
import socket
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from chaos.target.warm_start import WarmCommands
from elastic.serve.etcd_server import EtcdServer
from tests.support.gateway_process import BODY, TEXT, alive, engine_in, free_port, gateway
from tests.support.helpers import eventually

pytestmark = pytest.mark.integration

HALF = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Le"
HALF_BODY = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
DESCRIPTORS = 256
ADMIN = {"Authorization": "Bearer t"}


def text_of(lines: list[str]) -> str:
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert not [event for event in events if "error" in event], events
    return "".join(event["choices"][0]["text"] for event in events)


@pytest.mark.parametrize("sent", [b"", HALF, HALF_BODY, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_more_connections_than_descriptors(
    commands: WarmCommands, etcd: EtcdServer, tmp_path: Path, sent: bytes
) -> None:
    port, admin_port = free_port(), free_port()
    ports = [port, admin_port]
    with ExitStack() as opened:
        first = opened.enter_context(engine_in(etcd, tmp_path))
        running = opened.enter_context(
            gateway(commands, etcd, tmp_path, port, "--admin-port", str(admin_port), descriptors=DESCRIPTORS)
        )
        eventually(lambda: alive(port), 60.0, "the gateway to answer")
        url = f"http://127.0.0.1:{port}"
        answer = opened.enter_context(httpx.stream("POST", f"{url}/v1/completions", json=BODY, timeout=30))
        lines = answer.iter_lines()
        seen = [next(lines)]
        for number in range(3 * DESCRIPTORS):
            client = opened.enter_context(socket.create_connection(("127.0.0.1", ports[number % 2]), timeout=30))
            client.sendall(sent)
        assert httpx.get(f"{url}/livez", timeout=30).status_code == 200
        assert httpx.get(f"{url}/metrics", timeout=30).status_code == 200
        status = httpx.get(f"http://127.0.0.1:{admin_port}/admin/v1/view", headers=ADMIN, timeout=30)
        assert status.status_code == 200, status.text
        with engine_in(etcd, tmp_path, pause_after=None) as second:  # the first one is dead to the store
            first.close()
            seen += list(lines)
            assert second.submits
            asked = httpx.post(f"{url}/v1/completions", json=BODY | {"stream": False}, timeout=30)
        assert asked.json()["choices"][0]["text"] == TEXT
        assert (text_of(seen), seen[-2]) == (TEXT, "data: [DONE]")
        running.process.send_signal(signal.SIGTERM)
        _, said = running.end()
        assert len(said) < 20_000, said[:2000]


def test_more_requests_than_connections(commands: WarmCommands, etcd: EtcdServer, tmp_path: Path) -> None:
    port = free_port()
    with ExitStack() as opened:
        opened.enter_context(engine_in(etcd, tmp_path))
        opened.enter_context(gateway(commands, etcd, tmp_path, port, "--max-connections", "3"))
        eventually(lambda: alive(port), 60.0, "the gateway to answer")
        url = f"http://127.0.0.1:{port}"
        streams = [
            opened.enter_context(httpx.stream("POST", f"{url}/v1/completions", json=BODY, timeout=30)).iter_lines()
            for _ in range(3)
        ]
        assert all(next(lines).startswith("data: {") for lines in streams)  # they wait for the engine
        refused = httpx.post(f"{url}/v1/completions", json=BODY, timeout=30)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert refused.headers["retry-after"] == "1"
        assert alive(port)


def test_too_few_descriptors_are_one_clear_line(commands: WarmCommands, etcd: EtcdServer, tmp_path: Path) -> None:
    with engine_in(etcd, tmp_path):
        for flags in ((), ("--max-connections", "10000")):
            few = 200 if flags else 100
            with gateway(commands, etcd, tmp_path, free_port(), *flags, descriptors=few) as running:
                status, said = running.end()
            assert status == 1
            assert said.splitlines()[-1].startswith("error: the limit of open files is")
            assert "ulimit -Hn" in said
