"""The chart's own etcd: three members that know one another and whom all roles know, there before `elastic init`.

They run in e2e/test_pods.py; test_helm_chart_many.py and test_helm_policies.py judge their pods as those of the roles.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.support.chart import installed, installing, render_many
from tests.support.role_pods import WORKLOADS, container_of, parsed

pytestmark = pytest.mark.integration

MODEL = "model.volume.persistentVolumeClaim.claimName=models"
OWN = ("etcd.endpoints=null",)
YOURS, THEIRS = "http://etcd:2379", ",".join(f"http://demo-etcd-{n}.demo-etcd:2379" for n in range(3))


def test_an_etcd_of_the_chart_is_three_members_that_know_each_other_and_that_all_roles_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They run in e2e/test_pods.py. A member of a StatefulSet is NAME-N.SERVICE to the pods of its namespace."""
    manifests = render_many(*OWN, MODEL)
    etcd, service = manifests["StatefulSet", "etcd"]["spec"], manifests["Service", "etcd"]["spec"]
    pod = etcd["template"]["spec"]
    [container] = pod["containers"]
    flags = dict(each.removeprefix("--").split("=", 1) for each in container["args"])
    names = [f"demo-etcd-{n}" for n in range(etcd["replicas"])]
    assert len(names) == 3
    assert flags["initial-cluster"] == ",".join(f"{each}=http://{each}.demo-etcd:2380" for each in names)
    assert (flags["name"], flags["initial-advertise-peer-urls"]) == ("$(POD_NAME)", "http://$(POD_NAME).demo-etcd:2380")
    assert container["env"] == [{"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]
    assert (etcd["serviceName"], etcd["podManagementPolicy"]) == ("demo-etcd", "Parallel"), "one alone is never ready"
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
    assert service["selector"].items() <= etcd["template"]["metadata"]["labels"].items()
    [claim] = etcd["volumeClaimTemplates"]
    [mount] = container["volumeMounts"]
    assert claim["metadata"]["name"] == mount["name"]
    assert flags["data-dir"].startswith(mount["mountPath"] + "/")
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    for kind, port in (("client", 2379), ("peer", 2380), ("metrics", 2381)):
        assert flags[f"listen-{kind}-urls"] == f"http://0.0.0.0:{port}"
        assert ports["health" if kind == "metrics" else kind] == port
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == "health"
    clients = tuple(f"http://{each}.demo-etcd:2379" for each in names)
    for role in WORKLOADS:
        assert parsed(role, container_of(manifests, role), monkeypatch)["etcd"] == clients
    assert manifests["PodDisruptionBudget", "etcd"]["spec"]["maxUnavailable"] == 1
    with_yours = render_many(MODEL)
    assert {key for key in manifests if key not in with_yours} == {
        ("StatefulSet", "etcd"), ("Service", "etcd"), ("PodDisruptionBudget", "etcd")
    }  # fmt: skip


def test_an_etcd_of_the_chart_is_there_before_init_which_gateways_then_run() -> None:
    """They read the model anyway. A hook would wait for what Helm makes after its hooks, and so would Argo CD's."""
    manifests, with_yours = render_many(*OWN, MODEL), render_many(MODEL)
    assert ("Job", "init") not in manifests
    assert ("Job", "init") in with_yours
    for role, kind in WORKLOADS.items():
        assert "initContainers" not in with_yours[kind, role]["spec"]["template"]["spec"]
        if role not in ("gateway", "init"):
            assert "initContainers" not in manifests[kind, role]["spec"]["template"]["spec"], role
    own = ("extraInitContainers[0].name=fetch", "extraInitContainers[0].image=fetcher")
    spec = render_many(*OWN, *own)["Deployment", "gateway"]["spec"]["template"]["spec"]
    assert [each["name"] for each in spec["initContainers"]] == ["fetch", "init"], "it may fetch what init reads"


@pytest.mark.parametrize("setting", ["agents.replicas=3", "etcd.storage.size=3Gi"])
def test_another_number_of_agents_replaces_no_pod_that_runs_init(setting: str) -> None:
    before = render_many(*OWN, MODEL)["Deployment", "gateway"]
    assert render_many(*OWN, MODEL, setting)["Deployment", "gateway"] == before


@pytest.mark.parametrize(("ready", "asked"), [(None, False), (0, False), (1, False), (2, True), (3, True)])
def test_an_upgrade_asks_an_etcd_that_answers_and_mends_one_that_does_not(
    ready: int | None, asked: bool, tmp_path: Path
) -> None:
    """A Job that waits for a wrong image's etcd would keep the right one away."""
    status = {} if ready is None else {"status": {"readyReplicas": ready}}
    there = {"statefulsets/demo-etcd": {"replicas": 3, **status}}
    hooks = {each["name"]: each for each in installed(tmp_path, there, *OWN, MODEL)["hooks"]}
    assert ("demo-init" in hooks) is asked
    if asked:
        assert {*hooks["demo-init"]["events"]} == {"pre-upgrade", "pre-rollback"}
        [container] = yaml.safe_load(hooks["demo-init"]["manifest"])["spec"]["template"]["spec"]["containers"]
        assert container == container_of(render_many(*OWN, MODEL), "init"), "the same that gateways' pods run"


@pytest.mark.parametrize(
    ("used", "own", "fits"), [(YOURS, (), True), (THEIRS, OWN, True), (YOURS, OWN, False), (THEIRS, (), False)]
)
def test_another_etcd_of_a_release_that_serves_is_refused(
    used: str, own: tuple[str, ...], fits: bool, tmp_path: Path
) -> None:
    """An old file of values that names none must not begin another cluster beside the one that serves."""
    container = {"name": "agents", "env": [{"name": "POD", "valueFrom": {}}, {"name": "ELASTIC_ETCD", "value": used}]}
    there = {"statefulsets/demo-agents": {"replicas": 2, "template": {"spec": {"containers": [container]}}}}
    outcome = installing(tmp_path, there, *own)
    assert (outcome.returncode == 0) is fits, outcome.stderr
    if not fits:
        assert (
            f"etcd.endpoints: the roles of this release use {used}, and with these values they would" in outcome.stderr
        )


def test_members_are_on_as_many_nodes_as_there_are_and_their_data_ends_with_the_release() -> None:
    """Two that end together are all of it. What they hold would bind the next install to the settings of this one."""
    manifests = render_many(*OWN, MODEL)
    etcd = manifests["StatefulSet", "etcd"]["spec"]
    by_node, by_zone = (
        next(each for each in etcd["template"]["spec"]["topologySpreadConstraints"] if each["topologyKey"] == key)
        for key in ("kubernetes.io/hostname", "topology.kubernetes.io/zone")
    )
    assert (by_node["maxSkew"], by_node["whenUnsatisfiable"], by_node["nodeTaintsPolicy"]) == (
        1,
        "DoNotSchedule",
        "Honor",
    )
    assert by_zone["whenUnsatisfiable"] == "ScheduleAnyway"
    assert etcd["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Delete", "whenScaled": "Retain"}
    budgets = {
        role: each["spec"]["unhealthyPodEvictionPolicy"]
        for (kind, role), each in manifests.items()
        if kind == "PodDisruptionBudget"
    }
    assert budgets.pop("etcd") == "IfHealthyBudget", "without a majority none is ready, and the third is needed for it"
    assert {*budgets.values()} == {"AlwaysAllow"}
