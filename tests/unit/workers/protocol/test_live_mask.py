"""The live mask: what the engine writes is what ranks read, for all 256 ranks."""

from __future__ import annotations

import pytest

from membership.base.errors import ConfigError
from workers.ipc.handover import HandoverRefused
from workers.protocol.live_mask import MAX_RANKS, LiveMask

pytestmark = pytest.mark.unit


def test_readers_see_each_change() -> None:
    with LiveMask.create() as writer, LiveMask.attach(writer.handle()) as reader:
        assert (reader.masked(), reader.generation) == (0, 0)
        for rank in (0, 63, 64, MAX_RANKS - 1):
            writer.mask(rank)
            assert reader.masked() >> rank & 1
        assert reader.masked().bit_count() == 4
        assert reader.masked() == writer.masked()
        writer.reset([7])
        assert reader.masked() == 1 << 7
        assert reader.generation == 5


def test_a_page_outlives_its_engine() -> None:
    writer = LiveMask.create()
    writer.mask(3)
    with LiveMask.attach(writer.handle()) as reader:
        handle = writer.handle()
        writer.close()
        assert reader.masked() == 8
        with pytest.raises(HandoverRefused):
            LiveMask.attach(handle)


@pytest.mark.parametrize("rank", [-1, MAX_RANKS])
def test_impossible_ranks_are_refused(rank: int) -> None:
    with LiveMask.create() as mask, pytest.raises(ConfigError, match=str(rank)):
        mask.mask(rank)


def test_an_evicted_incarnation_learns_it_in_later_epochs_too() -> None:
    with LiveMask.create() as engine, LiveMask.attach(engine.handle()) as rank:
        engine.mask(3)
        engine.evict(3, 8)
        for _ in range(2):
            assert rank.evicted(3, 8)
            assert rank.evicted(3, 7)
            assert not rank.evicted(3, 9), "its successor"
            assert not rank.evicted(2, 8), "another rank"
            engine.reset([1])
        assert rank.masked() == 1 << 1
