"""Linearizability of the membership, checked by the store's revisions: what reads and the watch said fits one order.

To decide whether a history of reads and writes is linearizable one has in general to search for an order that explains
it: NP-complete (Gibbons and Korach, 1997), and what Knossos and Porcupine do. Here no order has to be searched for. The
store names it itself: every answer carries its revision, and the watch delivers every write with its own. So it is
enough to see that this one order is legal, which takes one pass; etcd's own robustness tests order operations by
revision for the same reason. The order is legal if

* the watch is whole: revisions rise, and each key's version says that no change of it is missing,
* each read says what the writes up to its revision have made of the keys (the state is replayed beside the reads), and
* no read is older than what was certainly known before it began: than a read that had ended by then, or a change that
  the watch had delivered by then. A change is made before it is delivered, so this is sound. The other direction (a
  read of a change before it was made) shows as a read that ended before another, older one began.

These three are also sufficient: put the writes at their revisions, each read after the write it names and, among
equals, in the order in which they began: then no two that did not overlap are the wrong way round. A store that answers
right but names a wrong revision is found as well: clients that compare revisions would be misled.
`test_check_reads.py` holds this against a search through all orders. Reads in a gap are not checked.
"""

from __future__ import annotations

from chaos.check.evidence import Check, Evidence, Keyspace, Revision, epoch_of
from chaos.record.record import Changed, Read


class Watch(Check):
    """The watch missed nothing and kept the order."""

    promise, title = "G1", "watch"
    _last: Revision | None = None

    def revision(self, before: Keyspace, revision: Revision) -> None:
        last, self._last = self._last, revision
        if revision.listed:
            return
        self.judged += 1
        if last is not None and revision.number <= last.number:
            self.found(f"the watch delivered revision {revision.number} after {last.number}", last, revision)
        for name, changed in revision.changes.items():
            _follows(self, before.get(name), changed)

    def finish(self) -> None:
        self.figures["gaps"] = len(self.evidence.gaps)


class Reads(Check):
    """Each read returns the state at its revision, and none is older than what was known when it began."""

    promise, title = "G1", "linearizable"

    def __init__(self, evidence: Evidence) -> None:
        super().__init__(evidence)
        self._reads = _without_gaps(evidence)
        self._left = sorted(self._reads, key=lambda read: read.revision)[::-1]  # taken from the end
        self._state: Keyspace = {}

    def revision(self, before: Keyspace, revision: Revision) -> None:
        """Replay the changes beside the reads, both in the order of revisions."""
        self._state = before
        self._compare(until=revision.number)

    def finish(self) -> None:
        self._compare()  # the state has the last revision by now
        self.judged = len(self._reads)
        self.figures |= {"reads": self.judged, "clients": len({read.client for read in self._reads})}
        _recent(self, self.evidence, self._reads)

    def _compare(self, until: float = float("inf")) -> None:
        while self._left and self._left[-1].revision < until:
            _compare(self, self._left.pop(), self._state)


def _follows(check: Check, old: Changed | None, new: Changed) -> None:
    """A change follows from what the key was before; else something is missing between."""
    if new.deleted:
        if old is None:
            check.found(f"the watch delivered the deletion of {new.key}, and never its creation", new)
        return
    fresh = old is None and (new.version, new.create_revision) == (1, new.revision)
    again = old is not None and (new.version, new.create_revision) == (old.version + 1, old.create_revision)
    if not (fresh or again):
        was = f"version {old.version}" if old is not None else "not there"
        now = f"version {new.version} of what was made at revision {new.create_revision}"
        check.found(f"the watch missed a change of {new.key}: it was {was}, then {now}", old, new)


def _without_gaps(evidence: Evidence) -> list[Read]:
    """The reads of revisions at which all keys are known, in the order of the record (each client's is its own)."""
    first = evidence.revisions[0].number if evidence.revisions else 0
    listed = [r.number for r in evidence.revisions if r.listed]
    spans = [(gap.after, gap.until or float("inf")) for gap in evidence.gaps]
    if listed and evidence.revisions[0].listed:  # the first listing is as of its latest change
        head = next((i for i, r in enumerate(evidence.revisions) if not r.listed), len(evidence.revisions))
        first = evidence.revisions[head - 1].number
    reads = [read for read in evidence.reads if read.revision >= first]
    return [read for read in reads if not any(after < read.revision < until for after, until in spans)]


def _compare(check: Check, read: Read, state: Keyspace) -> None:
    """The keys that a read returned, against the state at its revision."""
    view, leader, staged = state.get("view"), state.get("leader"), state.get("next")
    was = Read(
        client="", began=0.0, ended=0.0, revision=0,
        epoch=epoch_of(view),
        view_revision=view.revision if view is not None else 0,
        leader_revision=leader.create_revision if leader is not None else 0,
        next_revision=staged.revision if staged is not None else 0,
    )  # fmt: skip
    for key, said, true in zip(("view", "leader", "next"), _in_words(read), _in_words(was), strict=True):
        if said != true:
            what = f"{read.client} read, as of revision {read.revision}, that the {key} was {said}, where it was {true}"
            return check.found(what, state.get(key), read)


def _in_words(read: Read) -> tuple[str, str, str]:
    """The view, the leader and the staged view of a read."""
    leader = f"token {read.leader_revision}" if read.leader_revision else "none"
    staged = f"that of revision {read.next_revision}" if read.next_revision else "none"
    return f"epoch {read.epoch} of revision {read.view_revision}", leader, staged


def _recent(check: Check, evidence: Evidence, reads: list[Read]) -> None:
    """One sweep over time: the highest revision known when each read began, and the read or change that showed it."""
    known: list[tuple[float, int, Read | Changed]] = [(read.ended, read.revision, read) for read in reads]
    for revision in evidence.revisions:
        if not revision.listed:
            known.append((revision.at, revision.number, next(iter(revision.changes.values()))))
    known.sort(key=lambda each: each[0], reverse=True)  # taken from the end
    mine: dict[str, Read] = {}
    newest = 0
    shown: Read | Changed | None = None
    for read in sorted(reads, key=lambda read: read.began):
        while known and known[-1][0] < read.began:
            _, number, line = known.pop()
            if number > newest:
                newest, shown = number, line
        before = mine.get(read.client)
        if before is not None and before.ended <= read.began and before.revision > read.revision:
            what = f"{read.client} read revision {before.revision} and then, in another read, revision {read.revision}"
            check.found(what, before, read)
        elif newest > read.revision:
            showed = f"{shown.client} had read" if isinstance(shown, Read) else "the watch had delivered"
            check.found(
                f"{read.client} read revision {read.revision} after {showed} {newest}: the read is stale", shown, read
            )
        mine[read.client] = read
