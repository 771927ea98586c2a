"""G5, atomic operations: one at a time, only legal phases, commit in one transaction, end by the deadline."""

from __future__ import annotations

from itertools import pairwise

from chaos.check.evidence import Check, Evidence, Keyspace, Revision, typed
from chaos.record.record import Changed
from membership.store.phases import TRANSITIONS
from membership.store.records import Desired, Operation, Phase, View

SLACK_S = 2.0  # after its deadline: until the controller looks, and its write
RECOVERY_S = 20.0  # of the controller, after a fault of the store, a controller or a machine
LEADERLESS_S = 5.0  # a new leader's time until it looks


class Operations(Check):
    """Each operation from proposal to end, and that there is one at a time."""

    promise, title = "G5", "operations"

    def __init__(self, evidence: Evidence) -> None:
        super().__init__(evidence)
        self.active: dict[str, Changed] = {}
        self.ended: list[tuple[Operation, Changed, float]] = []  # and when it ended
        self.held_up: list[tuple[float, float]] = []  # when no controller could end an operation
        self.done = self.aborted = 0
        self.leaderless: float | None = None

    def revision(self, before: Keyspace, revision: Revision) -> None:
        self._leader(revision)
        for name, changed in revision.changes.items():
            if name.startswith("ops/"):
                self._operation(before, revision, before.get(name), changed)

    def finish(self) -> None:
        self._in_time()
        self.figures |= {"done": self.done, "rolled_back": self.aborted}

    def _operation(self, before: Keyspace, revision: Revision, old: Changed | None, new: Changed) -> None:
        if new.deleted:
            if not revision.listed and old is not None and typed(old, Operation).active:
                self.found("an operation was forgotten before it had ended", old, new)
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
        self.judged += 1
        name = f"operation {operation.id}"
        other = next(iter(self.active.values()), None)
        if other is not None:
            what = f"two operations are active at once: {typed(other, Operation).id} and {operation.id}"
            self.found(what, other, new)
        if operation.phase is not Phase.PROPOSED:
            self.found(f"{name} begins as {operation.phase}", new)
        asked = revision.put("desired")
        if asked is None or typed(asked, Desired).operation != operation.id:
            self.found(f"{name} was proposed without what it makes desired: not one transaction", new)

    def _moved(self, before: Keyspace, revision: Revision, old: Changed, new: Changed) -> None:
        was, now = typed(old, Operation), typed(new, Operation)
        name = f"operation {now.id}"
        if not was.active:
            self.found(f"{name} was changed after it had ended ({was.phase})", old, new)
            return
        path = [was.phase, *(Phase(p) for p in now.phase_times if p not in was.phase_times)]
        illegal = next(((a, b) for a, b in pairwise(path) if b not in TRANSITIONS[a]), None)
        if path[-1] is not now.phase:
            self.found(f"{name} is {now.phase}, and has gone from {was.phase} to {path[-1]}", old, new)
        elif illegal is not None:
            self.found(f"{name} went from {illegal[0]} to {illegal[1]}, which is not legal", old, new)
        if Phase.COMMITTED in path[1:]:
            self._committed(before, revision, now, new)
        if now.phase is Phase.ABORTED:
            self.aborted += 1
            if revision.put("desired") is None:
                self.found(f"{name} was rolled back, and what it made desired was not", old, new)
        self.done += now.phase is Phase.DONE

    def _committed(self, before: Keyspace, revision: Revision, operation: Operation, new: Changed) -> None:
        """Its epoch is the view's, and the view has as many ranks as it asked for."""
        view = revision.put("view") or before.get("view")
        now = typed(view, View) if view is not None else View(epoch=0)
        name = f"operation {operation.id}"
        if operation.epoch != now.epoch:
            what = f"{name} says that epoch {operation.epoch} is its commit, and the epoch is {now.epoch}"
            self.found(what, view, new)
        elif len(now.members) != operation.target:
            what = f"{name} asked for {operation.target} ranks, and was committed with {len(now.members)}"
            self.found(what, view, new)

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
        """Each ended by its deadline, or soon after the end of a fault that kept the controller from ending it."""
        for injected in self.evidence.faults:
            if not injected.fault.victim.startswith("rank "):
                self.held_up.append((injected.fault.at, max(injected.healed_at, injected.fault.seen_at) + RECOVERY_S))
        if self.leaderless is not None:
            self.held_up.append((self.leaderless, self.evidence.ended))
        self.held_up.sort()
        late = [(op, changed, at) for op, changed, at in self.ended if op.deadline and at > self._limit(op)]
        for operation, changed, at in late:
            what = f"operation {operation.id} ended {at - operation.deadline:.1f} s after its deadline"
            self.found(what, changed)
        for changed in self.active.values():
            operation = typed(changed, Operation)
            if operation.deadline and self.evidence.ended > self._limit(operation):
                what = f"operation {operation.id} is still {operation.phase} after its deadline"
                self.found(f"{what} ({self.evidence.since(operation.deadline)})", changed)

    def _limit(self, operation: Operation) -> float:
        limit = operation.deadline + SLACK_S
        for began, ended in self.held_up:
            if began > limit:
                break
            limit = max(limit, ended)
        return limit
