"""The pools that an agent keeps: of a rank that has certainly ended, to be read, until they are freed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from membership.base.errors import ConfigError
from membership.base.rank_id import ProcessId, RankId, SpareId
from tests.support.helpers import eventually
from workers.agent.kv_pools import KvPools
from workers.ipc.handover import HandoverRefused
from workers.protocol.pool_client import opened

pytestmark = pytest.mark.unit

KEY = RankId(1, 11)


class Scene:
    """Pools, and which ranks have ended."""

    def __init__(self) -> None:
        self.ended: set[ProcessId] = set()
        self.pools = KvPools(self.ended.__contains__)

    def read(self, key: RankId = KEY) -> bytes:
        with opened(self.pools.handle(), key) as pool:
            return os.pread(pool.fd, 100, 0)


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    os.write(made.pools.make(KEY), b"what it had")
    yield made
    made.pools.close()


def test_the_pool_of_a_rank_that_may_live_is_refused(scene: Scene) -> None:
    with pytest.raises(HandoverRefused, match="not known to have ended"):
        scene.read()
    scene.ended.add(KEY)
    assert scene.read() == b"what it had"


def test_it_can_be_read_only(scene: Scene) -> None:
    scene.ended.add(KEY)
    with opened(scene.pools.handle(), KEY) as pool, pytest.raises(OSError, match="Bad file descriptor"):
        os.write(pool.fd, b"x")


def test_a_pool_that_is_freed_or_of_another_incarnation_is_not_there(scene: Scene) -> None:
    other = RankId(1, 12)
    scene.ended |= {KEY, other}
    with pytest.raises(HandoverRefused, match="not kept"):
        scene.read(other)
    scene.pools.free(KEY)
    with pytest.raises(HandoverRefused, match="not kept"):
        scene.read()
    with pytest.raises(ConfigError), opened(b"", KEY):
        pass


def test_a_spare_takes_its_pool_along(scene: Scene) -> None:
    spare, rank = SpareId(3), RankId(2, 12)
    os.write(scene.pools.make(spare), b"of the spare")
    scene.pools.rename(spare, rank)
    scene.ended.add(rank)
    assert scene.pools.keys == {KEY, rank}
    assert scene.read(rank) == b"of the spare"


def test_reading_leaves_no_descriptor_behind(scene: Scene) -> None:
    def descriptors() -> int:
        links = (
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if os.path.lexists(f"/proc/self/fd/{fd}")
        )
        return sum("memfd:elastic-ep-kv" in link for link in links)

    scene.ended.add(KEY)
    before = descriptors()
    for _ in range(5):
        scene.read()
    eventually(lambda: descriptors() == before, 30.0, "the readers' descriptors to be closed")
    scene.pools.free(KEY)
    assert descriptors() == before - 1
