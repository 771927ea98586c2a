"""Keys of connections between hosts: derived from the join secret, never stored."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from membership.base.errors import ConfigError, QueueError
from membership.base.network import Network, read_secrets
from membership.store.records import AgentRecord, ClusterConfig, ClusterState, EngineRecord
from workers.queue.handle import Handle, this_host
from workers.queue.network import (
    Purpose,
    connecting_keys,
    join_key,
    join_keys,
    keys_for,
    listening_keys,
    network_for,
    refusing_retired,
    remote_of,
    require_joined,
    require_reachable,
    same_secret,
)

pytestmark = pytest.mark.unit

NETWORK = Network("10.0.0.1", "moe", b"a secret of the tests' cluster")
FAR = Handle("queue/x/1", "msgpack", "another host", "/run/x", "tcp://10.0.0.1:1", listening_keys(NETWORK).public)


def test_hosts_with_one_secret_have_the_same_keys_wherever_they_are() -> None:
    there = replace(NETWORK, address="10.0.0.2")
    assert (listening_keys(there), connecting_keys(there)) == (listening_keys(NETWORK), connecting_keys(NETWORK))
    assert remote_of(NETWORK).allowed == {connecting_keys(there).public}
    assert listening_keys(NETWORK) != connecting_keys(NETWORK)


@pytest.mark.parametrize("other", [{"secret": b"another secret, no less long"}, {"cluster": "eom"}])
def test_another_secret_or_cluster_has_other_keys_and_is_refused(other: dict[str, object]) -> None:
    stranger = replace(NETWORK, **other)  # type: ignore[arg-type]
    assert listening_keys(stranger) != listening_keys(NETWORK)
    assert connecting_keys(stranger) != connecting_keys(NETWORK)
    assert keys_for(FAR, NETWORK) == connecting_keys(NETWORK)
    with pytest.raises(QueueError, match="another join secret"):
        keys_for(FAR, stranger)


def test_on_one_host_no_keys_are_needed() -> None:
    near = Handle("queue/x/1", "msgpack", this_host(), "/run/x", FAR.remote, FAR.remote_key)
    assert keys_for(near, NETWORK) is None
    assert keys_for(FAR, None) is None
    assert keys_for(Handle("queue/x/1", "msgpack", "another host", "/run/x"), NETWORK) is None


def test_a_secret_is_long_and_shown_nowhere() -> None:
    with pytest.raises(ConfigError, match="has 5 bytes, and needs at least 20"):
        Network("10.0.0.1", "moe", b"short")
    assert "secret of" not in repr(NETWORK) + repr(listening_keys(NETWORK))
    assert pickle.loads(pickle.dumps(NETWORK)) == NETWORK, "it is handed to rank processes"


def test_each_purpose_has_keys_of_its_own() -> None:
    keys = [make(NETWORK, purpose) for make in (listening_keys, connecting_keys) for purpose in Purpose]
    assert len({each.public for each in keys}) == 2 * len(Purpose)


SPANNING = ClusterConfig(
    cluster="moe", model="m", served_model_name="m", moe_layers=1, experts=2, join_key=join_key(NETWORK)
)


@pytest.mark.parametrize(
    ("spans", "network", "why"),
    [
        (True, None, "spans hosts, and this role has no --advertise"),
        (True, replace(NETWORK, secret=b"another secret, no less long"), "has another join secret than this role"),
        (False, NETWORK, "is on one host: it was begun without --advertise"),
    ],
)
def test_a_role_that_could_not_work_in_the_cluster_is_refused(spans: bool, network: Network | None, why: str) -> None:
    config = SPANNING if spans else msgspec.structs.replace(SPANNING, join_key="")
    with pytest.raises(ConfigError, match=why) as refused:
        require_joined(config, network)
    assert "--advertise" in refused.value.hint


def test_one_that_can_is_let_in_wherever_it_is() -> None:
    require_joined(SPANNING, NETWORK)
    require_joined(SPANNING, replace(NETWORK, address="10.0.0.2"))
    require_joined(msgspec.structs.replace(SPANNING, join_key=""), None)


OTHER = b"another secret, no less long"


@pytest.fixture
def two(tmp_path: Path) -> Network:
    """A host with both secrets; it was begun with the first."""
    file = tmp_path / "secrets"
    file.write_bytes(NETWORK.secret + b"\n" + OTHER + b"\n")
    return replace(NETWORK, file=file)


def test_a_host_with_both_secrets_connects_to_listeners_with_either(two: Network) -> None:
    """Also where it has got the other one since it began; the listener admits who connects with the same."""
    other = replace(NETWORK, secret=OTHER)
    for listener in (NETWORK, other):
        far = msgspec.structs.replace(FAR, remote_key=listening_keys(listener).public)
        keys = keys_for(far, two)
        assert keys is not None
        assert remote_of(listener).allowed == {keys.public}
        for purpose in Purpose:
            assert same_secret(listening_keys(listener, purpose).public, two, purpose).secret == listener.secret
    assert two.file is not None
    two.file.write_bytes(OTHER)
    with pytest.raises(QueueError, match="another join secret"):
        keys_for(FAR, replace(two, secret=b"a third secret, long enough, too"))


def test_it_listens_with_the_one_that_the_cluster_uses(two: Network) -> None:
    other = join_key(replace(NETWORK, secret=OTHER))
    for key, secret in ((join_key(NETWORK), NETWORK.secret), (other, OTHER)):
        ours = require_joined(msgspec.structs.replace(SPANNING, join_key=key), two)
        assert ours is not None
        assert (ours.secret, set(ours.secrets)) == (secret, {NETWORK.secret, OTHER})
    assert set(join_keys(two)) == {join_key(NETWORK), other}
    lacking = msgspec.structs.replace(SPANNING, join_key="a third", join_generation=1)
    assert network_for(lacking, two) == two.read_again(), "as it is"
    with pytest.raises(ConfigError, match="has another join secret than this role") as refused:
        require_joined(lacking, two)
    assert "elastic keys ls" in refused.value.hint


@pytest.mark.parametrize("broken", [None, b"\n", b"\xff\xfe", b"short"])
def test_a_file_that_cannot_be_used_changes_nothing(two: Network, broken: bytes | None) -> None:
    assert two.file is not None
    now = two.read_again()
    two.file.unlink() if broken is None else two.file.write_bytes(broken)
    assert now.read_again() == now


@pytest.mark.parametrize("purpose", Purpose)
def test_a_secret_that_is_gone_from_the_file_opens_nothing_more(two: Network, purpose: Purpose) -> None:
    """Though the process remembers it."""
    assert two.file is not None
    two.file.write_bytes(OTHER)
    assert two.read_again().secrets == (OTHER,)
    with pytest.raises(QueueError, match="another join secret"):
        same_secret(listening_keys(NETWORK, purpose).public, two, purpose)
    two.file.unlink()
    assert same_secret(listening_keys(NETWORK, purpose).public, two, purpose).secret == NETWORK.secret


@pytest.mark.parametrize("purpose", Purpose)
def test_a_retired_secret_opens_nothing_though_its_line_is_left(two: Network, purpose: Purpose) -> None:
    other = replace(NETWORK, secret=OTHER)
    config = msgspec.structs.replace(
        SPANNING, join_key=join_key(other), join_generation=1, join_keys_before=(join_key(NETWORK),), join_grace=True
    )
    grace = network_for(config, two)
    assert grace is not None
    assert same_secret(listening_keys(NETWORK, purpose).public, grace, purpose).secret == NETWORK.secret
    after = refusing_retired(msgspec.structs.replace(config, join_grace=False), grace)
    assert after is not None
    assert same_secret(listening_keys(other, purpose).public, after, purpose).secret == OTHER
    with pytest.raises(QueueError, match="a join secret that was replaced"):
        same_secret(listening_keys(NETWORK, purpose).public, after, purpose)


def test_a_comment_in_the_file_is_no_secret(two: Network) -> None:
    assert two.file is not None
    two.file.write_bytes(b"# of the year before last, long enough\n" + OTHER + b"\n")
    assert read_secrets(two.file) == (OTHER,)


def hosts(*advertised: tuple[str, str, str], engine: tuple[str, str, str] | None = None) -> ClusterState:
    """Agents, and perhaps an engine: (node, host, address) of each."""
    state = ClusterState(
        revision=1,
        agents={n: AgentRecord(node=n, pid=1, started=1.0, host=h, address=a) for n, h, a in advertised},
    )
    if engine is None:
        return state
    node, host, address = engine
    record = EngineRecord(
        node=node,
        pid=2,
        address="ipc://",
        broadcast_handle=b"",
        mask_handle=b"",
        host=host,
        remote=f"tcp://{address}:9",
    )
    return msgspec.structs.replace(state, engine=record)


LOOPBACK = replace(NETWORK, address="127.0.0.1")


def test_hosts_at_a_loopback_address_reach_no_other() -> None:
    """Whichever comes second is refused."""
    for state in (hosts(("b", "another", "10.0.0.2")), hosts(engine=("b", "another", "10.0.0.2"))):
        require_reachable(state, "a", NETWORK)
        with pytest.raises(ConfigError, match=r"--advertise 127\.0\.0\.1: host b cannot reach this one there"):
            require_reachable(state, "a", LOOPBACK)
    for state in (hosts(("b", "another", "127.0.0.1")), hosts(engine=("b", "another", "127.0.0.1"))):
        with pytest.raises(ConfigError, match=r"host b is at 127\.0\.0\.1, where this one cannot reach it"):
            require_reachable(state, "a", NETWORK)


def test_a_trial_on_one_machine_may_be_at_a_loopback_address() -> None:
    here = this_host()
    state = hosts(("b", here, "127.0.0.1"), ("a", "before its restart", "10.0.0.1"), engine=("c", here, "127.0.0.1"))
    require_reachable(state, "a", LOOPBACK)
    require_reachable(state, "a", NETWORK)
    require_reachable(hosts(("b", "", "")), "a", LOOPBACK)
    require_reachable(hosts(("b", "another", "10.0.0.2")), "a", None)
