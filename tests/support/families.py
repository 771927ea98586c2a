"""Tiny random checkpoints of every supported model family, written with transformers' own `save_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCAB = 96


def tiny_config(family: str, **changes: Any) -> Any:
    """A config of `family`: 2 to 3 layers, hidden 64, 8 experts, and a dense layer where the family has any."""
    import transformers as tf

    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "num_experts_per_tok": 2,
        "initializer_range": 0.15,
    }
    grouped = {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
    }
    mla = {
        **grouped,
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": 48,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 24,
    }
    qwen = {"num_experts": 8, "intermediate_size": 96, "moe_intermediate_size": 48, "decoder_sparse_step": 1}
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "mixtral": (tf.MixtralConfig, {"intermediate_size": 96, "num_local_experts": 8, "head_dim": 16}),
        "qwen2_moe": (tf.Qwen2MoeConfig, {**qwen, "shared_expert_intermediate_size": 64, "num_hidden_layers": 3,
                                          "mlp_only_layers": [1]}),
        "qwen3_moe": (tf.Qwen3MoeConfig, {**qwen, "head_dim": 32, "num_experts_per_tok": 4}),
        "olmoe": (tf.OlmoeConfig, {"intermediate_size": 48, "num_experts": 8, "num_key_value_heads": 4}),
        "deepseek_v2": (tf.DeepseekV2Config, {**mla, "topk_method": "group_limited_greedy"}),
        "glm4_moe": (tf.Glm4MoeConfig, {**grouped, "head_dim": 32, "num_mtp_layers": 0}),
        "granitemoe": (tf.GraniteMoeConfig, {"intermediate_size": 48, "num_local_experts": 8, "head_dim": 16,
                                             "embedding_multiplier": 6.0, "logits_scaling": 2.0,
                                             "residual_multiplier": 0.6, "attention_multiplier": 0.2}),
        "deepseek_v3": (tf.DeepseekV3Config, {**mla, "num_mtp_layers": 0}),
    }  # fmt: skip
    kind, own = kinds[family]
    return kind(**{**common, **own, **changes})


def write_checkpoint(
    directory: Path, family: str, dtype: str = "float32", *, shard: str = "5GB", **changes: Any
) -> Path:
    """Save a random model of `family`; always the same one for the same arguments."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=getattr(torch, dtype))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.05)
    model.save_pretrained(directory, max_shard_size=shard)
    return directory
