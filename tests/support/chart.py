"""The Helm chart as helm renders it."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import yaml

from tests.support import ROOT

CHART = ROOT / "helm" / "elastic-ep"
KUBERNETES = "1.30"


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    binary = ROOT / ".cache" / "helm"
    if not binary.exists():
        pytest.fail("no .cache/helm: run `make test`, which fetches it")
    return subprocess.run([str(binary), *arguments], capture_output=True, text=True, timeout=60)


def template(*settings: str, release: str = "demo") -> subprocess.CompletedProcess[str]:
    flags = [flag for setting in settings for flag in ("--set", setting)]
    return helm("template", release, str(CHART), "--kube-version", KUBERNETES, *flags)


def render(*settings: str, release: str = "demo") -> dict[str, dict[str, Any]]:
    """The manifests by their kind."""
    outcome = template(*settings, release=release)
    assert outcome.returncode == 0, outcome.stderr
    return {document["kind"]: document for document in yaml.safe_load_all(outcome.stdout) if document}
