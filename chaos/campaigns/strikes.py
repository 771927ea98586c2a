"""What a soak does to a cluster, drawn from a seed: who is struck, by what, and when in relation to one another.

Pure. A strike is one or more faults; the later ones fall into the recovery from the first (a nested failure). Kinds are
drawn in proportion to what is still to be done of each group, so that all groups come to their end together.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

import msgspec

Kind = Literal["one", "second", "newcomer", "commit", "holders", "all", "scale", "zombie", "freeze", "restart", "role"]
SHARES: dict[Kind, float] = {  # of the strikes that kill ranks
    "one": 0.49,
    "second": 0.18,
    "newcomer": 0.12,
    "commit": 0.08,
    "holders": 0.07,
    "all": 0.03,
    "scale": 0.03,
}
RECOVERY_S = 0.6  # a second death falls into the first one's recovery, which takes about so long
FREEZES_S = ((0.3, 1.5), (3.5, 5.0))  # of etcd: shorter than any lease, and longer
ROLES = ("engine", "controller", "agent", "engine", "engine-standby", "controller")
KINDS: tuple[Kind, ...] = get_args(Kind)


class Dose(msgspec.Struct, frozen=True, kw_only=True):
    """How much is to be done, at least. Of requests only the number of those that ended counts, whatever is struck."""

    kills: int  # of ranks, by SIGKILL
    zombies: int  # ranks stopped until they were given up, then continued
    outages: int  # of etcd: stopped for a while, or ended and started again
    roles: int  # other processes killed
    requests: int

    @classmethod
    def of(cls, kills: int) -> Dose:
        """The usual proportions."""
        return cls(kills=kills, zombies=-(-kills * 2 // 15), outages=-(-kills // 15), roles=min(6, -(-kills // 20)),
                   requests=50 * kills)  # fmt: skip


class Strike(msgspec.Struct, frozen=True):
    """One blow. `ranks` die in this order, `delay_s` after one another; of a newcomer, the same slot dies twice.

    `commit`: the second dies `delay_s` after the view with the first one's successor was staged.
    `scale`: the rank dies `delay_s` after one more rank was asked for; afterwards the size is as before.
    `holders`: both replicas of some expert, so that coverage is lost; the cluster's placement says which ranks.
    `zombie`: the rank is stopped, and continued `delay_s` after it was given up.
    `freeze`: etcd is stopped for `delay_s`, and the ranks die meanwhile; `restart`: it is ended, and started again.
    """

    kind: Kind
    pause_s: float  # to wait at full strength before it
    ranks: tuple[int, ...] = ()  # empty: chosen by the placement, with `chance`, or nobody
    delay_s: float = 0.0
    chance: float = 0.0
    role: str = ""

    @property
    def kills(self) -> int:
        """How many ranks die of it by SIGKILL, as far as that is known beforehand."""
        if self.kind in ("newcomer", "holders"):
            return 2
        return 0 if self.kind == "zombie" else len(self.ranks)


def strikes(seed: int, dose: Dose, ranks: int) -> Iterator[Strike]:
    """Strikes without end, the same for the same arguments; after the dose, more in its proportions.

    Roles die first: what processes hold over time can only be told of those that live on.
    """
    chooser = random.Random(seed)
    whole = {"kills": dose.kills, "zombies": dose.zombies, "outages": dose.outages}
    for number in range(dose.roles):
        yield Strike("role", chooser.uniform(0.0, 0.4), role=ROLES[number % len(ROLES)])
    left = dict(whole)
    while True:
        weights = [max(0, each) for each in left.values()]
        (group,) = chooser.choices(list(left), weights if any(weights) else list(whole.values()))
        strike = _strike(chooser, group, ranks)
        left["kills"] -= strike.kills
        left[group] -= group != "kills"
        yield strike


def _strike(chooser: random.Random, group: str, ranks: int) -> Strike:
    pause_s, delay_s, chance = chooser.uniform(0.0, 0.4), chooser.uniform(0.0, RECOVERY_S), chooser.random()
    victims = tuple(chooser.sample(range(ranks), ranks))
    if group == "zombies":
        return Strike("zombie", pause_s, victims[:1], delay_s / 2)
    if group == "outages":
        if chance < 0.25:
            return Strike("restart", pause_s)
        return Strike("freeze", pause_s, victims[: chooser.randint(0, 1)], chooser.uniform(*chooser.choice(FREEZES_S)))
    (kind,) = chooser.choices(tuple(SHARES), tuple(SHARES.values()))
    if kind == "one" or ranks == 1:
        return Strike("one", pause_s, victims[:1])
    if kind == "second":
        return Strike(kind, pause_s, victims[:2], delay_s)
    if kind == "commit":
        return Strike(kind, pause_s, victims[:2], delay_s / 6)
    if kind in ("newcomer", "scale"):
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
