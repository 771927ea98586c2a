"""Every key of a family's config.json: what it does to the logits here, and which of its values are served.

Nothing is ignored. A key is computed as transformers does (`SAME`), or has no part in inference and says why (`INERT`),
or only one value of it is served (`FIXED`). Other values, and keys that are not in the table, are refused by name.
`tests/integration/workers/model/test_config_survey.py` walks this table and transformers' config classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from workers.model.rope_keys import rope_refusals

Config = Mapping[str, Any]


class Effect(StrEnum):
    """What a key means for the logits."""

    SAME = "same"  # they change as in transformers
    INERT = "inert"  # they do not depend on it
    FIXED = "fixed"  # one value is served


@dataclass(frozen=True)
class Key:
    """A key of config.json. `what`: the values that are served, in words; `why`: the reason why it is inert."""

    effect: Effect
    served: Callable[[Any], bool]
    what: str
    why: str = ""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _same(what: str) -> Key:
    """A key that is computed; `what` must be one of the kinds below."""
    return Key(Effect.SAME, _KINDS[what], what)


def _one_of(*values: Any) -> Key:
    return Key(Effect.SAME, lambda value: value in values, f"one of {', '.join(map(str, values))}")


def _fixed(*values: Any) -> Key:
    return Key(Effect.FIXED, lambda value: value in values, f"only {' or '.join(map(str, values))}")


def _elsewhere(effect: Effect) -> Key:
    """A key whose values are judged together with others, by a rule below."""
    return Key(effect, lambda _: True, "any value")


def _inert(why: str) -> Key:
    return Key(Effect.INERT, lambda _: True, "any value", why)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "true or false": lambda value: isinstance(value, bool),
    "a positive whole number": lambda value: _integer(value, 1),
    "a whole number": lambda value: _integer(value, 0),
    "a whole number or null": lambda value: value is None or _integer(value, 0),
    "a positive whole number or null": lambda value: value is None or _integer(value, 1),
    "a number": _number,
    "a positive number": lambda value: _number(value) and value > 0,
    "a positive number or null": lambda value: value is None or (_number(value) and value > 0),
    "a list of layers or null": lambda value: (
        value is None or (isinstance(value, list) and all(_integer(layer, 0) for layer in value))
    ),
}
COUNT, COUNT_OR_NONE, FLAG, NUMBER = (
    _same("a positive whole number"),
    _same("a positive whole number or null"),
    _same("true or false"),
    _same("a number"),
)
NATURAL, LAYERS, POSITIVE_OR_NONE = (
    _same("a whole number"),
    _same("a list of layers or null"),
    _same("a positive number or null"),
)
ACTIVATIONS = (
    "silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2",
    "relu6", "tanh", "sigmoid", "mish",
)  # fmt: skip
LAYER_TYPES = ("full_attention", "sliding_attention")

_TRAINING = _inert("of training only")
_OUTPUT = _inert("what transformers returns beside the logits")
_LABEL = _inert("of classification heads")
_NOTE = _inert("a note about the file")
_REQUEST = _inert("sampling belongs to the request and to generation_config.json")
_OURS = _inert("this product chooses: its own attention, experts and KV cache")
_EXTRA_LAYERS = _inert("extra layers for speculative decoding, which is not done")

COMMON: Mapping[str, Key] = {
    "vocab_size": COUNT,
    "hidden_size": COUNT,
    "intermediate_size": COUNT,
    "num_hidden_layers": COUNT,
    "num_attention_heads": COUNT,
    "num_key_value_heads": COUNT_OR_NONE,
    "num_experts_per_tok": COUNT,
    "hidden_act": _one_of(*ACTIVATIONS),
    "rms_norm_eps": NUMBER,
    "tie_word_embeddings": FLAG,
    "max_position_embeddings": COUNT,
    # the values of these four: rope_keys.py
    "rope_parameters": _elsewhere(Effect.SAME),
    "rope_scaling": _elsewhere(Effect.SAME),
    "rope_theta": _elsewhere(Effect.SAME),
    "original_max_position_embeddings": _elsewhere(Effect.SAME),
    "partial_rotary_factor": _fixed(None, 1.0),
    "is_causal": _fixed(None, True),
    "is_encoder_decoder": _fixed(None, False),
    "per_layer_config": _fixed(None),
    "quantization_config": _fixed(None),
    "compression_config": _fixed(None),
    "model_type": _elsewhere(Effect.FIXED),  # the families: families.py
    "architectures": _elsewhere(Effect.FIXED),  # its values: `_architecture`
    "transformers_version": _NOTE,
    "name_or_path": _NOTE,
    "auto_map": _inert("code that comes with a checkpoint is never run"),
    "dtype": _inert("weights are computed as they are stored, or as --dtype says"),
    "torch_dtype": _inert("weights are computed as they are stored, or as --dtype says"),
    "bos_token_id": _inert("prompts come with it from the tokenizer"),
    "eos_token_id": _inert("ends an answer"),
    "pad_token_id": _inert("nothing is padded with it"),
    "sep_token_id": _inert("nothing is separated by it"),
    "decoder_start_token_id": _inert("of encoder-decoder models"),
    "tokenizer_class": _NOTE,
    "initializer_range": _TRAINING,
    "attention_dropout": _TRAINING,
    "router_aux_loss_coef": _TRAINING,
    "router_jitter_noise": _TRAINING,
    "aux_loss_alpha": _TRAINING,
    "seq_aux": _TRAINING,
    "pretraining_tp": _TRAINING,
    "ep_size": _inert("how the model was spread over devices when it was trained"),
    "output_router_logits": _OUTPUT,
    "output_hidden_states": _OUTPUT,
    "output_attentions": _OUTPUT,
    "return_dict": _OUTPUT,
    "use_cache": _OURS,
    "attn_implementation": _OURS,
    "experts_implementation": _OURS,
    "chunk_size_feed_forward": _inert("these families do not cut their MLPs into chunks"),
    "id2label": _LABEL,
    "label2id": _LABEL,
    "num_labels": _LABEL,
    "problem_type": _LABEL,
    **dict.fromkeys(
        (
            "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "temperature", "top_k", "top_p",
            "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
            "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
            "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
            "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "epsilon_cutoff",
            "eta_cutoff", "encoder_repetition_penalty", "num_assistant_tokens", "num_assistant_tokens_schedule",
            "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "num_beam_groups",
            "diversity_penalty",
        ),
        _REQUEST,
    ),
}  # fmt: skip

_QWEN: Mapping[str, Key] = {
    "num_experts": COUNT,
    "moe_intermediate_size": COUNT,
    "decoder_sparse_step": COUNT,
    "mlp_only_layers": LAYERS,
    "norm_topk_prob": FLAG,
    "head_dim": COUNT,
    "use_sliding_window": FLAG,
    "sliding_window": _same("a whole number or null"),  # with use_sliding_window: `_window`
}
_GROUPED: Mapping[str, Key] = {
    "n_routed_experts": COUNT,
    "n_shared_experts": COUNT,
    "moe_intermediate_size": COUNT,
    "first_k_dense_replace": NATURAL,
    "moe_layer_freq": _fixed(None, 1),
    "attention_bias": FLAG,
    "routed_scaling_factor": NUMBER,
    "n_group": COUNT_OR_NONE,
    "topk_group": COUNT_OR_NONE,
    "num_mtp_layers": _EXTRA_LAYERS,
    "num_nextn_predict_layers": _EXTRA_LAYERS,
}
_LATENT: Mapping[str, Key] = {
    **_GROUPED,
    "kv_lora_rank": COUNT,
    "q_lora_rank": COUNT_OR_NONE,
    "qk_nope_head_dim": COUNT,
    "qk_rope_head_dim": COUNT,
    "v_head_dim": COUNT,
    "head_dim": _inert("heads are as wide as qk_nope_head_dim and qk_rope_head_dim say"),
    "qk_head_dim": _inert("heads are as wide as qk_nope_head_dim and qk_rope_head_dim say"),
}
_SIGMOID: Mapping[str, Key] = {
    "num_local_experts": COUNT,
    "norm_topk_prob": FLAG,
    "topk_method": _fixed(None, "noaux_tc"),
    "scoring_func": _fixed(None, "sigmoid"),
}

KEYS: Mapping[str, Mapping[str, Key]] = {
    "mixtral": {**COMMON, "num_local_experts": COUNT, "num_experts": COUNT, "head_dim": COUNT_OR_NONE,
                "sliding_window": COUNT_OR_NONE},
    "qwen2_moe": {**COMMON, **_QWEN, "qkv_bias": FLAG, "shared_expert_intermediate_size": COUNT,
                  "max_window_layers": NATURAL,
                  "layer_types": _elsewhere(Effect.SAME)},  # its values: `_window`
    "qwen3_moe": {**COMMON, **_QWEN, "num_local_experts": COUNT, "attention_bias": FLAG,
                  # its values: `_window`
                  "max_window_layers": _elsewhere(Effect.FIXED),
                  "layer_types": _elsewhere(Effect.FIXED)},
    "olmoe": {**COMMON, "num_experts": COUNT, "num_local_experts": COUNT, "attention_bias": FLAG, "head_dim": COUNT,
              "clip_qkv": POSITIVE_OR_NONE, "norm_topk_prob": FLAG},
    "deepseek_v2": {**COMMON, **_LATENT, "num_experts": COUNT, "mlp_bias": FLAG,
                    "topk_method": _one_of("greedy", "group_limited_greedy"),
                    "norm_topk_prob": _fixed(None, False), "scoring_func": _fixed(None, "softmax")},
    "glm4_moe": {**COMMON, **_GROUPED, **_SIGMOID, "head_dim": COUNT, "use_qk_norm": FLAG,
                 "partial_rotary_factor": _elsewhere(Effect.SAME)},  # its values: rope_keys.py
    "granitemoe": {**COMMON, "num_local_experts": COUNT, "head_dim": COUNT, "attention_bias": FLAG,
                   "embedding_multiplier": NUMBER, "attention_multiplier": NUMBER, "residual_multiplier": NUMBER,
                   "logits_scaling": _same("a positive number")},
    "deepseek_v3": {**COMMON, **_LATENT, **_SIGMOID, "rope_interleave": FLAG,
                    "head_dim": _elsewhere(Effect.FIXED)},  # its value: `_heads`
}  # fmt: skip

# Two names of one key; transformers takes whichever it reads last.
ALIASES = (
    ("num_experts", "num_local_experts"),
    ("num_experts", "n_routed_experts"),
    ("num_local_experts", "n_routed_experts"),
)
# What transformers takes where config.json has no such key, as far as it decides a shape or a rule below.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "glm4_moe": {"num_key_value_heads": 8, "n_shared_experts": 1, "moe_intermediate_size": 1408,
                 "intermediate_size": 10944, "n_group": 1, "topk_group": 1},
    "granitemoe": {},
    "mixtral": {"num_key_value_heads": 8},
    "qwen2_moe": {"num_key_value_heads": 16, "qkv_bias": True, "intermediate_size": 5632, "moe_intermediate_size": 1408,
                  "shared_expert_intermediate_size": 5632, "sliding_window": 4096},
    "qwen3_moe": {"num_key_value_heads": 4, "intermediate_size": 6144, "moe_intermediate_size": 768,
                  "sliding_window": 4096},
    "olmoe": {},
    "deepseek_v2": {"n_shared_experts": 2, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
                    "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_intermediate_size": 1407,
                    "intermediate_size": 11008, "topk_method": "greedy"},
    "deepseek_v3": {"num_key_value_heads": 128, "n_shared_experts": 1, "kv_lora_rank": 512, "q_lora_rank": 1536,
                    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_intermediate_size": 2048,
                    "intermediate_size": 18432, "n_group": 8, "topk_group": 4},
}  # fmt: skip
CLASSES = {
    "glm4_moe": "Glm4MoeForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}


SUMMED_GROUPS = ("deepseek_v3", "glm4_moe")  # groups of experts are chosen by the sum of their two best
PARTLY_ROTATED = {"glm4_moe": 0.5}  # heads are rotated in part; the part where config.json has no partial_rotary_factor


def complete(family: str, config: Config) -> dict[str, Any]:
    """`config` with the family's defaults for what it leaves out."""
    return {**DEFAULTS[family], **config}


def refusals(family: str, config: Config) -> Iterator[str]:
    """What of this config.json is not served, each by the name of its key."""
    simple = [*_values(family, config)]
    yield from simple
    if not simple:  # what follows computes with the values
        whole = complete(family, config)
        for rule in (_names, _architecture, _heads, _experts, _window, _groups):
            yield from rule(family, whole)
        yield from rope_refusals(whole, _rotated(whole), PARTLY_ROTATED.get(family))


def _values(family: str, config: Config) -> Iterator[str]:
    """Keys that this family does not know, and values that are not served."""
    keys = KEYS[family]
    for name, value in config.items():
        if name.startswith("_"):
            continue
        key = keys.get(name)
        if key is None and value:  # what is off or empty asks for nothing
            yield f"{name} = {_short(value)}: {family} has no such key"
        elif key is not None and not key.served(value):
            yield f"{name} = {_short(value)}: {key.what}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _names(family: str, config: Config) -> Iterator[str]:
    for one, other in ALIASES:
        if (
            one in KEYS[family]
            and other in KEYS[family]
            and config.get(one, config.get(other)) != config.get(other, config.get(one))
        ):
            yield f"{one} = {config[one]} and {other} = {config[other]} contradict each other"


def _architecture(family: str, config: Config) -> Iterator[str]:
    found = config.get("architectures")
    if found and CLASSES[family] not in found:
        yield f"architectures = {_short(found)}: only {CLASSES[family]}"


def _heads(family: str, config: Config) -> Iterator[str]:
    heads = config["num_attention_heads"]
    kv = config.get("num_key_value_heads") or heads
    if "kv_lora_rank" in KEYS[family]:
        if kv != heads:
            yield f"num_key_value_heads = {kv}: latent attention has as many as num_attention_heads, {heads}"
        if config["hidden_size"] % heads:
            yield f"hidden_size = {config['hidden_size']}: not a multiple of num_attention_heads, {heads}"
        if family == "deepseek_v3" and config.get("head_dim", config["qk_rope_head_dim"]) != config["qk_rope_head_dim"]:
            yield f"head_dim = {config['head_dim']}: only qk_rope_head_dim, {config['qk_rope_head_dim']}"
    elif heads % kv:
        yield f"num_key_value_heads = {kv}: num_attention_heads, {heads}, is not a multiple of it"
    if family == "olmoe" and config.get("head_dim", config["hidden_size"] // heads) != config["hidden_size"] // heads:
        yield f"head_dim = {config['head_dim']}: only hidden_size / num_attention_heads"
    pad, vocab = config.get("pad_token_id"), config["vocab_size"]
    if pad is not None and not (isinstance(pad, int) and -vocab <= pad < vocab):
        yield f"pad_token_id = {_short(pad)}: not within the vocabulary of {vocab}"


def experts_of(config: Config) -> int:
    """How many experts a layer has, under whichever name."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((config[name] for name in names if config.get(name)), 0)


def _experts(family: str, config: Config) -> Iterator[str]:
    experts, top_k = experts_of(config), config["num_experts_per_tok"]
    if experts and top_k > experts:
        yield f"num_experts_per_tok = {top_k}: more than the {experts} experts there are"


def _window(family: str, config: Config) -> Iterator[str]:
    """Sliding windows, of the families in which a switch turns them on."""
    if "use_sliding_window" not in KEYS[family]:
        return
    on, window = config.get("use_sliding_window", False), config.get("sliding_window")
    if on and not window:
        yield f"sliding_window = {window}: use_sliding_window needs a positive one"
    types = config.get("layer_types")
    if types is not None:
        layers = config["num_hidden_layers"]
        if not isinstance(types, list) or len(types) != layers or any(each not in LAYER_TYPES for each in types):
            yield f"layer_types = {_short(types)}: {layers} times {' or '.join(LAYER_TYPES)}"
        elif "sliding_attention" in types and not on:
            yield f"layer_types = {_short(types)}: sliding_attention needs use_sliding_window"
        elif family == "qwen3_moe" and on and "full_attention" in types:
            yield f"layer_types = {_short(types)}: with use_sliding_window all layers of qwen3_moe slide"
    if family == "qwen3_moe" and on and config.get("max_window_layers"):
        yield f"max_window_layers = {config['max_window_layers']}: with use_sliding_window all layers slide"


def _groups(family: str, config: Config) -> Iterator[str]:
    """Groups of experts (DeepSeek)."""
    summed = family in SUMMED_GROUPS
    limited = summed or config.get("topk_method") == "group_limited_greedy"
    if "n_group" not in KEYS[family] or not limited:
        return
    experts, groups, chosen = experts_of(config), config.get("n_group"), config.get("topk_group")
    fewest = 2 if summed else 1  # a group's score is the sum of its two best
    if not groups or experts % groups or experts // groups < fewest:
        yield f"n_group = {groups}: {experts} experts in groups of at least {fewest} are needed"
    elif not chosen or chosen > groups:
        yield f"topk_group = {chosen}: from 1 to n_group, {groups}"
    elif config["num_experts_per_tok"] > chosen * (experts // groups):
        yield f"topk_group = {chosen}: its groups have fewer experts than num_experts_per_tok"


def _rotated(config: Config) -> int | None:
    """Width of what rotary embeddings turn; None: transformers wants head_dim to be given for some of their types."""
    if "qk_rope_head_dim" in config:
        return int(config["qk_rope_head_dim"])
    if "head_dim" in config:
        return int(config["head_dim"]) if config["head_dim"] else None
    return None if config.get("model_type") == "mixtral" else config["hidden_size"] // config["num_attention_heads"]
