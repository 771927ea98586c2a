"""A release of the chart with `mode: many`: pods of each role and of etcd, each with a network of its own.

`Pods` does what Helm, the controllers of workloads, the kubelet's probes and the Service do: see pod.py.
"""

from __future__ import annotations

import copy
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.support.chart import render_many
from tests.support.helpers import eventually
from tests.support.hosts import Hosts, made_hosts
from tests.support.pod import Pod
from tests.support.pods_api import Cluster, pods_api
from tests.support.streams import client

WORKLOADS = {"agents": "StatefulSet", "etcd": "StatefulSet"}  # the others are Deployments
MEMBERS = ("etcd-0", "etcd-1", "etcd-2")
ROLES = ("agents", "controller", "engine", "gateway")
ELSEWHERE = "other"  # a node on which a pod is put whose own was lost
READY_S = 180.0
RESTARTS = 3  # of a place: under load a role gives up on an etcd that is late
POLL_S = 0.25  # between two questions of ours, each of which costs processor time here and in the pod
TOKEN = "token-of-the-admin-API"


class Pods:
    """The release `moe`. A pod is named as its StatefulSet or Deployment names it, and has a host of its own."""

    def __init__(self, hosts: Hosts, model: Path, folder: Path, *settings: str) -> None:
        """`folder`: of all volumes. `settings`: as `helm install --set` has them."""
        self._hosts, self._folder = hosts, folder
        self._names = {f"moe-{each}.moe-etcd": hosts.addresses[each] for each in MEMBERS}  # the headless Service's
        place = f"model.path=/models/{model.name}", f"model.volume.hostPath.path={model.parent}"
        self._settings = "etcd.endpoints=null", *place, *settings
        self.manifests = render_many(*self._settings, release="moe")
        self._secret: str = self.manifests["Secret", "join"]["stringData"]["join-secret"]
        self._before = self.manifests  # of the revision before
        self._made = 0
        self.running: dict[str, Pod] = {}
        self._lost: list[Pod] = []  # run on nodes that are lost, though their places have others
        self._places: dict[str, str] = {}  # of pods that are not where they were first
        self.restarts: Counter[str] = Counter()
        self._stopping: set[str] = set()
        self._gateway = "gateway-0"  # behind the Service
        self._client = client()

    def start(self, host: str, place: str = "") -> Pod:
        """A new pod, with new emptyDirs. `place`: ELSEWHERE, if not where it was."""
        self._places[host] = place = place or self._places.get(host, host)
        role = host.rpartition("-")[0]
        workload = self.manifests[WORKLOADS.get(role, "Deployment"), role]["spec"]
        template = copy.deepcopy(workload["template"])
        volumes = template["spec"].setdefault("volumes", [])
        for name in (each["metadata"]["name"] for each in workload.get("volumeClaimTemplates", ())):
            volumes.append({"name": name, "persistentVolumeClaim": {"claimName": f"{name}-moe-{host}"}})
        self._made += 1
        folder, address = self._folder / str(self._made), self._hosts.addresses[place]
        inside = self._hosts.command(place)
        pod = Pod(template, f"moe-{host}", folder, address=address, inside=inside, names=self._names)
        for name, key, value in (("join", "join-secret", self._secret), ("admin-token", "token", TOKEN)):
            if any(each["name"] == name for each in volumes):
                pod.put_secret(name, key, value)
        pod.start()
        self.running[host] = pod
        return pod

    def replace(self, host: str) -> None:
        """What `kubectl delete pod` does: a new one once the old one has ended; then its readiness is awaited."""
        self.stop(host)
        self.start(host)
        self.until_ready(host)

    def stop(self, host: str) -> None:
        """End it as the kubelet does, within its grace."""
        pod = self.running[host]
        self._stopping.add(host)
        pod.signal(signal.SIGTERM)
        assert pod.wait(pod.grace_s) == 0, pod.lines()[-5:]
        del self.running[host]  # one that did not end is still ours to end
        self._stopping.discard(host)

    def lose_node(self, host: str) -> Pod:
        """Its node cannot be reached any more; what runs there goes on. Kubernetes has its pod deleted by force."""
        self._hosts.cut(self._places[host])
        self._lost.append(lost := self.running.pop(host))
        return lost

    def return_node(self, host: str) -> None:
        """The node on which it was first is back, and its kubelet has not yet ended what runs there."""
        self._hosts.heal(host)

    def claim(self, host: str) -> Path:
        """The volume of its StatefulSet's claim."""
        return self._folder / "claims" / f"data-moe-{host}"

    def render(self, *settings: str) -> None:
        """New pods are from these values; those that run are not replaced."""
        self.manifests = render_many(*self._settings, *settings, release="moe")

    def upgrade(self, *settings: str) -> None:
        """What `helm upgrade` does with these values."""
        self._roll(render_many(*self._settings, *settings, release="moe"))

    def roll_back(self) -> None:
        """What `helm rollback` does: the revision before, as it was rendered then."""
        self._roll(self._before)

    def _roll(self, manifests: dict[tuple[str, str], dict[str, Any]]) -> None:
        """Each workload's own rolling update. Settings are compared by the init containers of gateways."""
        self._before, self.manifests = self.manifests, manifests
        for host in ("agents-1", "agents-0", *reversed(MEMBERS)):
            self.replace(host)
        self._surge("controller", "engine", "gateway")

    def _surge(self, *roles: str) -> None:
        """As Deployments, side by side: the new ones first. A Service sends nobody to a gateway that is told to end."""
        old = [host for host in self.running if host.rpartition("-")[0] in roles]
        new = [f"{role}-{1 - int(number)}" for role, _, number in (host.rpartition("-") for host in old)]
        for host in new:
            self.start(host)
        self.until_ready(*new)
        [self._gateway] = [host for host in new if host.startswith("gateway-")]
        for host in old:
            self.stop(host)

    def arguments(self, role: str) -> list[str]:
        """Those with which its pod runs."""
        [pod] = [pod for host, pod in self.running.items() if host.rpartition("-")[0] == role]
        return list(pod.container["args"])

    def until_ready(self, *hosts: str) -> None:
        for host in hosts:
            eventually(partial(self.ready, host), READY_S, f"{host} to be ready", POLL_S)

    def ready(self, host: str) -> bool:
        """What the rendered probe finds. A container that has ended is started again, unless its pod is deleted."""
        pod = self.running.get(host)
        if pod is None or host in self._stopping:
            return False
        if pod.ended():
            self.restarts[host] += 1
            assert self.restarts[host] <= RESTARTS, (host, pod.lines()[-5:])
            pod.start()
            return False
        probe = pod.container["readinessProbe"]["httpGet"]
        try:
            return self._client.get(self._address(host, probe["port"]) + probe["path"], timeout=2.0).is_success
        except httpx.HTTPError:
            return False

    def metrics(self, host: str) -> dict[tuple[str, str], float]:
        """What Prometheus scrapes there (ServiceMonitor and PodMonitor): by name and the labels' values."""
        port = "http" if host.startswith("gateway") else "probe"
        said = self._client.get(f"{self._address(host, port)}/metrics", timeout=30.0)
        families = text_string_to_metric_families(said.raise_for_status().text)
        return {(each.name, ",".join(each.labels.values())): each.value for all_ in families for each in all_.samples}

    def _address(self, host: str, port: str) -> str:
        ports = {each["name"]: each["containerPort"] for each in self.running[host].container["ports"]}
        return f"http://{self._hosts.addresses[self._places[host]]}:{ports[port]}"

    def url(self) -> str:
        """Where the Service leads to now."""
        return self._address(self._gateway, "http")

    def status(self) -> dict[str, Any]:
        """By `kubectl exec`."""
        said = self.running[self._gateway].exec("elastic", "status", "-o", "json")
        assert said.returncode == 0, said.stderr
        document: dict[str, Any] = json.loads(said.stdout)
        return document

    def history(self) -> list[str]:
        """Of all roles, as docs/KUBERNETES.md has it: lines of JSON, in the order of `sort`."""
        roles = [host for host in self.running if host.rpartition("-")[0] in ROLES]
        self.until_ready(*roles)  # one that has given up on an etcd that is late is started again
        said = {host: self.running[host].exec("elastic", "events", "-o", "json") for host in roles}
        assert not [each.stderr for each in said.values() if each.returncode != 0]
        return sorted(line for each in said.values() for line in each.stdout.splitlines())

    def serving(self) -> Counter[str]:
        """How many ranks serve in each pod."""
        return Counter(rank["node"] for rank in self.status()["ranks"] if rank["state"] == "serving")

    def helm_test(self) -> list[str]:
        """What its client says; the only gateway stands for both Services here. It may delete a pod of agents."""
        [client] = self.manifests["Pod", ""]["spec"]["containers"]
        _, service, admin, pod, within_s = client["args"]
        assert (service, admin) == ("http://moe:8000", "http://moe-admin:8001")
        [variable] = client["env"]
        assert variable["valueFrom"] == {"secretKeyRef": {"name": "admin", "key": "token"}}
        host = pod.removeprefix("moe-")
        with ThreadPoolExecutor(1, thread_name_prefix="statefulset") as deleting:
            begun: list[Future[None]] = []
            cluster = Cluster(
                pod, partial(self._found, host), lambda: begun.append(deleting.submit(self.replace, host))
            )
            with pods_api(self._folder / "account", cluster) as (script, environment):
                where = self.url(), self._address(self._gateway, "admin"), pod, within_s
                command = [sys.executable, *client["command"][1:], script, *where]
                environment |= {variable["name"]: TOKEN}
                asked = subprocess.run(command, capture_output=True, text=True, timeout=2 * READY_S, env=environment)
        assert asked.returncode == 0, asked.stderr + asked.stdout
        assert [each.result() for each in begun] == [None], "it was deleted once"
        return asked.stdout.splitlines()

    def _found(self, host: str) -> tuple[str, bool] | None:
        """The pod as the API has it."""
        pod = self.running.get(host)
        if pod is None:
            return None
        return pod.output.parent.name, self.ready(host)

    def close(self) -> None:
        """End all, also where one cannot be ended."""
        with ExitStack() as ends:
            ends.callback(self._client.close)
            for pod in (*self.running.values(), *self._lost):
                ends.callback(pod.close)


@contextmanager
def made_pods(model: Path, *settings: str) -> Iterator[Pods]:
    """None runs yet. Places are there for two pods of each role; all of it goes at the end."""
    names = [f"{role}-{n}" for role in ROLES for n in range(2)]
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="elastic-ep-pods-")))
        models = folder / "models"
        shutil.copytree(model, models / model.name)
        for each in (models, *models.rglob("*")):
            each.chmod(0o755 if each.is_dir() else 0o644)
        hosts = ends.enter_context(made_hosts(*names, *MEMBERS, ELSEWHERE))
        made = Pods(hosts, models / model.name, folder, *settings)
        ends.callback(made.close)
        yield made
