"""Grammars: whatever is drawn from what they allow has the form, and what they allow follows from the tokens alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from llguidance import LLMatcher
from msgspec.structs import replace

from elastic.gateway.tokenizer import Tokenizer
from membership.base.errors import ModelError, RequestError
from tests.support import ROOT
from workers.model.content import file_digest
from workers.model.grammar import KEPT, TOKENIZER_FILE, Grammars, matcher_of
from workers.model.sampler import Drawn, logprobs_of, sample
from workers.protocol.messages import NO_TOKEN, History, Sampling, Shaping

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


def test_a_rank_that_is_new_to_a_request_follows_no_long_text_to_its_end() -> None:
    """After a first choice, which the gateway lets pass: it took more than a minute, in a step of all requests."""
    follow = """
import numpy
from llguidance import LLMatcher
from tests.unit.workers.model.test_grammar import SIZE, grammars
grammar = LLMatcher.grammar_from_regex("[ab]((a{1000}){1000}){1000}")
first = numpy.flatnonzero(grammars().allowed(grammar, numpy.array([], numpy.uint32), SIZE))[-1:].astype(numpy.uint32)
assert grammars().allowed(grammar, first, SIZE).any()
"""
    subprocess.run([sys.executable, "-c", follow], cwd=ROOT, timeout=60, check=True)


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
    with pytest.raises(RequestError, match="does not follow its grammar"):
        grammars().allowed(grammar, np.array([7, 7, 7], np.uint32), SIZE)


def test_another_tokenizer_than_the_clusters_is_refused(tmp_path: Path) -> None:
    grammar, _ = FORMS["json"]
    (tmp_path / TOKENIZER_FILE).write_bytes((MODEL / TOKENIZER_FILE).read_bytes() + b"\n")
    ours = Grammars(tmp_path / TOKENIZER_FILE, [END], file_digest(MODEL / TOKENIZER_FILE))
    ours.read()
    with pytest.raises(ModelError, match=r"tokenizer\.json .* changed since the cluster loaded"):
        ours.allowed(grammar, np.array([], np.uint32), SIZE)


WITH_ALL = Shaping(
    repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2, bias=[(9, 5.0), (11, -100.0)], min_tokens=400,
    end_tokens=[END],
)  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("beside", [Shaping(), WITH_ALL], ids=["alone", "with all else"])
def test_the_sampler_chooses_among_what_is_allowed(temperature: float, beside: Shaping) -> None:
    """The end comes where the grammar's only is; log probabilities are the model's own."""
    grammar, check = FORMS["json"]
    asked = Sampling(temperature=temperature, seed=4, logprobs=1, shaping=replace(beside, grammar=grammar))
    logits = torch.randn(400, SIZE, generator=torch.Generator().manual_seed(2))
    written: list[int] = []
    ours = grammars()
    while not written or written[-1] != END:
        history = History(np.array([5, *written], np.uint32).tobytes(), 1)
        at = len(written)
        [drawn] = sample(logits[at : at + 1], [asked], [at + 1], [history], ours)
        assert [drawn.logprobs] == list(logprobs_of(logits[at : at + 1].double().numpy(), [drawn.token], [1]))
        assert [drawn] == sample(logits[at : at + 1], [asked], [at + 1], [history], grammars()), (
            "a rank that is new to it"
        )
        written.append(drawn.token)
    check(Tokenizer(MODEL).decode(written[:-1]))


def test_a_grammar_that_the_tokens_left_concerns_its_request_alone() -> None:
    grammar, _ = FORMS["json"]
    logits = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(2))
    lost = History(np.array([5, 7, 7], np.uint32).tobytes(), 1)
    ours = grammars()
    for _ in range(2):
        first, second = sample(
            logits, [Sampling(shaping=Shaping(grammar=grammar)), Sampling()], [3, 3], [lost, None], ours
        )
        assert (first.token, "does not follow its grammar" in first.error) == (NO_TOKEN, True)
        assert second == Drawn(int(logits[1].argmax()))


def test_a_grammar_is_compiled_once_for_all_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    grammar, _ = FORMS["regex"]
    ours, compiled = grammars(), []
    monkeypatch.setattr("workers.model.grammar.matcher_of", lambda *args: compiled.append(args) or matcher_of(*args))
    for seed in range(4):
        walk(grammar, seed, lambda written: ours.allowed(grammar, written, SIZE))
    assert len(compiled) == 1
