"""A checkpoint of Qwen3-30B-A3B's shape with random bf16 weights: 60 GB with its 48 layers, in a fraction of a minute.

Weights are drawn on the GPU where there is one, a file per layer. safetensors' own writer copies each tensor under the
interpreter's lock, one layer after the other; here a layer is one piece of memory, and several are written at once.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

WRITERS = 6  # each has a layer in host memory, 1.2 GB of the whole model's
LONGEST = 4096  # tokens of a prompt and its answer
Tensors = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class QwenShape:
    """Qwen3-30B-A3B's, but for the number of layers, and of words: random weights say nothing with either."""

    layers: int = 48
    vocabulary: int = 1024
    hidden: int = 2048
    experts: int = 128
    top_k: int = 8
    inner: int = 768
    heads: int = 32
    kv_heads: int = 4
    width: int = 128  # of a head

    def config(self) -> dict[str, Any]:
        """As its config.json has it."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": self.hidden,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.width, "num_experts": self.experts, "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.inner, "intermediate_size": 3 * self.hidden, "vocab_size": self.vocabulary,
            "max_position_embeddings": LONGEST, "rms_norm_eps": 1e-6, "hidden_act": "silu",
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "norm_topk_prob": True,
            "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False, "attention_bias": False,
            "dtype": "bfloat16", "use_sliding_window": False, "bos_token_id": 0, "pad_token_id": 1,
        }  # fmt: skip

    def layer(self, number: int) -> Tensors:
        """Names and shapes of a layer's tensors."""
        at, hidden = f"model.layers.{number}.", self.hidden
        queries, keys = self.heads * self.width, self.kv_heads * self.width
        tensors: Tensors = {f"{at}{each}_layernorm.weight": (hidden,) for each in ("input", "post_attention")}
        tensors |= {f"{at}self_attn.{each}_norm.weight": (self.width,) for each in "qk"}
        tensors |= {f"{at}self_attn.{each}_proj.weight": (keys, hidden) for each in "kv"}
        tensors |= {
            f"{at}self_attn.q_proj.weight": (queries, hidden),
            f"{at}self_attn.o_proj.weight": (hidden, queries),
        }
        tensors[f"{at}mlp.gate.weight"] = self.experts, hidden
        for expert in range(self.experts):
            name = f"{at}mlp.experts.{expert}."
            tensors |= {f"{name}{each}_proj.weight": (self.inner, hidden) for each in ("gate", "up")}
            tensors[f"{name}down_proj.weight"] = hidden, self.inner
        return tensors

    def files(self) -> Iterator[tuple[str, Tensors]]:
        """By file."""
        embedding = self.vocabulary, self.hidden
        top = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding, "model.norm.weight": (self.hidden,)}
        yield "top.safetensors", top
        for number in range(self.layers):
            yield f"layer-{number}.safetensors", self.layer(number)


def make_checkpoint(folder: Path, layers: int, vocabulary: int = QwenShape.vocabulary) -> None:
    """Random weights in bf16, in the layout of Hugging Face."""
    make(folder, QwenShape(layers, vocabulary))


def make(folder: Path, shape: QwenShape) -> None:
    """The same, of any size."""
    demo = Path(__file__).parents[1] / "elastic/demo/checkpoint"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (demo / name).exists():
            shutil.copy(demo / name, folder)
    (folder / "config.json").write_text(json.dumps(shape.config()), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0}), encoding="utf-8")
    files = dict(shape.files())
    with ThreadPoolExecutor(WRITERS) as pool:
        for written in [pool.submit(_write, folder / name, tensors) for name, tensors in files.items()]:
            written.result()
    _give_back()
    index = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8"
    )


def _give_back() -> None:
    """The GPU's memory: this process stays, and the server wants it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _scale(name: str, shape: tuple[int, ...]) -> float:
    """What random numbers are multiplied with; 0: it is all ones."""
    if len(shape) == 1:
        return 0.0
    return 1.0 if "embed" in name else float(shape[-1] ** -0.5)


def _write(file: Path, tensors: Tensors) -> None:
    """In safetensors' format: the header's length, the header, and the bytes of all tensors."""
    import torch

    sizes = [math.prod(shape) for shape in tensors.values()]
    ends = list(accumulate(sizes))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    content = torch.randn(ends[-1], device=device, dtype=torch.bfloat16)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for (name, shape), size, end in zip(tensors.items(), sizes, ends, strict=True):
        here, scale = content[end - size : end], _scale(name, shape)
        here.mul_(scale) if scale else here.fill_(1.0)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [2 * (end - size), 2 * end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with file.open("wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        out.write(memoryview(content.cpu().view(torch.uint8).numpy()))
