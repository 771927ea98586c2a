"""What a soak does to a cluster, drawn from a seed: which ranks die, and when in relation to one another.

Pure. A strike is one or more SIGKILLs; the later ones fall into the recovery from the first (a nested failure).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["one", "second", "newcomer", "commit", "holders", "all"]
SHARES: dict[Kind, float] = {
    "one": 0.52,
    "second": 0.18,
    "newcomer": 0.12,
    "commit": 0.08,
    "holders": 0.07,
    "all": 0.03,
}
RECOVERY_S = 0.6  # a second death falls into the first one's recovery, which takes about so long


@dataclass(frozen=True)
class Strike:
    """One blow. `ranks` die in this order, `delay_s` after one another; of a newcomer, the same slot dies twice.

    `commit`: the second dies `delay_s` after the view with the first one's successor was staged.
    `holders`: both replicas of some expert, so that coverage is lost; the cluster's placement says which ranks.
    """

    kind: Kind
    pause_s: float  # to wait at full strength before it
    ranks: tuple[int, ...]  # empty: chosen by the placement, with `chance`
    delay_s: float = 0.0
    chance: float = 0.0

    @property
    def kills(self) -> int:
        """How many processes die of it, as far as that is known beforehand."""
        return 2 if self.kind in ("newcomer", "holders") else len(self.ranks)


def strikes(seed: int, kills: int, ranks: int) -> Iterator[Strike]:
    """Strikes that add up to at least `kills`; the same for the same arguments."""
    chooser = random.Random(seed)
    while kills > 0:
        strike = _strike(chooser, ranks)
        kills -= strike.kills
        yield strike


def _strike(chooser: random.Random, ranks: int) -> Strike:
    (kind,) = chooser.choices(tuple(SHARES), tuple(SHARES.values()))
    pause_s, delay_s, chance = chooser.uniform(0.0, 0.4), chooser.uniform(0.0, RECOVERY_S), chooser.random()
    victims = tuple(chooser.sample(range(ranks), ranks))
    if kind == "one" or ranks == 1:
        return Strike("one", pause_s, victims[:1])
    if kind == "second":
        return Strike(kind, pause_s, victims[:2], delay_s)
    if kind == "commit":
        return Strike(kind, pause_s, victims[:2], delay_s / 6)
    if kind == "newcomer":
        return Strike(kind, pause_s, victims[:1], delay_s / 2)
    if kind == "all":
        return Strike(kind, pause_s, victims)
    return Strike(kind, pause_s, (), chance=chance)


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
