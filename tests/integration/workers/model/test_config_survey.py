"""Every key of config.json, of every family: transformers' logits, or no effect in both, or refused by name."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from membership.base.enums import Dtype, Exactness
from membership.base.errors import ModelError
from tests.support.config_values import INERT, Case, computed, longrope, refused, untried
from tests.support.families import VOCAB, tiny_config, write_checkpoint
from tests.support.model_helpers import Sequences, make_runner
from workers.model.config_keys import ACTIVATIONS, CLASSES, DEFAULTS, KEYS, Effect
from workers.model.families import FAMILIES, read_model_info
from workers.model.rope_keys import TYPES
from workers.model.tensors import check_tensors

pytestmark = pytest.mark.integration

MOST = 1e-5  # difference of logits, in float32
PROMPT = random.Random(5).choices(range(2, VOCAB), k=70)
IN_ROPE = {"rope_scaling", "rope_theta", "partial_rotary_factor"}
FAMILY_CASES = [(family, case) for family in FAMILIES for case in computed(family)]

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """A checkpoint of a family with changes, whose config.json says literally what `raw` says."""
    written: dict[str, Path] = {}

    def make(family: str, changes: dict[str, Any], raw: dict[str, Any] | None = None) -> Path:
        key = json.dumps([family, changes])
        if key not in written:  # from a copy of the changes: transformers writes into what it is given
            path = tmp_path_factory.mktemp(family)
            written[key] = write_checkpoint(path, family, **json.loads(key)[1])
        if raw is None:
            return written[key]
        config = json.loads((written[key] / "config.json").read_text())
        if raw.keys() & IN_ROPE:
            del config["rope_parameters"]
        path = tmp_path_factory.mktemp(family)
        (path / "config.json").write_text(json.dumps({**config, **raw}))
        shutil.copy(written[key] / "model.safetensors", path)
        return path

    return make


@pytest.fixture(scope="module")
def without(write: Write) -> Callable[[str, Case], Any]:
    """transformers' logits without a case's key: cases of a family have few bases."""
    logits: dict[Path, Any] = {}

    def find(family: str, case: Case) -> Any:
        path = write(family, case.base)
        if path not in logits:
            logits[path] = theirs(path)
        return logits[path]

    return find


def theirs(path: Path) -> Any:
    """What transformers makes of the prompt: the last token's logits."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0, -1]


def ours(path: Path) -> Any:
    """What we make of it, cut in pieces, after the checks that `elastic serve` does."""
    check_tensors(read_model_info(path))
    runner = make_runner(path, Dtype.FLOAT32, exactness=Exactness.STOCK)
    try:
        sequences = Sequences(runner, random.Random(1))
        sequences.add(0, PROMPT)
        while (chunk := sequences.chunk(0, 30)).sample is None:
            sequences.step([chunk])
        return runner.logits([chunk], [0])[0]
    finally:
        runner.close()


def apart(one: Any, other: Any) -> float:
    """The largest difference; infinite for other vocabularies."""
    return float((one - other).abs().max()) if one.shape == other.shape else float("inf")


@pytest.mark.parametrize(("family", "case"), FAMILY_CASES, ids=str)
def test_a_key_that_is_computed(family: str, case: Case, write: Write, without: Callable[[str, Case], Any]) -> None:
    path = write(family, case.changes, {case.key: case.changes[case.key]})
    expected = theirs(path)
    assert apart(ours(path), expected) <= MOST
    assert apart(expected, without(family, case)) > 100 * MOST, "the value tried changes nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_without_effect(family: str, write: Write) -> None:
    inert = {key: INERT[key] for key, entry in KEYS[family].items() if entry.effect is Effect.INERT}
    expected = theirs(write(family, {}))
    assert apart(ours(write(family, {}, inert)), expected) <= MOST
    del inert["return_dict"]  # transformers' own models cannot do without
    assert apart(theirs(write(family, {}, inert)), expected) <= MOST
    assert all(KEYS[family][key].why for key in inert)


@pytest.mark.parametrize(
    ("family", "parameters"),
    [
        *((family, {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}) for family in FAMILIES),
        *((family, longrope(family, long_factor=None)) for family in FAMILIES),
    ],
    ids=str,
)
def test_rotary_parameters_for_longer_sequences_only(family: str, parameters: dict[str, Any], write: Write) -> None:
    """The table of positions must not be computed for the longest sequence that can be."""
    if parameters["rope_type"] == "longrope":
        parameters = {**parameters, "long_factor": [9.0] * len(parameters["short_factor"])}
    path = write(family, {"rope_parameters": parameters})
    assert apart(ours(path), theirs(path)) <= MOST
    assert read_model_info(path).max_position == (128 if parameters["rope_type"] == "longrope" else 512)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_output_layer_of_its_own_beside_tied_embeddings(family: str, write: Write) -> None:
    """transformers does not tie what is stored twice with different values, whatever config.json says."""
    path = write(family, {}, {"tie_word_embeddings": True})
    assert apart(ours(path), theirs(path)) <= MOST
    assert apart(ours(path), ours(write(family, {}))) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_layer_alone_is_enough_for_tied_embeddings(family: str, write: Write) -> None:
    from safetensors.torch import load_file, save_file

    path = write(family, {}, {"tie_word_embeddings": True})
    state = load_file(path / "model.safetensors")
    del state["model.embed_tokens.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    assert apart(ours(path), theirs(path)) <= MOST


@pytest.mark.parametrize(("family", "key", "value"), [(f, *each) for f in FAMILIES for each in refused(f)], ids=str)
def test_a_value_that_is_refused(family: str, key: str, value: Any, write: Write) -> None:
    with pytest.raises(ModelError, match=rf"config\.json.*{key}") as caught:
        read_model_info(write(family, {}, {key: value}))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"rope_type": "axial"}, "rope_type = 'axial'"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_type": "default", "mrope_section": [2, 3, 3]}, "mrope_section"),
        ({"rope_type": "linear"}, "without factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor = '2'"),
        ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}, "original_max_position"),
        ({"rope_type": "yarn", "factor": None}, "factor = None"),
        ({"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}, "mscale and mscale_all_dim"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 8}, "short_factor"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
        ({"rope_theta": None}, "rope_theta = None"),
    ],
    ids=str,
)
def test_rotary_parameters_that_are_refused(parameters: dict[str, Any], says: str, write: Write) -> None:
    with pytest.raises(ModelError, match=says):
        read_model_info(write("mixtral", {}, {"rope_parameters": parameters}))


def test_yarn_needs_the_width_of_heads(write: Write) -> None:
    """Without it transformers fails, in the middle of loading."""
    yarn = {"rope_type": "yarn", "factor": 2.0}
    with pytest.raises(ModelError, match="without head_dim"):
        read_model_info(write("mixtral", {}, {"rope_parameters": yarn, "head_dim": None}))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_knows_every_key_of_transformers(family: str) -> None:
    """A key that a new version adds fails here until it is in the table and has a case."""
    config = tiny_config(family)
    kind, keys = type(config), KEYS[family]
    own = {each.name: each.default for each in fields(kind)}
    saved = json.loads(config.to_json_string(use_diff=False))
    assert not {name for name in own.keys() | kind.attribute_map.keys() | saved.keys() if name[0] != "_"} - keys.keys()
    assert not untried(family)
    for name, value in DEFAULTS[family].items():
        assert own[name] == value, name
    for name in own.keys() & {"num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "qkv_bias"}:
        assert own[name] == DEFAULTS[family].get(name, own[name] or None) or not own[name], name


def test_the_lists_are_those_of_transformers() -> None:
    from transformers import GenerationConfig
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert set(GenerationConfig._get_default_generation_params()) <= KEYS["mixtral"].keys()
    assert set(ACTIVATIONS) <= set(ACT2FN.keys())
    assert set(TYPES) <= {"default", *ROPE_INIT_FUNCTIONS}
    assert {family: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family] for family in FAMILIES} == CLASSES
    assert KEYS.keys() == FAMILIES.keys() == DEFAULTS.keys()
