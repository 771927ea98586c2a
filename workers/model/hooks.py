"""The two public hooks through which transformers' model code calls ours: attention and routed experts.

Each module carries the object that does the work, so several models can live in one process. No mask function is
registered for our attention: transformers then builds no masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from torch import Tensor, nn

from membership.base.errors import ModelError
from workers.model.backend import Attention

NAME = "elastic_ep"
NOT_DONE = ("softcap", "s_aux", "position_bias", "head_mask")  # what would change scores, in other families


class RoutedExperts(Protocol):
    """What stands behind the expert modules of a model."""

    def forward(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The routed part of one MoE layer: hidden [T, H], ids and weights [T, k] -> [T, H]."""


def register() -> None:
    """Make both implementations known to transformers; harmless to repeat."""
    from transformers.integrations.moe import ExpertsInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    ExpertsInterface.register(NAME, _experts)


def connect_attention(modules: Sequence[nn.Module], attention: Attention) -> None:
    """Have these attention modules call `attention` from now on."""
    for module in modules:
        cast("Any", module).elastic_attention = attention
        cast("Any", module).elastic_window = getattr(module, "sliding_window", None)


def connect_experts(modules: Sequence[nn.Module], experts: RoutedExperts) -> None:
    """Have these expert modules, in the order of MoE layers, call `experts` from now on."""
    for layer, module in enumerate(modules):
        cast("Any", module).elastic_layer = layer
        cast("Any", module).elastic_experts = experts


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    asked = [name for name in NOT_DONE if others.get(name) is not None]
    if asked:
        raise ModelError(f"this model's attention needs {', '.join(asked)}", hint="is this a supported family?")
    window = sliding_window or module.elastic_window or None  # some families say 0 for none, or do not pass it
    return module.elastic_attention.forward(module.layer_idx, query, key, value, scaling, window), None


def _experts(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    result: Tensor = module.elastic_experts.forward(module.elastic_layer, hidden, top_k_index, top_k_weights)
    return result
