"""Penalties, biases and barred tokens: against transformers' processors, and what vLLM documents beyond them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as theirs

from membership.base.errors import RequestError
from workers.model.sampler import choose, sample
from workers.model.shaping import shape
from workers.protocol.messages import NO_TOKEN, History, Sampling, Shaping

pytestmark = pytest.mark.unit

VOCABULARY = 40
tokens = st.integers(0, VOCABULARY - 1)
histories = st.tuples(st.lists(tokens, min_size=1, max_size=30), st.lists(tokens, max_size=30))


def logits_of(seed: int) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def ours(seed: int, prompt: list[int], output: list[int], **settings: Any) -> np.ndarray:
    known = np.array([*prompt, *output], np.uint32)
    return shape(logits_of(seed).numpy(), Shaping(**settings), known, len(prompt))


def processed(seed: int, history: list[int], *processors: LogitsProcessor) -> np.ndarray:
    ids = torch.tensor([history], dtype=torch.long)
    return LogitsProcessorList(processors)(ids, logits_of(seed)[None])[0].numpy()


@given(histories, st.floats(0.1, 4), st.integers(0, 999))
def test_repetition_penalty(history: tuple[list[int], list[int]], penalty: float, seed: int) -> None:
    wanted = processed(seed, history[0] + history[1], theirs.RepetitionPenaltyLogitsProcessor(penalty))
    np.testing.assert_allclose(ours(seed, *history, repetition_penalty=penalty), wanted, rtol=1e-12)


@given(histories, st.dictionaries(tokens, st.floats(-100, 100), min_size=1), st.integers(0, 999))
def test_bias(history: tuple[list[int], list[int]], bias: dict[int, float], seed: int) -> None:
    sequences = {(token,): value for token, value in bias.items()}
    wanted = processed(seed, history[0] + history[1], theirs.SequenceBiasLogitsProcessor(sequences))
    np.testing.assert_allclose(ours(seed, *history, bias=list(bias.items())), wanted, rtol=1e-5, atol=1e-4)


@given(histories, st.integers(0, 40), st.lists(tokens, min_size=1, max_size=3), st.integers(0, 999))
def test_min_tokens(history: tuple[list[int], list[int]], least: int, ends: list[int], seed: int) -> None:
    processor = theirs.MinNewTokensLengthLogitsProcessor(len(history[0]), least, ends, device="cpu")
    wanted = processed(seed, history[0] + history[1], processor)
    assert np.array_equal(ours(seed, *history, min_tokens=least, end_tokens=ends), wanted)


@given(
    st.lists(st.integers(0, 3), max_size=8),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=4),
    st.integers(0, 999),
)
def test_bad_words(output: list[int], words: list[list[int]], seed: int) -> None:
    """Theirs look into the prompt, too; ours, like vLLM's, at the output: so the prompt is of other tokens."""
    wanted = processed(seed, [9, *output], theirs.NoBadWordsLogitsProcessor(words))
    assert np.array_equal(ours(seed, [9], output, bad_words=words), wanted)
    assert np.isfinite(ours(seed, [0, 1], [], bad_words=[[0, 1, 2]])).all(), "the prompt's words are not the output's"


@given(st.sets(tokens, min_size=1), st.integers(0, 999))
def test_allowed_tokens(allowed: set[int], seed: int) -> None:
    barred = sorted(set(range(VOCABULARY)) - allowed)
    wanted = processed(seed, [1], theirs.SuppressTokensLogitsProcessor(barred, device="cpu"))
    assert np.array_equal(ours(seed, [1], [], allowed=np.array(sorted(allowed), np.uint32).tobytes()), wanted)


@given(histories, st.floats(-2, 2), st.floats(-2, 2), st.integers(0, 999))
def test_frequency_and_presence(
    history: tuple[list[int], list[int]], frequency: float, presence: float, seed: int
) -> None:
    """OpenAI's formula: mu[j] - c[j] * frequency - (c[j] > 0) * presence, where c counts the output."""
    counts = np.bincount(history[1], minlength=VOCABULARY)
    wanted = logits_of(seed).numpy() - counts * frequency - (counts > 0) * presence
    found = ours(seed, *history, frequency_penalty=frequency, presence_penalty=presence)
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)


def test_the_order_is_vllms() -> None:
    """A bias first, then repetition, then frequency and presence: logits 2 + 2, halved, minus 0.5 and 0.25."""
    row = np.array([2.0, 0.0])
    shaping = Shaping(bias=[(0, 2.0)], repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    assert shape(row, shaping, np.array([0, 0], np.uint32), 1).tolist() == [1.25, 0.0]
    assert row.tolist() == [2.0, 0.0], "the model's own logits stay for log probabilities"


def test_what_leaves_no_token_is_an_error() -> None:
    only = np.array([3], np.uint32).tobytes()
    with pytest.raises(RequestError, match="no token may follow"):
        ours(1, [1], [], allowed=only, bad_words=[[3]])


def test_a_request_that_leaves_no_token_costs_the_others_nothing() -> None:
    rows = torch.stack([logits_of(1), logits_of(2)])
    stuck = Sampling(shaping=Shaping(allowed=np.array([3], np.uint32).tobytes(), bad_words=[[3]]))
    first, second = sample(rows, [stuck, Sampling()], [7, 7])
    assert first.token == NO_TOKEN
    assert "no token may follow" in first.error
    assert second == sample(rows[1:], [Sampling()], [7])[0]


@given(st.floats(0, 1), st.integers(0, 45), st.floats(0.05, 1), st.integers(0, 99))
def test_min_p_top_k_top_p_keep_what_transformers_keeps(min_p: float, top_k: int, top_p: float, seed: int) -> None:
    """Its warpers in vLLM's order: every draw is among what they leave, and each of it can be drawn."""
    scores = logits_of(seed)[None]
    warpers: list[LogitsProcessor] = [theirs.MinPLogitsWarper(min_p)]
    warpers += [theirs.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [theirs.TopPLogitsWarper(top_p)]
    left = LogitsProcessorList(warpers)(torch.tensor([[0]]), scores)[0].isfinite().nonzero()[:, 0].tolist()
    sampling = Sampling(temperature=1.0, min_p=min_p, top_k=top_k, top_p=top_p, seed=seed)
    drawn = {choose(scores[0].numpy(), sampling, position) for position in range(60)}
    assert drawn <= set(left)
    assert len(left) > 1 or drawn == set(left)


@given(histories, st.integers(0, 999), st.sampled_from([0.0, 0.8]), st.integers(1, 5))
def test_rows_do_not_depend_on_each_other(
    history: tuple[list[int], list[int]], seed: int, temperature: float, company: int
) -> None:
    """The same token alone and among others, whatever these ask for; log probabilities are the model's own."""
    shaping = Shaping(repetition_penalty=1.3, frequency_penalty=0.5, bias=[(3, 1.5)], bad_words=[[1, 2]])
    asked = Sampling(temperature=temperature, seed=seed, logprobs=0, shaping=shaping)
    own = History(np.array([*history[0], *history[1]], np.uint32).tobytes(), len(history[0]))
    rows = torch.stack([logits_of(seed + n) for n in range(company + 1)])
    settings = [asked, *[Sampling(temperature=0.5, seed=n) for n in range(company)]]
    together = sample(rows, settings, [7] * (company + 1), [own, *[History()] * company])
    [(token, logs, _)] = sample(rows[:1], [asked], [7], [own])
    assert together[0] == (token, logs, "")
    assert logs is not None
    assert logs.logprob == pytest.approx(float(rows[0].log_softmax(-1)[token]))
