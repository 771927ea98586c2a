"""One port, with a small application behind it: deadlines for what clients owe, half-closed clients, the limit."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pytest

from elastic.gateway import unread
from elastic.gateway.connection import Patience
from elastic.gateway.server import Server
from elastic.serve.listening import bind
from tests.support.helpers import eventually

pytestmark = pytest.mark.integration

GET = b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /%s HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi"


class App:
    """Answers once it is told to; counts the clients that leave before."""

    def __init__(self) -> None:
        self.asked, self.abandoned = 0, 0
        self._go = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def go(self) -> None:
        """Answer from now on."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._go.set)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self._loop = asyncio.get_running_loop()
        if scope["path"] in ("/unread", "/half-read"):
            if scope["path"] == "/half-read":
                await receive()
            await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"3")]})
            await send({"type": "http.response.body", "body": b"big"})
            return
        while (await receive()).get("more_body"):
            continue
        self.asked += 1
        if scope["path"] != "/now":
            gone, told = asyncio.ensure_future(receive()), asyncio.ensure_future(self._go.wait())
            done, rest = await asyncio.wait((gone, told), return_when="FIRST_COMPLETED")
            for task in rest:
                task.cancel()
            if gone in done:
                self.abandoned += 1
                return
        body = b"x" * 50_000_000 if scope["path"] == "/much" else b"answer to " + scope["path"].encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})


class Running:
    """A server in a thread."""

    def __init__(self, app: App, server: Server, bound: socket.socket) -> None:
        self.app, self.server, self.address = app, server, bound.getsockname()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address[:2], timeout=30)


@contextmanager
def serving(most: int = 100, **patience: float) -> Iterator[Running]:
    app, bound = App(), bind("127.0.0.1", 0, ("", ""))
    server = Server(app, bound, 1.0, most, urgent=frozenset({"/now"}), patience=Patience(**patience))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), name="server")
    thread.start()
    try:
        yield Running(app, server, bound)
    finally:
        app.go()
        server.should_exit = True
        thread.join(30.0)
        assert not thread.is_alive()


def all_of(client: socket.socket) -> bytes:
    """Everything until the server closes."""
    parts = []
    while part := client.recv(65536):
        parts.append(part)
    return b"".join(parts)


def until(client: socket.socket, end: bytes) -> bytes:
    """Everything up to these bytes."""
    got = b""
    while not got.endswith(end):
        part = client.recv(65536)
        assert part, got
        got += part
    return got


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED])
def test_accepting_goes_on_after_failures(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    accept, left = asyncio.SelectorEventLoop.sock_accept, [number] * 3

    async def failing(loop: Any, bound: socket.socket) -> Any:
        if left:
            raise OSError(left.pop(), "injected")
        return await accept(loop, bound)

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_accept", failing)
    with serving() as port, closing(port.connect()) as client:
        client.sendall(GET % b"now")
        until(client, b"answer to /now")
    assert left == []


def test_half_a_header_gets_its_time_and_no_more() -> None:
    with serving(header_s=0.2) as port, closing(port.connect()) as client, closing(port.connect()) as silent:
        client.sendall(GET[:20])
        head, _, body = all_of(client).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert json.loads(body)["error"]["message"] == "the header did not arrive within 0.2 s"
        assert all_of(silent) == b""


def test_a_second_header_that_comes_byte_by_byte() -> None:
    with serving(header_s=2.0) as port, closing(port.connect()) as client:
        client.sendall(GET % b"now")
        until(client, b"answer to /now")
        answer = b""
        client.settimeout(0.05)
        for byte in (GET * 1000)[:1000]:
            try:
                client.sendall(bytes([byte]) if byte not in b"\r\n" else b"x")
                answer += client.recv(65536)
            except TimeoutError:
                continue
            if answer:
                break
        assert answer.startswith(b"HTTP/1.1 408 ")


def test_what_is_not_http_is_told_so_in_the_one_shape_of_errors() -> None:
    with serving() as port, closing(port.connect()) as client:
        client.sendall(b"what is this\r\n\r\n")
        head, _, body = all_of(client).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("pieces", [1, 5])
def test_a_header_that_is_too_long_is_told_so(pieces: int) -> None:
    """However it comes: one that is complete at once, and one of which the end is not there yet."""
    header = b"GET /now HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-long: " + b"x" * 40_000 + b"\r\n\r\n"
    with serving() as port, closing(port.connect()) as client:
        if pieces == 1:
            client.sendall(header)
        else:
            client.sendall(header[:-4])
        head, _, body = all_of(client).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 431 ")
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        assert port.app.asked == 0


@pytest.mark.parametrize("line", ["GET /now?%s", "GET /%s", "%s /now"])
def test_a_first_line_that_is_too_long_is_told_so(line: str) -> None:
    with serving() as port, closing(port.connect()) as client:
        client.sendall(f"{line % ('x' * 40_000)} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        assert all_of(client).startswith(b"HTTP/1.1 431 ")
        assert port.app.asked == 0


@pytest.mark.parametrize("target", ["/now/", "http://proxied.example/now", "HTTPS://proxied.example:8443/now//"])
def test_a_target_in_another_form_is_for_the_same(target: str) -> None:
    with serving() as port, closing(port.connect()) as client:
        client.sendall(f"GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        assert all_of(client).endswith(b"\r\n\r\nanswer to /now")


@pytest.mark.parametrize("asked", [GET % b"b", POST % b"b", POST % b"a" + GET % b"b"])
def test_a_client_that_half_closes_gets_its_answers(asked: bytes) -> None:
    with serving() as port, closing(port.connect()) as client:
        client.sendall(asked)
        client.shutdown(socket.SHUT_WR)
        eventually(lambda: port.app.asked, 30.0, "the request to arrive")
        port.app.go()
        answers = all_of(client)
        assert answers.count(b"HTTP/1.1 200 ") == asked.count(b"Host")
        assert answers.endswith(b"answer to /b")
        assert port.app.abandoned == 0


@pytest.mark.parametrize(
    "asked",
    [
        "HTTP/1.1\r\nConnection: close",
        "HTTP/1.1\r\nConnection: close\r\nConnection: TE",
        "HTTP/1.0",
        "HTTP/1.0\r\nConnection: Keep-Alive",
    ],
)
def test_who_still_sends_when_the_answer_ends_the_connection_sees_it(asked: str) -> None:
    """It was a reset in the midst of the body, and no answer."""
    body = b"x" * 20_000_000
    head = f"POST /unread {asked}\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with serving() as running, running.connect() as client:
        client.sendall(head + body)
        assert b" 413 " in client.makefile("rb").readline()


def test_who_asks_whether_to_send_is_told_without_sending() -> None:
    head = b"POST /unread HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n"
    with serving() as running, running.connect() as client:
        client.sendall(head)
        assert b" 413 " in client.makefile("rb").readline()


def test_who_asked_and_was_told_to_send_sees_an_answer_that_comes_before_the_end() -> None:
    """As where a body without a length turns out to be too large."""
    body = b"x" * 20_000_000
    head = b"POST /half-read HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\n"
    with serving() as running, running.connect() as client, client.makefile("rb") as answers:
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body))
        assert b" 100 " in answers.readline()
        client.sendall(body)
        assert answers.readline() == b"\r\n"
        assert b" 413 " in answers.readline()


def test_no_body_is_awaited_beyond_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unread, "UNREAD_S", 0.1)
    head = b"POST /unread HTTP/1.0\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
    with serving() as running, running.connect() as client:
        client.sendall(head + b"four")
        assert client.makefile("rb").read().endswith(b"big")
    monkeypatch.setattr(unread, "UNREAD_S", 30.0)
    monkeypatch.setattr(unread, "MOST_BYTES", 3)
    with serving() as running, running.connect() as client:
        client.sendall(head + b"four")
        assert b" 413 " in client.makefile("rb").readline()


def test_an_old_client_that_half_closes_gets_its_answer() -> None:
    with serving() as port, closing(port.connect()) as client:
        client.sendall(b"GET /b HTTP/1.0\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        eventually(lambda: port.app.asked, 30.0, "the request to arrive")
        port.app.go()
        answer = all_of(client)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.endswith(b"answer to /b")


def test_a_client_that_closes_is_not_waited_for() -> None:
    with serving() as port:
        with closing(port.connect()) as client:
            client.sendall(POST % b"b")
            eventually(lambda: port.app.asked, 30.0, "the request to arrive")
        eventually(lambda: port.app.abandoned, 30.0, "the request to be given up")


def test_a_client_that_half_closes_and_then_closes() -> None:
    with serving() as port:
        with closing(port.connect()) as client:
            client.sendall(POST % b"b")
            client.shutdown(socket.SHUT_WR)
            assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        eventually(lambda: port.app.abandoned, 30.0, "the request to be given up")


def test_half_a_request_and_a_half_close_is_the_end() -> None:
    with serving() as port, closing(port.connect()) as client:
        client.sendall(POST[:-1] % b"b")
        client.shutdown(socket.SHUT_WR)
        assert all_of(client) == b""


def test_a_client_that_reads_nothing_of_its_answer_is_disconnected() -> None:
    with serving(send_s=0.5) as port, closing(port.connect()) as client:
        client.sendall(GET % b"much")
        eventually(lambda: port.app.asked, 30.0, "the request to arrive")
        port.app.go()
        eventually(lambda: not port.server.server_state.connections, 30.0, "the connection to end")


def test_a_full_port_drops_who_owes_longest() -> None:
    with serving(most=2) as port, ExitStack() as opened:
        first, second, third = (opened.enter_context(closing(port.connect())) for _ in range(3))
        assert all_of(first) == b""
        for client in (second, third):
            client.sendall(GET % b"now")
            until(client, b"answer to /now")


def test_a_full_port_answers_what_is_urgent_and_says_503_to_the_rest() -> None:
    with serving(most=1) as port, closing(port.connect()) as busy:
        busy.sendall(GET % b"b")
        eventually(lambda: port.app.asked, 30.0, "the request to arrive")
        for path, status in ((b"now", b"200 "), (b"later", b"503 ")):
            with closing(port.connect()) as client:
                client.sendall(GET % path)
                assert client.recv(100).split(b" ", 1)[1].startswith(status)
        port.app.go()
        until(busy, b"answer to /b")
