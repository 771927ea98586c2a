"""How fast a served cluster decodes and reads prompts, without a fault: the parts of `gpu_kills` that precede kills."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.gpu import PREFILLED, answered
from benchmarks.raw_streams import RawStreams
from chaos.workload.history import RequestRecord, percentile

Say = Callable[..., None]


def decode(make: Callable[[int], RawStreams], counts: Sequence[int], say: Say) -> None:
    """So many streams at once, an answer each, twice: the first time graphs are recorded. Rates are of the time in
    which all of them got tokens, so that no prompt is in it."""
    texts: dict[int, tuple[int, ...]] = {}
    for count in counts:
        for kind in ("first time", "decode"):
            records = make(count).once()
            same = sum(texts.setdefault(record.prompt, record.tokens) == record.tokens for record in records)
            say(kind, streams=count, same_text=same, **_rate(records))


def _rate(records: Sequence[RequestRecord]) -> dict[str, Any]:
    times = [record.token_times for record in records if len(record.token_times) > 1]
    if len(times) < len(records):
        return {"errors": [record.error or "no tokens" for record in records if len(record.token_times) < 2][:3]}
    began, ended = max(each[0] for each in times), min(each[-1] for each in times)
    gaps = [1000 * (b - a) for each in times for a, b in pairwise(each) if began <= a and b <= ended]
    if ended <= began or not gaps:
        return {"errors": ["they never all got tokens at once"]}
    tokens = sum(began < at <= ended for each in times for at in each)
    return {
        "tokens_per_s": round(tokens / (ended - began), 1), "over_s": round(ended - began, 2),
        "gap_p50": round(percentile(gaps, 0.5), 2), "gap_p99": round(percentile(gaps, 0.99), 2),
        "first_token_ms": [round(1000 * (f([r.token_times[0] - r.started for r in records]))) for f in (min, max)],
    }  # fmt: skip


def prefill(url: str, vocabulary: int, say: Say) -> None:
    """Prompts of PREFILLED tokens with one token of answer, none of which begins as another."""
    draw = random.Random(5)
    prompts = [[draw.randrange(4, vocabulary) for _ in range(PREFILLED)] for _ in range(10)]
    asyncio.run(answered(url, prompts[:2]))  # kernels are compiled, on both ranks
    alone = sorted(asyncio.run(answered(url, [each])) for each in prompts[2:5])
    together = asyncio.run(answered(url, prompts[6:]))
    say(
        "prefill", prompt_tokens=PREFILLED, seconds_alone=[round(each, 3) for each in alone],
        tokens_per_s_alone=round(PREFILLED / alone[1]), tokens_per_s_four_at_once=round(4 * PREFILLED / together),
    )  # fmt: skip
