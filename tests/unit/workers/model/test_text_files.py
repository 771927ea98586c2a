"""What a checkpoint's files say about text, against what transformers reads in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.models.mixtral import MixtralConfig

from elastic.demo.model import write_demo_model
from membership.base.errors import ModelError
from tests.support.wild_tokenizers import WILD, write_wild_tokenizer
from workers.model.families import _eos, read_model_info
from workers.model.text_files import SamplingDefaults, end_token_of_tokenizer, not_applied, sampling_defaults

pytestmark = pytest.mark.unit


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("name", WILD)
def test_an_answer_ends_with_the_tokenizers_end_where_no_configuration_names_one(tmp_path: Path, name: str) -> None:
    directory = write_wild_tokenizer(tmp_path, name)
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    wanted = () if theirs.eos_token_id is None or name == "late_tokens" else (theirs.eos_token_id,)
    assert end_token_of_tokenizer(directory) == _eos(directory, {}) == wanted
    write(directory / "generation_config.json", {"temperature": 0.5, "eos_token_id": None})
    assert _eos(directory, {"eos_token_id": None}) == wanted


@pytest.mark.parametrize(
    ("generation", "config"),
    [
        ({"eos_token_id": 3}, {"eos_token_id": 4}),
        ({"eos_token_id": [3, 5]}, {"eos_token_id": 4}),
        ({"eos_token_id": 0}, {"eos_token_id": 4}),
        (None, {"eos_token_id": 4}),
        (None, {"eos_token_id": [0, 4]}),
    ],
)
def test_a_configuration_comes_before_the_tokenizer(tmp_path: Path, generation: Any, config: Any) -> None:
    write_wild_tokenizer(tmp_path, "llama2")
    if generation is None:
        theirs = GenerationConfig.from_model_config(MixtralConfig(**config))
    else:
        write(tmp_path / "generation_config.json", generation)
        theirs = GenerationConfig.from_pretrained(tmp_path)
    wanted = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
    assert _eos(tmp_path, config) == tuple(wanted)


@pytest.mark.parametrize(
    "said",
    [
        {}, {"temperature": 0.6}, {"temperature": 0.7, "top_p": 0.8, "top_k": 20}, {"top_k": 0, "top_p": 1.0},
        {"do_sample": True, "temperature": 1}, {"temperature": 0.0}, {"top_p": 0.95, "eos_token_id": [1, 2]},
        {"repetition_penalty": 1.05, "min_p": 0.1},
    ],
)  # fmt: skip
def test_defaults_of_sampling_are_those_that_transformers_reads(tmp_path: Path, said: Any) -> None:
    write(tmp_path / "generation_config.json", {"do_sample": True, **said})
    theirs, ours = GenerationConfig.from_pretrained(tmp_path), sampling_defaults(tmp_path)
    for name, otherwise in (
        ("temperature", 1.0),
        ("top_p", 1.0),
        ("top_k", 0),
        ("min_p", 0.0),
        ("repetition_penalty", 1.0),
    ):
        wanted = getattr(theirs, name) if name in said else otherwise
        assert getattr(ours, name) == wanted, name


def test_without_a_file_sampling_is_as_openai_has_it(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == SamplingDefaults(1.0, 1.0, 0)


@pytest.mark.parametrize(
    "said",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"top_k": "x"},
        {"min_p": 1.5},
        {"repetition_penalty": 0},
        {"temperature": True},
        {"temperature": float("inf")},
        [],
    ],
)
def test_impossible_defaults_are_told_with_their_file(tmp_path: Path, said: Any) -> None:
    write(tmp_path / "generation_config.json", said)
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        sampling_defaults(tmp_path)


def test_what_answers_will_not_follow_is_named(tmp_path: Path) -> None:
    assert not_applied(tmp_path) == []
    quiet = {"repetition_penalty": 1, "min_p": None, "no_repeat_ngram_size": 0, "top_k": 20, "eos_token_id": 1}
    write(tmp_path / "generation_config.json", quiet)
    assert not_applied(tmp_path) == []
    write(tmp_path / "generation_config.json", quiet | {"typical_p": 0.9, "suppress_tokens": [1]})
    assert not_applied(tmp_path) == ["typical_p=0.9", "suppress_tokens=[1]"]


def test_a_served_checkpoint_ends_with_its_tokenizers_end(tmp_path: Path) -> None:
    """The demo's, with the end taken out of both configurations."""
    write_demo_model(tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "model" / name
        said = json.loads(path.read_text(encoding="utf-8"))
        assert said.pop("eos_token_id") == 1
        write(path, said)
    assert read_model_info(tmp_path / "model").eos_token_ids == (1,)
