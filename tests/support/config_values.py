"""For every key of config.json a value other than the usual: what the survey of config keys sets.

`computed` gives changes that must change the logits, `refused` what must be refused, `INERT` what must change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from workers.model.config_keys import ACTIVATIONS, KEYS


@dataclass(frozen=True)
class Case:
    """`key` takes the value it has in `changes`. Without it the model is that of `base`, which has other logits."""

    key: str
    changes: dict[str, Any]
    base: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.key}={self.changes[self.key]}".replace(" ", "")


LATENT = ("deepseek_v2", "deepseek_v3")
WIDTH = 16  # of what is rotated, in every tiny model but qwen3_moe's
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def longrope(family: str, **changes: Any) -> dict[str, Any]:
    """Short factors that matter from the first tokens on, long ones that differ."""
    count = (32 if family == "qwen3_moe" else WIDTH) // 2
    own = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128}
    return {**own, "short_factor": [1.0 + n / 4 for n in range(count)], "long_factor": [4.0] * count, **changes}


def computed(family: str) -> list[Case]:
    """Each changes the logits, as in transformers."""
    moe = [Case("intermediate_size", {"intermediate_size": 64, **_a_dense_layer(family)}, _a_dense_layer(family))]
    every = [
        Case("vocab_size", {"vocab_size": 112}),
        Case("hidden_size", {"hidden_size": 32}),
        Case("num_hidden_layers", {"num_hidden_layers": 4}),
        Case("num_experts_per_tok", {"num_experts_per_tok": 3}),
        Case("hidden_act", {"hidden_act": "gelu"}),
        Case("rms_norm_eps", {"rms_norm_eps": 0.1}),
        Case("tie_word_embeddings", {"tie_word_embeddings": True}),
        *moe,
        *_rotary(family),
    ]
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8} if family in LATENT else {"num_attention_heads": 2}
    if family == "olmoe":
        heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    every.append(Case("num_attention_heads", heads))
    if family not in LATENT:
        every.append(Case("num_key_value_heads", {"num_key_value_heads": 1}))
    return every + _OWN[family]


def _a_dense_layer(family: str) -> dict[str, Any]:
    return {"mlp_only_layers": [0]} if family == "qwen3_moe" else {}


def _rotary(family: str) -> list[Case]:
    def rope(changes: dict[str, Any], base: dict[str, Any] | None = None, **others: Any) -> Case:
        before = {"rope_parameters": base, **others} if base is not None else others
        return Case("rope_parameters", {"rope_parameters": changes, **others}, before)

    return [
        Case("rope_theta", {"rope_theta": 500.0}),
        Case("rope_scaling", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        rope({"rope_type": "default", "rope_theta": 500.0}),
        rope({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
        rope(YARN),
        rope({**YARN, "factor": 2.0}, YARN),
        rope({**YARN, "original_max_position_embeddings": 256}, YARN),
        rope({**YARN, "attention_factor": 1.5}, YARN),
        rope({**YARN, "beta_fast": 4.0}, YARN),
        rope({**YARN, "beta_slow": 0.1}, YARN),
        rope({**YARN, "truncate": False}, YARN),
        rope({**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}, YARN),
        Case("original_max_position_embeddings", {"original_max_position_embeddings": 256, "rope_parameters": YARN},
             {"rope_parameters": YARN}),
        rope(LLAMA3),
        rope({**LLAMA3, "factor": 2.0}, LLAMA3),
        rope({**LLAMA3, "low_freq_factor": 2.0}, LLAMA3),
        rope({**LLAMA3, "high_freq_factor": 8.0}, LLAMA3),
        rope(longrope(family)),
        rope(longrope(family, attention_factor=1.5), longrope(family)),
        rope(longrope(family, factor=2.0), longrope(family)),
        Case("max_position_embeddings", {"max_position_embeddings": 1024, "rope_parameters": longrope(family)},
             {"rope_parameters": longrope(family)}),
    ]  # fmt: skip


_SLIDING = {"use_sliding_window": True, "sliding_window": 24}
_QWEN = [
    Case("num_experts", {"num_experts": 4}),
    Case("moe_intermediate_size", {"moe_intermediate_size": 32}),
    Case("decoder_sparse_step", {"decoder_sparse_step": 2, "mlp_only_layers": []}, {"mlp_only_layers": []}),
    Case("mlp_only_layers", {"mlp_only_layers": [0]}),
    Case("norm_topk_prob", {"norm_topk_prob": True}),
    Case("head_dim", {"head_dim": 64}),
    Case("use_sliding_window", _SLIDING, {"sliding_window": 24}),
    Case("sliding_window", {**_SLIDING, "sliding_window": 12}, _SLIDING),
]
_GROUPED = [
    Case("n_routed_experts", {"n_routed_experts": 4}),
    Case("n_shared_experts", {"n_shared_experts": 2}),
    Case("moe_intermediate_size", {"moe_intermediate_size": 32}),
    Case("first_k_dense_replace", {"first_k_dense_replace": 2}),
    Case("first_k_dense_replace", {"first_k_dense_replace": 0}),
    Case("attention_bias", {"attention_bias": True}),
    Case("routed_scaling_factor", {"routed_scaling_factor": 1.7}),
    Case("n_group", {"n_group": 4}),
    Case("topk_group", {"topk_group": 2}),
]
_LATENT = [
    *_GROUPED,
    Case("kv_lora_rank", {"kv_lora_rank": 16}),
    Case("q_lora_rank", {"q_lora_rank": 32}),
    Case("q_lora_rank", {"q_lora_rank": None}),
    Case("qk_nope_head_dim", {"qk_nope_head_dim": 16}),
    Case("qk_rope_head_dim", {"qk_rope_head_dim": 32}),
    Case("v_head_dim", {"v_head_dim": 32}),
]
_OWN: dict[str, list[Case]] = {
    "mixtral": [
        *(Case("hidden_act", {"hidden_act": name}) for name in ACTIVATIONS if name not in ("silu", "swish", "gelu")),
        Case("num_local_experts", {"num_local_experts": 4}),
        Case("num_experts", {"num_experts": 4}),
        Case("head_dim", {"head_dim": 32}),
        Case("sliding_window", {"sliding_window": 24}),
    ],
    "qwen2_moe": [
        *_QWEN,
        Case("qkv_bias", {"qkv_bias": False}),
        Case("shared_expert_intermediate_size", {"shared_expert_intermediate_size": 32}),
        Case("max_window_layers", {**_SLIDING, "max_window_layers": 1}, _SLIDING),
        Case("layer_types", {**_SLIDING, "layer_types": ["full_attention", "full_attention", "sliding_attention"]},
             _SLIDING),
    ],
    "qwen3_moe": [
        *_QWEN,
        Case("num_local_experts", {"num_local_experts": 4}),
        Case("attention_bias", {"attention_bias": True}),
    ],
    "olmoe": [
        Case("num_experts", {"num_experts": 4}),
        Case("num_local_experts", {"num_local_experts": 4}),
        Case("attention_bias", {"attention_bias": True}),
        Case("clip_qkv", {"clip_qkv": 0.5}),
        Case("norm_topk_prob", {"norm_topk_prob": True}),
        Case("head_dim", {"head_dim": 8, "num_attention_heads": 8, "num_key_value_heads": 8}),
    ],
    "glm4_moe": [
        *_GROUPED,
        Case("num_local_experts", {"num_local_experts": 4}),
        Case("norm_topk_prob", {"norm_topk_prob": False}),
        Case("head_dim", {"head_dim": 64}),
        Case("use_qk_norm", {"use_qk_norm": True}),
        Case("partial_rotary_factor", {"partial_rotary_factor": 1.0}),
    ],
    "granitemoe": [
        Case("num_local_experts", {"num_local_experts": 4}),
        Case("head_dim", {"head_dim": 32}),
        Case("attention_bias", {"attention_bias": True}),
        Case("embedding_multiplier", {"embedding_multiplier": 12.0}),
        Case("attention_multiplier", {"attention_multiplier": 0.5}),
        Case("residual_multiplier", {"residual_multiplier": 0.22}),
        Case("logits_scaling", {"logits_scaling": 8.0}),
    ],
    "deepseek_v2": [
        *_LATENT,
        Case("num_experts", {"num_experts": 4}),
        Case("mlp_bias", {"mlp_bias": True}),
        Case("topk_method", {"topk_method": "greedy"}),
    ],
    "deepseek_v3": [
        *_LATENT,
        Case("num_local_experts", {"num_local_experts": 4}),
        Case("norm_topk_prob", {"norm_topk_prob": False}),
        Case("rope_interleave", {"rope_interleave": False}),
    ],
}  # fmt: skip

INERT: dict[str, Any] = {
    "transformers_version": "4.40.0",
    "name_or_path": "elsewhere",
    "auto_map": {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"},
    "dtype": "float16",
    "torch_dtype": "float16",
    "bos_token_id": 7,
    "eos_token_id": [8, 9],
    "pad_token_id": 3,
    "sep_token_id": 4,
    "decoder_start_token_id": 5,
    "tokenizer_class": "LlamaTokenizer",
    "initializer_range": 0.5,
    "attention_dropout": 0.5,
    "router_aux_loss_coef": 0.5,
    "router_jitter_noise": 0.5,
    "aux_loss_alpha": 0.5,
    "seq_aux": True,
    "pretraining_tp": 2,
    "ep_size": 4,
    "output_router_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": False,
    "use_cache": False,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
    "chunk_size_feed_forward": 4,
    "id2label": {"0": "a", "1": "b", "2": "c"},
    "label2id": {"a": 0, "b": 1, "c": 2},
    "num_labels": 3,
    "problem_type": "regression",
    "head_dim": 98,
    "qk_head_dim": 99,
    "num_mtp_layers": 2,
    "num_nextn_predict_layers": 2,
    "max_length": 99,
    "min_length": 9,
    "do_sample": True,
    "early_stopping": True,
    "num_beams": 3,
    "temperature": 0.3,
    "top_k": 3,
    "top_p": 0.3,
    "typical_p": 0.3,
    "repetition_penalty": 3.0,
    "length_penalty": 3.0,
    "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 3,
    "bad_words_ids": [[11]],
    "num_return_sequences": 3,
    "output_scores": True,
    "return_dict_in_generate": True,
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 6,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [3, 1.5],
    "suppress_tokens": [3],
    "begin_suppress_tokens": [3],
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "encoder_repetition_penalty": 3.0,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.3,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "num_beam_groups": 3,
    "diversity_penalty": 0.3,
}

_REFUSED: dict[str, list[Any]] = {
    "partial_rotary_factor": [0.5],
    "is_causal": [False],
    "is_encoder_decoder": [True],
    "per_layer_config": [{"0": {"num_key_value_heads": 1}}],
    "compression_config": [{"bits": 4}],
    "architectures": [["LlamaForCausalLM"]],
    "hidden_act": ["xielu", "prelu", "magic", None],
    "tie_word_embeddings": [None, 1],
    "rms_norm_eps": ["1e-6", None],
    "num_experts_per_tok": [9],
    "num_key_value_heads": [3, 0],
    "pad_token_id": [96, "1"],
    "rope_theta": [None, 0, "10000"],
}
_FOREIGN: dict[str, list[Any]] = {  # of other families, and of forks
    "attn_logit_softcapping": [30.0],
    "final_logit_softcapping": [30.0],
    "embedding_multiplier": [12.0],
    "attention_multiplier": [0.5],
    "residual_multiplier": [0.22],
    "logits_scaling": [8.0],
    "scale_embeddings": [True],
    "attention_chunk_size": [128],
    "use_qk_norm": [True],
    "swiglu_limit": [7.0],
    "lm_head_bias": [True],
    "position_embedding_type": ["alibi"],
    "router_bias": [True],
}
_REFUSED_OWN: dict[str, dict[str, list[Any]]] = {
    "mixtral": {"head_dim": [0, "16"], "sliding_window": [0, -1], "num_experts": [4], "attention_bias": [True],
                "norm_topk_prob": [True], "qkv_bias": [True], "moe_intermediate_size": [48],
                "layer_types": [["sliding_attention", "full_attention"]]},
    "qwen2_moe": {"head_dim": [None], "sliding_window": [-1], "decoder_sparse_step": [0, None],
                  "use_sliding_window": [None], "attention_bias": [True], "num_local_experts": [8],
                  "layer_types": [["sliding_attention"] * 3, ["full_attention"] * 2, ["chunked_attention"] * 3]},
    "qwen3_moe": {"head_dim": [None], "decoder_sparse_step": [0], "num_experts": [4],
                  "layer_types": [["sliding_attention"] * 2], "shared_expert_intermediate_size": [64]},
    "olmoe": {"head_dim": [32], "clip_qkv": [0, -1], "sliding_window": [24], "num_local_experts": [4]},
    "glm4_moe": {"partial_rotary_factor": [0, 1.5, 0.3], "head_dim": [None], "scoring_func": ["softmax"],
                 "topk_method": ["greedy"], "moe_layer_freq": [2], "n_group": [3, None], "topk_group": [3, None],
                 "n_shared_experts": [None], "kv_lora_rank": [32]},
    "granitemoe": {"head_dim": [None], "logits_scaling": [0, None], "norm_topk_prob": [True]},
    "deepseek_v2": {"norm_topk_prob": [True], "scoring_func": ["sigmoid"], "moe_layer_freq": [2],
                    "topk_method": ["noaux_tc", None], "n_group": [3, None], "topk_group": [3, None],
                    "num_key_value_heads": [2], "n_shared_experts": [None, 0], "rope_interleave": [True],
                    "num_experts": [4]},
    "deepseek_v3": {"scoring_func": ["softmax"], "topk_method": ["greedy"], "moe_layer_freq": [2],
                    "n_group": [3, None, 8], "topk_group": [3, None], "num_key_value_heads": [2],
                    "n_shared_experts": [None], "mlp_bias": [True], "head_dim": [98], "num_local_experts": [4]},
}  # fmt: skip


def refused(family: str) -> list[tuple[str, Any]]:
    """(key, value): each must be refused by the name of the key."""
    foreign = {key: values for key, values in _FOREIGN.items() if key not in KEYS[family]}
    cases = {**_REFUSED, **foreign, **_REFUSED_OWN[family]}
    return [(key, value) for key, values in cases.items() for value in values]


def untried(family: str) -> set[str]:
    """Keys of the table for which there is no case of any kind here."""
    tried = {case.key for case in computed(family)} | {key for key, _ in refused(family)} | INERT.keys()
    return set(KEYS[family]) - tried - {"model_type", "quantization_config", "max_window_layers"}
