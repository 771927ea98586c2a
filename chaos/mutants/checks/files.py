"""Bytes that others wrote: records of a later version, KV blocks of another copy."""

from __future__ import annotations

from chaos.mutants.checks.promise import require
from membership.base.errors import RankError, SchemaError
from membership.store.codec import decode, encode
from membership.store.records import Desired


def records() -> None:
    """A record of a later version, whose meaning nobody here can know, is acted on by nobody."""
    written = encode(Desired(ranks=3))
    require(decode(written, Desired) == Desired(ranks=3), "a record was altered")
    more = written.replace(b'"ranks":3', b'"ranks":3,"colour":"blue"')
    require(decode(more, Desired) == Desired(ranks=3), "a field of a newer writer was not tolerated")
    for strange, what in ((written.replace(b'"v":1', b'"v":2'), "later version"), (encode_other(), "other kind")):
        try:
            found = decode(strange, Desired)
        except SchemaError as refused:
            require(str(refused), "a refusal without a reason")
        else:
            require(False, f"a record of a {what} was read as {found}")


def encode_other() -> bytes:
    """What looks like the record, and is of another kind."""
    return encode(Desired(ranks=3)).replace(b'"Desired"', b'"Pause"')


def kv_copies() -> None:
    """KV blocks that were written out for another copy, or another engine, never come into a request's cache."""
    import torch

    from workers.model.cpu.kv_cache import CpuKVCache
    from workers.model.kv_transfer import HEADER_BYTES, take_in, write_out

    def cache(seed: int) -> CpuKVCache:
        made = CpuKVCache(layers=2, blocks=6, block_size=4, dtype=torch.float32)
        some = torch.randn(2, 24, 2, 8, generator=torch.Generator().manual_seed(seed))
        for layer in made.layers:
            layer.write(torch.arange(48), some[0], some[1])
        return made

    source, target, untouched = cache(1), cache(2), cache(2)
    room = memoryview(bytearray(HEADER_BYTES + 2 * source.block_bytes))
    write_out(source, [1, 4], lambda nbytes: room, (7, 20))
    for stamp in ((7, 21), (8, 20)):
        try:
            take_in(target, [0, 5], room, stamp)
        except RankError as refused:
            require(str(refused), "a refusal without a reason")
        else:
            require(False, f"blocks of copy {(7, 20)} were taken for those of {stamp}")
    same = all(torch.equal(a, b) for a, b in zip(target.parts, untouched.parts, strict=True))
    require(same, "a refused copy left something behind")
    take_in(target, [0, 5], room, (7, 20))
    for mine, theirs in zip(source.parts, target.parts, strict=True):
        for a, b in ((1, 0), (4, 5)):
            heads = mine.shape[0] // 6
            rows = [torch.equal(mine[h * 6 + a], theirs[h * 6 + b]) for h in range(heads)]
            require(all(rows), f"block {a} was altered on its way to block {b}")
