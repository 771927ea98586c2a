"""`elastic gateway` as a process of its own, on a real etcd: it registers, streams, obeys SIGTERM, and dies alone."""

from __future__ import annotations

import signal
import socket
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from chaos.target.warm_start import WarmCommands
from elastic.serve.etcd_server import EtcdServer
from elastic.serve.role_process import leases_of
from membership.store.etcd import connect
from membership.store.keys import Keys
from tests.support.gateway_process import BODY, CLUSTER, alive, engine_in, free_port, gateway
from tests.support.helpers import eventually
from tests.support.replaced_files import replace_text

pytestmark = pytest.mark.integration


def test_sigterm_lets_the_stream_end(commands: WarmCommands, etcd: EtcdServer, tmp_path: Path) -> None:
    port = free_port()
    with engine_in(etcd, tmp_path) as engine, gateway(commands, etcd, tmp_path, port) as running:
        eventually(lambda: alive(port), 60.0, "the gateway to answer")
        mapped = Path(f"/proc/{running.process.pid}/maps").read_text()
        assert "libtorch" not in mapped
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=BODY, timeout=30) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: {")
            running.process.send_signal(signal.SIGTERM)
            eventually(lambda: not alive(port) or _stopping(port), 30.0, "the gateway to notice")
            engine.pause_after = None
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"stop"' in rest[-2]
        assert running.process.wait(timeout=30) == 0
        assert _registered(etcd) is None, "its lease is revoked, not left to expire"


def _stopping(port: int) -> bool:
    return "shutting down" in httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=30).text


def test_a_killed_gateway_is_forgotten_and_its_clients_requests_end(
    commands: WarmCommands, etcd: EtcdServer, tmp_path: Path
) -> None:
    port, there = free_port(), ("--node", "there")
    with engine_in(etcd, tmp_path) as engine, gateway(commands, etcd, tmp_path, port, *there) as running:
        eventually(lambda: alive(port) and _registered(etcd), 60.0, "the gateway to register")
        with closing(connect([etcd.url])) as store:
            prefix, pid = Keys(CLUSTER).prefix, running.process.pid
            assert leases_of(store, prefix, pid, "here") == set(), "a process of that pid died on another host"
            assert len(leases_of(store, prefix, pid, "there")) == 1
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=BODY, timeout=30) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: {")
            running.process.kill()
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        eventually(lambda: _registered(etcd) is None, 30.0, "its lease to expire")
        with gateway(commands, etcd, tmp_path, port) as successor:
            eventually(lambda: alive(port), 30.0, "a gateway on the same port")
            assert successor.process.poll() is None
        assert len(engine.submits) == 1


def test_no_gateway_works_with_another_tokenizer_than_the_cluster_serves(
    commands: WarmCommands, etcd: EtcdServer, tmp_path: Path
) -> None:
    ports, ask = (free_port(), free_port()), BODY | {"stream": False, "prompt": "the quick", "max_tokens": 1}
    with engine_in(etcd, tmp_path) as engine:
        engine.pause_after = None

        def prompt(port: int) -> list[int]:
            assert httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=ask, timeout=30).status_code == 200
            return engine.submits[-1].prompt

        with gateway(commands, etcd, tmp_path / "a", ports[0]) as first:
            eventually(lambda: alive(ports[0]), 60.0, "the gateway to answer")
            expected = prompt(ports[0])
            replace_text(tmp_path / "model", "tokenizer_config.json", lambda text: text.replace("true", "false"))
            first.process.kill()
        with gateway(commands, etcd, tmp_path / "a", ports[0]):
            eventually(lambda: alive(ports[0]), 30.0, "it to answer again")
            assert prompt(ports[0]) == expected, "from what it kept"
        with gateway(commands, etcd, tmp_path / "b", ports[1]) as other:
            status, said = other.end()
        assert status == 1
        assert "tokenizer_config.json in" in said.splitlines()[-1]
        assert "put the files back" in said.splitlines()[-1]


def test_a_busy_port_is_one_clear_line(commands: WarmCommands, etcd: EtcdServer, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with gateway(commands, etcd, tmp_path, port) as running:
            status, said = running.end()
        assert status == 1
        assert said.splitlines()[-1].startswith(f"error: cannot listen on 127.0.0.1:{port}: Address already in use")


def _registered(etcd: EtcdServer) -> object | None:
    store = connect([etcd.url])
    try:
        return store.get(Keys(CLUSTER).gateway("g"))
    finally:
        store.close()
