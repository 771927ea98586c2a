"""The faults of a soak, drawn from a seed: which victims, by what, and when in relation to one another. Pure.

Which numbers the ranks will have then is not known: a scale down keeps those that live. So victims are drawn by their
place in the view.
A burst is one or more faults; the later ones fall into the recovery from the first (a nested failure). Kinds are drawn
in proportion to what is left of each group, so that all groups are used up together.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from typing import Literal, get_args

import msgspec

Kind = Literal["one", "second", "newcomer", "commit", "holders", "all", "scale", "zombie", "freeze", "restart", "role"]
SHARES: dict[Kind, float] = {  # of the bursts that kill ranks
    "one": 0.49,
    "second": 0.18,
    "newcomer": 0.12,
    "commit": 0.08,
    "holders": 0.07,
    "all": 0.03,
    "scale": 0.03,
}
FOR_EACH_KIND = 50  # kills; a soak of so many begins with each kind of burst once
RECOVERY_S = 0.6  # a second death falls into the first one's recovery, which takes about this long
FREEZES_S = ((0.3, 1.5), (3.5, 5.0))  # of etcd: shorter than any lease, and longer
ROLES = ("engine", "controller", "agent", "engine", "engine-standby", "controller")
KINDS: tuple[Kind, ...] = get_args(Kind)


class Quota(msgspec.Struct, frozen=True, kw_only=True):
    """How much a soak does, at least."""

    kills: int  # of ranks, by SIGKILL
    zombies: int  # ranks stopped until they were given up, then continued
    outages: int  # of etcd: stopped for a while, or ended and started again
    roles: int  # other processes killed
    requests: int  # that ended

    @classmethod
    def of(cls, kills: int) -> Quota:
        """The usual proportions."""
        return cls(kills=kills, zombies=-(-kills * 2 // 15), outages=-(-kills // 15), roles=min(6, -(-kills // 20)),
                   requests=50 * kills)  # fmt: skip


class Burst(msgspec.Struct, frozen=True):
    """Faults close together. Ranks die in the order of `places`, `delay_s` after one another; a newcomer's slot dies
    twice.

    `commit`: the second dies `delay_s` after the view with the first one's successor was staged.
    `scale`: the rank dies `delay_s` after one more rank was asked for; afterwards the size is as before.
    `holders`: both replicas of some expert, so that coverage is lost; the cluster's placement says which ranks.
    `zombie`: the rank is stopped, and continued `delay_s` after it was given up.
    `freeze`: etcd is stopped for `delay_s`, and the ranks die meanwhile; `restart`: it is ended, and started again.
    """

    kind: Kind
    pause_s: float  # to wait at full strength before it
    places: tuple[int, ...] = ()  # of the victims among the view's ranks; empty: by its placement and `chance`, or none
    delay_s: float = 0.0
    chance: float = 0.0
    role: str = ""

    @property
    def kills(self) -> int:
        """How many ranks die of it by SIGKILL, as far as that is known beforehand."""
        if self.kind in ("newcomer", "holders"):
            return 2
        return 0 if self.kind == "zombie" else len(self.places)

    def victims(self, ranks: Collection[int]) -> tuple[int, ...]:
        """Its victims among the ranks that are in the view now."""
        known = sorted(ranks)
        return tuple(known[place] for place in self.places)


def bursts(seed: int, quota: Quota, ranks: int) -> Iterator[Burst]:
    """Bursts without end, the same for the same arguments; after the quota, more in its proportions.

    Roles die first: only of processes that live on can growth over time be measured.
    """
    chooser = random.Random(seed)
    whole = {"kills": quota.kills, "zombies": quota.zombies, "outages": quota.outages}
    for number in range(quota.roles):
        yield Burst("role", chooser.uniform(0.0, 0.4), role=ROLES[number % len(ROLES)])
    left = dict(whole)
    each_once = chooser.sample(tuple(SHARES), len(SHARES)) if quota.kills >= FOR_EACH_KIND else []
    while True:
        weights = [max(0, each) for each in left.values()]
        (group,) = chooser.choices(list(left), weights if any(weights) else list(whole.values()))
        first = each_once.pop() if group == "kills" and each_once else None
        burst = _burst(chooser, group, ranks, first)
        left["kills"] -= burst.kills
        left[group] -= group != "kills"
        yield burst


def _burst(chooser: random.Random, group: str, ranks: int, first: Kind | None) -> Burst:
    """One of `group`; of the bursts that kill ranks the kind `first`, if given."""
    pause_s, delay_s, chance = chooser.uniform(0.0, 0.4), chooser.uniform(0.0, RECOVERY_S), chooser.random()
    places = tuple(chooser.sample(range(ranks), ranks))
    if group == "zombies":
        return Burst("zombie", pause_s, places[:1], delay_s / 2)
    if group == "outages":
        if chance < 0.25:
            return Burst("restart", pause_s)
        return Burst("freeze", pause_s, places[: chooser.randint(0, 1)], chooser.uniform(*chooser.choice(FREEZES_S)))
    kind = first or chooser.choices(tuple(SHARES), tuple(SHARES.values()))[0]
    if kind == "one" or ranks == 1:
        return Burst("one", pause_s, places[:1])
    if kind == "second":
        return Burst(kind, pause_s, places[:2], delay_s)
    if kind == "commit":
        return Burst(kind, pause_s, places[:2], delay_s / 6)
    if kind in ("newcomer", "scale"):
        return Burst(kind, pause_s, places[:1], delay_s / 2)
    if kind == "all":
        return Burst(kind, pause_s, places)
    return Burst(kind, pause_s, (), chance=chance)
