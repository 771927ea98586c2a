"""Faults between hosts in namespaces: packets dropped, one way or both, reset, or the link down. Probes show each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from chaos.inject.base import Injected, NotInjected
from chaos.inject.netns import PROBE_PORT, Host, inside, ip
from chaos.inject.nftables import Rule, Table
from chaos.inject.probe import Answer, reach
from membership.errors import ElasticError

PROBE_S = 0.3
HEAL_TIMEOUT_S = 10.0
T = TypeVar("T")
Pair = tuple[Host, Host]  # from, to


class NetworkFault:
    """Packets that `rules` match. `cut`: pairs that can no longer connect, first to second."""

    fault = "net-drop"

    def __init__(self, cut: Sequence[Pair], rules: Sequence[tuple[Host, Rule]]) -> None:
        self._cut, self._rules = tuple(cut), tuple(rules)
        self._tables: list[tuple[Host, Table]] = []

    @property
    def victim(self) -> str:
        """Who is cut off from whom."""
        return ", ".join(f"{one.name} -> {other.name}" for one, other in self._cut)

    def inject(self) -> Injected:
        """Deal it and see by probes that it happened; NotInjected, and nothing left of it, if it did not."""
        for one, other in self._cut:
            if (before := probe(one, other)).error:
                raise NotInjected(f"{one.name} does not reach {other.name} as it is: {before}")
        at = time.time()
        try:
            self._deal()
            proof = self._proof()
        except BaseException:
            self._undo()
            raise
        return Injected(fault=self.fault, victim=self.victim, at=at, seen_at=time.time(), proof=proof)

    def heal(self) -> None:
        """Take it back and see that probes pass again."""
        self._undo()
        deadline = time.monotonic() + HEAL_TIMEOUT_S
        for one, other in self._cut:
            while (answer := probe(one, other)).error:
                if time.monotonic() > deadline:
                    raise NotInjected(f"{one.name} does not reach {other.name} after the fault: {answer}")

    def _deal(self) -> None:
        for host in dict.fromkeys(host for host, _ in self._rules):
            rules = [rule for where, rule in self._rules if where is host]
            self._tables.append((host, _there(host, partial(Table, rules))))

    def _undo(self) -> None:
        while self._tables:
            host, table = self._tables.pop()
            _there(host, table.drop)

    def _proof(self) -> str:
        said = [self._felt(one, other, probe(one, other)) for one, other in self._cut]
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
    """Nothing passes between two hosts."""

    def __init__(self, one: Host, other: Host) -> None:
        rules = [(one, Rule("input", other.address, "drop")), (other, Rule("input", one.address, "drop"))]
        super().__init__([(one, other), (other, one)], rules)


class OneWay(NetworkFault):
    """What one host sends does not arrive at the other; what the other sends arrives, and that is counted too."""

    fault = "net-one-way"

    def __init__(self, source: Host, target: Host) -> None:
        rules = [(target, Rule("input", source.address, "drop")), (source, Rule("input", target.address, "count"))]
        super().__init__([(source, target), (target, source)], rules)  # neither can connect: that takes both ways


class Reset(NetworkFault):
    """TCP between two hosts is answered by RST, both ways; connections that are open end with their next packet."""

    fault = "net-reset"

    def __init__(self, one: Host, other: Host) -> None:
        # At each sender: at the receiver, the RST for one would be held back by the rule of the other.
        rules = [(one, Rule("output", other.address, "reset")), (other, Rule("output", one.address, "reset"))]
        super().__init__([(one, other), (other, one)], rules)

    def _felt(self, one: Host, other: Host, answer: Answer) -> str:
        if answer.error not in ("ConnectionRefusedError", "ConnectionResetError"):
            raise NotInjected(f"{self.fault}: {one.name} to {other.name}: {answer}, no reset")
        return f"{one.name} to {other.name}: {answer}"


class LinkDown(NetworkFault):
    """The switch's end of a host's link is down: the host has no carrier."""

    fault = "net-link-down"

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
