"""What hosts say to each other about weights, and how entries are named on all of them. Light: no torch.

An entry has the name of its host's checkpoint in its key (`workers/model/shared_weights.py`), which means nothing on
another host, and behind it the type that is computed in, the layout, and its own name: by these another host asks.
"""

from __future__ import annotations

import hashlib
import re

import msgspec

from membership.store.records import DIGEST_BYTES, Checkpoint, ClusterState

PIECE = 1 << 20  # most bytes of one answer
DENSE = "dense"  # all that is not a routed expert
_EXPERT = re.compile(r"expert/(\d+)/(\d+)")


def expert_name(layer: int, expert: int) -> str:
    """Of an expert's entry."""
    return f"expert/{layer}/{expert}"


def small_file_digest(data: bytes) -> str:
    """Of a small file of the checkpoint, as `ClusterConfig.files` has it."""
    return hashlib.sha256(data).hexdigest()[:16]


def on_any_host(key: str) -> str:
    """What is the same in the keys of all hosts that serve this model."""
    return key.partition("/")[2]


def digest_of(name: str, served: Checkpoint | None) -> bytes:
    """Digest of the entry as the cluster serves it; empty: it is not known yet."""
    if served is None:
        return b""
    if name == DENSE:
        return served.parts.get("weights", "").encode()
    found = _EXPERT.fullmatch(name)
    if found is None:
        return b""
    layer, expert = int(found[1]), int(found[2])
    digests = served.experts[layer] if layer < len(served.experts) else b""
    digest = digests[expert * DIGEST_BYTES : (expert + 1) * DIGEST_BYTES]
    return digest if any(digest) else b""


class Peer(msgspec.Struct, frozen=True, array_like=True):
    """A host that has weights: where its agent listens, and the public key of that."""

    node: str
    endpoint: str
    key: str


def peers_of(state: ClusterState, node: str) -> tuple[Peer, ...]:
    """The other hosts that send what they have."""
    found = (a for a in state.agents.values() if a.weights_at and a.node != node)
    return tuple(Peer(a.node, a.weights_at, a.weights_key) for a in found)


class Elsewhere(msgspec.Struct, frozen=True, array_like=True):
    """Store to rank: who may have what it lacks, and digests of what it asked for, in this order; empty: not known."""

    peers: list[Peer]
    digests: list[bytes]


class Find(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """To another host: which of these entries do you hold?"""

    names: list[str]


class Read(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """To another host: these bytes of a shard, at most PIECE. `urgent`: requests wait for them."""

    shard: int
    offset: int
    nbytes: int
    urgent: bool = False


class File(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """To another host: a small file of the checkpoint, whole."""

    name: str


class Asked(msgspec.Struct, frozen=True, array_like=True):
    """A question; its answer has the same number."""

    number: int
    what: Find | Read | File


class Place(msgspec.Struct, frozen=True, array_like=True):
    """The shard that an entry is in: its number at its host, its size, and the checksum of its header."""

    name: str
    shard: int
    size: int
    checksum: int


class Said(msgspec.Struct, frozen=True, array_like=True):
    """An answer, before its bytes. With `wait_s` it is a promise only: the answer follows after that time."""

    number: int
    places: list[Place] = []
    refused: str = ""
    wait_s: float = 0.0
