"""Every route of both ports, driven with what it cannot take: one shape of errors, no 500, and HEAD where GET is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from elastic.gateway import health, openai, tokenization
from elastic.gateway.admin import admin_app
from elastic.gateway.http import new_app
from elastic.gateway.page import with_page
from membership.store.records import ClusterConfig
from tests.support.gateway_cluster import MODEL, TOKEN, RunningGateway

pytestmark = pytest.mark.integration

GOOD = {"Authorization": f"Bearer {TOKEN}"}
HUGE = "9" * 5000
NOT_OURS = ("%00", "-1", "1.5", "1e5", "x", "\u00b2", "\u0663", "9" * 30, HUGE)  # in a path
BODIES = (
    b"", b"null", b"[]", b"{", b"7", b"\xff\xfe", b'{"a": 1}', b"[" * 100_000,
    *(b'{"%s": %s}' % (field, value)
      for field in (b"ranks", b"ttl_s", b"timeout_s", b"by", b"failpoints", b"new_data_parallel_size", b"model",
                    b"prompt", b"messages", b"max_tokens", b"n", b"seed", b"if_epoch", b"op_id", b"plan")
      for value in (b"null", b"true", b"{}", b'"\\ud800"', b"-1e999", b"1e-9", b"NaN", HUGE.encode())),
)  # fmt: skip


ENDLESS = {"/admin/v1/stream"}  # a GET that goes on until the client leaves


def config() -> ClusterConfig:
    return ClusterConfig(cluster="c", model="/m", served_model_name="m", moe_layers=1, experts=1)


def routes(*, of_admin: bool) -> list[APIRoute]:
    nothing: Any = None
    if of_admin:

        class Off:
            check = staticmethod(lambda request: None)

        inner = admin_app(Off())  # type: ignore[arg-type]
        app = with_page(inner)
        app.router.routes.extend(inner.routes)
    else:
        app = new_app("t")
        openai.add_routes(app, openai.Service(config(), nothing, nothing, nothing, started=0.0))
        tokenization.add_routes(app, nothing)
        health.add_routes(app, nothing, nothing)
    found = [route for route in app.routes if isinstance(route, APIRoute)]
    assert len(found) == len(app.routes) > 6
    return found


@contextlib.contextmanager
def client_of(gateway: RunningGateway, *, of_admin: bool) -> Iterator[httpx.Client]:
    base = gateway.admin_url if of_admin else gateway.url
    with httpx.Client(base_url=base, headers=GOOD, timeout=20) as client:
        yield client


def judge(answer: httpx.Response) -> None:
    """A success, or an error in the one shape that is not ours."""
    where = f"{answer.request.method} {str(answer.request.url)[:100]} -> {answer.status_code} {answer.text[:300]}"
    assert answer.status_code < 500 or answer.status_code == 503, where
    if answer.status_code == 503 and answer.request.url.path in health.PATHS:
        assert answer.json()["reasons"], where  # a probe has a shape of its own
    elif answer.status_code >= 400 and answer.request.method != "HEAD":
        body = answer.json()
        assert set(body) <= {"error", "operation"}, where
        assert set(body["error"]) == {"message", "type", "param", "code"}, where
        assert body["error"]["message"], where


def filled(path: str, value: str) -> str:
    return path.replace("{name:path}", value).replace("{name}", value).replace("{rank}", value)


@pytest.mark.parametrize("of_admin", [False, True])
def test_wrong_methods_and_paths(gateway: RunningGateway, of_admin: bool) -> None:
    with client_of(gateway, of_admin=of_admin) as client:
        known = routes(of_admin=of_admin)
        for route in known:
            path = filled(route.path, "1")
            offered = {method for each in known if each.path == route.path for method in each.methods}
            for method in {"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"} - offered:
                answer = client.request(method, path)
                judge(answer)
                assert answer.status_code == (204 if method == "OPTIONS" else 405), (method, path, answer)
                assert set(answer.headers["allow"].split(", ")) == offered | {"OPTIONS"}, (method, path)
            for value in NOT_OURS if "{" in route.path else ():
                for method in route.methods:
                    answer = client.request(method, filled(route.path, value))
                    judge(answer)
                    assert answer.status_code in (400, 404, 405), (method, value[:9], answer.text)
        for path in ("/", "/nowhere", "/%ff", "/docs", "/openapi.json"):
            answer = client.get(path)
            judge(answer)
            assert answer.status_code == 404


@pytest.mark.parametrize("of_admin", [False, True])
def test_wrong_bodies_and_queries(gateway: RunningGateway, of_admin: bool) -> None:
    with client_of(gateway, of_admin=of_admin) as client:
        for route in routes(of_admin=of_admin):
            path = filled(route.path, "1")
            for method in route.methods & {"POST", "PUT"}:
                for body in BODIES:
                    judge(client.request(method, path, content=body))
            for query in ("subject=" + HUGE, "follow=perhaps", "subject=%ff", "subject=%D9%A3", "follow"):
                if "GET" in route.methods and route.path not in health.PATHS | ENDLESS:
                    judge(client.get(f"{path}?{query}"))


@pytest.mark.parametrize("field", ["max_tokens", "n", "seed", "top_k", "temperature", "top_p", "logprobs", "best_of"])
def test_numbers_beyond_all_bounds(gateway: RunningGateway, field: str) -> None:
    with client_of(gateway, of_admin=False) as client:
        for value in (HUGE, "-" + HUGE, "1e999", "-1e999"):
            body = f'{{"model": "{MODEL}", "prompt": "x", "{field}": {value}}}'
            answer = client.post("/v1/completions", content=body)
            judge(answer)
            assert answer.status_code == 400


def test_explain_of_what_cannot_be_a_rank(gateway: RunningGateway) -> None:
    with client_of(gateway, of_admin=True) as client:
        for subject in (HUGE, "\u0663", "-1", "1.0", ""):
            assert client.get("/admin/v1/explain", params={"subject": subject}).status_code == 404


@pytest.mark.parametrize("of_admin", [False, True])
def test_head_is_get_without_a_body(gateway: RunningGateway, of_admin: bool) -> None:
    with client_of(gateway, of_admin=of_admin) as client:
        for route in routes(of_admin=of_admin):
            if "GET" not in route.methods or route.path in ENDLESS:
                continue
            path = filled(route.path, "1")
            got, head = client.get(path), client.head(path)
            assert (head.status_code, head.content) == (got.status_code, b""), path
            assert head.headers.get("content-type") == got.headers.get("content-type"), path
        if of_admin:
            assert client.head("/admin/v1/events", params={"follow": True}).status_code == 200, "and ends"
            assert {client.head(path).status_code for path in ENDLESS} == {200}, "and ends"


@pytest.mark.parametrize("value", ["1e-9", "0", "-5", "1e300", "1e999", "NaN", '"5"', "86401"])
@pytest.mark.parametrize(
    ("path", "field", "rest"),
    [
        ("/admin/v1/scale", "timeout_s", '"ranks": 3'),
        ("/admin/v1/drain", "timeout_s", '"ranks": [0]'),
        ("/admin/v1/undrain", "timeout_s", '"ranks": [0]'),
        ("/admin/v1/pause", "ttl_s", '"by": "me"'),
        ("/scale_elastic_ep", "drain_timeout", '"new_data_parallel_size": 3'),
    ],
)
def test_times_that_nothing_can_be_done_in(
    gateway: RunningGateway, path: str, field: str, rest: str, value: str
) -> None:
    with client_of(gateway, of_admin=True) as client:
        answer = client.post(path, content=f'{{{rest}, "{field}": {value}}}')
        judge(answer)
        assert answer.status_code == 400
        assert value == "NaN" or answer.json()["error"]["param"] == field, answer.text
        assert client.get("/admin/v1/operations").json() == {"operations": []}


def test_a_token_that_is_not_ascii_is_refused_like_any_wrong_one(gateway: RunningGateway) -> None:
    for given in ("t\u00f6k\u00e9n".encode(), b"\xff\xfe", b"\xc3", "\u2603".encode()):
        answer = httpx.get(f"{gateway.admin_url}/admin/v1/view", headers={b"Authorization": b"Bearer " + given})
        judge(answer)
        assert answer.status_code == 401
