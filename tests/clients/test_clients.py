"""Each client's program in the clients' own environment, against one served model: nothing fails, refusals are known.

`make test` makes that environment (`.cache/clients`) and runs these; `make clients` adds the large ones.
"""

from __future__ import annotations

import shutil

import pytest

from tests.clients.conftest import CLIENTS, TIMEOUT_S, Use

pytestmark = [pytest.mark.clients, pytest.mark.timeout(TIMEOUT_S)]
LARGE = pytest.mark.skipif(not (CLIENTS / ".all").exists(), reason="only make clients installs it, since it takes long")


@pytest.mark.parametrize(
    "program",
    [
        "tests.clients.use_openai", "tests.clients.use_litellm", "tests.clients.use_langchain",
        "tests.clients.use_instructor", pytest.param("tests.clients.use_agents", marks=LARGE),
    ],
)  # fmt: skip
def test_a_client_of_python(use: Use, program: str) -> None:
    use("python", "-m", program)


def test_the_client_of_node(use: Use) -> None:
    program = CLIENTS / "use_openai.mjs"  # beside what it imports
    shutil.copy(CLIENTS.parents[1] / "tests" / "clients" / program.name, program)
    use("node", str(program))
