"""G2, fencing: engines hold office one after the other, only the one in office tells the status, nobody is unmasked."""

from __future__ import annotations

from chaos.check.evidence import Evidence, Keyspace, Outcome, Trial, epoch_of, typed
from chaos.record.record import Changed, Happened
from membership.base.events import Event
from membership.store.records import EngineStatus


def check_fences(evidence: Evidence) -> Outcome:
    """Who was replaced, or given up, has no effect any more."""
    trial = Trial("G2", "fences", evidence)
    statuses = elected = 0
    for before, revision in evidence.walk():
        status = revision.put("engine-status")
        if status is not None and not revision.listed:
            statuses += 1
            _status(trial, before, status)
    trial.judged = statuses
    for kind, who in (("engine_elected", "engine"), ("leader_elected", "controller")):
        elected += _rising(trial, [e for e in evidence.events if e.kind == kind], who)
    _unmasked(
        trial, [event for event in evidence.events if event.kind != "rank_masked" or not evidence.moved_on(event)]
    )
    trial.figures |= {"statuses": statuses, "elections": elected}
    stood_down = [e for e in evidence.events if e.kind == "engine_stood_down" or e.fields.get("fenced")]
    trial.figures["fenced"] = len(stood_down)
    return trial.outcome()


def _status(trial: Trial, before: Keyspace, changed: Changed) -> None:
    """The engine in office wrote it; its epoch is committed and not older than before; its mask only grows."""
    status, office, view = typed(changed, EngineStatus), before.get("engine"), before.get("view")
    token = office.create_revision if office is not None else 0
    if status.token != token:
        what = f"engine {status.token} told the status when {f'engine {token}' if token else 'no engine'} was in office"
        trial.found(what, office, changed)
        return
    epoch = epoch_of(view)
    if status.epoch > epoch:
        trial.found(f"engine {token} uses epoch {status.epoch}, and only {epoch} is committed", view, changed)
    last = before.get("engine-status")
    old = typed(last, EngineStatus) if last is not None else None
    if old is None or old.token != status.token:
        return
    if status.epoch < old.epoch:
        trial.found(f"engine {token} went back from epoch {old.epoch} to {status.epoch}", last, changed)
    elif status.epoch == old.epoch and not set(old.masked) <= set(status.masked):
        back = sorted(set(old.masked) - set(status.masked))
        trial.found(f"ranks {back} were masked in epoch {old.epoch} and came back within it", last, changed)


def _rising(trial: Trial, events: list[Event], who: str) -> int:
    """Fencing tokens rise from one election to the next: how many there were."""
    known: dict[int, Event] = {}
    for event in events:
        token = int(event.fields.get("token", 0))
        if token in known:
            lines = (Happened(event=known[token]), Happened(event=event))
            trial.found(f"token {token} elected the {who} twice", *lines)
        known[token] = event
    return len(known)


def _unmasked(trial: Trial, events: list[Event]) -> None:
    """An engine that has masked a rank never takes the same incarnation in again."""
    masked: dict[tuple[int, int], Event] = {}
    for event in events:
        if event.kind == "engine_elected":
            masked.clear()
        elif event.kind in ("rank_masked", "rank_joined") and event.rank is not None:
            key = (event.rank, int(event.fields.get("incarnation", 0)))
            if event.kind == "rank_masked":
                masked[key] = event
            elif key in masked:
                what = f"rank {key[0]} (incarnation {key[1]}) was masked and joined again"
                trial.found(what, Happened(event=masked[key]), Happened(event=event))
