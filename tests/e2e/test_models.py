"""Each family, as a real checkpoint over real ranks: greedy output is the same on 1, 2, 4 and 6 ranks, and as
`transformers` generates it."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from chaos.target.cluster import ServedCluster
from tests.e2e.conftest import Serve
from tests.support.families import VOCAB, write_checkpoint
from workers.model.families import FAMILIES

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

PROMPTS = [[5, 9, 13], list(range(3, 60)), [7], [11, 2, 30, 4, 8, 16, 23, 42]]
TOKENS = 12


def outputs(cluster: ServedCluster) -> list[list[str]]:
    """The token strings of all prompts, sent together."""

    def one(prompt: list[int]) -> list[str]:
        body = {"model": cluster.model_name(), "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 0}
        answer = httpx.post(f"{cluster.url}/v1/completions", json={**body, "ignore_eos": True}, timeout=120.0)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["choices"][0]["logprobs"]["tokens"])

    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(one, PROMPTS))


def write_tokenizer(directory: Path) -> None:
    """A tokenizer in which token n is the text <n>, so that texts are token ids."""
    words = Tokenizer(WordLevel({f"<{n}>": n for n in range(VOCAB)}, unk_token="<0>"))
    words.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def generated(directory: Path) -> list[list[str]]:
    """What plain transformers makes of the prompts, one by one."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    model.generation_config.eos_token_id = None
    continuations = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
        continuations.append([f"<{token}>" for token in out[0, len(prompt) :].tolist()])
    return continuations


def assert_scores(cluster: ServedCluster, directory: Path) -> None:
    """The log probabilities of the prompts' own tokens, as lm-eval asks for them, are those of transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    body = {
        "model": cluster.model_name(),
        "prompt": PROMPTS,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 1,
        "echo": True,
    }
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=120.0).json()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    for choice, prompt in zip(answer["choices"], PROMPTS, strict=True):
        with torch.inference_mode():
            logs = model(torch.tensor([prompt])).logits[0, :-1].double().log_softmax(-1)
        theirs = logs.gather(1, torch.tensor(prompt[1:], dtype=torch.long)[:, None])[:, 0].tolist()
        scores = choice["logprobs"]["token_logprobs"]
        assert scores[0] is None
        assert scores[1:-1] == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_do_not_change_a_token(serve: Serve, tmp_path: Path, family: str) -> None:
    directory = write_checkpoint(tmp_path / family, family)
    write_tokenizer(directory)
    cluster = serve(directory, 1)
    cluster.wait_serving(1)
    alone = outputs(cluster)
    assert all(len(tokens) == TOKENS for tokens in alone)
    for ranks in (2, 4, 6):
        cluster.scale(ranks)
        cluster.wait_serving(ranks)
        assert outputs(cluster) == alone, f"{family} on {ranks} ranks"
    assert alone == generated(directory)
    assert_scores(cluster, directory)
