"""One served model for all clients, and a way to run a client's program with the clients' own Python."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chaos.target.cluster import ServedCluster
from elastic.demo.model import write_demo_model
from tests.support.wild_templates import TEMPLATES

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / ".cache" / "clients"
KEY = "sk-clients"
START_S, LIMIT_S = 400.0, 600.0  # of the cluster, and of a client's program
TIMEOUT_S = START_S + LIMIT_S + 200.0  # of a test: the first one has both, and the last one the cluster's end
Use = Callable[..., str]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint with a chat template that has a place for tools."""
    directory = tmp_path_factory.mktemp("model") / "demo-moe"
    write_demo_model(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATES["qwen_tool_calls"], encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def use(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Use]:
    """`use(*command)` runs it against the model; what it says in the end. `python` is the clients' own."""
    if not (CLIENTS / ".ready").exists():
        pytest.fail("the clients are not installed: make .cache/clients/.ready, which make test and make clients do")
    flags, state = ("--api-key", KEY, "--dtype", "float32"), tmp_path_factory.mktemp("state")
    with ServedCluster(model, 2, state_dir=state, flags=flags, environ={"ELASTIC_API_KEY": KEY}) as cluster:
        cluster.wait_serving(2, timeout_s=START_S)
        environ = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        environ |= {"PATH": f"{CLIENTS / 'bin'}:{os.environ['PATH']}"}
        environ |= {"CLIENT_URL": f"{cluster.url}/v1", "CLIENT_KEY": KEY, "CLIENT_MODEL": cluster.model_name()}
        environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1"}  # nothing is fetched

        def used(*command: str) -> str:
            done = subprocess.run(
                command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False
            )
            assert done.returncode == 0, done.stderr[-4000:]
            return done.stdout

        yield used
