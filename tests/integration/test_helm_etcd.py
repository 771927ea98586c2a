"""The chart's own etcd: three members that know one another and whom all roles know, there before `elastic init`.

They run in e2e/test_pods.py; test_helm_chart_many.py and test_helm_policies.py judge their pods as those of the roles.
"""

from __future__ import annotations

import pytest

from tests.support.chart import render_many
from tests.support.role_pods import WORKLOADS, container_of, parsed

pytestmark = pytest.mark.integration

MODEL = "model.volume.persistentVolumeClaim.claimName=models"
OWN = ("etcd.endpoints=null",)


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


def test_an_etcd_of_the_chart_is_there_before_init_which_controllers_then_run() -> None:
    """A hook before the install would wait for what Helm makes after its hooks."""
    manifests, with_yours = render_many(*OWN, MODEL), render_many(MODEL)
    job = manifests["Job", "init"]
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-upgrade,pre-rollback"
    pod = manifests["Deployment", "controller"]["spec"]["template"]["spec"]
    [of_the_job] = job["spec"]["template"]["spec"]["containers"]
    assert pod["initContainers"] == [of_the_job]
    assert {each["name"] for each in of_the_job["volumeMounts"]} <= {each["name"] for each in pod["volumes"]}
    for role, kind in WORKLOADS.items():
        assert "initContainers" not in with_yours[kind, role]["spec"]["template"]["spec"]
        if role != "controller":
            assert "initContainers" not in manifests[kind, role]["spec"]["template"]["spec"], role
    own = ("extraInitContainers[0].name=fetch", "extraInitContainers[0].image=fetcher")
    spec = render_many(*OWN, *own)["Deployment", "controller"]["spec"]["template"]["spec"]
    assert [each["name"] for each in spec["initContainers"]] == ["fetch", "init"], "it may fetch what init reads"
