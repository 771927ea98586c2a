"""The gateway when engines die, fall silent or misbehave, and when clients go away: streams go on, or end clearly."""

from __future__ import annotations

import errno
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import httpx
import msgspec.structs
import openai
import pytest
import zmq.asyncio
from openai import OpenAI

from elastic.gateway.engine_link import LinkSettings
from elastic.protocol import ToGateway, Tokens
from elastic.serve.options import ApiOptions
from tests.support.gateway_cluster import MODEL, PATIENT, QUICK, GatewayCluster, RunningGateway, wait_ready
from tests.support.helpers import eventually
from tests.support.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.integration

TEXT = "the quick brown fox jumps over the lazy dog and some more"


@pytest.fixture
def alert(cluster: GatewayCluster) -> Iterator[OpenAI]:
    """A client of a gateway that notices a silence soon."""
    link = replace(PATIENT, silence_s=QUICK.silence_s)
    with cluster.gateway("alert", link=link) as running, running.client() as client:
        yield client


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[OpenAI]:
    with gateway.client() as client:
        yield client


@pytest.mark.parametrize("kind", [zmq.DEALER, zmq.PAIR])
def test_too_few_descriptors_for_a_link_cost_a_pause_only(
    cluster: GatewayCluster, client: OpenAI, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    made, short = zmq.asyncio.Context.socket, True

    def socket(context: zmq.asyncio.Context, socket_type: int) -> zmq.asyncio.Socket:
        if short and socket_type == kind:
            failed.set()
            raise zmq.ZMQError(errno.EMFILE)
        return made(context, socket_type)

    failed = threading.Event()
    answer = cluster.says(TEXT)
    with cluster.engine(answer, pause_after=5):
        reader = Reader(client)
        eventually(lambda: reader.text, 30.0, "the stream to begin")
        monkeypatch.setattr(zmq.asyncio.Context, "socket", socket)
    with cluster.engine(answer):
        assert failed.wait(30.0), "no socket was asked for"
        short = False
        assert (reader.join().text, reader.reasons, reader.error) == (TEXT, ["stop"], None)


class Reader:
    """A streaming client in a thread."""

    def __init__(self, client: OpenAI, **options: object) -> None:
        self.text, self.reasons, self.error = "", [], None
        self._client, self._options = client, {"max_tokens": 60, "prompt": "x"} | options
        self._thread = threading.Thread(target=self._run, name="reader")
        self._thread.start()

    def _run(self) -> None:
        try:
            for chunk in self._client.completions.create(model=MODEL, stream=True, **self._options):
                self.text += chunk.choices[0].text
                self.reasons += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
        except openai.APIError as error:
            self.error = error

    def join(self) -> Reader:
        self._thread.join(30.0)
        assert not self._thread.is_alive()
        return self


def test_a_stream_goes_on_with_the_next_engine(cluster: GatewayCluster, client: OpenAI) -> None:
    answer = cluster.says(TEXT)
    with cluster.engine(answer, pause_after=5) as first:
        readers = [Reader(client) for _ in range(4)]
        begun = cluster.tokenizer.decode(cluster.tokenizer.encode(TEXT)[1:6])
        eventually(lambda: all(reader.text == begun for reader in readers), 30.0, "the streams to begin")
        first.close()
    with cluster.engine(answer, pause_after=9) as second:
        eventually(lambda: len(second.submits) == 4, 30.0, "the requests to be submitted again")
        assert {len(submit.emitted) for submit in second.submits} == {5}
        assert all(submit.emitted == answer(submit)[:5] for submit in second.submits)
    with cluster.engine(answer):
        for reader in readers:
            reader.join()
    assert [(reader.text, reader.reasons, reader.error) for reader in readers] == [(TEXT, ["stop"], None)] * 4


def test_a_zombie_engine_is_not_listened_to(cluster: GatewayCluster, client: OpenAI) -> None:
    """The old engine runs on and sends after another has the token (stopped past its lease, then continued)."""
    wrong = cluster.says("something else entirely, that no client must ever see at all")
    with cluster.engine(wrong, pause_after=0) as zombie:
        reader = Reader(client)
        eventually(lambda: zombie.submits, 30.0, "the request to arrive")
        with cluster.engine(cluster.says(TEXT), pause_after=5) as engine:
            eventually(lambda: engine.submits, 30.0, "the request to be submitted again")
            zombie.pause_after = None
            time.sleep(0.1)
            engine.pause_after = None
            assert reader.join().text == TEXT


def test_a_broken_connection_is_made_anew(cluster: GatewayCluster, alert: OpenAI) -> None:
    """The engine's process restarts with the same token and address (or a network cut): nothing else changes."""
    with cluster.engine(cluster.says(TEXT), pause_after=5) as engine:
        reader = Reader(alert)
        begun = cluster.tokenizer.decode(cluster.tokenizer.encode(TEXT)[1:6])
        eventually(lambda: reader.text == begun, 30.0, "the stream to begin")
        token, address = engine.token, engine.address
    with ScriptedEngine(token, cluster.says(TEXT), address=address) as same:
        assert reader.join().text == TEXT
        assert len(same.submits[0].emitted) == 5


def test_an_engine_that_falls_silent_is_connected_to_anew(cluster: GatewayCluster, alert: OpenAI) -> None:
    with cluster.engine(cluster.says(TEXT), pause_after=5) as engine:

        def asked_again() -> bool:
            """After a silence that the gateway has noticed, if it had the time to."""
            engine.mute = True
            time.sleep(2 * QUICK.silence_s)
            engine.mute = False
            time.sleep(0.2)
            return len(engine.submits) > 1

        reader = Reader(alert)
        eventually(lambda: len(reader.text) > 5, 30.0, "the stream to begin")
        eventually(asked_again, 60.0, "the request to be submitted again")
        engine.pause_after = None
        assert reader.join().text == TEXT


@pytest.mark.parametrize("fault", ["gap", "duplicate", "stale"])
def test_faulty_output_never_reaches_the_client(cluster: GatewayCluster, client: OpenAI, fault: str) -> None:
    lost: list[str] = []

    def mangle(message: ToGateway) -> list[ToGateway]:
        if not isinstance(message, Tokens):
            return [message]
        if fault == "duplicate":
            return [message, message]
        if fault == "stale":
            return [msgspec.structs.replace(message, engine_token=message.engine_token - 1, tokens=[7]), message]
        if message.index == 4 and not lost:
            lost.append(message.request_id)
            return []
        return [message]

    with cluster.engine(cluster.says(TEXT), mangle=mangle) as engine:
        reader = Reader(client).join()
        assert (reader.text, reader.reasons, reader.error) == (TEXT, ["stop"], None)
        assert [len(submit.emitted) for submit in engine.submits] == ([0, 4] if fault == "gap" else [0])


def test_an_engine_that_goes_on_contradicting_itself_ends_the_stream_with_an_error(cluster: GatewayCluster) -> None:
    def mangle(message: ToGateway) -> list[ToGateway]:
        broken = isinstance(message, Tokens) and message.index >= 3
        return [msgspec.structs.replace(message, index=message.index + 1)] if broken else [message]

    quick = LinkSettings(resubmit_after_s=0.05, max_faults=2)
    with (
        cluster.engine(cluster.says(TEXT), mangle=mangle),
        cluster.gateway("strict", link=quick) as gateway,
        gateway.client() as client,
    ):
        reader = Reader(client).join()
        assert TEXT.startswith(reader.text)
        assert reader.reasons == []
        assert "leave a gap" in str(reader.error)


def test_without_an_engine_a_request_waits_then_gets_a_503(cluster: GatewayCluster) -> None:
    with cluster.gateway("quick", link=QUICK) as gateway, gateway.client() as client:
        started = time.monotonic()
        with pytest.raises(openai.InternalServerError, match="no engine") as refusal:
            client.completions.create(model=MODEL, prompt="x")
        assert time.monotonic() - started >= QUICK.engine_wait_s
    assert refusal.value.status_code == 503
    assert int(refusal.value.response.headers["retry-after"]) > 0


def test_a_request_waits_for_the_engine_that_comes(cluster: GatewayCluster, client: OpenAI) -> None:
    reader = Reader(client)
    with cluster.engine(cluster.says(TEXT)):
        assert reader.join().text == TEXT


def test_a_stream_without_an_engine_ends_with_an_error_event(cluster: GatewayCluster) -> None:
    body = {"model": MODEL, "prompt": "x", "stream": True, "max_tokens": 60}
    with (
        cluster.engine(cluster.says(TEXT), pause_after=3) as engine,
        cluster.gateway("quick", link=QUICK) as gateway,
    ):
        wait_ready(gateway)
        with httpx.stream("POST", f"{gateway.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: {")
            engine.close()
            rest = [line for line in lines if line]
    assert '"no_engine"' in rest[-2]
    assert '"server_error"' in rest[-2]
    assert rest[-1] == "data: [DONE]"


def test_no_progress_has_a_deadline(cluster: GatewayCluster) -> None:
    with (
        cluster.engine(cluster.says(TEXT), pause_after=3) as engine,
        cluster.gateway("impatient", link=LinkSettings(stall_s=0.5)) as gateway,
        gateway.client() as client,
    ):
        reader = Reader(client).join()
        assert "no token from the engine for 0.5 s" in str(reader.error)
        eventually(lambda: engine.aborts, 30.0, "the abort to arrive")


@contextmanager
def asking(gateway: RunningGateway, **fields: object) -> Iterator[socket.socket]:
    """A connection on which a completion was asked for."""
    body = json.dumps({"model": MODEL, "max_tokens": 60, **fields}).encode()
    url = httpx.URL(gateway.url)
    with socket.create_connection((url.host, url.port or 0), timeout=30) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        yield client


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_leaves_ends_its_request(
    cluster: GatewayCluster, gateway: RunningGateway, stream: bool, begun: bool
) -> None:
    sent = 3 if begun else 0
    with cluster.engine(cluster.says(TEXT), pause_after=sent) as engine:
        with asking(gateway, prompt=["x", "y"], stream=stream):
            eventually(lambda: [each.sent for each in engine.running] == [sent, sent], 30.0, "both to wait")
        eventually(lambda: len(engine.aborts) == 2, 30.0, "the aborts to arrive")
        assert sorted(engine.aborts) == sorted(submit.request_id for submit in engine.submits)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_half_closes_gets_its_answer(
    cluster: GatewayCluster, gateway: RunningGateway, stream: bool, begun: bool
) -> None:
    with (
        cluster.engine(cluster.says(TEXT), pause_after=3 if begun else 0) as engine,
        asking(gateway, prompt="x", stream=stream) as client,
    ):
        got = client.recv(65536) if begun and stream else b""
        client.shutdown(socket.SHUT_WR)
        eventually(lambda: engine.submits, 30.0, "the request to arrive")
        engine.pause_after = None
        while part := client.recv(65536):
            got += part
        assert b"HTTP/1.1 200 OK" in got
        assert b'"finish_reason":"stop"' in got
        assert (b"data: [DONE]" in got) == stream
        assert engine.aborts == []


def test_more_requests_than_the_gateway_takes(cluster: GatewayCluster) -> None:
    with (
        cluster.engine(cluster.says(TEXT), pause_after=1) as engine,
        cluster.gateway("small", api=ApiOptions(max_open_requests=2)) as gateway,
        gateway.client() as client,
    ):
        readers = [Reader(client) for _ in range(2)]
        eventually(lambda: all(reader.text for reader in readers), 30.0, "the streams to begin")
        with pytest.raises(openai.InternalServerError, match="2 requests are open: this gateway takes 2") as refused:
            client.completions.create(model=MODEL, prompt="x")
        assert (refused.value.status_code, refused.value.code) == (503, "overloaded")
        assert refused.value.response.headers["retry-after"] == "1"
        with pytest.raises(openai.BadRequestError, match="3 choices at once are more than this gateway takes, 2"):
            client.completions.create(model=MODEL, prompt="x", n=3)
        engine.pause_after = None
        assert [reader.join().text for reader in readers] == [TEXT] * 2
        told = httpx.get(f"{gateway.url}/metrics", timeout=20).text
        ends = {
            reason: float(re.search(rf'requests_finished_total{{reason="{reason}"}} (\S+)', told)[1])
            for reason in ("stop", "length", "abort", "error")
        }
        assert ends == {"stop": 2, "length": 0, "abort": 0, "error": 0}  # what was refused has not begun


def test_many_streams_at_once(cluster: GatewayCluster, client: OpenAI) -> None:
    with cluster.engine(cluster.says(TEXT)):
        readers = [Reader(client, n=2) for _ in range(16)]
        for reader in readers:
            reader.join()
    assert all(reader.error is None and reader.reasons == ["stop", "stop"] for reader in readers)
