"""The soak over hosts: what is drawn, which rules a fault of a link is, and what its receipt calls broken."""

from __future__ import annotations

from itertools import islice, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.campaigns.host_bursts import (
    ENDS,
    ETCD,
    NETWORK,
    OF_HOSTS,
    OF_LINKS,
    PASSES,
    PHASES,
    Cell,
    HostFault,
    HostFaultKind,
    bursts,
    matrix,
)
from chaos.campaigns.host_faults import rules
from chaos.campaigns.host_soak import HostSoak, last_read_s, starved
from chaos.cli.endurance import clear
from chaos.faults.base import Injected
from chaos.faults.nftables import Rule
from chaos.record.record import AnyLine, Read
from chaos.workload.history import RequestRecord

pytestmark = pytest.mark.unit

HOSTS = ("a", "b", "c")
ADDRESSES = {"a": "1", "b": "2", "c": "3", ETCD: "4"}
WHOLE = RequestRecord(prompt=0, started=0.0, tokens=("a", "b"), token_times=(0.1, 0.2), finish_reason="length")
CUT = HostFault(HostFaultKind.CUT, "a", "b")
SEEN = Injected(fault="cut", victim="host a", at=0.0, seen_at=0.1, proof="7 packets met the rules")


@given(st.integers(0, 10_000))
def test_what_is_drawn(seed: int) -> None:
    drawn = list(islice(bursts(seed, HOSTS, "c", [ETCD]), 2 * len(HostFaultKind)))
    assert drawn == list(islice(bursts(seed, HOSTS, "c", [ETCD]), len(drawn)))
    firsts = [burst.faults[0].kind for burst in drawn]
    assert sorted(firsts[: len(HostFaultKind)]) == sorted(firsts[len(HostFaultKind) :]) == sorted(HostFaultKind)
    for fault in (fault for burst in drawn for fault in burst.faults):
        assert fault.host in HOSTS
        assert fault.host != "c" or fault.kind not in OF_HOSTS, "clients' streams would end with their gateway"
        assert bool(fault.peer) == (fault.kind in OF_LINKS)
        assert fault.peer != fault.host
        assert (fault.hold_s == 0) == (fault.kind in ENDS)


def test_the_matrix_has_each_fault_of_a_network_in_each_phase_and_repeats_only_what_is_missing() -> None:
    every, done = set(product(NETWORK, PHASES)), set[Cell]()
    drawn = list(matrix(1, HOSTS, "c", [ETCD], done))
    assert len(drawn) == PASSES * len(every)
    missing = (HostFaultKind.RESET, PHASES[0])
    met: list[Cell] = []
    for burst in matrix(1, HOSTS, "c", [ETCD], done):
        (fault,) = burst.faults
        assert fault.hold_s >= 4.0, "the phase falls into it"
        met.append((fault.kind, burst.phase))
        done |= {met[-1]} - {missing}
    assert set(met[: len(every)]) == every
    assert met[len(every) :] == [missing] * (PASSES - 1)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (CUT, {("b", Rule("input", "1", "drop")), ("a", Rule("input", "2", "drop"))}),
        (HostFault(HostFaultKind.MUTE, "a", ETCD), {(ETCD, Rule("input", "1", "drop"))}),
        (
            HostFault(HostFaultKind.LOSSY, "c", "b"),
            {("b", Rule("input", "3", "lose")), ("c", Rule("input", "2", "lose"))},
        ),
        (
            HostFault(HostFaultKind.RESET, "a", "c"),
            {("a", Rule("output", "3", "reset")), ("c", Rule("output", "1", "reset"))},
        ),
        (
            HostFault(HostFaultKind.ISOLATE, "a"),
            {("a", Rule("input", other, "drop")) for other in ("2", "3", "4")}
            | {(other, Rule("input", "1", "drop")) for other in ("b", "c", ETCD)},
        ),
        (
            HostFault(HostFaultKind.DIVIDE, "a"),
            {("a", Rule("input", other, "drop")) for other in ("2", "3")}
            | {(other, Rule("input", "1", "drop")) for other in ("b", "c")},
        ),
    ],
)
def test_which_packets_a_fault_drops(fault: HostFault, expected: set[tuple[str, Rule]]) -> None:
    assert set(rules(fault, ADDRESSES)) == expected


@pytest.mark.parametrize("kind", [HostFaultKind.ISOLATE, HostFaultKind.DIVIDE])
def test_a_host_hears_none_of_the_others_from_one_moment_on(kind: HostFaultKind) -> None:
    """Were the others' rules first, it would be cut off from one of them well before the next."""
    others = len(ADDRESSES) - 1 - (kind is HostFaultKind.DIVIDE)
    found = dict.fromkeys(at for at, _ in rules(HostFault(kind, "b"), ADDRESSES))
    assert next(iter(found)) == "b"
    assert len(found) == 1 + others


def finished(*history: RequestRecord, faults: int = 1) -> HostSoak:
    return HostSoak(
        seed=1, hosts=HOSTS, injected=[(CUT, SEEN)] * faults, oracle={0: WHOLE}, history=list(history or [WHOLE]),
        converged_ms=[900.0, 11_000.0],
    )  # fmt: skip


def test_a_good_run() -> None:
    receipt = finished().receipt()
    assert receipt.ok, receipt.broken
    assert (receipt.hosts, receipt.faults, receipt.kinds, receipt.late) == (3, 1, {"cut": 1}, 1)


def test_a_run_that_broke_says_whether_its_store_had_a_processor() -> None:
    def reads(took_s: float, number: int) -> list[AnyLine]:
        return [Read(client="a", began=float(at), ended=at + took_s, revision=1) for at in range(number)]

    assert last_read_s([]) == 0.0
    assert starved(last_read_s(reads(0.1, 60))) == []
    assert starved(last_read_s(reads(0.1, 60) + reads(3.0, 15))) == [], "a stop of etcd is a fault like others"
    (said,) = starved(last_read_s(reads(0.1, 600) + reads(2.5, 30)))
    assert said == "etcd had no processor or disk: a read took 2.5 s in the end, and a lease lasts 3 s"


def test_what_breaks_it() -> None:
    refused = RequestRecord(prompt=0, started=0.0, error="HTTP 503: later", status=503)
    assert "1 requests were refused, though every expert came back in time" in finished(refused).receipt().broken
    assert finished(faults=0).receipt().broken == ("no fault was injected",)
    partial = finished()
    partial.matrix, partial.cells = True, set(product(NETWORK, PHASES)) - {(HostFaultKind.CUT, PHASES[1])}
    assert partial.receipt().broken == ("cut during drain was not seen to happen",)
    altered = finished(RequestRecord(prompt=0, started=0.0, tokens=("a", "x"), finish_reason="length"))
    assert "token 1" in " ".join(altered.receipt().broken)


def test_the_logs_of_a_run_that_broke_are_kept(tmp_path: Path) -> None:
    altered = RequestRecord(prompt=0, started=0.0, tokens=("a", "x"), finish_reason="length")
    unended = finished()
    unended.troubles.append("no full strength within 120 s")
    for number, (run, kept) in enumerate([(finished(), False), (finished(altered), True), (unended, True)]):
        folder = tmp_path / str(number)
        (folder / "a" / "logs").mkdir(parents=True)
        clear(folder, run)
        assert folder.exists() == kept


def test_a_machine_that_can_have_no_hosts_is_left_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    clear(folder, HostSoak(seed=1, hosts=HOSTS))
    assert not folder.exists()
