"""Who is meant by `rank any`, `rank other`, …: chosen with the seed's random numbers. Pure.

The same choices are made beforehand by a dry run: what is not known before (`newest`, `holders`) stays a word there.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from chaos.campaigns.strikes import holders
from chaos.faults.base import NotInjected

RULES = {
    "any": "one at random",
    "other": "one that was not struck in this round; the least struck so far",
    "same": "the one that was struck or changed last",
    "newest": "the one that was started last",
    "holders": "all that hold one of the experts with the fewest replicas",
    "all": "every one",
}


@dataclass(frozen=True)
class Sight:
    """The ranks as they are now. Beforehand there is no placement to be seen, and nobody is the newest."""

    ranks: Sequence[int]
    newest: int | None = None
    placement: Mapping[int, Sequence[Sequence[int]]] = field(default_factory=dict)


@dataclass
class Chooser:
    """Chooses, and remembers who was chosen."""

    random: random.Random
    times: Counter[int] = field(default_factory=Counter)
    round: set[int] = field(default_factory=set)
    last: int | None = None

    def next_round(self) -> None:
        """The steps begin again."""
        self.round.clear()

    def choose(self, victim: str, sight: Sight) -> tuple[str, ...]:
        """The victims in the terms of injectors: "rank 2", "engine", …; NotInjected if there is none to choose."""
        if not victim.startswith("rank "):
            return (victim,)
        chosen = self._ranks(victim.removeprefix("rank "), sight)
        if chosen is None:
            return (victim,)
        for rank in chosen:
            self.times[rank] += 1
            self.round.add(rank)
            self.last = rank
        return tuple(f"rank {rank}" for rank in chosen)

    def _ranks(self, which: str, sight: Sight) -> tuple[int, ...] | None:
        ranks = sorted(sight.ranks)
        match which:
            case "any":
                return (self._one(ranks, which),)
            case "other":
                fresh = [rank for rank in ranks if rank not in self.round]
                least = min((self.times[rank] for rank in fresh), default=0)
                return (self._one([rank for rank in fresh if self.times[rank] == least], which),)
            case "same":
                if self.last is None:
                    raise NotInjected("no rank was struck yet: there is no `rank same`")
                return (self.last,)
            case "newest":
                return None if sight.newest is None else (sight.newest,)
            case "holders":
                chance = self.random.random()
                return holders(sight.placement, chance) if sight.placement else None
            case "all":
                return tuple(ranks)
        return (int(which),)

    def _one(self, ranks: Sequence[int], which: str) -> int:
        if not ranks:
            raise NotInjected(f"there is no rank left for `rank {which}`")
        return self.random.choice(ranks)
