"""API keys over real sockets: what needs one, what a wrong one gets, limits, and what is counted and logged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from elastic.protocol import Submit
from elastic.serve.options import ApiOptions
from tests.support.gateway_cluster import MODEL, GatewayCluster, RunningGateway
from tests.support.helpers import eventually

pytestmark = pytest.mark.integration

ANN, BOB, SLOW = "sk-ann-1234", "sk-bob-5678", "sk-slow-9999"
BODY = {"model": MODEL, "prompt": "x", "max_tokens": 4}
submitted: list[str] = []  # the names that the engine was told


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"ann:{ANN}\nslow:{SLOW} requests_per_minute=1\nbob:{BOB} requests_in_flight=1\n")
    return path


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Iterator[RunningGateway]:
    cluster = GatewayCluster(tmp_path_factory.mktemp("gateway"))
    cluster.publish_view()
    api = ApiOptions(api_key_file=keys, access_log=True)
    says = cluster.says("hello world")

    def answer(submit: Submit) -> list[int]:
        submitted.append(submit.key)
        return says(submit)

    with cluster.engine(answer, pause_after=None) as engine, cluster.gateway(api=api) as running:
        eventually(lambda: httpx.get(f"{running.url}/readyz").is_success, 30.0, "the gateway to be ready")
        assert engine.token
        yield running


def ask(gateway: RunningGateway, key: str = "", **headers: str) -> httpx.Response:
    given = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{gateway.url}/v1/completions", json=BODY, headers=given | headers, timeout=20)


def counted(gateway: RunningGateway) -> dict[tuple[str, ...], float]:
    text = httpx.get(f"{gateway.url}/metrics").text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_probes_and_metrics_need_no_key_and_nothing_else_goes_without(gateway: RunningGateway) -> None:
    for path in ("/livez", "/readyz", "/health", "/metrics"):
        assert httpx.get(gateway.url + path).status_code == 200
    for path in ("/v1/models", f"/v1/models/{MODEL}", "/v1/nowhere", "/"):
        for method in ("GET", "HEAD", "POST"):
            assert httpx.request(method, gateway.url + path).status_code == 401, (method, path)
    answer = ask(gateway)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.json()["error"] == {
        "message": "there is no API key: send Authorization: Bearer KEY",
        "type": "invalid_request_error", "param": None, "code": "invalid_api_key",
    }  # fmt: skip


def test_the_official_client_raises_what_it_should(gateway: RunningGateway) -> None:
    with gateway.client(ANN) as client:
        assert client.completions.create(**BODY).choices[0].text
    with gateway.client("sk-wrong") as client, pytest.raises(openai.AuthenticationError, match="not known"):
        client.completions.create(**BODY)
    assert ask(gateway, SLOW).status_code == 200
    assert submitted[-2:] == ["ann", "slow"], "by whose turns the engine gives places"
    with gateway.client(SLOW) as client, pytest.raises(openai.RateLimitError) as raised:
        client.completions.create(**BODY)
    assert 0 < int(raised.value.response.headers["retry-after"]) <= 60
    assert raised.value.code == "rate_limit_exceeded"


def test_requests_in_flight_are_given_back_however_they_end(gateway: RunningGateway) -> None:
    with httpx.Client(headers={"Authorization": f"Bearer {BOB}"}, base_url=gateway.url, timeout=20) as client:
        for _ in range(3):
            assert client.post("/v1/completions", json=BODY).status_code == 200
            assert client.post("/v1/completions", content=b"{").status_code == 400
            assert client.post("/v1/nowhere").status_code == 404
    eventually(lambda: counted(gateway)["elastic_ep_key_requests_in_flight", "bob"] == 0, 30.0, "none in flight")


def test_a_revoked_key_is_refused_and_a_new_one_taken_without_a_restart(gateway: RunningGateway, keys: Path) -> None:
    before = keys.read_text()
    keys.write_text(before.replace(ANN, "sk-ann-new"))
    assert (ask(gateway, ANN).status_code, ask(gateway, "sk-ann-new").status_code) == (401, 200)
    keys.write_text(before)
    assert (ask(gateway, ANN).status_code, ask(gateway, "sk-ann-new").status_code) == (200, 401)


def test_requests_and_tokens_are_counted_by_name(gateway: RunningGateway) -> None:
    before = counted(gateway)
    answers = [ask(gateway, ANN) for _ in range(2)]
    ask(gateway, "sk-wrong")
    answered = ("elastic_ep_key_requests_total", "ann", "200")
    eventually(lambda: counted(gateway)[answered] == before.get(answered, 0) + 2, 30.0, "both to be counted")
    after = counted(gateway)

    def gained(*name: str) -> float:
        return after[name] - before.get(name, 0)

    usage = [answer.json()["usage"] for answer in answers]
    assert gained("elastic_ep_key_tokens_total", "ann", "prompt") == sum(each["prompt_tokens"] for each in usage)
    assert gained("elastic_ep_key_tokens_total", "ann", "generation") == sum(
        each["completion_tokens"] for each in usage
    )
    assert gained("elastic_ep_requests_unauthorized_total") == 1


def test_each_request_is_logged_with_its_names_and_without_its_key(gateway: RunningGateway) -> None:
    with structlog.testing.capture_logs() as lines:
        named = ask(gateway, ANN, **{"X-Request-Id": "mine-1"})
        unnamed = ask(gateway, ANN, **{"X-Request-Id": "not one name"})
        ask(gateway, "sk-wrong-key")
        httpx.get(f"{gateway.url}/v1/models?key={ANN}", headers={"Authorization": f"Bearer {ANN}"})
        httpx.get(f"{gateway.url}/metrics")
        ended = eventually(lambda: _ended(lines) if len(_ended(lines)) >= 4 else None, 30.0, "four lines")
    assert named.headers["x-request-id"] == "mine-1"
    assert unnamed.headers["x-request-id"] == unnamed.json()["id"]
    shown = [(line["path"], line["status"], line["key"], line["request"], line["response"]) for line in ended]
    assert shown == [
        ("/v1/completions", 200, "ann", "mine-1", named.json()["id"]),
        ("/v1/completions", 200, "ann", None, unnamed.json()["id"]),
        ("/v1/completions", 401, None, None, None),
        ("/v1/models", 200, "ann", None, None),
    ]
    usage = named.json()["usage"]
    assert (ended[0]["prompt_tokens"], ended[0]["generation_tokens"]) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    assert ended[0]["finish_reasons"] == [named.json()["choices"][0]["finish_reason"]]
    assert not [word for word in (ANN, "sk-wrong-key") if word in json.dumps(lines, default=str)]


def _ended(lines: list[Any]) -> list[Any]:
    return [line for line in lines if line["event"] == "request_ended"]
