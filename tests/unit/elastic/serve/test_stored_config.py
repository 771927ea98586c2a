"""What a start of `elastic serve` keeps of the last one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from elastic.demo.model import shipped_demo_model
from elastic.serve.cluster_config import cluster_config
from elastic.serve.init_config import init_config
from elastic.serve.options import DEFAULT_RANKS, InitOptions, ServeOptions
from elastic.serve.stored_config import require_no_secret, write_config
from membership.base.enums import Device
from membership.base.errors import ConfigError, PlanRefused
from membership.store.codec import decode, encode
from membership.store.in_memory import MemoryStore
from membership.store.keys import Keys
from membership.store.records import AgentRecord, Assignment, ClusterConfig, Desired, RankSpec

pytestmark = pytest.mark.unit

OPTIONS = ServeOptions(model=shipped_demo_model(), redundancy=10)
CONFIG = cluster_config(OPTIONS)
KEYS = Keys(CONFIG.cluster)


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    store = MemoryStore()
    yield store
    store.close()


def started(store: MemoryStore, **given: int) -> tuple[Desired, list[str]]:
    """The size that is stored, and what was said."""
    options, said = replace(OPTIONS, **given), []  # type: ignore[arg-type]
    config, ranks = write_config(store, cluster_config(options), options, said.append)
    desired, stored = store.get(KEYS.desired), store.get(KEYS.config)
    assert desired is not None
    assert stored is not None
    assert decode(stored.value, ClusterConfig) == config
    found = decode(desired.value, Desired)
    assert found.ranks == ranks <= config.max_ranks
    return found, said


def left(store: MemoryStore, desired: Desired) -> None:
    """A cluster was served, and stopped when it was like this."""
    started(store, ranks=2)
    store.put(KEYS.desired, encode(desired))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"gpu_exchange": 2, "device": Device.CPU}, "compute on the CPU"),
        ({"gpu_exchange": 1, "ranks": 1}, "two ranks at least"),
        ({"gpu_exchange": 2, "ranks": 3}, "there are 3 ranks"),
        ({"gpu_exchange": 9}, "from 0 to 8"),
    ],
)
def test_rows_do_not_travel_between_gpus_that_are_not_there(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        cluster_config(replace(OPTIONS, **given))
    assert cluster_config(replace(OPTIONS, gpu_exchange=2, ranks=2)).gpu_exchange == 2


def test_a_first_start_has_the_size_that_was_asked_for(store: MemoryStore) -> None:
    assert started(store) == (Desired(ranks=DEFAULT_RANKS), [])


def test_a_restart_has_the_size_at_which_the_cluster_was_left(store: MemoryStore) -> None:
    left(store, Desired(ranks=6, operation="op", slots=(0, 1, 2, 3, 4, 5)))
    desired, said = started(store)
    assert desired == Desired(ranks=6)
    assert said == ["6 ranks, as the cluster was left (--ranks sets another size)"]
    assert started(store)[0] == desired


def test_a_size_that_is_given_again_is_no_new_wish(store: MemoryStore) -> None:
    """A pod is started with the same flags each time: what was scaled and drained since stands."""
    left(store, Desired(ranks=6, cordoned=(1,)))
    desired, said = started(store, ranks=2)
    assert desired == Desired(ranks=6, cordoned=(1,))
    assert said == ["6 ranks, as the cluster was left (elastic scale sets another size)"]
    assert started(store, ranks=2)[0] == desired, "nor the third time"
    assert started(store, ranks=3) == (Desired(ranks=3), [])
    assert started(store, ranks=3) == (Desired(ranks=3), []), "nothing to say: it is as given"


def test_a_size_that_is_given_no_more_is_kept(store: MemoryStore) -> None:
    left(store, Desired(ranks=6))
    assert started(store)[0] == started(store)[0] == Desired(ranks=6)
    assert started(store, ranks=2)[0] == Desired(ranks=2), "it was not given at the last start"


def test_a_size_that_is_given_counts(store: MemoryStore) -> None:
    left(store, Desired(ranks=6, cordoned=(1,)))
    assert started(store, ranks=3) == (Desired(ranks=3), [])


def test_drained_slots_stay_drained(store: MemoryStore) -> None:
    left(store, Desired(ranks=3, cordoned=(1,)))
    assert started(store)[0] == Desired(ranks=3, cordoned=(1,))


def test_a_size_beyond_the_usual_limit_is_kept_and_one_beyond_a_given_limit_refused(store: MemoryStore) -> None:
    left(store, Desired(ranks=70))
    with pytest.raises(PlanRefused, match="--max-ranks") as caught:
        started(store, max_ranks=16)
    assert "--ranks" in caught.value.hint
    assert started(store)[0].ranks == 70


def test_another_model_begins_anew(store: MemoryStore) -> None:
    left(store, Desired(ranks=6))
    store.put(KEYS.config, encode(msgspec.structs.replace(CONFIG, experts=CONFIG.experts + 1)))
    assert started(store) == (Desired(ranks=DEFAULT_RANKS), [])


# -- a cluster that spans hosts


def live(store: MemoryStore, node: str) -> None:
    """An agent of that host holds its lease."""
    store.put(KEYS.agent(node), encode(AgentRecord(node=node, pid=1, started=1.0)), store.grant(60.0))


SPANNING = msgspec.structs.replace(CONFIG, join_key="key of the secret")


def spans(store: MemoryStore, **desired: Any) -> None:
    """It was served on several hosts."""
    store.put(KEYS.config, encode(SPANNING))
    store.put(KEYS.desired, encode(Desired(**{"ranks": 6, **desired})))


def assigned(store: MemoryStore, node: str, *ranks: int) -> None:
    specs = tuple(RankSpec(rank=rank, incarnation=rank + 1) for rank in ranks)
    store.put(KEYS.assign(node), encode(Assignment(node=node, ranks=specs)))


def joins(
    store: MemoryStore, config: ClusterConfig = SPANNING, ours: tuple[str, ...] = (), **given: Any
) -> tuple[ClusterConfig, int, str]:
    """What a start on host "a" makes of it, and says; it must write nothing."""
    said: list[str] = []
    before = store.range(KEYS.prefix)
    try:
        options = replace(OPTIONS, etcd=("e",), **given)
        config, ranks = write_config(store, config, options, said.append, node="a", join_keys=ours)
    finally:
        assert store.range(KEYS.prefix) == before
    return config, ranks, " ".join(said)


def test_a_cluster_that_lives_on_other_hosts_is_joined_as_it_is(store: MemoryStore) -> None:
    """Whoever holds its offices: there may be no controller and no engine at this moment, and both a moment later."""
    spans(store, slots=(0, 1, 2, 3, 4, 5))
    assigned(store, "b")
    live(store, "b")
    config, ranks, said = joins(store, ranks=2)
    assert (config.model, ranks) == (SPANNING.model, 6)
    assert said.endswith("lives on host b: this host joins it; 6 ranks are wanted, as before")
    elsewhere = msgspec.structs.replace(SPANNING, model="/where/this/host/has/it")
    assert joins(store, elsewhere)[0].model == elsewhere.model


def test_a_host_with_room_for_another_cache_is_told_which_one_it_gets(store: MemoryStore) -> None:
    spans(store)
    assigned(store, "b")
    live(store, "b")
    here = msgspec.structs.replace(SPANNING, kv_blocks=SPANNING.kv_blocks + 476)
    config, _, said = joins(store, here, kv_cache_memory=0.5)
    assert config.kv_blocks == SPANNING.kv_blocks == 1024
    assert said.endswith("its KV caches have 1024 blocks on all hosts; --kv-cache-memory 0.5 would be 1500 here")
    assert "KV caches" not in joins(store, kv_cache_memory=0.5)[2] + joins(store)[2]


def test_one_whose_other_hosts_may_be_cut_off_from_etcd_is_joined_too(store: MemoryStore) -> None:
    """Their leases have run out, and their ranks serve on: to begin anew would end them all once they are back."""
    spans(store)
    assigned(store, "a", 0, 1)
    assigned(store, "b", 2, 3)
    _, ranks, said = joins(store)
    assert ranks == 6
    assert said.endswith(
        "has ranks on host b, which may be cut off from this etcd: this host joins it; 6 ranks are wanted, as before"
    )
    with pytest.raises(ConfigError, match=r"may be cut off from this etcd, and has another --redundancy$") as refused:
        joins(store, msgspec.structs.replace(SPANNING, redundancy=3.0))
    assert "elastic init" in refused.value.hint


def test_one_with_other_settings_is_not_joined(store: MemoryStore) -> None:
    """They are named as users know them."""
    spans(store)
    live(store, "b")
    for changes, named in (
        ({"redundancy": 3.0}, "--redundancy"),
        ({"join_key": "k", "experts": 9, "files": ()}, "model, join secret"),
        ({"rebalance_bytes": 1, "served_model_aliases": ("x",)}, "--rebalance-budget, --served-model-name"),
    ):
        with pytest.raises(ConfigError, match=f"lives on host b, and has another {named}$"):
            joins(store, msgspec.structs.replace(SPANNING, **changes))


ROTATED = {
    "join_key": "key of the next",
    "join_keys_before": ("key of the secret",),
    "join_generation": 1,
    "join_since": 9,
}


def test_a_host_that_has_the_secret_among_others_joins_with_what_the_cluster_uses(store: MemoryStore) -> None:
    """Its file may have the one before in front."""
    rotated = msgspec.structs.replace(SPANNING, **ROTATED)
    store.put(KEYS.config, encode(rotated))
    live(store, "b")
    with pytest.raises(ConfigError, match=r"has another join secret$"):
        joins(store, ours=("key of the secret",))
    config, _, _ = joins(store, ours=("key of the secret", "key of the next"))
    assert config == rotated


def test_a_cluster_that_begins_anew_keeps_the_secret_that_it_had_come_to(store: MemoryStore) -> None:
    rotated = msgspec.structs.replace(SPANNING, **ROTATED)
    store.put(KEYS.config, encode(rotated))
    options = replace(OPTIONS, etcd=("e",))
    ours = ("key of the secret", "key of the next")
    assert write_config(store, SPANNING, options, lambda line: None, node="a", join_keys=ours)[0] == rotated


def test_a_cluster_that_begins_anew_goes_back_to_no_secret_that_it_has_replaced(store: MemoryStore) -> None:
    """Whoever starts it with a backup of the file; and a third secret makes it forget none."""
    store.put(KEYS.config, encode(msgspec.structs.replace(SPANNING, **ROTATED)))

    def begun(key: str) -> ClusterConfig:
        config, options = msgspec.structs.replace(SPANNING, join_key=key), replace(OPTIONS, etcd=("e",))
        return write_config(store, config, options, lambda line: None, node="a", join_keys=(key,) if key else ())[0]

    before = store.range(KEYS.prefix)
    with pytest.raises(ConfigError, match="has replaced this join secret by another one") as refused:
        begun("key of the secret")
    assert "elastic keys new" in refused.value.hint
    assert store.range(KEYS.prefix) == before
    third = begun("a third")
    assert (third.join_key, third.join_generation, third.join_grace) == ("a third", 2, False)
    assert third.join_keys_retired == ("key of the secret", "key of the next")
    assert begun("").join_keys_retired == third.join_keys_retired, "on one host it needs none"
    assert begun("a third").join_keys_retired == third.join_keys_retired, "which replaces none"
    with pytest.raises(ConfigError, match="has replaced this join secret"):
        begun("key of the next")


def test_a_host_that_does_not_advertise_cannot_join(store: MemoryStore) -> None:
    """Where nobody holds an office at this moment it began anew, under the agents of others."""
    spans(store)
    live(store, "b")
    with pytest.raises(ConfigError, match="lives on host b and spans hosts") as refused:
        joins(store, CONFIG)
    assert "--advertise" in refused.value.hint


@pytest.mark.parametrize("seen", [True, False])
def test_a_host_without_the_join_secret_of_the_others_is_told_to_bring_it(store: MemoryStore, seen: bool) -> None:
    require_no_secret(store, KEYS, "a")
    spans(store)
    require_no_secret(store, KEYS, "a")
    live(store, "a")
    assigned(store, "a", 0)
    require_no_secret(store, KEYS, "a")
    live(store, "b") if seen else assigned(store, "b", 1)
    with pytest.raises(ConfigError, match="is on host b, and this cluster has a join secret") as refused:
        require_no_secret(store, KEYS, "a")
    assert refused.value.hint.startswith("bring it with --join-secret-file or ELASTIC_JOIN_SECRET")
    assert ("elastic init --anew" in refused.value.hint) is not seen


def test_one_of_which_only_this_host_is_left_begins_anew(store: MemoryStore) -> None:
    """As after a stop of all: what its last processes here left behind belongs to nothing."""
    spans(store)
    live(store, "a")
    assigned(store, "a", 0, 1)
    assigned(store, "b")
    _, ranks = write_config(store, SPANNING, replace(OPTIONS, etcd=("e",)), lambda line: None, node="a")
    assert (ranks, store.get(KEYS.assign("a")), store.get(KEYS.agent("a"))) == (6, None, None)


# -- `elastic init`


def initialised(store: MemoryStore, config: ClusterConfig = CONFIG, **given: Any) -> tuple[int, str]:
    """The size that is stored, and what was said."""
    said: list[str] = []
    options = InitOptions(model=OPTIONS.model, redundancy=OPTIONS.redundancy, etcd=("e",), **given)
    init_config(store, config, options, said.append)
    desired = store.get(KEYS.desired)
    assert desired is not None
    return decode(desired.value, Desired).ranks, " ".join(said)


def test_it_begins_a_cluster_once_and_changes_nothing_any_more(store: MemoryStore) -> None:
    assert initialised(store, ranks=2) == (2, f"cluster {CONFIG.cluster!r} may begin, with 2 ranks")
    store.put(KEYS.desired, encode(Desired(ranks=6, cordoned=(1,))))
    live(store, "b")
    before = store.range(KEYS.prefix)
    for ranks in (2, 3):
        size, said = initialised(store, ranks=ranks)
        assert (size, said.endswith("is there already: nothing is changed")) == (6, True)
    assert store.range(KEYS.prefix) == before


def test_it_changes_settings_only_of_a_cluster_that_does_not_live(store: MemoryStore) -> None:
    initialised(store, ranks=2)
    store.put(KEYS.desired, encode(Desired(ranks=6)))
    live(store, "b")
    other = msgspec.structs.replace(CONFIG, kv_blocks=7)
    before = store.range(KEYS.prefix)
    with pytest.raises(ConfigError, match=r"lives on b with another --kv-blocks$"):
        initialised(store, other)
    assert store.range(KEYS.prefix) == before
    store.delete(KEYS.agent("b"))
    size, said = initialised(store, other)
    assert (size, said.endswith("has another --kv-blocks now")) == (6, True)


def test_it_begins_anew_if_told_to_and_nobody_lives(store: MemoryStore) -> None:
    """After a failure of all hosts: what is stored of ranks' weights and versions would refuse others for good."""
    initialised(store, ranks=2)
    store.put(KEYS.checkpoint, b"what the last ranks computed with")
    assigned(store, "b", 1)
    live(store, "b")
    with pytest.raises(ConfigError, match=r"lives on b$"):
        initialised(store, anew=True)
    store.delete(KEYS.agent("b"))
    assert initialised(store)[1].endswith("nothing is changed")
    assert initialised(store, anew=True)[1].endswith("begins anew")
    assert (store.get(KEYS.checkpoint), store.get(KEYS.assign("b"))) == (None, None)
