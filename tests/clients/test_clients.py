"""Each client's program in the clients' own environment, against one served model: nothing fails, refusals are known.

`make clients` makes that environment (`.cache/clients`) and runs this; without it there is nothing to run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chaos.target.cluster import ServedCluster
from elastic.demo.model import write_demo_model
from tests.support.wild_templates import TEMPLATES

pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache"
PYTHON = CACHE / "clients" / "bin" / "python"
KEY = "sk-clients"
LIMIT_S = 600.0
PAIRS = [
    ("The for statement", " is used to iterate over the elements of a sequence"), ("Lists are", " mutable sequences"),
    ("A function definition", " defines a user-defined function object"), ("x =", " 3"), ("def f(", "self):"),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint with a chat template that has a place for tools."""
    directory = tmp_path_factory.mktemp("model") / "demo-moe"
    write_demo_model(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATES["qwen_tool_calls"], encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedCluster]:
    if not PYTHON.exists():
        pytest.skip("make clients installs them")
    flags, state = ("--api-key", KEY, "--dtype", "float32"), tmp_path_factory.mktemp("state")
    with ServedCluster(model, 2, state_dir=state, flags=flags, environ={"ELASTIC_API_KEY": KEY}) as served:
        served.wait_serving(2)
        yield served


def used(cluster: ServedCluster, *command: str) -> str:
    """What a client's program says in the end."""
    environ = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    environ |= {"CLIENT_URL": f"{cluster.url}/v1", "CLIENT_KEY": KEY, "CLIENT_MODEL": cluster.model_name()}
    environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1"}  # nothing is fetched
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    "program",
    [
        "tests.clients.use_litellm", "tests.clients.use_langchain", "tests.clients.use_instructor",
        "tests.clients.use_agents",
    ],
)  # fmt: skip
def test_a_client_of_python(cluster: ServedCluster, program: str) -> None:
    used(cluster, str(PYTHON), "-m", program)


def test_the_client_of_node(cluster: ServedCluster) -> None:
    if shutil.which("node") is None or not (CACHE / "clients-node" / "node_modules").exists():
        pytest.skip("node and npm are not here")
    used(cluster, "node", str(CACHE / "clients-node" / "use_openai.mjs"))


def test_lm_evals_scores_are_those_of_transformers(cluster: ServedCluster, model: Path) -> None:
    said = used(cluster, str(PYTHON), "-m", "tests.clients.use_lm_eval", str(model), json.dumps(PAIRS))
    scores = json.loads(said.splitlines()[-1])
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for (context, continuation), (score, greedy) in zip(PAIRS, scores, strict=True):
        before, whole = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, context + continuation)
        )
        with torch.inference_mode():
            logits = plain(torch.tensor([whole])).logits[0, len(before) - 1 : -1].double()
        theirs = logits.log_softmax(-1).gather(1, torch.tensor(whole[len(before) :])[:, None])[:, 0]
        assert score == pytest.approx(theirs.sum().item(), abs=1e-4 * len(theirs))
        assert greedy == bool((logits.argmax(-1) == torch.tensor(whole[len(before) :])).all())
