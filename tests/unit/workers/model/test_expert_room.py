"""Experts in memory that outlives their rank, with the GPU's copy kernel in Triton's interpreter.

What is loaded is the one place where bytes of the host could come from: a test that wants none of it gives garbage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from membership.base.errors import RankFailed

pytest.importorskip("triton")

from workers.model.cuda import expert_room
from workers.model.cuda.expert_room import ExpertRoom, RoomShape

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(torch.cuda.is_available(), reason="addresses of the CPU's memory are no GPU's"),
]

CPU, HIDDEN, INNER, EXPERTS = torch.device("cpu"), 24, 8, 6
SHAPE = RoomShape(((2 * INNER, HIDDEN), (HIDDEN, INNER)), torch.bfloat16, EXPERTS)


@dataclass(frozen=True)
class Reached:
    address: int
    size: int


@dataclass
class Host:
    """What an agent keeps: pieces of each slot. `most`: no memory for more."""

    pieces: dict[int, list[Tensor]] = field(default_factory=dict)
    most: int = 100

    def of(self, slot: int) -> Pieces:
        return Pieces(self, slot)

    def room(self, slot: int, shape: RoomShape = SHAPE) -> ExpertRoom:
        """A rank takes this slot."""
        return ExpertRoom(shape, self.of(slot), CPU)


@dataclass
class Pieces:
    host: Host
    slot: int
    looked: int = 0

    def own(self, number: int, *, make: bool) -> Tensor | None:
        mine = self.host.pieces.setdefault(self.slot, [])
        if number == len(mine) and make:
            if sum(map(len, self.host.pieces.values())) >= self.host.most:
                raise RankFailed("CUDA_ERROR_OUT_OF_MEMORY")
            mine.append(torch.zeros(SHAPE.piece_bytes, dtype=torch.uint8))
        return mine[number] if number < len(mine) else None

    def others(self) -> Sequence[Reached]:
        self.looked += 1
        pieces = (piece for slot, each in self.host.pieces.items() if slot != self.slot for piece in each)
        return [Reached(piece.data_ptr(), len(piece)) for piece in pieces]

    def let_go(self) -> None:
        """They stay."""


def matrices(expert: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(expert)
    return [torch.randn(*shape, generator=draw).bfloat16() for shape in SHAPE.matrices]


GARBAGE = [torch.full(shape, torch.nan, dtype=torch.bfloat16) for shape in SHAPE.matrices]


def digest(expert: int) -> bytes:
    return f"digest {expert}".encode()


def load(room: ExpertRoom, expert: int, content: list[Tensor] | None = None) -> bool:
    """Whether the expert is then what it should be."""
    found = room.place((0, expert), digest(expert), content or matrices(expert))
    return found is not None and all(map(torch.equal, found, matrices(expert)))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three experts in each."""
    monkeypatch.setattr(expert_room, "PIECE_BYTES", 3 * SHAPE.place_bytes)


def test_a_successor_finds_its_experts_in_place() -> None:
    host = Host()
    first = host.room(0)
    assert all(load(first, expert) for expert in range(4))
    assert len(host.pieces[0]) == 2
    successor = host.room(0)
    assert all(load(successor, expert, GARBAGE) for expert in range(4))
    assert (successor.kept, successor.copied, successor.filled) == (4, 0, 0)
    assert load(successor, 5)
    assert len(host.pieces[0]) == 2


def test_a_rank_that_died_in_the_midst_of_a_copy_leaves_nothing_that_counts() -> None:
    host = Host()
    room = host.room(0)
    load(room, 1)
    place = room._free()
    assert place is not None
    with pytest.raises(RuntimeError):  # the first matrix is there by then
        room._fill(place, expert_room.Content(9, 0, 2, digest(2)), [matrices(2)[0], torch.zeros(3, 5)])
    successor = host.room(0)
    assert load(successor, 1, GARBAGE)
    assert load(successor, 2)
    assert (successor.kept, successor.filled) == (1, 1)


def test_another_content_under_the_same_name_is_not_taken() -> None:
    host = Host()
    load(host.room(0), 1, GARBAGE)
    successor = host.room(0)
    found = successor.place((0, 1), b"another digest", matrices(1))
    assert found is not None
    assert all(map(torch.equal, found, matrices(1)))
    assert successor.filled == 1


def test_a_rank_takes_from_another_slot_what_it_lacks() -> None:
    host = Host()
    load(host.room(0), 1)
    load(host.room(1), 2)
    room = host.room(2)
    assert [load(room, 1, GARBAGE), load(room, 2, GARBAGE), load(room, 3)] == [True] * 3
    assert (room.copied, room.filled) == (2, 1)


def test_what_changed_while_it_was_copied_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    source = host.room(0)
    load(source, 1)
    reader, copy = host.room(1), ExpertRoom._copy

    def overwritten(numbers: Sequence[Sequence[int]], target: Tensor, unit: int) -> None:
        copy(numbers, target, unit)
        if unit == expert_room.CHUNK_BYTES:
            source.drop([(0, 1)])
            for place in source._places:
                source._fill(place, expert_room.Content(99, 0, 1, digest(1)), matrices(1))

    monkeypatch.setattr(ExpertRoom, "_copy", staticmethod(overwritten))
    assert load(reader, 1)
    assert (reader.copied, reader.filled) == (0, 1)


def test_all_that_others_have_is_copied_at_once() -> None:
    """Several pieces on both sides; what they have with other bytes, and what nobody has, is not here then."""
    host = Host()
    first, second = host.room(0), host.room(1)
    assert all(load(first, expert) for expert in range(4))
    load(second, 4)
    load(second, 5, GARBAGE)
    room = host.room(2)
    load(room, 3)
    assert room.fetch({(0, expert): digest(expert) for expert in range(5)})
    assert (room.kept, room.copied, room.filled) == (0, 5, 0)
    assert not room.fetch({(0, 5): b"another digest", (0, 2): digest(2)})
    assert not room.fetch({(0, 1): b""}), "nothing tells it apart"
    assert all(load(room, expert, GARBAGE) for expert in range(5))
    assert (room.kept, room.copied, room.filled) == (0, 5, 0)


def test_what_was_fetched_keeps_its_place_until_the_load_is_over() -> None:
    host = Host(most=2)
    others = host.room(0)
    assert all(load(others, expert) for expert in range(3))
    room = host.room(1)
    assert room.fetch({(0, expert): digest(expert) for expert in range(3)})
    assert room.place((0, 4), digest(4), matrices(4)) is None, "there is no memory for more"
    room.rest()
    assert load(room, 4), "the load was given up"
    assert all(load(room, expert, GARBAGE) for expert in (1, 2))


def test_what_a_load_will_want_is_overwritten_last() -> None:
    """A predecessor's experts are all unused at first, and the first of them is the next that is wanted."""
    host = Host(most=1)
    first = host.room(0)
    assert all(load(first, expert) for expert in range(3))
    successor = host.room(0)
    successor.expect((0, expert) for expert in (4, 0, 1))
    assert load(successor, 4), "in the place of 2"
    assert all(load(successor, expert, GARBAGE) for expert in (0, 1))
    assert (successor.kept, successor.filled) == (2, 1)
    again = host.room(0)
    again.expect((0, expert) for expert in (5, 0, 1, 4))
    assert load(again, 5), "there is nothing else to take"
    assert (
        sum(load(again, expert, GARBAGE) for expert in (0, 1, 4) if again._known.get(((0, expert), digest(expert))))
        == 2
    )


def test_a_copy_takes_no_place_of_what_is_wanted_with_it() -> None:
    host = Host(most=2)
    load(host.room(1), 4)
    first = host.room(0)
    assert all(load(first, expert) for expert in range(3))
    successor = host.room(0)
    assert successor.fetch({(0, 4): digest(4), (0, 0): digest(0), (0, 1): digest(1)})
    assert all(load(successor, expert, GARBAGE) for expert in (4, 0, 1))
    assert (successor.kept, successor.copied, successor.filled) == (2, 1, 0)


def test_a_digest_may_end_with_zeros() -> None:
    """One in 256 does: it was loaded from the host again by every successor."""
    host, said = Host(), b"digest\0\0"
    host.room(0).place((0, 1), said, matrices(1))
    for room in (host.room(0), host.room(1)):
        found = room.place((0, 1), said, GARBAGE)
        assert found is not None
        assert all(map(torch.equal, found, matrices(1)))


def test_others_are_looked_for_once_in_a_load_and_only_if_something_is_missing() -> None:
    host = Host()
    load(host.room(0), 1)
    pieces = host.of(0)
    room = ExpertRoom(SHAPE, pieces, CPU)
    load(room, 1)
    assert pieces.looked == 0
    load(room, 2)
    load(room, 3)
    assert pieces.looked == 1
    room.rest()
    load(room, 4)
    assert pieces.looked == 2


def test_what_is_dropped_stays_until_its_place_is_needed() -> None:
    host = Host(most=1)
    room = host.room(0)
    for expert in range(3):
        load(room, expert)
    room.drop([(0, 0), (0, 2)])
    assert load(room, 2, GARBAGE)
    assert room.kept == 1
    assert load(room, 4), "in the place of 0"
    assert load(room, 1, GARBAGE)
    assert room.place((0, 0), digest(0), matrices(0)) is None, "all three places are used, and there is no memory"


@pytest.mark.parametrize("wrong", ["no digest", "shape", "type"])
def test_what_does_not_fit_is_left_to_others(wrong: str) -> None:
    room, content = Host().room(0), matrices(1)
    if wrong == "shape":
        content = [matrix.t() for matrix in content]
    elif wrong == "type":
        content = [matrix.float() for matrix in content]
    assert room.place((0, 1), b"" if wrong == "no digest" else digest(1), content) is None
