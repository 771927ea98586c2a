"""What a checkpoint is, read from its JSON and safetensors headers alone: the CLI and controller never import torch.

Everything wrong with a checkpoint that can be seen without computing is found here, before any process is started.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from membership.base.errors import ModelError
from workers.model.config_keys import complete, refusals
from workers.model.rope_keys import longest_as_trained
from workers.model.text_files import DAMAGED_HINT, end_token_of_tokenizer, read_json

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
EXPERT_COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
REQUIRED = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_experts_per_tok", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
EXPERT_WIDTH_KEYS = ("moe_intermediate_size", "intermediate_size")
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 256 << 20
MAX_POSITIONS = 1 << 62
MAX_LAYERS = 10_000  # lists are as long; the deepest models have some hundred
MOST_NAMED = 3  # faults of one kind in one message


MoeLayers = Callable[[dict[str, Any], int], tuple[int, ...]]
"""(config.json, number of layers) -> the layers that have experts, ascending. ModelError if we cannot serve them."""


def _every_layer(config: dict[str, Any], layers: int) -> tuple[int, ...]:
    return tuple(range(layers))


def _every_nth_layer(config: dict[str, Any], layers: int) -> tuple[int, ...]:
    dense = config.get("mlp_only_layers") or []
    step = config.get("decoder_sparse_step", 1)
    return tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)


def _after_dense_layers(config: dict[str, Any], layers: int, *, usual: int) -> tuple[int, ...]:
    if config.get("moe_layer_freq", 1) != 1:
        raise ModelError("moe_layer_freq other than 1 is not supported", hint="transformers does not support it")
    first = config.get("first_k_dense_replace")
    return tuple(range(usual if first is None else first, layers))


# A new family is a line here, its keys in config_keys.py, its tensors in tensors.py, and a configuration in
# tests/support/families.py.
FAMILIES: Mapping[str, MoeLayers] = {
    "mixtral": _every_layer,
    "qwen2_moe": _every_nth_layer,
    "qwen3_moe": _every_nth_layer,
    "olmoe": _every_layer,
    "deepseek_v2": partial(_after_dense_layers, usual=0),
    "deepseek_v3": partial(_after_dense_layers, usual=3),
    "glm4_moe": partial(_after_dense_layers, usual=1),
    "granitemoe": _every_layer,
}

# Models with experts in which some layers are state-space models or linear attention.
HYBRIDS = ("jamba", "granitemoehybrid", "qwen3_next", "qwen3_5_moe", "nemotron_h", "lfm2_moe", "bailing_moe_v2_5")


@dataclass(frozen=True)
class ModelInfo:
    """The shape of a servable checkpoint. `moe_layer_ids[i]` is the decoder layer that holds MoE layer i."""

    path: str
    family: str
    dtype: str  # of the stored weights
    hidden: int
    layers: int
    moe_layer_ids: tuple[int, ...]
    experts: int
    top_k: int
    expert_width: int  # of the inner layer of one expert; 0: config.json does not say
    vocab_size: int
    max_position: int
    eos_token_ids: tuple[int, ...]
    files: tuple[str, ...]

    @property
    def moe_layers(self) -> int:
        """How many layers have experts."""
        return len(self.moe_layer_ids)

    def expert_bytes(self, dtype: str) -> int:
        """Weights of one expert in one layer, as `dtype` (auto: as stored)."""
        stored = self.dtype if dtype == "auto" else dtype
        return 3 * self.hidden * self.expert_width * (4 if stored == "float32" else 2)


def read_model_info(path: str | Path, *, weights: bool = True) -> ModelInfo:
    """Describe the checkpoint in directory `path`; ModelError says what is wrong with it and what to do.

    Without `weights`, its weight files may be missing or incomplete: then `files` is empty.
    """
    root = Path(path)
    if not root.is_dir():
        hint = "give the directory of a Hugging Face checkpoint; `elastic demo-model DIR` writes a small one"
        raise ModelError(f"no such model directory: {root}", hint=hint)
    config = read_config(root)
    family = _family(config)
    _check_keys(root, family, config)
    layers = _count(config, "num_hidden_layers")
    if layers > MAX_LAYERS:
        said = f"{root / 'config.json'}: num_hidden_layers is {layers}, more than {MAX_LAYERS}"
        raise ModelError(said, hint=DAMAGED_HINT)
    moe_layer_ids = FAMILIES[family](config, layers)
    if not moe_layer_ids:
        raise ModelError(f"{root}: no layer of this {family} model has experts", hint="only MoE models can be served")
    files, dtype = _check_weights(root) if weights else _weights_if_whole(root, config)
    whole = complete(family, config)
    return ModelInfo(
        path=str(root.resolve()),
        family=family,
        dtype=dtype,
        hidden=_count(config, "hidden_size"),
        layers=layers,
        moe_layer_ids=moe_layer_ids,
        experts=_count(config, *EXPERT_COUNT_KEYS),
        top_k=_count(config, "num_experts_per_tok"),
        expert_width=next((int(whole[key]) for key in EXPERT_WIDTH_KEYS if whole.get(key)), 0),
        vocab_size=_count(config, "vocab_size"),
        max_position=min(_count(config, "max_position_embeddings"), longest_as_trained(config) or MAX_POSITIONS),
        eos_token_ids=_eos(root, config),
        files=files,
    )


def read_config(root: Path) -> dict[str, Any]:
    """What config.json says. ModelError if it cannot be read."""
    return read_json(root / "config.json", hint="a checkpoint directory has config.json beside its weights")


def _check_keys(root: Path, family: str, config: dict[str, Any]) -> None:
    """ModelError that names what of config.json we would not compute as transformers does."""
    for name in REQUIRED:
        _count(config, name)
    _count(config, *EXPERT_COUNT_KEYS)
    found = list(refusals(family, config))
    if found:
        hint = "serve another checkpoint; a key that means nothing to the model can be removed from config.json"
        raise ModelError(f"{root / 'config.json'}: {listed(found)}", hint=hint)


def listed(found: list[str]) -> str:
    """The first of them, and how many more there are."""
    more = f"; and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    return "; ".join(found[:MOST_NAMED]) + more


def _family(config: dict[str, Any]) -> str:
    family = str(config.get("model_type", ""))
    if family in FAMILIES:
        if config.get("quantization_config"):
            raise ModelError("the checkpoint is quantized", hint="use the bfloat16 or float32 checkpoint")
        return family
    if family in HYBRIDS:
        hint = f"its requests could not move between ranks; supported: {', '.join(FAMILIES)}"
        raise ModelError(
            f"{family} has layers with a state of their own instead of attention: not supported", hint=hint
        )
    if any(key in config for key in EXPERT_COUNT_KEYS):
        raise ModelError(f"model type {family!r} is not supported", hint=f"supported: {', '.join(FAMILIES)}")
    raise ModelError(
        f"{family or 'this'} is a dense model, without experts",
        hint=f"serve an MoE model; supported: {', '.join(FAMILIES)}",
    )


def _eos(root: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """The generation config's end tokens, else the model config's, else the tokenizer's."""
    path = root / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    found = generation.get("eos_token_id")
    if found is None:
        found = config.get("eos_token_id")
    if found is None:
        return end_token_of_tokenizer(root)
    ids = found if isinstance(found, list) else [found]
    if any(not isinstance(each, int) or isinstance(each, bool) or each < 0 for each in ids):
        name = path.name if generation.get("eos_token_id") is not None else "config.json"
        raise ModelError(
            f"eos_token_id in {name} is {found!r}", hint="it must be the number of a token, or a list of them"
        )
    return tuple(ids)


def _count(config: dict[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise ModelError(f"config.json has no positive {' or '.join(names)}", hint="is the checkpoint complete?")


def weight_files(root: Path) -> dict[str, str]:
    """Tensor name -> file name, for every weight of the checkpoint, from the headers alone."""
    if (root / INDEX_FILE).exists():
        index = read_json(root / INDEX_FILE)
        found = index.get("weight_map")
        if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
            raise ModelError(f"{root / INDEX_FILE} has no weight_map", hint="download the file again")
        return found
    if (root / SINGLE_FILE).exists():
        return dict.fromkeys(read_header(root / SINGLE_FILE), SINGLE_FILE)
    other = sorted(p.name for p in root.glob("*.bin")) + sorted(p.name for p in root.glob("*.gguf"))
    hint = f"convert {other[0]} to safetensors" if other else f"expected {SINGLE_FILE} or {INDEX_FILE}"
    raise ModelError(f"no safetensors weights in {root}", hint=hint)


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Names, types and places of a safetensors file's tensors, after checking that the file is whole."""
    hint = "the file is damaged or was not downloaded completely"
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ModelError(f"{path} is not a whole safetensors file", hint=hint)
        try:
            header: dict[str, dict[str, Any]] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ModelError(f"{path} has a broken header: {error}", hint=hint) from error
    if 8 + length + end != size:
        raise ModelError(f"{path} is truncated: {size} bytes instead of {8 + length + end}", hint=hint)
    return header


def _weights_if_whole(root: Path, config: dict[str, Any]) -> tuple[tuple[str, ...], str]:
    try:
        return _check_weights(root)
    except (ModelError, OSError):
        stored = str(config.get("dtype") or config.get("torch_dtype"))
        return (), stored if stored in DTYPES.values() else DTYPES["F32"]


def _check_weights(root: Path) -> tuple[tuple[str, ...], str]:
    """Every file that the index names is there, whole, holds what it should, and in a type we can compute with."""
    names = weight_files(root)
    missing = sorted({file for file in names.values() if not (root / file).is_file()})
    if missing:
        raise ModelError(f"{INDEX_FILE} names shards that are missing: {', '.join(missing)}", hint="download them")
    seen: dict[str, int] = {}
    files = sorted(set(names.values()))
    for file in files:
        header = read_header(root / file)
        absent = [name for name, where in names.items() if where == file and name not in header]
        if absent:
            raise ModelError(
                f"{root / file} lacks {absent[0]}, which the index says it holds", hint="download it again"
            )
        for name, tensor in header.items():
            dtype = str(tensor.get("dtype"))
            if dtype not in DTYPES and name.endswith(("weight", "bias", "proj")):
                raise ModelError(
                    f"{root / file}: {name} is of type {dtype}", hint="weights must be float32, bfloat16 or float16"
                )
            seen[dtype] = seen.get(dtype, 0) + 1
    counts = {dtype: count for dtype, count in seen.items() if dtype in DTYPES}
    if not counts:
        raise ModelError(f"{root} holds no floating-point weights", hint="is the checkpoint complete?")
    return tuple(files), DTYPES[max(counts, key=lambda dtype: counts[dtype])]
