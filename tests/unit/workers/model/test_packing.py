"""Packed matrices: the same bits as plain ones, in memory that is given, for as long as they are used."""

from __future__ import annotations

import ctypes
import gc
import os
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workers.model import packing
from workers.model.packing import available, is_packed, linear, pack, packed, plain, product, repacked, use_packed
from workers.model.shared_weights import (
    LAYOUT,
    Entry,
    Mapped,
    Slot,
    WeightsCorrupt,
    copied,
    entries_of,
    map_shard,
    write_shard,
)
from workers.protocol.weight_client import Held

pytestmark = pytest.mark.unit
needs_packing = pytest.mark.skipif(not available(), reason="this torch, or this processor, packs nothing")


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)


@needs_packing
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 128, 300])
@pytest.mark.parametrize("shape", [(256, 128), (832, 1024), (1024, 416)])
def test_a_product_has_the_bits_of_a_plain_one(rows: int, shape: tuple[int, int]) -> None:
    weights, x = matrix(*shape), matrix(rows, shape[1])
    wanted = torch.mm(x, weights.t())
    found = repacked(weights.clone())
    assert is_packed(found)
    assert torch.equal(product(x, found), wanted)
    out = torch.empty_like(wanted)
    assert product(x, found, out) is out
    assert torch.equal(out, wanted)
    assert torch.equal(
        product(matrix(1, shape[1]).expand(rows, -1), found)[0], torch.mm(matrix(1, shape[1]), weights.t())[0]
    )
    assert torch.equal(plain(found), weights)


def test_what_would_grow_or_is_of_another_type_stays_plain() -> None:
    for weights in (matrix(100, 70), matrix(256, 128, torch.float32), matrix(256, 128).flatten(), matrix(0, 8)):
        before = weights.clone()
        assert pack(weights) == b""
        assert torch.equal(weights, before)


@needs_packing
def test_it_lies_in_the_memory_that_was_given_and_keeps_it() -> None:
    room = matrix(256, 128)
    wanted, x = torch.mm(matrix(4, 128), room.t()), matrix(4, 128)
    before, how = room.data_ptr(), pack(room)
    found = packed(room, how)
    assert torch.ops.mkldnn.data_ptr(found) == before
    parameter: Any = packing.parameter(found)
    del room, found
    gc.collect()
    noise = [matrix(256, 128) for _ in range(50)]
    assert torch.equal(linear(x, parameter), wanted)
    assert len(noise) == 50


@needs_packing
def test_its_memory_ends_with_it() -> None:
    """Else a rank would keep every expert that it ever had."""
    room = matrix(256, 128)
    found, memory = packed(room, pack(room)), weakref.ref(room)
    kept = packing.parameter(found)
    del room, found
    gc.collect()
    assert memory() is not None
    del kept
    gc.collect()
    assert memory() is None


@needs_packing
def test_a_linear_module_multiplies_with_packed_weights() -> None:
    module = nn.Linear(128, 256, dtype=torch.bfloat16)
    x = matrix(5, 128)
    wanted = module(x)
    module.weight = packing.parameter(repacked(module.weight.detach().clone()))
    use_packed(nn.Sequential(module))
    assert torch.equal(module(x), wanted)
    assert torch.equal(module(x[None])[0], wanted)


@needs_packing
def test_a_shard_holds_it_packed_and_its_digest_is_of_what_was_read() -> None:
    weights, seen = matrix(256, 128), list[Any]()

    def shard(pack_it: bool) -> tuple[int, int]:
        slot = Slot("w", weights.dtype, tuple(weights.shape), copied(weights))
        entry = Entry(
            "e", [slot._replace(pack=pack) if pack_it else slot], lambda parts: seen.append(list(parts)) or b""
        )
        return write_shard([entry])

    found = {}
    for pack_it in (False, True):
        fd, checksum = shard(pack_it)
        held = Held(1, ["e"], os.fstat(fd).st_size, checksum, verified=False)
        found[pack_it] = entries_of(map_shard(fd, held), held)["e"].tensors["w"]
        os.close(fd)
    assert seen[0] == seen[1]
    assert [is_packed(found[each]) for each in (False, True)] == [False, True]
    assert torch.equal(plain(found[True]), found[False])


@needs_packing
@pytest.mark.parametrize("shape", [(192, 64), (4096, 64), (832, 128), (1024, 416), (1024, 4096), (1216, 64)])
def test_block_by_block_it_is_what_onednn_makes_of_the_whole(shape: tuple[int, int], monkeypatch: Any) -> None:
    """So at no time is there a second copy of a large matrix, in memory of this process alone. As few as that allows:
    each is a call that takes as long as what it packs.
    """
    ops: Any = torch.ops.mkldnn
    weights, sizes = matrix(*shape), list[int]()
    whole = ops._reorder_linear_weight(weights, None)
    reorder = ops._reorder_linear_weight

    def noted(block: Tensor, batch: None) -> Tensor:
        sizes.append(block.shape[0])
        made: Tensor = reorder(block, batch)
        return made

    monkeypatch.setattr(ops, "_reorder_linear_weight", noted)
    room = weights.clone()
    assert packing.layout(shape) == bytes(ops._get_mkldnn_serialized_md(whole).tolist())
    sizes.clear()
    assert pack(room) == packing.layout(shape)
    assert torch.equal(room.view(torch.uint8), bytes_of(whole, room.nbytes).view(shape[0], -1))
    assert len(set(sizes)) == 1
    assert sizes[0] <= 1024
    assert sizes[0] * 2 * shape[1] <= 4 << 20
    assert len(sizes) == {4096: 4, 1024: 1 if shape[1] < 4096 else 2, 1216: 19}.get(shape[0], 1)
    assert torch.equal(torch.cat(list(packing.plain_blocks(room))), weights)


def bytes_of(packed_matrix: Tensor, nbytes: int) -> Tensor:
    memory = (ctypes.c_char * nbytes).from_address(torch.ops.mkldnn.data_ptr(packed_matrix))
    return torch.frombuffer(bytearray(memory), dtype=torch.uint8)


def entry_packed(weights: Tensor, how: bytes) -> Mapped:
    """As a rank finds it in a shard whose header says that it is packed like that."""
    slot = Slot("w", weights.dtype, tuple(weights.shape), copied(weights), lambda _: how)
    fd, checksum = write_shard([Entry("e", [slot], lambda parts: b"")])
    held = Held(1, ["e"], os.fstat(fd).st_size, checksum, verified=False)
    try:
        return entries_of(map_shard(fd, held), held)["e"]
    finally:
        os.close(fd)


@needs_packing
def test_what_another_torch_has_packed_is_damaged_and_no_error_of_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN believes a description unseen: one of another shape makes it read what is not there."""
    weights = matrix(256, 128)
    right, other = pack(weights.clone()), pack(matrix(512, 128))
    entry_packed(weights, right)
    for wrong in (b"?", right[:-1], right + b"?", other):
        with pytest.raises(WeightsCorrupt, match="e: these weights are packed for another torch or processor"):
            entry_packed(weights, wrong)
    with pytest.raises(WeightsCorrupt):
        entry_packed(weights.float(), right)
    monkeypatch.setattr(packing, "available", lambda: False)
    with pytest.raises(WeightsCorrupt):
        entry_packed(weights, right)


def test_a_rank_asks_for_what_its_own_torch_and_processor_have_packed() -> None:
    assert torch.__version__ in LAYOUT
    assert torch.backends.cpu.get_cpu_capability() in LAYOUT
    assert "/" not in LAYOUT, "other hosts' names for an entry begin behind the first one of its key"


def test_where_it_does_not_work_matrices_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another torch may lack what this needs, or give other bits."""

    def raises(*_: object) -> bytes:
        raise RuntimeError("no such operation")

    weights = matrix(256, 128)
    for broken in (raises, lambda _: b"", lambda made: made.mul_(2).sign().sum().item() and b"?"):
        available.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(packing, "_pack", broken)
            assert not available()
            assert pack(weights) == b""
    available.cache_clear()
