"""What the chart's files of values render to, word for word (tests/golden/helm), for each Kubernetes that it is for.

UPDATE_GOLDEN=1 writes them anew; look at the difference.
"""

from __future__ import annotations

import os
import re

import kubernetes_validate
import pytest

from tests.support import GOLDEN
from tests.support.chart import CHART, documents, helm

pytestmark = [pytest.mark.integration]

SECRET = re.compile(r'^( +)(join-secret): "?[\w+/=-]+"?$', re.MULTILINE)  # another one each time
VERSIONS = [f"1.{minor}" for minor in range(30, 38)]


def rendered(values: str, version: str) -> str:
    outcome = helm("template", "demo", str(CHART), "--kube-version", version, "--values", str(CHART / values))
    assert outcome.returncode == 0, outcome.stderr
    return SECRET.sub(r"\1\2: MADE", outcome.stdout)


@pytest.mark.parametrize("values", ["values-demo.yaml", "values-many.yaml", "values-production.yaml"])
def test_a_file_of_values_renders_as_it_did(values: str) -> None:
    golden = GOLDEN / "helm" / values
    found = rendered(values, VERSIONS[0])
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(found)
    assert found == golden.read_text()
    for version in VERSIONS:
        text = rendered(values, version)
        assert documents(text) == documents(found), f"other objects for {version}: a golden render of its own"
        for manifest in documents(text):
            if "monitoring.coreos.com" not in manifest["apiVersion"]:
                kubernetes_validate.validate(manifest, version, strict=True)
