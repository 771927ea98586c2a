"""With `mode: many` the chart renders a workload per role: manifests that Kubernetes accepts, commands and environments
that the command line takes, Secrets where these say. They are started in e2e/test_pods.py.
"""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer.main
from typer.testing import CliRunner

from elastic.cli.main import app
from elastic.demo.model import shipped_demo_model
from elastic.serve.etcd_server import EtcdServer
from membership.base import logs
from membership.store.etcd import connect
from membership.store.mirror import Mirror
from tests.support.chart import (
    CHART,
    KUBERNETES,
    VERSIONS,
    documents,
    helm,
    installed,
    notes,
    render,
    render_many,
    shipped,
    template,
)
from tests.support.promql import evaluate
from tests.support.promql import parsed as query_tree
from tests.support.recorded_metrics import Recorder, names
from tests.support.role_pods import (
    FIELDS,
    WORKLOADS,
    Manifests,
    container_of,
    environment_of,
    parsed,
    pods,
    templates,
)
from workers.ipc.cpu_priority import CORES

pytestmark = pytest.mark.integration

MODEL = "model.volume.persistentVolumeClaim.claimName=models"
EVERYTHING = (
    MODEL, "etcd.endpoints={https://etcd-0:2379,https://etcd-1:2379}", "etcd.tlsSecret=etcd-client",
    "etcd.clientCertificate=true", "etcd.user=server", "etcd.passwordSecret=etcd-user", "api.keysSecret=keys",
    "api.tlsSecret=tls", "admin.existingSecret=token", "service.adminHost=0.0.0.0", "model.servedName=m",
    "maxModelLen=512", "maxOpenRequests=9", "serviceAccount.create=false", "join.existingSecret=hosts",
    "agents.extraArgs={--spares=1}",
    "gateway.extraArgs={--access-log}", "init.extraArgs={--kv-blocks=64}", "engine.extraArgs={--log-keep=1}",
    "controller.extraArgs={--log-keep=1}", "imagePullSecrets[0].name=registry", "nodeSelector.disk=fast",
)  # fmt: skip
OWN = ("etcd.endpoints=null",)  # the chart's
SCALED = ("agents.replicas=null", "autoscaling.kind=hpa")
TARGETS, TYPES = ["7", "0.80", "16"], ["Value", "Value", "AverageValue"]
KEYS = {  # of Secrets that the user makes, as values.yaml names them
    "etcd-client": {"ca.crt", "tls.crt", "tls.key"}, "etcd-user": {"password"}, "keys": {"keys"},
    "tls": {"tls.crt", "tls.key"}, "token": {"token"}, "hosts": {"join-secret"},
}  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[(MODEL,), EVERYTHING, (*OWN, MODEL)],
    ids=["as it is", "with everything", "with an etcd of its own"],
)
def rendered(request: pytest.FixtureRequest) -> Manifests:
    return render_many(*request.param)


@pytest.mark.parametrize("name", ["values-many.yaml", "values-production.yaml"])
def test_the_shipped_values_are_of_this_mode_and_lint_is_clean(name: str) -> None:
    outcome = helm("lint", "--strict", str(CHART), "--values", str(CHART / name))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    made = shipped(name)
    found = [each["kind"] for each in made]
    assert {"StatefulSet", "Deployment"} <= set(found)
    assert ("Job" in found) is (name == "values-production.yaml"), "where etcd is there before"
    assert ("NetworkPolicy" in found) is (name == "values-production.yaml")
    own = "demo-etcd" in [each["metadata"]["name"] for each in made if each["kind"] == "StatefulSet"]
    assert own is (name == "values-many.yaml"), "to try it needs nothing else; production brings its own, with TLS"


def test_manifests_are_valid_and_there_is_one_workload_per_role(rendered: Manifests) -> None:
    for manifest in rendered.values():
        for version in VERSIONS:
            kubernetes_validate.validate(manifest, version, strict=True)
    workloads = {role: kind for kind, role in rendered if kind in {*WORKLOADS.values()}}
    if ("Service", "etcd") in rendered:
        wanted = {**WORKLOADS, "etcd": "StatefulSet"}
        del wanted["init"]  # no Job where no cluster is seen: test_helm_etcd.py
    else:
        wanted = WORKLOADS
    assert workloads == wanted


def test_a_role_takes_the_command_line_and_environment_that_it_is_given(
    rendered: Manifests, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {
        parameter.envvar for command in typer.main.get_command(app).commands.values() for parameter in command.params
    }  # type: ignore[attr-defined]
    for role, _ in pods(rendered):
        container = container_of(rendered, role)
        given = parsed(role, container, monkeypatch)
        named = {each["name"] for each in container["env"] if each["name"].startswith("ELASTIC_")}
        assert named <= known | {CORES}, (role, named - known)
        assert (CORES in named) is (role == "agents"), "ranks compute there"
        assert (given["cluster"], str(given["state_dir"])) == ("demo", "/state")
        assert given["etcd"], role
        assert str(given["join_secret_file"]) == "/etc/elastic-ep/join/join-secret"
        if role != "init":
            assert (given["node"], given["advertise"]) == (f"demo-{role}-0", "10.0.0.7")


def test_agents_know_what_they_end_with_and_pods_of_a_role_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """By labels that Kubernetes gives pods from 1.35 on, or another one, or a zone that is given."""
    for settings, fields, zone in (
        ((), FIELDS, "eu-1b"),
        ((), {**FIELDS, "zone": ""}, ""),
        (("agents.zoneLabel=example.com/rack",), {"podIP": "10.0.0.7", "nodeName": "worker-7", "rack": "r1"}, "r1"),
        (("agents.extraArgs={--zone=here}",), FIELDS, "here"),
        (("agents.zoneLabel=null",), FIELDS, "eu-1b"),
    ):
        manifests = render_many(MODEL, *settings)
        container = container_of(manifests, "agents")
        given = parsed("agents", container, monkeypatch, fields)
        assert (given["machine"], given["zone"] or "", given["node"]) == ("worker-7", zone, "demo-agents-0")
        for role, pod in pods(manifests):
            spread = pod["topologySpreadConstraints"]
            assert [each["topologyKey"] for each in spread] == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
            labels = manifests[WORKLOADS[role], role]["spec"]["template"]["metadata"]["labels"]
            for each in spread:
                assert each["labelSelector"]["matchLabels"].items() <= labels.items()
                assert (each["maxSkew"], each["whenUnsatisfiable"]) == (1, "ScheduleAnyway")


def test_values_reach_their_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = render_many(*EVERYTHING, "agents.ranksPerPod=3", "agents.replicas=5", "agents.minAgents=4")
    given = {role: parsed(role, container_of(manifests, role), monkeypatch) for role in WORKLOADS}
    assert all(each["etcd"] == ("https://etcd-0:2379", "https://etcd-1:2379") for each in given.values())
    assert all(each["etcd_user"] == "server" for each in given.values())
    assert (given["agents"]["capacity"], given["agents"]["spares"]) == (3, 1)
    names = ("follow_agents", "min_agents", "ranks", "served_model_name", "max_model_len", "kv_blocks")
    assert [given["init"][name] for name in names] == [3, 4, None, ["m"], 512, 64], "agents make the size"
    assert (given["gateway"]["host"], given["gateway"]["admin_host"]) == ("0.0.0.0", "0.0.0.0")
    assert (given["gateway"]["access_log"], given["gateway"]["max_open_requests"]) == (True, 9)
    assert (given["engine"]["log_keep"], given["controller"]["log_keep"]) == (1, 1)


@pytest.mark.parametrize(
    ("settings", "wait_s"), [((), 120.0), (("etcd.waitSeconds=0",), 0.0), (("etcd.waitSeconds=null",), 120.0)]
)
def test_every_role_waits_for_an_etcd_that_comes_later(
    settings: tuple[str, ...], wait_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = render_many(*settings)
    waits = {role: parsed(role, container_of(manifests, role), monkeypatch)["etcd_wait_s"] for role in WORKLOADS}
    assert waits == dict.fromkeys(WORKLOADS, wait_s)


def test_what_is_extra_is_in_every_pod_that_runs_a_role() -> None:
    settings = (
        "priorityClassName=high", "runtimeClassName=nvidia", "extraEnv[0].name=A", "extraEnv[0].value=b",
        "extraVolumes[0].name=models", "extraVolumeMounts[0].name=models", "extraVolumeMounts[0].mountPath=/models",
        "extraInitContainers[0].name=fetch", "extraInitContainers[0].image=fetcher",
        "extraInitContainers[0].volumeMounts[0].name=models", "extraInitContainers[0].volumeMounts[0].mountPath=/m",
    )  # fmt: skip
    manifests = render_many(*settings)
    for role, pod in [*pods(manifests), ("serve", render(*settings)["StatefulSet"]["spec"]["template"]["spec"])]:
        assert (pod["priorityClassName"], pod["runtimeClassName"]) == ("high", "nvidia"), role
        assert pod["initContainers"][0]["name"] == "fetch"
        assert {"name": "A", "value": "b"} in pod["containers"][0]["env"]
        assert {"name": "models"} in pod["volumes"]
        assert {"name": "models", "mountPath": "/models"} in pod["containers"][0]["volumeMounts"]
    for manifest in manifests.values():
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    more = ("extraObjects[0].apiVersion=v1", "extraObjects[0].kind=ConfigMap", "extraObjects[0].metadata.name=mine")
    assert render(*more)["ConfigMap"]["metadata"] == {"name": "mine"}


MINE = {
    "ConfigMap": "extraVolumes[0].configMap.name=mine",
    "Secret": "extraEnv[0].valueFrom.secretKeyRef.name=mine",
    "PersistentVolumeClaim": "extraVolumes[0].persistentVolumeClaim.claimName=mine",
    "ServiceAccount": "serviceAccount.create=false,serviceAccount.name=mine",
}
UNNEEDED = (
    "extraVolumes[0].name=mine",
    "extraVolumes[0].configMap.name=mine",
    "extraVolumes[0].configMap.optional=true",
)


@pytest.mark.parametrize(("kind", "needing"), MINE.items(), ids=[*MINE])
def test_what_pods_need_of_your_objects_is_there_before_the_init_job_or_refused(kind: str, needing: str) -> None:
    """Helm waits for its hooks before it makes the rest: the first install would end with Helm's timeout."""
    own = ("extraObjects[0].apiVersion=v1", f"extraObjects[0].kind={kind}", "extraObjects[0].metadata.name=mine")
    named = ("extraVolumes[0].name=v",) if "extraVolumes" in needing else ("extraEnv[0].name=A",)
    many = ("mode=many", "etcd.endpoints={http://etcd:2379}")
    refused = template(*many, *own, *named, needing)
    assert refused.returncode != 0
    assert f"extraObjects[0]: the init Job needs the {kind} mine before Helm makes it" in refused.stderr
    hook = "extraObjects[0].metadata.annotations.helm\\.sh/hook=pre-install\\,pre-upgrade\\,pre-rollback"
    for fits in ((*many, *own, *named, needing, hook), (*many, *own, *UNNEEDED), (*own, *named, needing)):
        outcome = template(*fits)
        assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize(
    ("settings", "cores"),
    [
        ((), "requests.cpu"),
        (("resources.limits.cpu=3",), "limits.cpu"),
        (("resources.requests.cpu=null",), None),
        (("resources=null",), None),
    ],
)
def test_ranks_count_the_cores_of_their_pod_and_not_all_of_the_machine(
    settings: tuple[str, ...], cores: str | None
) -> None:
    single = render(*settings)["StatefulSet"]["spec"]["template"]["spec"]["containers"][0]
    for container in (single, container_of(render_many(*settings), "agents")):
        found = [
            each["valueFrom"]["resourceFieldRef"]["resource"] for each in container["env"] if each["name"] == CORES
        ]
        assert found == ([cores] if cores else [])


def test_a_size_may_be_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    given = parsed("init", container_of(render_many("agents.follow=false", "ranks=3"), "init"), monkeypatch)
    assert (given["follow_agents"], given["ranks"]) == (0, 3)
    unsaid = parsed("init", container_of(render_many("agents.follow=false"), "init"), monkeypatch)
    assert unsaid["ranks"] is None


@pytest.mark.parametrize(("role", "kind"), [("agents", "StatefulSet"), ("gateway", "Deployment")])
def test_a_size_may_be_an_autoscalers(role: str, kind: str) -> None:
    assert "replicas" not in render_many(f"{role}.replicas=null")[kind, role]["spec"]


@pytest.mark.parametrize(
    ("settings", "role", "allowed"),
    [
        (("gateway.replicas=2",), "gateway", {"maxUnavailable": 1}),
        (("gateway.replicas=1",), "gateway", {"maxUnavailable": 0}),
        (("gateway.replicas=null",), "gateway", {"minAvailable": "50%"}),
        (("agents.replicas=null",), "agents", {"minAvailable": "50%"}),
        ((*SCALED,), "agents", {"maxUnavailable": 1}),
        ((*SCALED, "agents.minAgents=1", "autoscaling.minReplicas=1"), "agents", {"minAvailable": "50%"}),
    ],
)
def test_the_only_pod_of_a_role_is_not_evicted_whoever_says_how_many_there_are(
    settings: tuple[str, ...], role: str, allowed: dict[str, Any]
) -> None:
    """Kubernetes rounds up how many of them must stay: of one pod one, of two one, of five three."""
    spec = render_many(*settings)["PodDisruptionBudget", role]["spec"]
    assert {name: spec[name] for name in ("maxUnavailable", "minAvailable") if name in spec} == allowed


def test_a_size_that_is_the_autoscalers_stays_as_it_is(tmp_path: Path) -> None:
    """Where the last revision had a number and this one had none, Helm would remove it, and one pod is the default."""
    there: dict[str, dict[str, Any]] = {
        "statefulsets/demo-agents": {"replicas": 5},
        "deployments/demo-engine": {"replicas": 3},
        "deployments/demo-gateway": {"replicas": 0},  # somebody has stopped it
    }
    unsaid = ("agents.replicas=null", "gateway.replicas=null")
    made = documents(installed(tmp_path, there, *unsaid, "engine.replicas=1")["manifest"])
    sizes = {each["metadata"]["name"]: each["spec"]["replicas"] for each in made if "template" in each.get("spec", {})}
    assert (sizes["demo-agents"], sizes["demo-engine"]) == (5, 1), "a number that is given counts"
    assert sizes["demo-gateway"] == 0


@pytest.mark.parametrize(
    ("kind", "made"), [("none", None), ("hpa", "HorizontalPodAutoscaler"), ("keda", "ScaledObject")]
)
def test_there_is_at_most_one_autoscaler(kind: str, made: str | None, tmp_path: Path) -> None:
    """Of the pods of agents; it asks for a metric that there is, and another mode has none."""
    settings = (
        f"autoscaling.kind={kind}", "autoscaling.prometheus=http://p:9090", "autoscaling.requestsWaiting=7",
        "autoscaling.kvUsage=80", "autoscaling.requestsRunning=16",
    )  # fmt: skip
    manifests = render_many("agents.replicas=null", *settings)
    found = [each for (name, _), each in manifests.items() if name in ("HorizontalPodAutoscaler", "ScaledObject")]
    assert [each["kind"] for each in found] == ([made] if made else [])
    assert "replicas" not in manifests["StatefulSet", "agents"]["spec"], "helm would set it back"
    if kind == "none":
        assert render(*settings) == render(), "one pod"
        return
    [scaler] = found
    spec, name = scaler["spec"], manifests["StatefulSet", "agents"]["metadata"]["name"]
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": name}
    recorder = Recorder(tmp_path)
    times = recorder.record(1, Recorder.answer)
    if kind == "hpa":
        kubernetes_validate.validate(scaler, KUBERNETES, strict=True)
        externals = [metric["external"] for metric in spec["metrics"]]
        assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 8)
        targets = [external["target"] for external in externals]
        assert [each.get("value", each.get("averageValue")) for each in targets] == TARGETS
        assert [each["type"] for each in targets] == TYPES
        for metric in (external["metric"] for external in externals):
            assert {*metric["selector"]["matchLabels"]} <= names(recorder.recording)[metric["name"]]
    else:  # its schema is KEDA's
        assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (2, 8)
        assert [trigger["metadata"]["threshold"] for trigger in spec["triggers"]] == TARGETS
        assert [trigger["metricType"] for trigger in spec["triggers"]] == TYPES
        for trigger in spec["triggers"]:
            found = evaluate(query_tree(trigger["metadata"]["query"]), recorder.recording, times[-1])
            assert len(found) == 1, trigger


@pytest.mark.parametrize(("kind", "where"), [("hpa", "metrics"), ("keda", "triggers")])
def test_what_an_autoscaler_asks_for_may_be_less_or_more(kind: str, where: str) -> None:
    settings = ("agents.replicas=null", f"autoscaling.kind={kind}", "autoscaling.prometheus=http://p:9090")

    def asked(*more: str) -> list[Any]:
        found = render_many(*settings, *more)
        [scaler] = [each for (name, _), each in found.items() if name in ("HorizontalPodAutoscaler", "ScaledObject")]
        metrics: list[Any] = scaler["spec"][where]
        return metrics

    [only] = asked()
    assert "elastic_ep_requests_waiting" in str(only), "an adapter that does not offer another one would keep all pods"
    assert asked("autoscaling.more[0].type=cron") == [only, {"type": "cron"}]
    assert "elastic_ep_kv_usage_ratio" in str(asked("autoscaling.kvUsage=80")[1])


def test_null_is_the_default_or_refused_by_name() -> None:
    optional = ("minReadySeconds", "extraArgs", "replicas")
    nulls = [f"agents.{each}=null" for each in optional]
    nulls += [
        f"{role}.{each}=null"
        for role in ("engine", "controller", "gateway")
        for each in ("replicas", "extraArgs", "resources")
    ]
    for manifest in render_many("autoscaling=null", "init.extraArgs=null", "init.resources=null", *nulls).values():
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_pods_are_restricted_and_have_no_token_of_the_api(rendered: Manifests) -> None:
    """Pod Security "restricted", as the one pod."""
    for role, pod in ((role, each["spec"]) for role, each in templates(rendered).items()):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
            }, role  # fmt: skip
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
        assert {kind for each in pod.get("volumes", ()) for kind in each} <= {
            "name", "emptyDir", "secret", "persistentVolumeClaim"
        }  # fmt: skip


def test_secrets_are_where_flags_and_environment_say(rendered: Manifests) -> None:
    made = [each for (kind, _), each in rendered.items() if kind == "Secret"]
    keys = KEYS | {each["metadata"]["name"]: set(each["stringData"]) for each in made}
    for role, pod in pods(rendered):
        [container] = pod["containers"]
        said = [*environment_of(container, name="n", **FIELDS).values(), *container.get("args", ())]
        files = {text.rpartition("=")[2] for text in said if "/etc/elastic-ep/" in text}
        secrets = {each["name"]: each["secret"]["secretName"] for each in pod["volumes"] if "secret" in each}
        mounts = {
            each["mountPath"]: secrets[each["name"]] for each in container["volumeMounts"] if each["name"] in secrets
        }
        for file in files:
            folder, _, key = file.rpartition("/")
            assert key in keys[mounts[folder]], (role, file)
        assert {file.rpartition("/")[0] for file in files} == set(mounts), f"{role} has only what it reads"
        mounted = [each for box in (container, *pod.get("initContainers", ())) for each in box["volumeMounts"]]
        assert {each["name"] for each in mounted} == {each["name"] for each in pod["volumes"]}


def test_the_model_is_where_it_is_read(rendered: Manifests) -> None:
    """A volume that one machine may mount keeps no engine from another one."""
    for role, pod in pods(rendered):
        assert any(each["name"] == "model" for each in pod["volumes"]) is (role in ("agents", "gateway", "init")), role
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            has = any(each["name"] == "model" for each in container["volumeMounts"])
            assert has is (container["name"] in ("agents", "gateway", "init")), (role, container["name"])


def test_selectors_name_one_role_each(rendered: Manifests) -> None:
    labels = {role: template["metadata"]["labels"] for role, template in templates(rendered).items()}
    for (kind, role), manifest in rendered.items():
        selector = manifest["spec"].get("selector") if "spec" in manifest else None
        if selector is None:
            continue
        wanted = selector if kind == "Service" else selector["matchLabels"]
        matched = {name for name, has in labels.items() if wanted.items() <= has.items()}
        assert matched == {"gateway" if kind == "Service" and role != "etcd" else role}, (kind, role)
    assert {role for kind, role in rendered if kind == "PodDisruptionBudget"} == {*labels} - {"init"}


def test_requests_go_to_ready_gateways_whose_probes_are_those_of_the_one_pod(rendered: Manifests) -> None:
    gateway = container_of(rendered, "gateway")
    everything = "--ssl-keyfile" in str(gateway["args"])
    single = render(*(("api.tlsSecret=tls", "service.adminHost=0.0.0.0") if everything else ()))
    one = single["StatefulSet"]["spec"]["template"]["spec"]["containers"][0]
    probes = ("startupProbe", "livenessProbe", "readinessProbe", "lifecycle", "ports")
    assert [gateway[each] for each in probes] == [one[each] for each in probes]
    assert rendered["Service", ""]["spec"]["ports"] == [{"name": "http", "port": 8000, "targetPort": "http"}]


def test_the_other_roles_are_asked_whether_they_are_ready_where_they_answer(
    rendered: Manifests, monkeypatch: pytest.MonkeyPatch
) -> None:
    for role in ("agents", "engine", "controller"):
        container = container_of(rendered, role)
        [port] = container["ports"]
        assert parsed(role, container, monkeypatch)["probe_port"] == port["containerPort"], role
        assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": port["name"]}
        assert "livenessProbe" not in container, "an agent that hangs must not take ranks that serve with it"
    assert "readinessProbe" not in container_of(rendered, "init")


def test_a_pod_that_is_stopped_has_time_for_what_its_role_does_then(monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = render_many(
        "agents.terminationGracePeriodSeconds=130", "terminationGracePeriodSeconds=100", "preStopSeconds=7"
    )
    graces = {role: pod["terminationGracePeriodSeconds"] for role, pod in pods(manifests)}
    assert (graces["agents"], graces["gateway"]) == (130, 100)
    assert parsed("agents", container_of(manifests, "agents"), monkeypatch)["drain_grace_s"] == 120.0
    assert parsed("gateway", container_of(manifests, "gateway"), monkeypatch)["stop_grace_s"] == 83.0


def test_a_role_is_replaced_one_pod_at_a_time() -> None:
    manifests = render_many("engine.replicas=1")
    for role in ("engine", "controller", "gateway"):
        strategy = manifests["Deployment", role]["spec"]["strategy"]
        assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    agents = manifests["StatefulSet", "agents"]["spec"]
    assert (agents["podManagementPolicy"], agents["minReadySeconds"]) == ("Parallel", 0)
    allowed = {role: manifests["PodDisruptionBudget", role]["spec"]["maxUnavailable"] for role in ("agents", "engine")}
    assert allowed == {"agents": 1, "engine": 0}, "the only pod of a role is the whole service"


def test_settings_are_written_before_any_pod_and_the_join_secret_before_that() -> None:
    manifests = render_many()
    job, secret = manifests["Job", "init"], manifests["Secret", "join"]
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade,pre-rollback"
    assert "before-hook-creation" in job["metadata"]["annotations"]["helm.sh/hook-delete-policy"], "a Job is fixed"
    assert secret["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert int(secret["metadata"]["annotations"]["helm.sh/hook-weight"]) < 0
    assert len(secret["stringData"]["join-secret"]) >= 20
    assert ("Secret", "join") not in render_many("join.existingSecret=mine")
    account = job["spec"]["template"]["spec"].get("serviceAccountName")
    assert account is None, "the release's own is made after hooks"


def test_a_join_secret_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    """By `helm install` itself, which asks an API; only what the kubelet would do is missing (--no-hooks)."""

    def hooks(*secrets: str) -> set[str]:
        made = installed(tmp_path, {f"secrets/{each}": {} for each in secrets})["hooks"]
        return {each["name"] for each in made} - {"demo-test"}

    assert hooks() == {"demo-join", "demo-init"}
    assert hooks("demo-join") == {"demo-init"}
    assert hooks("other-join") == {"demo-join", "demo-init"}


def test_the_rendered_init_writes_the_settings_once_and_takes_another_number_of_pods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real etcd. So `helm upgrade` with another `agents.replicas` is not refused while roles live."""
    monkeypatch.setattr(logs, "configure", lambda role: None)  # it is of a process, and this one has other tests
    secret = tmp_path / "join-secret"
    said = []
    with EtcdServer(tmp_path / "etcd") as server:
        for replicas in (2, 3):
            settings = (f"agents.replicas={replicas}", f"etcd.endpoints={{{server.url}}}")
            manifests = render_many(*settings, f"model.path={shipped_demo_model()}")
            container = container_of(manifests, "init")
            if not secret.exists():
                secret.write_text(manifests["Secret", "join"]["stringData"]["join-secret"])
            environment = environment_of(container, name="demo-init", **FIELDS)
            environment |= {"ELASTIC_JOIN_SECRET_FILE": str(secret), "ELASTIC_STATE_DIR": str(tmp_path / "state")}
            outcome = CliRunner().invoke(app, [*container["command"][1:], *container["args"]], env=environment)
            assert outcome.exit_code == 0, outcome.output
            said.append(outcome.output.strip())
        with closing(connect([server.url])) as store, Mirror(store, "demo") as mirror:
            config, desired = mirror.state().config, mirror.state().desired
    assert said == [
        "cluster 'demo' may begin, with 2 ranks for each agent", "cluster 'demo' is there already: nothing is changed"
    ]  # fmt: skip
    assert config is not None
    assert desired is not None
    assert (config.follow_agents, config.min_agents, desired.ranks) == (2, 2, 4)
    assert config.join_key


@pytest.mark.parametrize("release", ["123", "true", "my.release", "a" * 53])
def test_any_release_name_gives_names_that_kubernetes_takes(release: str) -> None:
    for (kind, role), manifest in render_many(release=release).items():
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        name = manifest["metadata"]["name"]
        assert re.fullmatch("[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name), name
        assert len(name) <= 52, f"the hash of a revision, pod or job follows: {kind} {role}"


@pytest.mark.parametrize(
    "setting",
    ["agents.replicas=3", "agents.ranksPerPod=1", "image.tag=v2", "agents.minReadySeconds=1", "podAnnotations.a=b"],
)
def test_no_value_changes_what_workloads_cannot_change(setting: str) -> None:
    """Else `helm upgrade` would leave the release failed."""

    def fixed(manifests: Manifests) -> list[Any]:
        free = ("replicas", "template", "minReadySeconds")
        return [
            [each["spec"][key] for key in each["spec"] if key not in free]
            for (kind, _), each in manifests.items()
            if "spec" in each and kind != "Pod"  # of `helm test`, which makes it anew
        ]

    assert fixed(render_many(setting)) == fixed(render_many())


def test_one_pod_has_nothing_of_this_mode() -> None:
    of_many = ("agents.replicas=5", "agents.follow=false", "engine.replicas=3", "join.existingSecret=x")
    assert render(*of_many) == render()
    assert {kind for kind, _ in render_many()} - {*render()} == {"Deployment", "Job", "Secret"}


def test_the_notes_have_the_next_commands_of_this_mode(tmp_path: Path) -> None:
    said = notes(tmp_path, "mode=many", "etcd.endpoints={http://etcd:2379}")
    assert "kubectl -n default rollout status deployment/demo-gateway" in said
    assert "kubectl -n default exec deploy/demo-gateway -- elastic explain" in said
    assert "kubectl -n default scale statefulset/demo-agents --replicas=3" in said
    assert "demo-0" not in said
    init = "kubectl -n default logs deploy/demo-gateway -c init"
    assert (init in said, init in notes(tmp_path, "mode=many")) == (False, True), "it is in gateways with own etcd"
    fixed = notes(tmp_path, "mode=many", "etcd.endpoints={http://etcd:2379}", "agents.follow=false")
    assert "exec deploy/demo-gateway -- elastic scale 3" in fixed


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("etcd.endpoints=null", "etcd.tlsSecret=t"), "are for an etcd of yours: name it by etcd.endpoints"),
        (("state.persistence.enabled=true",), "state.persistence is for mode: single"),
        (("extraArgs={--spares=1}",), "give init.extraArgs, agents.extraArgs"),
        (("ranks=4",), "or set agents.follow to false"),
        (("agents.minAgents=3",), "the first ranks would wait for 3 pods, and agents.replicas is 2"),
        (("service.adminHost=0.0.0.0",), "give one by admin.existingSecret"),
        (("agents.extraArgs={--capacity=1}",), "agents.extraArgs: --capacity is given by the chart"),
        (("engine.extraArgs={--probe-port=1}",), "engine.extraArgs: --probe-port is given by the chart"),
        (("gateway.extraArgs={--port=1}",), "gateway.extraArgs: --port is given by the chart"),
        (("agents.terminationGracePeriodSeconds=10",), "Must be greater than or equal to 11"),
        (("agents.replicas=0",), "agents.replicas"),
        (("agents.minAgents=null",), "agents.minAgents: null is no value of it"),
        (("engine=null",), "engine: null is no value of it"),
        (("autoscaling.kind=hpa",), "agents.replicas: set it to null"),
        ((*SCALED, "agents.follow=false"), "pods of agents are only room"),
        ((*SCALED, "agents.minAgents=3"), "must be from agents.minAgents, 3, to autoscaling.maxReplicas, 8"),
        ((*SCALED, "autoscaling.maxReplicas=1"), "must be from agents.minAgents, 2, to autoscaling.maxReplicas, 1"),
        (("agents.replicas=null", "autoscaling.kind=keda"), "autoscaling.prometheus: KEDA asks a Prometheus"),
        (("agents.ranks=2",), "set agents.ranksPerPod"),
        (("mode=several",), 'one of the following: "single", "many"'),
    ],
)
def test_values_that_do_not_fit_are_refused_with_what_to_do(settings: tuple[str, ...], says: str) -> None:
    outcome = template("mode=many", "etcd.endpoints={http://etcd:2379}", *settings)
    assert outcome.returncode != 0
    assert says in outcome.stderr
