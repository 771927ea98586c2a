"""A gateway whose engine is on another host: streams go on from engine to engine, and only one with the join secret is
sent a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from msgspec.structs import replace as replace_in

from elastic.serve.etcd_server import free_ports
from membership.base.network import Network
from membership.store.codec import decode, encode
from membership.store.records import GatewayRecord
from tests.support.gateway_cluster import MODEL, QUICK, GatewayCluster, RunningGateway, wait_ready
from tests.support.helpers import eventually
from tests.support.scripted_engine import ScriptedEngine
from workers.queue.network import join_key

pytestmark = pytest.mark.integration

TEXT = "the quick brown fox jumps over the lazy dog and some more"
NETWORK = Network("127.0.0.1", "test", b"a secret of the tests' cluster")
OTHER = replace(NETWORK, secret=b"another secret, no less long")
BODY = {"model": MODEL, "prompt": "x", "max_tokens": 60}


def free_address() -> str:
    (port,) = free_ports(1)
    return f"tcp://127.0.0.1:{port}"


@pytest.fixture
def gateway(cluster: GatewayCluster) -> Iterator[RunningGateway]:
    cluster.span(NETWORK)
    with cluster.gateway() as running:
        yield running


def complete(gateway: RunningGateway) -> httpx.Response:
    return httpx.post(f"{gateway.url}/v1/completions", json=BODY, timeout=60)


def no_engine(gateway: RunningGateway, word: str) -> None:
    """Until the gateway says that no engine answers, and why."""

    def said() -> bool:
        reasons = httpx.get(f"{gateway.url}/readyz", timeout=20).json().get("reasons", [])
        return any(word in reason for reason in reasons if reason.startswith("no engine answers: "))

    eventually(said, 30.0, f"{word!r} as the reason why no engine answers")


def test_a_stream_goes_on_from_a_far_engine_to_a_near_one_and_to_a_far_one(
    cluster: GatewayCluster, gateway: RunningGateway
) -> None:
    answer = cluster.says(TEXT)
    with ThreadPoolExecutor(1) as clients:
        with cluster.engine(answer, address=free_address(), network=NETWORK, pause_after=3) as far:
            wait_ready(gateway)
            response = clients.submit(complete, gateway)
            eventually(lambda: any(each.sent == 3 for each in far.running), 30.0, "three tokens")
        with cluster.engine(answer, pause_after=6) as near:
            eventually(lambda: any(each.sent == 6 for each in near.running), 30.0, "six tokens")
        with cluster.engine(answer, address=free_address(), network=NETWORK) as last:
            answered = response.result(timeout=60)
    assert answered.json()["choices"][0]["text"] == TEXT
    assert [len(each.submits[0].emitted) for each in (far, near, last)] == [0, 3, 6]


def test_a_stream_follows_the_engine_to_another_join_secret(cluster: GatewayCluster, tmp_path: Path) -> None:
    """Of which the gateway's host had not heard when it began. Its record says what it has."""
    file = tmp_path / "secrets"
    file.write_bytes(NETWORK.secret)
    cluster.span(replace(NETWORK, file=file))
    with ThreadPoolExecutor(1) as clients, cluster.gateway() as gateway:
        with cluster.engine(cluster.says(TEXT), address=free_address(), network=NETWORK, pause_after=3) as old:
            wait_ready(gateway)
            response = clients.submit(complete, gateway)
            eventually(lambda: any(each.sent == 3 for each in old.running), 30.0, "three tokens")
        file.write_bytes(NETWORK.secret + b"\n" + OTHER.secret)
        with cluster.engine(cluster.says(TEXT), address=free_address(), network=OTHER) as new:
            assert response.result(timeout=60).json()["choices"][0]["text"] == TEXT
        assert len(new.submits[0].emitted) == 3
        both = tuple(sorted(map(join_key, (NETWORK, OTHER))))
        eventually(lambda: gateway_record(cluster).join_keys == both, 30.0, "both in the gateway's record")


def gateway_record(cluster: GatewayCluster) -> GatewayRecord:
    _, (found,) = cluster.store.range(f"{cluster.keys.prefix}gateways/")
    return decode(found.value, GatewayRecord)


def test_a_broken_connection_between_hosts_is_made_anew(cluster: GatewayCluster, gateway: RunningGateway) -> None:
    """Its port refuses connections for a while, then the same engine is there again."""
    address = free_address()
    with ThreadPoolExecutor(1) as clients:
        with cluster.engine(cluster.says(TEXT), address=address, network=NETWORK, pause_after=3) as engine:
            response = clients.submit(complete, gateway)
            eventually(lambda: any(each.sent == 3 for each in engine.running), 30.0, "three tokens")
        with ScriptedEngine(engine.token, cluster.says(TEXT), address=address, network=NETWORK) as same:
            assert response.result(timeout=60).json()["choices"][0]["text"] == TEXT
        assert len(same.submits[0].emitted) == 3


@pytest.mark.parametrize("theirs", [OTHER, None], ids=["another secret", "no keys"])
def test_what_has_not_the_secret_is_sent_no_prompt(cluster: GatewayCluster, theirs: Network | None) -> None:
    """Though the record names our key."""
    cluster.span(NETWORK)
    address = free_address()
    token = cluster.publish_engine(address, NETWORK)
    with (
        ScriptedEngine(token, cluster.says(TEXT), address=address, network=theirs) as impostor,
        cluster.gateway(link=QUICK) as gateway,
    ):
        no_engine(gateway, "shook no hands")
        assert complete(gateway).status_code == 503
    assert (impostor.hellos, impostor.submits) == (0, [])


def test_a_record_with_another_key_is_refused(cluster: GatewayCluster) -> None:
    cluster.span(NETWORK)
    with (
        cluster.engine(cluster.says(TEXT), address=free_address(), network=OTHER) as stranger,
        cluster.gateway(link=QUICK) as gateway,
    ):
        no_engine(gateway, "another join secret")
    assert (stranger.hellos, stranger.submits) == (0, [])


def test_an_engine_with_a_retired_secret_is_sent_no_prompt(cluster: GatewayCluster, tmp_path: Path) -> None:
    """Though both lines are left in the gateway's file, as they were when it began; it is told while it runs."""
    file = tmp_path / "secrets"
    file.write_bytes(OTHER.secret + b"\n" + NETWORK.secret)
    cluster.span(replace(NETWORK, others=(OTHER.secret,), file=file))
    with cluster.gateway(link=QUICK) as gateway:
        old, new = join_key(NETWORK), join_key(OTHER)
        cluster.config = replace_in(cluster.config, join_key=new, join_keys_before=(old,), join_generation=1)
        cluster.store.put(cluster.keys.config, encode(cluster.config))
        with cluster.engine(cluster.says(TEXT), address=free_address(), network=NETWORK) as impostor:
            no_engine(gateway, "a join secret that was replaced")
        assert (impostor.hellos, impostor.submits) == (0, [])
        with cluster.engine(cluster.says(TEXT), address=free_address(), network=OTHER):
            wait_ready(gateway)
            assert complete(gateway).json()["choices"][0]["text"] == TEXT


@pytest.mark.parametrize("ours", [NETWORK, None], ids=["it has none", "we have none"])
def test_without_a_network_it_says_whose_is_missing(cluster: GatewayCluster, ours: Network | None) -> None:
    if ours is not None:
        cluster.span(ours)
    cluster.publish_engine("" if ours else free_address(), NETWORK)
    with cluster.gateway(link=QUICK) as gateway:
        no_engine(gateway, "it runs without --advertise" if ours else "this gateway runs without --advertise")
