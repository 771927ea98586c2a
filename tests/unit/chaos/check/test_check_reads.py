"""The one pass over reads finds what a search through all orders finds; what falls into a gap is not checked."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from chaos.check.checker import check_record
from chaos.check.evidence import Evidence, run
from chaos.check.reads import Reads
from chaos.record.record import AnyLine, Changed, Gap, Header, Read
from chaos.record.recorder import Observed, look
from membership.base.errors import StoreCompacted
from membership.store.codec import encode
from membership.store.in_memory import MemoryStore
from membership.store.keys import Keys
from membership.store.records import LeaderRecord, View
from tests.support.recorded_run import good_lines

pytestmark = pytest.mark.unit

KEYS = Keys("x")
HEADER = Header(what="", seed=0, started=0.0, wall=0.0, replay="", cluster="x")


def change(revision: int, at: float) -> Changed:
    """The view of a revision: its epoch is the revision."""
    value = {"epoch": revision}
    return Changed(
        revision=revision, key=KEYS.view, at=at, create_revision=2, version=revision - 1, value=value,
    )  # fmt: skip


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Changed], list[Read]]:
    """A few changes, observed at some time each, and reads by two clients, most of which say what was so."""
    observed = sorted(draw(st.lists(st.integers(0, 6), max_size=3)))
    changes = [change(number + 2, float(at)) for number, at in enumerate(observed)]
    reads: list[Read] = []
    for client in ("a", "b"):
        now = 0
        for _ in range(draw(st.integers(0, 2))):
            began = now + draw(st.integers(0, 3))
            now = began + draw(st.integers(0, 3))
            revision = draw(st.integers(1, len(changes) + 1))
            seen = revision if draw(st.integers(0, 9)) else draw(st.integers(1, len(changes) + 1))
            seen = 0 if seen == 1 else seen
            reads.append(Read(client=client, began=began, ended=now, revision=revision, epoch=seen, view_revision=seen))
    return changes, reads


def explained(changes: Sequence[Changed], reads: Sequence[Read]) -> bool:
    """Whether some order of all of it is legal: each in its time, each read after the revision that it names."""

    def first(read: Read, left: Sequence[Read], undone: Sequence[Changed]) -> bool:
        """Whether nothing that is left must come before the read; a client's reads are in order."""
        mine = next(other for other in left if other.client == read.client)
        earlier = [other for other in left if other.ended < read.began]
        return mine is read and not earlier and not any(change.at < read.began for change in undone)

    def search(done: int, left: tuple[Read, ...]) -> bool:
        if not left:
            return True
        undone = changes[done:]
        now = (changes[done - 1].revision, done + 1, done + 1) if done else (1, 0, 0)
        for read in left:
            legal = (read.revision, read.view_revision, read.epoch) == now
            if legal and first(read, left, undone) and search(done, tuple(r for r in left if r is not read)):
                return True
        return bool(undone) and search(done + 1, left)

    return search(0, tuple(reads))


@settings(max_examples=200, deadline=None)
@given(histories())
def test_one_pass_finds_what_a_search_finds(history: tuple[list[Changed], list[Read]]) -> None:
    changes, reads = history
    base = Changed(revision=1, key=KEYS.config, at=0.0, listed=True)
    (outcome,) = run(Evidence([HEADER, base, *changes, *reads]), Reads)
    assert outcome.judged == len(reads)
    assert (outcome.broken == 0) == explained(changes, reads), outcome


def test_a_search_finds_both() -> None:
    """The reference itself distinguishes good from bad."""
    changes = [change(2, 1.0), change(3, 2.0)]
    good = Read(client="a", began=3.0, ended=4.0, revision=3, epoch=3, view_revision=3)
    assert explained(changes, [good])
    assert not explained(changes, [replace(good, revision=2, epoch=2, view_revision=2)])  # observed before it began
    assert not explained(changes, [replace(good, epoch=2)])
    early = replace(good, client="b", began=0.0, ended=0.5, revision=2, epoch=2, view_revision=2)
    assert explained(changes, [good, early])
    newer = replace(good, began=0.0, ended=0.5)
    assert not explained(changes, [newer, replace(early, began=0.6, ended=0.7)])


def test_a_compaction_leaves_a_gap_and_nothing_in_it_is_checked() -> None:
    store, observed = MemoryStore(), Observed(KEYS.prefix)
    lines: list[AnyLine] = [HEADER]

    def read(at: float) -> None:
        lines.append(replace(look(store, KEYS, "a", lambda: at), ended=at + 0.1))

    store.put(KEYS.view, encode(View(epoch=1)))
    lines += observed.listed(*store.range(KEYS.prefix), at=0.0)
    read(0.5)
    store.put(KEYS.leader, encode(LeaderRecord(node="a", pid=1)))
    lines += observed.watched(watched(store, observed.revision), 1.0)
    for epoch in (2, 3):
        store.put(KEYS.view, encode(View(epoch=epoch)))
        read(float(epoch))
    store.delete(KEYS.leader)
    revision = store.put(KEYS.view, encode(View(epoch=4)))
    store.compact(revision)
    with pytest.raises(StoreCompacted):
        store.watch(KEYS.prefix, observed.revision).next(0.0)
    lines += observed.listed(*store.range(KEYS.prefix), at=5.0, why="compacted")
    read(6.0)
    store.put(KEYS.view, encode(View(epoch=5)))
    lines += observed.watched(watched(store, observed.revision), 7.0)
    read(8.0)

    evidence = Evidence(lines)
    assert evidence.gaps == [Gap(at=5.0, after=3, until=revision, why="compacted")]
    assert [(c.key, c.deleted) for c in evidence.observed if isinstance(c, Changed) and c.at == 5.0] == [
        (KEYS.view, False), (KEYS.leader, True),
    ]  # fmt: skip
    rows = {row.title: row for row in check_record(lines).outcomes}
    assert rows["linearizable"].verdict == "held"
    assert rows["linearizable"].judged == 3  # of five
    assert rows["watch"].verdict == "held"
    assert rows["watch"].figures == {"gaps": 1}
    assert rows["commits"].judged == 1  # epoch 1 and 4 were listed, 2 and 3 never seen
    observed_again = [replace(line, listed=False) if isinstance(line, Changed) else line for line in lines]
    assert {row.title: row for row in check_record(observed_again).outcomes}["watch"].verdict == "broken"


def watched(store: MemoryStore, since: int):  # type: ignore[no-untyped-def]
    """What a watch reports that resumes where the last one stopped."""
    return store.watch(KEYS.prefix, since).next(0.0)


def test_what_was_observed_twice_is_kept_once() -> None:
    store, observed = MemoryStore(), Observed(KEYS.prefix)
    store.put(KEYS.leader, encode(LeaderRecord(node="a", pid=1)))
    store.delete(KEYS.leader)
    batch = watched(store, 1)
    assert len(observed.watched(batch, 1.0)) == 2
    assert observed.watched(batch, 2.0) == []
    assert observed.has(*store.range(KEYS.prefix))


def test_reads_after_the_last_event_of_a_broken_watch_are_not_checked() -> None:
    lines = [line for line in good_lines() if not (isinstance(line, Changed) and line.revision > 60)]
    rows = {row.title: row for row in check_record(lines).outcomes}
    assert rows["linearizable"].verdict == "broken"  # it looks as if the reads were wrong
    rows = {row.title: row for row in check_record([*lines, Gap(at=2000.0, after=60, why="lost")]).outcomes}
    assert rows["linearizable"].verdict == "held"
