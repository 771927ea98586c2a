"""Which ranks `rank any`, `rank other`, … are: chosen with the seed's random numbers. Pure.

The same choices are made beforehand by a dry run: what is not known before (`newest`, `holders`) stays a word there.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from chaos.faults.base import NotInjected

RULES = {
    "any": "one at random",
    "other": "one that was no victim in this round; of these, the one that was a victim least often",
    "same": "the last victim of a fault or a change",
    "newest": "the one that was started last",
    "holders": "all that hold one of the experts with the fewest replicas",
    "all": "every one",
}


def is_rank(text: str) -> bool:
    """Whether it names a rank, by number or by rule."""
    kind, _, which = text.partition(" ")
    return kind == "rank" and (which in RULES or which.isdigit())


def number_of(victim: str) -> int | None:
    """The number of "rank 2"; None of a role, or of a rank that is not chosen yet."""
    kind, _, which = victim.partition(" ")
    return int(which) if kind == "rank" and which.isdigit() else None


@dataclass(frozen=True)
class Sight:
    """The ranks as they are now. In a dry run there is no placement to be seen, and no rank is the newest."""

    ranks: Sequence[int]
    newest: int | None = None
    placement: Mapping[int, Sequence[Sequence[int]]] = field(default_factory=dict)


@dataclass
class Chooser:
    """Chooses, and remembers its choices."""

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
                    raise NotInjected("no rank was a victim yet: there is no `rank same`")
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


def holders(placement: Mapping[int, Sequence[Sequence[int]]], chance: float) -> tuple[int, ...]:
    """All ranks that hold one of the experts, the one at `chance` (in [0, 1)) among those with the fewest holders.

    `placement`: rank -> per layer the experts in its slots.
    """
    found: dict[tuple[int, int], set[int]] = {}
    for rank, layers in placement.items():
        for layer, experts in enumerate(layers):
            for expert in experts:
                found.setdefault((layer, expert), set()).add(rank)
    fewest = min(len(each) for each in found.values())
    choice = sorted(tuple(sorted(each)) for each in found.values() if len(each) == fewest)
    return choice[int(chance * len(choice))]
