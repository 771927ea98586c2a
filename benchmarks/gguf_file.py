"""A checkpoint of `checkpoints.py` as a GGUF file, which llama.cpp reads: the same numbers, matrices in bf16."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

OUTSIDE = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
IN_LAYER = {
    **{f"self_attn.{each}_proj": f"attn_{each}" for each in "qkv"},
    **{f"self_attn.{each}_norm": f"attn_{each}_norm" for each in "qk"},
    "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
BF16_FILE = 32  # LLAMA_FTYPE_MOSTLY_BF16


def stacks(names: Iterable[str]) -> dict[str, list[str]]:
    """What each tensor of the file is made of: one of the checkpoint, or those of all experts in order."""
    experts: dict[str, dict[int, str]] = {}
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        bare = name.removesuffix(".weight")
        if bare in OUTSIDE:
            found[f"{OUTSIDE[bare]}.weight"] = [name]
            continue
        layer, within = bare.removeprefix("model.layers.").split(".", 1)
        if within in IN_LAYER:
            found[f"blk.{layer}.{IN_LAYER[within]}.weight"] = [name]
        else:
            number, matrix = within.removeprefix("mlp.experts.").split(".")
            stacked = f"blk.{layer}.ffn_{matrix.removesuffix('_proj')}_exps.weight"
            experts.setdefault(stacked, {})[int(number)] = name
    return found | {stacked: [each[number] for number in sorted(each)] for stacked, each in experts.items()}


def write(checkpoint: Path, into: Path) -> None:
    """Make the file, a tensor at a time, so that it is never whole in memory. Needs the package `gguf`."""
    import gguf
    import torch
    from safetensors import safe_open

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    made = stacks(index)
    writer = gguf.GGUFWriter(into, "olmoe")
    _write_config(writer, config)
    with ExitStack() as opened:
        files = {
            file: opened.enter_context(safe_open(checkpoint / file, framework="pt")) for file in set(index.values())
        }

        def shape_of(parts: list[str]) -> list[int]:
            one = list(files[index[parts[0]]].get_slice(parts[0]).get_shape())
            return [len(parts), *one] if len(parts) > 1 else one

        def wide(name: str, shape: list[int]) -> bool:  # norms and routers, which llama.cpp wants in fp32
            return len(shape) == 1 or "ffn_gate_inp" in name

        for name, parts in made.items():
            shape = shape_of(parts)
            numbers = torch.Size(shape).numel()
            if wide(name, shape):
                writer.add_tensor_info(name, shape, _numpy_type("float32"), 4 * numbers)
            else:
                kind = gguf.GGMLQuantizationType.BF16
                in_bytes = [*shape[:-1], 2 * shape[-1]]
                writer.add_tensor_info(name, in_bytes, _numpy_type("uint8"), 2 * numbers, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, parts in made.items():
            tensors = [files[index[part]].get_tensor(part) for part in parts]
            whole = torch.stack(tensors) if len(tensors) > 1 else tensors[0]
            writer.write_tensor_data(
                whole.float().numpy() if wide(name, list(whole.shape)) else whole.view(torch.uint8).numpy()
            )
    writer.close()


def _numpy_type(name: str) -> Any:
    import numpy as np

    return np.dtype(name)


def _write_config(writer: Any, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(BF16_FILE)
    writer.add_tokenizer_model("none")
