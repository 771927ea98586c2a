"""Digests of weights by content, from the checksums of their tensors, which are made while they are read.

CRC-32 of each tensor, in the type it is computed in (3.8 GB/s, where blake2b makes 0.7): it is to tell models apart,
not to withstand an attacker, who could replace our code as well. All that a rank holds besides routed experts makes one
digest, each expert its own.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from membership.store.records import DIGEST_BYTES


class Part(NamedTuple):
    """One tensor of what is digested, by its bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    checksum: int  # CRC-32


def dense_digest(parts: Iterable[Part]) -> bytes:
    """Of everything but the routed experts."""
    digest = hashlib.sha256()
    for part in sorted(parts):
        digest.update(f"{part.name} {part.dtype} {part.shape} {part.checksum:08x}|".encode())
    return digest.hexdigest()[:16].encode()


def expert_digest(parts: Iterable[Part]) -> bytes:
    """Of one expert. Never zeros: those stand for an expert that is not known."""
    found = 0
    for part in parts:
        found = zlib.crc32(part.checksum.to_bytes(4, "big"), found)
    return (found or 1).to_bytes(DIGEST_BYTES, "big")


def table(digests: Mapping[tuple[int, int], bytes], layers: int, experts: int) -> tuple[bytes, ...]:
    """One string per MoE layer, as `RankRecord.expert_digests`."""
    nothing = bytes(DIGEST_BYTES)
    return tuple(
        b"".join(digests.get((layer, expert), nothing) for expert in range(experts)) for layer in range(layers)
    )
