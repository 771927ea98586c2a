"""Grammars: whatever is drawn from what they allow has the form, and what they allow follows from the tokens alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher

from elastic.gateway.tokenizer import Tokenizer
from membership.base.errors import ModelError
from tests.support import ROOT
from workers.model.content import file_digest
from workers.model.grammar import KEPT, TOKENIZER_FILE, Grammars
from workers.model.sampler import sample
from workers.protocol.messages import History, Sampling, Shaping

pytestmark = pytest.mark.unit

MODEL = ROOT / "elastic" / "demo" / "checkpoint"
SIZE, END = 1024, 1
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "kind": {"enum": ["for", "while"]}, "on": {"type": "boolean"}},
    "required": ["n", "kind", "on"],
    "additionalProperties": False,
}
FORMS: dict[str, tuple[str, Callable[[str], object]]] = {
    "json": (
        LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_pattern": "[ ]{0,2}"}),
        lambda text: jsonschema.validate(json.loads(text), SCHEMA),
    ),
    "regex": (
        LLMatcher.grammar_from_regex("[a-z]{3,9} = [0-9]{1,4};"),
        lambda text: re.fullmatch("[a-z]{3,9} = [0-9]{1,4};", text) or pytest.fail(text),
    ),
}


def grammars() -> Grammars:
    return Grammars(MODEL / TOKENIZER_FILE, [END])


def walk(grammar: str, seed: int, masks: Callable[[np.ndarray], np.ndarray]) -> list[int]:
    """Tokens drawn at random among those that are allowed, up to the end token."""
    random, written = np.random.default_rng(seed), []
    for _ in range(400):
        token = int(random.choice(np.flatnonzero(masks(np.array(written, np.uint32)))))
        if token == END:
            return written
        written.append(token)
    raise AssertionError(f"no end after {written}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(5))
def test_what_is_drawn_has_the_form(form: str, seed: int) -> None:
    """And a rank that is new to the request allows the same at every position, as one does that runs a step again."""
    grammar, check = FORMS[form]
    ours = grammars()

    def masks(written: np.ndarray) -> np.ndarray:
        mask = ours.allowed(grammar, written, SIZE)
        assert np.array_equal(ours.allowed(grammar, written, SIZE), mask)
        if written.size % 7 == 0:
            assert np.array_equal(grammars().allowed(grammar, written, SIZE), mask)
        return mask

    check(Tokenizer(MODEL).decode(walk(grammar, seed, masks)))


def test_requests_do_not_disturb_each_other() -> None:
    """More of them than states are kept, of the same grammar, one token of each in turn."""
    grammar, _ = FORMS["regex"]
    ours, tokens = grammars(), walk(grammar, 3, lambda written: grammars().allowed(grammar, written, SIZE))
    alone = [grammars().allowed(grammar, np.array(tokens[:n], np.uint32), SIZE) for n in range(len(tokens) + 1)]
    others = [walk(grammar, 10 + n, lambda written: ours.allowed(grammar, written, SIZE)) for n in range(3)]
    for n in range(len(tokens) + 1):
        assert np.array_equal(ours.allowed(grammar, np.array(tokens[:n], np.uint32), SIZE), alone[n])
        for other in others:
            ours.allowed(grammar, np.array(other[:n], np.uint32), SIZE)
    assert len(ours._states) <= KEPT


def test_tokens_that_do_not_follow_are_an_error() -> None:
    grammar, _ = FORMS["json"]
    with pytest.raises(ModelError, match="does not follow its grammar"):
        grammars().allowed(grammar, np.array([7, 7, 7], np.uint32), SIZE)


def test_another_tokenizer_than_the_clusters_is_refused(tmp_path: Path) -> None:
    grammar, _ = FORMS["json"]
    (tmp_path / TOKENIZER_FILE).write_bytes((MODEL / TOKENIZER_FILE).read_bytes() + b"\n")
    ours = Grammars(tmp_path / TOKENIZER_FILE, [END])
    ours.digest = file_digest(MODEL / TOKENIZER_FILE)
    with pytest.raises(ModelError, match=r"tokenizer\.json .* changed since the cluster loaded"):
        ours.allowed(grammar, np.array([], np.uint32), SIZE)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_sampler_chooses_among_what_is_allowed(temperature: float) -> None:
    import torch

    grammar, check = FORMS["json"]
    asked = Sampling(temperature=temperature, seed=4, shaping=Shaping(grammar=grammar, repetition_penalty=1.3))
    logits = torch.randn(400, SIZE, generator=torch.Generator().manual_seed(2))
    written: list[int] = []
    while not written or written[-1] != END:
        history = History(np.array([5, *written], np.uint32).tobytes(), 1)
        at = len(written)
        [(token, _)] = sample(logits[at : at + 1], [asked], [at + 1], [history], grammars())
        written.append(token)
    check(Tokenizer(MODEL).decode(written[:-1]))
