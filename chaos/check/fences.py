"""G2, fencing: one engine in office at a time, only that one writes the status, and a masked rank stays masked."""

from __future__ import annotations

from chaos.check.evidence import Check, Keyspace, Revision, epoch_of, typed
from chaos.record.record import Changed, Happened
from membership.base.events import Event
from membership.base.rank_id import RankId
from membership.store.records import EngineStatus


class Fences(Check):
    """A replaced engine or controller, and an evicted rank, has no effect any more."""

    promise, title = "G2", "fences"

    def revision(self, before: Keyspace, revision: Revision) -> None:
        status = revision.put("engine-status")
        if status is not None and not revision.listed:
            self.judged += 1
            _status(self, before, status)

    def finish(self) -> None:
        events, elected = self.evidence.events, 0
        for kind, role in (("engine_elected", "engine"), ("leader_elected", "controller")):
            elected += _rising(self, [event for event in events if event.kind == kind], role)
        moved_on = self.evidence.moved_on
        _unmasked(self, [event for event in events if event.kind != "rank_masked" or not moved_on(event)])
        stood_down = [event for event in events if event.kind == "engine_stood_down" or event.fields.get("fenced")]
        self.figures |= {"statuses": self.judged, "elections": elected, "fenced": len(stood_down)}


def _status(check: Check, before: Keyspace, changed: Changed) -> None:
    """The engine in office wrote it; its epoch is committed and not older than before; its mask only grows."""
    status, office, view = typed(changed, EngineStatus), before.get("engine"), before.get("view")
    token = office.create_revision if office is not None else 0
    if status.token != token:
        leading = f"engine {token}" if token else "no engine"
        check.found(f"engine {status.token} published the status while {leading} was in office", office, changed)
        return
    epoch = epoch_of(view)
    if status.epoch > epoch:
        check.found(f"engine {token} uses epoch {status.epoch}, and only {epoch} is committed", view, changed)
    last = before.get("engine-status")
    old = typed(last, EngineStatus) if last is not None else None
    if old is None or old.token != status.token:
        return
    if status.epoch < old.epoch:
        check.found(f"engine {token} went back from epoch {old.epoch} to {status.epoch}", last, changed)
    elif status.epoch == old.epoch and not set(old.masked) <= set(status.masked):
        back = sorted(set(old.masked) - set(status.masked))
        check.found(f"ranks {back} were masked in epoch {old.epoch} and came back within it", last, changed)


def _rising(check: Check, events: list[Event], role: str) -> int:
    """No fencing token is used for two elections; returns the number of elections."""
    known: dict[int, Event] = {}
    for event in events:
        token = int(event.fields.get("token", 0))
        if token in known:
            lines = (Happened(event=known[token]), Happened(event=event))
            check.found(f"token {token} elected the {role} twice", *lines)
        known[token] = event
    return len(known)


def _unmasked(check: Check, events: list[Event]) -> None:
    """An engine that has masked a rank never accepts the same incarnation again."""
    masked: dict[RankId, Event] = {}
    for event in events:
        if event.kind == "engine_elected":
            masked.clear()
        elif event.kind in ("rank_masked", "rank_joined") and event.rank is not None:
            key = RankId(event.rank, int(event.fields.get("incarnation", 0)))
            if event.kind == "rank_masked":
                masked[key] = event
            elif key in masked:
                what = f"rank {key.rank} (incarnation {key.incarnation}) was masked and joined again"
                check.found(what, Happened(event=masked[key]), Happened(event=event))
