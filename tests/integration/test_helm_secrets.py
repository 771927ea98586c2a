"""No pod of the chart must be replaced for a changed Secret, so there are no checksum annotations: what is mounted is
read again, and nothing else comes from a Secret or a ConfigMap.
"""

from __future__ import annotations

import pytest

from tests.support import ROOT
from tests.support.chart import manifests

pytestmark = pytest.mark.integration

READ_AGAIN = {  # below /etc/elastic-ep, and what shows it
    "join": "unit/workers/agent/test_join_secrets.py::test_its_file_is_read_again_each_second",
    "etcd-tls": "contract/membership/store/test_etcd_credentials.py::test_certificates_may_change_while_it_is_served",
    "etcd-user": "contract/membership/store/test_etcd_credentials.py::test_a_password_may_change_while_it_is_served",
    "api-keys": "unit/elastic/gateway/test_key_ring.py::test_a_changed_file_counts_from_the_next_request_on",
    "api-tls": "integration/elastic/gateway/test_gateway_tls.py::test_a_new_certificate_counts_for_the_next_connection",
    "admin": "e2e/test_pod.py::test_a_pod_is_ready_through_twenty_scales_and_takes_changed_secrets_as_it_runs",
}
ALL = (
    "etcd.endpoints={https://etcd:2379}", "etcd.tlsSecret=a", "etcd.clientCertificate=true", "etcd.user=u",
    "etcd.passwordSecret=b", "api.keysSecret=c", "api.tlsSecret=d", "admin.existingSecret=e",
)  # fmt: skip


@pytest.mark.parametrize("mode", ["single", "many"])
def test_no_pod_must_be_replaced_for_a_changed_secret(mode: str) -> None:
    found = set[str]()
    for workload in manifests(f"mode={mode}", *ALL):
        pod = workload.get("spec", {}).get("template", {}).get("spec", {})
        kinds = {volume["name"]: {*volume} & {"secret", "configMap", "projected"} for volume in pod.get("volumes", ())}
        for container in (*pod.get("containers", ()), *pod.get("initContainers", ())):
            mounts = [mount for mount in container["volumeMounts"] if kinds[mount["name"]]]
            assert not [mount for mount in mounts if "subPath" in mount], "a subPath is not updated"
            found |= {mount["mountPath"] for mount in mounts}
            sources = {source for each in container["env"] for source in each.get("valueFrom", ())}
            assert sources <= {"fieldRef", "resourceFieldRef"}
            assert "envFrom" not in container
    wanted = {f"/etc/elastic-ep/{each}" for each in READ_AGAIN}
    assert found == wanted - ({"/etc/elastic-ep/join"} if mode == "single" else set())


@pytest.mark.parametrize("shown_by", READ_AGAIN.values(), ids=READ_AGAIN.keys())
def test_what_is_mounted_is_read_again(shown_by: str) -> None:
    path, name = shown_by.split("::")
    assert f"def {name}(" in (ROOT / "tests" / path).read_text()
