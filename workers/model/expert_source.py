"""Single experts of a checkpoint, on demand: from the host's weight store if it has them, else from the files."""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from membership.base.errors import ModelError
from workers.model.checkpoint import Checkpoint
from workers.model.shared_weights import Mapped, SharedWeights
from workers.model.weight_digests import expert_digest

PARAMETERS = ("gate_up_proj", "down_proj")
AT_ONCE = 16  # experts that are asked of the store before any of them is used
_EXPERT_INDEX = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class ExpertWeights:
    """One expert as right-hand sides of products: `gate_up` [H, 2I], `down` [I, H], views of what is stored."""

    gate_up: Tensor
    down: Tensor
    mapped: bool = False  # from the host's store, without reading the checkpoint
    digest: bytes = b""  # of what was read, by content

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return int(self.gate_up.nbytes + self.down.nbytes)


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
        expert_bytes: int = 0,
    ) -> None:
        self.expert_bytes = expert_bytes  # of one expert in one layer
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
                    yield key, self._placed(found, mapped=True) if found else self._read(*key)
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
        read = Mapped(made, expert_digest(made.values()))
        kept = self._shared.put(_expert_name(layer, expert), made, read.note) if self._shared else None
        return self._placed(kept or read, mapped=False)

    def _placed(self, found: Mapped, *, mapped: bool) -> ExpertWeights:
        gate_up, down = (found.tensors[name].to(self._device) for name in PARAMETERS)
        return ExpertWeights(gate_up.t(), down.t(), mapped, found.note)

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
