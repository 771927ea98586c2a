"""The recorder on a store that changes, goes away and forgets: what it writes is whole, or says what is missing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from chaos.check.checker import check_record
from chaos.check.evidence import Evidence, Outcome
from chaos.faults.base import Injected
from chaos.record.record import Changed, Header, InjectedFault, Read, read
from chaos.record.recorder import Recorder
from elastic.serve.etcd_server import EtcdServer
from membership.base.errors import SchemaError
from membership.store.codec import encode
from membership.store.etcd import connect
from membership.store.in_memory import MemoryStore
from membership.store.interface import Delete, Put, Store
from membership.store.keys import Keys
from membership.store.records import LeaderRecord, View
from tests.support.helpers import eventually

pytestmark = pytest.mark.contract

T = 30.0


def recorder_of(store: Store, name: str, etcd: EtcdServer) -> Recorder:
    now = time.time()
    header = Header(what="test", seed=1, started=now, wall=now - time.monotonic(), replay="", cluster=name)
    connecting = (lambda: store) if isinstance(store, MemoryStore) else (lambda: connect([etcd.url]))
    return Recorder(connecting, header, readers=2, reads_per_s=200.0)


def rows(recorder: Recorder) -> dict[str, Outcome]:
    return {row.title: row for row in check_record(recorder.lines()).outcomes}


def test_a_recorded_run_is_complete_and_read_back_as_written(
    store: Store, prefix: str, etcd: EtcdServer, tmp_path: Path
) -> None:
    name = prefix.split("/")[2]
    keys = Keys(name)
    store.put(keys.leader, encode(LeaderRecord(node="a", pid=1)))
    with recorder_of(store, name, etcd) as recorder:
        for epoch in range(1, 30):
            store.put(keys.next, encode(View(epoch=epoch)))
            store.txn((), [Put(keys.view, encode(View(epoch=epoch))), Delete(keys.next)])
            if epoch % 10 == 0:
                wait_reads(recorder, more_than=epoch)
        store.put(keys.heartbeats("a"), b"no record")
        fault = Injected(fault="kill", victim="etcd", at=1.0, seen_at=1.0, proof="none")
        recorder.injected(fault)
        recorder.healed(fault, 2.0)
    recorder.write(tmp_path / "record.jsonl")
    evidence = Evidence(read(tmp_path / "record.jsonl"))
    assert [r.number for r in evidence.revisions if r.put("view") is not None][-1] > 1
    views = [v.value["epoch"] for r in evidence.revisions if (v := r.put("view")) is not None]
    assert views == list(range(1, 30))
    assert evidence.observed[-1].key == keys.heartbeats("a")  # type: ignore[union-attr]
    assert evidence.observed[-1].value is None  # type: ignore[union-attr]
    assert evidence.faults == [InjectedFault(fault=fault, healed_at=2.0)]
    found = rows(recorder)
    assert (found["watch"].verdict, found["linearizable"].verdict) == ("held", "held")
    assert found["linearizable"].figures["clients"] == 2
    assert found["commits"].verdict == "held"


def test_an_outage_is_survived_and_a_compaction_leaves_a_recorded_gap(etcd: EtcdServer) -> None:
    store, keys = MemoryStore(), Keys("x")
    store.put(keys.leader, encode(LeaderRecord(node="a", pid=1)))
    store.put(keys.view, encode(View(epoch=1)))
    with recorder_of(store, "x", etcd) as recorder:
        for compacted in (False, True):
            store.outage = True
            wait_unread(recorder, more_than=recorder.unread)
            with store._changed:  # no watcher may look in between
                store.outage = False
                for epoch in (2, 3):
                    store.put(keys.view, encode(View(epoch=epoch)))
                if compacted:
                    store.compact(store.put(keys.view, encode(View(epoch=4))))
            eventually(lambda: latest(recorder) == store.range("")[0], T, "all to be recorded")
    found = rows(recorder)
    assert found["watch"].verdict == "held"
    assert found["watch"].figures == {"gaps": 1}
    assert found["linearizable"].verdict == "held"


def latest(recorder: Recorder) -> int:
    """The latest revision that was recorded."""
    return max(line.revision for line in recorder.lines() if isinstance(line, Changed))


def wait_reads(recorder: Recorder, more_than: int) -> None:
    """Until this many reads were answered, and each reader has had one."""

    def answered() -> bool:
        reads = [line for line in recorder.lines() if isinstance(line, Read)]
        return len(reads) > more_than and len({read.client for read in reads}) == 2

    eventually(answered, T, "reads")


def wait_unread(recorder: Recorder, more_than: int) -> None:
    """Until this many reads were not answered."""
    eventually(lambda: recorder.unread > more_than, T, "a read that is not answered")


def test_a_store_that_ends_leaves_a_gap_at_the_end(etcd: EtcdServer) -> None:
    store = MemoryStore()
    store.put(Keys("x").view, encode(View(epoch=1)))
    with recorder_of(store, "x", etcd) as recorder:
        store.outage = True
    gap = Evidence(recorder.lines()).gaps[-1]
    assert (gap.until, gap.after) == (0, 2)
    assert "outage" in gap.why


def test_what_cannot_be_read_is_raised_when_the_run_ends(etcd: EtcdServer) -> None:
    store = MemoryStore()
    recorder = recorder_of(store, "x", etcd)
    recorder.__enter__()
    store.put(Keys("x").view, b"no record")
    eventually(lambda: recorder._failure, T, "the watch to find it")
    with pytest.raises(SchemaError, match="view cannot be read"):
        recorder.__exit__(None)
