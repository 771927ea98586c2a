"""What a start of `elastic serve` keeps of the last one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import msgspec
import pytest

from elastic.demo.model import shipped_demo_model
from elastic.serve.cluster_config import cluster_config
from elastic.serve.options import DEFAULT_RANKS, ServeOptions
from elastic.serve.stored_config import write_config
from membership.base.errors import PlanRefused
from membership.store.codec import decode, encode
from membership.store.in_memory import MemoryStore
from membership.store.keys import Keys
from membership.store.records import ClusterConfig, Desired

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
