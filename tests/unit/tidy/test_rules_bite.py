"""Each rule is seen to fail when it is broken: a copy of the tree with a breach of every rule, and what is found."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.sources import tracked

pytestmark = pytest.mark.unit

DOC = '"""A file."""\n\n'
BREACHES = {  # file -> what is put at its end; a new one is made
    "membership/base/rank_id.py": "import membership.store.records\n",
    "membership/placement/plan.py": "import torch\n",
    "workers/ipc/futex.py": "import anyio\n",
    "workers/ipc/lonely.py": DOC,
    "workers/ipc/undocumented.py": "import workers.ipc.lonely_two\n",
    "elastic/room/__init__.py": DOC,
    "elastic/status.py": "def f(lock, queue):\n    assert lock\n    print(queue.get())\n",
    "elastic/explain.py": "def g():\n    try:\n        return 1\n    except Exception:\n        pass\n",
    "elastic/protocol.py": "import pickle\npickle.loads(b'')\n",
    "elastic/http_errors.py": "import httpx\ndef h(path):\n    httpx.get('x')\n    return path.read_text()\n",
    "elastic/gateway/text.py": "# somebody told the census\n",
    "elastic/gateway/schema.py": "def long():\n" + "    x = 1\n" * 60,
    "elastic/gateway/render.py": "# long\n" * 600,
    "elastic/gateway/http.py": "def by_hand(\n    a: int, b: int\n) -> None:  # fmt: skip\n    return\n",
    "tests/unit/elastic/attic/test_nothing.py": DOC,
    "docs/ARCHITECTURE.md": "`workers/ipc/gone.py`\n",
    **{f"elastic/loose_{number}.py": DOC for number in range(15)},
}
RULES = {
    "test_import_contracts", "test_dependencies_are_those_that_are_declared", "test_files_are_in_rooms",
    "test_rooms_say_what_is_in_them", "test_tests_mirror_the_rooms", "test_each_test_has_the_marker_of_its_tier",
    "test_no_file_is_dead", "test_files_are_short", "test_functions_are_short", "test_every_module_says_what_it_is_for",
    "test_no_swallowed_exceptions", "test_no_wait_without_a_deadline", "test_no_print_and_no_assert_in_the_product",
    "test_pickle_stays_on_local_queues", "test_text_files_are_utf_8_in_every_locale",
    "test_signatures_are_formatted", "test_words_with_a_better_one_are_not_used",
    "test_files_and_links_exist", "test_http_clients_of_our_own_addresses_ask_no_proxy",
}  # fmt: skip


def test_each_rule_fails_when_it_is_broken(tmp_path: Path) -> None:
    for name in tracked():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, timeout=120, check=True)
    for name, breach in BREACHES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        with (tmp_path / name).open("a") as file:
            file.write(breach)
    checks = [
        f"tests/unit/tidy/{name}" for name in ("test_sources.py", "test_tree.py", "test_words.py", "test_docs.py")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", *checks],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert set(re.findall(r"^FAILED \S+::(\w+)", done.stdout, re.MULTILINE)) == RULES, done.stdout
