"""Builds a transformers model without its routed experts, and finds out where to read those.

The model is laid out on the `meta` device, names are mapped with transformers' own conversion rules, and only what a
rank needs is read: everything but experts at once, an expert when the placement gives it to the rank. Where the host
has a weight store, what it holds is mapped instead, and a rank that finds everything there reads no weight file at all.
So a new rank gets what its host serves, also when the checkpoint's files have been replaced since. A host without the
weight files takes them from other hosts of the cluster.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from membership.base.enums import Device, Dtype
from membership.base.errors import ModelError
from workers.model import hooks
from workers.model.backend import Backend
from workers.model.checkpoint import Checkpoint, memory_of
from workers.model.code import code_version
from workers.model.content import CONFIG_FILE, Stamps, changed, changed_files, file_digest, name_of, stamp_files
from workers.model.devices import open_backend
from workers.model.expert_source import ExpertSource
from workers.model.families import ModelInfo, read_model_info
from workers.model.packing import Pack, parameter, plain
from workers.model.peer_weights import OtherHosts, PeerWeights
from workers.model.shared_weights import SIGN_TIMEOUT_S, Entry, Mapped, Served, SharedWeights, Slot, copied
from workers.model.weight_digests import dense_digest
from workers.protocol.load_progress import LoadProgress
from workers.protocol.weight_client import WeightClient
from workers.protocol.weight_peers import DENSE

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class LoadedModel:
    """A model whose expert modules are empty, with where to read the experts from."""

    info: ModelInfo
    model: Any
    expert_modules: list[nn.Module]
    attention_modules: list[nn.Module]
    source: ExpertSource
    checkpoint: Checkpoint
    dtype: torch.dtype  # of its arithmetic
    backend: Backend
    shared: SharedWeights | None = None
    config_digest: str = ""
    dense_digest: str = ""
    replaced: tuple[str, ...] = ()  # files that changed since the host's store was filled


def resolve_dtype(info: ModelInfo, dtype: str, backend: Backend) -> torch.dtype:
    """The type to compute in: under `auto` what the backend makes of the stored one. ModelError if it is unknown."""
    if dtype == Dtype.AUTO:
        return backend.compute_dtype(TORCH_DTYPES[info.dtype])
    if dtype not in TORCH_DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}", hint="use auto, float32 or bfloat16")
    return TORCH_DTYPES[dtype]


@dataclass
class Skeleton:
    """A model on `meta`, before it has weights."""

    stamps: Stamps
    config_digest: str
    info: ModelInfo
    model: Any
    expert_modules: list[nn.Module]
    dtype: torch.dtype


_prebuilt: list[Skeleton] = []  # by the forkserver; it can be taken once in each process


def prebuild(path: str, dtype: str = Dtype.AUTO) -> None:
    """In the forkserver: build the model without weights once, so that no rank has to. Ranks report what is wrong."""
    try:
        code_version()
        _prebuilt[:] = [_build(path, dtype, open_backend(Device.CPU))]
    except (ModelError, OSError, ValueError):
        _prebuilt.clear()


def _build(path: str | Path, dtype: str, backend: Backend) -> Skeleton:
    from transformers import AutoConfig, AutoModelForCausalLM

    stamps, digest = stamp_files(path), file_digest(Path(path) / CONFIG_FILE)
    info = read_model_info(path, weights=False)
    kind = resolve_dtype(info, dtype, backend)
    config = AutoConfig.from_pretrained(info.path)
    hooks.register()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=kind, attn_implementation=hooks.NAME)
    model.eval().requires_grad_(False)
    expert_modules = _detach_experts(model)
    if len(expert_modules) != info.moe_layers:
        raise ModelError(f"found {len(expert_modules)} expert modules where config.json promises {info.moe_layers}")
    if file_digest(Path(path) / CONFIG_FILE) != digest:
        raise changed(path, [CONFIG_FILE])
    return Skeleton(stamps, digest, info, model, expert_modules, kind)


def _skeleton(path: str | Path, dtype: str, backend: Backend, served: Served | None) -> Skeleton:
    """The prebuilt one, if it is of this very checkpoint and type; else a new one. `served`: what the host serves."""
    wanted = served.stamps if served is not None else stamp_files(path)
    while _prebuilt:
        made = _prebuilt.pop()
        if made.stamps == wanted and made.dtype == resolve_dtype(made.info, dtype, backend):
            return made
    made = _build(path, dtype, backend)
    if served is None:
        return made
    if made.config_digest != served.config:
        raise changed(path, [CONFIG_FILE])
    return replace(made, stamps=served.stamps)


def load_model(
    path: str | Path,
    dtype: str = Dtype.AUTO,
    backend: Backend | None = None,
    store: WeightClient | None = None,
    progress: LoadProgress | None = None,
    others: OtherHosts | None = None,
) -> LoadedModel:
    """Load everything but the routed experts, from the host's `store` where it has it; on the CPU without a backend.

    What neither the store nor a file has is taken from `others`. ModelError says what is wrong with the checkpoint, or
    that `dtype` is unknown.
    """
    backend = backend or open_backend(Device.CPU)
    host = SharedWeights(store, dtype) if store is not None else None
    served = host.served() if host is not None else None
    progress = progress or LoadProgress()
    made = _skeleton(path, dtype, backend, served)
    progress.mark()
    info, model, kind = made.info, made.model, made.dtype
    if info.files or store is None:
        others = None
    if not info.files and others is None:
        read_model_info(path)  # raises, and says what is wrong with the files
    shared = SharedWeights(store, f"{name_of(made.stamps)}/{kind}") if store is not None else None
    checkpoint = Checkpoint(info.path, made.stamps, progress)
    files = _Files(made, checkpoint, backend.pack)
    expert_bytes = info.expert_bytes(str(kind).removeprefix("torch."))
    source = ExpertSource(checkpoint, kind, backend.device, files.add_experts, shared, expert_bytes, progress)
    source.others, source.pack = others, backend.pack
    try:
        digest = _load_weights(made, _dense(files, kind, shared, progress, others), shared, backend.device)
        if host is not None and served is None:
            host.note_served(Served(made.stamps, made.config_digest))
    except BaseException:
        checkpoint.close()
        raise
    attention = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]
    model.set_experts_implementation(hooks.NAME)
    return LoadedModel(
        info, model, made.expert_modules, attention, source, checkpoint, kind, backend, shared,
        made.config_digest, digest, tuple(changed_files(made.stamps, stamp_files(info.path))),
    )  # fmt: skip


def _detach_experts(model: nn.Module) -> list[nn.Module]:
    """Find the expert modules, in layer order, and take their weights off: ours live in the expert bank."""
    found = [m for m in model.modules() if hasattr(m, "_is_expert_parallel")]
    for module in found:
        if getattr(module, "is_transposed", False) or getattr(module, "has_bias", False):
            raise ModelError("experts with biases or transposed weights are not supported yet")
        for name in list(module._parameters):
            module._parameters[name] = None
    return found


class _Files:
    """What each stored tensor is to the model, by transformers' own rules; looked up only when something is read."""

    def __init__(self, made: Skeleton, checkpoint: Checkpoint, pack: Pack) -> None:
        self._made, self._model, self._checkpoint = made, made.model, checkpoint
        self._pack = pack

    @cached_property
    def _sorted(self) -> tuple[dict[str, str], list[tuple[int, str, str, str | None, Any]]]:
        """Stored names of the dense tensors, by the model's name; and what `ExpertSource.add` takes."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        model, info = self._model, self._made.info
        rules = get_model_conversion_mapping(model)
        renamings = [r for r in rules if isinstance(r, WeightRenaming)]
        converters = [r for r in rules if isinstance(r, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        layer_of = {f"model.layers.{layer}.": i for i, layer in enumerate(info.moe_layer_ids)}
        expected = model.state_dict()
        dense: dict[str, str] = {}
        experts: list[tuple[int, str, str, str | None, Any]] = []
        for name in self._checkpoint.names:
            key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
            if ".experts." in key:
                prefix = ".".join(key.split(".")[:3]) + "."
                if prefix in layer_of:
                    rule = by_pattern.get(pattern or "")
                    experts.append((layer_of[prefix], key.rsplit(".", 1)[1], name, pattern, rule))
            elif pattern is not None:
                raise ModelError(f"{name} needs a conversion that is not supported", hint="re-save the checkpoint")
            elif key in expected:
                dense[key] = name
        return dense, experts

    def add_experts(self, source: ExpertSource) -> None:
        """Give `source` the place of every expert."""
        for entry in self._sorted[1]:
            source.add(*entry)

    def dense(self, dtype: torch.dtype) -> Entry:
        """Everything but the routed experts, in the type it is computed in."""
        strict = [re.compile(p) for p in self._model._keep_in_fp32_modules_strict or ()]
        kinds = {key: torch.float32 if any(p.search(key) for p in strict) else dtype for key in self._sorted[0]}
        return Entry(DENSE, [self._slot(key, kinds[key], name) for key, name in self._sorted[0].items()], dense_digest)

    def _slot(self, key: str, dtype: torch.dtype, name: str) -> Slot:
        stored = self._checkpoint.stored(name)

        def fill(room: Tensor) -> int:
            if stored.dtype == dtype:
                return self._checkpoint.read_into(stored, memory_of(room))
            return copied(self._checkpoint.read(name))(room)

        slot = Slot(key, dtype, stored.shape, fill)
        module, _, leaf = key.rpartition(".")
        multiplies = leaf == "weight" and isinstance(self._model.get_submodule(module), nn.Linear)
        return slot._replace(pack=self._pack) if multiplies else slot


def _load_weights(made: Skeleton, got: Mapped, shared: SharedWeights | None, device: torch.device) -> str:
    """Fill the model; the digest of its weights."""
    model = made.model
    for key, tensor in got.tensors.items():
        _assign(model, key, tensor if device.type == "cpu" else plain(tensor).to(device))
    if shared is not None:
        shared.report()
    # As transformers does: an output layer of its own is used even where config.json says that it is the embeddings.
    model.tie_weights(missing_keys=set(model.state_dict()) - got.tensors.keys(), recompute_mapping=False)
    _rebuild_computed_buffers(model, device)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise ModelError(f"the checkpoint lacks {len(left)} tensors, first {left[0]}", hint="is it complete?")
    return got.note.decode()


def _dense(
    files: _Files,
    dtype: torch.dtype,
    shared: SharedWeights | None,
    progress: LoadProgress,
    others: OtherHosts | None,
) -> Mapped:
    """From the host's store, else from the checkpoint: one rank of the host reads it, the others wait for that."""

    def counted(entry: Entry, still_reads: Callable[[], object]) -> Entry:
        def fill(slot: Slot, room: Tensor) -> int:
            still_reads()
            checksum = slot.fill(room)
            progress.add(slot.nbytes)
            return checksum

        progress.expect(sum(slot.nbytes for slot in entry.slots))
        return entry._replace(slots=[slot._replace(fill=partial(fill, slot)) for slot in entry.slots])

    if shared is None:
        return counted(files.dense(dtype), lambda: None).alone()
    with shared.session(progress) as session:
        while True:
            found, ours = session.claim([DENSE])
            if DENSE in found:
                return found[DENSE]
            if not ours and session.wait(SIGN_TIMEOUT_S):
                continue
            if others is None:
                entry = files.dense(dtype)
                kept = shared.fill([counted(entry, session.still_reads)])
                return kept.get(DENSE) or entry.alone()
            with closing(PeerWeights(shared, session, others, progress.mark)) as peers:
                (entry,) = peers.entries([DENSE])
                kept = shared.fill([counted(entry, session.still_reads)])
                return kept.get(DENSE) or entry.alone()


def _assign(model: nn.Module, key: str, tensor: Tensor) -> None:
    """Put a tensor where the meta one is; shapes must agree."""
    path, _, leaf = key.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    if old.shape != tensor.shape:
        raise ModelError(f"{key} has shape {tuple(tensor.shape)}, config.json implies {tuple(old.shape)}")
    if leaf in module._parameters:
        module._parameters[leaf] = parameter(tensor)
    else:
        module._buffers[leaf] = tensor


def _rebuild_computed_buffers(model: Any, device: torch.device) -> None:
    """Buffers that no checkpoint stores (rotary tables) are computed by building their module again, for real."""
    for module in list(model.modules()):
        names = [n for n in module._non_persistent_buffers_set if getattr(module, n).is_meta]
        if names:
            fresh = type(module)(model.config)
            for name in names:
                module._buffers[name] = getattr(fresh, name).to(device)
