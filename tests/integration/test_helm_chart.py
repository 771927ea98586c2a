"""The chart renders to manifests that Kubernetes accepts, passes what the values say, and refuses bad values."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.support import ROOT
from tests.support.other_user import NEEDS_ROOT, run_as

pytestmark = pytest.mark.integration

CHART = ROOT / "helm" / "elastic-ep"
KUBERNETES = "1.30"


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    binary = ROOT / ".cache" / "helm"
    if not binary.exists():
        pytest.fail("no .cache/helm: run `make test`, which fetches it")
    return subprocess.run([str(binary), *arguments], capture_output=True, text=True, timeout=60)


def render(*settings: str) -> dict[str, dict[str, Any]]:
    flags = [flag for setting in settings for flag in ("--set", setting)]
    outcome = helm("template", "demo", str(CHART), *flags)
    assert outcome.returncode == 0, outcome.stderr
    return {document["kind"]: document for document in yaml.safe_load_all(outcome.stdout) if document}


def arguments_of(manifests: dict[str, dict[str, Any]]) -> list[str]:
    container = manifests["StatefulSet"]["spec"]["template"]["spec"]["containers"][0]
    return [*container["command"], *container["args"]]


def test_lint_is_clean() -> None:
    outcome = helm("lint", "--strict", str(CHART))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("state.persistence.enabled=true",),
        (
            "model.volume.persistentVolumeClaim.claimName=models",
            "etcd.endpoints={http://etcd-0:2379,http://etcd-1:2379}",
        ),
        ("admin.existingSecret=token", "serviceAccount.create=false"),
        (
            "etcd.endpoints={https://etcd-0:2379}",
            "etcd.tlsSecret=etcd-client",
            "etcd.clientCertificate=true",
            "etcd.user=server",
            "etcd.passwordSecret=etcd-user",
        ),
    ],
)
def test_manifests_are_valid(settings: tuple[str, ...]) -> None:
    for manifest in render(*settings).values():
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_values_reach_the_command_line() -> None:
    arguments = arguments_of(
        render("ranks=6", "redundancy=1.5", "etcd.endpoints={http://etcd-0:2379}", "model.path=/models/x")
    )
    assert arguments[:3] == ["elastic", "serve", "/models/x"]
    assert {"--ranks=6", "--redundancy=1.5", "--etcd=http://etcd-0:2379", "--host=0.0.0.0"} <= set(arguments)


def test_a_size_is_passed_only_if_it_is_given() -> None:
    """Else a restarted pod would forget `elastic scale`."""
    assert not [argument for argument in arguments_of(render()) if argument.startswith("--ranks")]


def test_credentials_for_etcd_come_from_secrets_and_are_where_the_flags_say() -> None:
    settings = ("etcd.tlsSecret=tls", "etcd.clientCertificate=true", "etcd.user=server", "etcd.passwordSecret=word")
    pod = render("etcd.endpoints={https://e:2379}", *settings)["StatefulSet"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    flags = dict(argument.split("=", 1) for argument in container["args"] if argument.startswith("--etcd-"))
    assert flags.pop("--etcd-user") == "server"
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    secrets = {volume["name"]: volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
    found = {flag: (secrets[mounts[path.rpartition("/")[0]]], path.rpartition("/")[2]) for flag, path in flags.items()}
    assert found == {
        "--etcd-ca": ("tls", "ca.crt"),
        "--etcd-cert": ("tls", "tls.crt"),
        "--etcd-key": ("tls", "tls.key"),
        "--etcd-password-file": ("word", "password"),
    }


def test_a_user_needs_a_secret_with_the_password() -> None:
    outcome = helm("template", "demo", str(CHART), "--set", "etcd.user=server")
    assert outcome.returncode != 0
    assert "etcd.passwordSecret" in outcome.stderr


@NEEDS_ROOT
def test_the_pod_may_keep_its_state_where_the_chart_mounts_it() -> None:
    """Kubernetes gives an emptyDir to root and to the pod's group, mode 2777: the pod cannot chmod it."""
    pod = render()["StatefulSet"]["spec"]["template"]["spec"]
    user, group = pod["securityContext"]["runAsUser"], pod["securityContext"]["fsGroup"]
    mount = next(each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "state")
    assert f"--state-dir={mount['mountPath']}" in pod["containers"][0]["args"]
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        volume = Path(folder) / "state"
        volume.mkdir()
        os.chown(volume, 0, group)
        volume.chmod(0o2777)
        imports = "from pathlib import Path; from elastic.serve.state_dir import StateDir"
        imports += "; from membership.base.run_dir import make_run_dir, run_dir"
        claim = f"s = StateDir(Path({str(volume)!r})); s.claim(); print(make_run_dir(run_dir(s.path)))"
        outcome = run_as(user, claim, imports)
        assert outcome.stdout.startswith(f"{volume}/"), outcome.stderr


def test_the_command_line_is_one_that_serve_takes() -> None:
    """Every flag the chart passes exists, so that a renamed flag cannot break a deployment unseen."""
    import typer.main

    from elastic.cli.main import app

    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {flag for parameter in command.params for flag in parameter.opts}
    rendered = arguments_of(
        render(
            "model.servedName=m",
            "maxModelLen=512",
            "etcd.endpoints={https://e:2379}",
            "ranks=2",
            "etcd.tlsSecret=t",
            "etcd.clientCertificate=true",
            "etcd.user=u",
            "etcd.passwordSecret=p",
        )
    )
    passed = {argument.split("=")[0] for argument in rendered if argument.startswith("--")}
    assert passed <= known, passed - known


def test_probes_and_drain() -> None:
    pod = render("preStopSeconds=7")["StatefulSet"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]
    assert pod["terminationGracePeriodSeconds"] > 7
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]


@pytest.mark.parametrize("setting", ["ranks=0", "redundancy=0.5", "exactness=maybe", "etcd.endpoints={nonsense}"])
def test_bad_values_are_refused(setting: str) -> None:
    outcome = helm("template", "demo", str(CHART), "--set", setting)
    assert outcome.returncode != 0
    assert setting.split("=")[0].split(".")[0] in outcome.stderr
