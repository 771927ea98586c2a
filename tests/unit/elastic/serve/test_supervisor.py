"""What `elastic serve` refuses before it starts anything, and what its supervisor survives."""

from __future__ import annotations

import errno
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner

from elastic.cli.command import command
from elastic.demo.model import shipped_demo_model
from elastic.serve import gpus
from elastic.serve import supervisor as supervisor_module
from elastic.serve.cluster_config import cluster_config
from elastic.serve.options import ApiOptions, GatewayOptions, ServeOptions
from elastic.serve.roles import Roles
from elastic.serve.supervisor import Readiness, Supervisor
from elastic.serve.tls import authorities
from membership.base.enums import Device
from membership.base.errors import ConfigError, PlanRefused, StoreUnavailable
from workers.model.content import small_files

pytestmark = pytest.mark.unit

OPTIONS = ServeOptions(model=shipped_demo_model(), port=0, admin_port=0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ranks": 0}, "--ranks 0"),
        ({"dtype": "float8"}, "--dtype float8"),
        ({"exactness": "perhaps"}, "--exactness perhaps"),
        ({"device": "tpu"}, "--device tpu"),
        ({"kv_blocks": 0}, "--kv-blocks 0"),
        ({"max_model_len": -5}, "--max-model-len -5"),
        ({"ranks": 4, "max_ranks": 2}, "--max-ranks"),
        ({"ranks": 1000, "max_ranks": 1000}, "from 1 to 256"),
        ({"ranks": 2, "max_ranks": 257}, "--max-ranks 257"),
        ({"ranks": 250}, "slots"),
        ({"redundancy": 0.5}, "redundancy"),
        ({"redundancy": float("nan")}, "redundancy"),
        ({"redundancy": float("inf")}, "redundancy"),
    ],
)
def test_settings_that_cannot_be_served(settings: dict[str, object], says: str) -> None:
    with pytest.raises((ConfigError, PlanRefused)) as raised:
        cluster_config(replace(OPTIONS, **settings))  # type: ignore[arg-type]
    assert says in str(raised.value)


@pytest.mark.parametrize(("port", "says"), [(65_536, "65535"), (-1, "65535")])
def test_a_port_that_cannot_be(port: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Supervisor(replace(OPTIONS, port=port))


@pytest.mark.parametrize("name", [".", "..", ".last"])
def test_a_cluster_whose_state_would_be_that_of_all_clusters(name: str) -> None:
    with pytest.raises(ConfigError, match=r"begins with a '\.'"):
        Supervisor(replace(OPTIONS, cluster=name))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"allowed_origins": ("[bad",)}, "--allowed-origins '.bad' is no list of strings"),
        ({"allowed_origins": ("*",), "allowed_methods": ('["GET", 1]',)}, "--allowed-methods"),
        ({"allowed_origins": ("*",), "allowed_headers": ("[",)}, "--allowed-headers"),
        ({"allowed_headers": ("[",)}, "--allowed-headers"),
    ],
)
def test_what_each_gateway_would_refuse_is_refused_at_once(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Supervisor(replace(OPTIONS, **settings))


def test_no_rank_computes_on_a_gpu_with_a_torch_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank had refused it, until the start was given up."""
    monkeypatch.setattr(supervisor_module, "cpu_torch", lambda: gpus.cpu_torch(lambda _: "2.13.0+cpu"))
    with pytest.raises(ConfigError, match=r"--device cuda: torch 2\.13\.0\+cpu computes on CPUs alone"):
        Supervisor(replace(OPTIONS, device=Device.CUDA))
    monkeypatch.setattr(supervisor_module, "cpu_torch", lambda: gpus.cpu_torch(lambda _: "2.13.0+cu130"))
    assert Supervisor(replace(OPTIONS, device=Device.CUDA)).config.device == Device.CUDA


def test_a_second_pod_of_a_stateful_set_refuses_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be a cluster of its own behind the same Service."""
    monkeypatch.setenv("ELASTIC_NODE", "moe-1")
    with pytest.raises(ConfigError, match="this is moe-1, and only moe-0 serves"):
        Supervisor(replace(OPTIONS, only_on="moe-0"))
    assert Supervisor(replace(OPTIONS, only_on="moe-1")).node == "moe-1"


def test_a_model_may_be_served_under_a_name_with_a_slash() -> None:
    config = cluster_config(replace(OPTIONS, served_model_name=("org/model",)))
    assert (config.served_model_name, config.cluster) == ("org/model", shipped_demo_model().name)


@pytest.mark.parametrize("given", [("a", "b/c"), ("a,b/c",), ("a, b/c,", "a")])
def test_a_model_may_have_several_names(given: tuple[str, ...]) -> None:
    assert cluster_config(replace(OPTIONS, served_model_name=given)).model_names == ("a", "b/c")


@pytest.mark.parametrize(
    ("settings", "most"),
    [({}, 512), ({"device": Device.CUDA}, 2048), ({"device": Device.AUTO, "ranks": 2, "gpu_exchange": 2}, 2048)],
)
def test_steps_on_gpus_have_more_tokens(settings: dict[str, Any], most: int) -> None:
    assert cluster_config(replace(OPTIONS, **settings)).max_batched_tokens == most


def test_the_config_names_the_small_files_by_content() -> None:
    config = cluster_config(OPTIONS)
    assert dict(config.files) == small_files(shipped_demo_model())
    assert {"config.json", "tokenizer.json"} <= dict(config.files).keys()
    assert hash(config) == hash(cluster_config(OPTIONS)), "the planner's caches go by it"


def test_a_file_of_keys_that_the_gateway_would_refuse_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Supervisor(replace(OPTIONS, state_dir=tmp_path, api_key_file=tmp_path / "none"))


def test_what_clients_need_reaches_the_gateway_and_no_key_is_on_a_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any user of the machine can read a command line."""
    path = tmp_path / "keys"
    path.write_text("ann:sk-ann")
    given = ApiOptions(api_key=("sk-one", "sk-two"), api_key_file=path, access_log=True, max_open_requests=9)
    options = replace(OPTIONS, state_dir=tmp_path, **{each.name: getattr(given, each.name) for each in fields(given)})
    supervisor = Supervisor(options)
    roles = [supervisor._role(name, ("http://e:1",)) for name in ("controller", "agent", "engine", "gateway")]
    assert "sk-" not in repr(options) + str([role.arguments for role in roles])
    gateway = next(role for role in roles if role.name == "gateway")
    got: list[GatewayOptions] = []
    app = typer.Typer()

    @app.command()
    @command
    def run(options: GatewayOptions) -> None:
        got.append(options)

    outcome = CliRunner().invoke(app, gateway.arguments[1:], env=gateway.environment)
    assert outcome.exit_code == 0, outcome.output
    assert {each.name: getattr(got[0], each.name) for each in fields(given)} == asdict(given)


class DeadEtcd:
    """An etcd that does not start before the third time."""

    alive = False
    restarts = 0
    log_path = Path("/nonexistent/etcd.log")

    def __init__(self, error: Exception) -> None:
        self.error = error

    def restart(self) -> None:
        self.restarts += 1
        if self.restarts < 3:
            raise self.error
        self.alive = True


def test_a_gateway_that_cannot_be_asked_for_want_of_a_descriptor_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    supervisor = Supervisor(ServeOptions(model=shipped_demo_model(), state_dir=tmp_path))

    def no_descriptor(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")  # of the certificates: httpx hands it on as it is

    monkeypatch.setattr("elastic.serve.supervisor.httpx.get", no_descriptor)
    assert supervisor._readiness() == Readiness(missing="the gateway does not answer")


def test_a_look_at_the_gateway_reads_no_certificates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There are four a second until it is ready."""
    supervisor = Supervisor(ServeOptions(model=shipped_demo_model(), state_dir=tmp_path))
    supervisor._urls = ("http://127.0.0.1:1", "")
    asked: list[object] = []

    def answer(url: str, *, verify: object, **_: object) -> httpx.Response:
        asked.append(verify)
        return httpx.Response(200)

    monkeypatch.setattr("elastic.serve.supervisor.httpx.get", answer)
    assert supervisor._readiness().ready
    assert asked == [authorities("http:")]


@pytest.mark.parametrize(
    "error",
    [
        StoreUnavailable("not healthy"),
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.ENOENT, "its log's directory is gone"),
        RuntimeError("can't start new thread"),
        MemoryError(),
    ],
)
def test_an_etcd_that_does_not_start_is_tried_again(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("membership.base.attempts.ATTEMPT_PAUSE_S", 0.0)
    monkeypatch.setattr(Roles, "turn", lambda roles: None)  # there are none to wait for
    supervisor = Supervisor(replace(OPTIONS, state_dir=tmp_path))
    etcd = DeadEtcd(error)
    supervisor.etcd = etcd  # type: ignore[assignment]
    for _ in range(5):
        supervisor.tick()
    assert (etcd.alive, etcd.restarts) == (True, 3)
