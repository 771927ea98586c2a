"""Whether a rank may serve beside the others: it must have loaded the same model, by content, and compute alike. Pure.

What decides a bit of the output is listed in `RankRecord.identity`, part by part, so that a refusal can name the part.
The first view that commits makes its members' parts and experts the reference (`Checkpoint`), which stays whatever
becomes of those ranks. Before that the lowest rank that has loaded is the reference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from operator import attrgetter

from membership.base.enums import Exactness
from membership.store.records import DIGEST_BYTES, Checkpoint, ClusterConfig, ClusterState, RankRecord

KERNELS = "kernels"
THREADS = "threads"
ARITHMETIC = (KERNELS, THREADS)  # they matter only where outputs are to be equal to the bit
COMPUTES = (*ARITHMETIC, "code", "dtype", "exactness")  # not of the model but of the process
HINT = "put the files back as they were, or restart the cluster to serve the new ones"
HINT_COMPUTES = "run it with the code and libraries, and on the kind of processor, of the other ranks"
_UNKNOWN = bytes(DIGEST_BYTES)
_OTHER_WAY = "computes differently from what"


def parts_of(record: RankRecord) -> dict[str, str]:
    """Everything that decides a bit of the rank's output; empty until it has loaded."""
    return {**record.identity, KERNELS: record.fingerprint} if record.fingerprint else dict(record.identity)


def refusal(state: ClusterState, record: RankRecord) -> str:
    """Return why this rank must not serve beside the others, or "" if it may (or has not loaded yet)."""
    parts, reference = parts_of(record), _reference(state, record)
    if not parts or state.config is None:
        return ""
    differing = list(_differing(parts, reference.parts, state.config)) or list(
        _differing_experts(record.expert_digests, reference.experts)
    )
    if not differing:
        return ""
    kind = _OTHER_WAY if all(each.startswith(COMPUTES) for each in differing) else "has another model than"
    return f"rank {record.rank} on node {record.node} {kind} the cluster serves: {', '.join(differing)}"


def advice(reason: str) -> str:
    """Return what to do about a refusal, given its reason."""
    return HINT_COMPUTES if _OTHER_WAY in reason else HINT


def _reference(state: ClusterState, record: RankRecord) -> Checkpoint:
    """What the rank is compared with; parts that only the cluster's config knows are added."""
    found = state.checkpoint
    if found is None:
        members = {m.id for m in state.view.members} if state.view is not None else set()
        loaded = [r for r in state.ranks.values() if parts_of(r) and r.id != record.id]
        loaded = [r for r in loaded if r.id in members] or [r for r in loaded if r.rank < record.rank]
        first = min(loaded, key=attrgetter("rank"), default=None)
        found = Checkpoint(parts=parts_of(first), experts=first.expert_digests) if first is not None else Checkpoint()
    known = state.config.files if state.config is not None else ()
    return Checkpoint(parts={**dict(known), **found.parts}, experts=found.experts)


def _differing(parts: Mapping[str, str], known: Mapping[str, str], config: ClusterConfig) -> Iterable[str]:
    for name in sorted(parts.keys() & known.keys()):
        if name in ARITHMETIC and config.exactness != Exactness.INVARIANT:
            continue
        if parts[name] != known[name]:
            yield f"{name} ({parts[name]} instead of {known[name]})"


def _differing_experts(digests: tuple[bytes, ...], known: tuple[bytes, ...]) -> Iterable[str]:
    """The first expert that is known to be another one."""
    for layer, (mine, theirs) in enumerate(zip(digests, known, strict=False)):
        for start in range(0, min(len(mine), len(theirs)), DIGEST_BYTES):
            one, other = mine[start : start + DIGEST_BYTES], theirs[start : start + DIGEST_BYTES]
            if one != other and _UNKNOWN not in (one, other):
                yield f"weights of expert {start // DIGEST_BYTES} of MoE layer {layer} ({one.hex()}, not {other.hex()})"
                return


def learned(state: ClusterState) -> Checkpoint | None:
    """Return the reference that the staged view, which is about to be committed, makes; None: it is known already."""
    if state.checkpoint is not None or state.next is None:
        return None
    found = [record for member in state.next.members if (record := state.ranks.get(member.id)) is not None]
    parts = next((parts for record in found if (parts := parts_of(record))), {})
    if not parts:
        return None
    experts: tuple[bytes, ...] = ()
    for record in found:
        experts = tuple(map(_merged, experts, record.expert_digests)) if experts else record.expert_digests
    return Checkpoint(parts=parts, experts=experts)


def _merged(some: bytes, more: bytes) -> bytes:
    cut = range(0, len(some), DIGEST_BYTES)
    pairs = ((some[at : at + DIGEST_BYTES], more[at : at + DIGEST_BYTES]) for at in cut)
    return b"".join(more if known == _UNKNOWN else known for known, more in pairs)


def name_of(checkpoint: Checkpoint | None) -> str:
    """A short name of what is served, by content: equal wherever the same is served. Empty while nothing is."""
    if checkpoint is None:
        return ""
    digest = hashlib.sha256(repr(sorted(checkpoint.parts.items())).encode())
    for layer in checkpoint.experts:
        digest.update(layer)
    return digest.hexdigest()[:16]
