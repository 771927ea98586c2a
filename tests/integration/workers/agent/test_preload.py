"""What the forkserver has imported is all that a rank needs: what is missing there is imported in each rank's load."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from elastic.demo.model import shipped_demo_model
from workers.agent.forkserver_client import environment

pytestmark = pytest.mark.integration

# `workers` alone, like a rank: what the tests' own helpers import does not count.
PROGRAM = """
import sys
from pathlib import Path
from workers.agent.forkserver import preload
from workers.agent.preload import WORKER_CLASS, preload_for
model = sys.argv[1]
preload(preload_for(WORKER_CLASS, model))
there = set(sys.modules)

from membership.base.enums import Exactness
from workers.exchange.auto import Auto
from workers.exchange.router import Router
from workers.model.expert_bank import LocalExpertBank
from workers.model.grammar import TOKENIZER_FILE, Grammars
from workers.model.load import load_model
from workers.model.runner import ModelRunner
loaded, bank = load_model(Path(model)), LocalExpertBank()
runner = ModelRunner(loaded, bank, Exactness.INVARIANT, kv_blocks=4, block_size=16, max_len=64)
bank.load_all([(0, 0)])
Grammars(Path(model) / TOKENIZER_FILE, loaded.info.eos_token_ids).read()
Router(0, {})
runner.close()
print(*sorted(set(sys.modules) - there))
"""


def test_a_ranks_load_imports_nothing_more() -> None:
    command = [sys.executable, "-c", PROGRAM, str(shipped_demo_model())]
    environ = environment(os.environ)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environ)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr[-2000:]
