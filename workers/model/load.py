"""Builds a transformers model without its routed experts, and reads single experts on demand.

The model is laid out on the `meta` device, names are mapped with transformers' own conversion rules, and only what a
rank needs is read: everything but experts at once, an expert when the placement gives it to the rank.
"""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from membership.errors import ModelError
from workers.model import hooks
from workers.model.info import ModelInfo, read_model_info, weight_files

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_EXPERT_INDEX = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class ExpertWeights:
    """One expert as right-hand sides of products: `gate_up` [H, 2I], `down` [I, H], views of what is stored."""

    gate_up: Tensor
    down: Tensor

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return int(self.gate_up.nbytes + self.down.nbytes)


class Checkpoint:
    """The weight files, opened once and read by slices. Safe to use from several threads."""

    def __init__(self, info: ModelInfo) -> None:
        self._root = Path(info.path)
        self._file_of = weight_files(self._root)
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self.bytes_read = 0

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


class ExpertSource:
    """Knows which tensors make up each expert, and assembles one at a time."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
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
        """Read expert `expert` of MoE layer `layer`, and nothing else."""
        gate_up, down = (self._parameter(layer, expert, name) for name in ("gate_up_proj", "down_proj"))
        return ExpertWeights(gate_up.t(), down.t())

    def _parameter(self, layer: int, expert: int, parameter: str) -> Tensor:
        fused = self._fused.get((layer, parameter))
        if fused is not None:
            merged = self._checkpoint.read(fused, expert)
        else:
            parts = self._parts.get((layer, expert, parameter))
            if not parts:
                raise ModelError(f"the checkpoint lacks {parameter} of expert {expert} in MoE layer {layer}")
            merged = self._merge(parameter, {pattern: [self._checkpoint.read(name)] for pattern, name in parts})
        return merged.to(self._device, self._dtype).contiguous()

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


def resolve_dtype(info: ModelInfo, dtype: str, device: torch.device) -> torch.dtype:
    """The type to compute in: the stored one under `auto`, save for float16 on CPUs, which lack kernels for it."""
    if dtype == "auto":
        return torch.float32 if info.dtype == "float16" and device.type == "cpu" else TORCH_DTYPES[info.dtype]
    if dtype not in TORCH_DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}", hint="use auto, float32 or bfloat16")
    return TORCH_DTYPES[dtype]


def load_model(path: str | Path, dtype: str = "auto", device: str = "cpu") -> LoadedModel:
    """Load everything but the routed experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    info = read_model_info(path)
    place = torch.device(device)
    kind = resolve_dtype(info, dtype, place)
    config = AutoConfig.from_pretrained(info.path)
    hooks.register()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=kind, attn_implementation=hooks.NAME)
    model.eval().requires_grad_(False)
    expert_modules = _detach_experts(model)
    if len(expert_modules) != info.moe_layers:
        raise ModelError(f"found {len(expert_modules)} expert modules where config.json promises {info.moe_layers}")
    checkpoint = Checkpoint(info)
    source = ExpertSource(checkpoint, kind, place)
    try:
        _load_weights(model, checkpoint, source, kind, place, info)
    except BaseException:
        checkpoint.close()
        raise
    attention = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]
    model.set_experts_implementation(hooks.NAME)
    return LoadedModel(info, model, expert_modules, attention, source, checkpoint, kind, place)


def _detach_experts(model: nn.Module) -> list[nn.Module]:
    """Find the expert modules, in layer order, and take their weights off: ours live in the expert bank."""
    found = [m for m in model.modules() if hasattr(m, "_is_expert_parallel")]
    for module in found:
        if getattr(module, "is_transposed", False) or getattr(module, "has_bias", False):
            raise ModelError("experts with biases or transposed weights are not supported yet")
        for name in list(module._parameters):
            module._parameters[name] = None
    return found


def _load_weights(
    model: Any, checkpoint: Checkpoint, source: ExpertSource, dtype: torch.dtype, device: torch.device, info: ModelInfo
) -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    layer_of = {f"model.layers.{layer}.": i for i, layer in enumerate(info.moe_layer_ids)}
    expected = model.state_dict()
    strict = [re.compile(p) for p in model._keep_in_fp32_modules_strict or ()]
    for name in checkpoint.names:
        key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if ".experts." in key:
            prefix = ".".join(key.split(".")[:3]) + "."
            if prefix in layer_of:
                source.add(layer_of[prefix], key.rsplit(".", 1)[1], name, pattern, by_pattern.get(pattern or ""))
        elif pattern is not None:
            raise ModelError(f"{name} needs a conversion that is not supported", hint="re-save the checkpoint")
        elif key in expected:
            kind = torch.float32 if any(p.search(key) for p in strict) else dtype
            _assign(model, key, checkpoint.read(name).to(device, kind))
    model.tie_weights()
    _rebuild_computed_buffers(model, device)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise ModelError(f"the checkpoint lacks {len(left)} tensors, first {left[0]}", hint="is it complete?")


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
