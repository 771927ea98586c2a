"""The probe of a role that serves nothing else over HTTP: `GET /readyz`, for a kubelet, and `/metrics`, for Prometheus.

There is no `/livez`: a loop that hangs ends its process by itself, save an agent's, with which its ranks would end.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

import structlog

from membership.base.errors import ConfigError
from membership.base.network import bare, is_ipv6

Report = Callable[[str], None]  # what is lacking
CLIENT_TIMEOUT_S = 5.0
MAX_CLIENTS = 32  # at once, each with a thread; beyond that the oldest gives way, so that a kubelet gets its answer
BEGINNING = "it has just been started"
JSON, METRICS = "application/json", "text/plain; version=0.0.4; charset=utf-8"  # Prometheus' text format

log = structlog.get_logger(__name__)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # without room a kubelet's connection would be tried again seconds later

    def __init__(self, address: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        if is_ipv6(address):
            self.address_family = socket.AF_INET6
        self._clients: dict[socket.socket, None] = {}  # the oldest first
        self._lock = threading.Lock()
        super().__init__((bare(address), port), handler)

    def server_bind(self) -> None:
        """Without HTTPServer's look-up of our own name, which a name server without an answer holds up."""
        TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own. Of too many clients the oldest is cut off."""
        with self._lock:
            self._clients[request] = None
            oldest = list(self._clients)[:-MAX_CLIENTS]
        for each in oldest:
            self._cut(each)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Its thread is done with it."""
        with self._lock:
            self._clients.pop(request, None)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """No client is left."""
        super().server_close()
        with self._lock:
            clients = list(self._clients)
        for each in clients:
            self._cut(each)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """As a log line, not on stderr: mostly a client that did not wait for its answer."""
        log.debug("probe_failed", client=str(client_address), exc_info=True)

    def _cut(self, client: socket.socket) -> None:
        with self._lock:
            self._clients.pop(client, None)
        with suppress(OSError):  # its thread has closed it, or the client has
            client.shutdown(socket.SHUT_RDWR)  # its thread reads the end, and ends


class Probe:
    """Listens from its making until `close`. Ready once its role has `report`ed that nothing is lacking."""

    def __init__(self, address: str, port: int, metrics: Callable[[], bytes]) -> None:
        """`metrics`: what to say at `/metrics`; any thread may call it. ConfigError: it cannot listen there."""
        self._lacking, self._metrics = BEGINNING, metrics
        probe = self

        class Handler(BaseHTTPRequestHandler):
            timeout = CLIENT_TIMEOUT_S

            def do_GET(self) -> None:
                status, kind, body = probe.answer(self.path)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                log.debug("probed", request=format % args)

        try:
            self._server = _Server(address, port, Handler)
        except OSError as error:
            raise ConfigError(
                f"--probe-port: cannot listen at {address}:{port}: {error.strerror or error}",
                hint="choose a free port from 1024 on; it listens at the address of --advertise",
            ) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="probe", daemon=True)
        self._thread.start()

    def report(self, lacking: str) -> None:
        """What is missing until the role does its part; nothing: it does."""
        self._lacking = lacking

    def answer(self, path: str) -> tuple[HTTPStatus, str, bytes]:
        """Status, type and body."""
        if path == "/metrics":
            return self._counted()
        if path != "/readyz":
            return HTTPStatus.NOT_FOUND, JSON, b"{}"
        if lacking := self._lacking:
            text = json.dumps({"status": "not ready", "reasons": [lacking]})
            return HTTPStatus.SERVICE_UNAVAILABLE, JSON, text.encode()
        return HTTPStatus.OK, JSON, b'{"status": "ready"}'

    def _counted(self) -> tuple[HTTPStatus, str, bytes]:
        try:
            return HTTPStatus.OK, METRICS, self._metrics()
        except Exception as error:
            log.exception("metrics_failed")
            text = json.dumps({"error": f"{type(error).__name__}: {error}"})
            return HTTPStatus.INTERNAL_SERVER_ERROR, JSON, text.encode()

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=CLIENT_TIMEOUT_S)


@contextmanager
def probe(advertise: str, port: int | None, metrics: Callable[[], bytes]) -> Iterator[Report]:
    """How a role reports, while it answers at this port. Without a port there is none to report to."""
    if port is None:
        yield lambda lacking: None
        return
    answering = Probe(advertise or "127.0.0.1", port, metrics)
    try:
        yield answering.report
    finally:
        answering.close()
