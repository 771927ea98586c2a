"""Admin API, probes, start and stop of a gateway: tokens, conflicts, busy ports, two side by side, graceful stop."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from elastic.cli.client import AdminClient
from elastic.cli.connection import Connection
from elastic.serve.options import ApiOptions
from membership.base.errors import ConfigError, ElasticError, ModelError, PlanRefused
from membership.base.events import Event, EventLog
from membership.base.network import Network
from membership.operations.change import drain, scale
from membership.operations.rotate_keys import name_of
from membership.store import codec
from membership.store.interface import Put
from membership.store.records import EngineStatus, GatewayRecord, Heartbeats, Operation, Phase, RankExit, View
from tests.support.gateway_cluster import MODEL, TOKEN, GatewayCluster, RunningGateway, wait_ready
from tests.support.helpers import eventually
from workers.queue.network import join_key

pytestmark = pytest.mark.integration

TEXT = "the quick brown fox jumps over the lazy dog"
GOOD = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def cluster(tmp_path: Path) -> GatewayCluster:
    return GatewayCluster(tmp_path)


@pytest.fixture
def gateway(cluster: GatewayCluster) -> Iterator[RunningGateway]:
    cluster.publish_view()
    with cluster.gateway() as running:
        yield running


def admin(gateway: RunningGateway, method: str, path: str, **options: Any) -> httpx.Response:
    return httpx.request(method, f"{gateway.admin_url}{path}", headers=GOOD, timeout=10, **options)


ROUTES = [
    ("GET", "/admin/v1/status"), ("GET", "/admin/v1/view"), ("GET", "/admin/v1/operations"),
    ("GET", "/admin/v1/operations/x"), ("GET", "/admin/v1/events"), ("GET", "/admin/v1/explain"),
    ("GET", "/is_scaling_elastic_ep"), ("POST", "/is_scaling_elastic_ep"), ("GET", "/admin/v1/failpoints"),
    ("POST", "/admin/v1/ranks/1/unquarantine"), ("GET", "/admin/v1/stream"), ("GET", "/admin/v1/scaling"),
    ("POST", "/admin/v1/scale"), ("POST", "/scale_elastic_ep"), ("POST", "/admin/v1/drain"),
    ("POST", "/admin/v1/undrain"), ("POST", "/admin/v1/pause"), ("POST", "/admin/v1/resume"),
    ("POST", "/admin/v1/rebalance"), ("POST", "/admin/v1/operations/x/cancel"), ("PUT", "/admin/v1/failpoints"),
    ("GET", "/admin/v1/keys"), ("POST", "/admin/v1/keys/rotate"), ("POST", "/admin/v1/ranks/1/kill"),
]  # fmt: skip


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}])
def test_nothing_answers_without_the_token(gateway: RunningGateway, headers: dict[str, str]) -> None:
    answers = {httpx.request(*route, headers=headers).status_code for route in _urls(gateway)}
    assert answers == {401}


def test_without_a_token_set_no_request_passes(cluster: GatewayCluster) -> None:
    with cluster.gateway(token="") as gateway:
        for headers in ({}, {"Authorization": "Bearer"}, GOOD):
            answers = {httpx.request(*route, headers=headers).status_code for route in _urls(gateway)}
            assert answers == {403}


def test_a_token_file_that_changes_counts_at_once(cluster: GatewayCluster, tmp_path: Path) -> None:
    """A Secret that is changed. What cannot be read, or is no token, changes nothing."""
    file, draft = tmp_path / "token", tmp_path / "draft"

    def status(token: str) -> int:
        headers = {"Authorization": f"Bearer {token}"}
        return httpx.get(f"{gateway.admin_url}/admin/v1/status", headers=headers, timeout=10).status_code

    file.write_text(f"{TOKEN}\n")
    with cluster.gateway(token="not this", api=ApiOptions(admin_token_file=file)) as gateway:
        assert [status(each) for each in (TOKEN, "new", "not this")] == [200, 401, 401]
        draft.write_text("new")
        draft.rename(file)
        assert [status(each) for each in (TOKEN, "new")] == [401, 200]
        file.write_text("")
        assert [status(each) for each in ("none", "new")] == [401, 200]
        file.unlink()
        assert [status(each) for each in (TOKEN, "new")] == [401, 200]


def _urls(gateway: RunningGateway) -> list[tuple[str, str]]:
    return [(method, gateway.admin_url + path) for method, path in ROUTES]


def test_status(gateway: RunningGateway) -> None:
    status = admin(gateway, "GET", "/admin/v1/status").json()
    assert (status["cluster"], status["epoch"], status["desired"]) == ("test", 1, 2)
    assert [rank["state"] for rank in status["ranks"]] == ["serving", "serving"]


def test_view(gateway: RunningGateway) -> None:
    with closing(AdminClient(gateway.admin_url, TOKEN)) as client:
        view = client.view()
    assert (view.epoch, view.ranks) == (1, (0, 1))
    assert view.placement == {0: ((0, 1, 2, 3),), 1: ((0, 1, 2, 3),)}


def test_rebalance_is_planned_and_asked_for(gateway: RunningGateway, cluster: GatewayCluster) -> None:
    plan = admin(gateway, "POST", "/admin/v1/rebalance", json={"plan": True})
    assert (plan.status_code, plan.json()["epoch"], plan.json()["refused"]) == (200, 1, "")
    assert cluster.store.get(cluster.keys.rebalance) is None
    asked = admin(gateway, "POST", "/admin/v1/rebalance", json={"by": "me"})
    assert (asked.status_code, asked.json()) == (202, plan.json())
    assert (cluster.store.get(cluster.keys.rebalance) is not None) == (plan.json()["slots"] > 0)
    admin(gateway, "POST", "/admin/v1/pause", json={"ttl_s": 60})
    refused = admin(gateway, "POST", "/admin/v1/rebalance", json={})
    assert refused.status_code == 422
    assert "paused" in refused.json()["error"]["message"]


def test_the_join_secret_is_shown_and_replaced(cluster: GatewayCluster, tmp_path: Path) -> None:
    """The gateway's host has another one, and nothing else is there to be asked."""
    file = tmp_path / "secrets"
    file.write_text("a secret of the tests' cluster\nand the one that comes after it\n")
    old = Network("127.0.0.1", "test", b"a secret of the tests' cluster", file=file)
    cluster.span(old)
    with cluster.gateway() as gateway, closing(AdminClient(gateway.admin_url, TOKEN)) as client:
        found = eventually(lambda: (seen := client.secrets()).others and seen, 30.0, "what the gateway has")
        (new,) = found.others
        assert (found.generation, found.current) == (0, name_of(join_key(old)))
        assert [(use.listens, sorted(use.has or ())) for use in found.uses] == [("", sorted((new, found.current)))]
        plan = client.plan_rotation()
        assert (plan.secret, plan.generation, plan.begun, plan.refused) == (new, 1, False, "")
        assert client.rotate_keys() == plan
        eventually(lambda: client.secrets().current == new, 30.0, "the new one in the gateway's mirror")
        assert client.rotate_keys(1).ends
        eventually(lambda: not client.secrets().grace, 30.0, "its end in the gateway's mirror")
        assert not client.rotate_keys().changes, "nothing is left"


def test_scale_is_an_operation_that_others_find(gateway: RunningGateway, cluster: GatewayCluster) -> None:
    plan = admin(gateway, "POST", "/admin/v1/scale", json={"ranks": 4, "plan": True})
    assert (plan.status_code, plan.json()["add"]) == (200, [2, 3])
    assert admin(gateway, "GET", "/is_scaling_elastic_ep").json() == {"is_scaling_elastic_ep": False}
    body = {"ranks": 4, "op_id": "grow", "if_epoch": 1, "timeout_s": 60}
    first = admin(gateway, "POST", "/admin/v1/scale", json=body)
    assert (first.status_code, first.json()["phase"], first.json()["target"]) == (202, "proposed", 4)
    again = admin(gateway, "POST", "/admin/v1/scale", json=body)
    assert (again.status_code, again.json()) == (202, first.json()), "the same id is the same operation"
    other = admin(gateway, "POST", "/admin/v1/scale", json={"ranks": 3})
    assert (other.status_code, other.json()["operation"]["id"]) == (409, "grow")
    assert "grow" in other.json()["error"]["message"]
    assert admin(gateway, "GET", first.headers["location"]).json() == first.json()
    assert [op["id"] for op in admin(gateway, "GET", "/admin/v1/operations").json()["operations"]] == ["grow"]
    assert admin(gateway, "GET", "/is_scaling_elastic_ep").json() == {"is_scaling_elastic_ep": True}
    assert admin(gateway, "GET", "/admin/v1/status").json()["operation"]["id"] == "grow"
    scaling = admin(gateway, "GET", "/admin/v1/scaling").json()
    assert (scaling["operation_id"], scaling["phase"], scaling["pending_size"]) == ("grow", "proposed", 4)
    assert (scaling["effective_size"], scaling["safe_to_terminate_ranks"]) == (2, [])
    stored = cluster.store.get(cluster.keys.op("grow"))
    assert stored is not None
    assert codec.decode(stored.value, Operation).phase is Phase.PROPOSED


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"ranks": 4, "if_epoch": 7}, 412, "the epoch is 1, not 7"),
        ({"ranks": 0}, 422, "at least 1"),
        ({"ranks": 900}, 422, "more than"),
        ({"ranks": "four"}, 400, "valid integer"),
        ({"ranks": 4, "when": "now"}, 400, "unknown field: when"),
        ({"ranks": 4, "op_id": "../x"}, 400, "pattern"),
        ({}, 400, "ranks is required"),
    ],
)
def test_refused_scale(gateway: RunningGateway, body: dict[str, object], status: int, message: str) -> None:
    answer = admin(gateway, "POST", "/admin/v1/scale", json=body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]
    assert admin(gateway, "GET", "/admin/v1/operations").json() == {"operations": []}


def test_scale_as_vllm_clients_do(gateway: RunningGateway) -> None:
    for unclear in ({}, {"new_ep_size": 2, "new_data_parallel_size": 3}):
        refused = admin(gateway, "POST", "/scale_elastic_ep", json=unclear)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "new_data_parallel_size")
    body = {"new_data_parallel_size": 3, "drain_timeout": 120}
    answer = admin(gateway, "POST", "/scale_elastic_ep", json=body)
    assert (answer.status_code, answer.json()["target"]) == (202, 3)
    assert admin(gateway, "POST", "/is_scaling_elastic_ep").json() == {"is_scaling_elastic_ep": True}


def test_scale_as_sglang_clients_do(gateway: RunningGateway) -> None:
    answer = admin(gateway, "POST", "/scale_elastic_ep", json={"new_ep_size": 4})
    assert (answer.status_code, answer.json()["target"]) == (202, 4)


def test_drain_cancel_and_pause(gateway: RunningGateway, cluster: GatewayCluster) -> None:
    client = AdminClient(gateway.admin_url, TOKEN)
    assert client.plan(drain(0)).target == 1
    asked = client.propose(drain(0), op_id="out", if_epoch=1, timeout_s=60.0)
    assert (asked.kind, asked.ranks, asked.target, asked.previous) == ("drain", (0,), 1, 2)
    assert client.cancel("out", "ann").cancelled == "ann"
    assert admin(gateway, "POST", "/admin/v1/operations/out/cancel").json()["cancelled"] == "ann", "it needs no body"
    eventually(lambda: [op.id for op in client.operations()] == ["out"], 30.0, "the gateway's mirror to see it")
    assert "operation out" in client.explain("out")[0].subject
    cluster.store.delete(cluster.keys.op("out"))
    paused = client.pause(600.0, "ann", "new switches")
    assert paused.until - paused.since == 600.0
    with pytest.raises(PlanRefused, match="paused by ann"):
        client.propose(scale(4), op_id=None, if_epoch=None, timeout_s=60.0)
    eventually(lambda: client.status()["pause"] is not None, 30.0, "the gateway's mirror to see that")
    assert client.resume()
    assert not client.resume()
    for path, body, words in (
        ("drain", {"ranks": []}, "at least 1"), ("drain", {}, "ranks is required"),
        ("undrain", {"ranks": [0, "x"]}, "valid integer"), ("pause", {"ttl_s": 0}, "greater than or equal to 1"),
    ):  # fmt: skip
        answer = admin(gateway, "POST", f"/admin/v1/{path}", json=body)
        assert (answer.status_code, words in answer.json()["error"]["message"]) == (400, True), answer.text
    with pytest.raises(ConfigError, match="no operation 'none'"):
        client.cancel("none", "ann")
    client.close()


def test_quarantine_is_explained_and_ended(gateway: RunningGateway, cluster: GatewayCluster) -> None:
    last = RankExit(rank=1, incarnation=2, reason="SIGSEGV", at=1.0, restarts=6, quarantined=True)
    cluster.store.txn([], [Put(cluster.keys.exit(1), codec.encode(last))])
    client = AdminClient(gateway.admin_url, TOKEN)
    eventually(lambda: client.explain("1")[0].state == "quarantined", 30.0, "the gateway's mirror to see it")
    assert client.unquarantine(1).quarantined is False
    eventually(lambda: client.explain("1")[0].state == "dead", 30.0, "the gateway's mirror to see that")
    with pytest.raises(ConfigError, match="rank 0 is not in quarantine"):
        client.unquarantine(0)
    with pytest.raises(ConfigError, match="there is no rank or operation 9"):
        client.explain("9")
    client.close()


def test_unknown_operation(gateway: RunningGateway) -> None:
    answer = admin(gateway, "GET", "/admin/v1/operations/none")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "operation_not_found")


def test_a_store_that_is_down_leaves_the_outcome_open(gateway: RunningGateway, cluster: GatewayCluster) -> None:
    cluster.store.outage = True
    try:
        answer = admin(gateway, "POST", "/admin/v1/scale", json={"ranks": 3})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "outcome_unknown")
        assert admin(gateway, "GET", "/admin/v1/status").json()["epoch"] == 1, "the last view stays readable"
    finally:
        cluster.store.outage = False


def test_serving_goes_on_without_the_store(gateway: RunningGateway, cluster: GatewayCluster) -> None:
    with cluster.engine(cluster.says(TEXT)), gateway.client() as client:
        wait_ready(gateway)
        cluster.store.outage = True
        try:
            answer = client.completions.create(model=MODEL, prompt="x", max_tokens=60)
            assert answer.choices[0].text == TEXT
            assert httpx.get(f"{gateway.url}/readyz").status_code == 200
        finally:
            cluster.store.outage = False


def test_events_are_followed_until_the_client_leaves(gateway: RunningGateway, cluster: GatewayCluster) -> None:
    log = EventLog(cluster.events, "test")
    log.emit("before")
    with cluster.events.open("ab") as file:
        file.write(b"damaged\n")
    plain = admin(gateway, "GET", "/admin/v1/events").text.splitlines()
    kinds = [msgspec.json.decode(line, type=Event).kind for line in plain]
    assert {"before", "gateway_started"} <= set(kinds)
    url = f"{gateway.admin_url}/admin/v1/events"
    with httpx.stream("GET", url, params={"follow": "true"}, headers=GOOD, timeout=10) as answer:
        lines = filter(None, answer.iter_lines())
        assert [next(lines) for _ in kinds] == plain
        log.emit("after")
        assert "after" in (msgspec.json.decode(line, type=Event).kind for line in lines)  # the gateway may speak too


def test_the_admin_client_follows_events_and_can_be_interrupted_while_nothing_happens(
    gateway: RunningGateway, cluster: GatewayCluster
) -> None:
    EventLog(cluster.events, "test").emit("marked")
    stop = threading.Event()
    with Connection(admin=gateway.admin_url, admin_token=TOKEN).client() as client:
        events = client.events(True, stop)
        assert next(event for event in events if event.kind == "marked").role == "test"
        stop.set()
        assert list(events) == []  # within the blank line's second, not after the read's deadline


def test_the_admin_client_says_why_there_are_no_events(gateway: RunningGateway) -> None:
    def events(url: str, token: str) -> list[Event]:
        with Connection(admin=url, admin_token=token).client() as client:
            return list(client.events(True, threading.Event()))

    with pytest.raises(ConfigError, match="needs its token"):
        events(gateway.admin_url, "wrong")
    with pytest.raises(ElasticError, match="no answer from"):
        events("http://127.0.0.1:1", TOKEN)


def test_readiness_says_what_is_missing(cluster: GatewayCluster) -> None:
    def reasons() -> str:
        answer = httpx.get(f"{gateway.url}/readyz")
        assert answer.status_code == (503 if answer.json().get("reasons") else 200)
        return "; ".join(answer.json().get("reasons", []))

    with cluster.gateway() as gateway:
        assert httpx.get(f"{gateway.url}/livez").status_code == 200
        assert reasons() == "no epoch is committed yet; there is no engine"
        assert httpx.get(f"{gateway.url}/health").status_code == 503
        cluster.store.put(cluster.keys.config, codec.encode(msgspec.structs.replace(cluster.config, min_agents=2)))
        eventually(lambda: "yet: 0 of 2 agents are there" in reasons(), 30.0, "the number of agents")
        assert "loading" not in httpx.get(f"{gateway.url}/readyz").json()
        cluster.publish_view()
        cluster.store.put(cluster.keys.heartbeats("n"), codec.encode(Heartbeats(node="n", at=1.0, loads={1: (5, 8)})))
        eventually(
            lambda: httpx.get(f"{gateway.url}/readyz").json().get("loading") == [{"rank": 0, "bytes": 5, "total": 8}],
            30.0,
            "the load in the answer",
        )
        with cluster.engine(cluster.says(TEXT)):
            wait_ready(gateway)
            gone = cluster.keys.assign("n"), cluster.keys.agent("n")
            view = cluster.store.get(cluster.keys.view)
            for key in gone:
                cluster.store.delete(key)
            eventually(
                lambda: "4 (layer, expert) pairs have no live replica" in reasons(), 30.0, "coverage to be seen as lost"
            )
            cluster.publish_view(dead=(1,))
            eventually(lambda: reasons() == "", 30.0, "a degraded cluster to be ready")
            assert httpx.get(f"{gateway.url}/readyz").json()["state"] == "degraded"
            assert view is not None
            assert httpx.get(f"{gateway.url}/health").status_code == 200
        assert reasons() == "", "an engine that is being replaced is waited for"


def test_a_record_that_cannot_be_read_is_no_reason_to_kill_the_gateway(
    gateway: RunningGateway, cluster: GatewayCluster
) -> None:
    def codes() -> tuple[int, int]:
        return tuple(httpx.get(f"{gateway.url}/{path}").status_code for path in ("livez", "readyz"))

    with cluster.engine(cluster.says(TEXT)):
        wait_ready(gateway)
        cluster.store.put(cluster.keys.op("x"), b"{")
        eventually(lambda: codes() == (200, 503), 30.0, "not ready, but alive")
        cluster.store.delete(cluster.keys.op("x"))
        wait_ready(gateway)


def test_two_gateways_side_by_side(cluster: GatewayCluster) -> None:
    cluster.publish_view()
    with cluster.engine(cluster.says(TEXT)) as engine, cluster.gateway("a") as one:
        with cluster.gateway("b") as two:
            for gateway in (one, two):
                with gateway.client() as client:
                    assert client.completions.create(model=MODEL, prompt="x", max_tokens=60).choices[0].text == TEXT
            assert set(_registered(cluster)) == {"a", "b"}
        eventually(lambda: set(_registered(cluster)) == {"a"}, 30.0, "the stopped one to be forgotten")
        with one.client() as client:
            assert client.completions.create(model=MODEL, prompt="x", max_tokens=60).choices[0].text == TEXT
        assert engine.aborts == []


def _registered(cluster: GatewayCluster) -> dict[str, GatewayRecord]:
    _, items = cluster.store.range(f"{cluster.keys.prefix}gateways/")
    return {record.name: record for record in (codec.decode(kv.value, GatewayRecord) for kv in items)}


def test_a_lost_registration_is_made_again(gateway: RunningGateway, cluster: GatewayCluster) -> None:
    found = cluster.store.get(cluster.keys.gateway("g"))
    assert found is not None
    cluster.store.revoke(found.lease)

    def again() -> bool:
        now = cluster.store.get(cluster.keys.gateway("g"))
        return now is not None and now.lease != found.lease

    eventually(again, 30.0, "the gateway to register again")


def test_busy_port(cluster: GatewayCluster, gateway: RunningGateway) -> None:
    port = int(gateway.url.rsplit(":", 1)[1])
    busy = f"cannot listen on 127.0.0.1:{port}: Address already in use"
    with pytest.raises(ConfigError, match=busy) as refusal, cluster.gateway("late", port=port):
        pass
    assert "--port" in refusal.value.hint


def test_no_tokenizer(cluster: GatewayCluster) -> None:
    (Path(cluster.config.model) / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"), cluster.gateway():
        pass


def test_a_stop_lets_streams_end(cluster: GatewayCluster) -> None:
    cluster.publish_view()
    with cluster.engine(cluster.says(TEXT), pause_after=3) as engine:
        with cluster.gateway(grace_s=600.0) as gateway:
            texts: list[str] = []
            reader = threading.Thread(target=lambda: texts.append(_complete(gateway).json()["choices"][0]["text"]))
            reader.start()
            eventually(lambda: engine.submits, 30.0, "the request to arrive")
            gateway.stop.set()
            stopping = ["this gateway is shutting down"]
            eventually(lambda: _reasons(gateway) == stopping, 30.0, "the gateway to notice")
            refused = _complete(gateway)
            assert (refused.status_code, "shutting down" in refused.text) == (503, True)
            engine.pause_after = None
            reader.join(30.0)
            assert texts == [TEXT]
        assert not gateway.thread.is_alive(), "no need to wait out the grace"


def _reasons(gateway: RunningGateway) -> object:
    return httpx.get(f"{gateway.url}/readyz").json().get("reasons")


def test_a_stop_ends_streams_that_do_not_end_in_time(cluster: GatewayCluster) -> None:
    cluster.publish_view()
    body = {"model": MODEL, "prompt": "x", "stream": True, "max_tokens": 60}
    with (
        cluster.engine(cluster.says(TEXT), pause_after=3),
        cluster.gateway(grace_s=0.5) as gateway,
        httpx.stream("POST", f"{gateway.url}/v1/completions", json=body, timeout=20) as answer,
    ):
        lines = filter(None, answer.iter_lines())
        assert next(lines).startswith("data: {")
        gateway.stop.set()
        rest = [line for line in lines if line]
    assert "shutting down" in rest[-2]
    assert rest[-1] == "data: [DONE]"


def _complete(gateway: RunningGateway) -> httpx.Response:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 60}
    return httpx.post(f"{gateway.url}/v1/completions", json=body, timeout=20)


def test_the_gateway_never_imports_torch() -> None:
    program = (
        "import sys, elastic.gateway.app, elastic.gateway.openai;"
        "print([m for m in ('torch', 'transformers') if m in sys.modules]); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_status_of_the_engine_reaches_the_document(gateway: RunningGateway, cluster: GatewayCluster) -> None:
    with cluster.engine(cluster.says(TEXT)) as engine:
        status = EngineStatus(token=engine.token, epoch=1, running=3, waiting=2, waiting_tokens=20, shed={"tokens": 4})
        cluster.store.put(cluster.keys.engine_status, codec.encode(status))
        wanted = {"running": 3, "waiting": 2, "waiting_tokens": 20, "shed": 4}
        eventually(lambda: admin(gateway, "GET", "/admin/v1/status").json()["requests"] == wanted, 30.0, "the load")
        empty = View(epoch=2)
        cluster.store.put(cluster.keys.view, codec.encode(empty))
        eventually(lambda: admin(gateway, "GET", "/admin/v1/status").json()["epoch"] == 2, 30.0, "epoch 2")
