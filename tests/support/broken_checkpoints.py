"""Checkpoints that cannot be served, each broken in one way, made from the shipped one."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.demo.model import shipped_demo_model

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Broken:
    """`spoil` breaks a good checkpoint; `says` must be in the error."""

    name: str
    spoil: Callable[[Path], object]
    says: str

    def make(self, root: Path) -> Path:
        """A directory with such a checkpoint."""
        path = root / "broken-model"
        shutil.copytree(shipped_demo_model(), path)
        self.spoil(path)
        return path


def edit(file: str, **changes: Any) -> Callable[[Path], object]:
    """Change keys of a JSON file; None takes one out."""

    def spoil(path: Path) -> None:
        found = {**json.loads((path / file).read_text()), **changes}
        (path / file).write_text(json.dumps({key: value for key, value in found.items() if value is not None}))

    return spoil


def write(file: str, content: bytes) -> Callable[[Path], object]:
    """Replace a file's content."""
    return lambda path: (path / file).write_bytes(content)


def remove(file: str) -> Callable[[Path], object]:
    """Take a file away."""
    return lambda path: (path / file).unlink()


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change what the weight file says of its tensors; the data stay."""

    def spoil(path: Path) -> None:
        whole = (path / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])
        tensors = json.loads(whole[8 : 8 + length])
        change(tensors)
        text = json.dumps(tensors).encode()
        (path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])

    return spoil


def _truncate(path: Path) -> None:
    whole = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(whole[:-1000])


def _shards(path: Path) -> None:
    names = {
        "lm_head.weight": "model-00001-of-00002.safetensors",
        "model.norm.weight": "model-00002-of-00002.safetensors",
    }
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (path / WEIGHTS).rename(path / "model-00001-of-00002.safetensors")


EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
QUERY = "model.layers.2.self_attn.q_proj.weight"
NORM = "model.layers.3.input_layernorm.weight"
CONFIG, GENERATION = "config.json", "generation_config.json"

ALL = [
    Broken("no-directory", lambda path: shutil.rmtree(path), "no such model directory"),
    Broken("no-config", remove(CONFIG), "no config.json"),
    Broken("config-not-json", write(CONFIG, b"{"), "config.json is not valid JSON"),
    Broken("config-latin-1", write(CONFIG, b'{"a": "\xe9"}'), "config.json is not valid JSON"),
    Broken("config-a-list", write(CONFIG, b"[]"), "config.json is not a JSON object"),
    Broken("no-tokenizer", remove("tokenizer.json"), "no tokenizer.json"),
    Broken("damaged-tokenizer", write("tokenizer.json", b"{}"), "damaged"),
    Broken("damaged-tokenizer-config", write("tokenizer_config.json", b"{"), "tokenizer_config.json is not valid"),
    Broken("impossible-defaults", edit(GENERATION, temperature=-1.0), "impossible temperature"),
    Broken("missing-expert", header(lambda t: t.pop(EXPERT)), "layer 1, expert 3: "),
    Broken("misshaped-expert", header(lambda t: t[EXPERT].update(shape=[128, 256])), "layer 1, expert 3: "),
    Broken("misshaped-attention", header(lambda t: t[QUERY].update(shape=[64, 256])), "layer 2: model.layers.2.self"),
    Broken("missing-norm", header(lambda t: t.pop(NORM)), f"layer 3: {NORM} is missing"),
    Broken(
        "bias-without-place", header(lambda t: t.update({QUERY.replace("weight", "bias"): t[QUERY]})), "layer 2: conf"
    ),
    Broken("dtype", header(lambda t: t[QUERY].update(dtype="F8_E4M3")), "is of type F8_E4M3"),
    Broken("more-experts-than-stored", edit(CONFIG, num_local_experts=16), "layer 0, expert 8: "),
    Broken("more-layers-than-stored", edit(CONFIG, num_hidden_layers=5), "layer 4: "),
    Broken("layers-beyond-all-memory", edit(CONFIG, num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    Broken("fewer-layers-in-words", edit(CONFIG, num_hidden_layers="4"), "no positive num_hidden_layers"),
    Broken("vocabulary", edit(CONFIG, vocab_size=1000), "has shape [1024, 128], config.json implies [1000, 128]"),
    Broken("top-k", edit(CONFIG, num_experts_per_tok=9), "num_experts_per_tok = 9"),
    Broken("no-max-position", edit(CONFIG, max_position_embeddings=None), "no positive max_position_embeddings"),
    Broken("architectures-a-number", edit(CONFIG, architectures=1), "config.json is damaged"),
    Broken("layers-beyond-all-numbers", edit(CONFIG, num_hidden_layers=10**30), "num_hidden_layers is 10000"),
    Broken("a-shape-of-no-numbers", header(lambda t: t[QUERY].update(shape=7)), "a header of the weights, is damaged"),
    Broken("defaults-beyond-all-numbers", edit(GENERATION, temperature=10**400), "generation_config.json is damaged"),
    Broken("settings-without-end", write("tokenizer_config.json", b"[" * 100_000), "tokenizer_config.json or"),
    Broken("eos-a-word", edit(GENERATION, eos_token_id="two"), "eos_token_id in generation_config.json is 'two'"),
    Broken("eos-words", edit(GENERATION, eos_token_id=["1"]), "eos_token_id in generation_config.json is ['1']"),
    Broken("eos-a-fraction", edit(GENERATION, eos_token_id=1.5), "eos_token_id in generation_config.json is 1.5"),
    Broken("rope", edit(CONFIG, partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
    Broken("key-of-another-family", edit(CONFIG, logits_scaling=8.0), "logits_scaling = 8.0"),
    Broken("quantized", edit(CONFIG, quantization_config={"quant_method": "fp8"}), "quantized"),
    Broken("unknown-family", edit(CONFIG, model_type="dbrx"), "'dbrx' is not supported"),
    Broken("hybrid", edit(CONFIG, model_type="jamba"), "jamba has layers with a state of their own"),
    Broken("dense", edit(CONFIG, model_type="llama", num_local_experts=None), "llama is a dense model"),
    Broken("missing-shard", _shards, "names shards that are missing: model-00002-of-00002.safetensors"),
    Broken("index-not-json", write("model.safetensors.index.json", b"{"), "index.json is not valid JSON"),
    Broken("index-without-map", write("model.safetensors.index.json", b"{}"), "has no weight_map"),
    Broken("truncated", _truncate, "is truncated"),
    Broken("empty-file", write(WEIGHTS, b""), "is not a whole safetensors file"),
    Broken(
        "pickled-weights", lambda path: (path / WEIGHTS).rename(path / "pytorch_model.bin"), "no safetensors weights"
    ),
]
