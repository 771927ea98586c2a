"""G5: operations go one at a time, by the table of legal phases, take effect in one transaction, and end in time."""

from __future__ import annotations

from itertools import pairwise

from chaos.check.evidence import Evidence, Keyspace, Outcome, Revision, Trial, typed
from chaos.record.record import Changed
from membership.store.phases import TRANSITIONS
from membership.store.records import Desired, Operation, Phase, View

SLACK_S = 2.0  # after its deadline: the look that ends it, and its write
RECOVERY_S = 20.0  # of whoever must end it, after a fault of the store, a controller or a machine
LEADERLESS_S = 5.0  # a new leader may take so long to look


def check_operations(evidence: Evidence) -> Outcome:
    """The whole life of each operation, and that there is one at a time."""
    return _Operations(evidence).judge()


class _Operations:
    """Goes through the revisions with the operations that are under way."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.trial = Trial("G5", "operations", evidence)
        self.active: dict[str, Changed] = {}
        self.ended: list[tuple[Operation, Changed, float]] = []  # when it did
        self.held_up: list[tuple[float, float]] = []  # when nobody could end an operation
        self.done = self.aborted = 0
        self.leaderless: float | None = None

    def judge(self) -> Outcome:
        """The outcome, once all is gone through."""
        for before, revision in self.evidence.walk():
            self._leader(revision)
            for name, changed in revision.changes.items():
                if name.startswith("ops/"):
                    self._operation(before, revision, before.get(name), changed)
        self._in_time()
        self.trial.figures |= {"done": self.done, "rolled_back": self.aborted}
        return self.trial.outcome()

    def _operation(self, before: Keyspace, revision: Revision, old: Changed | None, new: Changed) -> None:
        if new.deleted:
            if not revision.listed and old is not None and typed(old, Operation).active:
                self.trial.found("an operation was forgotten before it had ended", old, new)
            self.active.pop(new.key, None)
            return
        operation = typed(new, Operation)
        if not revision.listed:
            if old is None:
                self._proposed(revision, operation, new)
            else:
                self._moved(before, revision, old, new)
        if operation.active:
            self.active[new.key] = new
        else:
            self.active.pop(new.key, None)
            if old is None or typed(old, Operation).active:
                self.ended.append((operation, new, min(new.at, operation.finished or new.at)))

    def _proposed(self, revision: Revision, operation: Operation, new: Changed) -> None:
        self.trial.judged += 1
        name = f"operation {operation.id}"
        other = next(iter(self.active.values()), None)
        if other is not None:
            what = f"two operations are active at once: {typed(other, Operation).id} and {operation.id}"
            self.trial.found(what, other, new)
        if operation.phase is not Phase.PROPOSED:
            self.trial.found(f"{name} begins as {operation.phase}", new)
        asked = revision.put("desired")
        if asked is None or typed(asked, Desired).operation != operation.id:
            self.trial.found(f"{name} was proposed without what it makes desired: not one transaction", new)

    def _moved(self, before: Keyspace, revision: Revision, old: Changed, new: Changed) -> None:
        was, now = typed(old, Operation), typed(new, Operation)
        name = f"operation {now.id}"
        if not was.active:
            self.trial.found(f"{name} was changed after it had ended ({was.phase})", old, new)
            return
        path = [was.phase, *(Phase(p) for p in now.phase_times if p not in was.phase_times)]
        illegal = next(((a, b) for a, b in pairwise(path) if b not in TRANSITIONS[a]), None)
        if path[-1] is not now.phase:
            self.trial.found(f"{name} is {now.phase}, and has gone from {was.phase} to {path[-1]}", old, new)
        elif illegal is not None:
            self.trial.found(f"{name} went from {illegal[0]} to {illegal[1]}, which is not legal", old, new)
        if Phase.COMMITTED in path[1:]:
            self._committed(before, revision, now, new)
        if now.phase is Phase.ABORTED:
            self.aborted += 1
            if revision.put("desired") is None:
                self.trial.found(f"{name} was rolled back, and what it made desired was not", old, new)
        self.done += now.phase is Phase.DONE

    def _committed(self, before: Keyspace, revision: Revision, operation: Operation, new: Changed) -> None:
        """Its epoch is that of the view, which has as many ranks as it asked for."""
        view = revision.put("view") or before.get("view")
        now = typed(view, View) if view is not None else View(epoch=0)
        name = f"operation {operation.id}"
        if operation.epoch != now.epoch:
            what = f"{name} says that epoch {operation.epoch} is its commit, and the epoch is {now.epoch}"
            self.trial.found(what, view, new)
        elif len(now.members) != operation.target:
            what = f"{name} asked for {operation.target} ranks, and was committed with {len(now.members)}"
            self.trial.found(what, view, new)

    # --- in time

    def _leader(self, revision: Revision) -> None:
        leader = revision.changes.get("leader")
        if leader is None:
            return
        if leader.deleted:
            self.leaderless = leader.at
        elif self.leaderless is not None:
            self.held_up.append((self.leaderless, leader.at + LEADERLESS_S))
            self.leaderless = None

    def _in_time(self) -> None:
        """Each ended by its deadline, or as soon as somebody could end it who was held up by a fault."""
        for dealt in self.evidence.faults:
            if not dealt.fault.victim.startswith("rank "):
                self.held_up.append((dealt.fault.at, max(dealt.healed_at, dealt.fault.seen_at) + RECOVERY_S))
        if self.leaderless is not None:
            self.held_up.append((self.leaderless, self.evidence.ended))
        self.held_up.sort()
        late = [(op, changed, at) for op, changed, at in self.ended if op.deadline and at > self._limit(op)]
        for operation, changed, at in late:
            what = f"operation {operation.id} ended {at - operation.deadline:.1f} s after its deadline"
            self.trial.found(what, changed)
        for changed in self.active.values():
            operation = typed(changed, Operation)
            if operation.deadline and self.evidence.ended > self._limit(operation):
                what = f"operation {operation.id} is still {operation.phase} after its deadline"
                self.trial.found(f"{what} ({self.evidence.since(operation.deadline)})", changed)

    def _limit(self, operation: Operation) -> float:
        limit = operation.deadline + SLACK_S
        for began, ended in self.held_up:
            if began > limit:
                break
            limit = max(limit, ended)
        return limit
