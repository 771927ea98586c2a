"""Whose waiting request is given the next place: API keys take turns by what they have been served. Pure.

A virtual token counter per key (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): the tokens of a
prompt count when it is given a place, those of the output as they come, and more. Who asks again after a pause goes on
from where the least served of the others is, so that no key saves up turns. Without keys all requests are of one.
"""

from __future__ import annotations

import math
from collections import Counter

PROMPT_COST, OUTPUT_COST = 1, 2  # of a token: a prompt's are computed many at a time


class Turns:
    """What each key with a request under way has been served."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._open = Counter[str]()

    def begin(self, key: str) -> None:
        """A request of this key is under way."""
        if key not in self._open:
            least = min((self._served[other] for other in self._open), default=0)
            self._served[key] = max(self._served.get(key, 0), least)
        self._open[key] += 1

    def end(self, key: str) -> None:
        """It is not any more. Once none of anybody's is, all begin anew; what no key would go on from is forgotten."""
        self._open[key] -= 1
        if not self._open[key]:
            del self._open[key]
            least = min((self._served[other] for other in self._open), default=math.inf)
            self._served = {
                name: served for name, served in self._served.items() if name in self._open or served > least
            }

    def charge(self, key: str, cost: int) -> None:
        """It has been served so much more, for a request that is under way."""
        self._served[key] += cost

    def served(self, key: str) -> int:
        """By what keys with requests under way are compared: the least served is next."""
        return self._served[key]
