"""The smaller endpoints, over real sockets: tokens, version, load, several names of a model, browsers, traces."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import httpx
import msgspec
import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from elastic.serve.options import ApiOptions
from membership.store import codec
from tests.support.gateway_cluster import MODEL, GatewayCluster, RunningGateway, wait_ready
from tests.support.helpers import eventually
from tests.support.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.integration

PAGE = "https://page.example"
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> GatewayCluster:
    cluster = GatewayCluster(tmp_path_factory.mktemp("gateway"))
    named = msgspec.structs.replace(cluster.config, served_model_aliases=("org/other",))
    cluster.store.put(cluster.keys.config, codec.encode(named))
    cluster.publish_view()
    return cluster


@pytest.fixture(scope="module")
def engine(cluster: GatewayCluster) -> Iterator[ScriptedEngine]:
    with cluster.engine(cluster.says("hello")) as engine:
        yield engine


@pytest.fixture(scope="module")
def gateway(cluster: GatewayCluster, engine: ScriptedEngine) -> Iterator[RunningGateway]:
    api = ApiOptions(access_log=True, allowed_origins=(f'["{PAGE}"]',), api_key=("k",), metrics_aliases=True)
    with cluster.gateway(api=api) as running:
        assert engine.token
        wait_ready(running)  # its sockets to the engine are no test's
        yield running


@pytest.fixture
def http(gateway: RunningGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, headers={"Authorization": "Bearer k"}, timeout=20) as client:
        yield client


def test_tokens_of_a_prompt_and_back(http: httpx.Client, cluster: GatewayCluster) -> None:
    text, tokenizer = "hello w\u00f6rld", cluster.tokenizer
    asked = {"model": MODEL, "prompt": text, "return_token_strs": True}
    answer = http.post("/tokenize", json=asked).json()
    tokens = tokenizer.encode(text)
    assert (answer["tokens"], answer["count"], answer["max_model_len"]) == (tokens, len(tokens), 128)
    assert answer["token_strs"] == [tokenizer.token_name(token) for token in tokens]
    bare = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert (bare["tokens"], bare["token_strs"]) == (tokenizer.encode(text, special=False), None)
    assert len(bare["tokens"]) < len(tokens)
    assert http.post("/detokenize", json={"tokens": bare["tokens"]}).json() == {"prompt": text}
    assert http.post("/detokenize", json={"tokens": tokens}).json()["prompt"].endswith(text)


def test_tokens_of_a_conversation_are_those_that_chat_sends(http: httpx.Client, cluster: GatewayCluster) -> None:
    messages = [{"role": "user", "content": "hello"}]
    answer = http.post("/tokenize", json={"messages": messages})
    assert answer.json()["tokens"] == cluster.tokenizer.encode_chat(messages)


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/tokenize", {}, 400, "either prompt or messages"),
        (
            "/tokenize",
            {"prompt": "x", "messages": [{"role": "user", "content": "x"}]},
            400,
            "either prompt or messages",
        ),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": False},
            400,
            "generation",
        ),
        ("/tokenize", {"prompt": "x", "model": "none"}, 404, "does not exist"),
        ("/tokenize", {"prompt": "x" * 100_000}, 400, "100000 characters"),
        ("/detokenize", {"tokens": [10**6]}, 400, "token id 1000000"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
    ],
)
def test_what_has_no_tokens(http: httpx.Client, path: str, body: dict[str, object], status: int, says: str) -> None:
    answer = http.post(path, json=body)
    assert (answer.status_code, says in answer.json()["error"]["message"]) == (status, True), answer.text


def test_version_ping_and_load_need_no_key(gateway: RunningGateway) -> None:
    eventually(lambda: httpx.get(f"{gateway.url}/ping").is_success, 30.0, "the gateway to be ready")
    assert httpx.post(f"{gateway.url}/ping").is_success
    assert httpx.get(f"{gateway.url}/version").json() == {"version": version("elastic-ep")}
    eventually(lambda: httpx.get(f"{gateway.url}/load").json() == {"server_load": 0}, 30.0, "no request to be open")
    for path in ("/tokenize", "/detokenize"):
        assert httpx.post(gateway.url + path, json={}).status_code == 401


def test_a_model_may_have_several_names(http: httpx.Client) -> None:
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == [MODEL, "org/other"]
    assert http.get("/v1/models/org/other").json()["id"] == "org/other"
    for name in (MODEL, "org/other"):
        answer = http.post("/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 4})
        assert (answer.status_code, answer.json()["model"]) == (200, name)


def test_what_a_browser_asks_first_and_then(gateway: RunningGateway) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    url = f"{gateway.url}/v1/completions"
    allowed = httpx.options(url, headers=asks | {"Origin": PAGE})
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, PAGE)
    refused = httpx.options(url, headers=asks | {"Origin": "https://other.example"})
    assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (400, False)
    answer = httpx.post(url, json={}, headers={"Origin": PAGE})  # no key: the page must be able to read that
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, PAGE)
    plain = httpx.options(url)
    assert (plain.status_code, plain.headers["allow"]) == (204, "OPTIONS, POST")


def test_a_clients_trace_is_in_the_log(http: httpx.Client) -> None:
    with structlog.testing.capture_logs() as lines:
        http.get("/v1/models", headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"})
        http.get("/v1/models", headers={"traceparent": "00-nonsense"})
        seen = eventually(
            lambda: [x["trace"] for x in lines if x["event"] == "request_ended"][1:] and lines, 30.0, "lines"
        )
    assert [line["trace"] for line in seen if line["event"] == "request_ended"] == [TRACE, None]


@pytest.mark.parametrize("sampled", [True, False])
def test_the_engine_gets_a_trace_that_is_sampled(http: httpx.Client, engine: ScriptedEngine, sampled: bool) -> None:
    trace = f"00-{TRACE}-b7ad6b7169203331-0{int(sampled)}"
    body = {"model": MODEL, "prompt": "x", "max_tokens": 2}
    assert http.post("/v1/completions", json=body, headers={"traceparent": trace}).status_code == 200
    assert engine.submits[-1].trace == (trace if sampled else "")


QUERIES = {
    "Gateway API inference extension, llm-d": (
        "vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc",
        "vllm:cache_config_info", "vllm:num_preemptions_total",
    ),
    "KEDA": (
        'sum(vllm:num_requests_waiting{model_name="tiny"}) or vector(0)', "avg(vllm:kv_cache_usage_perc)",
        "sum(rate(vllm:request_success_total[2m]))",
        "histogram_quantile(0.95, sum(rate(vllm:time_to_first_token_seconds_bucket[2m])) by (le))",
    ),
    "production-stack's dashboard": (
        "avg(vllm:e2e_request_latency_seconds_sum) / avg(vllm:e2e_request_latency_seconds_count)",
        "sum by(le) (vllm:e2e_request_latency_seconds_bucket)", "sum by(le) (vllm:time_to_first_token_seconds_bucket)",
        "avg(vllm:time_per_output_token_seconds_sum) / avg(vllm:time_per_output_token_seconds_count)",
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:gpu_cache_usage_perc",
    ),
    "vLLM's own dashboard": (
        'rate(vllm:prompt_tokens_total{model_name="tiny"}[5m])',
        'rate(vllm:generation_tokens_total{model_name="tiny"}[5m])',
        'sum by(finished_reason) (increase(vllm:request_success_total{model_name="tiny"}[5m]))',
        'rate(vllm:request_queue_time_seconds_sum{model_name="tiny"}[5m])',
        "histogram_quantile(0.99, sum by(le) (rate(vllm:inter_token_latency_seconds_bucket[5m])))",
    ),
}  # fmt: skip


@pytest.mark.parametrize("asks", QUERIES)
def test_what_others_query_is_there(http: httpx.Client, asks: str) -> None:
    """Names and labels; a query over what is not there gives nothing, and nobody notices."""
    body = {"model": MODEL, "prompt": "x", "max_tokens": 4, "stop": ["e"]}
    assert http.post("/v1/completions", json=body).status_code == 200
    shown: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            shown.setdefault(sample.name, set()).update(sample.labels)
    for query in QUERIES[asks]:
        for name in re.findall(r"vllm:\w+", query):
            wanted = {label for label in ("model_name", "finished_reason") if label in query}
            assert wanted <= shown.get(name, {"(there is no such metric)"}), (name, query)


def test_without_origins_no_page_may_read_an_answer(tmp_path: Path) -> None:
    cluster = GatewayCluster(tmp_path)
    cluster.publish_view()
    with cluster.gateway() as gateway:
        answer = httpx.get(f"{gateway.url}/v1/models", headers={"Origin": PAGE})
    assert (answer.status_code, "access-control-allow-origin" in answer.headers) == (200, False)
