"""lm-eval's scores of the served model beside those of plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from tests.clients.conftest import TIMEOUT_S, Use
from tests.clients.test_clients import LARGE

pytestmark = [pytest.mark.clients, pytest.mark.timeout(TIMEOUT_S), LARGE]
CONTINUATIONS = (" is used to iterate over the elements of a sequence", " mutable sequences", "self):", " 3")
CONTEXTS = 50


def test_lm_evals_scores_are_those_of_transformers(use: Use, model: Path) -> None:
    """Two hundred of them, to 1e-4 per token in float32."""
    import torch  # here, since the other tests of this folder need none
    from transformers import AutoModelForCausalLM, AutoTokenizer

    contexts = [topics[name].strip()[:60].strip() for name in sorted(topics)[:CONTEXTS]]
    pairs = [(context, continuation) for context in contexts for continuation in CONTINUATIONS]
    assert len(pairs) == 200
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    scores = json.loads(
        use("python", "-m", "tests.clients.use_lm_eval", str(model), json.dumps(pairs)).splitlines()[-1]
    )
    for (context, continuation), (score, greedy) in zip(pairs, scores, strict=True):
        before, whole = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, context + continuation)
        )
        whole = before + whole[len(before) :]  # as lm-eval has it where both melt into one token
        with torch.inference_mode():
            logits = plain(torch.tensor([whole])).logits[0, len(before) - 1 : -1].double()
        theirs = logits.log_softmax(-1).gather(1, torch.tensor(whole[len(before) :])[:, None])[:, 0]
        assert score == pytest.approx(theirs.sum().item(), abs=1e-4 * len(theirs))
        assert greedy == bool((logits.argmax(-1) == torch.tensor(whole[len(before) :])).all())
