"""README's "Two hosts", word for word: its lines are typed on two hosts that have nothing but an etcd in common."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import httpx
import pytest

from chaos.faults.netns import inside
from chaos.target.cluster import Cluster
from chaos.target.host_cluster import PYTHON
from elastic.serve.etcd_server import EtcdServer
from elastic.serve.state_dir import StateDir
from membership.base import starter
from tests.support.helpers import eventually
from tests.support.hosts import Hosts, made_hosts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

README = Path(__file__).parents[2] / "README.md"
TYPED = re.compile(r"^ {4}host ([AB]): {2}(elastic .+)$", re.MULTILINE)
QUESTION = {"model": "demo-moe", "prompt": "The for statement", "max_tokens": 24, "temperature": 0.0}
START_S = 240.0
PATIENCE = ("--ready-timeout", f"{START_S:g}s")  # all that is added: the machine of a test may be busy


class Typist:
    """Types at both hosts what README has, with names of this machine for those that it leaves to the reader."""

    def __init__(self, hosts: Hosts, folder: Path, model: Path, etcd: str, ends: ExitStack) -> None:
        self.hosts, self._folder, self._ends = hosts, folder, ends
        self.secret = folder / "copy-of-join-secret"
        self._means = {
            "MODEL": str(model), "URLS": etcd, "FILE": str(self.secret),
            "10.0.0.1": hosts.addresses["a"], "10.0.0.2": hosts.addresses["b"],
        }  # fmt: skip

    def words(self, line: str) -> list[str]:
        return [*PYTHON, *(self._means.get(word, word) for word in shlex.split(line)[1:])]

    def environ(self, host: str) -> dict[str, str]:
        return {"XDG_STATE_HOME": str(self._folder / host), starter.ENV: starter.named()}

    def leave_running(self, host: str, line: str, *more: str) -> None:
        log = self._folder / f"{host}.log"
        process = self.hosts.start(host, [*self.words(line), *more], log, self.environ(host))
        self._ends.callback(process.wait, 60)
        self._ends.callback(process.terminate)

    def run(self, host: str, line: str) -> str:
        typed, environ = self.hosts.command(host, *self.words(line)), {**os.environ, **self.environ(host)}
        outcome = subprocess.run(typed, env=environ, capture_output=True, text=True, timeout=START_S)
        assert outcome.returncode == 0, outcome.stderr
        return outcome.stdout

    def state_of(self, host: str) -> Path | None:
        """Its state directory, once it is there."""
        return next((path.parent for path in self._folder.glob(f"{host}/elastic-ep/*/cluster.json")), None)

    def answer(self) -> str:
        """Of host A's gateway, to somebody on host A."""
        ask = partial(httpx.post, "http://127.0.0.1:8000/v1/completions", json=QUESTION, timeout=120, trust_env=False)
        found = inside(self.hosts.namespace("a"), ask, 150)
        assert found.status_code == 200, found.text
        return str(found.json()["choices"][0]["text"])


@pytest.fixture
def typist(tmp_path: Path, demo_model: Path) -> Iterator[Typist]:
    with ExitStack() as ends:
        hosts = ends.enter_context(made_hosts("a", "b"))
        etcd = ends.enter_context(EtcdServer(tmp_path / "etcd", address=hosts.outside))
        yield Typist(hosts, tmp_path, demo_model, etcd.url, ends)


def nodes(cluster: Cluster) -> list[str]:
    """Of the ranks that serve, none of which is masked."""
    status = cluster.status()
    serving = status["state"] == "serving" and all(rank["state"] == "serving" for rank in status["ranks"])
    return sorted(rank["node"] for rank in status["ranks"]) if serving else []


def has_done_its_imports(cluster: Cluster, node: str) -> bool:
    """Before that its ranks may not register in time on a busy machine, and the scale is rolled back."""
    agent = cluster.client().state().agents.get(node)
    return agent is not None and not agent.importing


def test_what_readme_says_about_two_hosts_is_all_that_it_takes(typist: Typist, request: pytest.FixtureRequest) -> None:
    typed = TYPED.findall(README.read_text(encoding="utf-8"))
    assert [host for host, _ in typed] == ["A", "B", "A"], "README has another procedure: type that one here"
    (_, serve), (_, agent), (_, scale) = typed
    typist.leave_running("a", serve, *PATIENCE)
    state = eventually(lambda: typist.state_of("a"), START_S, "host A's state directory")
    cluster = Cluster(StateDir(state))
    request.addfinalizer(cluster.close)
    eventually(lambda: nodes(cluster) == ["a", "a"], START_S, "two ranks on host A")
    before = typist.answer()
    shutil.copy(state / "join-secret", typist.secret)
    typist.leave_running("b", agent)
    eventually(lambda: has_done_its_imports(cluster, "b"), START_S, "host B to be there")
    typist.run("a", scale)
    eventually(lambda: nodes(cluster) == ["a", "a", "b", "b"], START_S, "two ranks on each host")
    assert typist.answer() == before, "the same bits as on one host"
    typist.hosts.kill("b")
    assert typist.answer() == before, "and host B may die"
