"""As much of the Kubernetes API as the client of `helm test` asks for: one pod, and its deletion. Over TLS, with the
files that a pod's account has.
"""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.support.chart import CHART
from tests.support.secured_etcd import Authority

ACCOUNT = "/etc/elastic-ep/kubernetes"  # where the chart mounts its files
TOKEN = "token-of-an-account"
PAUSE = "POD_POLL_S = 1"


@dataclass(frozen=True)
class Cluster:
    """What it does. `find`: uid and readiness of the pod, None if there is none now, or the status with
    which the API itself fails; 0: it closes the connection. `delete`: begin its deletion."""

    pod: str
    find: Callable[[], tuple[str, bool] | int | None]
    delete: Callable[[], None]


class _Handler(BaseHTTPRequestHandler):
    cluster: Cluster

    def do_GET(self) -> None:
        """The pod."""
        found = self.cluster.find() if self._allowed() else None
        if found == 0:
            self.close_connection = True
        elif isinstance(found, int):
            self._answer({"kind": "Status", "message": "etcdserver: leader changed"}, found)
        elif found is None:
            self._answer({"kind": "Status", "reason": "NotFound"}, 404)
        else:
            uid, ready = found
            conditions = [{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": str(ready)}]
            self._answer({"metadata": {"uid": uid}, "status": {"conditions": conditions}}, 200)

    def do_DELETE(self) -> None:
        """As it does: the answer is the pod, which is still there."""
        if self._allowed():
            self.cluster.delete()
        self.do_GET()

    def _allowed(self) -> bool:
        assert self.headers["Authorization"] == f"Bearer {TOKEN}"
        return self.path == f"/api/v1/namespaces/mine/pods/{self.cluster.pod}"

    def _answer(self, body: dict[str, object], code: int) -> None:
        text = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a test says what it found."""


@contextmanager
def pods_api(folder: Path, cluster: Cluster) -> Iterator[tuple[str, dict[str, str]]]:
    """Serve it. Yields the script of `helm test`, with the account's files in `folder`, and its environment."""
    folder.mkdir()
    authority = Authority(folder / "ca")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("kubernetes"))
    for name, text in (("token", TOKEN), ("namespace", "mine"), ("ca.crt", Path(authority.pem).read_text())):
        (folder / name).write_text(text)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"cluster": cluster}))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, name="pods-api")
    thread.start()
    try:
        where = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(server.server_port)}
        yield (
            (CHART / "files" / "serves.py")
            .read_text()
            .replace(ACCOUNT, str(folder))
            .replace(PAUSE, "POD_POLL_S = 0.05"),
            where,
        )
    finally:
        server.shutdown()
        server.server_close()
        thread.join(30.0)
