"""What a grammar costs per token: the same rows with and without, interleaved: `python -m benchmarks.structured`."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
import torch
from llguidance import LLMatcher

from workers.model.grammar import Grammars
from workers.model.sampler import sample
from workers.protocol.messages import History, Sampling, Shaping

MODEL = Path(__file__).resolve().parents[1] / "elastic" / "demo" / "checkpoint"
SIZE, END, ANSWERS = 1024, 1, 40
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer"},
        "tags": {"enum": ["a", "b"]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def main() -> None:
    """Prints the median per token of each, and their ratio. Both have a shaping, which copies the row."""
    grammar = LLMatcher.grammar_from_json_schema(PERSON, overrides={"whitespace_pattern": "[ ]{0,2}"})
    grammars = Grammars(MODEL / "tokenizer.json", [END])
    grammars.read()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {"with": [], "without": []}
    for seed in range(ANSWERS):
        logits = torch.randn(200, SIZE, generator=torch.Generator().manual_seed(seed))
        written: list[int] = []
        for row in logits:
            history = History(np.array([5, *written], np.uint32).tobytes(), 1)
            for name, form in (("without", ""), ("with", grammar)):
                asked = Sampling(temperature=1.0, seed=seed, shaping=Shaping(presence_penalty=0.1, grammar=form))
                started = time.perf_counter()
                [drawn] = sample(row[None], [asked], [len(written)], [history], grammars)
                times[name].append(time.perf_counter() - started)
            written.append(drawn.token)
            if drawn.token == END:
                break
    medians = {name: statistics.median(each) * 1e6 for name, each in times.items()}
    print(f"{medians} us per token, ratio {medians['with'] / medians['without']:.2f}, {len(times['with'])} tokens")


if __name__ == "__main__":
    main()
