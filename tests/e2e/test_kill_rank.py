"""Kill any rank while requests stream: nothing is lost, duplicated or altered, and a replacement rejoins."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import jsonschema
import pytest

from chaos.faults import kill
from chaos.target.cluster import ServedCluster
from chaos.target.warm_start import WarmStart
from chaos.workload.history import compare
from chaos.workload.streams import PREAMBLE, Workload
from membership.base.events import Event
from membership.base.failpoints import ENV
from tests.support.helpers import eventually
from tests.support.served import STEADY, fault_free, role_pid, shows, streaming

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

RANKS = 4
SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 10**6},
        "words": {"type": "array", "items": {"enum": ["for", "while", "with"]}, "minItems": 4, "maxItems": 6},
    },
    "required": ["n", "words"],
    "additionalProperties": False,
}


def back_as_new(cluster: ServedCluster, rank: int, incarnation: int) -> bool:
    status = cluster.status()
    states = {r["rank"]: r for r in status["ranks"]}
    return (
        status["state"] == "serving"
        and len(states) == RANKS
        and all(r["state"] == "serving" for r in states.values())
        and states[rank]["incarnation"] > incarnation
    )


def lost_one(cluster: ServedCluster, epoch: int) -> bool:
    """Whether a view after this epoch says so: a later start of the successor is then a view of its own."""
    status = cluster.status()
    serving = [rank for rank in status["ranks"] if rank["state"] == "serving"]
    return status["epoch"] > epoch and len(serving) == RANKS - 1


def structured(cluster: ServedCluster) -> list[str]:
    """Sampled answers that must be JSON of a schema, all asked for at once."""
    form = {"type": "json_schema", "json_schema": {"name": "record", "schema": SCHEMA}}
    body = {
        "model": cluster.model_name(), "prompt": ["The for statement", "A list is"] * 2, "max_tokens": 300, "seed": 7,
        "temperature": 1.0, "response_format": form,
    }  # fmt: skip
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=120.0)
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    return [choice["text"] for choice in choices]


def test_each_rank_in_turn(demo_model: Path, tmp_path: Path, warm: WarmStart) -> None:
    """Every request is exact, structured ones too; and tokens keep coming while a rank has no replacement yet."""
    gate = tmp_path / "gate"
    gate.touch()
    faults = {ENV: f"agent.before.spawn=wait:{gate}"}
    with (
        ThreadPoolExecutor(1) as pool,
        ServedCluster(demo_model, RANKS, state_dir=tmp_path / "state", environ=faults, warm=warm) as cluster,
    ):
        cluster.wait_serving(RANKS)
        oracle = fault_free(cluster)
        formed = structured(cluster)
        for text in formed:
            jsonschema.validate(json.loads(text), SCHEMA)
        epochs = [cluster.status()["epoch"]]
        workload = Workload(cluster.url, cluster.model_name(), STEADY)
        workload.start()
        try:
            for rank in range(RANKS):
                eventually(lambda: streaming(workload, 4), 60.0, "four streams under way")
                victim = next(r for r in cluster.status()["ranks"] if r["rank"] == rank)
                gate.unlink()
                again = pool.submit(structured, cluster)
                eventually(lambda: cluster.status()["requests"]["running"] > 4, 60.0, "structured requests under way")
                killed = kill(victim["pid"])
                assert killed.gone_at >= killed.sent_at
                cluster.wait_event(lambda e, v=victim: masked(e) == v["incarnation"], f"rank {rank} masked")
                ended = len(workload.records())
                eventually(
                    lambda n=ended: len(workload.records()) > n + 4, 60.0, f"requests ending without rank {rank}"
                )
                assert again.result(120.0) == formed
                eventually(lambda n=epochs[-1]: lost_one(cluster, n), 60.0, f"a view without rank {rank}")
                gate.touch()
                eventually(
                    lambda r=rank, v=victim: back_as_new(cluster, r, v["incarnation"]), 60.0, f"rank {rank} as new"
                )
                epochs.append(cluster.status()["epoch"])
        finally:
            gate.touch()
            history = workload.stop()
        the_second_turn_computes_what_is_new(cluster)
        what_a_dead_rank_had_computed_is_read(cluster)
    verdict = compare(history, oracle)
    assert verdict.ok, verdict.differences
    assert all(later >= earlier + 2 for earlier, later in itertools.pairwise(epochs)), epochs


def the_second_turn_computes_what_is_new(cluster: ServedCluster) -> None:
    """The same prompt again, then with the answer to it: what the rank has of it is not computed, and shown as such."""
    body = {"model": cluster.model_name(), "max_tokens": 20, "temperature": 0, "ignore_eos": True}

    def ask(prompt: str) -> tuple[str, int, int]:
        answer = httpx.post(f"{cluster.url}/v1/completions", json=body | {"prompt": prompt}, timeout=60.0).json()
        usage = answer["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return answer["choices"][0]["text"], usage["prompt_tokens"], cached

    text, tokens, cached = ask(PREAMBLE)
    assert (tokens > 3 * 16, cached) == (True, 0)
    full = (tokens - 1) // 16 * 16
    assert ask(PREAMBLE) == (text, tokens, full)
    *_, longer = ask(PREAMBLE + text)
    assert longer >= full
    eventually(lambda: cluster.status()["prefix_cache"]["cached_tokens"] >= full + longer, 60.0, "the status")
    shows(cluster, lambda text: hits(text) >= full + longer, "what was had from the cache")


def what_a_dead_rank_had_computed_is_read(cluster: ServedCluster) -> None:
    """Each of its requests goes on with all its full blocks, and the same text; then its pool is freed."""
    chance = random.Random(4)
    prompts = [[chance.randrange(2, 1000) for _ in range(400)] for _ in range(8)]
    begun = threading.Barrier(len(prompts) + 1)

    def ask(prompt: list[int], pause: Callable[[], object]) -> str:
        body = {"model": cluster.model_name(), "prompt": prompt, "max_tokens": 200, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True}
        text = ""
        with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=120.0) as answer:
            for number, line in enumerate(line for line in answer.iter_lines() if line.startswith("data: {")):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                if number == 3:
                    pause()
        return text

    victim = next(rank for rank in cluster.status()["ranks"] if rank["rank"] == 1)
    with ThreadPoolExecutor(len(prompts)) as pool:
        running = [pool.submit(ask, prompt, lambda: begun.wait(120.0)) for prompt in prompts]
        begun.wait(120.0)
        kill(victim["pid"])
        mask = cluster.wait_event(lambda e: masked(e) == victim["incarnation"], "the mask")
        texts = [each.result(timeout=120.0) for each in running]
        assert texts == list(pool.map(lambda prompt: ask(prompt, lambda: None), prompts))
    assert mask.fields["requests"] >= 1
    read = [event.fields for event in cluster.events() if event.kind == "request_salvaged"]
    read = [fields for fields in read if fields["request_id"] in mask.fields["request_ids"]]
    assert len(read) == mask.fields["requests"]
    assert all(fields["tokens"] >= 400 for fields in read), read
    eventually(lambda: back_as_new(cluster, 1, victim["incarnation"]), 60.0, "rank 1 as new")
    agent = role_pid(cluster, "agent")
    eventually(lambda: pools_of(agent) == RANKS, 60.0, "one KV pool per rank")


def pools_of(agent: int) -> int:
    """How many KV pools an agent has."""
    found = 0
    for name in os.listdir(f"/proc/{agent}/fd"):
        with suppress(FileNotFoundError):
            found += "memfd:elastic-ep-kv" in os.readlink(f"/proc/{agent}/fd/{name}")
    return found


def hits(metrics: str) -> float:
    found = re.search(r"^elastic_ep_prefix_cache_hits_total (\S+)$", metrics, re.MULTILINE)
    return float(found[1]) if found is not None else 0.0


def masked(event: Event) -> int:
    """The incarnation that the event says was masked."""
    return int(event.fields["incarnation"]) if event.kind == "rank_masked" else 0
