"""Rules of nftables in a network namespace, over netlink: packets that a fault drops, resets, loses or counts.

Each fault has a table of its own: a packet must pass all tables, and deleting a table deletes its rules. pyroute2
talks to the kernel; the program `nft` is not needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, Literal

import msgspec

from chaos.faults.netns import netlink

LOST_OF = 20  # of so many packets a lossy rule drops one: 5 %
IPV4 = 2  # NFPROTO_IPV4
DROP, ACCEPT = 0, 1
META_L4PROTO, TCP, TCP_RST, RANDOM = 16, b"\x06", 1, 1
Expression = dict[str, Any]

_numbers = itertools.count(1)


class Rule(msgspec.Struct, frozen=True):
    """What happens to packets from a peer (`input`) or to a peer (`output`)."""

    hook: Literal["input", "output"]
    peer: str  # IPv4 address
    verdict: Literal["drop", "reset", "count", "lose"]  # lose: one of LOST_OF, at random


class Table:
    """Rules in force. All methods must be called in the namespace of the rules; NotInjected if the kernel refuses."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self.name = f"chaos{next(_numbers)}"
        with _nftables() as nft:
            nft.table("add", name=self.name)
            try:
                for hook in sorted({rule.hook for rule in rules}):
                    nft.chain("add", table=self.name, name=hook, hook=hook, type="filter", policy=ACCEPT)
                for rule in rules:
                    nft.rule("add", table=self.name, chain=rule.hook, expressions=_expressions(rule))
            except BaseException:
                nft.table("del", name=self.name)
                raise

    def packets(self) -> tuple[int, ...]:
        """Number of packets that each rule has acted on."""
        with _nftables() as nft:
            found = [rule for rule in nft.get_rules() if rule.get_attr("NFTA_RULE_TABLE") == self.name]
        counted: dict[str, list[int]] = {"input": [], "output": []}
        for rule in found:
            for expression in rule.get_attr("NFTA_RULE_EXPRESSIONS"):
                if expression.get_attr("NFTA_EXPR_NAME") == "counter":
                    data = expression.get_attr("NFTA_EXPR_DATA")
                    counted[rule.get_attr("NFTA_RULE_CHAIN")].append(int(data.get_attr("NFTA_COUNTER_PACKETS")))
        return tuple(counted[rule.hook].pop(0) for rule in self.rules)

    def drop(self) -> None:
        """Delete the rules."""
        with _nftables() as nft:
            nft.table("del", name=self.name)


@contextmanager
def _nftables() -> Iterator[Any]:
    with netlink("rules of nftables"):
        from pyroute2.nftables.main import NFTables

        with closing(NFTables(nfgen_family=IPV4)) as found:
            yield found


def _expressions(rule: Rule) -> Sequence[Sequence[Expression]]:
    from pyroute2.nftables.expressions import genex, ipv4addr, verdict

    address = ipv4addr(src=rule.peer) if rule.hook == "input" else ipv4addr(dst=rule.peer)
    counter = [genex("counter", {"bytes": 0, "packets": 0})]
    if rule.verdict == "reset":
        is_tcp = {"attrs": [("NFTA_DATA_VALUE", TCP)]}
        tcp = [genex("meta", {"key": META_L4PROTO, "dreg": 1}), genex("cmp", {"sreg": 1, "op": 0, "data": is_tcp})]
        return tcp, address, counter, [genex("reject", {"type": TCP_RST})]
    if rule.verdict == "lose":
        drawn = {"DREG": 1, "MODULUS": LOST_OF, "TYPE": RANDOM, "OFFSET": 0}
        draw = {"attrs": [(f"NFTA_NG_{name}", value) for name, value in drawn.items()]}
        chosen = {"attrs": [("NFTA_DATA_VALUE", bytes(4))]}
        loss = [{"attrs": [("NFTA_EXPR_NAME", "numgen"), ("NFTA_EXPR_DATA", draw)]}]
        return address, [*loss, genex("cmp", {"sreg": 1, "op": 0, "data": chosen})], counter, verdict(DROP)
    return (address, counter, verdict(DROP)) if rule.verdict == "drop" else (address, counter)
