"""What pods of agents have of the machine: the checkpoint, from wherever it comes, GPUs and shared memory."""

from __future__ import annotations

import kubernetes_validate
import pytest

from tests.support.chart import VERSIONS, render_many
from tests.support.role_pods import WORKLOADS, pods

pytestmark = pytest.mark.integration

MODEL = "model.volume.persistentVolumeClaim.claimName=models"
SOURCES = {
    "persistentVolumeClaim": {"claimName": "models"}, "hostPath": {"path": "/srv/models"},
    "image": {"reference": "registry/models:1"}, "nfs": {"server": "nas", "path": "/models"},
}  # fmt: skip


@pytest.mark.parametrize("source", [*SOURCES, "init container"])
def test_the_model_may_come_from_any_volume_or_from_an_init_container(source: str) -> None:
    given = [f"model.volume.{source}.{key}={value}" for key, value in SOURCES.get(source, {}).items()]
    if not given:
        fetch = "extraInitContainers[0]", "extraVolumes[0]", "extraVolumeMounts[0]"
        given = [
            f"{fetch[0]}.name=fetch", f"{fetch[0]}.image=fetch:1", f"{fetch[0]}.volumeMounts[0].name=m",
            f"{fetch[0]}.volumeMounts[0].mountPath=/models", f"{fetch[1]}.name=m", f"{fetch[1]}.emptyDir.sizeLimit=9Gi",
            f"{fetch[2]}.name=m", f"{fetch[2]}.mountPath=/models",
        ]  # fmt: skip
    made = render_many(*given)
    for role in ("agents", "gateway"):
        kubernetes_validate.validate(made[WORKLOADS[role], role], VERSIONS[-1], strict=True)
    agent = dict(pods(made))["agents"]
    mount = next(each for each in agent["containers"][0]["volumeMounts"] if each["mountPath"] == "/models")
    volume = next(each for each in agent["volumes"] if each["name"] == mount["name"])
    assert volume == {"name": mount["name"], **({source: SOURCES[source]} if source in SOURCES else volume)}
    assert (source in SOURCES) is mount.get("readOnly", False)
    assert (source not in SOURCES) is any(each["name"] == "fetch" for each in agent.get("initContainers", ()))


def test_pods_of_agents_may_have_gpus_and_as_much_shared_memory_as_you_say() -> None:
    made = render_many(MODEL, r"resources.limits.nvidia\.com/gpu=2", "sharedMemory.size=16Gi", "agents.ranksPerPod=2")
    kubernetes_validate.validate(made["StatefulSet", "agents"], VERSIONS[-1], strict=True)
    found = {role: pod for role, pod in pods(made)}
    assert found["agents"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 2
    shm = next(each for each in found["agents"]["volumes"] if each["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    others = [pod["containers"][0]["resources"] for role, pod in found.items() if role != "agents"]
    assert not [each for each in others if "nvidia.com/gpu" in each.get("limits", {})]
