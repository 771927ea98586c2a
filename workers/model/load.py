"""Builds a transformers model without its routed experts, and reads single experts on demand.

The model is laid out on the `meta` device, names are mapped with transformers' own conversion rules, and only what a
rank needs is read: everything but experts at once, an expert when the placement gives it to the rank. Where the host
has a weight store, what it holds is mapped instead, and a rank that finds everything there opens no weight file at all.
"""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from membership.base.errors import ModelError
from workers.model import hooks
from workers.model.families import ModelInfo, read_model_info, weight_files
from workers.model.shared_weights import SharedWeights, identity
from workers.protocol.weight_client import WeightClient

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARAMETERS = ("gate_up_proj", "down_proj")
DENSE = "dense"  # the store's entry of all that is not a routed expert
AT_ONCE = 16  # experts that are asked of the store before any of them is used
_EXPERT_INDEX = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class ExpertWeights:
    """One expert as right-hand sides of products: `gate_up` [H, 2I], `down` [I, H], views of what is stored."""

    gate_up: Tensor
    down: Tensor
    mapped: bool = False  # from the host's store, without reading the checkpoint

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return int(self.gate_up.nbytes + self.down.nbytes)


class Checkpoint:
    """The weight files, opened once and read by slices. Safe to use from several threads."""

    def __init__(self, info: ModelInfo) -> None:
        self._root = Path(info.path)
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self.bytes_read = 0

    @cached_property
    def _file_of(self) -> dict[str, str]:
        return weight_files(self._root)

    @property
    def names(self) -> list[str]:
        """All tensors."""
        return sorted(self._file_of)

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A private copy of a tensor, or of entry `index` along its first axis."""
        file = self._file_of[name]
        with self._lock:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(safe_open(str(self._root / file), framework="pt"))
            handle = self._open[file]
            tensor: Tensor = handle.get_tensor(name) if index is None else handle.get_slice(name)[index]
            self.bytes_read += tensor.nbytes
        return tensor.clone()

    def close(self) -> None:
        """Unmap the files."""
        with self._lock:
            self._open.clear()
            self._stack.close()


def _expert_name(layer: int, expert: int) -> str:
    return f"expert/{layer}/{expert}"


class ExpertSource:
    """Knows which tensors make up each expert, and assembles one at a time, unless the host's store has it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        fill: Callable[[ExpertSource], object],
        shared: SharedWeights | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._fill = fill  # calls `add` for all; only once something has to be read
        self._filled = False
        self._filling = threading.Lock()
        self._shared = shared
        self._fused: dict[tuple[int, str], str] = {}  # (layer, parameter) -> a tensor with all experts
        self._parts: dict[tuple[int, int, str], list[tuple[str, str]]] = defaultdict(list)  # -> (pattern, tensor)
        self._converters: dict[str, Any] = {}  # parameter -> transformers' rule that merges its parts

    def add(self, layer: int, parameter: str, name: str, pattern: str | None, converter: Any) -> None:
        """Note that tensor `name` belongs to `parameter` of the experts of MoE layer `layer`."""
        if pattern is None:
            self._fused[layer, parameter] = name
            return
        match = _EXPERT_INDEX.search(name)
        if match is None:
            raise ModelError(f"cannot tell which expert {name} belongs to", hint="is this a supported family?")
        self._parts[layer, int(match.group(1)), parameter].append((pattern, name))
        self._converters[parameter] = converter

    def load(self, layer: int, expert: int) -> ExpertWeights:
        """Get expert `expert` of MoE layer `layer`, and nothing else."""
        ((_, weights),) = self.load_many([(layer, expert)])
        return weights

    def load_many(
        self, wanted: Iterable[tuple[int, int]], before_read: Callable[[], object] = lambda: None
    ) -> Generator[tuple[tuple[int, int], ExpertWeights]]:
        """Get experts one after the other, in order; `before_read` is called before each that the store lacks."""
        left = list(wanted)
        try:
            while left:
                some, left = left[:AT_ONCE], left[AT_ONCE:]
                there = self._shared.find([_expert_name(*key) for key in some]) if self._shared else {}
                for key in some:
                    found = there.get(_expert_name(*key))
                    if found is None:
                        before_read()
                    yield key, self._placed(found.tensors, mapped=True) if found else self._read(*key)
        finally:
            if self._shared is not None:
                self._shared.report()

    def _read(self, layer: int, expert: int) -> ExpertWeights:
        """Read an expert from the checkpoint, and leave it to the host's store."""
        with self._filling:
            if not self._filled:
                self._fill(self)
                self._filled = True
        made = {name: self._parameter(layer, expert, name) for name in PARAMETERS}
        kept = self._shared.put(_expert_name(layer, expert), made) if self._shared else None
        return self._placed(kept.tensors if kept else made, mapped=False)

    def _placed(self, tensors: dict[str, Tensor], *, mapped: bool) -> ExpertWeights:
        gate_up, down = (tensors[name].to(self._device) for name in PARAMETERS)
        return ExpertWeights(gate_up.t(), down.t(), mapped)

    def _parameter(self, layer: int, expert: int, parameter: str) -> Tensor:
        fused = self._fused.get((layer, parameter))
        if fused is not None:
            merged = self._checkpoint.read(fused, expert)
        else:
            parts = self._parts.get((layer, expert, parameter))
            if not parts:
                raise ModelError(f"the checkpoint lacks {parameter} of expert {expert} in MoE layer {layer}")
            merged = self._merge(parameter, {pattern: [self._checkpoint.read(name)] for pattern, name in parts})
        return merged.to(self._dtype).contiguous()

    def _merge(self, parameter: str, tensors: dict[str, Any]) -> Tensor:
        """Apply transformers' merge rule to the parts of a single expert."""
        converter = self._converters[parameter]
        missing = [pattern for pattern in converter.source_patterns if pattern not in tensors]
        if missing:
            raise ModelError(f"the checkpoint lacks {missing[0]} of an expert", hint="is it complete?")
        ordered = {pattern: tensors[pattern] for pattern in converter.source_patterns}
        for operation in converter.operations:
            ordered = operation.convert(
                ordered, source_patterns=converter.source_patterns, target_patterns=converter.target_patterns
            )
        (merged,) = ordered.values()
        result: Tensor = (merged[0] if isinstance(merged, list) else merged)[0]
        return result


@dataclass
class LoadedModel:
    """A model whose expert modules are empty, with where to read the experts from."""

    info: ModelInfo
    model: Any
    expert_modules: list[nn.Module]
    attention_modules: list[nn.Module]
    source: ExpertSource
    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device
    shared: SharedWeights | None = None


def resolve_dtype(info: ModelInfo, dtype: str, device: torch.device) -> torch.dtype:
    """The type to compute in: the stored one under `auto`, save for float16 on CPUs, which lack kernels for it."""
    if dtype == "auto":
        return torch.float32 if info.dtype == "float16" and device.type == "cpu" else TORCH_DTYPES[info.dtype]
    if dtype not in TORCH_DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}", hint="use auto, float32 or bfloat16")
    return TORCH_DTYPES[dtype]


@dataclass
class Skeleton:
    """A model on `meta`, before it has weights."""

    identity: str
    info: ModelInfo
    model: Any
    expert_modules: list[nn.Module]
    dtype: torch.dtype


_prebuilt: list[Skeleton] = []  # by the forkserver; whoever takes it uses it up


def prebuild(path: str, dtype: str = "auto") -> None:
    """In the forkserver: build the model without weights once, so that no rank has to. Ranks tell of faults."""
    try:
        _prebuilt[:] = [_build(path, dtype, torch.device("cpu"))]
    except (ModelError, OSError, ValueError):
        _prebuilt.clear()


def _build(path: str | Path, dtype: str, device: torch.device) -> Skeleton:
    from transformers import AutoConfig, AutoModelForCausalLM

    found = identity(path)
    info = read_model_info(path)
    kind = resolve_dtype(info, dtype, device)
    config = AutoConfig.from_pretrained(info.path)
    hooks.register()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=kind, attn_implementation=hooks.NAME)
    model.eval().requires_grad_(False)
    expert_modules = _detach_experts(model)
    if len(expert_modules) != info.moe_layers:
        raise ModelError(f"found {len(expert_modules)} expert modules where config.json promises {info.moe_layers}")
    return Skeleton(found, info, model, expert_modules, kind)


def _skeleton(path: str | Path, dtype: str, device: torch.device) -> Skeleton:
    """The prebuilt one, if it is of this very checkpoint and type; else a new one."""
    while _prebuilt:
        made = _prebuilt.pop()
        if made.identity == identity(path) and made.dtype == resolve_dtype(made.info, dtype, device):
            return made
    return _build(path, dtype, device)


def load_model(
    path: str | Path, dtype: str = "auto", device: str = "cpu", store: WeightClient | None = None
) -> LoadedModel:
    """Load everything but the routed experts; from the host's `store` where it has it."""
    place = torch.device(device)
    made = _skeleton(path, dtype, place)
    info, model, kind = made.info, made.model, made.dtype
    shared = SharedWeights(store, f"{made.identity}/{kind}") if store is not None else None
    checkpoint = Checkpoint(info)
    files = _Files(made, checkpoint)
    source = ExpertSource(checkpoint, kind, place, files.tell_experts, shared)
    try:
        _load_weights(made, files, shared, place)
    except BaseException:
        checkpoint.close()
        raise
    attention = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]
    model.set_experts_implementation(hooks.NAME)
    return LoadedModel(info, model, made.expert_modules, attention, source, checkpoint, kind, place, shared)


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

    def __init__(self, made: Skeleton, checkpoint: Checkpoint) -> None:
        self._made, self._model, self._checkpoint = made, made.model, checkpoint

    @cached_property
    def _sorted(self) -> tuple[dict[str, str], list[tuple[int, str, str, str | None, Any]]]:
        """Stored names of the dense tensors, by the model's name; and what `ExpertSource.add` takes."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        model, info = self._model, self._made.info
        if identity(info.path) != self._made.identity:
            raise ModelError(f"the checkpoint in {info.path} changed under a running rank", hint="restart the cluster")
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

    def tell_experts(self, source: ExpertSource) -> None:
        """Tell where all experts are."""
        for entry in self._sorted[1]:
            source.add(*entry)

    def read_dense(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Read everything but the routed experts, in the type it is computed in."""
        strict = [re.compile(p) for p in self._model._keep_in_fp32_modules_strict or ()]
        kinds = {key: torch.float32 if any(p.search(key) for p in strict) else dtype for key in self._sorted[0]}
        return {key: self._checkpoint.read(name).to(kinds[key]) for key, name in self._sorted[0].items()}


def _load_weights(made: Skeleton, files: _Files, shared: SharedWeights | None, device: torch.device) -> None:
    model = made.model
    found = shared.find([DENSE]).get(DENSE) if shared is not None else None
    tensors = found.tensors if found is not None else files.read_dense(made.dtype)
    _assign_all(model, tensors, device)
    if found is None and shared is not None and (kept := shared.put(DENSE, tensors)) is not None:
        _assign_all(model, kept.tensors, device)
    if shared is not None:
        shared.report()
    model.tie_weights()
    _rebuild_computed_buffers(model, device)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise ModelError(f"the checkpoint lacks {len(left)} tensors, first {left[0]}", hint="is it complete?")


def _assign_all(model: Any, tensors: dict[str, Tensor], device: torch.device) -> None:
    for key, tensor in tensors.items():
        _assign(model, key, tensor.to(device))


def _assign(model: nn.Module, key: str, tensor: Tensor) -> None:
    """Put a tensor where the meta one is; shapes must agree."""
    path, _, leaf = key.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    if old.shape != tensor.shape:
        raise ModelError(f"{key} has shape {tuple(tensor.shape)}, config.json implies {tuple(old.shape)}")
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
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
