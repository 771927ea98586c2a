"""Checkpoints of OLMoE's kind with random bf16 weights, made on the spot."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """How large it is; each expert has three matrices of `hidden` x `inner`."""

    hidden: int = 1024
    inner: int = 416
    layers: int = 16
    experts: int = 64
    vocabulary: int = 32_000

    @classmethod
    def of_size(cls, gigabytes: float) -> Shape:
        """The default one with more or fewer layers."""
        layer_bytes = 2 * (cls.experts * 3 * cls.hidden * cls.inner + 4 * cls.hidden * cls.hidden)
        return cls(layers=max(1, round((gigabytes * 1e9 - 4 * cls.vocabulary * cls.hidden) / layer_bytes)))


OLMOE_HALF = Shape(hidden=2048, inner=1024, layers=8, experts=64, vocabulary=50_304)  # OLMoE-1B-7B, half of its layers
SMALL = Shape(hidden=256, inner=128, layers=4, experts=32, vocabulary=4000)


def make(path: Path, shape: Shape) -> int:
    """Write one, one file per layer, so that it is never whole in memory; returns its bytes.

    Each token of its tokenizer is a word, so that a client sees every token.
    """
    from transformers import OlmoeConfig

    path.mkdir(parents=True, exist_ok=True)
    OlmoeConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.hidden // 64, num_key_value_heads=shape.hidden // 64,
        num_experts=shape.experts, num_experts_per_tok=8, max_position_embeddings=4096, tie_word_embeddings=False,
        eos_token_id=None, torch_dtype="bfloat16", architectures=["OlmoeForCausalLM"],
    ).save_pretrained(path)  # fmt: skip
    files = {f"model-{number:05}.safetensors": _layer(shape, number) for number in range(shape.layers)}
    files["model-rest.safetensors"] = {
        "model.embed_tokens.weight": (shape.vocabulary, shape.hidden),
        "lm_head.weight": (shape.vocabulary, shape.hidden),
        "model.norm.weight": (shape.hidden,),
    }
    for file, tensors in files.items():
        _write(path / file, tensors)
    index = {"metadata": {}, "weight_map": {name: file for file, tensors in files.items() for name in tensors}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    write_tokenizer(path, shape.vocabulary)
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _layer(shape: Shape, number: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a layer's tensors."""
    prefix = f"model.layers.{number}."
    tensors: dict[str, tuple[int, ...]] = {
        f"{prefix}self_attn.{each}_proj.weight": (shape.hidden, shape.hidden) for each in "qkvo"
    }
    tensors |= {f"{prefix}self_attn.{each}_norm.weight": (shape.hidden,) for each in "qk"}
    tensors |= {f"{prefix}{each}_layernorm.weight": (shape.hidden,) for each in ("input", "post_attention")}
    tensors[f"{prefix}mlp.gate.weight"] = (shape.experts, shape.hidden)
    for expert in range(shape.experts):
        name = f"{prefix}mlp.experts.{expert}."
        tensors |= {f"{name}{each}_proj.weight": (shape.inner, shape.hidden) for each in ("gate", "up")}
        tensors[f"{name}down_proj.weight"] = (shape.hidden, shape.inner)
    return tensors


def _write(file: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    import torch
    from safetensors.torch import save_file

    made = {name: torch.randn(shape, dtype=torch.bfloat16) * 0.02 for name, shape in tensors.items()}
    save_file(made, file, metadata={"format": "pt"})


def write_tokenizer(path: Path, vocabulary: int) -> None:
    """One whose tokens are words, so that a client sees each of them as it comes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"w{number}": number for number in range(vocabulary)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(path / "tokenizer.json"))
