"""Which tensors a checkpoint must hold, of which shape: from config.json alone, compared with the files' headers.

Names are those of transformers' models; `_canonical` gives the stored names that mean the same. That this table agrees
with what transformers writes is shown by `tests/integration/workers/model/test_config_survey.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from membership.base.errors import ModelError
from workers.model.config_keys import SUMMED_GROUPS, complete
from workers.model.families import ModelInfo, listed, read_config, read_header

Shape = tuple[int, ...]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.")
_FUSED = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.gate_up_proj$")  # the experts of a layer in one tensor
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_COMPUTED = "rotary_emb.inv_freq"  # written by old versions of transformers, read by none
_MIXTRAL_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_GRANITE_PARTS = {
    "input_linear.weight": "experts.gate_up_proj",
    "output_linear.weight": "experts.down_proj",
    "router.layer.weight": "gate.weight",
}


def check_tensors(info: ModelInfo) -> None:
    """ModelError that names layer and expert of what is missing, misshaped or without a place. Reads headers only."""
    root = Path(info.path)
    found: dict[str, Shape] = {}
    for file in info.files:
        for name, tensor in read_header(root / file).items():
            found[_canonical(name)] = tuple(tensor.get("shape", ()))
    faults = list(_faults(info, complete(info.family, read_config(root)), found))
    if faults:
        raise ModelError(
            f"{root}: {listed(faults)}", hint="config.json and weights must belong together: get both again"
        )


def _canonical(name: str) -> str:
    """A stored name as the model has it."""
    if name.startswith(("layers.", "embed_tokens.", "norm.")):
        name = f"model.{name}"
    before, found, after = name.partition(".block_sparse_moe.")
    if not found:
        return name
    if after in _GRANITE_PARTS:
        return f"{before}.mlp.{_GRANITE_PARTS[after]}"
    *path, last = after.removesuffix(".weight").split(".")
    return ".".join((before, "mlp", *path, _MIXTRAL_PARTS.get(last, last), "weight"))


def _faults(info: ModelInfo, config: Mapping[str, Any], found: Mapping[str, Shape]) -> Iterator[str]:
    fused = {int(match[1]) for match in map(_FUSED.match, found) if match}
    wanted = dict(expected_tensors(info, config, fused))
    if config.get("tie_word_embeddings") and (EMBEDDING in found or HEAD in found):
        for name in {EMBEDDING, HEAD} - found.keys():  # one of them is enough
            del wanted[name]
    for name, shape in wanted.items():
        if name not in found:
            yield f"{_place(name)}: {name} is missing"
        elif found[name] != shape:
            yield f"{_place(name)}: {name} has shape {list(found[name])}, config.json implies {list(shape)}"
    for name in sorted(found.keys() - wanted.keys()):
        layer = _LAYER.match(name)
        if layer is not None and int(layer[1]) < info.layers and not name.endswith(_COMPUTED):
            yield f"{_place(name)}: config.json leaves no place for {name}"


def _place(name: str) -> str:
    """Layer and expert of a tensor, in words."""
    expert, layer = _EXPERT.match(name), _LAYER.match(name)
    if expert is not None:
        return f"layer {expert[1]}, expert {expert[2]}"
    return f"layer {layer[1]}" if layer is not None else "outside of the layers"


def expected_tensors(
    info: ModelInfo, config: Mapping[str, Any], fused: Collection[int] = ()
) -> Iterator[tuple[str, Shape]]:
    """Names and shapes. `config` is complete; `fused`: layers whose experts are stored as one tensor."""
    yield EMBEDDING, (info.vocab_size, info.hidden)
    yield "model.norm.weight", (info.hidden,)
    yield HEAD, (info.vocab_size, info.hidden)
    attention = dict(_latent_attention(config) if "kv_lora_rank" in config else _attention(info.family, config))
    for layer in range(info.layers):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", (info.hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (info.hidden,)
        for name, shape in attention.items():
            yield f"{prefix}self_attn.{name}", shape
        if layer in info.moe_layer_ids:
            yield from _moe(f"{prefix}mlp.", info, config, fused=layer in fused)
        else:
            yield from _mlp(f"{prefix}mlp.", info.hidden, config["intermediate_size"], bias=config.get("mlp_bias"))


def _attention(family: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    query, key = heads * width, (config.get("num_key_value_heads") or heads) * width
    biases = {"q_proj", "k_proj", "v_proj"} if config.get("qkv_bias") else set()
    if config.get("attention_bias"):
        biases = {"q_proj", "k_proj", "v_proj"} | ({"o_proj"} if family != "glm4_moe" else set())
    for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key), ("o_proj", hidden)):
        yield f"{name}.weight", (rows, query if name == "o_proj" else hidden)
        if name in biases:
            yield f"{name}.bias", (rows,)
    if family == "qwen3_moe" or config.get("use_qk_norm"):
        yield from (("q_norm.weight", (width,)), ("k_norm.weight", (width,)))
    if family == "olmoe":
        yield from (("q_norm.weight", (query,)), ("k_norm.weight", (key,)))


def _latent_attention(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, heads, bias = config["hidden_size"], config["num_attention_heads"], config.get("attention_bias")
    query_rank, rank, rotated = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    query = heads * (config["qk_nope_head_dim"] + rotated)
    if query_rank is None:
        yield "q_proj.weight", (query, hidden)
    else:
        yield "q_a_proj.weight", (query_rank, hidden)
        yield "q_a_layernorm.weight", (query_rank,)
        yield "q_b_proj.weight", (query, query_rank)
    yield "kv_a_proj_with_mqa.weight", (rank + rotated, hidden)
    yield "kv_a_layernorm.weight", (rank,)
    yield "kv_b_proj.weight", (heads * (config["qk_nope_head_dim"] + config["v_head_dim"]), rank)
    yield "o_proj.weight", (hidden, heads * config["v_head_dim"])
    if bias:
        yield from (("kv_a_proj_with_mqa.bias", (rank + rotated,)), ("o_proj.bias", (hidden,)))
        if query_rank is not None:
            yield "q_a_proj.bias", (query_rank,)


def _mlp(prefix: str, hidden: int, width: int, *, bias: bool | None = False) -> Iterator[tuple[str, Shape]]:
    for name, rows, columns in (("gate_proj", width, hidden), ("up_proj", width, hidden), ("down_proj", hidden, width)):
        yield f"{prefix}{name}.weight", (rows, columns)
        if bias:
            yield f"{prefix}{name}.bias", (rows,)


def _moe(prefix: str, info: ModelInfo, config: Mapping[str, Any], *, fused: bool) -> Iterator[tuple[str, Shape]]:
    hidden, width = info.hidden, info.expert_width
    yield f"{prefix}gate.weight", (info.experts, hidden)
    if info.family in SUMMED_GROUPS:
        yield f"{prefix}gate.e_score_correction_bias", (info.experts,)
    if "n_shared_experts" in config:
        shared = width * config["n_shared_experts"]
        yield from _mlp(f"{prefix}shared_experts.", hidden, shared, bias=config.get("mlp_bias"))
    if info.family == "qwen2_moe":
        yield from _mlp(f"{prefix}shared_expert.", hidden, config["shared_expert_intermediate_size"])
        yield f"{prefix}shared_expert_gate.weight", (1, hidden)
    if fused:
        yield f"{prefix}experts.gate_up_proj", (info.experts, 2 * width, hidden)
        yield f"{prefix}experts.down_proj", (info.experts, hidden, width)
        return
    for expert in range(info.experts):
        yield from _mlp(f"{prefix}experts.{expert}.", hidden, width)
