"""The model's promise: a sequence's tokens do not depend on batch mates, chunks, restarts or where the experts are."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from membership.base.enums import Exactness
from tests.support.families import VOCAB, write_checkpoint
from tests.support.local_exchange import LocalExchange
from tests.support.model_helpers import Sequences, SpreadBank, make_runner, prompts, run_mixed
from workers.model.expert_bank import LocalExpertBank
from workers.model.families import FAMILIES
from workers.model.runner import ModelRunner
from workers.model.sampler import NO_NUMBERS
from workers.protocol.messages import NO_TOKEN, Sampling, Score, SeqChunk, TokenLogprobs

pytestmark = pytest.mark.integration

NEW_TOKENS = 24
# Difference between our logits (of standard deviation 1.4) and transformers', at most and in the median. In bfloat16 a
# near-tie in a router may fall the other way: the model's own distance from float32 is then as large (measured 2.4).
MOST = {"float32": 2e-5, "bfloat16": 1.5}
TYPICAL = {"float32": 5e-6, "bfloat16": 0.08}


@pytest.fixture(scope="module", params=[(f, d) for f in FAMILIES for d in ("float32", "bfloat16")], ids=str)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    family, dtype = request.param
    return write_checkpoint(tmp_path_factory.mktemp(family), family, dtype), dtype


def test_tokens_are_the_same_in_any_company(checkpoint: tuple[Path, str]) -> None:
    path, _ = checkpoint
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    print(f"seed {seed}")
    runner = make_runner(path)
    try:
        settings = [Sampling(logprobs=3), Sampling(temperature=0.8, top_p=0.9, seed=5, logprobs=3)]
        work = {i: (p, settings[i % 2]) for i, p in enumerate(prompts(9, VOCAB, rng))}
        alone, bits = {}, {}
        for seq, (prompt, sampling) in work.items():
            sequences = Sequences(runner, rng)
            sequences.add(seq, prompt, sampling)
            alone[seq] = sequences.finish(seq, len(prompt) + NEW_TOKENS)
            bits |= sequences.logprobs
        together = Sequences(runner, rng)
        run_mixed(together, work, NEW_TOKENS, rng)
        assert together.tokens == alone
        assert together.logprobs == bits  # to the last bit: tokens alone would hide most differences

        # Taken over by another rank in the middle: prompt and emitted tokens are prefilled again.
        again = Sequences(runner, rng)
        for seq, (prompt, sampling) in list(work.items())[:4]:
            cut = rng.randrange(1, NEW_TOKENS)
            again.add(seq, alone[seq][: len(prompt) + cut], sampling)
            assert again.finish(seq, len(prompt) + NEW_TOKENS, most=40) == alone[seq]
        assert again.logprobs.items() <= bits.items()

        # Experts elsewhere, twice over, asked in portions.
        runner.attach(LocalExchange(_spread(runner, rng)))
        spread = Sequences(runner, rng)
        run_mixed(spread, work, NEW_TOKENS, rng)
        assert spread.tokens == alone
        assert spread.logprobs == bits
    finally:
        runner.close()


def test_a_request_of_no_numbers_is_alone_with_them(checkpoint: tuple[Path, str]) -> None:
    """Where a token's embedding overflows, nobody else has other bits: beside it, or in its blocks after it."""
    rng = random.Random(5)
    path, _ = checkpoint
    runner = make_runner(path, blocks=40)
    try:
        work = {seq: [rng.randrange(VOCAB) for _ in range(40)] for seq in range(3)}
        seen = set[int]().union(*work.values())
        settings = [Sampling(logprobs=2), Sampling(temperature=0.8, seed=5, logprobs=2), Sampling(logprobs=2)]

        def bits(others: list[int], beside: list[int]) -> dict[tuple[int, int], object]:
            """Of prompts and a few tokens of `others`; `beside` is in their steps, and gives its blocks away."""
            sequences = Sequences(runner, random.Random(6))
            for seq in others:
                sequences.add(seq, work[seq], settings[seq])
            sequences.add(9, beside, Sampling(temperature=1.0, seed=4))
            for most in (30, 30, 1, 1):
                chunks = [sequences.chunk(seq, most) for seq in (*others, 9)]
                sequences.step([chunk for chunk in chunks if chunk.tokens and NO_TOKEN not in chunk.tokens])
            sequences.drop(9)
            sequences.add(5, work[2], settings[2])
            sequences.finish(5, 44)
            seen.update(*sequences.tokens.values())
            return {place: found for place, found in sequences.logprobs.items() if place[0] != 9}

        right = bits([0, 1], work[2])
        bad = next(token for token in range(VOCAB) if token not in seen)
        runner.loaded.model.get_input_embeddings().weight.data[bad] = float("inf")
        assert bits([0, 1], [*work[2][:20], bad, *work[2][21:]]) == right
        (refused,) = runner.run([SeqChunk(0, 0, [1, bad], [0], Sampling(temperature=1.0))])
        assert (refused.token, refused.error) == (NO_TOKEN, NO_NUMBERS)
        scored = [
            SeqChunk(seq, 0, tokens, [seq], score=Score([4, 5], 2)) for seq, tokens in enumerate(([1, bad], [1, 2]))
        ]
        refused, right = runner.run(scored)
        assert (refused.scores, refused.error) == ([], NO_NUMBERS), (
            "a prompt that is scored, without a token of its own"
        )
        assert len(right.scores) == 2
        assert not right.error
    finally:
        runner.close()


def _spread(runner: ModelRunner, rng: random.Random) -> SpreadBank:
    """Each expert in two of three banks of its own."""
    info = runner.loaded.info
    banks = [LocalExpertBank() for _ in range(3)]
    for bank in banks:
        bank.open(runner.loaded.source, runner.products)
    for layer in range(info.moe_layers):
        for expert in range(info.experts):
            for bank in rng.sample(banks, 2):
                bank.load(layer, expert)
    return SpreadBank(banks, rng)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"sliding_window": 24}),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 24}),
        ("olmoe", {"clip_qkv": 0.5}),
        ("qwen3_moe", {"num_attention_heads": 6, "num_key_value_heads": 2, "norm_topk_prob": True}),
        ("deepseek_v2", {"q_lora_rank": None, "topk_method": "greedy", "n_group": None}),
        ("mixtral", {"tie_word_embeddings": True, "num_attention_heads": 8, "num_key_value_heads": 1}),
        ("mixtral", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                                         "original_max_position_embeddings": 128}}),
    ],
    ids=str,
)  # fmt: skip
def test_variants_agree_with_transformers(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    rng = random.Random(5)
    path = write_checkpoint(tmp_path, family, **changes)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager")
    runner = make_runner(path)
    try:
        sequences = Sequences(runner, rng)
        for seq, prompt in enumerate(prompts(5, VOCAB, rng)):
            sequences.add(seq, prompt)
            with torch.inference_mode():
                theirs = model(torch.tensor([prompt])).logits[0, -1]
            while (chunk := sequences.chunk(seq, 30)).sample is None:
                sequences.step([chunk])
            ours = runner.logits([chunk], [0])[0]
            assert (ours - theirs).abs().max() < MOST["float32"]
    finally:
        runner.close()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_prompts_scores_agree_with_transformers(family: str, tmp_path: Path) -> None:
    """The same bits however the prompt is cut into chunks, beside others; as transformers in float32 to 1e-4."""
    import torch
    from transformers import AutoModelForCausalLM

    rng = random.Random(7)
    path = write_checkpoint(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager")
    runner = make_runner(path)
    try:
        asked = prompts(6, VOCAB, rng)
        whole = [_scores(runner, rng, [prompt], 512)[0] for prompt in asked]
        assert _scores(runner, rng, asked, 17) == whole
        for prompt, scores in zip(asked, whole, strict=True):
            with torch.inference_mode():
                logs = model(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
            for at, (score, target) in enumerate(zip(scores, prompt[1:], strict=True)):
                assert abs(score.logprob - logs[at, target]) < 1e-4
                assert [token for token, _ in score.top] == logs[at].topk(2).indices.tolist()
                assert score.rank == (logs[at] >= logs[at, target]).sum()
    finally:
        runner.close()


def _scores(runner: ModelRunner, rng: random.Random, asked: list[list[int]], most: int) -> list[list[TokenLogprobs]]:
    """Of all prompts together, in chunks of `most` tokens."""
    sequences = Sequences(runner, rng)
    scores: list[list[TokenLogprobs]] = [[] for _ in asked]
    for seq, prompt in enumerate(asked):
        sequences.add(seq, prompt)
    while True:
        chunks = []
        for seq, prompt in enumerate(asked):
            chunk = sequences.chunk(seq, most)
            if chunk.start < len(prompt):
                targets = prompt[chunk.start + 1 : chunk.start + len(chunk.tokens) + 1]
                chunks.append(msgspec.structs.replace(chunk, sample=None, score=Score(targets, 2)))
        if not chunks:
            return scores
        for result in runner.run(chunks):
            assert result.token == NO_TOKEN
            scores[result.seq] += result.scores
        for chunk in chunks:
            sequences.done(chunk)


@pytest.fixture(scope="module")
def generated(checkpoint: tuple[Path, str]) -> list[tuple[list[int], Any]]:
    """Prompts, and what transformers makes of them."""
    import torch
    from transformers import AutoModelForCausalLM

    path, dtype = checkpoint
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), experts_implementation="eager")
    return [
        (prompt, model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1,
            return_dict_in_generate=True, output_logits=True,
        ))
        for prompt in prompts(6, VOCAB, random.Random(3))
    ]  # fmt: skip


@pytest.mark.parametrize("exactness", list(Exactness))
def test_agrees_with_transformers(
    checkpoint: tuple[Path, str], generated: list[tuple[list[int], Any]], exactness: Exactness
) -> None:
    path, dtype = checkpoint
    rng = random.Random(3)
    runner = make_runner(path, exactness=exactness)
    differences = []
    try:
        for seq, (prompt, expected) in enumerate(generated):
            sequences = Sequences(runner, rng)
            sequences.add(seq, prompt)
            for step, (theirs,) in enumerate(expected.logits):
                ours = runner.logits([sequences.chunk(seq, 512)], [0])[0].float()
                differences.append((ours - theirs.float()).abs().max().item())
                best = theirs.float().topk(2).values
                if best[0] - best[1] > 2 * MOST[dtype]:
                    assert ours.argmax() == theirs.argmax(), f"prompt {seq}, token {step}"
                sequences.step([sequences.chunk(seq, 512)])
                sequences.tokens[seq][-1] = expected.sequences[0, len(prompt) + step].item()
    finally:
        runner.close()
    differences.sort()
    assert differences[-1] < MOST[dtype]
    assert differences[len(differences) // 2] < TYPICAL[dtype]
