"""The client of `helm test` against a service that keeps its promise while a rank dies, and against some that do not.

Against the product it runs in e2e/test_pods.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from tests.support.chart import CHART, KUBERNETES, render_many, template
from tests.support.pods_api import Cluster, pods_api
from tests.support.role_pods import pods

pytestmark = pytest.mark.integration

TOKEN = "admin-token"
SCRIPT = (CHART / "files" / "serves.py").read_text()


class Service(ThreadingHTTPServer):
    """API and admin API in one. After the kill, one answer is as `fault` says; the successor serves after that one."""

    daemon_threads = True

    def __init__(self, fault: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.exactness = fault, "stock" if fault == "altered but stock" else "invariant"
        self.killed, self.struck = threading.Event(), threading.Event()
        self.turn = threading.Lock()
        self.posted = list[str]()

    def answer(self, prompt: str, count: int) -> tuple[list[str], bool]:
        """The tokens, and whether the stream ends as it should."""
        tokens = [f"{prompt}{number}" for number in range(count)]
        with self.turn:
            if not self.killed.is_set() or self.struck.is_set():
                return tokens, True
            self.struck.set()
        if self.fault.startswith("altered"):
            return [*tokens[:-1], "other"], True
        return (tokens[:5], self.fault == "short") if self.fault in ("cut", "short") else (tokens, True)

    def status(self) -> dict[str, Any]:
        rank = {"rank": 0, "incarnation": 2 if self.struck.is_set() else 1, "state": "serving"}
        return {"state": "serving", "operation": None, "exactness": self.exactness, "ranks": [rank]}


class Handler(BaseHTTPRequestHandler):
    server: Service

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.reply({"data": [{"id": "m"}]})
        else:
            assert (self.path, self.headers["Authorization"]) == ("/admin/v1/status", f"Bearer {TOKEN}")
            self.reply(self.server.status())

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/completions":
            self.stream(*self.server.answer(asked["prompt"], asked["max_tokens"]))
            return
        self.server.posted.append(self.path)
        if self.server.fault == "not allowed":
            self.reply({"error": {"message": "ranks of node 'n' may not be killed on request"}}, 409)
            return
        self.server.killed.set()
        self.reply({"rank": 0, "incarnation": 1}, 202)

    def stream(self, tokens: list[str], ends: bool) -> None:
        choices = [{"text": token, "logprobs": {"tokens": [token]}} for token in tokens]
        lines = [f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices]
        self.send("".join([*lines, "data: [DONE]\n\n" if ends else ""]), 200)

    def reply(self, body: dict[str, Any], status: int = 200) -> None:
        self.send(json.dumps(body), status)

    def send(self, text: str, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


@contextmanager
def served(fault: str) -> Iterator[Service]:
    with Service(fault) as service:
        thread = threading.Thread(target=service.serve_forever, name="service")
        thread.start()
        try:
            yield service
        finally:
            service.shutdown()
            thread.join(timeout=10.0)


def asked(
    service: Service, *, kill: bool = True, script: str = SCRIPT, pod: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    url = f"http://127.0.0.1:{service.server_port}"
    command = [sys.executable, "-c", script, url, *([url] if kill else []), *pod]
    environment["ELASTIC_ADMIN_TOKEN"] = TOKEN
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_without_leave_to_kill_it_asks_for_one_answer() -> None:
    with served("") as service:
        outcome = asked(service, kill=False)
    assert (outcome.returncode, service.posted) == (0, []), outcome.stderr
    assert outcome.stdout.startswith("m answers: 'The0The1")


@pytest.mark.parametrize(
    ("fault", "lost", "altered", "kept"),
    [("", 0, 0, True), ("altered", 0, 1, False), ("altered but stock", 0, 1, True), ("cut", 1, 0, False),
     ("short", 1, 0, False)],
)  # fmt: skip
def test_it_sees_each_answer_that_a_death_has_spoilt(fault: str, lost: int, altered: int, kept: bool) -> None:
    with served(fault) as service:
        outcome = asked(service)
    assert service.posted == ["/admin/v1/ranks/0/kill"], outcome.stderr
    receipt = json.loads(outcome.stdout.splitlines()[1])
    assert (receipt["lost"], receipt["altered"], receipt["kept"]) == (lost, altered, kept), receipt
    assert (outcome.returncode == 0) is kept, outcome.stderr


def test_a_kill_that_no_operator_has_allowed_fails_the_test_with_the_reason() -> None:
    with served("not allowed") as service:
        outcome = asked(service)
    assert outcome.returncode == 1
    assert "may not be killed on request" in outcome.stderr


class Deletion:
    """One pod: gone at once when it is deleted, back at the third look, ready at the fifth. `failures`: after the
    first look, the answer to the deletion."""

    def __init__(self, service: Service, *failures: int) -> None:
        self._service, self.deleted, self.looks, self._failures = service, 0, 0, list(failures)

    def find(self) -> tuple[str, bool] | int | None:
        if not self.deleted:
            return "first", True
        if self.looks and self._failures:
            return self._failures.pop(0)
        self.looks += 1
        return None if self.looks < 3 else ("second", self.looks >= 5)

    def delete(self) -> None:
        self.deleted += 1
        assert self._service.posted, "after the kill"


def test_it_deletes_a_pod_and_waits_until_the_next_one_is_ready(tmp_path: Path) -> None:
    with served("") as service:
        deletion = Deletion(service)
        with pods_api(tmp_path / "account", Cluster("a-0", deletion.find, deletion.delete)) as (script, where):
            outcome = asked(service, script=script, pod=["a-0", "60"], **where)
            other = asked(service, script=script, pod=["a-1", "60"], **where)
    assert outcome.returncode == 0, outcome.stderr
    receipt = json.loads(outcome.stdout.splitlines()[1])
    assert (receipt["deleted"], receipt["kept"]) == ("a-0", True)
    assert (deletion.deleted, deletion.looks) == (1, 5)
    assert (other.returncode, other.stderr.strip()) == (1, "there is no pod a-1")


def test_a_moment_without_the_api_of_kubernetes_is_no_fault_of_ours(tmp_path: Path) -> None:
    """Minutes of looks meet one now and then. One that lasts is named, and one who may not look hears it at once."""
    found = list[tuple[int, str]]()
    with served("") as service:
        for number, failures in enumerate([(503, 0, 429, 500), (500,) * 999, (403,)]):
            cluster = Cluster("a-0", (deletion := Deletion(service, *failures)).find, deletion.delete)
            with pods_api(tmp_path / str(number), cluster) as (script, where):
                outcome = asked(service, script=script, pod=["a-0", "60" if number != 1 else "1"], **where)
            found.append((outcome.returncode, outcome.stderr.strip()))
    assert found[0] == (0, "")
    assert found[1][0] == found[2][0] == 1
    assert found[1][1].startswith("no other pod a-0 was ready within 1 s; GET /api/v1/namespaces/mine/pods/a-0: 500 ")
    assert found[2][1].startswith("GET /api/v1/namespaces/mine/pods/a-0: 403 ")


KILL = "tests.kill=true", "admin.existingSecret=admin", "service.adminHost=0.0.0.0"


def test_a_pod_is_deleted_only_where_the_values_allow_it_and_it_is_that_pod_alone() -> None:
    made = render_many(*KILL, "tests.deletePod=true", "tests.podReadySeconds=900", "api.keysSecret=keys")
    account, role, binding = (made[kind, "test"] for kind in ("ServiceAccount", "Role", "RoleBinding"))
    client = made["Pod", ""]
    for each in (account, role, binding, client):
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
        assert each["metadata"]["annotations"]["helm.sh/hook"] == "test"
    victim = f"{made['StatefulSet', 'agents']['metadata']['name']}-0"
    may = {"apiGroups": [""], "resources": ["pods"], "resourceNames": [victim], "verbs": ["get", "delete"]}
    assert role["rules"] == [may]
    names = {binding["roleRef"]["name"], binding["subjects"][0]["name"], client["spec"]["serviceAccountName"]}
    assert names == {account["metadata"]["name"]} == {role["metadata"]["name"]} == {"demo-test"}
    [container] = client["spec"]["containers"]
    assert container["args"][-2:] == [victim, "900"]
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert mounts == {"api-keys": "/etc/elastic-ep/api-keys", "kubernetes": "/etc/elastic-ep/kubernetes"}
    volumes = {each["name"]: each for each in client["spec"]["volumes"]}
    found = {kind for source in volumes["kubernetes"]["projected"]["sources"] for kind in source}
    assert found == {"serviceAccountToken", "configMap", "downwardAPI"}
    assert not client["spec"]["automountServiceAccountToken"], "but for this volume"
    assert {pod.get("serviceAccountName") for _, pod in pods(made)}.isdisjoint(names)
    without = render_many(*KILL)
    assert not [kind for kind, _ in without if kind.startswith("Role")]
    assert "serviceAccountName" not in without["Pod", ""]["spec"]


SCALED = "agents.replicas=null", "autoscaling.kind=hpa"


@pytest.mark.parametrize(
    "lacking",
    [("mode=many",), (*KILL, "mode=single"), (*KILL, "mode=many", "agents.replicas=1"),
     (*KILL, "mode=many", "agents.replicas=null"), (*KILL, "mode=many", *SCALED, "autoscaling.minReplicas=1")],
)  # fmt: skip
def test_a_pod_is_deleted_after_the_kill_and_where_there_are_others(lacking: tuple[str, ...]) -> None:
    assert "tests.deletePod: it comes after the kill" in template(*lacking, "tests.deletePod=true").stderr


def test_a_pod_of_an_autoscaler_that_keeps_two_may_be_deleted() -> None:
    made = render_many(*KILL, *SCALED, "autoscaling.minReplicas=2", "tests.deletePod=true")
    assert made["Pod", ""]["spec"]["serviceAccountName"] == "demo-test"
