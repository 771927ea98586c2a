"""How many prompt tokens a rank may compute in one step, so that the step keeps to its time. Pure.

Learned from the times that steps took: of steps without prompts, by the number of sequences that decode; of the others,
what prompts cost beyond that, by the number of ranks that compute prompts at once, since they share the cores: once per
step (weights are read, ranks exchange), and per token. The first part buys nothing, so a step's prompts get at least as
much time again, and half of what its decodes take, even if the step then exceeds its time. Steps of one size cannot
tell the two parts apart: where all are small, a larger one is tried now and then. Medians of the last few: one step
that took long for another reason changes nothing. The share at most doubles from what has been measured, so the first
steps are short, and never falls below a floor, so that a prompt always advances.

A request that is alone has no budget: no other waits for its steps, and each reads all weights anew. What its large
steps take is learned from all the same.

With or without a budget: a step whose answer was overdue is not tried again as it was, since it might never end.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from membership.base.timing import STEP_DEADLINE_S

FLOOR_TOKENS = 16
FIRST_TOKENS = 64  # while nothing is known
REMEMBERED = 5
ALIKE = 4  # steps of one size after which a larger one is tried
COMPARED = 16  # steps with prompts of different sizes, which tell what a step costs whatever its size
SAFE_S = STEP_DEADLINE_S / 2  # a step that takes so long is not near to being overdue
LEAST_SHARE = 0.25  # of a step's time that its prompts are charged with, whatever its decodes seem to cost


@dataclass(frozen=True)
class Work:
    """What a step computes: most sequences that decode on a rank, most prompt tokens on one, ranks with any prompt."""

    decodes: int
    tokens: int
    ranks: int


class _Prompts:
    """What prompts have cost in steps with this number of ranks that compute some."""

    def __init__(self) -> None:
        self.step_s = 0.0  # of a step, whatever its size
        self.alike = False  # whether the steps that are remembered are of one size, and cannot tell that
        self._large: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)
        self._compared: deque[tuple[int, float]] = deque(maxlen=COMPARED)

    def learn(self, tokens: int, took_s: float, *, large: bool) -> None:
        """Small ones say little of what a token costs, but more of what a step costs."""
        self._compared.append((tokens, took_s))
        if large or not self._large:
            self._large.append((tokens, took_s))
        pairs = [(a, b) for a, b in combinations(sorted(self._compared), 2) if 2 * a[0] <= b[0]]
        self.alike = len(self._compared) >= ALIKE and not pairs
        if pairs:
            found = statistics.median_low([(a[1] * b[0] - b[1] * a[0]) / (b[0] - a[0]) for a, b in pairs])
            self.step_s = max(0.0, found)

    @property
    def token_s(self) -> float:
        """Of each token beyond that."""
        return statistics.median_low([max(took_s - self.step_s, 0.0) / tokens for tokens, took_s in self._large])

    @property
    def most(self) -> int:
        """The largest that has been measured."""
        return max(tokens for tokens, _ in self._large)


class StepBudget:
    """`budget_s` 0: no limit but `most` tokens."""

    def __init__(self, budget_s: float, most: int) -> None:
        self._budget_s, self._most = budget_s, most
        self._limit = most  # less after steps whose answers were overdue
        self._decode_s: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._prompts: dict[int, _Prompts] = defaultdict(_Prompts)

    def tokens(self, decodes: int, ranks: int, *, alone: bool = False) -> int:
        """Of prompts, for each of `ranks` ranks, beside `decodes` sequences that decode; or of the only request."""
        if alone or not self._budget_s:
            return self._limit
        if not self._prompts:
            return min(FIRST_TOKENS, self._limit)
        known = ranks if ranks in self._prompts else min(self._prompts, key=lambda each: abs(each - ranks))
        seen = self._prompts[known]
        token_s = seen.token_s * max(1.0, ranks / known)
        decoding_s = self._decoding_s(decodes)
        given_s = max(self._budget_s - decoding_s - seen.step_s, seen.step_s + decoding_s / 2)
        wanted = given_s / max(token_s, 1e-9)
        if wanted < FLOOR_TOKENS and seen.alike:
            return min(FIRST_TOKENS, self._limit)
        return min(max(int(min(wanted, 2 * seen.most)), FLOOR_TOKENS), self._limit)

    def learn(self, work: Work, took_s: float) -> None:
        """A step has ended well."""
        if 2 * took_s < SAFE_S and 2 * work.tokens >= self._limit:
            self._limit = min(2 * self._limit, self._most)
        if not self._budget_s:
            return
        if not work.tokens:
            self._decode_s[work.decodes.bit_length()].append(took_s)
            return
        large = 2 * work.tokens >= self.tokens(work.decodes, work.ranks) or took_s > self._budget_s
        prompts_s = max(took_s - self._decoding_s(work.decodes), LEAST_SHARE * took_s)
        self._prompts[work.ranks].learn(work.tokens, prompts_s, large=large)

    def overran(self, work: Work) -> None:
        """An answer to a step was overdue. Prompts get half as much from now on, until twice that would be safe."""
        if work.tokens:
            self._limit = min(self._limit, max(work.tokens // 2, FLOOR_TOKENS))

    def _decoding_s(self, decodes: int) -> float:
        """What they take, or fewer if that is not known: never too much."""
        known = [size for size in self._decode_s if size <= decodes.bit_length()]
        return statistics.median_low(self._decode_s[max(known)]) if known and decodes else 0.0


def shares(prompts: Sequence[tuple[bool, int]], budget: int) -> list[int]:
    """How many tokens each prompt gets of a step; given as (new, tokens left), the oldest first.

    Half is for the oldest, so that each prompt gets its turn; or a quarter, if that lets the next one end. The rest is
    for interrupted streams, then for the shortest, so that a short prompt does not wait for long ones. What is left
    over is for the oldest again.
    """
    given = [0] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: (prompts[index][0], index == 0, prompts[index][1]))
    if prompts:
        left = budget - prompts[order[0]][1]
        given[0] = min(prompts[0][1], left if budget <= 4 * left < 2 * budget else -(-budget // 2))
    for index in order:
        given[index] += min(prompts[index][1] - given[index], budget - sum(given))
    return given
