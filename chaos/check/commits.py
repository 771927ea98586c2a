"""G1, one truth: each epoch is committed once, by the leader, as it was staged, with members that have prepared it."""

from __future__ import annotations

from chaos.check.evidence import Check, Evidence, Keyspace, Revision, epoch_of, typed
from chaos.record.record import Changed, Happened
from membership.base.rank_id import RankId
from membership.store.records import Assignment, View

LED = ("view", "next", "incarnation")  # with `assign/…`: keys that only the leading controller writes


def leader_of(before: Keyspace) -> int:
    """The fencing token of the leader; 0: there was none."""
    return before["leader"].create_revision if "leader" in before else 0


class Commits(Check):
    """Epochs, and what must go with each commit in the same transaction."""

    promise, title = "G1", "commits"

    def __init__(self, evidence: Evidence) -> None:
        super().__init__(evidence)
        self.checked: list[int] = []  # revisions
        self.commits: dict[int, tuple[Changed, int]] = {}  # epoch -> where, the leader's token
        self.prepared: dict[RankId, Changed] = {}  # the last record of a rank with its prepared revision
        self.out: dict[RankId, Changed] = {}  # ranks that were evicted, and by which change: they may not come back
        self.claims = dict(evidence.commit_events)

    def revision(self, before: Keyspace, revision: Revision) -> None:
        if not revision.listed:
            self.checked.append(revision.number)
            self._check(before, revision)
        self._note(before, revision)

    def finish(self) -> None:
        for number, events in self.claims.items():
            if self.checked and self.checked[0] <= number <= self.checked[-1] and not self.evidence.gaps:
                for event in events:
                    what = f"an event reports a commit of epoch {event.epoch} at revision {number}: there was none"
                    self.found(what, Happened(event=event))
        self.figures["epochs"] = len(self.commits)
        self.figures["leaders"] = len({leader for _, leader in self.commits.values()})

    def _check(self, before: Keyspace, revision: Revision) -> None:
        found = self.found
        led = [name for name in revision.changes if name in LED or name.startswith("assign/")]
        if led and not leader_of(before):
            found(f"{led[0]} was changed while there was no leader", before.get(led[0]), revision.changes[led[0]])
        view = revision.changes.get("view")
        if view is not None and view.deleted:
            found("the view was deleted", before.get("view"), view)
        elif view is not None:
            self.judged += 1
            self._epoch(before, view)
            self._staged(before, revision, view)
            self._members(before, view)
            self._claimed(before, view)

    def _epoch(self, before: Keyspace, view: Changed) -> None:
        epoch, last = epoch_of(view), before.get("view")
        first = self.commits.get(epoch)
        if first is not None:
            self.found(
                f"epoch {epoch} was committed twice: revision {first[0].revision} by leader token {first[1]}, "
                f"revision {view.revision} by leader token {leader_of(before)}",
                first[0], before.get("leader"), view,
            )  # fmt: skip
        elif epoch != epoch_of(last) + 1:
            follows = f"epoch {epoch_of(last)}" if last is not None else "nothing"
            self.found(f"epoch {epoch} follows {follows}", last, view)

    def _staged(self, before: Keyspace, revision: Revision, view: Changed) -> None:
        """The commit equals the staged view and unstages it."""
        epoch, staged, cleared = epoch_of(view), before.get("next"), revision.changes.get("next")
        if staged is None:
            self.found(f"epoch {epoch} was committed without having been staged", view)
        elif staged.value != view.value:
            self.found(f"epoch {epoch} was committed otherwise than it was staged", staged, view)
        elif cleared is None or not cleared.deleted:
            self.found(f"epoch {epoch} was committed and is still staged: not one transaction", staged, view)

    def _members(self, before: Keyspace, view: Changed) -> None:
        """All members have prepared the staged view; none was evicted before."""
        committed, staged = typed(view, View), before.get("next")
        for member in committed.members:
            key = RankId(member.rank, member.incarnation)
            name = f"rank {member.rank} (incarnation {member.incarnation})"
            if key in self.out:
                what = f"{name} was evicted and is back in epoch {committed.epoch}"
                self.found(what, self.out[key], view)
            record = self.prepared.get(key)
            prepared = record.value["prepared_revision"] if record is not None else 0
            if staged is not None and prepared != staged.revision:
                what = (
                    f"epoch {committed.epoch} was committed with {name}, which has not prepared it: "
                    f"it was staged at revision {staged.revision}, {name} has prepared {prepared or 'nothing'}"
                )
                self.found(what, staged, record, view)

    def _claimed(self, before: Keyspace, view: Changed) -> None:
        """Events that claim this commit come from the leader."""
        leader = leader_of(before)
        for event in self.claims.pop(view.revision, ()):
            token = event.fields.get("token")
            if token != leader:
                what = f"epoch {event.epoch} was committed by leader token {token}; the leader's was {leader or 'none'}"
                self.found(what, before.get("leader"), view, Happened(event=event))

    def _note(self, before: Keyspace, revision: Revision) -> None:
        for name, changed in revision.changes.items():
            if name.startswith("ranks/") and not changed.deleted and changed.value.get("prepared_revision"):
                self.prepared[RankId(changed.value["rank"], changed.value["incarnation"])] = changed
            elif name.startswith("assign/"):
                for key in specs_of(before.get(name)) - specs_of(changed):
                    self.out.setdefault(key, changed)
        view = revision.put("view")
        if view is not None:
            self.commits[epoch_of(view)] = (view, leader_of(before))


class Incarnations(Check):
    """Each incarnation is assigned once, in rising order, with its counter; a slot has one at a time."""

    promise, title = "G1", "incarnations"

    def __init__(self, evidence: Evidence) -> None:
        super().__init__(evidence)
        self.given: dict[int, tuple[int, str, Changed]] = {}  # incarnation -> rank, node, where
        self.places: dict[str, set[RankId]] = {}  # node -> ranks assigned to its agent

    def revision(self, before: Keyspace, revision: Revision) -> None:
        if not revision.listed:
            self._counter(before.get("incarnation"), revision.changes.get("incarnation"))
        for name, changed in revision.changes.items():
            if name.startswith("assign/"):
                self._assigned(before, revision, name.removeprefix("assign/"), changed)

    def finish(self) -> None:
        self.figures["incarnations"] = len(self.given)

    def _counter(self, old: Changed | None, new: Changed | None) -> None:
        if new is not None and (new.deleted or (old is not None and _count(new) <= _count(old))):
            self.found("the counter of incarnations went back", old, new)

    def _assigned(self, before: Keyspace, revision: Revision, node: str, changed: Changed) -> None:
        old, new = specs_of(before.get("assign/" + node)), specs_of(changed)
        self.places[node] = new
        for rank, incarnation in sorted(new - old):
            first = self.given.setdefault(incarnation, (rank, node, changed))
            self.judged += 1
            if revision.listed:
                continue
            if first[2] is not changed or first[:2] != (rank, node):
                self.found(
                    f"incarnation {incarnation} was given out twice: to rank {first[0]} on {first[1]} at revision "
                    f"{first[2].revision}, to rank {rank} on {node} at revision {changed.revision}",
                    first[2], changed,
                )  # fmt: skip
                continue
            known, counter = before.get("incarnation"), revision.put("incarnation")
            if counter is None or not (_count(known) < incarnation <= _count(counter)):
                what = f"incarnation {incarnation} of rank {rank} was given out without being counted"
                self.found(what, known, counter, changed)
        if not revision.listed and new - old:
            self._slots(changed)

    def _slots(self, changed: Changed) -> None:
        """No slot may have two incarnations at once."""
        seen: dict[int, int] = {}
        for rank, incarnation in sorted(key for place in self.places.values() for key in place):
            if rank in seen:
                what = f"slot {rank} has two incarnations at once, {seen[rank]} and {incarnation}"
                self.found(what, self.given[seen[rank]][2], changed)
            seen[rank] = incarnation


def _count(counter: Changed | None) -> int:
    return int(counter.value.get("value", 0)) if counter is not None and not counter.deleted else 0


def specs_of(changed: Changed | None) -> set[RankId]:
    """The ranks of an assignment."""
    if changed is None or changed.deleted:
        return set()
    return {RankId(spec.rank, spec.incarnation) for spec in typed(changed, Assignment).ranks}
