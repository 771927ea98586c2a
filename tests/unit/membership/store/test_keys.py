"""Keys and the way back from keys to the cluster's state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from membership.base.enums import OperationKind
from membership.base.errors import ConfigError, SchemaError
from membership.store.codec import encode
from membership.store.interface import KeyValue, prefix_end
from membership.store.keys import Keys, Reading, state_from
from membership.store.records import (
    AgentRecord,
    Assignment,
    ClusterConfig,
    ClusterState,
    Counter,
    Desired,
    EngineRecord,
    EngineStatus,
    GatewayRecord,
    Heartbeats,
    Operation,
    RankExit,
    RankRecord,
    RankState,
    Record,
    View,
)

pytestmark = pytest.mark.unit

KEYS = Keys("demo")


def test_every_key_finds_its_place_in_the_state() -> None:
    config = ClusterConfig(cluster="demo", model="/m", served_model_name="m", moe_layers=1, experts=8)
    engine = EngineRecord(node="n", pid=1, address="ipc://@x", broadcast_handle=b"b", mask_handle=b"m")
    rank = RankRecord(rank=2, node="n", incarnation=9, pid=1, state=RankState.LOADING)
    gateway = GatewayRecord(name="g", pid=1, url="http://h:1", admin_url="http://h:2")
    records: dict[str, Record] = {
        KEYS.config: config,
        KEYS.desired: Desired(ranks=4),
        KEYS.view: View(epoch=1),
        KEYS.next: View(epoch=2),
        KEYS.engine: engine,
        KEYS.engine_status: EngineStatus(token=5, epoch=1),
        KEYS.incarnation: Counter(value=9),
        KEYS.agent("n"): AgentRecord(node="n", pid=1, started=1.0),
        KEYS.assign("n"): Assignment(node="n"),
        KEYS.rank(2, 9): rank,
        KEYS.exit(2): RankExit(rank=2, incarnation=8, reason="killed", at=1.0),
        KEYS.heartbeats("n"): Heartbeats(node="n", at=2.0, beats={9: 1.5}),
        KEYS.gateway("g"): gateway,
        KEYS.op("o"): Operation(id="o", kind=OperationKind.SCALE, target=6),
    }
    items = [
        KeyValue(key=key, value=encode(record), create_revision=10 + n, mod_revision=50 + n)
        for n, (key, record) in enumerate(records.items())
    ]
    leader = KeyValue(key=KEYS.leader, value=b"{}", create_revision=3, mod_revision=4)
    assert state_from([*items, leader], 99) == ClusterState(
        revision=99,
        config=config,
        desired=Desired(ranks=4),
        view=View(epoch=1),
        view_revision=52,
        next=View(epoch=2),
        next_revision=53,
        leader_revision=3,
        engine=engine,
        engine_token=14,
        engine_status=EngineStatus(token=5, epoch=1),
        incarnation=9,
        incarnation_revision=56,
        agents={"n": AgentRecord(node="n", pid=1, started=1.0)},
        assignments={"n": Assignment(node="n")},
        ranks={(2, 9): rank},
        exits={2: RankExit(rank=2, incarnation=8, reason="killed", at=1.0)},
        heartbeats={"n": Heartbeats(node="n", at=2.0, beats={9: 1.5})},
        gateways={"g": gateway},
        operations={"o": Operation(id="o", kind=OperationKind.SCALE, target=6)},
    )


def test_an_empty_store_is_an_empty_cluster() -> None:
    assert state_from([], 7) == ClusterState(revision=7)


def test_keys_of_another_version_are_left_alone() -> None:
    odd = [KeyValue(key=KEYS.prefix + name) for name in ("new", "new/1", "view/1", "agents", "config/x")]
    assert state_from(odd, 7) == ClusterState(revision=7)


@pytest.mark.parametrize("name", ["ranks/1", "ranks/a/b", "ranks/1/2/3", "exits/x"])
def test_a_malformed_key_is_named(name: str) -> None:
    with pytest.raises(SchemaError, match=name):
        state_from([KeyValue(key=KEYS.prefix + name, value=b"{}")], 1)


WRITTEN: dict[str, list[bytes]] = {  # what a reader may find there
    KEYS.desired: [encode(Desired(ranks=n)) for n in (1, 2)],
    KEYS.view: [encode(View(epoch=n)) for n in (1, 2)] + [b"damaged"],
    KEYS.leader: [b"{}"],
    KEYS.incarnation: [encode(Counter(value=n)) for n in (1, 2)],
    KEYS.exit(2): [encode(RankExit(rank=2, incarnation=n, reason="killed", at=1.0)) for n in (8, 9)] + [b"damaged"],
    KEYS.assign("n"): [encode(Assignment(node="n"))],
    KEYS.assign("m"): [encode(Assignment(node="m"))],
    KEYS.prefix + "exits/x": [b"{}"],
    KEYS.prefix + "new": [b"?"],
}
Change = tuple[str, int]
"""A key, and which of its values is put; -1: it is deleted."""
CHANGES = st.lists(
    st.sampled_from([(key, n) for key, values in WRITTEN.items() for n in range(-1, len(values))]), max_size=30
)


@given(CHANGES)
def test_a_state_kept_current_is_the_state_of_all_keys(changes: list[Change]) -> None:
    there: dict[str, KeyValue] = {}
    following, relisting, given_out = Reading(), Reading(), list[tuple[ClusterState, str]]()
    for revision, (key, which) in enumerate(changes, 1):
        if which < 0:
            there.pop(key, None)
            following.delete(key)
        else:
            value = WRITTEN[key][which]
            there[key] = KeyValue(key=key, value=value, create_revision=revision, mod_revision=revision)
            following.put(there[key])
        relisting.list(there.values())
        expected = _state_or_error(lambda: state_from(there.values(), revision))  # noqa: B023 - called at once
        for reading in (following, relisting):
            found = _state_or_error(lambda: reading.state(revision))  # noqa: B023
            assert type(found) is type(expected)
            if isinstance(found, ClusterState):
                assert found == expected
                given_out.append((found, repr(found)))
    assert all(repr(state) == as_given for state, as_given in given_out), "a state that was given out changes"


def _state_or_error(ask: Callable[[], ClusterState]) -> ClusterState | SchemaError:
    try:
        return ask()
    except SchemaError as error:
        return error


@pytest.mark.parametrize("name", ["", "a/b"])
def test_names_that_would_escape_their_key_are_refused(name: str) -> None:
    for make in (Keys, KEYS.agent, KEYS.assign, KEYS.heartbeats, KEYS.gateway, KEYS.op):
        with pytest.raises(ConfigError):
            make(name)


@pytest.mark.parametrize(
    ("prefix", "end"),
    [(b"a", b"b"), (b"a/", b"a0"), (b"a\xff", b"b"), (b"a\xff\xff", b"b"), (b"\xff", b"\0"), (b"", b"\0")],
)
def test_prefix_end_carries(prefix: bytes, end: bytes) -> None:
    assert prefix_end(prefix) == end
