"""NetworkPolicies: each listener of each role is reached by the roles that dial it, and by nobody else.

What listens and what dials is read off the code: a socket that no table here knows fails, and so does one without a
rule in the chart. No network enforces the policies here: `Rules` reads them as Kubernetes documents them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import kubernetes_validate
import pytest

from tests.support import ROOT
from tests.support.chart import KUBERNETES, render_many
from tests.support.chart import manifests as rendered

pytestmark = pytest.mark.integration

ON = "networkPolicy.enabled=true"
ADMIN = ("service.adminHost=0.0.0.0", "admin.existingSecret=token")
ANY_PORT = 45678  # one that the kernel might choose


class Pod(NamedTuple):
    labels: Mapping[str, str]
    here: bool = True  # in the release's namespace


class Listener(NamedTuple):
    role: str
    name: str
    dialled_by: frozenset[str]


HTTP = Listener("gateway", "http", frozenset({"stranger", "neighbour"}))
ADMIN_API = Listener("gateway", "admin", frozenset({"neighbour"}))
STEPS = Listener("engine", "steps", frozenset({"agents"}))
PROMPTS = Listener("engine", "prompts", frozenset({"gateway"}))
ANSWERS = Listener("agents", "answers", frozenset({"engine"}))
DEATHS = Listener("agents", "deaths", frozenset({"engine"}))
ROWS = Listener("agents", "rows", frozenset({"agents"}))
WEIGHTS = Listener("agents", "weights", frozenset({"agents", "gateway"}))
PROBES = tuple(Listener(role, "probe", frozenset()) for role in ("engine", "agents", "controller"))
LISTENERS = (HTTP, ADMIN_API, STEPS, PROMPTS, ANSWERS, DEATHS, ROWS, WEIGHTS, *PROBES)

BINDING = {"bind", "listen_for_hosts", "create_server", "start_server", "_Server"}
BOUND: dict[str, tuple[Listener, ...]] = {  # where the product listens; (): on this machine only, or only to try
    "elastic/serve/listening.py": (HTTP, ADMIN_API),
    "elastic/serve/probe.py": PROBES,
    "elastic/engine/gateway_server.py": (PROMPTS,),
    "workers/queue/remote_writer.py": (STEPS, ANSWERS, DEATHS),
    "workers/exchange/tcp/transport.py": (ROWS,),
    "workers/queue/data_port.py": (STEPS, ANSWERS, DEATHS, ROWS),
    "workers/bulk/server.py": (WEIGHTS,),
    "elastic/serve/etcd_server.py": (),
    "elastic/serve/join_secret.py": (),
    "membership/base/run_dir.py": (),
    "workers/ipc/handover.py": (),
    "workers/queue/curve.py": (),
    "workers/queue/endpoints.py": (),  # by which those above listen
}
DIALLING = {"connect", "connect_ex", "create_connection", "accepts"}
DIALLED: dict[str, dict[Listener, set[str]]] = {  # where the product dials, and in which roles that runs
    "elastic/gateway/engine_socket.py": {PROMPTS: {"gateway"}},
    "elastic/engine/unrecorded.py": {ANSWERS: {"engine"}},
    "workers/queue/remote_reader.py": {STEPS: {"agents"}, ANSWERS: {"engine"}, DEATHS: {"engine"}},
    "workers/exchange/tcp/transport.py": {ROWS: {"agents"}},
    "workers/queue/data_port.py": {STEPS: {"agents"}, ANSWERS: {"engine"}, DEATHS: {"engine"}, ROWS: {"agents"}},
    "workers/bulk/client.py": {WEIGHTS: {"agents", "gateway"}},
}
NOT_BETWEEN_PODS = {  # etcd's, this machine's, or what only looks like a connection
    "elastic/cli/connection.py", "elastic/cli/hosts.py", "elastic/cli/reach.py",
    "elastic/serve/init_config.py", "elastic/serve/role_main.py", "elastic/serve/state_dir.py",
    "elastic/serve/supervisor.py",
    "membership/base/run_dir.py", "membership/base/sockets.py", "membership/store/endpoints.py",
    "membership/store/etcd_session.py", "workers/exchange/loop.py", "workers/exchange/shm/transport.py",
    "workers/ipc/handover.py", "workers/ipc/shared_page.py", "workers/protocol/pool_client.py",
    "workers/protocol/weight_client.py", "workers/protocol/window_client.py",
    "workers/queue/endpoints.py", "workers/queue/reader.py", "workers/rank/preparation.py",
}  # fmt: skip


def calling(names: Iterable[str]) -> set[str]:
    """The product's files that call something of these names."""
    wanted, found = set(names), set()
    for package in ("membership", "workers", "elastic"):
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if any(name in text for name in wanted) and any(_called(text) & wanted):
                found.add(str(path.relative_to(ROOT)))
    return found


def _called(text: str) -> set[str]:
    functions = (node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    return {each.attr if isinstance(each, ast.Attribute) else getattr(each, "id", "") for each in functions}


class Rules:
    """The policies of one rendering."""

    def __init__(self, manifests: Iterable[dict[str, Any]]) -> None:
        self._policies = [each["spec"] for each in manifests if each["kind"] == "NetworkPolicy"]

    def let_through(self, source: Pod, target: Pod, port: int, protocol: str = "TCP") -> bool:
        """Whether it reaches the other's port: it may leave the one, and it may enter the other."""
        return self._may(source, "egress", "to", target, (protocol, port)) and self._may(
            target, "ingress", "from", source, (protocol, port)
        )

    def _may(self, pod: Pod, way: str, key: str, other: Pod, port: tuple[str, int]) -> bool:
        ruling = [each for each in self._policies if pod.here and selects(each["podSelector"], pod)]
        allowed = [rule for each in ruling for rule in each.get(way) or ()]
        return not ruling or any(
            any((each["protocol"], each.get("port", port[1])) == port for each in rule["ports"])
            and (key not in rule or any(other.here and selects(each["podSelector"], other) for each in rule[key]))
            for rule in allowed
        )


def selects(selector: Mapping[str, Any], pod: Pod) -> bool:
    return bool(selector.get("matchLabels", {}).items() <= pod.labels.items())


def containers(manifests: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Pod, dict[str, Any]]]:
    """Role, pod and container of each workload, and of the client of `helm test`."""
    for each in manifests:
        if each["kind"] in ("Deployment", "StatefulSet", "Job", "Pod"):
            pod = each["spec"]["template"] if each["kind"] != "Pod" else each
            [container] = pod["spec"]["containers"]
            yield container["name"], Pod(pod["metadata"]["labels"]), container


def pods(manifests: Iterable[dict[str, Any]]) -> dict[str, Pod]:
    """Of each role, beside them a pod of the same namespace, and one of another."""
    ours = {role: pod for role, pod, _ in containers(manifests) if role != "client"}
    return ours | {"neighbour": Pod({"app": "other"}), "stranger": Pod({}, here=False)}


def ports(manifests: Iterable[dict[str, Any]]) -> dict[tuple[str, str], int]:
    """The containers' ports, by role and name."""
    found = containers(manifests)
    return {(role, port["name"]): port["containerPort"] for role, _, box in found for port in box.get("ports") or ()}


@pytest.fixture(scope="module")
def many() -> list[dict[str, Any]]:
    return list(render_many(ON, *ADMIN).values())


def test_every_socket_of_the_product_is_known() -> None:
    """A listener that is added belongs into BOUND, into the chart's table (_ports.tpl) and into docs/HOSTS.md."""
    assert calling(BINDING) == set(BOUND)
    assert set(DIALLED) <= calling(DIALLING) <= set(DIALLED) | NOT_BETWEEN_PODS
    assert {each for bound in BOUND.values() for each in bound} == set(LISTENERS)
    for listener in (STEPS, PROMPTS, ANSWERS, DEATHS, ROWS, WEIGHTS):
        dialled = set().union(*(each.get(listener, set()) for each in DIALLED.values()))
        assert dialled == listener.dialled_by, listener


def test_each_listener_is_reached_by_the_roles_that_dial_it_and_by_no_other(many: list[dict[str, Any]]) -> None:
    """Of ports that the kernel chooses a policy cannot say which is which: those that dial one of them reach all."""
    rules, around, fixed = Rules(many), pods(many), ports(many)
    named = {(each.role, each.name) for each in LISTENERS if each.name in ("http", "admin", "probe")}
    assert set(fixed) == named, "a container's port is a listener's"
    for listener in LISTENERS:
        chosen = {each for each in LISTENERS if each.role == listener.role and (each.role, each.name) not in fixed}
        port = fixed.get((listener.role, listener.name), ANY_PORT)
        reached = {name for name, pod in around.items() if rules.let_through(pod, around[listener.role], port)}
        assert reached == listener.dialled_by.union(*(each.dialled_by for each in chosen)), listener


def test_a_port_without_a_listener_is_shut(many: list[dict[str, Any]]) -> None:
    rules, around = Rules(many), pods(many)
    for role, pod in around.items():
        if pod.here and role != "neighbour":
            dials = {each.role for each in LISTENERS if role in each.dialled_by}
            reached = {name for name, other in around.items() if rules.let_through(pod, other, ANY_PORT)}
            assert reached == dials, role
    for role in ("gateway", "controller", "init"):
        assert not [name for name, pod in around.items() if rules.let_through(pod, around[role], ANY_PORT)], role


def test_each_role_reaches_etcd_and_name_servers_and_no_other_stranger(many: list[dict[str, Any]]) -> None:
    rules, around = Rules(many), pods(many)
    etcd = render_many(ON, "etcd.endpoints={https://a:12379,https://b:2381}")
    for role in ("agents", "engine", "controller", "gateway", "init"):
        open_to = {
            (protocol, port)
            for protocol in ("TCP", "UDP")
            for port in (53, 80, 443, 2379, 8000, ANY_PORT)
            if rules.let_through(around[role], around["stranger"], port, protocol)
        }
        assert open_to == {("TCP", 53), ("UDP", 53), ("TCP", 2379)}, role
        for port in (12379, 2381):
            assert Rules(etcd.values()).let_through(around[role], around["stranger"], port), role


def test_an_etcd_of_the_chart_is_reached_by_the_roles_and_its_members_by_one_another() -> None:
    own = (ON, *ADMIN, "etcd.endpoints=null")
    manifests = list(render_many(*own, "networkPolicy.scrapers[0].podSelector.matchLabels.app=scrapers").values())
    rules, fixed = Rules(manifests), ports(manifests)
    around = pods(manifests) | {"scrapers": Pod({"app": "scrapers"}), "init": pods(render_many(ON).values())["init"]}
    roles = {"agents", "controller", "engine", "gateway", "init"}
    for name, wanted in (("client", roles), ("peer", {"etcd"}), ("health", {"scrapers"})):
        reached = {who for who, pod in around.items() if rules.let_through(pod, around["etcd"], fixed["etcd", name])}
        assert reached == wanted, name
    for role in (*roles, "etcd"):
        assert rules.let_through(around[role], around["stranger"], 53, "UDP"), "members have names"
        assert not rules.let_through(around[role], around["stranger"], 2379), role
    assert not {who for who, pod in around.items() if rules.let_through(pod, around["etcd"], ANY_PORT)}


def test_one_pod_is_reached_at_its_api_only_and_dials_only_an_etcd_of_yours() -> None:
    alone, with_etcd = rendered(ON), rendered(ON, "etcd.endpoints={http://etcd:2379}")
    around = pods(alone)
    assert ports(alone) == {("serve", "http"): 8000}
    for port, reached in ((8000, True), (8001, False), (ANY_PORT, False)):
        assert Rules(alone).let_through(around["stranger"], around["serve"], port) is reached
    for port in (53, 2379, ANY_PORT):
        assert not Rules(alone).let_through(around["serve"], around["stranger"], port)
    assert Rules(with_etcd).let_through(around["serve"], around["stranger"], 2379)


def test_clients_and_admins_are_those_that_are_named(many: list[dict[str, Any]]) -> None:
    """And always the client of `helm test`, which would else fail."""
    peers = ("clients", "admins")
    named = [f"networkPolicy.{each}[0].podSelector.matchLabels.app={each}" for each in peers]
    manifests = list(render_many(ON, *ADMIN, *named).values())
    [test] = [pod for name, pod, _ in containers(manifests) if name == "client"]
    rules, gateway, fixed = Rules(manifests), pods(manifests)["gateway"], ports(manifests)
    around = pods(manifests) | {each: Pod({"app": each}) for each in peers} | {"test": test}
    for name, wanted in (("http", {"clients", "test"}), ("admin", {"admins"})):
        reached = {who for who, pod in around.items() if rules.let_through(pod, gateway, fixed["gateway", name])}
        assert reached == wanted, name


def test_the_client_of_helm_test_reaches_the_admin_api_where_it_may_kill() -> None:
    for settings in (ADMIN, (*ADMIN, "networkPolicy.admins=null")):
        manifests = list(render_many(ON, *settings, "tests.kill=true").values())
        [test] = [pod for name, pod, _ in containers(manifests) if name == "client"]
        assert Rules(manifests).let_through(test, pods(manifests)["gateway"], ports(manifests)["gateway", "admin"])


def test_probes_are_scraped_by_scrapers_and_by_no_client() -> None:
    """The engine answers there in the process that has the token loop."""
    named = [f"networkPolicy.{each}[0].podSelector.matchLabels.app={each}" for each in ("clients", "scrapers")]
    for settings, wanted in (((), set()), (named, {"scrapers"})):
        manifests = list(render_many(ON, *ADMIN, "monitoring.serviceMonitor=true", *settings).values())
        rules, around, fixed = Rules(manifests), pods(manifests), ports(manifests)
        others = {each: around[each] for each in ("neighbour", "stranger")}
        others |= {each: Pod({"app": each}) for each in ("clients", "scrapers")}
        for role in ("agents", "controller", "engine"):
            port = fixed[role, "probe"]
            assert {who for who, pod in others.items() if rules.let_through(pod, around[role], port)} == wanted, role


def test_without_named_admins_nobody_reaches_the_admin_api() -> None:
    manifests = list(render_many(ON, *ADMIN, "networkPolicy.admins=null").values())
    rules, gateway, fixed = Rules(manifests), pods(manifests)["gateway"], ports(manifests)
    assert not [
        who for who, pod in pods(manifests).items() if rules.let_through(pod, gateway, fixed["gateway", "admin"])
    ]


def test_policies_are_valid_and_there_for_each_workload(many: list[dict[str, Any]]) -> None:
    for manifest in (*many, *rendered(ON)):
        if manifest["kind"] == "NetworkPolicy":
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    policies = {
        each["metadata"]["labels"]["app.kubernetes.io/component"] for each in many if each["kind"] == "NetworkPolicy"
    }
    assert policies == {role for role in pods(many) if role not in ("neighbour", "stranger")} | {"deny"}
    hooks = {each["kind"]: each["metadata"] for each in many if each["metadata"]["name"] == "demo-init"}
    weight = int(hooks["NetworkPolicy"]["annotations"]["helm.sh/hook-weight"])
    assert weight < int(hooks["Job"]["annotations"].get("helm.sh/hook-weight", 0))


def test_there_are_none_unless_they_are_asked_for() -> None:
    assert not [each for each in (*rendered(), *render_many().values()) if each["kind"] == "NetworkPolicy"]
