"""The OpenAI API over real sockets, with the official client and a scripted engine behind real ZeroMQ."""

from __future__ import annotations

import gzip
import json
import re
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI

from elastic.gateway.schema import seed_for
from elastic.protocol import Rejected
from elastic.serve.options import ApiOptions
from membership.base.enums import GenerationConfig
from tests.support.gateway_cluster import MODEL, GatewayCluster, RunningGateway, wait_ready
from tests.support.helpers import eventually
from tests.support.scripted_engine import ScriptedEngine
from workers.protocol.messages import Shaping

pytestmark = pytest.mark.integration

TEXT = "hello wörld, this is 😀 a test"
USER = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> GatewayCluster:
    cluster = GatewayCluster(tmp_path_factory.mktemp("gateway"))
    cluster.publish_view()
    return cluster


@pytest.fixture(scope="module")
def engine(cluster: GatewayCluster) -> Iterator[ScriptedEngine]:
    def refuse(submit: object) -> Rejected | None:
        if "full" not in cluster.tokenizer.decode(submit.prompt):
            return None
        return Rejected(running.token, submit.request_id, 503, "no room for it", 7.0)

    with cluster.engine(cluster.says(TEXT), reject=refuse) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(cluster: GatewayCluster, engine: ScriptedEngine) -> Iterator[RunningGateway]:
    with cluster.gateway() as running:
        wait_ready(running)  # its sockets to the engine are no test's
        yield running


@pytest.fixture(scope="module")
def client(gateway: RunningGateway) -> Iterator[OpenAI]:
    with gateway.client() as client:
        yield client


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("org/other")


def test_completion(client: OpenAI, cluster: GatewayCluster, engine: ScriptedEngine) -> None:
    answer = client.completions.create(model=MODEL, prompt="say hello", max_tokens=60, temperature=0, top_p=0.9, seed=3)
    prompt = cluster.tokenizer.encode("say hello")
    words = cluster.tokenizer.encode(TEXT)[1:]
    assert answer.choices[0].text == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), len(words))
    submit = engine.submits[-1]
    assert (submit.prompt, submit.max_tokens, submit.emitted) == (prompt, 60, [])
    assert (submit.sampling.temperature, submit.sampling.top_p, submit.sampling.seed) == (0, 0.9, 3)
    assert submit.sampling.logprobs == -1


def test_completion_of_default_length(client: OpenAI, cluster: GatewayCluster) -> None:
    answer = client.completions.create(model=MODEL, prompt="say hello")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert TEXT.startswith(answer.choices[0].text.rstrip("\ufffd"))


def test_completion_stream(client: OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="x", max_tokens=60, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == TEXT
    assert not any("\ufffd" in chunk.choices[0].text for chunk in chunks[:-1])
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 10


@pytest.mark.parametrize("version", [b"1.0", b"0.9"])
def test_a_stream_to_an_old_client_has_no_chunks(
    gateway: RunningGateway, engine: ScriptedEngine, version: bytes
) -> None:
    """It ends with the connection, whichever way its parts go."""
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 60, "stream": True}).encode()
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(b"POST /v1/completions HTTP/%b\r\nContent-Length: %d\r\n\r\n%b" % (version, len(body), body))
        head, _, rest = b"".join(iter(partial(client.recv, 65536), b"")).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    events = [line.removeprefix("data: ") for line in rest.decode().split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == TEXT


def test_usage_in_every_chunk(client: OpenAI) -> None:
    """As guidellm asks for it."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client.completions.create(model=MODEL, prompt="x", max_tokens=9, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[-1], chunks[-1].usage.total_tokens - chunks[-1].usage.prompt_tokens) == (9, 9)
    assert len(set(counts)) > 3


def test_chat(client: OpenAI, cluster: GatewayCluster, engine: ScriptedEngine) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=USER)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].message.role == "assistant"
    assert answer.object == "chat.completion"
    assert cluster.tokenizer.decode(engine.submits[-1].prompt) == "<user>hello\n<assistant>"
    assert engine.submits[-1].max_tokens == 128 - len(engine.submits[-1].prompt)


def test_chat_stream(client: OpenAI, gateway: RunningGateway) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    chunks = list(
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": parts}], stream=True)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    raw = httpx.post(
        f"{gateway.url}/v1/chat/completions", json={"model": MODEL, "messages": USER, "stream": True}, timeout=20
    )
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.text.endswith("\n\ndata: [DONE]\n\n")


def test_what_a_request_does_not_say_the_checkpoint_does(tmp_path: Path) -> None:
    cluster = GatewayCluster(tmp_path)
    (tmp_path / "model" / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20}', encoding="utf-8")
    cluster.publish_view()
    with cluster.engine(cluster.says(TEXT)) as engine:
        with cluster.gateway() as gateway, gateway.client() as client:
            client.completions.create(model=MODEL, prompt="one", max_tokens=60)
            client.completions.create(model=MODEL, prompt="one", max_tokens=60, temperature=1, top_p=0.5)
        with (
            cluster.gateway("other", api=ApiOptions(generation_config=GenerationConfig.NONE)) as gateway,
            gateway.client() as client,
        ):
            client.completions.create(model=MODEL, prompt="one", max_tokens=60)
    said = [(s.sampling.temperature, s.sampling.top_p, s.sampling.top_k) for s in engine.submits]
    assert said == [(0.6, 1.0, 20), (1.0, 0.5, 20), (1.0, 1.0, 0)]


def test_sampling_settings_reach_the_engine(client: OpenAI, cluster: GatewayCluster, engine: ScriptedEngine) -> None:
    extra = {
        "repetition_penalty": 1.1, "min_p": 0.05, "min_tokens": 3, "allowed_token_ids": [9, 4], "bad_words": ["hello"],
        "stop_token_ids": [7],
    }  # fmt: skip
    client.completions.create(
        model=MODEL, prompt="x", max_tokens=4, frequency_penalty=0.5, presence_penalty=-1, logit_bias={"5": 2.5},
        extra_body=extra,
    )  # fmt: skip
    encode = partial(cluster.tokenizer.encode, special=False)
    assert engine.submits[-1].sampling.min_p == 0.05
    assert engine.submits[-1].sampling.shaping == Shaping(
        repetition_penalty=1.1, frequency_penalty=0.5, presence_penalty=-1, bias=[(5, 2.5)],
        allowed=np.array([4, 9], np.uint32).tobytes(), min_tokens=3, end_tokens=[7],
        bad_words=[encode("hello")] + ([encode(" hello")] if len(encode(" hello")) == len(encode("hello")) else []),
    )  # fmt: skip


def test_a_token_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    """A tokenizer may have more tokens than its model has embeddings; such a prompt must not reach a rank."""
    cluster = GatewayCluster(tmp_path)
    settings = tmp_path / "model" / "tokenizer_config.json"
    extra = {"additional_special_tokens": ["<late>"]}
    settings.write_text(json.dumps(json.loads(settings.read_text(encoding="utf-8")) | extra), encoding="utf-8")
    cluster.publish_view()
    size = cluster.config.vocab_size
    with cluster.engine(cluster.says(TEXT)) as engine, cluster.gateway() as gateway, gateway.client() as client:
        with pytest.raises(openai.BadRequestError, match=f"prompt: token id {size} is not in the vocabulary"):
            client.completions.create(model=MODEL, prompt="one <late>", max_tokens=60)
        with pytest.raises(openai.BadRequestError, match=f"messages: token id {size} is not in the vocabulary"):
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "<late>"}])
    assert engine.submits == []


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_differ_in_seed_only(client: OpenAI, engine: ScriptedEngine, stream: bool) -> None:
    before = len(engine.submits)
    asked = {"model": MODEL, "prompt": ["one", "two three"], "n": 2, "seed": 5, "max_tokens": 60}
    answer = client.completions.create(**asked, stream=stream)
    texts = {index: "" for index in range(4)}
    for choice in [c for chunk in answer for c in chunk.choices] if stream else answer.choices:
        texts[choice.index] += choice.text
    assert texts == dict.fromkeys(range(4), TEXT)
    submits = sorted(engine.submits[before:], key=lambda s: s.request_id)
    assert [s.sampling.seed for s in submits] == [seed_for(5, choice) for choice in range(4)]
    assert submits[0].prompt == submits[1].prompt != submits[2].prompt


def test_without_a_seed_one_is_drawn_so_that_a_replay_is_exact(client: OpenAI, engine: ScriptedEngine) -> None:
    for _ in range(2):
        client.completions.create(model=MODEL, prompt="x", max_tokens=1)
    assert engine.submits[-1].sampling.seed != engine.submits[-2].sampling.seed


def test_prompt_as_token_ids(client: OpenAI, engine: ScriptedEngine) -> None:
    client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=1)
    assert engine.submits[-1].prompt == [5, 6, 7]
    client.completions.create(model=MODEL, prompt=[[5], [6, 7]], max_tokens=1)
    assert sorted(s.prompt for s in engine.submits[-2:]) == [[5], [6, 7]]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string(client: OpenAI, engine: ScriptedEngine, stream: bool) -> None:
    engine.pause_after = 12  # the stop string is complete by then; the engine does not know that it is over
    answer = client.completions.create(model=MODEL, prompt="x", max_tokens=60, stop=["zzz", "rld, t"], stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == "hello wö"
    assert choices[-1].finish_reason == "stop"
    eventually(lambda: engine.submits[-1].request_id in engine.aborts, 30.0, "the engine to get an abort")
    engine.pause_after = None  # only now: an engine that may go on can end before the abort


def test_completion_logprobs(client: OpenAI, cluster: GatewayCluster) -> None:
    answer = client.completions.create(model=MODEL, prompt="x", max_tokens=60, logprobs=2)
    found = answer.choices[0].logprobs
    words = cluster.tokenizer.encode(TEXT)[1:]
    assert found is not None
    assert found.tokens is not None
    assert len(found.tokens) == len(words)
    assert found.token_logprobs == [-0.5] * len(words)
    assert all(len(top) == 2 for top in found.top_logprobs)
    assert found.text_offset[0] == 0
    assert found.text_offset == sorted(found.text_offset)
    whole = [(name, offset) for name, offset in zip(found.tokens, found.text_offset, strict=True) if "\\x" not in name]
    assert all(TEXT[offset:].startswith(name) for name, offset in whole)


def test_chat_logprobs_add_up_to_the_bytes_of_the_text(client: OpenAI) -> None:
    asked = {"model": MODEL, "messages": USER, "logprobs": True, "top_logprobs": 1}
    answer = client.chat.completions.create(**asked)
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == TEXT
    assert all(len(entry.top_logprobs) == 1 for entry in content)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert streamed == content


def ends(gateway: RunningGateway) -> dict[str, float]:
    told = httpx.get(f"{gateway.url}/metrics", timeout=20).text
    counts = re.findall(r'requests_finished_total{reason="(\w+)"} (\S+)', told)
    return {reason: float(count) for reason, count in counts}


def test_the_engines_refusal_reaches_the_client_and_is_no_error(client: OpenAI, gateway: RunningGateway) -> None:
    before = ends(gateway)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="no room for it") as refusal:
            client.completions.create(model=MODEL, prompt="full", stream=stream)
        assert refusal.value.status_code == 503
        assert refusal.value.response.headers["retry-after"] == "7"
    assert ends(gateway) == before | {"refused": before["refused"] + 2}


def test_lm_eval_scores_a_continuation(client: OpenAI, cluster: GatewayCluster) -> None:
    """The request of its `local-completions`, and how it reads the answer; also where the answer ends at once."""
    context, continuation = cluster.tokenizer.encode("say hello"), cluster.tokenizer.encode(" wörld")[1:]
    for max_tokens in (1, 60):
        answer = client.completions.create(
            model=MODEL, prompt=[context + continuation], temperature=0, max_tokens=max_tokens, logprobs=1, seed=1234,
            echo=True,
        )  # fmt: skip
        found = answer.choices[0].logprobs
        more = 1 if max_tokens == 1 else len(cluster.tokenizer.encode(TEXT)[1:]) + 1  # with the end token
        assert found is not None
        assert len(found.tokens) == len(found.token_logprobs) == len(context + continuation) + more
        assert found.token_logprobs[0] is found.top_logprobs[0] is None
        scores = found.token_logprobs[len(context) : -more]
        assert scores == [-token / 100 for token in continuation]
        likeliest = [max(top.values()) for top in found.top_logprobs[len(context) : -more]]
        assert scores == likeliest
    text = answer.choices[0].text
    assert text == "say hello wörld" + TEXT
    offsets = zip(found.text_offset, found.tokens, strict=True)
    assert all(text[at:].startswith(name) for at, name in offsets if name[0] != "<" and "\\x" not in name)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored_without_an_answer(client: OpenAI, cluster: GatewayCluster, stream: bool) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="say hello", max_tokens=0, logprobs=0, echo=True, stream=stream,
        stream_options={"include_usage": True} if stream else openai.omit,
    )  # fmt: skip
    parts = list(answer) if stream else [answer]
    choices = [choice for part in parts for choice in part.choices]
    assert "".join(choice.text for choice in choices) == "say hello"
    assert choices[-1].finish_reason == "length"
    tokens = cluster.tokenizer.encode("say hello")
    assert [s for c in choices for s in c.logprobs.token_logprobs] == [None, *(-token / 100 for token in tokens[1:])]
    assert (parts[-1].usage.prompt_tokens, parts[-1].usage.completion_tokens) == (len(tokens), 0)


def test_prompt_logprobs_in_vllms_shape(client: OpenAI, cluster: GatewayCluster) -> None:
    body = {"prompt_logprobs": 2}
    completion = client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=2, extra_body=body)
    wanted = [
        {str(each): {"logprob": -each / 100, "rank": rank, "decoded_token": cluster.tokenizer.decode([each])}
         for rank, each in enumerate((token, token + 1), 1)}
        for token in (6, 7)
    ]  # fmt: skip
    found = completion.choices[0].prompt_logprobs
    assert found[0] is None
    assert [{key: value | {"decoded_token": ""} for key, value in each.items()} for each in found[1:]] == [
        {key: value | {"decoded_token": ""} for key, value in each.items()} for each in wanted
    ]
    chat = client.chat.completions.create(model=MODEL, messages=USER, max_tokens=2, extra_body=body)
    assert len(chat.prompt_logprobs) == chat.usage.prompt_tokens


# Words by which litellm and LangChain know it, and try a shorter prompt or another model.
TOO_LONG = "and this model's maximum context length is 128 tokens"
BAD = [
    (b"{", 400, "not valid JSON", None),
    (b'{"model": "tiny", "prompt": "\xff"}', 400, "not valid JSON", None),
    (b"[" * 50_000, 400, "not valid JSON", None),
    ({"model": MODEL, "prompt": "x", "colour": "red"}, 400, "unknown field: colour", "colour"),
    ({"model": MODEL, "prompt": "x", "n": 100_000}, 400, "less than or equal to 16", "n"),
    ({"model": MODEL, "prompt": "x", "best_of": 3}, 400, "best_of other than n", "best_of"),
    ({"model": MODEL, "prompt": "x", "prompt_logprobs": 1, "stream": True}, 400, "not streamed", "prompt_logprobs"),
    ({"model": MODEL, "prompt": "x", "temperature": "hot"}, 400, "valid number", "temperature"),
    ({"model": MODEL, "prompt": "x", "top_k": 2**70}, 400, "less than or equal to", "top_k"),
    ({"model": MODEL, "prompt": "x", "stop_token_ids": [2**70]}, 400, "less than or equal to", "stop_token_ids.0"),
    ({"model": MODEL, "prompt": "x", "stop_token_ids": [-1]}, 400, "greater than or equal to 0", "stop_token_ids.0"),
    ({"model": MODEL, "prompt": "x", "max_tokens": 0}, 400, "must be at least 1", "max_tokens"),
    ({"model": MODEL, "prompt": "x", "max_tokens": 1.5}, 400, "valid integer", "max_tokens"),
    ({"model": MODEL, "prompt": "x", "logprobs": 21}, 400, "less than or equal to 20", "logprobs"),
    ({"model": MODEL, "prompt": "x", "stop": ["a"] * 17}, 400, "at most 16", "stop"),
    ({"model": MODEL, "prompt": "x", "logit_bias": {"a": 1}}, 400, "'a' is not a token id", "logit_bias"),
    ({"model": MODEL, "prompt": "x", "logit_bias": {"99999": 1}}, 400, "not in the vocabulary", "logit_bias"),
    ({"model": MODEL, "prompt": "x", "logit_bias": {"1": 101}}, 400, "less than or equal to 100", "logit_bias.1"),
    ({"model": MODEL, "prompt": "x", "allowed_token_ids": [99999]}, 400, "vocabulary", "allowed_token_ids"),
    (
        {"model": MODEL, "prompt": "x", "allowed_token_ids": [3], "stop_token_ids": [3], "min_tokens": 1},
        400,
        "leave none of them",
        "allowed_token_ids",
    ),
    ({"model": MODEL, "prompt": "x", "min_tokens": 5, "max_tokens": 4}, 400, "more than max_tokens=4", "min_tokens"),
    ({"model": MODEL, "prompt": {"a": 1}}, 400, "prompt must be", "prompt"),
    ({"model": MODEL, "prompt": []}, 400, "must not be empty", "prompt"),
    ({"model": MODEL, "prompt": ["x"] * 40, "n": 2}, 400, "more than 64 choices", "prompt"),
    ({"model": MODEL, "prompt": [10**6]}, 400, "not in the vocabulary", "prompt"),
    ({"model": MODEL, "prompt": [1] * 128}, 400, f"128 tokens, {TOO_LONG}", "prompt"),
    ({"model": MODEL, "prompt": "long " * 200}, 400, f"tokens, {TOO_LONG}", "prompt"),
    ({"model": MODEL, "prompt": "long " * 800_000}, 400, f"4000000 characters, {TOO_LONG}", "prompt"),
    ({"model": MODEL, "prompt": [1] * 100, "max_tokens": 29}, 400, f"max_tokens is 29, {TOO_LONG}", "max_tokens"),
    (
        {"model": MODEL, "prompt": "x", "stream_options": {"include_usage": True}},
        400,
        "stream is true",
        "stream_options",
    ),
    ({"model": "gpt-5", "prompt": "x"}, 404, "does not exist", "model"),
    ({"prompt": "x"}, 400, "model is required", "model"),
    ([1, 2], 400, "object", None),
]


@pytest.mark.parametrize(("body", "status", "message", "param"), BAD)
def test_bad_completion(gateway: RunningGateway, body: object, status: int, message: str, param: str | None) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(f"{gateway.url}/v1/completions", content=content, timeout=20)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert message in error["message"]


@pytest.mark.parametrize(
    ("extra", "message", "param"),
    [
        ({"messages": []}, "at least 1 item", "messages"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "'user'", "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text parts", "messages.0.content"),
        ({"messages": USER, "tools": [{"type": "function"}]}, "is required", "tools.0.function"),
        ({"messages": USER, "tools": [TOOL]}, "no place for tools", "tools"),
        ({"messages": USER, "reasoning_effort": "low"}, "no place for reasoning_effort", "reasoning_effort"),
        ({"messages": USER, "top_logprobs": 3}, "needs logprobs", "top_logprobs"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "unknown field", "messages.0.mood"),
    ],
)
def test_bad_chat(gateway: RunningGateway, extra: dict[str, object], message: str, param: str) -> None:
    answer = httpx.post(f"{gateway.url}/v1/chat/completions", json={"model": MODEL, **extra}, timeout=20)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert message in answer.json()["error"]["message"]


def test_a_huge_body_is_refused_unread(gateway: RunningGateway) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(5 * 16):
            yield b"x" * 65536

    for content in (b"x" * (5 << 20), endless()):
        try:
            answer = httpx.post(f"{gateway.url}/v1/completions", content=content, timeout=20)
        except httpx.NetworkError:  # answered, and closed, before we had sent it all
            continue
        assert answer.status_code == 413
        assert "larger than" in answer.json()["error"]["message"]


def test_a_body_with_a_byte_order_mark_and_one_that_is_compressed(gateway: RunningGateway) -> None:
    body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 1}).encode()
    url = f"{gateway.url}/v1/completions"
    assert httpx.post(url, content=b"\xef\xbb\xbf" + body).status_code == 200
    assert httpx.post(url, content=body, headers={"Content-Encoding": "identity"}).status_code == 200
    refused = httpx.post(url, content=gzip.compress(body), headers={"Content-Encoding": "gzip"})
    assert (refused.status_code, "not compressed" in refused.json()["error"]["message"]) == (415, True)


def test_a_slash_at_the_end_is_nothing(gateway: RunningGateway) -> None:
    """A redirect would leave the proxy that ends TLS, and turn a POST into a GET."""
    answer = httpx.post(f"{gateway.url}/v1/completions/", json={}, follow_redirects=False)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "model is required")
    assert httpx.get(f"{gateway.url}/v1/models/").json()["object"] == "list"
    assert httpx.get(f"{gateway.url}/livez/").status_code == 200


def test_of_two_equal_keys_the_last_counts(gateway: RunningGateway) -> None:
    answer = httpx.post(f"{gateway.url}/v1/completions", content=b'{"model": "a", "prompt": "x", "model": "b"}')
    assert "'b' does not exist" in answer.json()["error"]["message"]


def test_unknown_path_and_method(gateway: RunningGateway) -> None:
    here = "/v1/chat/completions, /v1/completions, /v1/models, /v1/responses"
    for asked, instead in {
        "/v2/rerank": f"here are {here}",
        "/v1/embeddings": f"here are {here}",
        "/completions": "try /v1/completions",
        "//v1//Completions": "try /v1/completions",
        "/v1/v1/chat/completions": "try /v1/chat/completions",
    }.items():
        answer = httpx.post(gateway.url + asked, json={})
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == f"POST {asked}: Not Found; {instead}"
    assert httpx.get(f"{gateway.url}/v1/completions").status_code == 405
    assert httpx.get(f"{gateway.url}/admin/v1/status").status_code == 404, "the admin API has its own port"


def test_what_is_off_may_be_said(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, presence_penalty=0, frequency_penalty=0, logit_bias={}, tools=[], user="me",
        response_format={"type": "text"}, max_completion_tokens=3, store=False, tool_choice="none",
    )  # fmt: skip
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_metrics_count_what_was_served(gateway: RunningGateway, client: OpenAI) -> None:
    def value(name: str) -> float:
        lines = httpx.get(f"{gateway.url}/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"elastic_ep_{name}"))

    before = value("tokens_total"), value("time_to_first_token_seconds_count"), value("stream_max_gap_seconds_count")
    client.completions.create(model=MODEL, prompt="x", max_tokens=5)
    after = value("tokens_total"), value("time_to_first_token_seconds_count"), value("stream_max_gap_seconds_count")
    assert [b - a for a, b in zip(before, after, strict=True)] == [5, 1, 1]
    assert value("inter_token_seconds_count") > 0
    assert value("membership_epoch") == 1
    assert value('ranks{state="serving"}') == 2
    assert (value("expert_live_replicas_min"), value("experts_uncovered")) == (2, 0)


def test_nothing_stays_open(gateway: RunningGateway, client: OpenAI, tmp_path: Path) -> None:
    """After all of the above the gateway still answers, and no request is left at the engine."""
    assert client.completions.create(model=MODEL, prompt="x", max_tokens=60).choices[0].text == TEXT
    assert gateway.failures == []
