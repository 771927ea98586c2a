"""The chart's container in the shape of a pod: it starts, is restarted, replaced and looked into, and loses nothing.

What Kubernetes itself does is not tried here (docs/KUBERNETES.md).
"""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from elastic.serve.etcd_server import EtcdServer, free_ports
from tests.support.chart import render
from tests.support.helpers import eventually
from tests.support.pod import NEEDS_NAMESPACES, Pod
from tests.support.streams import Streams, client

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400), NEEDS_NAMESPACES]

MakePod = Callable[..., Pod]
READY_S = 120.0
STREAMS = 4
SCALES = 21  # an odd number: the last one is kept
PROBE_EVERY_S = 0.1  # the rendered probe asks every 2 s, and fails at the second time


@pytest.fixture
def make_pod(demo_model: Path) -> Iterator[MakePod]:
    """`make_pod(*settings, ordinal=0)`: a new pod of that StatefulSet, with new emptyDirs. It has the demo's model."""
    made: list[Pod] = []
    with tempfile.TemporaryDirectory(prefix="elastic-ep-pods-") as folder:
        models = Path(folder) / "models"
        shutil.copytree(demo_model, models / demo_model.name)
        for each in (models, *models.rglob("*")):
            each.chmod(0o755 if each.is_dir() else 0o644)

        def make(*settings: str, ordinal: int = 0) -> Pod:
            model = ("model.path=/models/demo-moe", f"model.volume.hostPath.path={models}")
            manifests = render(*model, *settings, release="moe")
            template = manifests["StatefulSet"]["spec"]["template"]
            made.append(Pod(template, f"moe-{ordinal}", Path(folder) / str(len(made))))
            return made[-1]

        yield make
        for pod in made:
            pod.close()


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=2.0, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def stream(url: str, begun: threading.Semaphore) -> list[str]:
    """The lines of an answer that takes a while; `begun` is released at the first."""
    body = {"model": "demo-moe", "prompt": "The", "max_tokens": 400, "stream": True, "ignore_eos": True}
    seen = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120.0, trust_env=False) as answer:
        for line in filter(None, answer.iter_lines()):
            if not seen:
                begun.release()
            seen.append(line)
    return seen


def events(pod: Pod) -> list[dict[str, Any]]:
    return [json.loads(line) for line in pod.lines() if line.startswith("{")]


def serving(pod: Pod, url: str) -> int:
    """The number of ranks that serve, once it is ready."""
    eventually(lambda: ready(url), READY_S, "the pod to be ready")
    status = pod.exec("elastic", "status", "-o", "json")
    assert status.returncode == 0, status.stderr
    return sum(rank["state"] == "serving" for rank in json.loads(status.stdout)["ranks"])


def test_a_pod_that_is_killed_or_replaced_keeps_its_size_and_its_streams(make_pod: MakePod, tmp_path: Path) -> None:
    port, admin = free_ports(2)
    url = f"http://127.0.0.1:{port}"
    with EtcdServer(tmp_path / "etcd") as etcd:
        settings = (
            "ranks=2", f"service.containerPort={port}", f"service.adminPort={admin}", f"etcd.endpoints={{{etcd.url}}}",
            "terminationGracePeriodSeconds=100",
        )  # fmt: skip
        pod = make_pod(*settings)
        pod.start()
        assert serving(pod, url) == 2
        for command in (("pause", "--reason", "look"), ("resume",), ("scale", "3")):
            done = pod.exec("elastic", *command)
            assert done.returncode == 0, done.stderr

        pod.signal(signal.SIGKILL)  # as the OOM killer does; the kubelet starts the container again
        pod.wait(60.0)
        pod.start()
        assert serving(pod, url) == 3, "what was scaled stands, though --ranks=2 is given again"
        said = [line for line in pod.lines() if not line.startswith("{")]
        assert any("the last server here was killed" in line for line in said)
        assert not any("until its leases run out" in line for line in said), "they are taken over"
        assert {"controller", "engine", "gateway", "worker"} <= {e["role"] for e in events(pod)}

        with ThreadPoolExecutor(STREAMS, thread_name_prefix="client") as pool:
            begun = threading.Semaphore(0)
            streams = [pool.submit(stream, url, begun) for _ in range(STREAMS)]
            for _ in streams:
                assert begun.acquire(timeout=60.0), "a stream with a token"
            pod.signal(signal.SIGTERM)
            ends = [each.result(timeout=120.0)[-1] for each in streams]
        assert pod.wait(60.0) == 0
        assert ends == ["data: [DONE]"] * STREAMS
        [draining] = [e for e in events(pod) if e["event"] == "gateway_draining"]
        assert draining["open_requests"] == STREAMS
        assert draining["grace_s"] == 85.0, "100 s without preStop and the end of ranks"

        replaced = make_pod(*settings)
        replaced.start()
        assert serving(replaced, url) == 3, "of a new emptyDir"


@contextmanager
def probed(url: str) -> Iterator[list[str]]:
    """Ask as the kubelet does, more often, until the end of the block; what was answered each time."""
    answers, over = list[str](), threading.Event()

    def probe() -> None:
        with client() as asking:
            while not over.wait(PROBE_EVERY_S):
                try:
                    answer = asking.get(f"{url}/readyz", timeout=10.0)  # a busy machine is slow, and no less ready
                except httpx.HTTPError as error:
                    answers.append(repr(error))
                else:
                    answers.append("ready" if answer.is_success else answer.text)

    thread = threading.Thread(target=probe, name="kubelet")
    thread.start()
    try:
        yield answers
    finally:
        over.set()
        thread.join(30.0)


class Admin:
    """The admin API of a pod, which shares our network."""

    def __init__(self, url: str, asking: httpx.Client) -> None:
        self._url, self._asking = url, asking

    def status(self, token: str) -> int:
        """The code of an answer to this token."""
        return self._asking.get(f"{self._url}/admin/v1/status", headers=_bearer(token)).status_code

    def scale(self, token: str, ranks: int) -> None:
        """Until the operation is done."""
        asked = self._asking.post(f"{self._url}/admin/v1/scale", json={"ranks": ranks}, headers=_bearer(token))
        where = asked.raise_for_status().headers["Location"]

        def operation() -> dict[str, Any]:
            found: dict[str, Any] = (
                self._asking.get(self._url + where, headers=_bearer(token)).raise_for_status().json()
            )
            return found

        eventually(lambda: operation()["phase"] in ("done", "aborted"), READY_S, f"{ranks} ranks")
        assert operation()["phase"] == "done", operation()


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_a_pod_is_ready_through_twenty_scales_and_takes_changed_secrets_as_it_runs(make_pod: MakePod) -> None:
    port, admin_port = free_ports(2)
    url = f"http://127.0.0.1:{port}"
    settings = (
        "ranks=2", f"service.containerPort={port}", f"service.adminPort={admin_port}", "api.keysSecret=keys",
        "admin.existingSecret=token", "state.persistence.enabled=true",
    )  # fmt: skip
    pod = make_pod(*settings)
    pod.put_secret("api-keys", "keys", "alice:first-key-of-alice\n")
    pod.put_secret("admin-token", "token", "the-first-admin-token")
    pod.start()
    eventually(lambda: ready(url), READY_S, "the pod to be ready")
    process = pod.pid
    with client() as asking, Streams(url, clients=1, key="first-key-of-alice") as streams:
        admin = Admin(f"http://127.0.0.1:{admin_port}", asking)
        with probed(url) as answers:
            for number in range(SCALES):
                admin.scale("the-first-admin-token", 3 - number % 2)
            streams.go_on()
        assert len(answers) > SCALES
        assert {*answers} == {"ready"}

        def models(key: str) -> int:
            return asking.get(f"{url}/v1/models", headers=_bearer(key)).status_code

        pod.put_secret("api-keys", "keys", "alice:first-key-of-alice\nbob:key-of-bob-who-is-new\n")
        eventually(lambda: models("key-of-bob-who-is-new") == 200, 30.0, "the new key")
        streams.go_on()
        pod.put_secret("admin-token", "token", "the-second-admin-token")
        eventually(lambda: admin.status("the-second-admin-token") == 200, 30.0, "the new token")
        assert admin.status("the-first-admin-token") == 401
    assert streams.failed == []
    pod.put_secret("api-keys", "keys", "bob:key-of-bob-who-is-new\n")
    with client() as asking:
        old = partial(asking.get, f"{url}/v1/models", headers=_bearer("first-key-of-alice"))
        eventually(lambda: old().status_code == 401, 30.0, "the old key to be refused")
    assert pod.pid == process, "nothing was started anew"
    pod.signal(signal.SIGTERM)
    assert pod.wait(pod.grace_s) == 0
    replaced = make_pod(*settings)
    replaced.put_secret("api-keys", "keys", "bob:key-of-bob-who-is-new\n")
    replaced.put_secret("admin-token", "token", "the-second-admin-token")
    replaced.start()
    assert serving(replaced, url) == 3, "etcd is on the volume of state.persistence"


@pytest.mark.parametrize(
    ("setting", "ordinal", "says"),
    [("model.path=/models/missing", 0, "/models/missing"), ("ranks=2", 1, "this is moe-1, and only moe-0 serves")],
)
def test_a_start_that_fails_ends_with_the_reason(make_pod: MakePod, setting: str, ordinal: int, says: str) -> None:
    """The last lines are the pod's termination message."""
    pod = make_pod(setting, ordinal=ordinal)
    pod.start()
    assert pod.wait(READY_S) == 1
    assert pod.lines()[-1].startswith("error: ")
    assert says in pod.lines()[-1]
