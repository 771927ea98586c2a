"""What a user gets wrong: one clear line on stderr, exit status 1 (2 for usage), and nothing left running."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Serve
from tests.support.helpers import eventually
from tests.support.served import shows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def elastic(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPROFILEIMPORTTIME": "1", **(environment or {})}
    command = [sys.executable, "-m", "elastic.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})


def complaint(outcome: subprocess.CompletedProcess[str]) -> str:
    """The one line of stderr that says what is wrong. It was found out before what takes seconds to import."""
    assert outcome.returncode == 1, outcome
    imported = {line.rpartition("|")[2].strip() for line in outcome.stderr.splitlines() if "import time:" in line}
    assert "typer" in imported
    assert not imported & {"torch", "transformers"}
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.stderr
    assert "Traceback" not in outcome.stderr
    return errors[0]


def truncate(model: Path) -> None:
    shard = next(model.glob("*.safetensors"))
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)


def make_dense(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": config["hidden_size"]}
    (model / "config.json").write_text(json.dumps(config))


def drop_config(model: Path) -> None:
    (model / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [(truncate, "truncated"), (make_dense, "dense"), (drop_config, "config.json"), (shutil.rmtree, "no such")],
)
def test_a_checkpoint_that_cannot_be_served(
    demo_model: Path, tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo_model, model)
    damage(model)
    said = complaint(elastic("serve", str(model), "--state-dir", str(tmp_path / "state"), "--port", "0"))
    assert says in said
    assert str(model) in said or "model" in said


@pytest.mark.parametrize(("ranks", "says"), [("0", "--ranks 0"), ("1000", "from 1 to 256"), ("250", "slots")])
def test_a_number_of_ranks_that_cannot_be(demo_model: Path, tmp_path: Path, ranks: str, says: str) -> None:
    assert says in complaint(elastic("serve", str(demo_model), "--ranks", ranks, "--state-dir", str(tmp_path)))


def test_a_busy_port(demo_model: Path, tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        said = complaint(elastic("serve", str(demo_model), "--port", port, "--state-dir", str(tmp_path)))
    assert port in said
    assert "--port" in said


def test_no_etcd_binary(demo_model: Path, tmp_path: Path) -> None:
    said = complaint(
        elastic("serve", str(demo_model), "--state-dir", str(tmp_path), "--port", "0", "--admin-port", "0",
                environment={"ELASTIC_ETCD_BIN": str(tmp_path / "missing")})
    )  # fmt: skip
    assert "missing" in said
    assert started(tmp_path) == []


def test_unreachable_etcd(demo_model: Path, tmp_path: Path) -> None:
    said = complaint(
        elastic("serve", str(demo_model), "--etcd", "http://127.0.0.1:1", "--state-dir", str(tmp_path), "--port", "0",
                "--admin-port", "0")
    )  # fmt: skip
    assert "127.0.0.1:1" in said
    assert started(tmp_path) == []


def test_no_certificate_for_etcd(demo_model: Path, tmp_path: Path) -> None:
    said = complaint(
        elastic("serve", str(demo_model), "--etcd", "https://127.0.0.1:1", "--etcd-ca", str(tmp_path / "missing"),
                "--state-dir", str(tmp_path), "--port", "0", "--admin-port", "0")
    )  # fmt: skip
    assert "missing" in said
    assert started(tmp_path) == []


@pytest.mark.parametrize("named", [False, True])
def test_a_demo_that_cannot_be_starts_no_server(demo_model: Path, tmp_path: Path, named: bool) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo_model, model)
    (model / "tokenizer.json").unlink()
    environment = {"TMPDIR": str(tmp_path), **({} if named else {"ELASTIC_ETCD_BIN": str(tmp_path / "missing")})}
    said = complaint(elastic("demo", "--plain", *(["--model", str(model)] if named else []), environment=environment))
    assert ("tokenizer.json" if named else "missing") in said
    assert "elastic serve" not in said


def started(state: Path) -> list[str]:
    """The logs of processes that `elastic serve` has begun to start."""
    return sorted(path.name for path in (state / "logs").glob("*"))


def test_no_cluster_to_talk_to(tmp_path: Path) -> None:
    assert "elastic serve" in complaint(elastic("status", "--state-dir", str(tmp_path)))


def test_bad_requests_are_refused_and_serving_goes_on(serve: Serve, demo_model: Path) -> None:
    cluster = serve(demo_model, 2, ("--kv-blocks", "32", "--max-waiting-requests", "3"))
    cluster.wait_serving(2)
    model = cluster.model_name()
    good: dict[str, Any] = {"model": model, "prompt": "The for statement", "max_tokens": 4}

    def post(body: object, path: str = "completions") -> httpx.Response:
        content = body if isinstance(body, str) else json.dumps(body)
        return httpx.post(f"{cluster.url}/v1/{path}", content=content, timeout=30.0)

    bad = [
        (post("{not json"), 400, "JSON"),
        (post({**good, "n": 100000}), 400, "n"),
        (post({**good, "colour": "red"}), 400, "colour"),
        (post({**good, "prompt": [1] * 100_000}), 400, "too long"),
        (post({**good, "prompt": [10**6]}), 400, "token"),
        (post({**good, "max_tokens": -1}), 400, "max_tokens"),
        (post({**good, "temperature": "hot"}), 400, "temperature"),
        (post({**good, "model": "another"}), 404, "another"),
        (post({**good, "prompt": "x" * 5_000_000}), 413, "large"),
        (post({"model": model, "messages": []}, "chat/completions"), 400, "messages"),
    ]
    for answer, status, word in bad:
        assert answer.status_code == status, answer.text[:300]
        assert word in answer.json()["error"]["message"], answer.text[:300]
    assert post(good).status_code == 200
    prompts = [[token] * 250 for token in range(5, 16)]  # 16 of a rank's 32 blocks each, none shared
    long = {**good, "max_tokens": 30, "ignore_eos": True}
    assert len(post({**long, "prompt": prompts[:5]}).json()["choices"]) == 5, "two run, three wait"
    crowd = post({**long, "prompt": prompts[5:]})
    assert (crowd.status_code, crowd.json()["error"]["code"]) == (429, "overloaded"), crowd.text[:300]
    assert int(crowd.headers["Retry-After"]) >= 1
    idle = {"running": 0, "waiting": 0, "waiting_tokens": 0, "shed": 1}
    eventually(lambda: cluster.status()["requests"] == idle, 60.0, "an idle engine that tells what it has refused")
    shows(cluster, lambda text: 'elastic_ep_requests_shed_total{reason="requests"} 1.0' in text, "what was refused")
    assert {r["state"] for r in cluster.status()["ranks"]} == {"serving"}
