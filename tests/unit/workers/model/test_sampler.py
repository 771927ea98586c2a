"""Choosing tokens: greedy, temperature, top-k, top-p, seeds, log probabilities; each row by itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st
from msgspec.structs import replace

from membership.base.errors import RequestError
from workers.model.sampler import (
    GREEDY_BELOW,
    LEAST_LOGPROB,
    NO_NUMBERS,
    choose,
    logprobs_of,
    sample,
    scores_of,
    uniform,
)
from workers.protocol.messages import NO_TOKEN, Sampling, Score, Shaping

pytestmark = pytest.mark.unit

settings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([0.05, 0.7, 1.0]),
    top_k=st.sampled_from([0, 1, 5]),
    seed=st.integers(0, 2**63),
    logprobs=st.sampled_from([-1, 0, 3]),
)


@given(st.lists(st.tuples(settings, st.integers(0, 5000)), min_size=1, max_size=8), st.integers(0, 2**31))
def test_rows_do_not_depend_on_each_other(rows: list[tuple[Sampling, int]], seed: int) -> None:
    logits = torch.randn(len(rows), 50, generator=torch.Generator().manual_seed(seed))
    together = sample(logits, [s for s, _ in rows], [p for _, p in rows])
    alone = [sample(logits[i : i + 1], [s], [p])[0] for i, (s, p) in enumerate(rows)]
    assert together == alone


def test_uniform_is_a_fixed_function() -> None:
    assert uniform(7, 3) == uniform(7, 3)
    assert uniform(0, 0) == pytest.approx(0.65244849, abs=1e-8)  # a change would change seeded outputs across versions
    draws = np.array([uniform(s, p) for s in range(100) for p in range(100)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01
    counts = np.histogram(draws, bins=10, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 30  # chi-square, 9 degrees of freedom, p < 0.0005


def test_frequencies_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    draws = [choose(logits, Sampling(temperature=1.0, seed=1), position) for position in range(4000)]
    assert np.allclose(np.bincount(draws, minlength=4) / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.03)


@pytest.mark.parametrize(
    ("limits", "allowed"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.79}, {0, 1}),
        ({"top_p": 0.81}, {0, 1, 2}),
    ],
)
def test_limits(limits: dict[str, float], allowed: set[int]) -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    sampling = Sampling(temperature=1.0, seed=3, **limits)  # type: ignore[arg-type]
    assert {choose(logits, sampling, p) for p in range(500)} == allowed


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-308, 1e-307, 1e-300, 1e-100, 1e-38, 1e-9])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    """Not the least likely token, nor a number that is none; nor one of equals by chance."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(5))
    logits[1] *= -1e4
    logits[2, [7, 9, 30]] = 40.0
    rows = [Sampling(temperature=temperature, seed=3, top_p=top_p, logprobs=0) for top_p in (1.0, 0.9, 5e-324)]
    for position in range(20):
        tokens = [token for token, _, _ in sample(logits, rows, [position] * 3)]
        assert tokens == [int(logits[0].argmax()), int(logits[1].argmax()), 7]


@given(st.floats(0, 2), st.floats(0, 1, exclude_min=True), st.integers(0, 60), st.integers(0, 99))
def test_no_setting_draws_what_it_leaves_out(temperature: float, top_p: float, top_k: int, position: int) -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(position))
    [(token, _, _)] = sample(logits, [Sampling(temperature=temperature, top_p=top_p, top_k=top_k)], [position])
    order = logits[0].argsort(descending=True, stable=True).tolist()
    assert token in order[: top_k or 50]
    if temperature < 1e-4:
        assert token == order[0]


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]], dtype=torch.bfloat16)
    assert [token for token, _, _ in sample(logits, [Sampling(), Sampling()], [0, 0])] == [1, 0]


def test_logprobs() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05])) + 4.0
    found, other = logprobs_of(np.stack([logits, logits[::-1]]), [2, 0], [2, 2])
    assert found.logprob == pytest.approx(math.log(0.15))
    assert [t for t, _ in found.top] == [0, 1]
    assert [p for _, p in found.top] == pytest.approx([math.log(0.5), math.log(0.3)])
    assert (found.rank, other.rank) == (3, 4)
    assert [t for t, _ in other.top] == [3, 2]
    [nothing, everything] = logprobs_of(np.stack([logits, logits]), [0, 0], [0, 99])
    assert (nothing.top, len(everything.top)) == ([], 4)


def written_out(logits: np.ndarray, sampling: Sampling, position: int) -> tuple[int, float, int]:
    """Token, its log probability and its place, as the sampler's definition has them: a row alone, sorted whole."""
    token = int(logits.argmax())
    if sampling.temperature >= GREEDY_BELOW:
        scaled = logits / sampling.temperature
        order = np.argsort(-scaled, kind="stable")[: sampling.top_k or None]
        weights = np.exp(scaled[order] - scaled[order[0]])
        sums = np.cumsum(weights[weights >= max(sampling.min_p, np.finfo(np.float64).tiny)])
        sums = sums[: int(np.searchsorted(sums, sampling.top_p * sums[-1])) + 1] if sampling.top_p < 1 else sums
        index = int(np.searchsorted(sums, uniform(sampling.seed, position) * sums[-1], side="right"))
        token = int(order[min(index, sums.size - 1)])
    logs = logits - logits.max()
    logs -= np.log(np.exp(logs).sum())
    return token, float(logs[token]), int(np.count_nonzero(logs >= logs[token]))


@given(
    st.lists(st.tuples(settings, st.sampled_from([0.0, 0.2]), st.integers(0, 5000)), min_size=1, max_size=40),
    st.sampled_from([7, 50, 1024, 20_000]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
@settings_of(max_examples=25, deadline=None)
def test_rows_that_are_computed_together_have_the_bits_of_the_definition(
    rows: list[tuple[Sampling, float, int]], vocabulary: int, kind: torch.dtype, seed: int
) -> None:
    """Also with many equal logits, which bfloat16 has."""
    rows = rows[:4] if vocabulary > 1024 else rows
    logits = (3 * torch.randn(len(rows), vocabulary, generator=torch.Generator().manual_seed(seed))).to(kind)
    asked = [replace(sampling, min_p=min_p, logprobs=0) for sampling, min_p, _ in rows]
    found = sample(logits, asked, [position for _, _, position in rows])
    for row, (sampling, drawn, (_, _, position)) in enumerate(zip(asked, found, rows, strict=True)):
        assert drawn.logprobs is not None
        seen = drawn.token, drawn.logprobs.logprob, drawn.logprobs.rank
        assert seen == written_out(logits[row].double().numpy(), sampling, position)


def test_a_seeded_stream_does_not_depend_on_its_company() -> None:
    """The same alone, among others in any row of the batch, and when its steps are run again."""
    logits = torch.randn(12, 40, generator=torch.Generator().manual_seed(3))
    requests = [Sampling(temperature=1.3, seed=11), *[Sampling(temperature=1.0, seed=n) for n in range(3)]]

    def stream(company: int, row: int) -> list[int]:
        """The first request's tokens at 12 positions, each step with `company` others, in row `row` of the batch."""
        tokens = []
        for position in range(12):
            order = [*range(1, company + 1)]
            order.insert(row, 0)
            rows = torch.stack([logits[(position + 5 * which) % 12] for which in order])
            drawn = sample(rows, [requests[which] for which in order], [position + 30 * which for which in order])
            tokens.append(drawn[row][0])
        return tokens

    alone = stream(0, 0)
    assert len(set(alone)) > 3
    assert stream(0, 0) == stream(3, 2) == alone


@pytest.mark.parametrize("wrong", [[math.nan] * 50, [*[1.0] * 49, math.nan], [*[1.0] * 49, math.inf], [-math.inf] * 50])
@pytest.mark.parametrize(
    "asked",
    [
        Sampling(), Sampling(logprobs=2), Sampling(temperature=0.7, seed=3),
        Sampling(temperature=1.0, top_p=0.5, top_k=4, shaping=Shaping(bias=[(4, 3.0)])),
    ],
)  # fmt: skip
def test_logits_that_are_no_numbers_are_an_error_of_their_request_alone(wrong: list[float], asked: Sampling) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(5))
    others = [Sampling(temperature=1.0, seed=1), asked, Sampling(logprobs=0)]
    right = sample(logits, others, [9] * 3)
    logits[1] = torch.tensor(wrong)
    found = sample(logits, others, [9] * 3)
    assert (found[0], found[2]) == (right[0], right[2])
    assert (found[1].token, found[1].error) == (NO_TOKEN, NO_NUMBERS)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_prompt_that_is_scored_has_numbers_or_an_error(wrong: float) -> None:
    """NaN is no JSON, and no log probability."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(5))
    logits[1, 7] = wrong
    with pytest.raises(RequestError, match=NO_NUMBERS):
        list(scores_of(logits, Score([1, 2, 3], 2)))


def test_what_cannot_come_has_a_log_probability_that_json_has() -> None:
    """The same number as vLLM's, among the likeliest tokens and of a prompt's."""
    logits = torch.tensor([[0.0, -math.inf, -math.inf]])
    best = [(0, 0.0), (1, LEAST_LOGPROB), (2, LEAST_LOGPROB)]
    (found,) = sample(logits, [Sampling(logprobs=3)], [0])
    assert found.logprobs is not None
    assert found.logprobs.top == best
    (scored,) = scores_of(logits, Score([1], 3))
    assert (scored.logprob, scored.top) == (LEAST_LOGPROB, best)


def test_barred_logits_leave_the_others() -> None:
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 0.5]])
    assert [drawn.token for drawn in sample(logits, [Sampling()], [3])] == [1]
    assert sample(logits, [Sampling(temperature=1.0, seed=2)], [3])[0].token in {1, 3}
