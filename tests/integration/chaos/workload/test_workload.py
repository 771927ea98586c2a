"""The clients of a scenario must not hide anything: what breaks a stream, or the workload itself, is reported."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from chaos.workload.history import RequestRecord
from chaos.workload.streams import Load, Workload
from membership.base.errors import WaitTimeout

pytestmark = pytest.mark.integration

TOKEN = b'data: {"choices": [{"logprobs": {"tokens": ["a"]}, "finish_reason": "stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"


@contextmanager
def server(answer: Callable[[], bytes]) -> Iterator[str]:
    """Answers every request with these bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer())

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_address[1]}"
        finally:
            http.shutdown()
            thread.join(30.0)


def once(data: bytes, structured: bool = False) -> RequestRecord:
    with server(lambda: data) as url:
        (record,) = Workload(url, "m", Load(streams=1, prompts=1, structured=structured)).run_once()
    return record


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"n": 7, "words": ["for", "while", "with", "for"]}', True),
        ('{"n": 7, "words": ["for", "while", "with"]}', False),
        ('{"n": -1, "words": ["for", "for", "for", "for"]}', False),
        ('{"n": 7, "words": ["for", "for", "for", "for"], "more": 1}', False),
        ('{"n": 7, "words": ["for", "for", "for", "f', False),
    ],
)
def test_a_structured_answer_that_is_not_as_its_schema_says_has_failed(text: str, valid: bool) -> None:
    choice = {"logprobs": {"tokens": list(text)}, "finish_reason": "stop"}
    record = once(b"data: %s\n\n" % json.dumps({"choices": [choice]}).encode() + DONE, structured=True)
    assert (record.complete, "its schema" in record.error) == (valid, not valid), record.error


def test_a_whole_stream_is_complete() -> None:
    record = once(TOKEN + DONE)
    assert (record.complete, record.tokens) == (True, ("a",))


@pytest.mark.parametrize(
    "data", [TOKEN, b"data: {damaged\n\n" + DONE, b'data: {"error": {"message": "no"}}\n\n' + DONE]
)
def test_a_stream_that_broke_off_or_is_damaged_is_not(data: bytes) -> None:
    assert not once(data).complete


def test_a_stream_that_does_not_end_is_reported() -> None:
    begun, going_on = threading.Event(), threading.Event()

    def answer() -> bytes:
        begun.set()
        assert going_on.wait(30.0)
        return TOKEN + DONE

    with server(answer) as url:
        workload = Workload(url, "m", Load(streams=1, prompts=1), timeout_s=20.0)
        workload.start()
        assert begun.wait(30.0)
        workload.timeout_s = -9.9  # how long `stop` waits, less ten seconds
        with pytest.raises(WaitTimeout, match="did not end"):
            workload.stop()
        going_on.set()
        workload.timeout_s = 20.0
        workload.stop()


def test_what_ends_the_workload_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = Workload("http://127.0.0.1:1", "m")

    async def broken(*arguments: object) -> None:
        await asyncio.sleep(0)
        raise RuntimeError("a bug")

    monkeypatch.setattr(workload, "_stream", broken)
    workload.start()
    with pytest.raises(RuntimeError, match="a bug"):
        workload.stop()
