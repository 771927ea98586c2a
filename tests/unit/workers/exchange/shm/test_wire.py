"""What a lane lets through: whole messages of the right pair of incarnations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from workers.exchange.link import Refusal, Reply, Tag
from workers.exchange.router import Parcel
from workers.exchange.rows import bits
from workers.exchange.shm.wire import ANSWER, ASK, Lane, lane_bytes, most_pairs
from workers.ipc.shared_memory import Segment, SegmentError

pytestmark = pytest.mark.unit

TAG = Tag(sequence=5, epoch=3, engine_token=70, step=11, attempt=1, layer=2)
ME, PEER = 8, 9  # incarnations
ROWS = np.arange(12, dtype=np.int16).reshape(4, 3)
PARCEL = Parcel(1, np.array([0, 2, 5]), np.array([0, 3]), np.array([1, 0, 1]), [4, 6], [1, 2])
BF16 = 1


@pytest.fixture
def lanes() -> Iterator[tuple[Lane, Lane]]:
    """The same lane as its writer and as its reader see it."""
    with Segment.create(lane_bytes(1 << 16), "test-lane") as segment:
        writer = Lane(segment)
        reader = Lane(Segment.attach(segment.fileno()))
        yield writer, reader
        reader.close()
        writer.close()


def test_a_request_arrives_whole(lanes: tuple[Lane, Lane]) -> None:
    writer, reader = lanes
    assert reader.words[ASK] == 0
    writer.ask(TAG, ME, PARCEL, ROWS, BF16)
    request = reader.request(reader.words[ASK], ME)
    assert request is not None
    assert (request.tag, request.experts, request.counts) == (TAG, [4, 6], [1, 2])
    assert request.rows[request.row_of].tolist() == ROWS[PARCEL.rows[PARCEL.row_of]].tolist()
    del request


def test_a_replaced_or_foreign_request_is_not_seen(lanes: tuple[Lane, Lane]) -> None:
    writer, reader = lanes
    writer.ask(TAG, ME, PARCEL, ROWS, BF16)
    assert reader.request(TAG.sequence, ME + 1) is None
    writer.ask(TAG._replace(sequence=6), ME, PARCEL, ROWS, BF16)
    assert reader.request(TAG.sequence, ME) is None
    assert reader.request(6, ME) is not None


def test_an_answer_says_what_it_answers_and_who_sent_it(lanes: tuple[Lane, Lane]) -> None:
    writer, reader = lanes
    writer.answer(TAG, PEER)
    assert reader.words[ANSWER] == TAG.sequence
    assert reader.reply() == Reply(TAG, PEER, refused=False)


def test_a_refusal_names_experts_and_reason(lanes: tuple[Lane, Lane]) -> None:
    writer, reader = lanes
    writer.answer(TAG, PEER, Refusal([4], "not here"))
    assert reader.reply() == Reply(TAG, PEER, refused=True)
    assert reader.refusal() == Refusal([4], "not here")


def test_what_does_not_fit_is_an_error_and_not_a_crash(lanes: tuple[Lane, Lane]) -> None:
    writer, _ = lanes
    assert most_pairs(1 << 16, 2 * 3) == (1 << 16) // 6
    wide = np.zeros((1, 1 << 16), dtype=np.int16)
    one = Parcel(1, np.array([0]), np.array([0]), np.array([0]), [4], [1])
    with pytest.raises(SegmentError, match="do not fit"):
        writer.ask(TAG, ME, one, wide, BF16)


def test_bits_are_the_same_memory() -> None:
    import torch

    rows = torch.tensor([[1.0, -0.0]], dtype=torch.bfloat16)
    bits(rows)[0, 0] = 0
    assert rows[0, 0] == 0


class Observed(Parcel):
    """Calls `look` whenever the writer reads it: what a peer sees if the writer is stopped at that point."""

    look: Callable[[], None]

    def __getattribute__(self, name: str) -> Any:
        if name in ("rows", "pairs", "row_of", "experts", "counts"):
            object.__getattribute__(self, "look")()
        return object.__getattribute__(self, name)


def test_a_peer_never_sees_a_half_written_request(lanes: tuple[Lane, Lane]) -> None:
    """It sees the request before, or the new one, or none. Each request says in all its parts which one it is."""
    writer, reader = lanes
    seen = set[int]()

    def look() -> None:
        number = reader.words[ASK]
        request = reader.request(number, ME) if number else None
        if request is not None:
            size = 1 + number % 9
            parts = [request.experts, request.counts, request.row_of.tolist()]
            assert parts == [[size] * size, [size] * size, [size - 1] * size], "a torn request"
            seen.add(number)

    for number in range(1, 40):
        size = 1 + number % 9
        rows = np.arange(size)
        parcel = Observed(1, rows, rows, np.full(size, size - 1), [size] * size, [size] * size)
        object.__setattr__(parcel, "look", look)
        writer.ask(TAG._replace(sequence=number), ME, parcel, np.full((size, 8), size, dtype=np.int32), 0)
        look()
    assert seen == set(range(1, 40))
