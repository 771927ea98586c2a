"""The Helm chart as helm renders it."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import ROOT
from tests.support.kubernetes_api import kubernetes_api

CHART = ROOT / "helm" / "elastic-ep"
KUBERNETES = "1.30"
VERSIONS = (KUBERNETES, "1.37")  # the oldest and the newest


def helm(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    binary = ROOT / ".cache" / "helm"
    if not binary.exists():
        pytest.fail("no .cache/helm: run `make test`, which fetches it")
    command = [str(binary), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


@functools.cache
def template(*settings: str, release: str = "demo") -> subprocess.CompletedProcess[str]:
    """Each way of rendering costs a helm, and so happens once. A setting may be the chart's file of values."""
    flags = [
        part
        for each in settings
        for part in (("--values", str(CHART / each)) if each.endswith(".yaml") else ("--set", each))
    ]
    return helm("template", release, str(CHART), "--kube-version", KUBERNETES, *flags)


def manifests(*settings: str, release: str = "demo") -> list[dict[str, Any]]:
    """All that is rendered."""
    outcome = template(*settings, release=release)
    assert outcome.returncode == 0, outcome.stderr
    return documents(outcome.stdout)


def shipped(values: str) -> list[dict[str, Any]]:
    """What a values file that comes with the chart gives, as it is."""
    outcome = helm("template", "demo", str(CHART), "--kube-version", KUBERNETES, "--values", str(CHART / values))
    assert outcome.returncode == 0, outcome.stderr
    return documents(outcome.stdout)


def documents(text: str) -> list[dict[str, Any]]:
    """What helm has written."""
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document]


def render(*settings: str, release: str = "demo") -> dict[str, dict[str, Any]]:
    """The manifests by their kind: of one pod, each kind once."""
    return {document["kind"]: document for document in manifests(*settings, release=release)}


def render_many(*settings: str, release: str = "demo") -> dict[tuple[str, str], dict[str, Any]]:
    """The manifests with `mode: many`, by kind and role ("" is that of what all roles share)."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for document in manifests("mode=many", "etcd.endpoints={http://etcd:2379}", *settings, release=release):
        key = document["kind"], document["metadata"]["labels"].get("app.kubernetes.io/component", "")
        assert key not in found, key
        found[key] = document
    return found


def installing(
    folder: Path, there: Mapping[str, Mapping[str, Any]], *settings: str
) -> subprocess.CompletedProcess[str]:
    """`helm install` of `mode: many`, hooks apart, where these objects are (kubernetes_api.py)."""
    values = [f"--set={each}" for each in ("mode=many", "etcd.endpoints={http://etcd:2379}", *settings)]
    with kubernetes_api(folder, there) as environment:
        flags = ("--no-hooks", "--disable-openapi-validation", "--output", "json")
        return helm("install", "demo", str(CHART), *flags, *values, environment=environment)


def installed(folder: Path, there: Mapping[str, Mapping[str, Any]], *settings: str) -> dict[str, Any]:
    """What it makes."""
    outcome = installing(folder, there, *settings)
    assert outcome.returncode == 0, outcome.stderr
    made: dict[str, Any] = json.loads(outcome.stdout)
    return made


def notes(folder: Path, *settings: str) -> str:
    """NOTES.txt; without a cluster helm shows it only as part of a manifest."""
    chart = folder / "chart"
    shutil.copytree(CHART, chart, dirs_exist_ok=True)
    text = (chart / "templates" / "NOTES.txt").read_text()
    manifest = '{{ define "notes" }}' + text + '{{ end }}\nkind: Notes\ntext: {{ include "notes" . | quote }}\n'
    (chart / "templates" / "notes.yaml").write_text(manifest)
    flags = [flag for setting in settings for flag in ("--set", setting)]
    outcome = helm("template", "demo", str(chart), "--show-only", "templates/notes.yaml", *flags)
    assert outcome.returncode == 0, outcome.stderr
    return str(yaml.safe_load(outcome.stdout)["text"])
