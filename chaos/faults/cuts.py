"""Faults between hosts in namespaces: packets dropped, one way or both, reset, or the link down. Probes show each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol, TypeVar, runtime_checkable

from chaos.faults.base import Injected, Injector, NotInjected, Site
from chaos.faults.fault import Fault, Params
from chaos.faults.netns import PROBE_PORT, Host, Network, inside, ip
from chaos.faults.nftables import Rule, Table
from chaos.faults.probe import Answer, reach
from membership.base.errors import ElasticError

PROBE_S = 0.3
HEAL_TIMEOUT_S = 10.0
T = TypeVar("T")
Pair = tuple[Host, Host]  # from, to


class NetworkFault:
    """Packets that `rules` match. `cut`: pairs that can no longer connect, first to second."""

    fault = ""

    def __init__(self, cut: Sequence[Pair], rules: Sequence[tuple[Host, Rule]]) -> None:
        self._cut, self._rules = tuple(cut), tuple(rules)
        self._tables: list[tuple[Host, Table]] = []
        self._dealt = False

    @property
    def victim(self) -> str:
        """Who is cut off from whom."""
        return ", ".join(f"{one.name} -> {other.name}" for one, other in self._cut)

    def inject(self) -> Injected:
        """Deal it and see by probes that it happened; NotInjected, and nothing left of it, if it did not."""
        for one, other in self._cut:
            if (before := probe(one, other)).error:
                raise NotInjected(f"{one.name} does not reach {other.name} as it is: {before}")
        at, self._dealt = time.time(), True
        try:
            self._deal()
            proof = self._proof()
        except BaseException:
            self.heal()
            raise
        return Injected(fault=self.fault, victim=self.victim, at=at, seen_at=time.time(), proof=proof)

    def heal(self) -> None:
        """Take it back and see that probes pass again."""
        if not self._dealt:
            return
        self._undo()
        deadline = time.monotonic() + HEAL_TIMEOUT_S
        for one, other in self._cut:
            while (answer := probe(one, other)).error:
                if time.monotonic() > deadline:
                    raise NotInjected(f"{one.name} does not reach {other.name} after the fault: {answer}")
        self._dealt = False

    def _deal(self) -> None:
        for host in dict.fromkeys(host for host, _ in self._rules):
            rules = [rule for where, rule in self._rules if where is host]
            self._tables.append((host, _there(host, partial(Table, rules))))

    def _undo(self) -> None:
        while self._tables:
            host, table = self._tables.pop()
            _there(host, table.drop)

    def _proof(self) -> str:
        with ThreadPoolExecutor(len(self._cut)) as probes:
            answers = list(probes.map(lambda pair: probe(*pair), self._cut))
        said = [self._felt(one, other, answer) for (one, other), answer in zip(self._cut, answers, strict=True)]
        counted = [
            f"{packets} packets {rule.hook} {rule.peer} {rule.verdict} at {host.name}"
            for host, table in self._tables
            for rule, packets in zip(table.rules, _there(host, table.packets), strict=True)
        ]
        if missing := [each for each in counted if each.startswith("0 ")]:
            raise NotInjected(f"{self.fault}: rules that nothing met: {'; '.join(missing)}")
        return "; ".join(said + counted)

    def _felt(self, one: Host, other: Host, answer: Answer) -> str:
        if answer.error != "TimeoutError":
            raise NotInjected(f"{self.fault}: {one.name} to {other.name}: {answer}, not silence")
        return f"{one.name} to {other.name}: {answer}"


class Drop(NetworkFault):
    """Nothing passes between a host and others."""

    fault = "host-cut-off"

    def __init__(self, host: Host, others: Sequence[Host]) -> None:
        pairs = [(host, other) for other in others]
        pairs += [(other, host) for other in others]
        super().__init__(pairs, [(two, Rule("input", one.address, "drop")) for one, two in pairs])


class OneWay(NetworkFault):
    """What the sources send does not arrive at the targets; what the targets send arrives, and that is counted too."""

    def __init__(self, fault: str, sources: Sequence[Host], targets: Sequence[Host]) -> None:
        self.fault = fault
        pairs = [(source, target) for source in sources for target in targets]
        back = [(target, source) for source, target in pairs]
        rules = [(target, Rule("input", source.address, "drop")) for source, target in pairs]
        rules += [(source, Rule("input", target.address, "count")) for source, target in pairs]
        super().__init__(pairs + back, rules)  # neither can connect to the other: that takes both ways


class Reset(NetworkFault):
    """TCP between a host and others is answered by RST; connections that are open end with their next packet."""

    fault = "host-reset"

    def __init__(self, host: Host, others: Sequence[Host]) -> None:
        pairs = [(host, other) for other in others]
        pairs += [(other, host) for other in others]
        # At each sender: at the receiver, the RST for one would be held back by the rule of the other.
        super().__init__(pairs, [(one, Rule("output", two.address, "reset")) for one, two in pairs])

    def _felt(self, one: Host, other: Host, answer: Answer) -> str:
        if answer.error not in ("ConnectionRefusedError", "ConnectionResetError"):
            raise NotInjected(f"{self.fault}: {one.name} to {other.name}: {answer}, no reset")
        return f"{one.name} to {other.name}: {answer}"


class LinkDown(NetworkFault):
    """The switch's end of a host's link is down: the host has no carrier."""

    fault = "host-link-down"

    def __init__(self, host: Host, others: Sequence[Host]) -> None:
        super().__init__([(host, other) for other in others], [])
        self._host = host

    def _deal(self) -> None:
        self._set("down")

    def _undo(self) -> None:
        self._set("up")

    def _set(self, how: str) -> None:
        network = self._host.network
        ip("-n", network.switch, "link", "set", network.port(self._host), how)

    def _proof(self) -> str:
        said = ip("-n", self._host.namespace, "-brief", "link", "show", "dev", "eth0").split()
        if "NO-CARRIER" not in "".join(said):
            raise NotInjected(f"{self.fault}: {self._host.name} still has a carrier: {' '.join(said)}")
        return "; ".join([f"{self._host.name}: {' '.join(said)}", super()._proof()])

    def _felt(self, one: Host, other: Host, answer: Answer) -> str:
        if not answer.error:
            raise NotInjected(f"{self.fault}: {one.name} still reaches {other.name}")
        return f"{one.name} to {other.name}: {answer}"


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


def _there(host: Host, work: Callable[[], T]) -> T:
    try:
        return inside(host.namespace, work)
    except ElasticError:
        raise
    except Exception as error:  # pyroute2's own, which say what the kernel said
        raise NotInjected(f"nftables in {host.namespace}: {error}") from error


@runtime_checkable
class Networked(Protocol):
    """A site whose hosts are namespaces."""

    network: Network


CUTS: dict[str, tuple[str, Callable[[Host, Sequence[Host]], Injector]]] = {
    "host-cut-off": ("nothing passes between it and the others", Drop),
    "host-deaf": (
        "what others send does not reach it; what it sends arrives",
        lambda h, o: OneWay("host-deaf", o, [h]),
    ),
    "host-mute": ("what it sends does not arrive; it hears the others", lambda h, o: OneWay("host-mute", [h], o)),
    "host-reset": ("connections with others are reset", Reset),
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
        needs=("root", "iproute2", "nf_tables", "pyroute2"), params={"from": ""},
    )
    for name, (about, _) in CUTS.items()
}  # fmt: skip
