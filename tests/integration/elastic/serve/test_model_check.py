"""`elastic doctor MODEL` and `elastic serve MODEL` find the same fault in a checkpoint, before anything is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from elastic.cli.main import app
from elastic.demo.model import shipped_demo_model
from elastic.http_errors import message_of
from elastic.serve.cluster_config import cluster_config
from elastic.serve.model_check import Finding, check_model
from elastic.serve.options import ServeOptions
from membership.base.errors import ModelError
from tests.support.broken_checkpoints import ALL, Broken, edit

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("broken", ALL, ids=lambda broken: broken.name)
def test_both_commands_find_it(broken: Broken, tmp_path: Path) -> None:
    path = broken.make(tmp_path)
    with pytest.raises(ModelError) as raised:
        cluster_config(ServeOptions(model=path))
    assert broken.says in str(raised.value)
    assert raised.value.hint
    doctor = CliRunner().invoke(app, ["doctor", str(path), "-o", "json"])
    assert doctor.exit_code == 1
    assert doctor.stderr.splitlines() == [f"error: {message_of(raised.value)}"]
    failed = [f for f in msgspec.json.decode(doctor.stdout, type=list[Finding]) if f.level == "fail"]
    assert broken.says in failed[0].message


@pytest.mark.parametrize(
    "command", [["doctor"], ["serve", "--port", "0", "--admin-port", "0"], ["demo", "--model"]], ids=str
)
@pytest.mark.parametrize("name", ["no-tokenizer", "missing-expert", "eos-a-word"])
def test_as_processes(name: str, command: list[str], tmp_path: Path) -> None:
    """One line on stderr that says what to do, and nothing was started: no state, no log."""
    broken = next(each for each in ALL if each.name == name)
    path = broken.make(tmp_path)
    home = tmp_path / "home"
    done = subprocess.run(
        [sys.executable, "-m", "elastic.cli", *command, str(path)], capture_output=True, text=True, timeout=60,
        env={**os.environ, "XDG_STATE_HOME": str(home)},
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert broken.says in line
    assert not home.exists()


def test_the_shipped_checkpoint_is_fine() -> None:
    checked = check_model(shipped_demo_model())
    assert {(finding.what, finding.level) for finding in checked.findings} == {
        ("model", "ok"),
        ("weights", "ok"),
        ("tokenizer", "ok"),
    }


def test_all_that_is_wrong_is_listed(tmp_path: Path) -> None:
    path = Broken("two", edit("config.json", num_hidden_layers=5), "").make(tmp_path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"layer 4: .*; and \d+ more; and 1 more findings, see elastic doctor"):
        cluster_config(ServeOptions(model=path))
    assert [f.what for f in check_model(path).findings if f.level == "fail"] == ["weights", "tokenizer"]


@pytest.mark.parametrize(
    ("changes", "what", "says"),
    [
        ({"dtype": "float32"}, "dtype", "config.json says float32, the weights are bfloat16"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16,
                              "original_max_position_embeddings": 1024}}, "length", "1024 of 4096 tokens"),
    ],
)  # fmt: skip
def test_what_can_be_served_with_a_warning(changes: dict[str, object], what: str, says: str, tmp_path: Path) -> None:
    path = Broken("odd", edit("config.json", **changes), "").make(tmp_path)
    assert [(f.what, says in f.message) for f in check_model(path).findings if f.level == "warn"] == [(what, True)]
    assert cluster_config(ServeOptions(model=path)).cluster == "broken-model"
