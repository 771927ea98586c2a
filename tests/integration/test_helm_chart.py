"""The chart renders to manifests that Kubernetes accepts, passes what the values say, and refuses bad values."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.support.chart import CHART, KUBERNETES, VERSIONS, helm, manifests, notes, render, shipped, template
from tests.support.other_user import NEEDS_ROOT, run_as
from workers.ipc.cpu_priority import CORES

pytestmark = pytest.mark.integration

# Each older chart with the mode that reads it had these; without one Helm refuses, and nothing is changed.
FROM_THE_FIRST_ON = {
    "mode", "image", "model", "etcd", "admin", "api", "state", "sharedMemory", "service", "podDisruptionBudget",
    "terminationGracePeriodSeconds", "agents", "engine", "controller", "gateway", "init", "join", "serviceAccount",
}  # fmt: skip


def arguments_of(manifests: dict[str, dict[str, Any]]) -> list[str]:
    container = manifests["StatefulSet"]["spec"]["template"]["spec"]["containers"][0]
    return [*container["command"], *container["args"]]


def test_lint_is_clean() -> None:
    outcome = helm("lint", "--strict", str(CHART))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


@pytest.mark.parametrize("mode", [(), ("mode=many", "etcd.endpoints={http://etcd:2379}")])
def test_what_an_older_charts_values_lack_gives_no_flag_without_a_value(mode: tuple[str, ...]) -> None:
    """As `helm upgrade --reuse-values` has it: nothing of what this chart's values have beside the first one's."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    missing = sorted(values.keys() - FROM_THE_FIRST_ON)
    assert {"maxOpenRequests", "networkPolicy", "dtype"} <= {*missing}
    rendered = manifests(*mode, *(f"{each}=null" for each in missing))
    flags = re.findall(r"--[a-z-]+=.*", json.dumps(rendered, indent=0))
    assert flags
    assert [each for each in flags if re.search(r'=(0s?)?",?$|<nil>|%!', each)] == []


def test_the_one_pod_waits_for_etcd_also_after_an_upgrade_from_values_without_that() -> None:
    """Of itself `elastic serve` tries once."""
    endpoint = "etcd.endpoints={http://etcd:2379}"
    for settings, wait in (((), "120s"), (("etcd.waitSeconds=null",), "120s"), (("etcd.waitSeconds=0",), "0s")):
        assert f"--etcd-wait={wait}" in arguments_of(render(endpoint, *settings)), settings
    assert not re.search(r"\n[ ]*\n +- --", template(endpoint, "etcd.waitSeconds=null").stdout)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("state.persistence.enabled=true",),
        (
            "model.volume.persistentVolumeClaim.claimName=models",
            "etcd.endpoints={http://etcd-0:2379,http://etcd-1:2379}",
        ),
        ("admin.existingSecret=token", "serviceAccount.create=false", "api.keysSecret=keys", "api.tlsSecret=tls"),
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
        for version in VERSIONS:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_the_values_to_try_it_with_are_one_pod_and_complete() -> None:
    assert helm("lint", "--strict", str(CHART), "--values", str(CHART / "values-demo.yaml")).returncode == 0
    made = {each["kind"]: each for each in shipped("values-demo.yaml")}
    for manifest in made.values():
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    assert {"--ranks=4", "--stop-grace=15s"} <= {*arguments_of(made)}
    container = made["StatefulSet"]["spec"]["template"]["spec"]["containers"][0]
    [cores] = [each["valueFrom"]["resourceFieldRef"]["resource"] for each in container["env"] if each["name"] == CORES]
    which, resource = cores.split(".")
    assert container["resources"][which][resource] == "2", "its ranks use both cores of the machine that it is for"
    assert container["resources"]["requests"]["cpu"] == "1", "Kubernetes itself asks for some of them, too"


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
    assert flags.pop("--etcd-wait") == "120s", "an etcd that is installed with it may start later"
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    secrets = {volume["name"]: volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
    found = {flag: (secrets[mounts[path.rpartition("/")[0]]], path.rpartition("/")[2]) for flag, path in flags.items()}
    assert found == {
        "--etcd-ca": ("tls", "ca.crt"),
        "--etcd-cert": ("tls", "tls.crt"),
        "--etcd-key": ("tls", "tls.key"),
        "--etcd-password-file": ("word", "password"),
    }


def test_api_keys_come_from_a_secret_and_are_where_the_flag_says() -> None:
    pod = render("api.keysSecret=clients")["StatefulSet"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    path = next(a.partition("=")[2] for a in container["args"] if a.startswith("--api-key-file="))
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    secrets = {volume["name"]: volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
    assert (secrets[mounts[path.rpartition("/")[0]]], path.rpartition("/")[2]) == ("clients", "keys")


def test_a_certificate_comes_from_a_secret_and_probes_then_use_https() -> None:
    pod = render("api.tlsSecret=mine")["StatefulSet"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    secrets = {volume["name"]: volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
    assert secrets[mounts["/etc/elastic-ep/api-tls"]["name"]] == "mine"
    assert "subPath" not in mounts["/etc/elastic-ep/api-tls"], "a subPath is not updated"
    for flag, key in (("--ssl-certfile", "tls.crt"), ("--ssl-keyfile", "tls.key")):
        assert f"{flag}=/etc/elastic-ep/api-tls/{key}" in container["args"]
    plain = render()["StatefulSet"]["spec"]["template"]["spec"]["containers"][0]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        schemes = (container[probe]["httpGet"]["scheme"], plain[probe]["httpGet"]["scheme"])
        assert schemes == ("HTTPS", "HTTP")


def test_the_admin_token_is_a_file_so_that_a_changed_secret_counts_without_a_restart() -> None:
    pod = render("admin.existingSecret=mine")["StatefulSet"]["spec"]["template"]["spec"]
    assert "--admin-token-file=/etc/elastic-ep/admin/token" in pod["containers"][0]["args"]
    mounts = {mount["mountPath"]: mount for mount in pod["containers"][0]["volumeMounts"]}
    assert "subPath" not in mounts["/etc/elastic-ep/admin"], "a subPath is not updated"
    secrets = {volume["name"]: volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
    assert secrets == {mounts["/etc/elastic-ep/admin"]["name"]: "mine"}
    assert not [each for each in pod["containers"][0]["env"] if "secretKeyRef" in each.get("valueFrom", {})]


def test_a_user_needs_a_secret_with_the_password() -> None:
    outcome = template("etcd.user=server", "etcd.endpoints={http://e:2379}")
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
            "maxOpenRequests=9",
            "etcd.endpoints={https://e:2379}",
            "ranks=2",
            "etcd.tlsSecret=t",
            "etcd.clientCertificate=true",
            "etcd.user=u",
            "etcd.passwordSecret=p",
            "api.keysSecret=k",
            "api.tlsSecret=t",
        )
    )
    passed = {argument.split("=")[0] for argument in rendered if argument.startswith("--")}
    assert passed <= known, passed - known


def test_probes_and_drain() -> None:
    """What is left of the pod's grace after preStop is the streams', but for the end of ranks and etcd."""
    manifests = render("preStopSeconds=7", "terminationGracePeriodSeconds=100")
    pod = manifests["StatefulSet"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]
    assert pod["terminationGracePeriodSeconds"] == 100
    assert "--stop-grace=83s" in arguments_of(manifests)
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


@pytest.mark.parametrize("release", ["123", "1e3", "true", "my.release", "a" * 53, "0x10"])
def test_any_release_name_gives_names_that_kubernetes_takes(release: str) -> None:
    manifests = render("state.persistence.enabled=true", "serviceAccount.create=true", release=release)
    for manifest in manifests.values():
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        name = manifest["metadata"]["name"]
        assert re.fullmatch("[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name), name
        assert manifest["metadata"]["labels"]["app.kubernetes.io/instance"] == release
    assert len(manifests["StatefulSet"]["metadata"]["name"]) <= 52, "a revision's hash follows in a label"


def test_one_pod_is_behind_the_service_and_any_other_refuses_to_start() -> None:
    manifests = render()
    stateful = manifests["StatefulSet"]
    first = f"{stateful['metadata']['name']}-0"
    assert stateful["spec"]["replicas"] == 1
    selector = manifests["Service"]["spec"]["selector"]
    assert selector.pop("statefulset.kubernetes.io/pod-name") == first
    assert selector == stateful["spec"]["selector"]["matchLabels"] == stateful["spec"]["template"]["metadata"]["labels"]
    assert f"--only-on={first}" in arguments_of(manifests)
    environment = {each["name"]: each for each in stateful["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert environment["ELASTIC_NODE"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    budget = manifests["PodDisruptionBudget"]["spec"]
    assert budget["selector"]["matchLabels"] == selector
    assert (budget["maxUnavailable"], budget["unhealthyPodEvictionPolicy"]) == (0, "AlwaysAllow")


def test_the_client_of_helm_test_asks_the_service_and_is_no_pod_of_it() -> None:
    """What it does is in e2e/test_pods.py. Selected with the one pod, it would count as disrupted once it has ended."""
    manifests = render("service.port=80", "api.keysSecret=keys")
    client = manifests["Pod"]
    assert client["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert client["spec"]["containers"][0]["args"][-1] == "http://demo:80"
    assert render("api.tlsSecret=tls")["Pod"]["spec"]["containers"][0]["args"][-1] == "https://demo:8000"
    [volume] = client["spec"]["volumes"]
    [mount] = client["spec"]["containers"][0]["volumeMounts"]
    assert (volume["secret"]["secretName"], mount["mountPath"]) == ("keys", "/etc/elastic-ep/api-keys")
    for kind in ("StatefulSet", "PodDisruptionBudget"):
        selector = manifests[kind]["spec"]["selector"]["matchLabels"]
        assert not selector.items() <= client["metadata"]["labels"].items(), kind


def test_a_rank_is_killed_only_where_the_values_allow_it() -> None:
    admin = "admin.existingSecret=admin", "service.adminHost=0.0.0.0"
    assert "--allow-kill" not in arguments_of(render(*admin))
    allowed = render(*admin, "tests.kill=true")
    assert "--allow-kill" in arguments_of(allowed)
    kubernetes_validate.validate(allowed["Pod"], KUBERNETES, strict=True)
    [client] = allowed["Pod"]["spec"]["containers"]
    assert client["args"][1:] == ["http://demo:8000", "http://demo-admin:8001"]
    for lacking in (admin[:1], admin[1:]):
        assert "tests.kill: the test asks the admin API" in template(*lacking, "tests.kill=true").stderr


def test_the_admin_api_has_a_service_of_its_own_where_it_is_reached() -> None:
    assert [each["metadata"]["name"] for each in manifests() if each["kind"] == "Service"] == ["demo"]
    made = manifests("service.adminHost=0.0.0.0", "service.type=LoadBalancer", "admin.existingSecret=admin")
    public, admin = [each for each in made if each["kind"] == "Service"]
    assert (public["spec"]["type"], admin["spec"]["type"]) == ("LoadBalancer", "ClusterIP")
    assert admin["spec"]["selector"] == public["spec"]["selector"]
    assert admin["spec"]["ports"] == [{"name": "admin", "port": 8001, "targetPort": "admin"}]
    kubernetes_validate.validate(admin, KUBERNETES, strict=True)


def test_the_port_of_the_service_is_not_the_pods() -> None:
    manifests = render("service.port=80", "service.containerPort=9000")
    assert manifests["Service"]["spec"]["ports"] == [{"name": "http", "port": 80, "targetPort": "http"}]
    container = manifests["StatefulSet"]["spec"]["template"]["spec"]["containers"][0]
    assert container["ports"] == [{"name": "http", "containerPort": 9000}]
    assert "--port=9000" in container["args"]


def test_a_large_number_is_passed_in_full(tmp_path: Path) -> None:
    """In a values file it is a float to helm."""
    (tmp_path / "values.yaml").write_text("maxModelLen: 1048576")
    outcome = helm("template", "demo", str(CHART), "--values", str(tmp_path / "values.yaml"))
    assert "--max-model-len=1048576\n" in outcome.stdout


@pytest.mark.parametrize(
    "setting",
    [
        "state.persistence.enabled=true", "service.port=80", "preStopSeconds=1", "ranks=2", "podAnnotations.a=b",
        "admin.existingSecret=x", "serviceAccount.create=false", "model.servedName=m", "image.tag=v2",
    ],
)  # fmt: skip
def test_no_value_changes_what_a_stateful_set_cannot_change(setting: str) -> None:
    """Else `helm upgrade` would leave the release failed."""

    def fixed(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
        spec = manifests["StatefulSet"]["spec"]
        return {key: spec[key] for key in spec if key not in ("replicas", "template")}

    assert fixed(render(setting)) == fixed(render())


def test_state_that_is_to_last_is_on_a_volume_that_outlasts_the_release() -> None:
    manifests = render("state.persistence.enabled=true", "state.persistence.size=3Gi")
    claim = manifests["PersistentVolumeClaim"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "3Gi"
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    volumes = {each["name"]: each for each in manifests["StatefulSet"]["spec"]["template"]["spec"]["volumes"]}
    assert volumes["state"]["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}


def test_what_a_service_shows_does_not_restart_the_pod() -> None:
    pod = render()["StatefulSet"]["spec"]["template"]
    assert render("service.port=80", "service.type=NodePort")["StatefulSet"]["spec"]["template"] == pod
    assert "app.kubernetes.io/version" not in pod["metadata"]["labels"], "it changes with the chart"


def test_the_notes_say_what_keeps_it_from_starting_and_how_to_see_it(tmp_path: Path) -> None:
    said = notes(tmp_path)
    assert "model.volume is not set" in said
    assert "image.repository is not set" in said
    assert "is starting" in said
    assert "kubectl -n default rollout status statefulset/demo" in said
    given = notes(tmp_path, "model.volume.hostPath.path=/x", "image.repository=registry/elastic-ep", "service.port=80")
    assert "not set" not in given
    assert "port-forward svc/demo 8000:80" in given


@pytest.mark.parametrize("setting", ["ranks=0", "redundancy=0.5", "exactness=maybe", "etcd.endpoints={nonsense}"])
def test_bad_values_are_refused(setting: str) -> None:
    outcome = template(setting)
    assert outcome.returncode != 0
    assert setting.split("=")[0].split(".")[0] in outcome.stderr


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("preStopSeconds=60",), "terminationGracePeriodSeconds: 60 is too short"),
        (("terminationGracePeriodSeconds=15",), "at least preStopSeconds + 11 = 16"),
        (("service.containerPort=80",), "service.containerPort: Must be greater than or equal to 1024"),
        (("service.adminPort=8000",), "choose another service.adminPort"),
        (("etcd.user=u", "etcd.passwordSecret=p"), "etcd.endpoints"),
        (("etcd.endpoints={https://e:1}", "etcd.clientCertificate=true"), "etcd.tlsSecret"),
        (("model.volume.hostPath.path=/x", "model.path=/data/m"), "model.mountPath"),
        (("model.volume.hostPath.path=/x", "model.path=/state/m", "model.mountPath=/state"), "volume of its own"),
        (("extraArgs={--port=1}",), "extraArgs: --port"),
        (("extraArgs={ranks}",), "extraArgs.0"),
        (("image.tag=1",), "image.tag"),
        (("nodeSelector.gpu=true",), "nodeSelector.gpu"),
        (("replicas=2",), "set ranks"),
        (("service.targetPort=80",), "set service.containerPort"),
        (("admin.token=x",), "set admin.existingSecret"),
    ],
)
def test_values_that_do_not_fit_are_refused_with_what_to_do(settings: tuple[str, ...], says: str) -> None:
    outcome = template(*settings)
    assert outcome.returncode != 0
    assert says in outcome.stderr


def keys_of(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from keys_of(value, (*path, key))


def typos(key: str) -> set[str]:
    """One letter less, one twice, two swapped; another case; singular or plural."""
    middle = len(key) // 2
    swapped = key[: middle - 1] + key[middle] + key[middle - 1] + key[middle + 1 :]
    return {key[:-1], key[:middle] + key[middle:] * 2, swapped, key.lower(), key.capitalize(), f"{key}s"} - {key}


def test_a_typo_in_any_key_is_refused_with_the_right_one() -> None:
    """Against the schema itself, since helm takes a second for each; the test above has it say the same for some."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    opened = re.compile(  # Kubernetes checks what is below
        r"model\.volume|monitoring\.(labels|dashboardLabels)|podSecurityContext|(\w+\.)?resources\.(requests|limits)"
    )
    judged = 0
    for path in keys_of(values):
        if opened.match(".".join(path[:-1])):
            continue
        for typo in typos(path[-1]):
            changed = copy.deepcopy(values)
            node = functools.reduce(lambda found, key: found[key], path[:-1], changed)
            node[typo] = node.pop(path[-1])
            errors = [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(changed)]
            wrong = "" if typo in values else f"{typo!r} is not one of"  # "mode" is no wrong key, but model is missing
            assert any(wrong in each and f"{path[-1]!r}" in each for each in errors), (path, typo)
            judged += 1
    assert judged >= 60
    jsonschema.Draft7Validator(schema).validate(values)


WRONG = """
image.repository: https://registry/x
image.repository: registry/x:1.0
image.repository: registry/x@sha256:abc
image.repository: Registry/Elastic
image.tag: a b
model.path: models/x
model.path: hf://org/x
etcd.endpoints: [http://etcd]
etcd.endpoints: [http://etcd:2379/v3]
etcd.tlsSecret: My_Secret
etcd.storage.storageClassName: Fast SSD
admin.existingSecret: My Token
api.keysSecret: Keys
api.tlsSecret: tls/secret
join.existingSecret: A_b
imagePullSecrets: [{name: My_Registry}]
service.adminHost: localhost:8001
service.adminHost: 10.0.0
networkPolicy.clients: [{cidr: 10.0.0.0/8}]
resources.requests: {cpu: two}
resources.requests: {memory: 4GB}
resources.limits: {memory: 8g}
resources.limits: {memory: 8ki}
sharedMemory.size: 8ki
resources.requests: {gpu: 1}
engine.resources: {requests: {cpu: 1x}}
serviceAccount.name: My
priorityClassName: High Priority
runtimeClassName: NVIDIA
tolerations: [x]
extraArgs: [--spares 1]
agents.extraArgs: [--spares 1]
extraEnv: [{name: 1A, value: b}]
extraEnv: [{name: A, value: 1}]
extraEnv: [{value: b}]
extraVolumes: [{emptyDir: {}}]
extraVolumeMounts: [{name: tmp}]
extraInitContainers: [{name: fetch}]
extraObjects: [{apiVersion: v1, kind: ConfigMap}]
"""
RIGHT = """
image.repository: registry.example.com:5000/team/elastic-ep
image.repository: elastic_ep
image.tag: 0.1.0-cuda@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
image.tag: ""
model.path: /models/my model
etcd.endpoints: ["http://[fd00::1]:2379", "http://etcd.ns.svc.cluster.local:2379/"]
etcd.storage.storageClassName: ""
state.persistence.storageClassName: null
admin.existingSecret: a.b-c
service.adminHost: "::1"
service.adminHost: localhost
networkPolicy.clients: [{ipBlock: {cidr: 10.0.0.0/8}}]
resources.requests: {cpu: 2, memory: 4Gi, ephemeral-storage: 1e9, hugepages-2Mi: 128Mi}
resources.limits: {cpu: "0.5", nvidia.com/gpu: 1, memory: 500M}
resources.limits: {cpu: ".5", smarter-devices/fuse: 1, memory: 65536Ki}
sharedMemory.size: 65536Ki
gateway.resources: {requests: {cpu: 250m}}
extraArgs: [--spares=1, --device=cuda, --access-log]
extraEnv: [{name: A, value: "1"}, {name: B, valueFrom: {fieldRef: {fieldPath: metadata.name}}}]
"""


def taken(line: str) -> list[str]:
    """What the schema says to the chart's values with this one among them."""
    path, _, value = line.partition(": ")
    *head, last = path.split(".")
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    functools.reduce(lambda found, key: found[key], head, values)[last] = yaml.safe_load(value)
    schema = json.loads((CHART / "values.schema.json").read_text())
    errors = jsonschema.Draft7Validator(schema).iter_errors(values)
    return [".".join(map(str, error.absolute_path)) for error in errors]


@pytest.mark.parametrize("line", WRONG.strip().splitlines())
def test_what_a_pod_would_wait_for_or_end_with_is_refused_before(line: str) -> None:
    """Kubernetes takes most of these, and nothing starts."""
    [where] = taken(line)
    assert where.startswith(line.partition(": ")[0])


@pytest.mark.parametrize("line", RIGHT.strip().splitlines())
def test_what_is_unusual_and_right_is_taken(line: str) -> None:
    assert taken(line) == []
