"""How many prompt tokens a rank may compute in one step, so that the step keeps to its time. Pure.

Learned from the times that steps took: of steps without prompts, by the number of sequences that decode; of the others,
what a prompt token costs beyond that, by the number of ranks that compute prompts at once, since they share the cores.
Medians of the last few: one step that took long for another reason changes nothing. The share at most doubles from what
has been measured, so the first steps are short, and never falls below a floor, so that a prompt always advances.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

FLOOR_TOKENS = 16
FIRST_TOKENS = 64  # while nothing is known
REMEMBERED = 5
LEAST_SHARE = 0.25  # of a step's time that its prompts are charged with, whatever its decodes seem to cost


@dataclass(frozen=True)
class Work:
    """What a step computes: most sequences that decode on a rank, most prompt tokens on one, ranks with any prompt."""

    decodes: int
    tokens: int
    ranks: int


class StepBudget:
    """`budget_s` 0: no limit but `most` tokens."""

    def __init__(self, budget_s: float, most: int) -> None:
        self._budget_s, self._most = budget_s, most
        self._decode_s: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._prompts: dict[int, deque[tuple[int, float]]] = defaultdict(lambda: deque(maxlen=REMEMBERED))

    def tokens(self, decodes: int, ranks: int) -> int:
        """Of prompts, for each of `ranks` ranks, beside `decodes` sequences that decode."""
        if not self._budget_s:
            return self._most
        if not self._prompts:
            return min(FIRST_TOKENS, self._most)
        known = ranks if ranks in self._prompts else min(self._prompts, key=lambda each: abs(each - ranks))
        seen = self._prompts[known]
        token_s = statistics.median_low([took_s / tokens for tokens, took_s in seen]) * max(1.0, ranks / known)
        wanted = (self._budget_s - self._decoding_s(decodes)) / max(token_s, 1e-9)
        most = min(self._most, 2 * max(tokens for tokens, _ in seen))
        return min(max(int(min(wanted, most)), FLOOR_TOKENS), self._most)

    def learn(self, work: Work, took_s: float) -> None:
        """A step has ended well."""
        if not work.tokens:
            self._decode_s[work.decodes.bit_length()].append(took_s)
        elif 2 * work.tokens >= self.tokens(work.decodes, work.ranks) or took_s > self._budget_s:
            # Small ones say little: most of their time is the step's own.
            prompts_s = max(took_s - self._decoding_s(work.decodes), LEAST_SHARE * took_s)
            self._prompts[work.ranks].append((work.tokens, prompts_s))

    def _decoding_s(self, decodes: int) -> float:
        """What they take, or fewer if that is not known: never too much."""
        known = [size for size in self._decode_s if size <= decodes.bit_length()]
        return statistics.median_low(self._decode_s[max(known)]) if known and decodes else 0.0


def shares(prompts: Sequence[tuple[bool, int]], budget: int) -> list[int]:
    """How many tokens each prompt gets of a step; given as (new, tokens left), the oldest first.

    Half is for the oldest, so that each prompt gets its turn. The rest is for interrupted streams, then for the
    shortest, so that a short prompt does not wait for long ones. What is left over is for the oldest again.
    """
    given = [0] * len(prompts)
    if prompts:
        given[0] = min(prompts[0][1], -(-budget // 2))
    for index in sorted(range(len(prompts)), key=lambda index: (prompts[index][0], index == 0, prompts[index][1])):
        given[index] += min(prompts[index][1] - given[index], budget - sum(given))
    return given
