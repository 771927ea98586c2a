"""As much of the Kubernetes API as `helm install --no-hooks` asks for: which kinds there are, and what of them.

Nothing is kept and nothing is started: what helm makes is sent back to it. It shows what a chart makes of what it
finds there (`lookup`), which `helm template` cannot.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

KINDS = {
    "v1": ("Secret", "Service", "ServiceAccount"),
    "apps/v1": ("Deployment", "StatefulSet"),
    "batch/v1": ("Job",),
    "policy/v1": ("PodDisruptionBudget",),
}


@contextmanager
def kubernetes_api(folder: Path, there: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """Serve an API with these objects of release "demo", such as `statefulsets/demo-agents`, each with its spec.

    A spec may have a `status`, which becomes the object's.

    Yields the environment in which helm finds it. `folder`: for helm's files.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"there": there}))
    thread = threading.Thread(target=server.serve_forever, name="kubernetes-api")
    thread.start()
    try:
        kubeconfig, releases = folder / "kubeconfig", folder / "releases.yaml"
        kubeconfig.write_text(json.dumps(_config(f"http://127.0.0.1:{server.server_port}")))
        releases.write_text("[]")
        of_helm = {"HELM_DRIVER": "memory", "HELM_MEMORY_DRIVER_DATA": str(releases)}
        yield {"PATH": os.environ["PATH"], "HOME": str(folder), "KUBECONFIG": str(kubeconfig), **of_helm}
    finally:
        server.shutdown()
        server.server_close()
        thread.join(30.0)


def _config(url: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1", "kind": "Config", "current-context": "it", "users": [{"name": "us", "user": {}}],
        "clusters": [{"name": "it", "cluster": {"server": url}}],
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "us"}}],
    }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    there: Mapping[str, Mapping[str, Any]]

    def do_GET(self) -> None:
        """A description of the API, or an object."""
        path = urlsplit(self.path).path
        found = _description(path)
        *_, plural, name = f"/{path}".split("/")
        if found is None and f"{plural}/{name}" in self.there:
            found = _object(plural, name, self.there[f"{plural}/{name}"])
        missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
        self._answer(found or missing, 200 if found else 404)

    def do_POST(self) -> None:
        """What was made, as it was sent."""
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))), 201)

    def do_PATCH(self) -> None:
        """What is changed stays as it was."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def _answer(self, found: dict[str, Any], code: int) -> None:
        text = json.dumps(found).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a test says what it found."""


def _object(plural: str, name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """With the marks by which helm takes it for the release's own."""
    version, kind = next((v, k) for v, kinds in KINDS.items() for k in kinds if f"{k.lower()}s" == plural)
    annotations = {"meta.helm.sh/release-name": "demo", "meta.helm.sh/release-namespace": "default"}
    labels = {"app.kubernetes.io/managed-by": "Helm"}
    metadata = {"name": name, "namespace": "default", "labels": labels, "annotations": annotations}
    status = spec.get("status", {})
    rest = {key: value for key, value in spec.items() if key != "status"}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": rest, "status": status}


def _description(path: str) -> dict[str, Any] | None:
    """What there is in the API; None: the path is an object's."""
    if path == "/version":
        return {"major": "1", "minor": "30", "gitVersion": "v1.30.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        versions = [{"groupVersion": group, "version": "v1"} for group in KINDS if "/" in group]
        groups = [
            {"name": each["groupVersion"].split("/")[0], "versions": [each], "preferredVersion": each}
            for each in versions
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    group = path.removeprefix("/apis/").removeprefix("/api/")
    if group not in KINDS:
        return None
    resources = [
        {"name": f"{kind.lower()}s", "namespaced": True, "kind": kind, "verbs": ["get", "create", "patch"]}
        for kind in KINDS[group]
    ]
    return {"kind": "APIResourceList", "groupVersion": group, "resources": resources}
