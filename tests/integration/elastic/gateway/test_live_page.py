"""The live page's files and its stream: what a browser gets from the admin port, with the token and without."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest

from elastic.gateway import live
from elastic.gateway.live import MAX_READERS
from elastic.gateway.page import FILES, HEADERS
from membership.base.events import EventLog
from membership.store import codec
from membership.store.records import EngineStatus, ExpertLoad
from tests.support.gateway_cluster import MODEL, TOKEN, GatewayCluster, RunningGateway, wait_ready
from tests.support.helpers import eventually

pytestmark = pytest.mark.integration

GOOD = {"Authorization": f"Bearer {TOKEN}"}
T = 60.0
FILLING = 24  # events that fill what lies between the gateway and a reader
Message = tuple[str, Any]


@pytest.fixture
def cluster(tmp_path: Path) -> GatewayCluster:
    found = GatewayCluster(tmp_path)
    found.publish_view()
    return found


@pytest.fixture
def gateway(cluster: GatewayCluster) -> Iterator[RunningGateway]:
    with cluster.gateway() as running:
        yield running


@contextmanager
def stream(gateway: RunningGateway) -> Iterator[Iterator[Message]]:
    """The messages of a page's stream."""
    with httpx.stream("GET", f"{gateway.admin_url}/admin/v1/stream", headers=GOOD, timeout=T) as answer:
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        yield _messages(answer.iter_lines())


def _messages(lines: Iterator[str]) -> Iterator[Message]:
    for line in lines:
        if line.startswith("event: "):
            yield line.removeprefix("event: "), msgspec.json.decode(next(lines).removeprefix("data: "))


def patch_with(messages: Iterator[Message], name: str) -> dict[str, Any]:
    """What the first patch of this part says."""
    return next(data[name] for kind, data in messages if kind == "patch" and name in data)


@pytest.mark.parametrize("path", FILES)
def test_files_of_the_page_need_no_token_and_have_a_strict_policy(gateway: RunningGateway, path: str) -> None:
    answer = httpx.get(gateway.admin_url + path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == f"{FILES[path][1]}; charset=utf-8"
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    policy = {part.split()[0]: part.split()[1:] for part in answer.headers["content-security-policy"].split(";")}
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == ["'none'"]
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == ["'self'"]
    assert httpx.head(gateway.admin_url + path).status_code == 200


def test_only_the_admin_port_has_the_page(gateway: RunningGateway) -> None:
    assert httpx.get(f"{gateway.url}/ui").status_code == 404
    assert httpx.get(f"{gateway.admin_url}/ui/page.html").status_code == 404, "nothing else is beside it"


def test_the_stream_needs_the_token(gateway: RunningGateway) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        answer = httpx.get(f"{gateway.admin_url}/admin/v1/stream", headers=headers)
        assert (answer.status_code, TOKEN in answer.text) == (401, False)


def test_first_all_then_what_changes(gateway: RunningGateway, cluster: GatewayCluster) -> None:
    EventLog(cluster.events, "test").emit("before")
    with stream(gateway) as messages:
        kind, begun = next(messages)
        assert (kind, begun.keys()) == ("begin", {"now"})
        kind, first = next(messages)
        assert (kind, first["status"]["epoch"], first["ranks"].keys()) == ("patch", 1, {"0", "1"})
        assert first["placement"] == {"0": [[0, 1, 2, 3]], "1": [[0, 1, 2, 3]]}
        assert first["shape"] == {"layers": 1, "experts": 4, "max_ranks": 64, "models": [MODEL]}
        cluster.publish_view(dead=(1,))
        cluster.store.delete(cluster.keys.rank(1, 2))
        sole = {"sole_experts": 4}  # of rank 0, which has the only replicas now
        assert patch_with(messages, "ranks") == {"0": sole, "1": {"state": "dead", "pid": 0}}
        load = ExpertLoad(at=1.0, loads=((16, 16, 8, 24),))
        cluster.store.put(cluster.keys.expert_load, codec.encode(load))
        assert patch_with(messages, "loads") == [[16, 16, 8, 24]], "though it wakes no reader of the mirror"
        EventLog(cluster.events, "test").emit("after", rank=1)
        kinds = (event["kind"] for kind, events in messages if kind == "events" for event in events)
        assert "after" in kinds


def test_events_of_before_come_first(gateway: RunningGateway, cluster: GatewayCluster) -> None:
    EventLog(cluster.events, "test").emit("before", rank=3, reason="x")
    with stream(gateway) as messages:
        events = next(data for kind, data in messages if kind == "events")
        found = next(event for event in events if event["kind"] == "before")
    assert (found["role"], found["rank"], found["fields"]) == ("test", 3, {"reason": "x"})


def test_tokens_are_counted_by_the_second(gateway: RunningGateway, cluster: GatewayCluster) -> None:
    with cluster.engine(cluster.says("the quick brown fox")) as engine, gateway.client() as client:
        wait_ready(gateway)
        with stream(gateway) as messages:
            sent = client.completions.create(model=MODEL, prompt="x", max_tokens=60).usage
            load = EngineStatus(token=engine.token, epoch=1, running=7, waiting=2)
            cluster.store.put(cluster.keys.engine_status, codec.encode(load))
            seconds: list[dict[str, Any]] = []
            for kind, data in messages:
                if kind == "traffic":
                    seconds += data
                if sum(second["ended"] for second in seconds):
                    break
            assert sent is not None
            assert sum(second["tokens"] for second in seconds) == sent.completion_tokens
        with stream(gateway) as again:
            assert next(again)[0] == "begin"
            assert next(again)[1]["status"]["requests"]["running"] == 7
            assert next(data for kind, data in again if kind == "traffic") == seconds, "the last five minutes are kept"


def test_readers_are_few_and_leave_their_place(gateway: RunningGateway) -> None:
    with ExitStack() as open_streams:
        readers = [open_streams.enter_context(stream(gateway)) for _ in range(MAX_READERS)]
        assert {next(reader)[0] for reader in readers} == {"begin"}
        refused = httpx.get(f"{gateway.admin_url}/admin/v1/stream", headers=GOOD)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert httpx.get(f"{gateway.admin_url}/admin/v1/status", headers=GOOD).status_code == 200

    def let_in() -> bool:
        with httpx.stream("GET", f"{gateway.admin_url}/admin/v1/stream", headers=GOOD, timeout=T) as answer:
            return answer.status_code == 200

    eventually(let_in, T, "a place for another reader")


def test_readers_that_stop_reading_give_way(
    gateway: RunningGateway, cluster: GatewayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All places are theirs but one; who reads keeps its own."""
    monkeypatch.setattr(live, "STALLED_S", 2.0)  # longer than the one that reads waits for a processor
    history = EventLog(cluster.events, "test")
    texts = iter(["x" * 400_000] * FILLING)

    def let_in() -> bool:
        if text := next(texts, ""):
            history.emit("long", text=text)
        with httpx.stream("GET", f"{gateway.admin_url}/admin/v1/stream", headers=GOOD, timeout=T) as answer:
            return answer.status_code == 200

    with ExitStack() as opened, stream(gateway) as messages:
        stuck = [opened.enter_context(closing(asked_and_left(gateway))) for _ in range(MAX_READERS - 1)]
        assert next(messages)[0] == "begin"
        found: list[str] = []
        reads = Thread(target=lambda: found.extend(take_until(messages, "last")), name="reader")
        reads.start()
        eventually(let_in, T, "a place for another reader", interval_s=0.05)
        history.emit("last")
        reads.join(T)
        assert found[-1:] == ["last"]
        assert any(was_cut(each) for each in stuck)


def asked_and_left(gateway: RunningGateway) -> socket.socket:
    """A reader that has got the head of the answer, and takes no more."""
    url = urlsplit(gateway.admin_url)
    asking = socket.socket()
    asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    asking.settimeout(T)
    asking.connect((url.hostname, url.port))
    asking.sendall(b"GET /admin/v1/stream HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n" % TOKEN.encode())
    assert asking.recv(12) == b"HTTP/1.1 200"
    return asking


def take_until(messages: Iterator[Message], last: str) -> Iterator[str]:
    for kind, events in messages:
        for event in events if kind == "events" else ():
            yield event["kind"]
            if event["kind"] == last:
                return


def was_cut(reader: socket.socket) -> bool:
    """By the gateway."""
    reader.settimeout(1.0)
    try:
        while reader.recv(1 << 20):
            continue
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def test_the_stream_ends_when_the_gateway_is_stopped(gateway: RunningGateway) -> None:
    with stream(gateway) as messages:
        assert next(messages)[0] == "begin"
        gateway.stop.set()
        assert [kind for kind, _ in messages if kind not in ("patch", "events")] == []
