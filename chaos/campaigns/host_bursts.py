"""The faults of a soak over hosts, drawn from a seed: which host, which link, by what, and how long. Pure.

Kinds are drawn like cards, so that each comes once before any comes again. Some bursts have a second fault, which falls
into the first one or into the recovery from it. The matrix has each fault of a network in each phase of the cluster.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from enum import StrEnum
from itertools import product

import msgspec

ETCD = "etcd"  # its host, where it has one of its own: the far end of a link
HOLDS_S = ((0.1, 1.5), (4.0, 8.0))  # shorter than a host's lease, and longer
PAUSE_S = 1.0
DELAY_S = 2.0
NESTED = 0.3  # share of the bursts


class HostFaultKind(StrEnum):
    """What is done."""

    KILL_RANK = "kill-rank"
    KILL_ENGINE = "kill-engine"  # the one in charge, wherever it is
    KILL_CONTROLLER = "kill-controller"
    KILL_AGENT = "kill-agent"
    STOP_RANK = "stop-rank"  # it goes on afterwards, as a zombie if it was given up
    FREEZE_ETCD = "freeze-etcd"
    KILL_HOST = "kill-host"  # all its processes; the kernel closes their connections
    POWER = "power"  # the same, and no other host learns of it: connections are half open
    CABLE = "cable"  # nothing passes, not even a client's request
    ISOLATE = "isolate"  # no other host is reached, nor etcd; clients are
    DIVIDE = "divide"  # no other host is reached; etcd is, where it has a host of its own
    CUT = "cut"  # a link, both ways
    MUTE = "mute"  # a link, from the host to the peer only
    RESET = "reset"  # a link's connections
    LOSSY = "lossy"  # a link, both ways
    SLOW = "slow"  # all that the host sends


Kind = HostFaultKind
OF_HOSTS = (Kind.KILL_HOST, Kind.POWER, Kind.CABLE)  # their streams end with them, so never the gateway's host
OF_LINKS = (Kind.CUT, Kind.MUTE, Kind.RESET, Kind.LOSSY)
ENDS = (Kind.KILL_RANK, Kind.KILL_ENGINE, Kind.KILL_CONTROLLER, Kind.KILL_AGENT)  # over at once
NETWORK = (Kind.CABLE, Kind.ISOLATE, Kind.DIVIDE, *OF_LINKS, Kind.SLOW)
SECOND = (Kind.KILL_RANK, Kind.KILL_ENGINE, Kind.KILL_CONTROLLER, Kind.STOP_RANK, *OF_LINKS, Kind.SLOW)


class HostPhase(StrEnum):
    """What the cluster is in the middle of while the fault lasts."""

    STEADY = "steady"
    SCALE_UP = "scale-up"
    DRAIN = "drain"
    RECOVERY = "recovery"  # from the death of a rank


PHASES = (HostPhase.SCALE_UP, HostPhase.DRAIN, HostPhase.RECOVERY)
PASSES = 3  # of the matrix: a fault that was not seen to happen is tried again
Cell = tuple[Kind, HostPhase]


class HostFault(msgspec.Struct, frozen=True):
    """One fault. `peer`: the other end of a link. `chance` chooses among what the host has when it comes to that."""

    kind: HostFaultKind
    host: str
    peer: str = ""
    hold_s: float = 0.0
    chance: float = 0.0

    def __str__(self) -> str:
        where = self.host + (f" -> {self.peer}" if self.peer else "")
        return f"{self.kind} {where}" + (f" for {self.hold_s:.1f} s" if self.hold_s else "")


class HostBurst(msgspec.Struct, frozen=True):
    """One fault, or two: the second one `delay_s` after the first."""

    faults: tuple[HostFault, ...]
    pause_s: float  # to wait at full strength before it
    delay_s: float = 0.0
    phase: HostPhase = HostPhase.STEADY


def matrix(
    seed: int, hosts: Sequence[str], gateway: str, far: Sequence[str], done: Collection[Cell]
) -> Iterator[HostBurst]:
    """Each fault of a network in each phase, in an order drawn from the seed; `done` grows meanwhile."""
    chooser = random.Random(seed)
    cells = list(product(NETWORK, PHASES))
    for _ in range(PASSES):
        for kind, phase in chooser.sample(cells, len(cells)):
            fault = _fault(chooser, kind, hosts, gateway, far)
            fault = msgspec.structs.replace(fault, hold_s=chooser.uniform(*HOLDS_S[-1]))  # the phase falls into it
            if (kind, phase) not in done:
                yield HostBurst((fault,), chooser.uniform(0.0, PAUSE_S), phase=phase)


def bursts(seed: int, hosts: Sequence[str], gateway: str, far: Sequence[str] = ()) -> Iterator[HostBurst]:
    """Bursts without end, the same for the same arguments. `gateway`: the host that clients use. `far`: only the ends
    of links.
    """
    chooser, deck = random.Random(seed), list[Kind]()
    while True:
        deck = deck or chooser.sample(tuple(Kind), len(Kind))
        faults = [_fault(chooser, deck.pop(), hosts, gateway, far)]
        if chooser.random() < NESTED:
            faults.append(_fault(chooser, chooser.choice(SECOND), hosts, gateway, far))
        yield HostBurst(tuple(faults), chooser.uniform(0.0, PAUSE_S), chooser.uniform(0.0, DELAY_S))


def _fault(chooser: random.Random, kind: Kind, hosts: Sequence[str], gateway: str, far: Sequence[str]) -> HostFault:
    host = chooser.choice([each for each in hosts if kind not in OF_HOSTS or each != gateway])
    peer = chooser.choice([*(each for each in hosts if each != host), *far]) if kind in OF_LINKS else ""
    hold_s = 0.0 if kind in ENDS else chooser.uniform(*chooser.choice(HOLDS_S))
    return HostFault(kind, host, peer, hold_s, chooser.random())
