"""What the tests of a served cluster share: its command line, requests and what they yield, its processes.

What a request yields without a fault is the same bits on any number of ranks: it is asked once per model, of the first
cluster that served it, before anything was done to it.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
from msgspec.structs import replace

from chaos.target.cluster import ServedCluster
from chaos.target.warm_start import WarmProcess
from chaos.workload.history import RequestRecord, compare
from chaos.workload.streams import FULL, PROMPTS, Load, Workload
from membership.base.errors import StoreError
from membership.base.process_stats import command_words
from tests.support.helpers import eventually

STEADY = replace(FULL, rest_s=2.0)  # FULL takes all of the machine, also from the test that runs beside
CALM = replace(FULL, streams=4, rest_s=1.0)  # for faults that last as long as leases do
COMMAND_S = 150.0  # max time of a command, on a busy machine
_records: dict[str, dict[int, RequestRecord]] = {}


_texts: dict[tuple[str, int], list[str]] = {}


def command(
    cluster: ServedCluster, *arguments: str, environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`elastic ARGUMENTS` of this cluster to its end, in a process that was forked from where the cluster was."""
    words = [*arguments, "--state-dir", str(cluster.state.path)]
    variables = {**os.environ, **(environ or {})}
    if cluster.warm is not None:
        return cluster.warm.run(words, variables, COMMAND_S)
    started = [sys.executable, "-m", "elastic.cli", *words]
    return subprocess.run(started, env=variables, capture_output=True, text=True, timeout=COMMAND_S, check=False)


def elastic(cluster: ServedCluster, *arguments: str) -> Any:
    """What a command says as JSON: in its last line."""
    outcome = command(cluster, *arguments, "-o", "json")
    assert outcome.returncode == 0, outcome.stderr
    return json.loads(outcome.stdout.strip().splitlines()[-1])


def elastic_text(cluster: ServedCluster, *arguments: str) -> str:
    """What it says for people."""
    outcome = command(cluster, *arguments)
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


def refused(cluster: ServedCluster, *arguments: str) -> str:
    """The one line with which it is refused."""
    outcome = command(cluster, *arguments)
    assert outcome.returncode == 1, outcome
    assert (outcome.stderr.startswith("error: "), outcome.stderr.count("\n")) == (True, 1), outcome.stderr
    return outcome.stderr


@contextmanager
def another(cluster: ServedCluster, *arguments: str, environ: Mapping[str, str] | None = None) -> Iterator[WarmProcess]:
    """One more process of a cluster, as of another host: `elastic agent --node second`. It is killed at the end."""
    assert cluster.warm is not None
    words = [*arguments, "--state-dir", str(cluster.state.path)]
    with cluster.state.log(f"another-{arguments[0]}").open("ab") as out:
        process = cluster.warm.start(words, {**os.environ, **(environ or {})}, out.fileno())
    try:
        yield process
    finally:
        process.kill()
        process.wait(30.0)
        process.close()


def completion(cluster: ServedCluster) -> str:
    body = {"model": cluster.model_name(), "prompt": "The for statement", "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60.0)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def stream_all(cluster: ServedCluster, model: str, max_tokens: int) -> list[concurrent.futures.Future[str]]:
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=180.0)

    def one(prompt: str) -> str:
        stream = client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)

    pool = concurrent.futures.ThreadPoolExecutor(16, thread_name_prefix="asyncio_client")
    futures = [pool.submit(one, prompt) for prompt in PROMPTS[:16]]
    pool.shutdown(wait=False)
    return futures


def texts_of(cluster: ServedCluster, model: str, max_tokens: int) -> list[str]:
    """What `stream_all` yields without a fault, whatever the number of ranks: asked once, of the first cluster."""
    if (model, max_tokens) not in _texts:
        _texts[model, max_tokens] = [f.result(timeout=180) for f in stream_all(cluster, model, max_tokens)]
    return _texts[model, max_tokens]


def fault_free(cluster: ServedCluster) -> dict[int, RequestRecord]:
    """By the number of the request; from the first cluster that served this model, before anything was done to it."""
    model = cluster.model_name()
    if model not in _records:
        records = Workload(cluster.url, model).run_once()
        assert all(record.complete for record in records), [record.error for record in records if not record.complete]
        _records[model] = {record.prompt: record for record in records}
    return _records[model]


@contextmanager
def under_load(cluster: ServedCluster, load: Load = STEADY, busy: int = 2) -> Iterator[Workload]:
    """Requests stream during the block, `busy` of them from its start; each must come out as without any fault."""
    oracle = fault_free(cluster)
    workload = Workload(cluster.url, cluster.model_name(), load)
    workload.start()
    try:
        eventually(lambda: streaming(workload, busy), 60.0, f"{busy} streams under way")
        yield workload
    finally:
        history = workload.stop()
    verdict = compare(history, oracle)
    assert verdict.ok, verdict.differences


def streaming(workload: Workload, streams: int = 2) -> bool:
    """Whether at least `streams` requests have had some tokens and are still open."""
    return sum(count > 2 for count in workload.open_streams().values()) >= streams


def answered(ask: Callable[[], bool]) -> bool:
    """False while the store cannot be asked."""
    try:
        return ask()
    except StoreError:
        return False


def shows(cluster: ServedCluster, wanted: Callable[[str], bool], what: str) -> None:
    """Wait until its metrics are as `wanted`: the gateway may be a moment behind what the store or history says."""
    eventually(lambda: wanted(httpx.get(f"{cluster.url}/metrics", timeout=60.0).text), 60.0, f"metrics with {what}")


def role_pid(cluster: ServedCluster, role: str) -> int:
    """Process id of a role, by the command line of the supervisor's children; of two engines, the one in office."""
    if role == "engine":
        record = cluster.client().state().engine
        assert record is not None, "no engine in office"
        return record.pid
    for child in psutil.Process(cluster.pid).children(recursive=True):
        command = command_words(child.pid)
        if role == "etcd" and command and Path(command[0]).name == "etcd":
            return child.pid
        if command[1:4] == ["-m", "elastic.cli", role]:
            return child.pid
    raise AssertionError(f"no process of role {role}")
