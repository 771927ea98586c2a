"""The parts under MessageQueue, without threads: the ring, its slowest reader, the arena, the codecs, the segment."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest

from membership.base.errors import ConfigError, MessageTooLarge, QueueClosed
from membership.base.process_stats import is_dying
from workers.ipc.shared_memory import PAGE, Segment, SegmentError
from workers.queue.arena import ArenaReader, ArenaWriter, layout, pack, unpack
from workers.queue.codec import PickleCodec
from workers.queue.ring import EXTENTS, RingReader, RingWriter

pytestmark = pytest.mark.unit

RING = 4096


@pytest.fixture
def ring() -> Iterator[RingWriter]:
    made = RingWriter(RING)
    yield made
    made.segment.close()


def reader_of(ring: RingWriter, slot: int, room_made: list[int] | None = None) -> RingReader:
    rung = room_made if room_made is not None else []
    segment = Segment.attach(ring.segment.fileno())
    return RingReader(segment, slot, ring.admit(slot), RING, lambda: rung.append(slot))


def test_random_traffic_arrives_whole_and_in_order_over_many_laps(ring: RingWriter) -> None:
    seed = int(os.environ.get("SEED", random.SystemRandom().randrange(2**32)))
    print(f"SEED={seed}")
    chance = random.Random(seed)
    readers = [reader_of(ring, slot) for slot in range(3)]
    owed: list[list[tuple[int, bytes]]] = [[], [], []]
    sent = 0
    while sent < 3000:
        if chance.random() < 0.6:
            record = (chance.randrange(5), chance.randbytes(chance.choice([0, 1, 7, 8, 9, 100, 1024])))
            fits = ring.fits(len(record[1]))
            assert ring.put(*record) == fits
            if fits:
                sent += 1
                for queue in owed:
                    queue.append(record)
            else:
                assert ring.laggards(len(record[1]))
        else:
            which = chance.randrange(3)
            assert readers[which].pending() == bool(owed[which])
            assert readers[which].take() == (owed[which].pop(0) if owed[which] else None)
    for reader in readers:
        reader.segment.close()


def test_the_slowest_reader_is_the_one_in_the_way_until_it_is_expelled(ring: RingWriter) -> None:
    slow, quick = reader_of(ring, 4), reader_of(ring, 9)
    while ring.put(0, bytes(500)):
        quick.take()
    assert ring.laggards(500) == [4]
    ring.expel(4)
    assert ring.put(0, bytes(500))
    with pytest.raises(QueueClosed, match="dropped"):
        slow.take()
    slow.segment.close()
    quick.segment.close()


def test_room_is_notified_once_there_is_enough_of_it(ring: RingWriter) -> None:
    notified: list[int] = []
    reader = reader_of(ring, 0, notified)
    while ring.put(0, bytes(120)):
        pass
    ring.want_room(120)
    taken = 0
    while not notified:
        reader.take()
        taken += 1
    assert taken * 128 >= RING // 4
    assert ring.fits(120)
    ring.have_room()
    notified.clear()
    while reader.take():
        pass
    assert not notified
    reader.segment.close()


def test_a_ring_without_readers_never_fills(ring: RingWriter) -> None:
    assert all(ring.put(0, bytes(1000)) for _ in range(100))
    late = reader_of(ring, 0)
    assert not late.pending()
    late.segment.close()
    with pytest.raises(ConfigError):
        RingWriter(5000)


def test_extents_are_used_again_only_when_all_views_are_gone() -> None:
    ring = RingWriter(RING)
    writer = ArenaWriter(ring.held, 8 * PAGE)
    readers = [ArenaReader(Segment.attach(writer.segment.fileno()), ring.held, slot) for slot in (0, 1)]
    first = writer.allocate(3 * PAGE, [0, 1])
    assert first is not None
    writer.hold(first, [0, 1])
    body = writer.fill(first, [memoryview(b"a" * 5000), memoryview(b"b" * 3000)])
    views = [reader.views(body) for reader in readers]
    assert [bytes(v) for v in views[1]] == [b"a" * 5000, b"b" * 3000]
    second = writer.allocate(4 * PAGE, [0, 1])
    assert second is not None
    assert second.offset == 3 * PAGE
    writer.cancel(second)
    assert writer.allocate(6 * PAGE, [0, 1]) is None
    assert writer.holders() == {0, 1}
    part = views[0][1]
    views[0].clear()
    views[1].clear()
    assert writer.holders() == {0}, "one view of one part keeps the extent"
    assert writer.allocate(6 * PAGE, [1]) is not None, "a reader that was dropped is not waited for"
    del part
    with pytest.raises(MessageTooLarge):
        writer.allocate(9 * PAGE, [])
    for reader in readers:
        reader.close()
    writer.segment.close()
    ring.segment.close()


def test_there_are_only_so_many_extents_and_a_slot_is_clean_for_the_next_reader() -> None:
    ring = RingWriter(RING)
    writer = ArenaWriter(ring.held, (EXTENTS + 1) * PAGE)
    for _ in range(EXTENTS):
        extent = writer.allocate(1, [7])
        assert extent is not None
        writer.hold(extent, [7])
    assert writer.allocate(1, [7]) is None
    writer.forget(7)
    assert writer.allocate(1, [7]) is not None
    writer.segment.close()
    ring.segment.close()


def test_parts_are_aligned_and_come_back() -> None:
    parts = [memoryview(bytes([n]) * size) for n, size in enumerate((0, 1, 64, 65, 1000))]
    offsets, total = layout(part.nbytes for part in parts)
    assert all(offset % 64 == 0 for offset in offsets)
    assert total == 0 + 64 + 64 + 128 + 1024
    assert [bytes(part) for part in unpack(pack(parts))] == [bytes(part) for part in parts]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(1000.0),
        np.arange(12, dtype=np.int8).reshape(3, 4),
        np.zeros((0, 5)),
        np.array(3.5),
        np.arange(10_000).reshape(100, 100)[:, ::2],
        np.asfortranarray(np.arange(10_000.0).reshape(100, 100)),
        np.array(["a", None], dtype=object),
        np.zeros(200, dtype=[("x", "<i4"), ("y", "<f8")]),
        np.array(["2026-01-01"] * 100, dtype="datetime64[D]"),
    ],
)
def test_arrays_of_all_kinds_come_back_equal(array: np.ndarray) -> None:
    codec = PickleCodec()
    data, buffers = codec.encode({"array": array, "twice": [array, array]})
    got = codec.decode(data, [memoryview(bytes(buffer)) for buffer in buffers])
    assert got["array"].dtype == array.dtype
    assert got["array"].shape == array.shape
    assert (got["array"] == array).all()
    assert got["twice"][0] is got["array"]


def test_a_segment_cannot_be_cut_short_and_a_foreign_file_is_refused() -> None:
    with Segment.create(100) as segment:
        assert segment.size == PAGE
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fileno(), 0)
        with pytest.raises(SegmentError, match="at least 8192"):
            Segment.attach(segment.fileno(), 8192)
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    with pytest.raises(SegmentError, match="not a sealed segment"):
        Segment.attach(fd)
    os.close(fd)


def test_the_living_are_not_dying() -> None:
    assert not is_dying(os.getpid())
    assert is_dying(2**22 + 1)
    assert not is_dying(0), "a process of another namespace: we cannot know"
