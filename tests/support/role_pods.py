"""Pods of single roles (the chart's `mode: many`) as they are rendered, and their command lines as they are read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import typer.main

from elastic.cli.main import app

Manifests = dict[tuple[str, str], dict[str, Any]]
WORKLOADS = {
    "agents": "StatefulSet",
    "controller": "Deployment",
    "engine": "Deployment",
    "gateway": "Deployment",
    "init": "Job",
}
FIELDS = {"podIP": "10.0.0.7", "nodeName": "worker-7", "zone": "eu-1b"}  # of the downward API


def pods(manifests: Manifests) -> Iterator[tuple[str, dict[str, Any]]]:
    """The pod of each role. `init` is none where gateways' pods run it first."""
    for role, kind in WORKLOADS.items():
        if (kind, role) in manifests:
            yield role, manifests[kind, role]["spec"]["template"]["spec"]


def templates(manifests: Manifests) -> dict[str, dict[str, Any]]:
    """The pod's template of each workload, also of an etcd of the chart."""
    return {
        role: each["spec"]["template"] for (_, role), each in manifests.items() if "template" in each.get("spec", {})
    }


def container_of(manifests: Manifests, role: str) -> dict[str, Any]:
    if (WORKLOADS[role], role) not in manifests:
        assert role == "init", role
        [container] = manifests["Deployment", "gateway"]["spec"]["template"]["spec"]["initContainers"]
    else:
        [container] = manifests[WORKLOADS[role], role]["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def environment_of(container: dict[str, Any], **fields: str) -> dict[str, str]:
    """As the kubelet makes it; `fields` are those of the downward API, by the last part of their paths."""

    def value(variable: dict[str, Any]) -> str:
        source = variable.get("valueFrom", {})
        if "resourceFieldRef" in source:
            which, resource = source["resourceFieldRef"]["resource"].split(".")
            return str(container["resources"][which][resource])
        return variable.get("value") or fields[re.findall(r"\w+", source["fieldRef"]["fieldPath"])[-1]]

    return {each["name"]: value(each) for each in container["env"]}


def parsed(
    role: str, container: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fields: Mapping[str, str] = FIELDS
) -> Mapping[str, Any]:
    """What the role's command makes of the rendered arguments and environment. UsageError if it refuses them."""
    program, name, *rest = container["command"]
    assert program == "elastic"
    with monkeypatch.context() as patched:
        for key, value in environment_of(container, name=f"demo-{role}-0", **fields).items():
            patched.setenv(key, value)
        command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
        params: Mapping[str, Any] = command.make_context(name, [*rest, *container.get("args", ())]).params
    return params
