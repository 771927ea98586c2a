"""Reading a checkpoint's shape from JSON and headers: every family, and every way in which a checkpoint is unfit."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from membership.base.errors import ModelError
from workers.model.families import read_model_info

pytestmark = pytest.mark.unit

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}


def safetensors(path: Path, tensors: dict[str, str], *, cut: int = 0) -> None:
    """A file of one-element tensors of the given types, `cut` bytes short."""
    header = {
        n: {"dtype": t, "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, (n, t) in enumerate(tensors.items())
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    whole = struct.pack("<Q", len(text)) + text + bytes(4 * len(tensors))
    path.write_bytes(whole[: len(whole) - cut])


def checkpoint(root: Path, config: dict[str, Any], tensors: dict[str, str] | None = None) -> Path:
    root.mkdir(exist_ok=True)
    (root / "config.json").write_text(json.dumps(config))
    safetensors(root / "model.safetensors", tensors or {"lm_head.weight": "BF16"})
    return root


@pytest.mark.parametrize(
    ("changes", "moe_layers"),
    [
        ({}, (0, 1, 2)),
        ({"model_type": "olmoe", "num_experts": 4, "num_local_experts": None}, (0, 1, 2)),
        ({"model_type": "qwen2_moe", "num_experts": 4, "num_local_experts": None, "mlp_only_layers": [1]}, (0, 2)),
        ({"model_type": "qwen3_moe", "num_experts": 4, "decoder_sparse_step": 2}, (1,)),
        ({"model_type": "deepseek_v2", "n_routed_experts": 4, "num_local_experts": None,
          "first_k_dense_replace": 1}, (1, 2)),
        ({"model_type": "granitemoe"}, (0, 1, 2)),
        ({"model_type": "glm4_moe", "n_routed_experts": 4, "num_local_experts": None}, (1, 2)),
        ({"model_type": "deepseek_v3", "n_routed_experts": 4, "num_hidden_layers": 5, "n_group": 1, "topk_group": 1},
         (3, 4)),
    ],
)  # fmt: skip
def test_families(tmp_path: Path, changes: dict[str, Any], moe_layers: tuple[int, ...]) -> None:
    config = {key: value for key, value in {**MIXTRAL, **changes}.items() if value is not None}
    info = read_model_info(checkpoint(tmp_path, config))
    assert info.moe_layer_ids == moe_layers
    assert (info.moe_layers, info.experts, info.top_k, info.hidden, info.vocab_size) == (len(moe_layers), 4, 2, 8, 32)
    assert (info.dtype, info.max_position, info.files) == ("bfloat16", 64, ("model.safetensors",))


@pytest.mark.parametrize(("eos", "expected"), [(2, (2,)), ([2, 5], (2, 5)), (None, ())])
def test_eos_of_the_generation_config_wins(tmp_path: Path, eos: Any, expected: tuple[int, ...]) -> None:
    checkpoint(tmp_path, {**MIXTRAL, "eos_token_id": 9 if eos is not None else None})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert read_model_info(tmp_path).eos_token_ids == expected


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model directory") as caught:
        read_model_info(tmp_path / "absent")
    assert "demo-model" in caught.value.hint


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_model_info(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama", "num_local_experts": None}, "llama is a dense model"),
        ({"model_type": "dbrx"}, "'dbrx' is not supported"),
        ({"model_type": "gpt_oss"}, "'gpt_oss' is not supported"),
        ({"model_type": "qwen3_next"}, "qwen3_next has layers with a state of their own"),
        ({"model_type": "jamba"}, "jamba has layers with a state of their own"),
        ({"num_local_experts": 0}, "no positive num_local_experts"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0, 1, 2]}, "no layer of this qwen3_moe model has experts"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
    ],
)
def test_unfit_configs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = {key: value for key, value in {**MIXTRAL, **changes}.items() if value is not None}
    with pytest.raises(ModelError, match=message) as caught:
        read_model_info(checkpoint(tmp_path, config))
    assert caught.value.hint


def test_a_part_of_null_is_all(tmp_path: Path) -> None:
    checkpoint(tmp_path, {**MIXTRAL, "partial_rotary_factor": None})
    assert read_model_info(tmp_path).family == "mixtral"


def test_broken_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        read_model_info(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="no safetensors weights") as caught:
        read_model_info(tmp_path)
    assert "pytorch_model.bin" in caught.value.hint


@pytest.mark.parametrize("cut", [1, 4, 60, 10_000])
def test_truncated_weights(tmp_path: Path, cut: int) -> None:
    checkpoint(tmp_path, MIXTRAL)
    safetensors(tmp_path / "model.safetensors", {"a.weight": "F32", "b.weight": "F32"}, cut=cut)
    with pytest.raises(ModelError, match=r"truncated|not a whole safetensors file"):
        read_model_info(tmp_path)


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "I32"])
def test_wrong_dtype(tmp_path: Path, dtype: str) -> None:
    checkpoint(tmp_path, MIXTRAL, {"lm_head.weight": "BF16", "model.layers.0.q_proj.weight": dtype})
    with pytest.raises(ModelError, match=rf"q_proj\.weight is of type {dtype}"):
        read_model_info(tmp_path)


def shards(root: Path, weight_map: dict[str, str]) -> Path:
    (root / "config.json").write_text(json.dumps(MIXTRAL))
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return root


def test_index_names_a_missing_shard(tmp_path: Path) -> None:
    shards(tmp_path, {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"})
    safetensors(tmp_path / "model-1.safetensors", {"a.weight": "F32"})
    with pytest.raises(ModelError, match=r"missing: model-2\.safetensors"):
        read_model_info(tmp_path)


def test_shard_lacks_what_the_index_promises(tmp_path: Path) -> None:
    shards(tmp_path, {"a.weight": "model-1.safetensors", "b.weight": "model-1.safetensors"})
    safetensors(tmp_path / "model-1.safetensors", {"a.weight": "F32"})
    with pytest.raises(ModelError, match=r"lacks b\.weight"):
        read_model_info(tmp_path)


def test_shipped_checkpoint_without_heavy_imports() -> None:
    code = (
        "import sys\nfrom elastic.demo.model import shipped_demo_model\n"
        "from workers.model.families import read_model_info\n"
        "i = read_model_info(shipped_demo_model()); print(i.family, i.moe_layers, i.experts, i.dtype)\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, ["mixtral", "4", "8", "bfloat16"]), done.stderr
