"""Faults between hosts in namespaces: packets dropped one or both ways, connections reset, or the link down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol, runtime_checkable

from chaos.faults.base import Fault, Injector, NotInjected, Params, Site, see
from chaos.faults.netns import PROBE_PORT, Host, Network
from chaos.faults.nftables import Rule, Table
from chaos.faults.probe import Answer, reach

PROBE_S = 0.3
HEAL_TIMEOUT_S = 10.0
Pair = tuple[Host, Host]  # from, to


class NetworkFault(Injector):
    """Packets that `rules` match. `cut`: pairs that can no longer connect, first to second."""

    shows: tuple[str, ...] = ("TimeoutError",)  # how a probe may fail; empty: in any way

    def __init__(self, fault: str, cut: Sequence[Pair], rules: Sequence[tuple[Host, Rule]]) -> None:
        super().__init__(", ".join(f"{one.name} -> {other.name}" for one, other in cut))
        self.fault, self._cut, self._rules = fault, tuple(cut), tuple(rules)
        self._tables: list[tuple[Host, Table]] = []

    def _prepare(self) -> None:
        for one, other in self._cut:
            if (before := probe(one, other)).error:
                raise NotInjected(f"{one.name} does not reach {other.name} as it is: {before}")

    def _inject(self) -> str:
        self._set()
        return self._proof()

    def _heal(self) -> None:
        self._unset()
        for one, other in self._cut:
            connected = partial(_connected, one, other)
            see(connected, f"{one.name} reaching {other.name} after the fault", HEAL_TIMEOUT_S)

    def _set(self) -> None:
        for host in dict.fromkeys(host for host, _ in self._rules):
            rules = [rule for where, rule in self._rules if where is host]
            self._tables.append((host, host.run(partial(Table, rules))))

    def _unset(self) -> None:
        while self._tables:
            host, table = self._tables.pop()
            host.run(table.drop)

    def _proof(self) -> str:
        with ThreadPoolExecutor(len(self._cut)) as probes:
            answers = list(probes.map(lambda pair: probe(*pair), self._cut))
        felt = [self._felt(one, other, answer) for (one, other), answer in zip(self._cut, answers, strict=True)]
        counted = [
            f"{packets} packets {rule.hook} {rule.peer} {rule.verdict} at {host.name}"
            for host, table in self._tables
            for rule, packets in zip(table.rules, host.run(table.packets), strict=True)
        ]
        if missing := [each for each in counted if each.startswith("0 ")]:
            raise NotInjected(f"{self.fault}: rules that no packet matched: {'; '.join(missing)}")
        return "; ".join(felt + counted)

    def _felt(self, one: Host, other: Host, answer: Answer) -> str:
        """How a probe shows the fault; NotInjected if it does not."""
        if not answer.error or (self.shows and answer.error not in self.shows):
            raise NotInjected(f"{self.fault} is not felt: {one.name} to {other.name}: {answer}")
        return f"{one.name} to {other.name}: {answer}"


class Reset(NetworkFault):
    """TCP is answered by RST; open connections end with their next packet."""

    shows = ("ConnectionRefusedError", "ConnectionResetError")


class LinkDown(NetworkFault):
    """The switch's end of a host's link is down: the host has no carrier."""

    shows = ()

    def __init__(self, host: Host, others: Sequence[Host]) -> None:
        super().__init__("host-link-down", [(host, other) for other in others], [])
        self._host = host

    def _set(self) -> None:
        self._host.plug(up=False)

    def _unset(self) -> None:
        self._host.plug(up=True)

    def _proof(self) -> str:
        if self._host.has_carrier():
            raise NotInjected(f"{self.fault}: {self._host.name} still has a carrier")
        return f"{self._host.name}: eth0 has no carrier; {super()._proof()}"


def both_ways(host: Host, others: Sequence[Host]) -> list[Pair]:
    """The host to each other one, and back."""
    return [(host, other) for other in others] + [(other, host) for other in others]


def cut_off(host: Host, others: Sequence[Host]) -> NetworkFault:
    """Nothing passes between a host and others.

    The host's own rules come first, one after the other in its namespace. Were the others' first, it would be cut off
    from one of them well before the next: a namespace is entered by a thread of its own, late on a busy machine.
    """
    pairs = both_ways(host, others)
    rules = [(two, Rule("input", one.address, "drop")) for one, two in reversed(pairs)]
    return NetworkFault("host-cut-off", pairs, rules)


def one_way(fault: str, sources: Sequence[Host], targets: Sequence[Host]) -> NetworkFault:
    """Packets from the sources to the targets are dropped; those of the other direction arrive, and are counted."""
    pairs = [(source, target) for source in sources for target in targets]
    rules = [(target, Rule("input", source.address, "drop")) for source, target in pairs]
    rules += [(source, Rule("input", target.address, "count")) for source, target in pairs]
    return NetworkFault(
        fault, pairs + [(target, source) for source, target in pairs], rules
    )  # TCP takes both directions


def reset(host: Host, others: Sequence[Host]) -> NetworkFault:
    """Connections between a host and others are reset.

    Rules are at each sender: at the receivers, one's rule would catch the RST that answers the other.
    """
    pairs = both_ways(host, others)
    return Reset("host-reset", pairs, [(one, Rule("output", two.address, "reset")) for one, two in pairs])


def probe(one: Host, other: Host, timeout_s: float = PROBE_S) -> Answer:
    """Connect from one host to another's probe port."""
    answer = one.run(lambda: reach(other.address, PROBE_PORT, timeout_s))
    _take_all(other)
    return answer


def _take_all(host: Host) -> None:
    """Close the connections that the probes made: the port's backlog is finite."""
    while host.listener is not None:
        try:
            host.listener.accept()[0].close()
        except BlockingIOError:
            return


def _connected(one: Host, other: Host) -> bool:
    return not probe(one, other).error


@runtime_checkable
class Networked(Protocol):
    """A site whose hosts are namespaces."""

    network: Network


CUTS: dict[str, tuple[str, Callable[[Host, Sequence[Host]], Injector]]] = {
    "host-cut-off": ("nothing passes between it and the others", cut_off),
    "host-deaf": (
        "what others send does not reach it; what it sends arrives",
        lambda h, o: one_way("host-deaf", o, [h]),
    ),
    "host-mute": ("it sends in vain; what others send reaches it", lambda h, o: one_way("host-mute", [h], o)),
    "host-reset": ("connections with others are reset", reset),
    "host-link-down": ("its link is down", LinkDown),
}


def _make(fault: str, site: Site, victim: str, params: Params) -> Injector:
    """`victim`: "host NAME"; `from`: the others, comma-separated, or all."""
    name = victim.partition(" ")[2]
    if not isinstance(site, Networked) or name not in site.network.hosts:
        raise NotInjected(f"there is no {victim} in a namespace", hint="see chaos.faults.netns.Network")
    hosts = site.network.hosts
    others = str(params["from"]).split(",") if params["from"] else [other for other in hosts if other != name]
    if missing := [other for other in others if other not in hosts]:
        raise NotInjected(f"there is no host {', '.join(missing)} in a namespace")
    return CUTS[fault][1](hosts[name], [hosts[other] for other in others])


FAULTS = {
    name: Fault(
        about=f"a host in a network namespace: {about}", victims=("host",), heals=True, make=partial(_make, name),
        needs=("root", "nf_tables", "pyroute2"), params={"from": ""},
    )
    for name, (about, _) in CUTS.items()
}  # fmt: skip
