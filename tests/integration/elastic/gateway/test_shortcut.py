"""A stream's tokens reach its client without waking a task: most do, and none while the client does not read."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from elastic.gateway.connection import Connection
from tests.support.gateway_cluster import MODEL, GatewayCluster, RunningGateway, wait_ready
from tests.support.helpers import eventually

pytestmark = pytest.mark.integration

TEXT = "the quick brown fox jumps over the lazy dog, wörld " * 60
SMALL = 4096  # what the kernel may keep of either side's; it takes the double
MOST_BUFFERED = 64 * 1024 + SMALL  # asyncio's limit, and the event that passes it


@dataclass
class Seen:
    """How connections were used."""

    taken: int = 0
    refused: int = 0
    most_buffered: int = 0


@pytest.fixture
def cluster(tmp_path: Path) -> GatewayCluster:
    cluster = GatewayCluster(tmp_path, max_model_len=8192)
    cluster.publish_view()
    return cluster


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen = Seen()
    made, takes, write = Connection.connection_made, Connection.takes_part, Connection.write_part

    def connection_made(self: Connection, transport: Any) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        made(self, transport)

    def takes_part(self: Connection) -> bool:
        seen.refused += not (taken := takes(self))
        return taken

    def write_part(self: Connection, data: bytes) -> None:
        write(self, data)
        seen.taken += 1
        seen.most_buffered = max(seen.most_buffered, self.transport.get_write_buffer_size())

    for each in (connection_made, takes_part, write_part):
        monkeypatch.setattr(Connection, each.__name__, each)
    return seen


@pytest.fixture
def asking(seen: Seen, gateway: RunningGateway) -> Iterator[socket.socket]:
    """A client that has asked for a stream, and reads nothing yet."""
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 8000, "stream": True}).encode()
    at = urlsplit(gateway.url)
    with closing(socket.socket()) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        client.settimeout(60.0)
        client.connect((at.hostname, at.port))
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        yield client


def events_of(answer: HTTPResponse) -> Iterator[str]:
    while (line := answer.readline().decode().strip()) != "data: [DONE]":
        if line:
            yield json.loads(line.removeprefix("data: "))["choices"][0]["text"]


def test_most_tokens_of_a_stream_wake_no_task(
    cluster: GatewayCluster, gateway: RunningGateway, seen: Seen, asking: socket.socket
) -> None:
    """Past everything that stands between the application and its connection: it must still find the connection."""
    with cluster.engine(cluster.says(TEXT), pause_after=3) as engine, closing(HTTPResponse(asking)) as answer:
        wait_ready(gateway)
        answer.begin()
        events = events_of(answer)
        text = next(events)
        engine.pause_after = None
        text += "".join(events)
    assert text == TEXT
    assert seen.taken > len(cluster.tokenizer.encode(TEXT)) / 2  # a client on a busy machine may be slow for a while


def test_a_client_that_does_not_read_is_waited_for(cluster: GatewayCluster, seen: Seen, asking: socket.socket) -> None:
    with cluster.engine(cluster.says(TEXT)) as engine, closing(HTTPResponse(asking)) as answer:
        eventually(lambda: seen.refused, 60.0, "the connection to be full")
        eventually(lambda: not engine.running, 60.0, "the engine to have said all")
        answer.begin()
        assert "".join(events_of(answer)) == TEXT
    assert seen.taken > 50  # before it was full
    assert seen.most_buffered <= MOST_BUFFERED
